#!/bin/bash
# usage: tests/run.sh PROGRAM...
# Runs the cmocka programs, as many at a time as there are processors, shows the output of each when it
# is done, and ends with `N passed, N failed`. A program that is missing, crashes, runs out of time, or
# reports fewer results than it planned counts as failed. Programs not named test_* (the examples) need
# only be there. TEST_TIMEOUT: seconds for each program; JOBS: how many at a time.
limit=${TEST_TIMEOUT:-600}
jobs=${JOBS:-$(nproc 2>/dev/null || echo 2)}
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
trap 'kill $(jobs -p) 2>/dev/null; exit 1' HUP INT TERM

# Every planned test counts once: as passed, as skipped, or else as failed.
count() {
    awk -v status="$1" '
        /^1\.\.[0-9]+/   { planned += substr($1, 4) }
        /^(not )?ok .*# *SKIP/ { skipped++; next }
        /^ok /           { passed++ }
        /^not ok /       { failed++ }
        END {
            missing = planned - passed - skipped
            if (failed < missing) failed = missing
            if (!failed && (status + 0 || !planned || missing)) failed = 1
            print passed + 0, failed + 0, skipped + 0
        }' "$2"
}

# run PROGRAM NUMBER: its output, then a line of figures, which are left in a file of that number
run() {
    local name=${1##*/} log=$work/$2.log status passed failed skipped start=$SECONDS
    CMOCKA_MESSAGE_OUTPUT=TAP timeout -k 10 "$limit" "$1" </dev/null >"$log" 2>&1
    status=$?
    read -r passed failed skipped < <(count "$status" "$log")
    echo "$passed $failed" >"$work/$2.count"
    {
        echo "== $name"
        cat "$log"
        echo "$name: $passed passed, $failed failed, $skipped skipped, exit status $status, $((SECONDS - start)) s"
    } >"$work/$2.text"
    cat "$work/$2.text"         # in one piece
}

passed=0 failed=0 number=0
[[ $# -gt 0 ]] || { echo "no tests"; failed=1; }
for program; do
    if [[ ! -x $program ]]; then
        echo "${program##*/}: did not build"
        failed=$((failed + 1))
    elif [[ ${program##*/} == test_* ]]; then
        while (($(jobs -rp | wc -l) >= jobs)); do wait -n; done
        echo "0 1" >"$work/$number.count"       # until it is done
        run "$program" "$number" &
        number=$((number + 1))
    fi
done
wait

for file in "$work"/*.count; do
    [[ -e $file ]] || continue
    read -r p f <"$file"
    passed=$((passed + p)) failed=$((failed + f))
done
echo "$passed passed, $failed failed"
[[ $failed == 0 ]]
