#!/bin/sh
# A job that hands its failure to a session and uses the answer:
#   examples/ci/ask-a-session.sh backend make test
# Exit code: that of the command. When it fails, a session is asked what to do, with the end of the log. If the answer
# begins with the word "again", the command is run once more; any other answer is printed. Without an answer within
# ANSWER_S seconds (300 by default) the job ends all the same.
set -u
to=$1
shift
me="ci-$$"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
run() { "$@" >"$log" 2>&1; }
if run "$@"; then
    agentbus send "$to" "passed: $*" --from "$me"
    exit 0
else
    code=$?
fi
answer=$({
    printf 'failed with exit code %s: %s\n' "$code" "$*"
    printf 'Please look at it, and answer: "again" if it should just be run again, else what is wrong. The end of the log:\n\n'
    tail -n 60 "$log"
} | agentbus ask "$to" --from "$me" --timeout "${ANSWER_S:-300}")
# Why there is no answer is on stderr.
if [ -z "$answer" ]; then
    echo "no answer yet; it will wait in the mailbox: agentbus inbox $me"
    exit "$code"
fi
printf '%s answered: %s\n' "$to" "$answer"
case $answer in
    [Aa]gain*) run "$@" && exit 0 || exit "$?" ;;
esac
exit "$code"
