#!/usr/bin/env bash
# One TPU slice, from asking for it to deleting it.
#
#   tpu_scripts/tpu.sh create  --name NAME --zone ZONE --type v5p-128 [--spot] [--project ID] [--runtime VERSION]
#   tpu_scripts/tpu.sh setup   --name NAME --zone ZONE [--bucket BUCKET] [--extras tpu,data,pretrained]
#                                                       what is committed of this checkout, on all hosts
#   tpu_scripts/tpu.sh launch  --name NAME --zone ZONE [--env NAME=VALUE]... -- ARGUMENT...
#                                                       python -m moe_jax.main --distributed ARGUMENT...
#   tpu_scripts/tpu.sh logs    --name NAME --zone ZONE      of the first host, as they grow
#   tpu_scripts/tpu.sh status  --name NAME --zone ZONE
#   tpu_scripts/tpu.sh babysit (options of create, setup and launch) [--keep] [--tries 20] [--every SECONDS] -- ARGUMENT...
#                                                       all of these, after a preemption again; deletes the slice at the end
#   tpu_scripts/tpu.sh stop    --name NAME --zone ZONE      deletes the slice; what is in the bucket stays
#
# Every command may be given again: what is there already, and a run that goes on, is left as it is. `--dry-run` prints
# what it would do. With --bucket (one with a hierarchical namespace), runs/ and prepared/ of all hosts lie in it by
# gcsfuse, so that another slice goes on from their checkpoints. Without it they are gone with the slice: `babysit` then
# wants --keep, and leaves the slice there. It looks every 60 seconds (--every), and gives up after 20 failures
# (--tries) without a newer checkpoint in runs/. What somebody else deletes it does not ask for again. Several slices,
# TPU7x, Kubernetes: gke.sh.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

name='' zone='' type='' project='' runtime='' bucket='' spot='' dry_run='' every=60 keep='' tries=20 extras=tpu,data,pretrained
variables=() supervisor=() commit=HEAD
# A host that does not answer must not hold up all others.
ssh_flags=(--ssh-flag=-oConnectTimeout=30 --ssh-flag=-oServerAliveInterval=15 --ssh-flag=-oServerAliveCountMax=8)
usage() { sed -n -e '2,/^set /{' -e '/^set /d' -e 's/^# \{0,1\}//p' -e '}' "$0"; }
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
    --name | --zone | --type | --project | --runtime | --bucket | --every | --tries | --extras)
      (($# > 1)) || fail "$1 wants a value"
      declare "${1#--}=$2"
      shift 2
      ;;
    --env)
      [[ ${2:-} =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail '--env wants NAME=VALUE'
      variables+=("$2")
      shift 2
      ;;
    --spot) spot=1; shift ;;
    --keep) keep=1; shift ;;
    --dry-run) dry_run=1; shift ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) fail "unknown option $1; tpu_scripts/tpu.sh --help lists them" ;;
  esac
done
[[ $name ]] || fail 'which slice? give --name'
[[ $name =~ ^[a-z]([a-z0-9-]{0,60}[a-z0-9])?$ ]] || fail "--name $name: small letters, digits and dashes, a letter first"
[[ $zone ]] || fail 'where? give --zone, such as us-east5-a'
[[ $every =~ ^[0-9]+$ && $tries =~ ^[1-9][0-9]*$ ]] || fail '--every and --tries are numbers'
[[ $extras =~ ^[a-z,-]+$ ]] || fail "--extras $extras: names of setup.cfg with commas between them"
bucket=${bucket#gs://}
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

describe() { act gcloud compute tpus queued-resources describe "$name" "${where[@]}" --format "value(${1:-state.state})"; }

# The state of the queued resource: ACTIVE, WAITING_FOR_RESOURCES, SUSPENDED, ...; NONE where there is none.
state() {
  local found
  if found=$(describe 2>&1); then
    grep -xE '[A-Z_]+' <<<"$found" | tail -n 1 | grep . || { # among what gcloud warns of
      echo "tpu: gcloud says no state: $found" >&2
      return 1
    }
  elif [[ $found == *NOT_FOUND* ]]; then # and not bash's "command not found": what costs must not be said to be gone
    echo NONE
  else
    echo "tpu: gcloud: $found" >&2
    return 1
  fi
}

found_or() { # the state; of a dry run what is given
  if [[ $dry_run ]]; then echo "$1"; else state; fi
}

on_all() { act gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "${ssh_flags[@]}" --worker all --command "$1"; }

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
  found=$(found_or NONE) || return
  if [[ $found != NONE ]]; then
    say "$name is there already: $found"
    return
  fi
  act gcloud compute tpus queued-resources create "$name" --node-id "$name" "${where[@]}" \
    --accelerator-type "$type" --runtime-version "$runtime" ${spot:+--spot}
}

# Whether the run of this host goes on, in moe_jax/. The number alone may be another process's since the host was started.
# shellcheck disable=SC2016 # the hosts expand it
alive='grep -qs supervise.sh "/proc/$(cat pid 2>/dev/null)/cmdline"'

setup() {
  local archive=moe_jax.tar.gz mount='' changed sent=0
  changed=$(git -C "$here/.." status --porcelain) || return
  [[ ! $changed ]] || say "the hosts get what is committed, without the changes of$(cut -c 3- <<<"$changed" | head -n 5 | tr -d '\n')"
  [[ $dry_run ]] || archive=$(mktemp) || return
  act git -C "$here/.." archive --format tar.gz --output "$archive" "$commit" || sent=$?
  ((sent)) || act gcloud compute tpus tpu-vm scp "$archive" "$name:moe_jax.tar.gz" "${where[@]}" --worker all || sent=$?
  [[ $dry_run ]] || rm -f "$archive"
  ((!sent)) || return "$sent"
  if [[ $bucket ]]; then
    # A machine that has just started updates itself, and holds apt's lock meanwhile.
    # shellcheck disable=SC2016 # the hosts expand it
    mount='
if ! command -v gcsfuse >/dev/null; then
  keys=/usr/share/keyrings/cloud.google.asc packages=https://packages.cloud.google.com/apt
  curl -fsS $packages/doc/apt-key.gpg | sudo tee $keys >/dev/null
  echo "deb [signed-by=$keys] $packages gcsfuse-$(lsb_release -cs) main" | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -qq -o DPkg::Lock::Timeout=600 update
  sudo apt-get -qq -o DPkg::Lock::Timeout=600 install gcsfuse >/dev/null
fi'
    for folder in runs prepared; do
      mount+="
mkdir -p $folder; mountpoint -q $folder || gcsfuse --implicit-dirs --only-dir $(printf '%q' "$name/$folder") $(printf '%q' "$bucket") $folder"
    done
  fi
  # The images' own Python may be older than what the package needs; uv brings one.
  on_all "set -e; mkdir -p moe_jax; cd moe_jax
if $alive; then echo 'a run goes on here; its code is left as it is'; exit 0; fi
tar -xzf ../moe_jax.tar.gz
export PATH=\"\$HOME/.local/bin:\$PATH\"
pip='python3 -m pip install --quiet --user'
command -v uv >/dev/null || \$pip uv || \$pip --break-system-packages uv || { echo 'neither uv nor pip, which would install it, is here' >&2; exit 1; }
if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then rm -rf .venv; uv venv --quiet --python 3.12 .venv; fi
uv pip install --quiet --python .venv/bin/python -e '.[$extras]'$mount"
}

launch() {
  (($#)) || fail 'what to run? write the arguments of moe_jax.main after --, such as --gin_file=...'
  local run remote
  run=(env ${variables[@]+"${variables[@]}"} tpu_scripts/supervise.sh ${supervisor[@]+"${supervisor[@]}"} -- .venv/bin/python -m moe_jax.main --distributed "$@")
  # A host that runs it already goes on with it; one that has ended says so in `ended`. bash, for %q may write $'...'.
  remote="cd moe_jax || exit; if $alive; then exit 0; fi; rm -f ended
nohup bash -c $(printf '%q' "$(printf '%q ' "${run[@]}"); echo \$? > ended") >> run.log 2>&1 < /dev/null & echo \$! > pid"
  on_all "$remote"
}

# A line of each host: `running`, the code that its run ended with, or `lost` (neither: it was started again, or the shell
# was killed); what checkpoints there are, as one number; the last step that was logged.
asked="cd moe_jax 2>/dev/null || { echo lost; exit; }
if $alive; then state=running; elif [ -s ended ]; then state=\$(cat ended); else state=lost; fi
kept=\$(find runs -maxdepth 6 -regex '.*/checkpoints/[0-9]+' -prune 2>/dev/null | sort | cksum)
log=\$(find runs -maxdepth 5 -name metrics.jsonl -printf '%T@ %p\n' 2>/dev/null | sort -n | tail -n 1 | cut -d ' ' -f 2-)
echo \$state \${kept%% *} \$([ ! \"\$log\" ] || tail -n 1 \"\$log\" | grep -o '\"step\": [0-9]*' | grep -o '[0-9]*$')"

# Sets `answer` (running, lost, the exit code, partly: some hosts stand still; unreachable), `step` and, where a
# checkpoint was added, `failures` to 0.
look() {
  local lines host kept at all='' codes='' now=''
  answer=unreachable
  lines=$(gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "${ssh_flags[@]}" --worker all --command "$asked" | sort) || return 0
  while read -r host kept at; do
    case $host in
      running | lost | 0) all+=" $host" ;;
      [1-9]*) all+=" ended" codes+=" $host" ;;
      *) continue ;;
    esac
    now+=" $kept"
    [[ ! $at ]] || step=$at
  done <<<"$lines"
  case $all in
    '') return ;;
    *running*lost* | *lost*running* | *running*ended* | *ended*running*) answer=partly ;;
    *running*) answer=running ;;
    *lost*) answer=lost ;;
    *ended*) answer=${codes##* } ;;
    *) answer=0 ;;
  esac
  [[ "$codes " != *' 2 '* ]] || answer=2
  # A host that was started again has not mounted them yet.
  if [[ $all != *lost* && $now != "$checkpoints" ]]; then checkpoints=$now failures=0; fi
}

logs() {
  act gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker 0 --command 'tail -n 50 -F moe_jax/run.log'
}

stop() {
  local found
  found=$(found_or ACTIVE) || return
  if [[ $found == NONE ]]; then
    say "$name is not there"
    return
  fi
  act gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

costs() { say "$name goes on costing; tpu_scripts/tpu.sh stop --name $name $(printf '%q ' "${where[@]}")deletes it"; }

leave() { # at the end
  if [[ ! $keep ]]; then
    stop || { costs; exit 1; }
  elif [[ $found != NONE ]]; then
    costs
  fi
}

last_lines() {
  gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "${ssh_flags[@]}" --worker 0 --command 'tail -n 5 moe_jax/run.log' >&2 || true
}

again() { # what has failed; what is done about it
  launched='' silent=0
  if ((++failures >= tries)); then
    say "$1; giving up after $failures failures without a newer checkpoint"
    [[ $found != ACTIVE ]] || last_lines
    leave
    exit 1
  fi
  say "$1; ${2:-trying again}${step:+ (last step $step)}; failure $failures of $tries without a newer checkpoint"
}

# One babysitter a slice and machine: two would both create, set up and launch.
alone() {
  local folder=${XDG_CACHE_HOME:-$HOME/.cache}/moe_jax
  command -v flock >/dev/null && mkdir -p "$folder" 2>/dev/null && [[ -w $folder ]] || return 0
  exec 9>>"$folder/tpu.${project:-.}.$zone.$name.lock"
  flock --nonblock 9 || (($? != 1)) || fail "$name has a babysitter on this machine already"
}

discard() { # the slice that cannot be used, to ask for another
  [[ $bucket ]] || say 'what it had trained lay on it alone, and is lost'
  if gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet; then deleted=1; else again 'could not be deleted'; fi
}

babysit() {
  (($#)) || fail 'what to run? write the arguments of moe_jax.main after --, such as --gin_file=...'
  [[ $bucket || $keep ]] || fail 'without --bucket the model would be deleted with the slice; give one, or --keep to leave the slice there'
  supervisor=(--tries 3) # what it cannot mend so is mended here, where checkpoints are looked at
  if [[ $dry_run ]]; then
    create
    setup
    launch "$@"
    [[ $keep ]] || stop
    return
  fi
  alone
  commit=$(git -C "$here/.." rev-parse HEAD) # what a later slice gets too
  found='' launched='' failures=0 checkpoints='' step='' answer='' silent=0 deleted=''
  local before='' seen='' heard='' why
  trap '[[ $found == NONE ]] || costs; exit 130' INT
  trap '[[ $found == NONE ]] || costs; exit 143' TERM
  while true; do
    # What is wrong from the beginning has to be mended; later on a network may come back.
    found=$(state) || { [[ $before ]] || exit 1; found=UNKNOWN; }
    [[ $found == "$before" ]] || say "$(date -u +%FT%TZ) $name: $found${step:+ (last step $step)}"
    case $found in
      NONE)
        if [[ $seen && $seen != NONE && ! $deleted ]]; then
          say "$name was deleted by someone else, and is not asked for again"
          exit 1
        fi
        launched='' deleted=''
        create || again 'could not be created'
        ;;
      ACTIVE)
        look
        [[ $answer != running ]] || launched=1 # by a babysitter before this one, perhaps
        [[ $answer == "$heard" ]] || say "$(date -u +%FT%TZ) its hosts: $answer${step:+ (last step $step)}"
        heard=$answer
        if [[ $answer != unreachable ]]; then
          silent=0
        elif ((++silent >= 30)); then # looks in a row: a network that fails for a moment is no failure
          again 'its hosts cannot be reached' 'asking for another'
          if [[ $bucket ]]; then discard; fi
        fi
        case ${launched:+$answer} in
          '' | running | unreachable) ;;
          0)
            say 'done'
            leave
            return
            ;;
          2)
            say 'ended with an error that has to be mended; the last lines of its log are:'
            last_lines
            leave
            exit 2
            ;;
          lost | partly) again "hosts stand still ($answer)" 'launching it again' ;;
          *) again "ended with $answer" 'launching it again' ;;
        esac
        if [[ ! $launched && ! $deleted && $answer != unreachable ]]; then
          if setup && launch "$@"; then launched=1; else again 'could not be set up'; fi
        fi
        ;;
      SUSPENDED | SUSPENDING | FAILED)
        if [[ $found == FAILED ]]; then why="failed: $(describe state.failedData.error.message 2>/dev/null)"; else why='was taken away'; fi
        [[ ! $deleted ]] || why='was deleted, and is still there'
        again "$why" 'asking for another'
        discard
        ;;
    esac
    before=$found
    [[ $found == UNKNOWN ]] || seen=$found
    sleep "$every" >/dev/null 2>&1 9>&- & # in the background, or a signal would wait for it
    wait $!
  done
}

if [[ $command == create || $command == babysit ]]; then
  [[ $type ]] || fail 'which chips? give --type, such as v5p-128'
  [[ $runtime ]] || runtime=$(runtime_of "$type") || exit 2
fi
[[ $dry_run ]] || command -v gcloud >/dev/null || fail 'gcloud is not installed; see https://cloud.google.com/sdk/docs/install'
case $command in
  create | setup | launch | logs | stop | babysit) "$command" "$@" ;;
  status) if [[ $dry_run ]]; then describe; else state; fi ;;
  *) fail "unknown command $command; tpu_scripts/tpu.sh --help lists them" ;;
esac
