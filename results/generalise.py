"""Writes dev/generalise: training prompts without crosses, without purple and without "four"; test prompts that all have one of them.

As in the paper's Table 4 (60 classes of objects trained, 20 others tested; 2 to 4 objects trained, more tested) only the reinforcement
learning is kept from them: the base model has seen such scenes. 24 test rows for each task; where there are fewer prompts they repeat.
"""
import json
import random
import sys
from pathlib import Path

TOP = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOP / "toy"))
from make_toy import scenes  # noqa: E402

train = [json.loads(line) for line in (TOP / "toy/geneval/train_metadata.jsonl").read_text().splitlines()]
train = [row for row in train if not any(word in row["prompt"] for word in ("cross", "purple", "four"))]
tests = []
for tag in ("single_object", "two_object", "counting", "colors", "position", "color_attr"):
    if tag == "counting":
        rows = [row for row in scenes(tag) if "four" in row["prompt"] and "cross" not in row["prompt"]]
    else:
        rows = [row for row in scenes(tag) if "cross" in row["prompt"] or "purple" in row["prompt"]]
    random.Random(0).shuffle(rows)
    tests.append((rows * 24)[:24])
folder = TOP / "dev/generalise"
folder.mkdir(parents=True, exist_ok=True)
for split, rows in (("train", train), ("test", [row for six in zip(*tests) for row in six])):
    (folder / f"{split}_metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
