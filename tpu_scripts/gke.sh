#!/usr/bin/env bash
# A run on a Kubernetes cluster of the Cluster Toolkit, on one TPU slice or several.
#
#   tpu_scripts/gke.sh --name NAME --image IMAGE --type v6e-256 [--slices 2] [--mount VOLUME]... [--env NAME=VALUE]...
#                      [--cluster NAME] [--location PLACE] [--project ID] [--OPTION=VALUE]... [--dry-run] -- ARGUMENT...
#
# IMAGE holds a checkout of this repository at /moe_jax with its environment (tpu_scripts/Dockerfile makes one); runs/ and
# prepared/ there should be mounted from a bucket: --mount 'gs://BUCKET/runs;/moe_jax/runs;rw'. Kueue starts the job again
# after a preemption, and the run goes on from its last checkpoint. Other options, written with =, are gcluster's.
set -euo pipefail

name='' image='' type='' slices=1 dry_run=''
more=()
usage() { sed -n -e '2,/^set /{' -e '/^set /d' -e 's/^# \{0,1\}//p' -e '}' "$0"; }
fail() {
  echo "gke: $1" >&2
  exit 2
}
while (($#)); do
  case $1 in
    --name | --image | --type | --slices)
      (($# > 1)) || fail "$1 wants a value"
      declare "${1#--}=$2"
      shift 2
      ;;
    --mount | --env | --cluster | --location | --project)
      (($# > 1)) || fail "$1 wants a value"
      more+=("$1" "$2")
      shift 2
      ;;
    --dry-run) dry_run=1; shift ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    --*=*) more+=("$1"); shift ;;
    *) fail "unknown option $1; tpu_scripts/gke.sh --help lists them, and gcluster's are written --OPTION=VALUE" ;;
  esac
done
[[ $name && $image && $type ]] || fail 'give --name, --image and --type'
[[ $name =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || fail "--name $name: at most 40 small letters, digits and dashes, a letter first"
[[ $slices =~ ^[1-9][0-9]*$ ]] || fail "--slices $slices: not a number of slices"
(($#)) || fail 'what to run? write the arguments of moe_jax.main after --, such as --gin_file=...'
quoted() { # for any shell: the container's need not be bash, which alone reads all that %q writes
  local word quote="'\\''"
  for word; do printf "'%s' " "${word//\'/"$quote"}"; done
}
# The supervisor takes the shell's place, so that it is told when the container is to stop.
run="cd /moe_jax && exec tpu_scripts/supervise.sh -- .venv/bin/python -m moe_jax.main --distributed $(quoted "$@")"
submit=(gcluster job submit --name "$name" --image "$image" --compute-type "$type" --num-slices "$slices" --command "$run")
submit+=(${more[@]+"${more[@]}"})
if [[ $dry_run ]]; then
  printf '%q ' "${submit[@]}"
  echo
else
  "${submit[@]}"
fi
