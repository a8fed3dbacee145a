#!/usr/bin/env bash
# Every run of results/README.md; each writes runs/<name>, of which results/ keeps metrics.jsonl, config.json and what was printed.
# The logs add up to 11 hours, most of them with one thread and another run on the second core: half of that, two at a time.
# Run it from the top folder: bash results/run_all.sh
set -euo pipefail
run() { python flow_grpo.py --name "$@"; }

# Base scores, on all held-out prompts
run base-ocr --reward ocr --epochs 0 --eval_prompts 0
run base-geneval --reward geneval --epochs 0 --eval_prompts 0

# Text rendering, and the colour reward
for seed in 0 1 2; do run ocr-seed$seed --reward ocr --seed $seed; done
run redness
# Earlier series with other values (the learning rate and the KL weight that were the defaults then)
for seed in 0 1 2; do
    run first-seed$seed --reward ocr --seed $seed --learning_rate 1e-3 --beta 0.3
    run second-seed$seed --reward ocr --seed $seed --learning_rate 2e-3 --beta 0.3
    run third-seed$seed --reward ocr --seed $seed --learning_rate 2e-3 --beta 0.05
done
run film --reward ocr --eval_every 1 --eval_prompts 16 --eval_per_prompt 1

# Composition
for seed in 0 1 2; do
    run geneval-seed$seed --reward geneval --seed $seed --same_noise --groups 16 --epochs 40 --eval_every 10 --eval_prompts 0 --eval_reward toy_taste
done

# Human preference, with KL and without; composition and text without KL; every model on all tasks
for seed in 0 1 2; do
    pick="--reward toy_pickscore --eval_reward toy_taste,geneval --same_noise --epochs 48 --eval_every 8 --seed $seed"
    run pick-seed$seed $pick
    run pick-nokl-seed$seed $pick --beta 0
    run pick-fast-seed$seed $pick --learning_rate 3e-3 --beta 0.3
    run pick-fast-nokl-seed$seed $pick --learning_rate 3e-3 --beta 0
    run ocr-nokl-seed$seed --reward ocr --beta 0 --seed $seed
done
run geneval-nokl-seed0 --reward geneval --beta 0 --same_noise --groups 16 --epochs 40 --eval_every 10 --eval_prompts 0 --eval_reward toy_taste
python results/cross.py runs/base-ocr runs/{ocr,geneval,pick,pick-fast}-seed[012] runs/{ocr,pick,pick-fast}-nokl-seed[012] runs/geneval-nokl-seed0 \
    > results/cross.jsonl

# Generalisation: no crosses, no purple, no "four" in the training
python results/generalise.py
run generalise --reward geneval --dataset dev/generalise --same_noise --groups 16 --epochs 40 --eval_every 10 --eval_prompts 0 \
    --eval_reward toy_taste

# Longer, on the same test prompts
for seed in 0 1 2; do
    cp -r runs/geneval-seed$seed runs/geneval48-seed$seed
    run geneval48-seed$seed --resume --epochs 48
done
cp -r runs/geneval-seed0 runs/geneval-drop-seed0
run geneval-drop-seed0 --resume --epochs 56 --learning_rate 5e-4 --eval_every 8

# What was tried and the ablations, on a part of the training prompts: the test prompts decide nothing
mkdir -p dev/ocr dev/geneval
head -n 333 toy/ocr/train.txt > dev/ocr/train.txt
tail -n 60 toy/ocr/train.txt > dev/ocr/test.txt
cp results/geneval-dev.jsonl dev/geneval/test_metadata.jsonl
grep -vxFf results/geneval-dev.jsonl toy/geneval/train_metadata.jsonl > dev/geneval/train_metadata.jsonl
ocr() { run "$1" --reward ocr --dataset dev/ocr --eval_every 8 "${@:2}"; }

# (These thirteen were evaluated every 4 epochs, which changes nothing else.)
ocr d_ocr_g1 --learning_rate 1e-3 --beta 0.3
ocr e_lr2_s0 --learning_rate 2e-3 --beta 0.3
ocr e_lr2_s2 --learning_rate 2e-3 --beta 0.3 --seed 2
ocr b05_s0 --learning_rate 2e-3 --beta 0.05
ocr f_b05_s1 --learning_rate 2e-3 --beta 0.05 --seed 1
ocr f_b05_s2 --learning_rate 2e-3 --beta 0.05 --seed 2
ocr beta0 --learning_rate 2e-3 --beta 0
ocr b1_s0 --learning_rate 2e-3 --beta 0.1
ocr b1_s1 --learning_rate 2e-3 --beta 0.1 --seed 1
ocr lr1_b1_s0 --learning_rate 1e-3 --beta 0.1
for seed in 0 1 2; do ocr lr15_b1_s$seed --seed $seed; done   # the defaults

ocr steps40 --train_steps 40 --window 8
ocr steps5 --train_steps 5 --window 1
ocr window0 --window 0
ocr window1 --window 1
ocr window3 --window 3
ocr cps --sde cps --noise_level 0.8 --beta 0.01
ocr noise0.1 --noise_level 0.1
ocr noise0.4 --noise_level 0.4
ocr noise1.0 --noise_level 1
ocr groups4x32 --groups 4 --group_size 32
ocr groups5x24 --groups 5 --group_size 24
ocr groups11x12 --groups 11 --group_size 12
ocr groups21x6 --groups 21 --group_size 6
for seed in 0 1 2; do ocr same_noise-s$seed --same_noise --seed $seed; done
ocr std-group --std_over group
ocr updates1 --updates 1
ocr updates4 --updates 4
ocr clip1e-4 --clip_range 1e-4
ocr guidance1.2 --guidance 1.2

# What an epoch costs, nothing else running
for T in "40 --window 8" "10" "5 --window 1"; do ocr time-steps${T%% *} --epochs 3 --eval_prompts 2 --train_steps $T; done
for T in 10 40; do ocr time-window0-T$T --epochs 3 --eval_prompts 2 --window 0 --train_steps $T; done

geneval() { run "$1" --reward geneval --dataset dev/geneval --eval_every 8 "${@:2}"; }
geneval d_gen_g1 --learning_rate 1e-3 --beta 0.3 --epochs 24 --eval_every 6
geneval geneval-8x16 --epochs 48 --eval_every 12
geneval geneval-16x16 --groups 16 --epochs 32 --learning_rate 2e-3 --beta 0.05
geneval geneval-same-8x16 --epochs 32 --beta 0.05 --same_noise
geneval geneval-same-16x16 --groups 16 --epochs 64 --same_noise
# From here on 5e-4: stopped at 32 epochs, then resumed
geneval geneval-drop --groups 16 --epochs 32 --same_noise
run geneval-drop --resume --epochs 48 --learning_rate 5e-4 --eval_every 4

pick() { run "$1" --reward toy_pickscore --eval_reward toy_taste,geneval --dataset dev/geneval --eval_every 8 "${@:2}"; }
pick pick --epochs 24
pick pick-same --epochs 24 --same_noise
pick pick-same-beta0 --epochs 24 --same_noise --beta 0
pick pick-hack --epochs 64 --same_noise --beta 0 --learning_rate 3e-3
pick pick-hack-b0.3 --epochs 40 --same_noise --beta 0.3 --learning_rate 3e-3
pick pick-hack-b1 --epochs 40 --same_noise --beta 1 --learning_rate 3e-3

# SD3.5-Medium's real size, on a CPU
python results/real-size/make_model.py big-random
run real-size --preset sd3.5-medium --model big-random --groups 1 --group_size 2 --train_steps 2 --eval_steps 2 --eval_prompts 1 \
    --epochs 1 --batch_size 1 --gradient_checkpointing --reward jpeg_compressibility

python results/figures.py
