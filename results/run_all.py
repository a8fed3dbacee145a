"""The runs behind results/README.md, about three hours on 2 cores

  python results/run_all.py                # make the runs that results/runs.jsonl does not have
  python results/run_all.py FILE           # the runs that FILE does not have: all, if it is new
  python results/run_all.py FILE ocr/      # only those whose names begin so

Each run becomes a row of the file: its name, command, seed, seconds, machine, the commit it was
made with, its curves, and `final`, the metrics of its last evaluation. Its folder is in
runs/NAME OF THE FILE. A stopped script goes on where it was. Two runs are made at a time, each with
one thread for torch. Those named time/ are made one by one, with all cores.
"""
import json
import os
import platform
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]

# The seeds were written down here before any of them was run.
TEXT_SEEDS = range(8301, 8311)
SCENE_SEEDS = range(8101, 8111)
TASTE_SEEDS = range(8201, 8206)
SEEDS = range(3)

TEXT = "--reward ocr --eval_reward toy_sign,toy_inks,diversity"
SCENES = "--reward geneval --eval_reward toy_taste,diversity"
TASTE = "--reward toy_pickscore --eval_reward toy_taste,diversity"
ALL = "--eval_prompts 0"  # evaluate on all test prompts
# Options are compared on 60 training words that are held out, so that no test word decides one.
WORDS = f"{TEXT} --dataset dev/ocr"
SIX_EPOCHS = f"{WORDS} --epochs 6 --eval_every 6"
NOISY = f"{SIX_EPOCHS} --window 0"  # all steps random but the last
FEW = f"{WORDS} --epochs 2 --eval_prompts 2"  # only to see how long an epoch takes
# The preset has a learning rate of 2e-3, which falls, and 24 epochs.
TOO_HARD = f"{TASTE} --learning_rate 3e-3 --no-lr_decay --epochs 48 --eval_every 24"

RUNS = [  # name, options, seeds
    ("base/ocr", f"{TEXT} {ALL} --epochs 0", [0]),
    ("base/geneval", f"{SCENES} {ALL} --epochs 0", [0]),
    ("base/pickscore", f"{TASTE} {ALL} --epochs 0", [0]),
    ("ocr/default", f"{TEXT} {ALL} --eval_every 2", TEXT_SEEDS),
    ("ocr/epochs6", f"{TEXT} {ALL} --epochs 6 --eval_every 3", range(8001, 8011)),
    ("geneval/default", f"{SCENES} {ALL}", SCENE_SEEDS),
    ("pickscore/default", f"{TASTE} {ALL}", TASTE_SEEDS),
    ("ocr/film", "--reward ocr --eval_every 1", [0]),
    ("time/ocr", "--reward ocr", SEEDS),
    ("time/geneval", "--reward geneval", [0]),
    ("time/pickscore", "--reward toy_pickscore", [0]),

    # denoising reduction. 4 of 40 steps and 1 of 10 are the first tenth of all, 1 of 5 a fifth.
    ("words/T10", SIX_EPOCHS, SEEDS),
    ("words/T40", f"{SIX_EPOCHS} --train_steps 40 --window 4", SEEDS),
    ("words/T5", f"{SIX_EPOCHS} --train_steps 5", SEEDS),
    ("words/noisy-T10", NOISY, SEEDS),
    ("words/noisy-T40", f"{NOISY} --train_steps 40", SEEDS),
    ("weighted/T10", NOISY, SEEDS),  # by weighted_steps.py
    ("weighted/T40", f"{NOISY} --train_steps 40", SEEDS),
    ("time/T40", f"{FEW} --train_steps 40 --window 4", [0]),
    ("time/T10", FEW, [0]),
    ("time/T5", f"{FEW} --train_steps 5", [0]),
    ("time/noisy-T40", f"{FEW} --train_steps 40 --window 0", [0]),
    ("time/noisy-T10", f"{FEW} --window 0", [0]),

    # the KL penalty, and training far too hard with it and without it
    ("ocr/beta0", f"{TEXT} {ALL} --beta 0", SEEDS),
    ("hacking/beta0.3", f"{TOO_HARD} --beta 0.3", SEEDS),
    ("hacking/beta0", f"{TOO_HARD} --beta 0", SEEDS),

    ("generalization/default", f"{SCENES} {ALL} --dataset dev/generalization", SEEDS),

    # one option at a time
    ("words/default", WORDS, SEEDS),
    ("words/noise0.1", f"{WORDS} --noise_level 0.1", SEEDS),
    ("words/noise0.4", f"{WORDS} --noise_level 0.4", SEEDS),
    ("words/start0-3", f"{WORDS} --latest_start 3", SEEDS),
    ("words/cps", f"{WORDS} --sde cps --noise_level 0.8 --beta 0.05", SEEDS),
    ("words/groups4x32", f"{WORDS} --groups 4 --group_size 32", SEEDS),
    ("words/different-noise", f"{WORDS} --no-same_noise", SEEDS),
    ("words/std-group", f"{WORDS} --std_over group", SEEDS),
    ("words/clip1e-4", f"{WORDS} --clip_range 1e-4", SEEDS),
    ("words/beta0", f"{WORDS} --beta 0", SEEDS),
]


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def write_words():
    """dev/ocr: 60 training words are held out"""
    words = (TOP / "toy/ocr/train.txt").read_text("utf-8").splitlines()
    folder = TOP / "dev/ocr"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.txt").write_text("\n".join(words[:-60]) + "\n", "utf-8")
    (folder / "test.txt").write_text("\n".join(words[-60:]) + "\n", "utf-8")


def write_generalization():
    """dev/generalization: a shape, a color and a number are held out"""
    train = read_jsonl(TOP / "toy/geneval/train_metadata.jsonl")
    scenes = train + read_jsonl(TOP / "toy/geneval/test_metadata.jsonl")
    unseen = re.compile("cross|purple|four")
    seen = [row for row in train if not unseen.search(row["prompt"])]
    test = []
    for tag in sorted({row["tag"] for row in scenes}):
        if tag == "counting":  # four is tested with shapes that are in the training
            new = re.compile("four (circles|squares|triangles)")
        else:
            new = re.compile("cross|purple")
        found = {}  # each prompt once
        for row in scenes:
            if row["tag"] == tag and new.search(row["prompt"]):
                found[row["prompt"]] = row
        rows = [found[prompt] for prompt in sorted(found)]
        random.Random(0).shuffle(rows)
        for number in range(24):  # of each task. Some have fewer prompts, so these come again
            test.append(rows[number % len(rows)])
    folder = TOP / "dev/generalization"
    write_jsonl(folder / "train_metadata.jsonl", seen)
    write_jsonl(folder / "test_metadata.jsonl", test)


def curves(history, keys):
    """{key: [[epoch, value], ...]}, four digits each"""
    found = {}
    for key in keys:
        points = [[int(row["epoch"]), float(f"{row[key]:.4g}")] for row in history if key in row]
        if points:
            found[key] = points
    return found


def run(name, options, seed, file, threads):
    """One run, and its row in the file"""
    run_name = f"{name}-seed{seed}".replace("/", "-")
    folder = f"runs/{file.stem}/{run_name}"
    commit = git("rev-parse", "--short", "HEAD")
    if git("status", "--porcelain", "--", "*.py", "toy"):
        commit += "-changed"
    script = "results/weighted_steps.py" if name.startswith("weighted/") else "flow_grpo.py"
    command = f"{script} {options} --seed {seed}"
    start = time.time()
    was_stopped = (TOP / folder / "checkpoint.pt").exists()
    if was_stopped:
        folder_option = ["--resume", folder]
    else:
        folder_option = ["--name", f"{file.stem}/{run_name}"]
    (TOP / folder).parent.mkdir(parents=True, exist_ok=True)
    with open(TOP / f"{folder}.log", "a") as log:
        subprocess.run([sys.executable, *command.split(), *folder_option], cwd=TOP, stdout=log,
                       stderr=log, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=True)
    seconds = round(time.time() - start, 1)
    history = read_jsonl(TOP / folder / "metrics.jsonl")
    last = history[-1]
    keys = ["reward", "kl", "clip_low", "clip_high", "grad_norm", "no_signal", "seconds"]
    keys += [key for key in last if key.startswith("eval_")]
    row = {
        "run": f"{name}/seed{seed}", "command": f"python {command}", "seed": seed,
        "seconds": None if was_stopped else seconds, "threads": threads, "machine": machine(),
        "commit": commit, "curves": curves(history, keys),
        "final": {key: value for key, value in last.items() if key.startswith(("eval_", "kl"))}}
    with open(file, "a", encoding="utf-8") as rows:
        rows.write(json.dumps(row) + "\n")
    print(f"{row['run']}: {seconds} s", flush=True)


def git(*arguments):
    result = subprocess.run(["git", *arguments], cwd=TOP, text=True, capture_output=True)
    return result.stdout.strip()


def machine():
    processor = platform.machine()
    cpuinfo = Path("/proc/cpuinfo")  # on Linux it has the name of each core
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(": ")[1]
    return f"{os.cpu_count()} cores of an {processor}"


def main(file=TOP / "results/runs.jsonl", prefix=""):
    file = Path(file)
    done = {row["run"] for row in read_jsonl(file)} if file.exists() else set()
    write_words()
    write_generalization()
    alone, together = [], []
    for name, options, seeds in RUNS:
        for seed in seeds:
            if f"{name}/seed{seed}" not in done and name.startswith(prefix):
                jobs = alone if name.startswith("time/") else together
                jobs.append((name, options, seed, file))
    for job in alone:
        run(*job, threads=os.cpu_count())
    with ThreadPoolExecutor(2) as pool:
        # list() waits for all runs. If one of them fails, the others are not started.
        list(pool.map(lambda job: run(*job, threads=1), together))


if __name__ == "__main__":
    main(*sys.argv[1:])
