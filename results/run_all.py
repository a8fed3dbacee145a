"""The runs of results/README.md with today's defaults, about five hours on 2 cores

  python results/run_all.py again.jsonl               # all of them once more
  python results/run_all.py again.jsonl dev/ocr/T     # those whose names begin so
  python results/run_all.py                           # those that results/runs.jsonl lacks: none

A run that has ended becomes one row of the file. Names that the file has are skipped, so a stopped
script goes on where it was. `python results/figures.py` draws results/runs.jsonl and fills the
tables. Runs with a time to report have the machine to themselves. The others go two at a time,
with one thread each.
"""
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import torch

TOP = Path(__file__).resolve().parents[1]
LOCK = threading.Lock()
sys.path.insert(0, str(TOP))
import flow_grpo  # noqa: E402

EDITION = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=TOP, text=True,
                         capture_output=True).stdout
TASKS = "single_object", "two_object", "counting", "colors", "position", "color_attr"

# What is run: name, options, seeds
THREE = range(3)
ALL = "--eval_prompts 0"  # an evaluation on every test prompt; it changes nothing else
OCR = "--reward ocr --eval_reward toy_sign,toy_inks"
GENEVAL = "--reward geneval --eval_reward toy_taste"
PICKSCORE = "--reward toy_pickscore --eval_reward toy_taste"
# Further than anyone should go
HIGH = "--learning_rate 3e-3 --no-lr_decay --eval_every 8"
# A part of the training words, so that no test word decides anything
DEV = f"{OCR} --dataset dev/ocr --eval_every 6"
LONG = "--window 0 --epochs 20 --eval_every 5"
SCENES = f"{GENEVAL} --dataset dev/geneval --eval_every 6 {ALL}"
FEW = f"{SCENES} --groups 32 --group_size 8 --clip_range 5e-4"
ALONE = "time/"
RUNS = [
    ("base/ocr", f"{OCR} --epochs 0 {ALL}", [0]),
    ("base/geneval", f"{GENEVAL} --epochs 0 {ALL}", [0]),
    ("base/pickscore", f"{PICKSCORE} --epochs 0 {ALL}", [0]),
    ("ocr/default", f"{OCR} {ALL}", [*range(5001, 5011), 7, 42, 99, 1234, *range(7), 8, 9]),
    ("geneval/default", f"{GENEVAL} {ALL}", [*range(2001, 2006), 7, 42, 99, 1234, *range(4)]),
    ("pickscore/default", f"{PICKSCORE} {ALL}", range(4001, 4006)),
    ("ocr/film", f"{OCR} --eval_every 1 --eval_prompts 16 --eval_per_prompt 1", [0]),
    ("redness/default", "--reward flow_grpo:redness", [0]),

    # the KL, and what happens without it
    ("ocr/beta0", f"{OCR} --beta 0 {ALL}", THREE),
    ("geneval/beta0", f"{GENEVAL} --beta 0 {ALL}", THREE),
    ("pickscore/beta0", f"{PICKSCORE} --beta 0 {ALL}", THREE),
    ("pickscore/high-beta0.3", f"{PICKSCORE} {HIGH} --beta 0.3 --epochs 16 {ALL}", THREE),
    ("pickscore/high-beta0", f"{PICKSCORE} {HIGH} --beta 0 --epochs 16 {ALL}", THREE),
    ("pickscore/long-beta0.3", f"{PICKSCORE} {HIGH} --beta 0.3 --epochs 48 {ALL}", range(6)),
    ("pickscore/long-beta0", f"{PICKSCORE} {HIGH} --beta 0 --epochs 48 {ALL}", range(6)),

    ("generalisation/default", f"{GENEVAL} --dataset dev/generalisation {ALL}", THREE),

    # denoising reduction: the noisy step covers a tenth of the path (with T = 5, a fifth)
    ("dev/ocr/default", DEV, THREE),
    ("dev/ocr/T40", f"{DEV} --train_steps 40 --window 4", THREE),
    ("dev/ocr/T5", f"{DEV} --train_steps 5", THREE),
    # the same where all steps but the last are noisy, as in the paper
    ("dev/ocr/all-steps-T10", f"{DEV} {LONG}", THREE),
    ("dev/ocr/all-steps-T40", f"{DEV} {LONG} --train_steps 40", THREE),
    ("time/T40", f"{DEV} --train_steps 40 --window 4 --epochs 4", THREE),
    ("time/T10", f"{DEV} --epochs 4", THREE),
    ("time/T5", f"{DEV} --train_steps 5 --epochs 4", THREE),
    ("time/T40-window0", f"{DEV} --train_steps 40 --window 0 --epochs 4", THREE),
    ("time/T10-window0", f"{DEV} --window 0 --epochs 4", THREE),
    ("time/ocr", "--reward ocr", [0]),
    ("time/geneval", "--reward geneval", [0]),
    ("time/pickscore", PICKSCORE, [0]),

    # where the noise is
    ("dev/ocr/window0", f"{DEV} --window 0", THREE),
    ("dev/ocr/window2", f"{DEV} --window 2", THREE),
    ("dev/ocr/window3", f"{DEV} --window 3", THREE),
    ("dev/ocr/start0-3", f"{DEV} --latest_start 3", THREE),
    ("dev/ocr/cps", f"{DEV} --sde cps --noise_level 0.8 --beta 0.05", THREE),

    # one option at a time
    ("dev/ocr/beta0", f"{DEV} --beta 0", THREE),
    ("dev/ocr/beta1", f"{DEV} --beta 1", THREE),
    ("dev/ocr/constant-rate", f"{DEV} --no-lr_decay --epochs 12", THREE),
    ("dev/ocr/noise0.1", f"{DEV} --noise_level 0.1", THREE),
    ("dev/ocr/noise0.4", f"{DEV} --noise_level 0.4", THREE),
    ("dev/ocr/noise1.0", f"{DEV} --noise_level 1", THREE),
    ("dev/ocr/groups8x16", f"{DEV} --groups 8 --group_size 16", THREE),
    ("dev/ocr/groups4x32", f"{DEV} --groups 4 --group_size 32", THREE),
    ("dev/ocr/groups32x4", f"{DEV} --groups 32 --group_size 4", THREE),
    ("dev/ocr/different-noise", f"{DEV} --no-same_noise", THREE),
    ("dev/ocr/clip1e-4", f"{DEV} --clip_range 1e-4", THREE),
    ("dev/ocr/clip5e-4", f"{DEV} --clip_range 5e-4", THREE),
    ("dev/ocr/updates1", f"{DEV} --updates 1", THREE),
    ("dev/ocr/updates4", f"{DEV} --updates 4", THREE),
    ("dev/ocr/std-group", f"{DEV} --std_over group", THREE),

    # what the scenes' defaults were chosen from
    ("dev/geneval/groups16x16", f"{SCENES} --epochs 42", [301, 302]),
    ("dev/geneval/groups32x8", f"{FEW} --epochs 42", [301, 302]),
    ("dev/geneval/falling", f"{FEW} --learning_rate 2e-3 --lr_decay", [301, 302]),
    ("dev/geneval/beta0.03", f"{FEW} --beta 0.03", [301, 302]),
    ("dev/geneval/beta0.25", f"{FEW} --beta 0.25", [301, 302]),
]


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write_dev():
    """The data sets that are not in the repository: parts of the training prompts, unseen scenes"""
    ocr, unseen, held_out = (TOP / "dev" / name for name in ("ocr", "generalisation", "geneval"))
    for folder in (ocr, unseen, held_out, TOP / "runs"):
        folder.mkdir(parents=True, exist_ok=True)
    words = (TOP / "toy/ocr/train.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    (ocr / "train.txt").write_text("".join(words[:-60]), encoding="utf-8")
    (ocr / "test.txt").write_text("".join(words[-60:]), encoding="utf-8")

    # Trained without crosses, purple and "four"; tested on what has one of them.
    known = train = read_jsonl(TOP / "toy/geneval/train_metadata.jsonl")
    scenes = train + read_jsonl(TOP / "toy/geneval/test_metadata.jsonl")
    train = [row for row in train if not re.search("cross|purple|four", row["prompt"])]
    tests = []
    for task in TASKS:  # 24 rows each; where there are fewer scenes, they repeat
        new = "four (circles|squares|triangles)" if task == "counting" else "cross|purple"
        rows = {row["prompt"]: row for row in scenes
                if row["tag"] == task and re.search(new, row["prompt"])}
        rows = [rows[prompt] for prompt in sorted(rows)]
        random.Random(0).shuffle(rows)
        tests.append((rows * 24)[:24])
    test = [row for six in zip(*tests) for row in six]
    write_scenes(unseen, train, test)

    # Of each task a fifth of the training prompts is held out, but at least two.
    train, test = [], []
    for task in sorted({row["tag"] for row in known}):
        own = [row for row in known if row["tag"] == task]
        prompts = sorted({row["prompt"] for row in own})
        random.Random(0).shuffle(prompts)
        prompts = set(prompts[:max(2, len(prompts) // 5)])
        kept = [row for row in own if row["prompt"] not in prompts]
        train += (3 * kept)[:len(own)]
        others = {row["prompt"]: row for row in own if row["prompt"] in prompts}
        test += (24 * list(others.values()))[:24]
    write_scenes(held_out, train, test)


def write_scenes(folder, train, test):
    for split, rows in (("train", train), ("test", test)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}_metadata.jsonl").write_text(text, encoding="utf-8")


def curves_and_final(rows):
    """metrics.jsonl -> the curves, four digits each, and the metrics of the last evaluation"""
    training = [row for row in rows if "reward" in row]
    evaluations = [row for row in rows if "eval_reward" in row]
    curves = {"epoch": [row["epoch"] - 1 for row in training]}  # of the model that drew
    for key in ("reward", "kl", "group_std", "no_signal", "clip_low", "clip_high", "grad_norm"):
        curves[key] = [row.get(key) for row in training]
    curves["seconds"] = [row.get("seconds") or sum(
        value for key, value in row.items() if key.startswith("seconds_")) for row in training]
    curves["eval_epoch"] = [row["epoch"] for row in evaluations]
    final = {key: value for key, value in evaluations[-1].items() if key.startswith("eval_")}
    for key in final:
        curves[key] = [row.get(key) for row in evaluations]
    return ({key: [short(value) for value in values] for key, values in curves.items()},
            {key: short(value) for key, value in final.items()})


def short(value):
    return float(f"{value:.4g}") if isinstance(value, float) else value


def machine():
    cpu = [line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines()
           if line.startswith("model name")]
    return f"{len(cpu)} cores of an {cpu[0]}, torch {torch.__version__}"


def run(name, options, seed, file, threads):
    """One run, and its row in the file"""
    folder = TOP / "runs" / name.replace("/", "-")
    command = f"flow_grpo.py {options} --seed {seed}"
    resume = folder.exists()  # this script was stopped in the middle of it
    where = ["--resume", f"runs/{folder.name}"] if resume else ["--name", folder.name]
    start = time.time()
    with Path(f"{folder}.log").open("a", encoding="utf-8") as log:
        failed = subprocess.run(
            [sys.executable, *command.split(), *where], cwd=TOP, stdout=log, stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)}).returncode
    seconds = round(time.time() - start, 1)
    print(f"{name}: {f'failed, see {log.name}' if failed else f'{seconds} s'}", flush=True)
    if failed:
        return
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    default = asdict(flow_grpo.Config()) | {key: config[key] for key in ("name", "resume", "seed")}
    curves, final = curves_and_final(read_jsonl(folder / "metrics.jsonl"))
    row = {
        "name": name, "command": f"python {command}",
        "options": {key: value for key, value in config.items() if value != default.get(key)},
        "seed": seed, "curves": curves, "final": final, "seconds": None if resume else seconds,
        "machine": machine(), "edition": EDITION.strip()}
    with LOCK, Path(file).open("a", encoding="utf-8") as rows:
        rows.write(json.dumps(row) + "\n")


def main(file=TOP / "results/runs.jsonl", prefix=""):
    done = {row["name"] for row in read_jsonl(Path(file))} if Path(file).exists() else ()
    todo = [(f"{name}/seed{seed}", options, seed, file) for name, options, seeds in RUNS
            for seed in seeds]
    todo = [job for job in todo if job[0].startswith(prefix) and job[0] not in done]
    write_dev()
    for job in todo:
        if job[0].startswith(ALONE):
            run(*job, threads=os.cpu_count())
    with ThreadPoolExecutor(2) as pool:
        others = [job for job in todo if not job[0].startswith(ALONE)]
        list(pool.map(lambda job: run(*job, threads=1), others))


if __name__ == "__main__":
    main(*sys.argv[1:])
