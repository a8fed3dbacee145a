"""Draws the figures of results/README.md: python results/figures.py

The first two are computed here, from flow_grpo.py's own functions; the curves are read from the runs' metrics.jsonl; strips and film
are cut from the pictures in runs/, where those runs are on this machine.
"""
import json
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

RESULTS = Path(__file__).resolve().parent
OUT = RESULTS / "figures"
sys.path.insert(0, str(RESULTS.parent))
import flow_grpo  # noqa: E402


def marginals(samples=100_000, T=40, noise_level=0.7):
    """The distribution of x_t for one-dimensional data of which the exact velocity is known: by the ODE, by the SDE, and by the
    ODE with the SDE's noise but without its drift."""
    weights, means, stds = (torch.tensor(a) for a in ([0.4, 0.6], [-1.5, 1.0], [0.2, 0.4]))

    def velocity(x, t):  # E[noise - data | x_t = x], x: [B, 1]
        variance = (1 - t) ** 2 * stds**2 + t**2
        log_part = weights.log() - (x - (1 - t) * means) ** 2 / (2 * variance) - variance.log() / 2
        scaled = (x - (1 - t) * means) / variance  # [B, 2]
        data, noise = means + (1 - t) * stds**2 * scaled, t * scaled
        return (log_part.softmax(1) * (noise - data)).sum(1, keepdim=True)

    t = torch.linspace(1, 0, T + 1)
    sigma, dt = flow_grpo.sde_noise(t, noise_level), t.diff()
    torch.manual_seed(0)
    start = torch.randn(samples, 1)
    paths = {"ODE": [start], "SDE": [start], "noise without the drift": [start]}
    for i in range(T):
        args = [a.expand(samples) for a in (t[i], dt[i], sigma[i])]
        for name, path in paths.items():
            x = path[-1]
            v, ode = velocity(x, t[i]), name == "ODE" or i == T - 1
            if name == "SDE" and not ode:
                x = flow_grpo.sde_step(x, v, *args, noise=torch.randn_like(x))[0]
            else:
                x = x + v * dt[i] + (0 if ode else sigma[i] * (-dt[i]).sqrt() * torch.randn_like(x))
            path.append(x)
    shown = [10, 20, 30, 36, 40]
    figure = Figure(figsize=(12, 2.8), layout="constrained")
    for axes, i in zip(figure.subplots(1, len(shown)), shown):
        for name, color, style in (("ODE", "black", "-"), ("SDE", "tab:orange", "--"), ("noise without the drift", "tab:gray", ":")):
            counts, edges = np.histogram(paths[name][i].numpy(), 80, (-3.5, 3.5), density=True)
            axes.plot((edges[1:] + edges[:-1]) / 2, counts, style, color=color, label=name)
        axes.set(title=f"t = {t[i]:.2f}", yticks=[])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(OUT / "marginals.png", dpi=110)


def paths(prompt='a sign that says "SNOW"', T=10, seed=3, cell=96):
    """One image's latents, decoded after each step: by the ODE, and by SDEs of two noise levels from the same first noise."""
    config = flow_grpo.parse_config([])
    model = flow_grpo.load_model(config)
    pipe, t = model.pipe, flow_grpo.time_grid(model.pipe, config, T)
    condition = flow_grpo.encode(pipe, config, [prompt])
    rows = [("ODE", 0), ("SDE, a = 0.7", 0.7), ("SDE, a = 0.7", 0.7), ("SDE, a = 1.5", 1.5)]
    strip = Image.new("RGB", (110 + (T + 1) * cell, len(rows) * cell + 20), "white")
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(13)
    for r, (name, a) in enumerate(rows):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, pipe.vae.config.latent_channels, 12, 12, generator=generator)
        generator.manual_seed(seed + r + 100)
        sigma, dt = flow_grpo.sde_noise(t, a), t.diff()
        draw.text((4, 20 + r * cell + 40), name, font=font, fill="black")
        for i in range(T + 1):
            strip.paste(flow_grpo.decode(pipe, x)[0].resize((cell - 4, cell - 4)), (110 + i * cell, 20 + r * cell))
            draw.text((110 + i * cell + 4, 2), f"t = {t[i]:.2g}", font=font, fill="black")
            if i < T:
                with torch.no_grad():
                    v = flow_grpo.velocity(model, config, x, t[i:i + 1], condition)
                if a and i < T - 1:
                    noise = torch.randn(x.shape, generator=generator)
                    x = flow_grpo.sde_step(x, v, t[i:i + 1], dt[i:i + 1], sigma[i:i + 1], noise=noise)[0]
                else:
                    x = x + v * dt[i]
    strip.save(OUT / "paths.png")


def rows_of(run):
    return [json.loads(line) for line in (RESULTS / run / "metrics.jsonl").read_text().splitlines()]


def curves(name, runs, title, timed=None):
    """Training reward, smoothed over three epochs, by epoch; with timed also by time. runs: {folder: label}; timed: {folder: the
    run that measured what an epoch costs, with nothing beside it}
    """
    figure = Figure(figsize=(5.5 * (2 if timed else 1), 3.6), layout="constrained")
    for axes, by_time in zip(np.atleast_1d(figure.subplots(1, 2 if timed else 1)), (False, True)):
        for run, label in runs.items():
            if not (RESULTS / run / "metrics.jsonl").exists():
                continue
            reward = np.convolve([row["reward"] for row in rows_of(run) if "reward" in row], np.ones(3) / 3, "valid")
            seconds = epoch_seconds(timed[run]) if by_time else 1
            axes.plot(seconds * np.arange(1, len(reward) + 1), reward, label=label)
        axes.set(title=title, xlabel="seconds of training" if by_time else "epoch", ylabel="training reward")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(OUT / f"{name}.png", dpi=110)


def epoch_seconds(run):
    return np.mean([sum(row[f"seconds_{part}"] for part in ("sampling", "reward", "update")) for row in rows_of(run)[1:3]])


def hacking(seeds=(0, 1, 2)):
    """PickScore's proxy, the taste that it imitates, and diversity, with and without KL: a line for each seed."""
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    keys = {"eval_reward": "trained on: toy_pickscore", "eval_reward/toy_taste": "held out: toy_taste", "eval_diversity": "diversity"}
    for axes, (key, title) in zip(figure.subplots(1, 3), keys.items()):
        for run, label, color in (("pick-fast-seed", "with KL", "tab:blue"), ("pick-fast-nokl-seed", "without KL", "tab:red")):
            for seed in seeds:
                points = [(row["epoch"], row[key]) for row in rows_of(f"{run}{seed}") if key in row]
                axes.plot(*zip(*points), "o-", markersize=3, color=color, alpha=0.8, label=label if seed == 0 else None)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(OUT / "hacking.png", dpi=110)


def strip(name, pictures, rows=1):
    """The same prompts and seeds in several sample grids: the first rows of each. pictures: {label: path}; does nothing where one is
    missing, as runs/ is only on the machine that made it."""
    if not all(path.exists() for path in pictures.values()):
        return
    grids = {label: Image.open(path) for label, path in pictures.items()}
    width, height = next(iter(grids.values())).width, rows * 178  # a row: 150 pixels of image and two lines of text
    image = Image.new("RGB", (width + 90, height * len(grids)), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    for i, (label, grid) in enumerate(grids.items()):
        image.paste(grid.crop((0, 0, width, height)), (90, i * height))
        draw.text((4, i * height + height // 2 - 20), label, font=font, fill="black")
    image.save(OUT / f"{name}.png")


def film(run):
    """The first two rows of a run's sample grids as an animation; the run evaluates after every epoch."""
    frames, font = [], ImageFont.load_default(20)
    for path in sorted((run / "samples").glob("*.png")):
        grid = Image.open(path)
        grid = grid.crop((0, 0, grid.width, 2 * 178)).resize((grid.width * 2 // 3, 2 * 178 * 2 // 3), Image.LANCZOS)
        frame = Image.new("RGB", (grid.width, grid.height + 30), "white")
        ImageDraw.Draw(frame).text((4, 2), f"after {int(path.stem)} epochs", font=font, fill="black")
        frame.paste(grid, (0, 30))
        frames.append(frame.quantize(64))
    if frames:
        frames[0].save(OUT / f"{run.name}.gif", save_all=True, append_images=frames[1:], loop=0,
                       duration=[1500] + [400] * (len(frames) - 2) + [3000])


if __name__ == "__main__":
    OUT.mkdir(exist_ok=True)
    marginals()
    paths()
    default = "tried/lr15_b1_s0"
    curves("denoising", {"tried/steps40": "T = 40", default: "T = 10", "tried/steps5": "T = 5"}, "steps while training",
           {"tried/steps40": "tried/time-steps40", default: "tried/time-steps10", "tried/steps5": "tried/time-steps5"})
    curves("windows", {"tried/window0": "all but the last", "tried/window1": "1", default: "2", "tried/window3": "3", "tried/cps": "2, CPS"},
           "SDE steps of T = 10")
    curves("noise", {"tried/noise0.1": "a = 0.1", "tried/noise0.4": "a = 0.4", default: "a = 0.7", "tried/noise1.0": "a = 1"}, "noise level")
    curves("groups", {"tried/groups4x32": "4 x 32", "tried/groups5x24": "5 x 24", default: "8 x 16", "tried/groups11x12": "11 x 12",
                      "tried/groups21x6": "21 x 6"}, "groups x group size")
    curves("seeds", {default: "seed 0", "tried/lr15_b1_s1": "seed 1", "tried/lr15_b1_s2": "seed 2", "tried/same_noise-s0": "same noise, 0",
                     "tried/same_noise-s1": "same noise, 1", "tried/same_noise-s2": "same noise, 2"}, "three seeds, different and same first noise")
    hacking()
    runs = RESULTS.parent / "runs"
    strip("training", {f"epoch {e}": runs / f"ocr-seed0/samples/{e:04d}.png" for e in (0, 4, 8, 12, 16)})
    strip("hacking-pictures", {"base": runs / "pick-fast-seed0/samples/0000.png", "with KL": runs / "pick-fast-seed0/samples/0048.png",
                               "without KL": runs / "pick-fast-nokl-seed0/samples/0048.png"}, rows=2)
    film(runs / "film")
