#!/usr/bin/env bash
# The full table on a GPU: bash benchmarks/gpu.sh NAME. Run again, it goes on where it was stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
NAME=${1:?name of the machine, e.g. h200}
OUT=${OUT:-benchmarks/results}
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 HF_EVALUATE_OFFLINE=1

bench() { # bench FILE ARGUMENTS...
    local file=$OUT/$NAME-$1
    shift
    llava-sparse bench --dtype bfloat16 --methods visionzip,sparsevlm --output "$file.json" --plot "$file.png" "$@"
}

pytest -q -m gpu
bench 7b --shape llava-1.5-7b --budgets 192,128,64 --batch-sizes 1,8,32 --text-tokens 40
bench 7b-compiled --shape llava-1.5-7b --budgets 64 --batch-sizes 1,8 --text-tokens 40 --compile
bench 13b --shape llava-1.5-13b --budgets 64 --batch-sizes 1,8,32 --text-tokens 40
bench 7b-long --shape llava-1.5-7b --budgets 64 --batch-sizes 1,8 --text-tokens 400
python benchmarks/evaluation_loop.py --limit 300 --output "$OUT/evaluation_loop-$NAME.json"
llava-sparse bench --dtype bfloat16 --shape llava-1.5-7b --methods visionzip,sparsevlm --batch-sizes 8 \
    --profile results/profile
