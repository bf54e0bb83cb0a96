#!/usr/bin/env bash
# A run on all GPUs of this machine; started again after what can be survived, going on from its last checkpoint.
#
#   tpu_scripts/gpu.sh [--dry-run] -- ARGUMENT...        the arguments of moe_jax.main, such as --gin_file=...
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

dry_run=()
while (($#)); do
  case $1 in
    --dry-run) dry_run=(--dry-run); shift ;;
    --help) sed -n -e '2,/^set /{' -e '/^set /d' -e 's/^# \{0,1\}//p' -e '}' "$0"; exit 0 ;;
    --) shift; break ;;
    *) echo "gpu: unknown option $1; write the arguments of moe_jax.main after --" >&2; exit 2 ;;
  esac
done
if ((!$#)); then
  echo 'gpu: what to run? write the arguments of moe_jax.main after --, such as --gin_file=...' >&2
  exit 2
fi
# Collectives overlap with products; what is preallocated cannot be fragmented.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"
export XLA_PYTHON_CLIENT_MEM_FRACTION="${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}"
cd "$here/.."
python=.venv/bin/python
[[ -x $python ]] || python=python3
exec "$here/supervise.sh" "${dry_run[@]}" -- "$python" -m moe_jax.main "$@"
