"""Draws results/figures and fills in the tables: python results/draw.py [NAME OF A FUNCTION ...]

The numbers are those of runs.jsonl, or of the method itself. The pictures of images are copied from
runs/, where results/run_all.py has left them.
"""
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

RESULTS = Path(__file__).resolve().parent
FIGURES = RESULTS / "figures"
sys.path.insert(0, str(RESULTS.parent))
import flow_grpo  # noqa: E402
import rewards  # noqa: E402

# One color for one thing in all pictures (Okabe and Ito's, which color-blind people can tell apart)
ODE, SDE, CPS, WRONG = "black", "#0072B2", "#E69F00", "#D55E00"
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def runs(name):
    """The rows of all seeds of a setting"""
    lines = (RESULTS / "runs.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["run"].startswith(f"{name}/seed")]


def finals(name, key):
    """The last evaluation of all seeds of a setting: a list of numbers"""
    return [row["final"][key] for row in runs(name)]


def spread(values):
    """The mean, and in brackets the worst and the best"""
    text = f"{np.mean(values):.3f}"
    return text if len(values) < 2 else f"{text} ({min(values):.3f} to {max(values):.3f})"


def write_table(name, header, rows):
    """Into README.md and results/README.md, wherever <!-- name --> is"""
    lines = [header, ["---"] * len(header), *rows]
    table = "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)
    for page in (RESULTS.parent / "README.md", RESULTS / "README.md"):
        text = page.read_text("utf-8")
        place = re.compile(f"(<!-- {name} -->\n).*?(<!-- end -->)", re.S)
        page.write_text(place.sub(lambda found: found[1] + table + found[2], text), "utf-8")


def tables():
    rows = []
    for task, command, key, judged, paper in (
            ("text", "ocr", "eval_accuracy", "words read without a mistake", "0.59 to 0.92"),
            ("scenes", "geneval", "eval_accuracy", "all as asked", "0.63 to 0.95"),
            ("preference", "toy_pickscore", "eval_reward", "a small PickScore", "0.835 to 0.897")):
        name = command.removeprefix("toy_")
        values = finals(f"{name}/default", key)
        before, = finals(f"base/{name}", key)
        rows.append([f"{task}: {judged}", f"`--reward {command}`", f"{before:.3f}", spread(values),
                     len(values), paper])
    write_table("results", ["test prompts", "command", "before", "after: mean (worst to best)",
                            "seeds", "the paper, on SD3.5-Medium"], rows)

    keys = [f"eval_accuracy/{task}" for task in TASKS]
    before = [f"{finals('base/geneval', key)[0]:.2f}" for key in keys]
    after = [f"{np.mean(values):.2f} ({min(values):.2f})"
             for values in (finals("geneval/default", key) for key in keys)]
    write_table("tasks", ["GenEval", *(task.replace("_", " ") for task in TASKS)],
                [["before", *before], ["after: mean (worst)", *after]])

    rows = []
    for setting, steps, random_steps in (
            ("T40", 40, "4"), ("T10", 10, "1"), ("T5", 5, "1"),
            ("noisy-T40", 40, "all but the last"), ("noisy-T10", 10, "all but the last")):
        values = finals(f"words/{'default' if setting == 'T10' else setting}", "eval_accuracy")
        rows.append([steps, random_steps, spread(values) if values else "not measured", len(values),
                     epoch_seconds(f"time/{setting}")])
    write_table("denoising", ["steps in training", "random steps", "words read", "seeds",
                              "seconds of an epoch"], rows)


def epoch_seconds(name):
    """Of training epochs, without those that also evaluate"""
    seconds = [value for row in runs(name) for epoch, value in row["curves"]["seconds"]
               if epoch not in dict(row["curves"]["eval_reward"])]
    return f"{np.mean(seconds):.1f}" if seconds else ""


def save(figure, name):
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURES / f"{name}.png")


def curves():
    """The evaluations of every seed, for the three tasks"""
    figure = Figure(figsize=(8.8, 2.8), dpi=100, layout="constrained")
    plots = figure.subplots(1, 3)
    for axes, (name, key, title, unit) in zip(plots, (
            ("ocr/default", "eval_accuracy", "text", "share of words read without a mistake"),
            ("geneval/default", "eval_accuracy", "scenes (GenEval)", "share with all as asked"),
            ("pickscore/default", "eval_reward", "preference", "score of the toy's PickScore"))):
        for row in runs(name):
            epochs, values = zip(*row["curves"][key])
            axes.plot(epochs, values, ".-", color=SDE, alpha=0.6)
        axes.set_title(title, fontsize=9)
        axes.set_ylabel(unit, fontsize=8)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    for axes in plots[:2]:
        axes.set_ylim(0.5, 1)
    save(figure, "curves")


def hacking():
    """Preference, trained far too hard with the KL penalty and without it"""
    figure = Figure(figsize=(8.8, 2.8), dpi=100, layout="constrained")
    for axes, (key, title) in zip(figure.subplots(1, 3), (
            ("eval_reward", "trained: score of the toy's PickScore"),
            ("eval_reward/toy_taste", "watched: the taste behind it, 0 to 1"),
            ("eval_reward/diversity", "watched: difference of a prompt's images"))):
        for name, color, label in (("hacking/beta0.3", SDE, "beta 0.3"),
                                   ("hacking/beta0", WRONG, "beta 0")):
            for row, line in zip(runs(name), (".-", ".--", ".:")):
                epochs, values = zip(*row["curves"][key])
                axes.plot(epochs, values, line, color=color, label=f"{label}, seed {row['seed']}")
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    figure.axes[1].legend(fontsize=7, frameon=False, loc="lower left")
    save(figure, "hacking")


OPTIONS = {
    "default": "the default",
    "noise0.4": "noise_level 0.4 instead of 0.7",
    "noise0.1": "noise_level 0.1",
    "start0-3": "a window that begins at random, 0 to 3",
    "different-noise": "a first noise for each image",
    "groups4x32": "4 groups of 32 instead of 16 of 8",
    "std-group": "the std of the group, not of the epoch",
    "clip1e-4": "clip_range 1e-4 instead of 1e-3",
    "beta0": "beta 0 instead of 0.5",
    "cps": "CPS, with noise_level 0.8 and beta 0.05",
}


def options():
    """One option changed at a time: a dot for each seed, and a line at their mean"""
    figure = Figure(figsize=(8.8, 3.2), dpi=100, layout="constrained")
    axes = figure.subplots()
    for place, setting in enumerate(OPTIONS):
        values = finals(f"words/{setting}", "eval_accuracy")
        color = ODE if setting == "default" else SDE
        axes.plot(values, [place] * len(values), "o", color=color, alpha=0.7)
        axes.plot(np.mean(values), place, "|", color=color, markersize=16)
    axes.set_yticks(range(len(OPTIONS)), OPTIONS.values(), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("share of 60 words that are read, which were taken out of the training list")
    axes.grid(axis="x", alpha=0.3)
    save(figure, "options")


# Data with two modes, whose best v is known: weights, means and stds
WEIGHTS = torch.tensor([0.4, 0.6])
MEANS = torch.tensor([-1.5, 1.0])
STDS = torch.tensor([0.2, 0.4])


def density(x, t):
    """Of x at time t, in each mode: x is [N], the result [N, 2]"""
    variance = (1 - t) ** 2 * STDS**2 + t**2
    distance = x[:, None] - (1 - t) * MEANS
    return WEIGHTS * torch.exp(-distance**2 / (2 * variance)) / (2 * math.pi * variance).sqrt()


def best_v(x, t):
    """The mean of noise - data over all that could have led to x"""
    variance = (1 - t) ** 2 * STDS**2 + t**2
    distance = (x[:, None] - (1 - t) * MEANS) / variance
    v = t * distance - (MEANS + (1 - t) * STDS**2 * distance)
    share = density(x, t)
    return (share * v).sum(1) / share.sum(1)


def sample(T, sde, noise_level, drift=True, samples=100_000):
    """x [samples] at each of the T+1 times, with SDE steps in all steps but the last"""
    times = torch.linspace(1, 0, T + 1)
    torch.manual_seed(0)
    x = torch.randn(samples, 1, 1, 1)
    path = [x.flatten()]
    for i in range(T):
        step = flow_grpo.make_step(times, i, noise_level, sde)
        v = best_v(x.flatten(), times[i].item()).view(x.shape)
        fresh_noise = torch.randn(x.shape)
        if noise_level == 0 or i == T - 1:
            x = x + v * (step.s - step.t)
        elif drift:
            x, _ = flow_grpo.sde_step(x, v, step, fresh_noise)
        else:  # noise is added, but nothing is taken away for it
            x = x + v * (step.s - step.t) + step.std * fresh_noise
        path.append(x.flatten())
    return times, path


def width(x):
    """The std within the wider mode, divided by that of the data"""
    inside = x[(x > -0.3) & (x < 2.3)]
    exact = STDS[1] * torch.randn(1_000_000) + MEANS[1]
    exact = exact[(exact > -0.3) & (exact < 2.3)]
    return (inside.std() / exact.std()).item()


def marginals():
    """Is x distributed as it should be? At t = 0.5 and in the end, with 40 steps and with 10"""
    figure = Figure(figsize=(8.8, 4.6), dpi=100, layout="constrained")
    plots = figure.subplots(2, 2, sharex=True)
    grid = torch.linspace(-3, 6, 450)
    for row, T in zip(plots, (40, 10)):
        for axes, t in zip(row, (0.5, 0.0)):
            axes.fill_between(grid, density(grid, t).sum(1), color="0.85", label="exact")
            axes.set_title(f"{T} steps, {'half time' if t else 'the end'} (t = {t:g})", fontsize=9)
            axes.set_yticks([])
        for label, color, kind in (("ODE", ODE, ("flow", 0.0)), ("equation 9", SDE, ("flow", 0.7)),
                                   ("CPS", CPS, ("cps", 0.7)),
                                   ("drift not corrected", WRONG, ("flow", 0.7, False))):
            times, path = sample(T, *kind)
            for axes, x in zip(row, (path[T // 2], path[T])):
                counts, edges = np.histogram(x, 180, (-3, 6), density=True)
                if x is path[T]:
                    label = f"{label}: width {width(x):.2f}"
                axes.plot((edges[1:] + edges[:-1]) / 2, counts, color=color, lw=1.2, label=label)
        row[1].legend(fontsize=7, frameon=False, loc="upper right", handlelength=1)
    for axes in plots[1]:
        axes.set(xlabel="x", xlim=(-3, 6))
    for axes in plots[:, 0]:
        axes.set_ylabel("density")
    save(figure, "marginals")


def last_step():
    """How much noise is in x after each of 10 SDE steps, and how much should be there"""
    times = torch.tensor(GRID)
    figure = Figure(figsize=(8.8, 3), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.plot(times[:-1], times[:-1], "o-", color=ODE, label="as it should be, and with the ODE")
    for label, color, style, window in (
            ("only the first 3 are SDE steps", "0.6", "^--", range(3)),
            ("all steps but the last are SDE steps", SDE, "s-", range(9))):
        noise = [1.0]  # the std of the noise in x, if noise_guess is the true noise
        for i in range(10):
            step = flow_grpo.make_step(times, i, 0.7)
            keep, std = (step.keep, step.std) if i in window else (step.s, 0 * step.s)
            noise.append(math.hypot(keep * noise[-1] / times[i], std))
            noise[-1] = float(noise[-1])
        # Not the last step: at t = 0.009 a network expects little noise, and removes little.
        axes.plot(times[:-1], noise[:-1], style, color=color, label=label)
    axes.set(xlabel="time t, from noise to image, on SD3.5's grid of 10 steps",
             ylabel="std of the noise in x",
             xlim=(1.02, -0.02))
    axes.annotate(f"{noise[-2]:.2f}, where 0.009 belongs", (0.009, noise[-2]), (0.21, 0.42),
                  fontsize=9, arrowprops=dict(arrowstyle="->"))
    axes.legend(fontsize=8, frameon=False)
    save(figure, "last_step")


GRID = [1, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876, 0.278049,
        0.00892857, 0]  # of diffusers' FlowMatchEulerDiscreteScheduler with shift 3


def where_noise_decides(prompts=8, size=16):
    """How much the rewards of a group differ if only one step is random, at each place in turn"""
    figure = Figure(figsize=(8.8, 2.8), dpi=100, layout="constrained")
    for axes, (reward, title) in zip(figure.subplots(1, 2), (("ocr", "text"), ("geneval", "scenes"))):
        config = flow_grpo.Config(reward=reward)
        policy = flow_grpo.load_policy(config)
        loaded = rewards.load(reward, "--reward")
        rows = rewards.load_prompts(config, "train")[:prompts]
        stds = []
        for i in range(9):
            drawn = flow_grpo.rollout(
                policy, config, [row["prompt"] for row in rows],
                flow_grpo.repeat_each(range(prompts), size), 10, range(i, i + 1),
                list(range(1000, 1000 + prompts * size)))
            scores = rewards.score(loaded, drawn.images, flow_grpo.repeat_each(rows, size))
            stds.append(scores["reward"].reshape(prompts, size).std(1))
        axes.plot(range(9), stds, color=SDE, alpha=0.25)
        axes.plot(range(9), np.mean(stds, 1), "o-", color=SDE)
        axes.set(title=f"{title}: a thin line is one of {prompts} prompts, the thick one their mean",
                 xlabel="which of the 10 steps is random (0 is the first)",
                 ylabel="std of the reward in a group")
        axes.title.set_fontsize(8)
    save(figure, "where_noise_decides")


def pictures():
    """Of the first seed of scenes, and the film of the README"""
    run = RESULTS.parent / "runs/geneval-default-seed7101/before_after.png"
    if run.exists():
        Image.open(run).convert("RGB").save(FIGURES / "before_after_geneval.png")
    film = RESULTS.parent / "runs/ocr-film-seed0/film.gif"
    if film.exists():
        shutil.copy(film, FIGURES / "film.gif")


if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    for draw in (tables, curves, hacking, options, marginals, last_step, where_noise_decides,
                 pictures):
        if draw.__name__ in (sys.argv[1:] or draw.__name__):
            draw()
