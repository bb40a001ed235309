#!/bin/sh
# The GPU bench in parts of less than ten minutes, for a machine that is lent for half an hour:
#
#     sh tests/bench/gpu.sh PART DIR      PART: kernels, steps, upstream-1, upstream-2
#
# Each section is a process of its own with its own time, so that one that hangs or crashes costs
# only itself. DIR gets a few files at the most: PART.tgz with all logs and results, and profiles.
# What is printed is short: tables, and last what failed or was missed.
set -u
part=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
cd "$(dirname "$0")/../.." || exit 1
work=$(mktemp -d)
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

keep() {
    tar -czf "$out/$part.tgz" -C "$work" --exclude='*.json.gz' .
    for profile in "$work"/*/*.json.gz; do
        if [ -f "$profile" ] && [ "$(wc -c < "$profile")" -lt 15000000 ]; then
            mv "$profile" "$out/"
        fi
    done
}

# name, seconds, arguments. The budget ends a section in good order; the signals, whatever it does.
section() {
    name=$1 seconds=$2
    shift 2
    timeout -s TERM -k 15 "$seconds" python3 tests/bench/gpu.py --out "$work/$name" \
        --budget-s "$((seconds - 30))" "$@" > "$work/$name.log" 2>&1
    echo "status $?" >> "$work/$name.log"
}

# Where a section came to its end, its table; else the last that it said.
show() {
    echo "== $1: $(tail -n 1 "$work/$1.log")"
    if grep -q '^| *| what' "$work/$1.log"; then
        sed -n '/^| *| what/,$p' "$work/$1.log" | grep '^|.*[0-9]' | tr -s ' ' | cut -c -150
    else
        tail -n 12 "$work/$1.log" | cut -c -200
    fi
}

case $part in
kernels)
    for dtype in bfloat16 float16 float32; do
        section "check-$dtype" 240 --only check --dtypes "$dtype" &
    done
    # Of the tests, those that need a device. They run beside the checks, which time nothing. Other
    # versions of libraries warn of other things, and plugins may be missing that options are for.
    PYTHONPATH=.:kernels TRITON_INTERPRET=0 timeout -k 15 200 python3 -m pytest -q -m gpu \
        -o addopts= -o filterwarnings=default tests/kernels tests/unit/test_streams.py \
        > "$work/pytest.log" 2>&1
    wait
    keep
    section time 150 --only time
    for name in check-float32 check-float16 check-bfloat16 time; do show "$name"; done
    echo "== pytest: $(tail -n 1 "$work/pytest.log")"
    ;;
steps)
    section decode 260 --only decode
    keep
    section trace 270 --only trace
    for name in decode trace; do show "$name"; done
    ;;
upstream-1)
    section 14795 335 --only upstream --tables 14795
    keep
    section 17913 205 --only upstream --tables 17913
    for name in 14795 17913; do show "$name"; done
    ;;
upstream-2)
    section 15512-large 300 --only upstream --tables 15512-large
    keep
    section 15512-small 220 --only upstream --tables 15512-small
    for name in 15512-large 15512-small; do show "$name"; done
    ;;
*)
    echo "no such part: $part" >&2
    exit 2
    ;;
esac
keep
echo "== failed, left out or missed"
grep -hE '^(FAILED|ERROR)|MISSED|Error:' "$work"/*.log | grep -v '^\[' | sort -u | cut -c -220 | tail -n 30
rm -rf "$work"
