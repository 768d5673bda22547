#!/bin/sh
# Runs test programs, one on each processor at a time, and adds up their counts: ./run.sh PROGRAM... A program that ends
# without a summary counts as a failure. SEED, if set, is passed to each. What they print comes in the order of the
# arguments; the last line is "N passed, N failed"; the exit status is 1 on any failure.
passed=0
failed=0
logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
export logs
printf '%s\n' "$@" | xargs -P "$(getconf _NPROCESSORS_ONLN)" -I{} sh -c '
    log=$logs/$(echo "$1" | tr / .)
    "$1" $SEED >"$log"
    echo $? >"$log.status"' run {}
for program; do
    log=$logs/$(echo "$program" | tr / .)
    status=$(cat "$log.status")
    cat "$log"
    counts=$(sed -n '$s/^[a-z_]*: \([0-9]*\) passed, \([0-9]*\) failed$/\1 \2/p' "$log")
    if [ -z "$counts" ]; then
        echo "$program: ended with status $status and no summary"
        counts="0 1"
    elif [ "$status" -ne 0 ] && [ "${counts#* }" -eq 0 ]; then
        echo "$program: ended with status $status"
        counts="${counts% *} 1"
    fi
    passed=$((passed + ${counts% *}))
    failed=$((failed + ${counts#* }))
done
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
