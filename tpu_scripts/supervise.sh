#!/usr/bin/env bash
# Runs a command until it has done its work: whatever ends it otherwise (a host that was lost, memory, a preemption), it
# is started again, and a training run goes on from its last checkpoint. Run it on every host.
#
#   tpu_scripts/supervise.sh [--tries 20] [--wait 5] [--anew 3600] [--dry-run] -- COMMAND ARGUMENT...
#
# Not started again: 0 (done), 2 (the command says in one line what to mend), 130 (Ctrl-C), and a stop that was asked of
# this script itself (SIGTERM or Ctrl-C: it passes it on, so that a checkpoint is saved, and ends with the command's
# code). --wait is the pause before it is started again; tries are counted anew after a command that lived for --anew
# seconds. Where the command names its folder by --gin.RUN_DIR, a second one on this host is refused.
set -euo pipefail

tries=20 pause=5 anew=3600 dry_run=''

usage() {
  sed -n -e '2,/^set /{' -e '/^set /d' -e 's/^# \{0,1\}//p' -e '}' "$0"
}

while (($#)); do
  case $1 in
    --tries | --wait | --anew)
      (($# > 1)) || { echo "supervise: $1 wants a number" >&2; exit 2; }
      case $1 in --tries) tries=$2 ;; --wait) pause=$2 ;; *) anew=$2 ;; esac
      shift 2
      ;;
    --dry-run) dry_run=1; shift ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) echo "supervise: unknown option $1; write the command after --" >&2; exit 2 ;;
  esac
done
# What is no number would be run by the arithmetic below, and 08 is none in it.
if ! [[ $tries =~ ^[1-9][0-9]*$ && $pause =~ ^[0-9]+(\.[0-9]+)?$ && $anew =~ ^(0|[1-9][0-9]*)$ ]]; then
  echo 'supervise: --tries, --wait and --anew are numbers, --tries at least 1' >&2
  exit 2
fi
if ((!$#)); then
  echo 'supervise: no command; write it after --' >&2
  exit 2
fi
if [[ $dry_run ]]; then
  printf '%q ' "$@"
  echo
  exit 0
fi

# Two runs in one folder would spoil it. The hosts of one run share it, so each has a lock of its own, which the command
# inherits: it is held for as long as either lives.
folder='' process='' before=''
for argument; do
  [[ $before != --gin_bindings ]] || argument=--gin_bindings=$argument
  before=$argument
  case $argument in
    --gin.RUN_DIR=* | --gin_bindings=RUN_DIR=*) folder=${argument#*RUN_DIR=} ;;
    --process=*) process=.${argument#*=} ;;
  esac
done
folder=${folder#[\"\']} folder=${folder%[\"\']}
if [[ $folder ]] && command -v flock >/dev/null && mkdir -p "$folder" 2>/dev/null && [[ -w $folder ]]; then
  exec 9>>"$folder/supervise.$(uname -n)$process.lock"
  held=0
  flock --nonblock 9 || held=$?
  if ((held == 1)); then # and not a file system without locks
    echo "supervise: a run goes on in $folder already, on this host; nothing was started" >&2
    exit 75 # and not 2: a babysitter is to look again, when the run that goes on may be over
  fi
fi

# A shell that is no terminal's starts what is in the background with SIGINT ignored: Ctrl-C is passed on as SIGTERM, at
# which all hosts save.
child='' stopped=''
pass_on() {
  stopped=1
  if [[ $child ]]; then kill -TERM "$child" 2>/dev/null || true; fi
}
trap pass_on TERM INT

# Waits for the child, whatever signals come meanwhile; its exit code is in `code`.
await() {
  [[ ! $stopped ]] || kill -TERM "$child" 2>/dev/null || true # it came before there was a child to pass it on to
  code=0
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ended the waiting, not the command
    code=0
    wait "$child" || code=$?
  done
  if [[ $stopped ]]; then # or both did: the shell still knows the command's code
    local true_code=0
    wait "$child" 2>/dev/null || true_code=$?
    ((true_code == 127)) || code=$true_code
  fi
  child=''
}

try=0
while true; do
  began=$SECONDS
  "$@" &
  child=$!
  await
  if [[ $stopped ]] || ((code == 0 || code == 2 || code == 130)); then
    exit "$code"
  fi
  ((SECONDS - began < anew)) || try=0
  if ((++try >= tries)); then
    echo "supervise: ended with $code; giving up after $try tries" >&2
    exit "$code"
  fi
  case $code in
    75) why='may pass by itself' ;;
    134 | 143) why='another host was lost, or this one is to be taken away' ;;
    137) why='killed: out of memory, or by someone' ;;
    *) why='see above' ;;
  esac
  echo "supervise: ended with $code ($why); starting it again in $pause s (try $((try + 1)) of $tries)" >&2
  last=$code
  sleep "$pause" 9>&- &
  child=$!
  await
  if [[ $stopped ]]; then
    echo "supervise: stopped before it was started again; it had ended with $last" >&2
    exit 143
  fi
done
