#!/usr/bin/env bash
# One TPU slice, from asking for it to deleting it.
#
#   tpu_scripts/tpu.sh create  --name NAME --zone ZONE --type v5p-128 [--spot] [--project ID] [--runtime VERSION]
#   tpu_scripts/tpu.sh setup   --name NAME --zone ZONE [--bucket BUCKET]   the code of this checkout on all hosts
#   tpu_scripts/tpu.sh launch  --name NAME --zone ZONE -- ARGUMENT...   python -m moe_jax.main --distributed ARGUMENT...
#   tpu_scripts/tpu.sh logs    --name NAME --zone ZONE                     of the first host, as they grow
#   tpu_scripts/tpu.sh status  --name NAME --zone ZONE
#   tpu_scripts/tpu.sh babysit (options of create and setup) -- ARGUMENT...    all of these, after a preemption again
#   tpu_scripts/tpu.sh stop    --name NAME --zone ZONE                     deletes the slice; what is in the bucket stays
#
# Every command may be given again: what is there already is left as it is. `--dry-run` prints what it would do.
# With --bucket (one with a hierarchical namespace), runs/ and prepared/ of all hosts lie in it by gcsfuse, so that another
# slice goes on from their checkpoints; without it they are gone with the slice. Several slices, TPU7x, Kubernetes: gke.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

name='' zone='' type='' project='' runtime='' bucket='' spot='' dry_run='' every=60
usage() { sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"; }
fail() {
  echo "tpu: $1" >&2
  exit 2
}
say() { echo "tpu: $1" >&2; }

command=${1:-}
[[ $command && $command != --help ]] || { usage; exit 0; }
shift
while (($#)); do
  case $1 in
    --name | --zone | --type | --project | --runtime | --bucket | --every)
      (($# > 1)) || fail "$1 wants a value"
      declare "${1#--}=$2"
      shift 2
      ;;
    --spot) spot=1; shift ;;
    --dry-run) dry_run=1; shift ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown option $1; tpu_scripts/tpu.sh --help lists them" ;;
  esac
done
[[ $name ]] || fail 'which slice? give --name'
[[ $name =~ ^[a-z]([a-z0-9-]{0,60}[a-z0-9])?$ ]] || fail "--name $name: small letters, digits and dashes, a letter first"
[[ $zone ]] || fail 'where? give --zone, such as us-east5-a'
where=(--zone "$zone")
[[ ! $project ]] || where+=(--project "$project")

# What changes anything goes through here; with --dry-run it is printed, so that a shell would read it again.
act() {
  if [[ $dry_run ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

# The state of the queued resource: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; NONE where there is none.
state() {
  local found
  if found=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format 'value(state.state)' 2>&1); then
    echo "${found:-NONE}"
  elif [[ $found == *NOT_FOUND* || $found == *'not found'* ]]; then
    echo NONE
  else
    echo "tpu: gcloud: $found" >&2
    return 1
  fi
}

found_or() { # the state; of a dry run what is given
  if [[ $dry_run ]]; then echo "$1"; else state; fi
}

on_all() { act gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker all --command "$1"; }

runtime_of() { # the image for a type, where --runtime does not say it
  case $1 in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v4-*) echo tpu-ubuntu2204-base ;;
    *) fail "--type $1: name its image with --runtime" ;;
  esac
}

create() {
  local found
  found=$(found_or NONE)
  if [[ $found != NONE ]]; then
    say "$name is there already: $found"
    return
  fi
  local kind=()
  [[ ! $spot ]] || kind=(--spot)
  act gcloud compute tpus queued-resources create "$name" --node-id "$name" "${where[@]}" \
    --accelerator-type "$type" --runtime-version "$runtime" "${kind[@]}"
}

setup() {
  local archive=${TMPDIR:-/tmp}/$name.moe_jax.tar.gz mount=''
  act git -C "$here/.." archive --format tar.gz --output "$archive" HEAD
  act gcloud compute tpus tpu-vm scp "$archive" "$name:moe_jax.tar.gz" "${where[@]}" --worker all
  act rm -f "$archive"
  for folder in runs prepared; do
    [[ ! $bucket ]] || mount+="
mkdir -p $folder; mountpoint -q $folder || gcsfuse --implicit-dirs --only-dir $(printf '%q' "$name/$folder") $(printf '%q' "$bucket") $folder"
  done
  on_all "set -e; mkdir -p moe_jax; tar -xzf moe_jax.tar.gz -C moe_jax; cd moe_jax
test -x .venv/bin/python || python3 -m venv .venv
.venv/bin/pip install --quiet --upgrade -e '.[tpu,data]'$mount"
}

launch() {
  (($#)) || fail 'what to run? write the arguments of moe_jax.main after --, such as --gin_file=...'
  local run remote
  run=$(printf '%q ' .venv/bin/python -m moe_jax.main --distributed "$@")
  # A host that runs it already goes on with it; one that has ended says so in `ended`.
  remote="cd moe_jax; if [ -e pid ] && kill -0 \"\$(cat pid)\" 2>/dev/null; then exit 0; fi; rm -f ended
nohup sh -c $(printf '%q' "tpu_scripts/supervise.sh -- $run; echo \$? > ended") >> run.log 2>&1 < /dev/null & echo \$! > pid"
  on_all "$remote"
}

ended() { # the exit code of the first host's run; empty while it runs, or where it never began
  gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker 0 --command 'cat moe_jax/ended 2>/dev/null || true'
}

logs() {
  act gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker 0 --command 'tail -n 50 -F moe_jax/run.log'
}

stop() {
  local found
  found=$(found_or ACTIVE)
  if [[ $found == NONE ]]; then
    say "$name is not there"
    return
  fi
  act gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

babysit() {
  (($#)) || fail 'what to run? write the arguments of moe_jax.main after --, such as --gin_file=...'
  if [[ $dry_run ]]; then
    create
    setup
    launch "$@"
    stop
    return
  fi
  local found='' before='' code launched=''
  while true; do
    found=$(state) || found=UNKNOWN
    [[ $found == "$before" ]] || say "$(date -u +%FT%TZ) $name: $found"
    before=$found
    case $found in
      NONE)
        launched=''
        create || say 'could not be created; trying again'
        ;;
      ACTIVE)
        if [[ ! $launched ]]; then
          if setup && launch "$@"; then launched=1; else say 'could not be set up; trying again'; fi
        fi
        code=$(ended) || code=''
        code=${code//[[:space:]]/}
        case $code in
          '') ;;
          0)
            say 'done'
            stop
            return
            ;;
          2)
            say 'ended with an error that has to be mended; the slice is deleted, the last lines of its log are:'
            gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker 0 --command 'tail -n 5 moe_jax/run.log' >&2 || true
            stop
            exit 2
            ;;
          *)
            say "ended with $code; launching it again"
            launched=''
            ;;
        esac
        ;;
      SUSPENDED | SUSPENDING | FAILED)
        say 'was taken away; asking for another'
        launched=''
        gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet || say 'not deleted yet'
        ;;
    esac
    sleep "$every"
  done
}

if [[ $command == create || $command == babysit ]]; then
  [[ $type ]] || fail 'which chips? give --type, such as v5p-128'
  [[ $runtime ]] || runtime=$(runtime_of "$type") || exit 2
fi
case $command in
  create | setup | launch | logs | stop | babysit) "$command" "$@" ;;
  status) state ;;
  *) fail "unknown command $command; tpu_scripts/tpu.sh --help lists them" ;;
esac
