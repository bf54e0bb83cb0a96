#!/usr/bin/env bash
# A run on nodes of a Slurm cluster, one process a node (JAX finds the others by Slurm's variables).
#
#   tpu_scripts/slurm.sh --nodes 4 [--gpus 8] [--time 24:00:00] [--partition NAME] [--name NAME] [--tries 50]
#                        [--OPTION=VALUE]... [--dry-run] -- ARGUMENT...
#
# Two minutes before the time is over a checkpoint is saved, and the job puts itself back into the queue; so it does after
# a host was lost (134, 137, 143) or what may pass by itself (75), at most --tries times, and not where it was cancelled.
# Of jobs of one name, by default that of RUN_DIR or of the gin file, one runs at a time. Other options, written with =,
# are sbatch's. The log is runs/slurm-JOB.log; runs/ and prepared/ must lie where all nodes see them.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

nodes=1 gpus=8 time=24:00:00 partition='' name='' tries=50 dry_run=''
more=()
fail() {
  echo "slurm: $1" >&2
  exit 2
}
while (($#)); do
  case $1 in
    --nodes | --gpus | --time | --partition | --name | --tries)
      (($# > 1)) || fail "$1 wants a value"
      declare "${1#--}=$2"
      shift 2
      ;;
    --dry-run) dry_run=1; shift ;;
    --help) sed -n -e '2,/^set /{' -e '/^set /d' -e 's/^# \{0,1\}//p' -e '}' "$0"; exit 0 ;;
    --) shift; break ;;
    --*=*) more+=("$1"); shift ;;
    *) fail "unknown option $1; tpu_scripts/slurm.sh --help lists them, and sbatch's are written --OPTION=VALUE" ;;
  esac
done
[[ $nodes =~ ^[1-9][0-9]*$ && $gpus =~ ^[1-9][0-9]*$ && $tries =~ ^(0|[1-9][0-9]*)$ ]] || fail '--nodes, --gpus and --tries are numbers'
(($#)) || fail 'what to run? write the arguments of moe_jax.main after --, such as --gin_file=...'
if [[ ! $name ]]; then # the same for what would write into the same folder
  for argument; do
    case $argument in
      --gin.RUN_DIR=* | --gin_bindings=RUN_DIR=*) name=${argument#*RUN_DIR=}; break ;;
      --gin_file=*) name=${argument#*=} ;;
    esac
  done
  name=moe_jax.${name//[^A-Za-z0-9._]/-}
fi
script="#!/usr/bin/env bash
cd $(printf '%q' "$here") || exit
why=''
srun --kill-on-bad-exit=1 .venv/bin/python -m moe_jax.main --distributed $(printf '%q ' "$@")&
run=\$!
# srun, told to end, kills what it runs; scancel tells the processes themselves, so that they save.
trap 'why=time; scancel --signal TERM \"\$SLURM_JOB_ID\"' USR1
trap 'why=told' TERM # of a job that is cancelled: Slurm tells the processes, and the job must not come back
code=0; wait \$run || code=\$?
while kill -0 \$run 2>/dev/null; do code=0; wait \$run || code=\$?; done
if [[ \$why ]]; then # the signal may have ended the waiting just as the run ended; the shell still knows its code
  true_code=0; wait \$run 2>/dev/null || true_code=\$?
  ((true_code == 127)) || code=\$true_code
fi
case \$why.\$code in
  told.* | *.0 | *.2) exit \$code ;;
  time.* | .75 | .134 | .137 | .143) ;;
  *) exit \$code ;;
esac
if ((\${SLURM_RESTART_COUNT:-0} < $tries)); then
  scontrol requeue \"\$SLURM_JOB_ID\"
else
  echo \"slurm: ended with \$code; giving up after it was queued again $tries times\" >&2
fi
exit \$code"
submit=(sbatch --job-name "$name" --dependency singleton --nodes "$nodes" --ntasks-per-node 1 --gpus-per-node "$gpus")
submit+=(--time "$time" --signal B:USR1@120 --requeue --open-mode append --chdir "$here" --output runs/slurm-%j.log)
[[ ! $partition ]] || submit+=(--partition "$partition")
submit+=("${more[@]}")
if [[ $dry_run ]]; then
  printf '%q ' "${submit[@]}"
  printf '<<< %q\n' "$script"
else
  mkdir -p "$here/runs" # git does not have it, and Slurm would keep no log
  "${submit[@]}" <<<"$script"
fi
