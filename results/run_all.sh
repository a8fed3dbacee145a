#!/usr/bin/env bash
# Every run of results/README.md, in its order; each writes runs/<name>, of which results/ keeps metrics.jsonl, config.json and
# what was printed. Some hours on 2 cores. Run it from the top folder: bash results/run_all.sh
set -euo pipefail
run() { python flow_grpo.py --name "$@"; }

# Base scores, on all held-out prompts
run base-ocr --reward ocr --epochs 0 --eval_prompts 0
run base-geneval --reward geneval --epochs 0 --eval_prompts 0

# Text rendering, and the colour reward
for seed in 0 1 2; do run ocr-seed$seed --reward ocr --seed $seed; done
run redness

# What was tried and the ablations, on a part of the training prompts: the test prompts decide nothing
mkdir -p dev/ocr dev/geneval
head -n 333 toy/ocr/train.txt > dev/ocr/train.txt
tail -n 60 toy/ocr/train.txt > dev/ocr/test.txt
cp results/geneval-dev.jsonl dev/geneval/test_metadata.jsonl
grep -vxFf results/geneval-dev.jsonl toy/geneval/train_metadata.jsonl > dev/geneval/train_metadata.jsonl
