#!/bin/sh
# A job that hands its failure to a session and waits for the answer:
#   examples/ci/ask-a-session.sh backend make test
# Exit code: that of the command. When it fails, the end of its log goes to the session, and what the session answers
# is printed. Without an answer within ANSWER_S seconds (300 by default) the job ends all the same.
set -u
to=$1
shift
me="ci-$$"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
if "$@" >"$log" 2>&1; then
    agentbus send "$to" "passed: $*" --from "$me"
    exit 0
else
    code=$?
fi
{
    printf 'failed with exit code %s: %s\n' "$code" "$*"
    printf 'Please look at it, and answer with send_message to "%s". The end of the log:\n\n' "$me"
    tail -n 60 "$log"
} | agentbus send "$to" --from "$me"
if answer=$(agentbus wait --name "$me" --timeout "${ANSWER_S:-300}"); then
    printf '%s answered: %s\n' "$to" "$answer"
else
    echo "no answer yet; it will wait in the mailbox: agentbus inbox $me"
fi
exit "$code"
