#!/bin/sh
# Counts the instructions of a few training steps under valgrind and compares them with tools/instructions.txt: a
# measure of speed that other programs on the machine do not disturb.
set -eu
cd "$(dirname "$0")/.."

usage() {
    cat <<'EOF2'
usage: tools/instructions.sh [--update]

Counts the instructions of tools/instructions.c with valgrind, for every line of
tools/instructions.txt. More than 3 % above the count there is a failure. --update
writes the new counts, and so keeps what was gained.

Counts depend on the compiler. With another one than that of the file nothing is
compared (make the file anew with --update).

Environment: CC and CFLAGS (cc, -O2).
EOF2
}

update=''
case ${1-} in
    '') ;;
    --update) update=1 ;;
    -h | --help) usage; exit ;;
    *) usage >&2; exit 2 ;;
esac

cc=${CC:-cc} flags=${CFLAGS:--O2} file=tools/instructions.txt slack=3
cases='autoencoder avx2
autoencoder portable
mlp avx2
mlp portable'

die() { echo "instructions: $*" >&2; exit 1; }

command -v valgrind >/dev/null || die "valgrind is missing (Debian: valgrind)"
mkdir -p build
dir=$(mktemp -d build/instructions.XXXXXX)
trap 'rm -rf "$dir"' EXIT
trap 'exit 1' HUP INT TERM

# The implementation is compiled by make, which keeps it for the next time.
compile() {
    # shellcheck disable=SC2086
    CC=$cc CFLAGS=$flags make -s build/dotopt.o && $cc $flags -std=c99 -I. -o "$dir/program" tools/instructions.c build/dotopt.o -lm -pthread
}
compile >"$dir/log" 2>&1 || die "cannot compile tools/instructions.c: $(tail -n 1 "$dir/log")"

count() { # NETWORK KERNELS: writes the count to a file
    valgrind --tool=callgrind --toggle-collect=counted_steps --callgrind-out-file="$dir/out.$1.$2" \
        "$dir/program" "$1" "$2" >"$dir/said.$1.$2" 2>"$dir/log.$1.$2" || return 0
    grep -q "^$2 " "$dir/said.$1.$2" && sed -n 's/^summary: //p' "$dir/out.$1.$2" >"$dir/count.$1.$2"
}

# Two at a time; the counts do not depend on it.
echo "$cases" | {
    while read -r network kernels && read -r network2 kernels2; do
        count "$network" "$kernels" &
        count "$network2" "$kernels2" || true
        wait
    done
}

version="$("$cc" --version | head -n 1), $flags, $(valgrind --version), $(uname -m)"
recorded=$(sed -n 's/^# counted with: //p' "$file" 2>/dev/null || true)
passed=0 failed=0
[ -z "$update" ] || printf '%s\n' "# Instructions of tools/instructions.c, as tools/instructions.sh counts them." \
    "# counted with: $version" >"$dir/new"
[ -n "$update" ] || [ "$version" = "$recorded" ] || {
    echo "instructions: not compared: $file is of \"$recorded\", this is \"$version\""
    echo "0 passed, 0 failed"
    exit 0
}

while read -r network kernels; do
    name="$network $kernels"
    now=$(cat "$dir/count.$network.$kernels" 2>/dev/null || true)
    before=$(sed -n "s/^$name //p" "$file" 2>/dev/null || true)
    if [ -z "$now" ]; then
        [ -z "$update" ] || die "$name: valgrind failed: $(tail -n 1 "$dir/log.$network.$kernels")"
        echo "FAILED  $name: valgrind failed: $(tail -n 1 "$dir/log.$network.$kernels")"
        failed=$((failed + 1))
    elif [ -n "$update" ]; then
        echo "$name $now" >>"$dir/new"
        echo "$name $now (before: ${before:-none})"
    elif [ -z "$before" ]; then
        echo "FAILED  $name: not in $file"
        failed=$((failed + 1))
    else
        change=$(awk -v a="$now" -v b="$before" 'BEGIN { printf "%+.2f %%", 100 * (a - b) / b }')
        if awk -v a="$now" -v b="$before" -v s="$slack" 'BEGIN { exit !(a <= b * (1 + s / 100)) }'; then
            gained=$(awk -v a="$now" -v b="$before" -v s="$slack" 'BEGIN { if (a < b * (1 - s / 100)) print "; --update keeps it" }')
            echo "passed  $name: $now ($change$gained)"
            passed=$((passed + 1))
        else
            echo "FAILED  $name: $now, was $before ($change, allowed: $slack %)"
            failed=$((failed + 1))
        fi
    fi
done <<EOF2
$cases
EOF2

if [ -n "$update" ]; then
    mv "$dir/new" "$file"
    exit 0
fi
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
