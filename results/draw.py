"""Draws results/figures from runs.jsonl and from the method itself: python results/draw.py [NAME]

The pictures of images are copied from runs/, where results/run_all.py has left them.
"""
import json
import math
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


def runs(name):
    """The rows of all seeds of a setting"""
    lines = (RESULTS / "runs.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["run"].startswith(f"{name}/seed")]


def save(figure, name):
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURES / f"{name}.png")


def curves():
    """The evaluations of every seed, for the three tasks"""
    figure = Figure(figsize=(8.8, 2.8), dpi=100, layout="constrained")
    for axes, (name, key, title) in zip(figure.subplots(1, 3), (
            ("ocr/default", "eval_accuracy", "text: words read without a mistake"),
            ("geneval/default", "eval_accuracy", "scenes: all as asked (GenEval)"),
            ("pickscore/default", "eval_reward", "preference: the toy's PickScore"))):
        for row in runs(name):
            epochs, values = zip(*row["curves"][key])
            axes.plot(epochs, values, ".-", color=SDE, alpha=0.6)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    save(figure, "curves")


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
            x, _, _ = flow_grpo.sde_step(x, v, step, fresh_noise)
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
    grid = torch.linspace(-3, 3, 300)
    for row, T in zip(plots, (40, 10)):
        for axes, t in zip(row, (0.5, 0.0)):
            axes.fill_between(grid, density(grid, t).sum(1), color="0.85", label="exact")
            axes.set_title(f"{T} steps, t = {t}", fontsize=9)
            axes.set_yticks([])
        for label, color, kind in (("ODE", ODE, ("flow", 0.0)), ("equation 9", SDE, ("flow", 0.7)),
                                   ("CPS", CPS, ("cps", 0.7)),
                                   ("noise alone", WRONG, ("flow", 0.7, False))):
            times, path = sample(T, *kind)
            for axes, x in zip(row, (path[T // 2], path[T])):
                counts, edges = np.histogram(x, 120, (-3, 3), density=True)
                if x is path[T]:
                    label = f"{label}: width {width(x):.2f}"
                axes.plot((edges[1:] + edges[:-1]) / 2, counts, color=color, lw=1.2, label=label)
        row[1].legend(fontsize=8, frameon=False, loc="upper right")
    for axes in plots[1]:
        axes.set(xlabel="x", xlim=(-3, 4.6))
    save(figure, "marginals")


def last_step():
    """How much noise is in x after each of 10 SDE steps, and how much should be there"""
    times = torch.tensor(GRID)
    figure = Figure(figsize=(8.8, 3), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.plot(times[:-1], times[:-1], "o-", color=ODE, label="as it should be, and with the ODE")
    for label, style, window in (("all steps but the last are SDE steps", "s-", range(9)),
                                 ("only the first 3", "^--", range(3))):
        noise = [1.0]  # the std of the noise in x, if noise_guess is the true noise
        for i in range(10):
            step = flow_grpo.make_step(times, i, 0.7)
            keep, std = (step.keep, step.std) if i in window else (step.s, 0 * step.s)
            noise.append(math.hypot(keep * noise[-1] / times[i], std))
            noise[-1] = float(noise[-1])
        # Not the last step: at t = 0.009 a network expects little noise, and removes little.
        axes.plot(times[:-1], noise[:-1], style, color=SDE, label=label)
    axes.set(xlabel="time t on SD3.5's grid of 10 steps", ylabel="std of the noise in x",
             xlim=(1.02, -0.02))
    axes.annotate("0.24, where 0.009 belongs", (0.009, 0.24), (0.3, 0.05), fontsize=9,
                  arrowprops=dict(arrowstyle="->"))
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
        axes.set(title=f"{title}: a thin line is a prompt", xlabel="number of the random step",
                 ylabel="std of the reward")
    save(figure, "where_noise_decides")


def pictures():
    """Of the first seed of each task, and the film of the README"""
    for task, seed in (("ocr", 7001), ("geneval", 7101), ("pickscore", 7201)):
        run = RESULTS.parent / f"runs/{task}-default-seed{seed}/before_after.png"
        if run.exists():
            Image.open(run).convert("RGB").save(FIGURES / f"before_after_{task}.png")
    film = RESULTS.parent / "runs/ocr-film-seed0/film.gif"
    if film.exists():
        shutil.copy(film, FIGURES / "film.gif")


if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    for draw in (curves, marginals, last_step, where_noise_decides, pictures):
        if draw.__name__ in (sys.argv[1:] or draw.__name__):
            draw()
