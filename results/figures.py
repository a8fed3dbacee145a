"""Draws results/figures and fills the tables of results/README.md from runs.jsonl.

  python results/figures.py                    # everything: about five minutes on one core
  python results/figures.py marginals windows  # only these

A function below is a figure, a table, or both; what it returns is the table of its name in
README.md.
"""
import functools
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

RESULTS = Path(__file__).resolve().parent
OUT, RUNS = RESULTS / "figures", RESULTS.parent / "runs"
sys.path.insert(0, str(RESULTS.parent))
import flow_grpo  # noqa: E402
import rewards  # noqa: E402

ROWS = [json.loads(line) for line in (RESULTS / "runs.jsonl").read_text("utf-8").splitlines()]
# Okabe and Ito's colours, which colour-blind readers can tell apart
COLORS = "black", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
BLACK, BLUE, ORANGE, _, RED, *_ = COLORS


class Missing(Exception):
    """Something that a figure needs is not there yet."""


# ------------------------------------------------------------------------------------- runs, tables


def runs(name):
    """All seeds of a setting: the rows named name/seed0 and so on"""
    return [row for row in ROWS if row["name"].rpartition("/")[0] == name]


def found(*names):
    """{name: its runs}, of those that have any"""
    there = {name: runs(name) for name in names if runs(name)}
    if not there:
        raise Missing(f"no run of {', '.join(names)} in runs.jsonl")
    return there


def values(rows, key):
    """Of the last evaluation, one value for each run that has it"""
    return [row["final"][key] for row in rows if key in row["final"]]


def spread(numbers, digits=3):
    """0.950 (0.900 to 0.990): the mean, and from the worst to the best"""
    if not numbers:
        return ""
    mean, worst, best = (f"{f(numbers):.{digits}f}" for f in (np.mean, min, max))
    return f"{mean} ({worst} to {best})" if len(numbers) > 1 else mean


def table(head, *lines):
    rows = [head, ["---"] * len(head), *lines]
    return ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def fill(name, lines):
    """Put a table between its marks in the two README.md"""
    marks = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    for path in (RESULTS / "README.md", RESULTS.parent / "README.md"):
        text = path.read_text(encoding="utf-8")
        text = marks.sub(lambda mark: mark[1] + "\n".join(lines) + "\n" + mark[2], text)
        path.write_text(text, encoding="utf-8")


def save(figure, name):
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0] and not figure.legends:
            axes.legend(fontsize=8, frameon=False)
    figure.savefig(OUT / f"{name}.png", dpi=110)


# --------------------------------------------------------------------- what the model itself shows


def mixture(means, stds, weights=(0.4, 0.6)):
    """One-dimensional data with two modes: std(t) of x_t, its density(x, t), its exact velocity"""
    means, stds, weights = torch.tensor([means, stds, weights])

    def parts(x, t):  # of x_t, given each mode; x: [..., 1]
        variance = (1 - t) ** 2 * stds**2 + t**2
        density = torch.exp(-(x - (1 - t) * means) ** 2 / (2 * variance))
        return variance, weights * density / torch.sqrt(2 * torch.pi * variance)

    def velocity(x, t):  # E[noise - data | x_t = x]
        variance, density = parts(x, t)
        scaled = (x - (1 - t) * means) / variance
        v = t * scaled - (means + (1 - t) * stds**2 * scaled)
        return (density / density.sum(-1, keepdim=True) * v).sum(-1, keepdim=True)

    def std(t):
        variance = (weights * (stds**2 + means**2)).sum() - (weights * means).sum() ** 2
        return torch.sqrt((1 - t) ** 2 * variance + t**2)

    return std, lambda x, t: parts(x, t)[1].sum(-1), velocity


def path(velocity, T, sde, noise_level, drift=True, samples=100_000):
    """x_t [samples, 1, 1, 1] at each t of T equal steps, the last of them without noise"""
    times = torch.linspace(1, 0, T + 1)
    steps = flow_grpo.sde_steps(times, noise_level, sde)
    torch.manual_seed(0)
    x = torch.randn(samples, 1, 1, 1)
    x_at = {}
    for i in range(T):
        step = steps.at(i)
        v, noise = velocity(x, step.t), torch.randn_like(x)
        if noise_level and drift and i < T - 1:
            x = flow_grpo.sde_step(x, v, step, noise)[0]
        else:
            x = x + (step.s - step.t) * v
            x = x + step.std * noise if noise_level and i < T - 1 else x
        x_at[round(times[i + 1].item(), 3)] = x
    return x_at


def marginals(shown=(0.7, 0.4, 0.2, 0.1, 0.0)):
    """Do the SDEs have the ODE's distribution at each time? In 40 steps, and in 10"""
    kinds = {"ODE": ("flow", 0.0), "SDE, equation 9, a = 0.7": ("flow", 0.7),
             "CPS, a = 0.7": ("cps", 0.7), "noise without the drift": ("flow", 0.7, False)}
    modes, point = mixture([-1.5, 1.0], [0.2, 0.4]), mixture([0.0, 0.0], [1e-4, 1e-4])
    figure = Figure(figsize=(12, 5.2), layout="constrained")
    grid, lines = torch.linspace(-3.5, 3.5, 200)[:, None], []
    for plots, T in zip(figure.subplots(2, len(shown), sharex=True), (40, 10)):
        for axes, t in zip(plots, shown):
            axes.fill_between(grid[:, 0], modes[1](grid, t), color="0.85", lw=0, label="exact")
            axes.set(title=f"T = {T}, t = {t}", yticks=[], xlim=(-3.5, 3.5))
        for color, (name, kind) in zip((BLACK, BLUE, ORANGE, RED), kinds.items()):
            x = path(modes[2], T, *kind)
            for axes, t in zip(plots, shown):
                counts, edges = np.histogram(x[t].numpy(), 80, (-3.5, 3.5), density=True)
                axes.plot((edges[1:] + edges[:-1]) / 2, counts, ":" if "without" in name else "-",
                          color=color, lw=1.3, label=name)
            dots = path(point[2], T, *kind)
            ratios = [x[t].std() / modes[0](t) for t in shown]
            ratios += [dots[t].std() / t for t in shown[:-1]]
            lines.append([name, T, *(f"{ratio:.2f}" for ratio in ratios)])
    for axes in plots:
        axes.set_xlabel("x_t")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5)
    save(figure, "marginals")
    return table(["std of x_t / exact", "T", *(f"t = {t}" for t in shown),
                  *(f"a point, {t}" for t in shown[:-1])], *lines)


def paths(prompt='a sign that says "SNOW"', T=10, seed=3, cell=96):
    """One image's latents, decoded after each step: the ODE and several SDEs, from one noise"""
    policy = flow_grpo.load_policy(flow_grpo.Config(reward="ocr"))
    condition, times = policy.encode([prompt]), policy.time_grid(T)
    kinds = [("ODE", 0, "flow"), ("SDE, a = 0.7", 0.7, "flow"), ("SDE again", 0.7, "flow"),
             ("SDE again", 0.7, "flow"), ("CPS, a = 0.7", 0.7, "cps")]
    strip = Image.new("RGB", (120 + (T + 1) * cell, len(kinds) * cell + 24), "white")
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default(14)
    for r, (name, level, sde) in enumerate(kinds):
        steps = flow_grpo.sde_steps(times, level, sde)
        x = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(seed + 100 + r)
        pen.text((4, r * cell + 60), name, "black", font)
        for i in range(T + 1):
            image = policy.decode(x)[0].resize((cell - 4, cell - 4), Image.LANCZOS)
            strip.paste(image, (120 + i * cell, r * cell + 24))
            if r == 0:
                pen.text((124 + i * cell, 3), f"t = {times[i]:.3g}", "black", font)
            if i < T:
                step = steps.at(i)
                with torch.no_grad():
                    v = policy.velocity(x, step.t, condition)
                if level and i < T - 1:
                    noise = torch.randn(x.shape, generator=generator)
                    x = flow_grpo.sde_step(x, v, step, noise)[0]
                else:
                    x = x + (step.s - step.t) * v
    strip.save(OUT / "paths.png")


def noise_decides(prompts=8, size=16, late=5, cell=64):
    """What one noisy step changes, by its place: 16 images from one first noise, ODE elsewhere"""
    figure = Figure(figsize=(11, 4), layout="constrained")
    axes, *pictures = figure.subplots(1, 3, width_ratios=[1.35, 1, 1])
    stds, groups = {}, {}
    for color, (reward, title) in zip((BLUE, ORANGE), (("ocr", "text"), ("geneval", "scenes"))):
        config = flow_grpo.Config(reward=reward, noise_level=0.7)
        policy, function = flow_grpo.load_policy(config), rewards.load(reward)[reward][0]
        T, rows = config.train_steps, flow_grpo.load_prompts(config, "train")[:prompts]
        names, metadata = zip(*(row for row in rows for _ in range(size)))
        stds[title] = []
        for place in range(T):
            seeds = list(range(len(names)))
            drawn = flow_grpo.rollout(policy, config, names, seeds, T,
                                      range(place, place + 1), size)
            scores = np.reshape(function(drawn.images, list(names), list(metadata)), (-1, size))
            stds[title].append(scores.std(1))
            groups[reward, place] = [drawn.images[g * size:(g + 1) * size] for g in range(prompts)]
        axes.plot(range(T), stds[title], color=color, lw=0.6, alpha=0.4)
        axes.plot(range(T), np.mean(stds[title], 1), "o-", color=color, lw=2, label=title)
    axes.set(xlabel="the step that is noisy (0 is the first of 10)", xticks=range(T),
             ylabel="std of the reward within a group", title="Only early noise decides the reward")
    shown = np.argmax(stds["text"][0])
    for axes, place in zip(pictures, (0, late)):
        side = Image.new("RGB", (4 * cell, 4 * cell), "white")
        for k, image in enumerate(groups["ocr", place][shown]):
            side.paste(image.resize((cell - 2, cell - 2), Image.LANCZOS),
                       (k % 4 * cell, k // 4 * cell))
        axes.imshow(side)
        axes.set_axis_off()
        axes.set_title(f"one group, noise in step {place}")
    save(figure, "noise_decides")


# ------------------------------------------------------------------------------ what the runs show


TRIED = dict(
    ocr=["groups8x16/ocr/default", "groups8x16/ocr/8-epochs"], pickscore=["pickscore/16-epochs"],
    geneval=["geneval/groups32x8", "geneval/falling-rate"])


def headline(task, keys, *paper):
    """A task's table: keys of `final` and their titles; at the end the paper's lines"""
    main, lines = next(iter(keys)), []
    settings = {f"base/{task}": "the toy as it is", f"{task}/default": "**trained**"}
    settings |= {name: f"tried before: {name}" for name in TRIED[task]}
    for name, rows in found(*settings).items():
        trained = [row for row in rows if row["curves"].get("epoch")]
        before = [row["curves"][main][0] for row in trained]
        seconds = [row["seconds"] for row in trained if row["seconds"]]
        numbers = [mean(rows, key) if "accuracy/" in key else spread(values(rows, key))
                   for key in keys]
        lines.append([settings[name], len(rows), f"{np.mean(before):.3f}" if before else "",
                      *numbers, f"{np.mean(seconds):.0f}" if seconds else ""])
    for name, numbers in paper:
        numbers = numbers.split() + [""] * len(keys)
        lines.append([name, "", "", *numbers[:len(keys)], ""])
    return table(["", "runs", "before", *keys.values(), "seconds"], *lines)


def mean(rows, key):
    return f"{np.mean(values(rows, key)):.2f}" if values(rows, key) else ""


def ocr():
    return headline("ocr", {
        "eval_accuracy": "whole words", "eval_reward": "mean reward", "eval_diversity": "diversity",
    })


def overview():
    """The three rows of the first page"""
    lines = []
    for task, key, title, option, paper in (
            ("ocr", "eval_accuracy", "text: whole words", "ocr", "0.59 -> 0.92, a mean reward: "),
            ("geneval", "eval_accuracy", "composition: GenEval", "geneval", "0.63 -> 0.95"),
            ("pickscore", "eval_reward", "preference: a toy PickScore, / 26", "toy_pickscore",
             "0.835 -> 0.897, another scale")):
        rows = found(f"{task}/default")[f"{task}/default"]
        before = np.mean([row["curves"][key][0] for row in rows])
        if task == "ocr":  # in the paper's metric
            paper += f"here {np.mean([row['curves']['eval_reward'][0] for row in rows]):.2f} -> "
            paper += f"{np.mean(values(rows, 'eval_reward')):.2f}"
        lines.append([title, f"`--reward {option}`", f"{before:.3f}",
                      spread(values(rows, key)), len(rows), paper])
    return table(["held-out prompts", "command", "before", "after: mean (worst to best)", "seeds",
                  "the paper, SD3.5-Medium"], *lines)


TASKS = dict(single_object="single", two_object="two", counting="counting", colors="colours",
             position="position", color_attr="attribution")
PAPER_GENEVAL = (("SD3.5-Medium in the paper", "0.63 0.98 0.78 0.50 0.81 0.24 0.52"),
                 ("with Flow-GRPO", "0.95 1.00 0.99 0.95 0.92 0.99 0.86"))
PAPER_UNSEEN = (("SD3.5-Medium in the paper", "0.64 0.96 0.73 0.53 0.87 0.26 0.47"),
                ("with Flow-GRPO", "0.90 1.00 0.94 0.86 0.97 0.84 0.77"))


def geneval():
    by_task = {f"eval_accuracy/{task}": title for task, title in TASKS.items()}
    keys = {"eval_accuracy": "overall"} | by_task
    return headline("geneval", keys, *PAPER_GENEVAL)


def generalisation():
    rows = found("generalisation/default")["generalisation/default"]
    keys = ["eval_accuracy", *(f"eval_accuracy/{task}" for task in TASKS)]
    before = [f"{rows[0]['curves'][key][0]:.2f}" for key in keys]
    after = [spread(values(rows, key), 2) for key in keys]
    return table(["", "overall", *TASKS.values()], ["before", *before],
                 [f"after, {len(rows)} seeds", *after],
                 *([name, *numbers.split()] for name, numbers in PAPER_UNSEEN))


def pickscore():
    return headline("pickscore", {
        "eval_reward": "toy_pickscore", "eval_reward/toy_taste": "held out: toy_taste",
        "eval_diversity": "diversity",
    })


def curves():
    """The three tasks: the evaluations of each seed"""
    panels = (("ocr", "eval_accuracy", "whole words"), ("geneval", "eval_accuracy", "scenes right"),
              ("pickscore", "eval_reward", "toy_pickscore"))
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, (task, key, title) in zip(figure.subplots(1, 3), panels):
        rows = found(f"{task}/default")[f"{task}/default"]
        evaluations(axes, rows, key, BLUE)
        axes.set(xlabel="epoch", ylabel=title, title=f"{len(rows)} seeds, held-out prompts")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    save(figure, "curves")


def evaluations(axes, rows, key, color, text=None):
    """A line for each seed"""
    for i, row in enumerate(row for row in rows if key in row["curves"]):
        axes.plot(row["curves"]["eval_epoch"], row["curves"][key], "o-", color=color, lw=1.2,
                  markersize=3, alpha=0.8, label=None if i else text)


def hacking():
    """PickScore, 48 epochs at a high rate: trained score, held-out taste, diversity"""
    keys = {"eval_reward": "trained on: toy_pickscore",
            "eval_reward/toy_taste": "held out: toy_taste", "eval_diversity": "diversity"}
    both = found("pickscore/long-beta0.3", "pickscore/long-beta0")
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, 3), keys.items()):
        for rows, color, text in zip(both.values(), (BLUE, RED), ("with KL", "without KL")):
            evaluations(axes, rows, key, color, text)
        axes.set(title=title, xlabel="epoch")
    save(figure, "hacking")


BETA = {"base/ocr": 0.5, "base/geneval": 0.1, "base/pickscore": 0.1,
        "pickscore/long-beta0.3": 0.3}


def kl():
    """Each task with the KL and without, and the same seeds of both where there are some"""
    keys, lines = ("eval_reward", "eval_diversity", "eval_reward/toy_taste",
                   "eval_reward/toy_sign", "eval_reward/toy_inks"), []
    groups = (("text", "base/ocr", "ocr/default", "ocr/beta0"),
              ("scenes", "base/geneval", "geneval/default", "geneval/beta0"),
              ("preference", "base/pickscore", "pickscore/default", "pickscore/beta0"),
              ("preference, high rate, 48 epochs", "pickscore/long-beta0.3", "pickscore/long-beta0"))
    for task, *names in groups:
        *others, without = found(*names).values()
        seeds = {row["seed"] for row in without}
        paired = [row for row in others[-1] if row["seed"] in seeds]
        if len(seeds) == len(paired) < len(others[-1]):
            others.append(paired)
        for rows in (*others, without):
            beta, moved = "base", ""
            if rows[0]["curves"].get("kl"):
                beta = BETA[names[0]] if rows is not without else 0
                moved = f"{np.mean([row['curves']['kl'][-4:] for row in rows]):.1e}"
            count = f"{len(rows)}, those of beta 0" if rows is paired else len(rows)
            cells = [spread(values(rows, key)) for key in keys]
            drawing = [2 * row["final"]["eval_reward/toy_taste"] - row["final"]["eval_reward"]
                       for row in rows if task == "scenes"]
            cells.insert(3, spread(drawing))
            lines.append([task, beta, count, *cells, moved])
    return table(["trained on", "beta", "seeds", "its reward", "diversity", "toy_taste", "drawing",
                  "toy_sign", "toy_inks", "KL at the end"], *lines)


def seconds_an_epoch(name):
    """Of each run that had the machine to itself: the mean of its second and third epoch"""
    return [np.mean(row["curves"]["seconds"][1:3]) for row in found(f"time/{name}")[f"time/{name}"]]


def times():
    """What an epoch costs"""
    names = {"T40": "T = 40", "T10": "T = 10", "T5": "T = 5",
             "T40-window0": "T = 40, all but the last step noisy",
             "T10-window0": "T = 10, the same"}
    return table(["", *names.values()], [
        "seconds an epoch", *(spread(seconds_an_epoch(name), 1) for name in names)])


def denoising():
    """Training reward against the time that training took, on a machine of its own"""
    panels = {"one noisy step in ten": {"T40": "T = 40", "T5": "T = 5", "default": "T = 10"},
              "all but the last step noisy, as in the paper": {
                  "all-steps-T40": "T = 40", "all-steps-T10": "T = 10"}}
    clocks = {"T40": "T40", "T5": "T5", "default": "T10", "all-steps-T40": "T40-window0",
              "all-steps-T10": "T10-window0"}
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, 2, sharey=True), panels.items()):
        for name, text in names.items():
            rows = found(f"dev/ocr/{name}")[f"dev/ocr/{name}"]
            reward = [row["curves"]["reward"] for row in rows]
            seconds = np.mean(seconds_an_epoch(clocks[name])) * np.arange(1, len(reward[0]) + 1)
            color = {"T = 40": ORANGE, "T = 5": BLUE, "T = 10": BLACK}[text]
            axes.plot(seconds, np.mean(reward, 0), "o-", ms=3, color=color,
                      label=f"{text} ({len(rows)} seeds)")
            axes.fill_between(seconds, np.min(reward, 0), np.max(reward, 0), color=color,
                              alpha=0.12, lw=0)
        axes.set(title=title, xlabel="seconds of training", ylabel="training reward")
        axes.set_xscale("log")
        ticks = [2, 5, 10, 20, 50] if "one" in title else [5, 10, 20, 50, 100, 200, 500]
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
    save(figure, "denoising")


# One option at a time, on dev/ocr: the title of a figure, its runs and what they are called
ABLATIONS = {
    "steps": ("Steps while training", {
        "T40": "T = 40, 4 of them noisy", "default": "T = 10, the default", "T5": "T = 5",
        "all-steps-T40": "T = 40, all but the last noisy, 20 epochs",
        "all-steps-T10": "T = 10, all but the last noisy, 20 epochs"}),
    "windows": ("Noisy steps", {
        "default": "1, the default", "window2": "2", "window3": "3", "window0": "all but the last",
        "cps": "1, CPS, noise 0.8, beta 0.05",
        "start0-3": "1, beginning at 0 to 3"}),
    "noise": ("Noise level", {
        "noise0.1": "0.1", "noise0.4": "0.4", "default": "0.7, the default", "noise1.0": "1.0"}),
    "groups": ("Groups x images of each", {
        "groups4x32": "4 x 32", "groups8x16": "8 x 16", "default": "16 x 8, the default",
        "groups32x4": "32 x 4", "different-noise": "16 x 8, different first noise",
        "std-group": "16 x 8, std of the group"}),
    "clip": ("Clipping", {
        "default": "clip range 1e-3, the default", "clip5e-4": "5e-4",
        "clip1e-4": "1e-4", "updates1": "1 update", "updates4": "4 updates"}),
    "beta": ("KL and rate", {
        "beta0": "beta 0", "default": "beta 0.5, the default", "beta1": "beta 1",
        "constant-rate": "beta 0.5, constant rate, 12 epochs"}),
}


def ablation(name):
    """Training reward of each epoch: the seeds' mean, and from worst to best"""
    title, names = ABLATIONS[name]
    all_runs = found(*(f"dev/ocr/{run}" for run in names))
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    colors = iter(COLORS[1:])
    for run, rows in all_runs.items():
        default = run == "dev/ocr/default"  # black, and on top
        color = BLACK if default else next(colors)
        reward = [row["curves"]["reward"] for row in rows]
        epochs = np.arange(len(reward[0])) + 1
        text = f"{names[run.rpartition('/')[2]]} ({len(rows)} seed{'s' * (len(rows) > 1)})"
        axes.plot(epochs, np.mean(reward, 0), "o-", ms=3, color=color, label=text,
                  zorder=3 if default else 2)
        axes.fill_between(epochs, np.min(reward, 0), np.max(reward, 0), color=color, alpha=0.12,
                          lw=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title=title, xlabel="epoch", ylabel="training reward")
    save(figure, name)


def ablations():
    """Accuracy, speed and clipping of each setting; a row of the table holds a group of settings"""
    lines = []
    for title, names in ABLATIONS.values():
        cells = []
        for run, rows in found(*(f"dev/ocr/{run}" for run in names)).items():
            curves = [row["curves"] for row in rows]
            accuracy = [curve["eval_accuracy"] for curve in curves]
            reward = [np.mean(curve["reward"][:len(curve["reward"]) // 2]) for curve in curves]
            clipped = [np.add(curve["clip_low"], curve["clip_high"]).mean() for curve in curves]
            cells.append([
                names[run.rpartition("/")[2]], str(len(rows)),
                spread([line[-1] for line in accuracy]), spread(reward),
                spread(values(rows, "eval_reward/toy_inks"), 2), f"{np.mean(clipped):.1%}"])
        if len(cells) > 1:
            lines.append([title, *map("<br>".join, zip(*cells))])
    there = [name for name in ABLATIONS if (OUT / f"{name}.png").exists()]
    pictures = [f"![{ABLATIONS[name][0]}](figures/{name}.png)" for name in there]
    head = ["", "setting", "seeds", "whole words at the end", "training reward, first half", "inks",
            "clipped"]
    return [*table(head, *lines), "", " ".join(pictures)]


def search():
    """The settings that the defaults were chosen from, on parts of the training prompts"""
    cells = {}
    for name in sorted({row["name"].rpartition("/")[0] for row in ROWS}):
        if name.startswith(("search/", "dev/geneval")):
            _, task, setting = name.split("/")
            main = "eval_reward" if task == "pickscore" else "eval_accuracy"
            rows = runs(name)
            cells.setdefault(task, []).append([
                setting.replace("-", ", "), str(len(rows)), spread(values(rows, main)),
                spread(values(rows, "eval_reward/toy_inks"), 2)])
    return table(["task", "setting, epochs last", "seeds", "at the end", "inks"], *(
        [task, *map("<br>".join, zip(*rows))] for task, rows in cells.items()))


# --------------------------------------------------------------------- what the runs' folders hold


def pictures():
    """Pictures from runs/, where the runs are on this machine; else the present ones stay"""
    copies = {f"before-after-{task}.png": f"{task}-default-seed*/before_after.png"
              for task in ("ocr", "geneval", "pickscore", "generalisation")}
    for name, pattern in (copies | {"film.gif": "ocr-film-seed0/film.gif"}).items():
        there = sorted(RUNS.glob(pattern))
        if there:
            shutil.copy(there[0], OUT / name)
        else:
            print(f"{name} stays: there is no runs/{pattern}")


def hacked():
    """The same prompts and seeds before training, and after it with KL and without"""
    strips = {}
    for text, folder, which in (("before", "pickscore-long-beta0", 0),
                                ("with KL", "pickscore-long-beta0.3", -1),
                                ("without KL", "pickscore-long-beta0", -1)):
        there = sorted(RUNS.glob(f"{folder}-seed3/samples/*.png"))
        if not there:
            raise Missing(f"there is no runs/{folder}-seed3/samples")
        strips[text] = Image.open(there[which])
    width, height = strips["before"].width, 2 * 200  # two rows of images with their captions
    image = Image.new("RGB", (width + 100, 3 * height), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(16)
    for i, (text, grid) in enumerate(strips.items()):
        image.paste(grid.crop((0, 38, width, 38 + height)), (100, i * height))
        pen.text((6, i * height + height // 2), text, "black", font)
    image.save(OUT / "hacking-pictures.png")


def main(chosen):
    functions = (marginals, paths, noise_decides, overview, ocr, geneval, generalisation, pickscore,
                 curves, hacking, kl, times, denoising, ablations, search, pictures, hacked)
    jobs = {name: functools.partial(ablation, name) for name in ABLATIONS if name != "steps"}
    jobs |= {function.__name__: function for function in functions}
    for name in chosen or jobs:
        try:
            fill(name, jobs[name]() or [])
            print(name)
        except Missing as error:
            print(f"{name}: skipped, {error}")


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    main(sys.argv[1:])
