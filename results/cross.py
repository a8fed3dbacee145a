"""The toy's version of the paper's Table 2: every trained model on all tasks. python results/cross.py runs/NAME ... prints a row for each

All held-out prompts of both datasets, 2 images each from the same seeds for every model, ODE, 40 steps, averaged weights. KL is the
mean over the run's last 4 epochs, so it belongs to the run's own training prompts. The pictures are in runs/NAME/cross.
"""
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import flow_grpo  # noqa: E402
import rewards  # noqa: E402

TASKS = {"ocr": (rewards.load("ocr"), {}), "geneval": (rewards.load("geneval"), rewards.load("toy_pickscore,toy_taste"))}
for folder in map(Path, sys.argv[1:]):
    saved = json.loads((folder / "config.json").read_text())
    config = flow_grpo.Config(**saved | dict(dataset="", eval_prompts=0, eval_per_prompt=2, batch_size=64))
    model = flow_grpo.load_model(config)
    epoch = flow_grpo.load(model, folder)
    row = dict(run=folder.name, epoch=epoch)
    for task, (asked, watched) in TASKS.items():
        task_config = dataclasses.replace(config, reward=task)
        (folder / "cross" / task).mkdir(parents=True, exist_ok=True)
        metrics = flow_grpo.evaluate(model, task_config, asked, watched, flow_grpo.load_prompts(task_config, "test"),
                                     folder / "cross" / task, epoch)
        row |= {f"{task}/{key.removeprefix('eval_')}": round(float(value), 4) for key, value in metrics.items()}
    kl = [json.loads(line).get("kl", 0) for line in (folder / "metrics.jsonl").read_text().splitlines()[:-1]]  # the last has none
    print(json.dumps(row | dict(kl=float(np.mean(kl[-4:] or 0)))), flush=True)
