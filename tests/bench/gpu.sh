#!/bin/sh
# The GPU bench on a machine that is lent for minutes:
#
#     sh tests/bench/gpu.sh WHAT DIR [options of gpu.py, such as --device cpu --tiny]
#
# WHAT: one of the sections of `limit` below, several with commas, or a part:
#     smoke                           a minute: what has never run on a GPU, side by side
#     kernels, steps, upstream-1, -2  less than ten minutes each
#     all                             smoke, then what is worth most first
# No section begins, or goes on, when BUDGET_S seconds are over: by default 1500 for all, else 570.
#
# Each section is a process of its own with its own time, so that one that hangs or crashes costs
# only itself. DIR gets a few files at the most: WHAT.tgz with all logs and results, anew after each
# section, and profiles. What is printed is short: tables, and last what failed or was missed.
set -u
what=$1
mkdir -p "$2"
out=$(cd "$2" && pwd)
shift 2
cd "$(dirname "$0")/../.." || exit 1
work=$(mktemp -d)
python=${PYTHON:-python3}
archive=$(echo "$what" | tr , -).tgz
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1

case $what in
kernels) names="check time tests" ;;
steps) names="decode trace" ;;
upstream-1) names="14795 17913" ;;
upstream-2) names="15512-large 15512-small" ;;
all) names="smoke decode 17913 15512-large 15512-small trace check time tests 14795 families" ;;
*) names=$(echo "$what" | tr , ' ') ;;
esac
[ "$what" = all ] && budget=${BUDGET_S:-1500} || budget=${BUDGET_S:-570}
end=$(($(date +%s) + budget))

# Seconds that a section may take.
limit() {
    case $1 in
    smoke) echo 60 ;;
    check) echo 120 ;;
    tests) echo 250 ;;
    families) echo 330 ;;
    time) echo 150 ;;
    decode) echo 260 ;;
    trace) echo 270 ;;
    14795) echo 335 ;;
    17913) echo 205 ;;
    15512-large) echo 300 ;;
    15512-small) echo 220 ;;
    *) echo 0 ;;
    esac
}

keep() {
    tar -czf "$work.tgz" -C "$work" --exclude='*.json.gz' . && mv "$work.tgz" "$out/$archive"
    for profile in "$work"/*/*.json.gz; do
        if [ -f "$profile" ] && [ "$(wc -c < "$profile")" -lt 15000000 ]; then
            mv "$profile" "$out/"
        fi
    done
}

# What it is called, arguments. The budget ends a section in good order; the signals, whatever it
# does.
section() {
    log=$1
    shift
    timeout -s TERM -k 15 "$seconds" "$python" tests/bench/gpu.py --out "$work/$log" \
        --budget-s "$((seconds - 30))" "$@" > "$work/$log.log" 2>&1
    echo "status $?" >> "$work/$log.log"
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

# Of these, the tests that need a device. Other versions of libraries warn of other things, and
# plugins may be missing that options are for.
pytests() {
    PYTHONPATH=.:kernels TRITON_INTERPRET=0 timeout -s INT -k 15 "$seconds" "$python" -m pytest -q \
        -m gpu -o addopts= -o filterwarnings=default -p no:cacheprovider --durations 5 "$@" \
        > "$work/$name.log" 2>&1
    echo "== $name: $(tail -n 1 "$work/$name.log")"
}

# A section, options.
run() {
    name=$1
    shift
    case $name in
    smoke)
        # Of all that is printed, a machine's log may keep only the last: what was found is short.
        "$python" tests/bench/gpu.py --only smoke --out "$work/smoke" "$@" 2>&1 |
            tee "$work/smoke.log" |
            if [ "$what" = all ]; then grep -v '^       [^!]'; else cat; fi
        return ;;
    check)
        # Each family by itself: an error that CUDA does not forget takes nobody else's kernels.
        families="integers lora-integers norms rotary gated sampling decode prefill lora"
        families="$families lora-replayed engine"
        for family in $families; do
            section "check-$family" --only check --kernels "$family" "$@" &
        done
        wait
        for family in $families; do show "check-$family"; done
        return ;;
    tests) pytests tests/kernels tests/unit/adapters/test_streams.py ; return ;;
    families)
        pytests tests/unit/model/test_logit_rules.py tests/unit/model/test_transformers_model.py
        return ;;
    decode | trace | time) section "$name" --only "$name" "$@" ;;
    *) section "$name" --only upstream --tables "$name" "$@" ;;
    esac
    show "$name"
}

# Whoever's time is up still has what was found until then.
trap 'keep; exit 0' TERM INT
for each in $names; do
    seconds=$(limit "$each")
    left=$((end - $(date +%s) - 15))
    if [ "$seconds" = 0 ]; then
        echo "no such part or section: $each" >&2
        exit 2
    elif [ "$left" -lt 45 ]; then
        echo "== $each: not measured, $((left + 15)) of $budget s were left" | tee "$work/$each.log"
        continue
    elif [ "$left" -lt "$seconds" ]; then
        seconds=$left
    fi
    run "$each" "$@" &
    wait $!
    keep
done
echo "== failed, left out or missed"
grep -hE '^(FAILED|ERROR)|MISSED|Error:|not measured' "$work"/*.log | grep -v '^\[' | sort -u |
    cut -c -220 | tail -n 30
rm -rf "$work"
