#!/usr/bin/env bash
# A run on nodes of a Slurm cluster, one process a node (JAX finds the others by Slurm's variables).
#
#   tpu_scripts/slurm.sh --nodes 4 [--gpus 8] [--time 24:00:00] [--partition NAME] [--dry-run] -- ARGUMENT...
#
# Slurm sends SIGTERM two minutes before the time is over: a checkpoint is saved, and the job puts itself back into the
# queue. runs/ and prepared/ must lie where all nodes see them.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

nodes=1 gpus=8 time=24:00:00 partition='' dry_run=''
fail() {
  echo "slurm: $1" >&2
  exit 2
}
while (($#)); do
  case $1 in
    --nodes | --gpus | --time | --partition)
      (($# > 1)) || fail "$1 wants a value"
      declare "${1#--}=$2"
      shift 2
      ;;
    --dry-run) dry_run=1; shift ;;
    --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown option $1; tpu_scripts/slurm.sh --help lists them" ;;
  esac
done
[[ $nodes =~ ^[1-9][0-9]*$ && $gpus =~ ^[1-9][0-9]*$ ]] || fail '--nodes and --gpus are numbers'
(($#)) || fail 'what to run? write the arguments of moe_jax.main after --, such as --gin_file=...'
script="#!/usr/bin/env bash
cd $(printf '%q' "$here") || exit
srun --kill-on-bad-exit=1 .venv/bin/python -m moe_jax.main --distributed $(printf '%q ' "$@")&
run=\$!
trap 'kill -TERM \$run' TERM
code=0; wait \$run || code=\$?
while kill -0 \$run 2>/dev/null; do code=0; wait \$run || code=\$?; done
if ((code != 0 && code != 2)); then scontrol requeue \"\$SLURM_JOB_ID\"; fi
exit \$code"
submit=(sbatch --job-name moe_jax --nodes "$nodes" --ntasks-per-node 1 --gpus-per-node "$gpus" --time "$time")
submit+=(--signal B:TERM@120 --requeue --open-mode append --output runs/slurm-%j.log)
[[ ! $partition ]] || submit+=(--partition "$partition")
if [[ $dry_run ]]; then
  printf '%q ' "${submit[@]}"
  printf '<<< %q\n' "$script"
else
  "${submit[@]}" <<<"$script"
fi
