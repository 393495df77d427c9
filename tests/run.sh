#!/bin/sh
# usage: tests/run.sh PROGRAM...
# Runs the cmocka programs, shows their output, and ends with `N passed, N failed`.
# A program that is missing, crashes, runs out of time, or reports fewer results
# than it planned counts as failed. Programs not named test_* (the examples) need
# only be there. TEST_TIMEOUT: seconds for each program.
limit=${TEST_TIMEOUT:-600}
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
trap 'exit 1' HUP INT TERM
passed=0 failed=0

[ $# -gt 0 ] || { echo "no tests"; failed=1; }
for program; do
    name=${program##*/}
    if [ ! -x "$program" ]; then
        echo "$name: did not build"
        failed=$((failed + 1))
        continue
    fi
    case $name in test_*) ;; *) continue ;; esac

    echo "== $name"
    CMOCKA_MESSAGE_OUTPUT=TAP timeout -k 10 "$limit" "$program" </dev/null >"$log" 2>&1
    status=$?
    cat "$log"

    # Every planned test counts once: as passed, as skipped, or else as failed.
    # shellcheck disable=SC2046
    set -- $(awk -v status="$status" '
        /^1\.\.[0-9]+/   { planned += substr($1, 4) }
        /^(not )?ok .*# *SKIP/ { skipped++; next }
        /^ok /           { passed++ }
        /^not ok /       { failed++ }
        END {
            missing = planned - passed - skipped
            if (failed < missing) failed = missing
            if (!failed && (status + 0 || !planned || missing)) failed = 1
            print passed + 0, failed + 0, skipped + 0
        }' "$log")
    echo "$name: $1 passed, $2 failed, $3 skipped, exit status $status"
    passed=$((passed + $1)) failed=$((failed + $2))
done

echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
