"""Draws results/figures and fills in the tables: python results/draw.py [NAME OF A FUNCTION ...]

The numbers are those of runs.jsonl, or of the method itself. The pictures of images are made from
those that results/run_all.py has left in runs/.
"""
import json
import math
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
TEXT, SCENES = "#009E73", "#CC79A7"


def runs(name):
    """The rows of all seeds of a setting"""
    lines = (RESULTS / "runs.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if row["run"].startswith(f"{name}/seed")]


def finals(name, key):
    """A number of the last evaluation, for all seeds of a setting"""
    return [row["final"][key] for row in runs(name)]


def spread(values):
    """The mean, and in brackets the worst and the best"""
    mean = f"{np.mean(values):.3f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.3f} to {max(values):.3f})"


def write_table(name, header, rows):
    """Into README.md and results/README.md, wherever <!-- name --> is"""
    table = ""
    for line in [header, ["---"] * len(header), *rows]:
        cells = [str(cell) for cell in line]
        table += "| " + " | ".join(cells) + " |\n"
    begin = f"<!-- {name} -->\n"
    end = "<!-- end -->"
    for page in (RESULTS.parent / "README.md", RESULTS / "README.md"):
        text = page.read_text("utf-8")
        if begin in text:
            before, after = text.split(begin)
            _, after = after.split(end, 1)
            page.write_text(before + begin + table + end + after, "utf-8")


def results_table():
    header = ["test prompts", "command", "before", "after: mean (worst to best)", "seeds",
              "the paper, on SD3.5-Medium"]
    rows = []
    for task, judged, reward, run, key, paper in (
            ("text", "words read without a mistake", "ocr", "ocr", "eval_accuracy", "0.59 to 0.92"),
            ("scenes", "all as asked", "geneval", "geneval", "eval_accuracy", "0.63 to 0.95"),
            ("preference", "a small PickScore", "toy_pickscore", "pickscore", "eval_reward",
             "0.835 to 0.897")):
        before = finals(f"base/{run}", key)
        after = finals(f"{run}/default", key)
        rows.append([f"{task}: {judged}", f"`--reward {reward}`", spread(before), spread(after),
                     len(after), paper])
    write_table("results", header, rows)


def denoising_table():
    header = ["steps in training", "random steps", "words read", "seconds of an epoch"]
    rows = []
    for steps, random_steps, words, seconds in (
            (40, "4", "words/T40", "time/T40"),
            (10, "1", "words/default", "time/T10"),
            (5, "1", "words/T5", "time/T5"),
            (40, "all but the last", "words/noisy-T40", "time/noisy-T40"),
            (10, "all but the last", "words/noisy-T10", "time/noisy-T10"),
            (40, "all but the last, weighted", "weighted/T40", "time/noisy-T40"),
            (10, "all but the last, weighted", "weighted/T10", "time/noisy-T10")):
        read = finals(words, "eval_accuracy")
        rows.append([steps, random_steps, spread(read), epoch_seconds(seconds)])
    write_table("denoising", header, rows)


def quality_table():
    header = ["trained on", "quality before", "after (worst seed)", "diversity before",
              "after (worst seed)"]
    rows = []
    for trained_on, base, run, quality, diversity in (
            ("text", "ocr", "ocr/default", "toy_sign", "toy_inks"),
            ("text, without the KL penalty", "ocr", "ocr/beta0", "toy_sign", "toy_inks"),
            ("scenes", "geneval", "geneval/default", "toy_taste", "diversity"),
            ("preference", "pickscore", "pickscore/default", "toy_taste", "diversity")):
        row = [trained_on]
        for name in (quality, diversity):
            before, = finals(f"base/{base}", f"eval_reward/{name}")
            after = finals(run, f"eval_reward/{name}")
            row += [f"{before:.2f}", f"{np.mean(after):.2f} ({min(after):.2f})"]
        rows.append(row)
    write_table("quality", header, rows)


def epoch_seconds(name):
    """Of training epochs, without those that also evaluate"""
    found = []
    for row in runs(name):
        evaluated = [epoch for epoch, _ in row["curves"]["eval_reward"]]
        for epoch, seconds in row["curves"]["seconds"]:
            if epoch not in evaluated:
                found.append(seconds)
    return f"{np.mean(found):.1f}"


def tables():
    results_table()
    denoising_table()
    quality_table()


def save(figure, name):
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURES / f"{name}.png")


def curves():
    """The evaluations of every seed, for the three tasks"""
    figure = Figure(figsize=(8.8, 3.1), dpi=100, layout="constrained")
    text, scenes, preference = figure.subplots(1, 3)
    for axes, name, key in (
            (text, "ocr/default", "eval_accuracy"),
            (scenes, "geneval/default", "eval_accuracy"),
            (preference, "pickscore/default", "eval_reward")):
        all_values = []
        for row in runs(name):
            epochs, values = zip(*row["curves"][key])
            axes.plot(epochs, values, ".-", color=SDE, alpha=0.35)
            all_values.append(values)
        label = f"mean of {len(all_values)} seeds"
        axes.plot(epochs, np.mean(all_values, 0), color="black", label=label)
        axes.legend(fontsize=8, frameon=False, loc="lower right")
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    text.set_title("text", fontsize=9)
    text.set_ylabel("words read without a mistake", fontsize=9)
    text.set_ylim(0.5, 1)
    scenes.set_title("scenes (GenEval)", fontsize=9)
    scenes.set_ylabel("images with all as asked", fontsize=9)
    scenes.set_ylim(0.5, 1)
    preference.set_title("preference", fontsize=9)
    preference.set_ylabel("score of the toy's PickScore", fontsize=9)
    save(figure, "curves")


def hacking():
    """Preference, trained far too hard with the KL penalty and without it"""
    figure = Figure(figsize=(8.8, 3.1), dpi=100, layout="constrained")
    reward, taste, diversity = figure.subplots(1, 3)
    for axes, key in ((reward, "eval_reward"), (taste, "eval_reward/toy_taste"),
                      (diversity, "eval_reward/diversity")):
        for beta, penalty, color in ((0.3, "KL", SDE), (0, "no KL", WRONG)):
            for row, line in zip(runs(f"hacking/beta{beta}"), (".-", ".--", ".:")):
                epochs, values = zip(*row["curves"][key])
                label = f"{penalty}, seed {row['seed']}"
                axes.plot(epochs, values, line, color=color, label=label)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    reward.set_title("trained: the toy's PickScore", fontsize=9)
    reward.set_ylabel("score", fontsize=9)
    taste.set_title("watched: quality, the taste behind it", fontsize=9)
    taste.set_ylabel("taste, at most 1", fontsize=9)
    taste.legend(fontsize=8, frameon=False, loc="lower left", handlelength=4)
    diversity.set_title("watched: diversity in a prompt", fontsize=9)
    diversity.set_ylabel("rms difference", fontsize=9)
    save(figure, "hacking")


OPTIONS = {
    "default": "the default",
    "noise0.4": "noise_level 0.4 instead of 0.7",
    "noise0.1": "noise_level 0.1",
    "start0-3": "a random step drawn anew each epoch, of 0 to 3",
    "different-noise": "no first noise shared by a group",
    "groups4x32": "4 groups of 32 instead of 16 of 8",
    "std-group": "advantages divided by the std of the group",
    "clip1e-4": "clip_range 1e-4 instead of 1e-3",
    "beta0": "beta 0 instead of 0.5",
    "cps": "CPS, with noise_level 0.8 and beta 0.05",
}


def options():
    """One option changed at a time"""
    figure = Figure(figsize=(8.8, 3.2), dpi=100, layout="constrained")
    axes = figure.subplots()
    for place, setting in enumerate(OPTIONS):
        values = finals(f"words/{setting}", "eval_accuracy")
        color = ODE if setting == "default" else SDE
        places = place + np.linspace(-0.2, 0.2, len(values))  # so that equal dots are seen
        axes.plot(values, places, "o", color=color, alpha=0.7, markersize=5)
        axes.plot(np.mean(values), place, "|", color=color, markersize=16)
    curve = runs("words/default")[0]["curves"]["eval_accuracy"]
    _, before = curve[0]
    axes.axvline(before, color="0.6", linestyle=":")
    axes.text(before + 0.003, 0, "before training", fontsize=8, color="0.4", va="center")
    axes.set_yticks(range(len(OPTIONS)), OPTIONS.values(), fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("share of words that are read: a dot for each seed, a bar at their mean")
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
    """x [samples] at each of T+1 equal times. All steps but the last are SDE steps."""
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
    return path


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
    for T, (half, end) in zip((40, 10), plots):
        for axes, t in ((half, 0.5), (end, 0.0)):
            x = torch.linspace(-3, 6, 450)
            axes.fill_between(x, density(x, t).sum(1), color="0.85", label="exact")
            axes.set_yticks([])
        for label, color, options in (
                ("ODE", ODE, dict(sde="flow", noise_level=0.0)),
                ("equation 9", SDE, dict(sde="flow", noise_level=0.7)),
                ("CPS", CPS, dict(sde="cps", noise_level=0.7)),
                ("drift not corrected", WRONG, dict(sde="flow", noise_level=0.7, drift=False))):
            path = sample(T, **options)
            outline(half, path[T // 2], color, label)
            outline(end, path[T], color, f"{label}: width {width(path[T]):.2f}")
        half.set_title(f"{T} steps, half time (t = 0.5)", fontsize=9)
        half.set_ylabel("density")
        end.set_title(f"{T} steps, the end (t = 0)", fontsize=9)
        end.legend(fontsize=7, frameon=False, loc="upper right", handlelength=1)
    for axes in plots[1]:
        axes.set(xlabel="x", xlim=(-3, 6))
    save(figure, "marginals")


def outline(axes, x, color, label):
    """A histogram as a line"""
    counts, edges = np.histogram(x, 180, (-3, 6), density=True)
    middles = (edges[1:] + edges[:-1]) / 2
    axes.plot(middles, counts, color=color, lw=1.2, label=label)


GRID = [1, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876, 0.278049,
        0.00892857, 0]  # of diffusers' FlowMatchEulerDiscreteScheduler with shift 3


def last_step():
    """How much noise is in x before each of 10 steps, and how much should be there"""
    times = torch.tensor(GRID)
    figure = Figure(figsize=(8.8, 3), dpi=100, layout="constrained")
    axes = figure.subplots()
    # Not the last step: at t = 0.009 a network expects little noise, and removes little.
    shown = times[:-1]
    early = noise_left(times, range(3))
    all_but_the_last = noise_left(times, range(9))
    axes.plot(shown, shown, "o-", color=ODE, label="as it should be, and with the ODE")
    axes.plot(shown, early[:-1], "^--", color="0.6", label="only the first 3 steps are random")
    axes.plot(shown, all_but_the_last[:-1], "s-", color=SDE,
              label="all steps but the last are random")
    axes.set_xlabel("time t, from noise to image, on SD3.5's grid of 10 steps")
    axes.set_xlim(1.02, -0.02)
    axes.set_ylabel("std of the noise in x")
    left = all_but_the_last[-2]
    axes.annotate(f"{left:.2f}, where 0.009 belongs", (0.009, left), (0.21, 0.42), fontsize=9,
                  arrowprops=dict(arrowstyle="->"))
    axes.legend(fontsize=8, frameon=False)
    save(figure, "last_step")


def noise_left(times, window):
    """The std of the noise in x at each time, if noise_guess is the true noise"""
    noise = [1.0]
    for i in range(10):
        step = flow_grpo.make_step(times, i, 0.7)
        share = noise[-1] / step.t.item()  # 1 if there is as much noise as there should be
        if i in window:
            noise.append(math.hypot(step.keep.item() * share, step.std.item()))
        else:
            noise.append(step.s.item() * share)
    return noise


def where_noise_decides(prompts=8, size=16):
    """How much the rewards of a group differ if only one step is random, at each place in turn, and
    how large the gradient of each step is if all steps but the last are random
    """
    figure = Figure(figsize=(8.8, 2.9), dpi=100, layout="constrained")
    text, scenes, gradients = figure.subplots(1, 3)
    for axes, name, title, color in (
            (text, "ocr", "text", TEXT), (scenes, "geneval", "scenes", SCENES)):
        config = flow_grpo.Config(reward=name, group_size=size)
        policy = flow_grpo.load_policy(config)
        reward = rewards.load(name, "--reward")
        rows = rewards.load_prompts(config, "train")[:prompts]
        texts = [row["prompt"] for row in rows]
        all_rows = flow_grpo.repeat_each(rows, size)
        first_seeds = flow_grpo.repeat_each(range(prompts), size)
        fresh_seeds = range(1000, 1000 + prompts * size)

        def drawn_and_scored(window):
            drawn = flow_grpo.rollout(policy, config, texts, first_seeds, 10, window, fresh_seeds)
            scores = rewards.score(reward, drawn.images, all_rows)
            return drawn, scores["reward"].reshape(prompts, size)

        stds = []
        for i in range(9):
            _, scores = drawn_and_scored(range(i, i + 1))
            stds.append(scores.std(1))
        axes.plot(range(9), stds, color=color, alpha=0.25)
        axes.plot(range(9), np.mean(stds, 1), "o-", color=color)
        axes.set_title(f"{title}, one step random (thin: a prompt)", fontsize=9)
        axes.set_xlabel("which of the 10 steps is random")
        axes.set_ylabel("std of the reward in a group")

        drawn, scores = drawn_and_scored(range(9))
        advantages = flow_grpo.group_advantages(torch.tensor(scores, dtype=torch.float32))
        norms = gradient_norms(policy, config, drawn, advantages.flatten())
        gradients.plot(range(9), norms, "o-", color=color, label=title)
        print(f"{title}: the gradients of the 9 random steps have the norms", norms)
    gradients.set_yscale("log")
    gradients.set_title("all steps random but the last", fontsize=9)
    gradients.set_xlabel("which of these steps")
    gradients.set_ylabel("norm of its gradient")
    gradients.legend(fontsize=8, frameon=False)
    save(figure, "where_noise_decides")


def gradient_norms(policy, config, drawn, advantages):
    """The norm of the gradient of each SDE step alone, before the first update"""
    images = torch.arange(len(advantages))
    norms = []
    for k in range(len(drawn.window)):
        pairs = torch.stack([images, torch.full_like(images, k)], 1)
        for batch in pairs.split(config.batch_size):
            policy_loss, _, _ = flow_grpo.losses(policy, config, drawn, advantages, batch)
            (policy_loss.sum() / len(pairs)).backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.params])
        norms.append(gradient.norm().item())
        policy.optimizer.zero_grad()
    return norms


def pictures():
    """Of the first seed of scenes, and the film of the README"""
    run = RESULTS.parent / "runs/geneval-default-seed7101/before_after.png"
    if run.exists():
        Image.open(run).convert("RGB").save(FIGURES / "before_after_geneval.png")
    film = RESULTS.parent / "runs/ocr-film-seed0"
    frames = []
    for after in sorted(film.glob("samples/[0-9]*")):
        flow_grpo.draw_before_after(film / "samples/0000", after, film)
        frames.append(Image.open(film / "before_after.png").convert("RGB"))
    if frames:
        # One palette for all frames, or the images before training would change their colors, too
        strip = np.concatenate([np.asarray(frame) for frame in frames])
        palette = Image.fromarray(strip).quantize(256)
        frames = [frame.quantize(palette=palette) for frame in frames]
        seconds = [1] * (len(frames) - 1) + [3]
        frames[0].save(FIGURES / "film.gif", save_all=True, append_images=frames[1:], loop=0,
                       duration=[1000 * second for second in seconds])


if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    for draw in (tables, curves, hacking, options, marginals, last_step, where_noise_decides,
                 pictures):
        if len(sys.argv) == 1 or draw.__name__ in sys.argv[1:]:
            draw()
