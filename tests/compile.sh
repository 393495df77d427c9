#!/bin/bash
# usage: tests/compile.sh [--quick] [--available]
# Builds the library with every compiler, language standard and target that it promises, runs a small
# program on what can run here, and runs the tests under the sanitizers. One line for each check; the
# last line is `N passed, N failed`.
#   --quick      no sanitizers
#   --available  a compiler that is not installed is left out instead of counted as failed
# Environment: JOBS (default: the number of processors), WORK (a folder for the binaries, kept afterwards).
cd "$(dirname "$0")/.." || exit 1
export LC_ALL=C DOTOPT_TEST_QUICK=1
export ASAN_OPTIONS=detect_leaks=1:detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1

quick='' available=''
for argument; do
    case $argument in
    --quick) quick=1 ;;
    --available) available=1 ;;
    *)
        sed -n '2,/^cd/{s/^# \{0,1\}//p}' "$0"
        exit 2
        ;;
    esac
done

jobs=${JOBS:-$(nproc)}
if [[ ${WORK:-} ]]; then
    work=$WORK && mkdir -p "$work" || exit 1
else
    work=$(mktemp -d) || exit 1
    trap 'rm -rf "$work"' EXIT
fi
trap 'exit 1' HUP INT TERM
strict=(-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Werror -I.)
libraries=(-lm -pthread)
stb=/usr/include/stb
[[ -e $stb/stb_image_write.h || ! -e third_party/stb ]] || stb=third_party/stb

# ---- running checks -------------------------------------------------------------------------------------

# check WHAT COMMAND...: one line; the end of the command's output if it fails
check() {
    local what=$1 start=$EPOCHREALTIME log status seconds
    shift
    log=$(mktemp "$work/log.XXXXXX")
    "$@" >"$log" 2>&1 </dev/null
    status=$?
    [[ $status != 124 ]] || echo "error: out of time" >>"$log"
    seconds=$(awk -v a="$start" -v b="$EPOCHREALTIME" 'BEGIN { printf "%.1f", b - a }')
    if [[ $status == 0 ]]; then
        echo "ok  $what (${seconds} s)"
    else
        echo "FAILED  $what (${seconds} s)"
        { grep -m 12 -E 'error|warning|FAILED|ERROR|not ok|runtime|line [0-9]+:' "$log" || tail -n 12 "$log"; } | sed 's/^/    /'
    fi
    rm -f "$log"
    return "$status"
}

# group FUNCTION ARGUMENT...: its checks run one after the other, beside those of other groups
groups=0
group() {
    while (($(jobs -rp | wc -l) >= jobs)); do
        wait -n
    done
    local output=$work/group.$groups
    { "$@" >"$output"; cat "$output"; } &
    groups=$((groups + 1))
}

# have COMPILER: whether it is installed; once for each that is not, a line
declare -A missing
have() {
    command -v "$1" >/dev/null && return
    if [[ ! ${missing[$1]:-} ]]; then
        missing[$1]=1
        if [[ $available ]]; then
            echo "left out: $1 is not installed"
        else
            echo "FAILED  $1 is not installed (0 s)" | tee "$work/group.missing.$1"
        fi
    fi
    return 1
}

# ---- sources --------------------------------------------------------------------------------------------

write_sources() {
    cat >"$work/implementation.c" <<'END'
#define DOTOPT_IMPLEMENTATION
#include "dotopt.h"
END
    # The define stays, as it does where another header includes the library once more.
    cat >"$work/implementation_twice.c" <<'END'
#include "dotopt.h"
#define DOTOPT_IMPLEMENTATION
#include "dotopt.h"
#include "dotopt.h"
END
    cat >"$work/interface.c" <<'END'
#include "dotopt.h"
dot_context *interface_alone(void);
dot_context *interface_alone(void)
{
    dot_context_options options = dot_context_defaults();
    return dot_context_create(&options);
}
END
    cat >"$work/interface_twice.c" <<'END'
#include "dotopt.h"
#include "dotopt.h"
dot_status included_twice(const dot_context *ctx);
dot_status included_twice(const dot_context *ctx) { return dot_error_status(ctx); }
END
    # Learns the mean of four numbers.
    cat >"$work/program.c" <<'END'
#include "dotopt.h"
#include <stdio.h>
static dot_tensor *square_distance(void *mean, dot_layer *layer, dot_tensor *x)
{
    (void)layer;
    return dot_mean(dot_square(dot_sub(x, *(dot_tensor **)mean)), DOT_ALL_AXES, false);
}
int main(void)
{
    static const float values[4] = { 1, 2, 3, 6 };
    static const int64_t four[1] = { 4 }, one[1] = { 1 };
    dot_tensor *mean = NULL;
    dot_context *ctx = dot_context_create(NULL);
    dot_layer *net = dot_nn_custom(ctx, "mean", square_distance, &mean);
    dot_optimizer_options options = dot_optimizer_defaults(DOT_SGD);
    dot_optimizer *optimizer;
    double result;
    int step;
    mean = dot_layer_add_parameter(net, "mean", DOT_KIND_WEIGHT, 1, one);
    options.lr = 0.1;
    optimizer = dot_optimizer_create(ctx, net, &options);
    for (step = 0; step < 100; ++step) {
        dot_step_begin(ctx);
        dot_backward(dot_forward(net, dot_input(ctx, DOT_F32, 1, four, values)));
        dot_optimizer_step(optimizer, 1.0);
    }
    result = dot_item(mean, 0);
    printf("%f %s\n", result, dot_error(ctx));
    dot_context_destroy(ctx);
    return !(result > 2.999 && result < 3.001);
}
END
}

# ---- the header, by compiler and standard ---------------------------------------------------------------

# link_two OUT OPTION...: the program and the implementation as two files; runs it
link_two() {
    local out=$1
    shift
    "$@" -c -o "$out.o" "$work/program.c" && "${1}" -o "$out" "$out.o" "$out.implementation.o" "${libraries[@]}" && "$out"
}

# header_checks NAME COMPILER OPTION...
header_checks() {
    local name=$1 out command
    shift
    out="$work/$(tr -c 'a-zA-Z0-9\n' _ <<<"$name")"
    command=("$@" "${strict[@]}")
    check "$name: interface alone" "${command[@]}" -c -o "$out.o" "$work/interface.c"
    check "$name: interface included twice" "${command[@]}" -c -o "$out.o" "$work/interface_twice.c"
    check "$name: implementation" "${command[@]}" -c -o "$out.implementation.o" "$work/implementation.c"
    check "$name: two files linked and run" link_two "$out" "${command[@]}"
    check "$name: implementation included twice" "${command[@]}" -fsyntax-only "$work/implementation_twice.c"
    [[ $name != *-O2 ]] || check "$name: smoke" smoke "$1" '' "$out.implementation.o" "$@"
    rm -f "$out" "$out".*
}

# standard_checks NAME COMPILER OPTION...: a standard that only the language's rules tell from one that is built
standard_checks() {
    local name=$1 source
    shift
    for source in interface implementation implementation_twice; do
        check "$name: $source" "$@" "${strict[@]}" -fsyntax-only "$work/$source.c"
    done
}

# variant_checks NAME COMPILER OPTION...: what the configuration macros leave out
variant_checks() {
    local name=$1 out command
    shift
    out="$work/variant.$(tr -c 'a-zA-Z0-9\n' _ <<<"$name")"
    command=("$@" "${strict[@]}")
    check "$name: DOTOPT_NO_THREADS" without_threads "$out" "${command[@]}"
    check "$name: DOTOPT_NO_SIMD" "${command[@]}" -DDOTOPT_NO_SIMD -c -o "$out.o" "$work/implementation.c"
    rm -f "$out" "$out".*
}

# Links without the thread library, and needs none of its functions.
without_threads() {
    local out=$1
    shift
    "$@" -DDOTOPT_NO_THREADS -c -o "$out.o" "$work/implementation.c" || return
    if nm -u "$out.o" | grep pthread_; then
        echo "error: uses pthreads"
        return 1
    fi
    "$@" -c -o "$out.program.o" "$work/program.c" && "$1" -o "$out" "$out.program.o" "$out.o" -lm && "$out"
}

all_headers() {
    local cc standard
    for cc in gcc clang; do
        have $cc || continue
        group header_checks "$cc -std=c99 -O2" $cc -std=c99 -O2
        group variant_checks "$cc -std=c99 -O0" $cc -std=c99 -O0
        for standard in c11 c17; do
            group standard_checks "$cc -std=$standard" $cc -std=$standard
        done
    done
    for cc in g++ clang++; do
        have $cc || continue
        group header_checks "$cc -std=c++11 -O0" $cc -x c++ -std=c++11 -O0
        group standard_checks "$cc -std=c++17" $cc -x c++ -std=c++17
        group variant_checks "$cc -std=c++11 -O0" $cc -x c++ -std=c++11 -O0
    done
}

# ---- other machines -------------------------------------------------------------------------------------

# smoke NAME RUNNER IMPLEMENTATION COMPILER OPTION...: builds tests/smoke.c with the implementation, a source or an
# object, and runs it; keeps its loss in loss.NAME
smoke() {
    local name=$1 runner=$2 implementation=$3
    shift 3
    "$@" "${strict[@]}" -o "$work/smoke.$name" tests/smoke.c "$implementation" "${libraries[@]}" || return
    # shellcheck disable=SC2086
    timeout -k 5 120 $runner "$work/smoke.$name" "$work/smoke.$name.safetensors" >"$work/smoke.$name.out" 2>&1
    local status=$?
    cat "$work/smoke.$name.out"
    sed -n 's/^loss //p' "$work/smoke.$name.out" >"$work/loss.$name"
    return $status
}

# A native i686 program runs where the kernel and a 32-bit loader are; elsewhere under the emulator.
i686_runner() {
    printf 'int main(void) { return 0; }\n' >"$work/empty.c"
    i686-linux-gnu-gcc -o "$work/empty" "$work/empty.c" || return
    if ! "$work/empty" 2>/dev/null; then
        echo "qemu-i386 -L /usr/i686-linux-gnu"
    fi
}

smoke_group() {
    local name=$1 what=$2
    shift 2
    check "$what" smoke "$name" "$1" "$work/implementation.c" "${@:2}"
}

windows_checks() {
    local standard
    for standard in c99 gnu99; do
        check "x86_64-w64-mingw32-gcc -std=$standard: implementation" x86_64-w64-mingw32-gcc -std=$standard -O1 \
            "${strict[@]}" -c -o "$work/windows.$standard.o" "$work/implementation.c"
        check "x86_64-w64-mingw32-gcc -std=$standard: linked" x86_64-w64-mingw32-gcc -std=$standard -O1 \
            "${strict[@]}" -o "$work/windows.$standard.exe" tests/smoke.c "$work/windows.$standard.o" "${libraries[@]}"
    done
}

# 32 bits where only the native compiler is installed with its 32-bit libraries.
i686_checks() {
    local compiler=(i686-linux-gnu-gcc)
    if ! command -v i686-linux-gnu-gcc >/dev/null; then
        compiler=(gcc -m32)
        smoke_group i686 "gcc -m32: smoke" '' "${compiler[@]}" -std=c99 -O2
        return
    fi
    check "i686-linux-gnu-gcc: implementation" "${compiler[@]}" -std=c99 -O0 "${strict[@]}" -c -o "$work/i686.o" \
        "$work/implementation.c"
    smoke_group i686 "i686-linux-gnu-gcc: smoke" "$(i686_runner)" "${compiler[@]}" -std=c99 -O2
}

aarch64_checks() {
    local standard
    for standard in c99 gnu99; do
        check "aarch64-linux-gnu-gcc -std=$standard: implementation" aarch64-linux-gnu-gcc -std=$standard -O0 \
            "${strict[@]}" -c -o "$work/aarch64.$standard.o" "$work/implementation.c"
    done
    smoke_group aarch64 "aarch64-linux-gnu-gcc: smoke under qemu-aarch64" "qemu-aarch64 -L /usr/aarch64-linux-gnu" \
        aarch64-linux-gnu-gcc -std=c99 -O2
}

# gcc -m32 stands in for the cross compiler where it can link.
have_i686() {
    command -v i686-linux-gnu-gcc >/dev/null && return
    printf 'int main(void) { return 0; }\n' | gcc -m32 -x c -o "$work/m32" - 2>/dev/null && return
    have i686-linux-gnu-gcc
}

all_machines() {
    if have gcc; then
        group smoke_group portable "gcc: smoke without threads and SIMD" '' gcc -std=c99 -O2 -DDOTOPT_NO_THREADS -DDOTOPT_NO_SIMD
        group smoke_group native "gcc -O2 -march=native: smoke" '' gcc -std=c99 -O2 -march=native
    fi
    if have aarch64-linux-gnu-gcc && have qemu-aarch64; then
        group aarch64_checks
    fi
    if have_i686; then
        group i686_checks
    fi
    if have x86_64-w64-mingw32-gcc; then
        group windows_checks
    fi
}

# The losses that the machines printed agree to 1e-4, relatively.
losses_agree() {
    awk '{ split(FILENAME, part, "loss."); loss[part[2]] = $1 }
        END {
            for (name in loss) {
                difference = loss[name] - loss["gcc"]
                if (difference < 0) difference = -difference
                printf "%s %s\n", name, loss[name]
                if (!(loss["gcc"] > 0) || !(difference <= 1e-4 * loss["gcc"])) {
                    print "error: differs from gcc: " name
                    failed = 1
                }
                ++count
            }
            exit failed || count < 2
        }' "$work"/loss.*
}

# ---- sanitizers ----------------------------------------------------------------------------------------

# sanitizing_compiler FLAG COMPILER...: the first of them that can link and run a program with it
sanitizing_compiler() {
    local flag=$1 cc
    shift
    printf 'int main(void) { return 0; }\n' >"$work/sane.c"
    for cc; do
        if "$cc" "$flag" -o "$work/sane" "$work/sane.c" 2>/dev/null && "$work/sane" 2>/dev/null; then
            echo "$cc"
            return
        fi
    done
    return 1
}

sanitize=(-std=c99 -O1 -g1 -fno-sanitize-recover=all -I. "-I$stb")

# sanitized FLAG COMPILER TEST OPTION...
sanitized() {
    local flag=$1 cc=$2 test=$3 out
    shift 3
    out="$work/$test.${flag//[^a-z]/_}"
    "$cc" "${sanitize[@]}" "$flag" -o "$out" "tests/$test.c" "$@" "${libraries[@]}" &&
        TMPDIR=$work timeout -k 5 240 "$out"
}

has_cmocka() {
    printf '#include <%s>\n' stdarg.h stddef.h stdint.h setjmp.h cmocka.h | gcc -E - >/dev/null 2>&1
}

# sanitizer FLAG COMPILER TEST...
sanitizer() {
    local flag=$1 cc=$2 test
    shift 2
    local library=$work/library.${flag//[^a-z]/_}.o
    check "$cc $flag: implementation" "$cc" "${sanitize[@]}" "$flag" -c -o "$library" "$work/implementation.c" || return
    check "$cc $flag: smoke" sanitized "$flag" "$cc" smoke "$library"
    has_cmocka || return
    for test; do
        check "$cc $flag: $test" sanitized "$flag" "$cc" "$test" "$library" -lcmocka
    done
}

# The tests that reach every part in reasonable time; those with threads for the thread sanitizer. Others
# train for too long under a sanitizer, or only build examples.
all_sanitizers() {
    local flag cc tests
    for flag in -fsanitize=address,undefined -fsanitize=thread; do
        case $flag in
        *thread)
            cc=$(sanitizing_compiler $flag clang gcc)
            tests=(test_bits test_memory)
            ;;
        *)
            cc=$(sanitizing_compiler $flag gcc clang)
            tests=(test_bits test_memory test_errors test_ops test_files test_schedules test_solvers test_utilities test_logs test_fuzz)
            ;;
        esac
        if [[ $cc ]]; then
            group sanitizer $flag "$cc" "${tests[@]}"
        else
            group check "a compiler with $flag" false
        fi
    done
}

# ---- all of it ------------------------------------------------------------------------------------------

write_sources
[[ $quick ]] || all_sanitizers
all_headers
all_machines
wait
check "the losses agree" losses_agree >"$work/group.losses"
cat "$work/group.losses"

passed=$(cat "$work"/group.* | grep -c '^ok  ')
failed=$(cat "$work"/group.* | grep -c '^FAILED  ')
echo "$passed passed, $failed failed"
[[ $failed == 0 ]]
