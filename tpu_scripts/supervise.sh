#!/usr/bin/env bash
# Runs a command until it has done its work: whatever ends it otherwise (a host that was lost, memory, a preemption), it
# is started again, and a training run goes on from its last checkpoint. Run it on every host.
#
#   tpu_scripts/supervise.sh [--tries N] [--wait SECONDS] [--dry-run] -- COMMAND ARGUMENT...
#
# Not started again: 0 (done), 2 (the command says in one line what to mend), 130 (Ctrl-C), and a stop that was asked of
# this script itself (SIGTERM: it passes it on, so that a checkpoint is saved, and ends with the command's code).
set -euo pipefail

tries=20 pause=5 dry_run=''

usage() {
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "$0"
}

while (($#)); do
  case $1 in
    --tries) tries=${2:?--tries wants a number}; shift 2 ;;
    --wait) pause=${2:?--wait wants seconds}; shift 2 ;;
    --dry-run) dry_run=1; shift ;;
    --help) usage; exit 0 ;;
    --) shift; break ;;
    *) echo "supervise: unknown option $1; write the command after --" >&2; exit 2 ;;
  esac
done
if ((!$#)); then
  echo 'supervise: no command; write it after --' >&2
  exit 2
fi
if [[ $dry_run ]]; then
  printf '%q ' "$@"
  echo
  exit 0
fi

child='' stopped=''
pass_on() {
  stopped=1
  [[ $child ]] && kill -TERM "$child" 2>/dev/null
}
trap pass_on TERM

for ((try = 1; ; try++)); do
  "$@" &
  child=$!
  code=0
  wait "$child" || code=$?
  while kill -0 "$child" 2>/dev/null; do # a signal ended the waiting, not the command
    code=0
    wait "$child" || code=$?
  done
  child=''
  if [[ $stopped ]] || ((code == 0 || code == 2 || code == 130)); then
    exit "$code"
  fi
  if ((try >= tries)); then
    echo "supervise: ended with $code; giving up after $try tries" >&2
    exit "$code"
  fi
  case $code in
    134 | 143) why='another host was lost, or this one is to be taken away' ;;
    137) why='killed: out of memory, or by someone' ;;
    *) why='see above' ;;
  esac
  echo "supervise: ended with $code ($why); starting it again in $pause s (try $((try + 1)) of $tries)" >&2
  sleep "$pause"
done
