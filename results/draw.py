"""Draws results/figures, fills in the tables, and prints the other numbers of results/README.md

  python results/draw.py                    # all of it
  python results/draw.py curves marginals   # only what these functions below do

The numbers are those of runs.jsonl, or of the method itself. Pictures of images come from the
folders that results/run_all.py has left in runs/runs/. Without these, the old pictures stay.
"""
import json
import math
import sys
from pathlib import Path

import diffusers
import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

RESULTS = Path(__file__).resolve().parent
FIGURES = RESULTS / "figures"
sys.path.insert(0, str(RESULTS.parent))
import flow_grpo  # noqa: E402
import rewards  # noqa: E402

RUNS = RESULTS.parent / "runs/runs"
# One color for one thing in all pictures (Okabe and Ito's, which color-blind people can tell apart)
ODE = "black"
SDE = "#0072B2"
CPS = "#E69F00"
WRONG = "#D55E00"  # without the corrected drift, or without the KL penalty
TEXT = "#009E73"
SCENES = "#CC79A7"
PREFERENCE = "#56B4E9"
matplotlib.rcParams["axes.titlesize"] = 9
matplotlib.rcParams["axes.labelsize"] = 9
matplotlib.rcParams["legend.fontsize"] = 8
matplotlib.rcParams["legend.frameon"] = False


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
              "for orientation: the paper, on SD3.5-Medium"]
    rows = []
    # By default, the presets of scenes and preference evaluate 60 of the 144 prompts.
    for judged, options, run, key, paper in (
            ("text: words read without a mistake", "ocr", "ocr", "eval_accuracy", "0.59 to 0.92"),
            ("scenes: all as asked", "geneval --eval_prompts 0", "geneval", "eval_accuracy",
             "0.63 to 0.95"),
            ("preference: a small PickScore", "toy_pickscore --eval_prompts 0", "pickscore",
             "eval_reward", "0.835 to 0.897 (PickScore / 26)")):
        before = finals(f"base/{run}", key)
        after = finals(f"{run}/default", key)
        rows.append([judged, f"`--reward {options}`", spread(before), spread(after), len(after),
                     paper])
    write_table("results", header, rows)


def denoising_table():
    header = ["steps in training", "random steps", "words read", "seconds of an epoch"]
    rows = []
    for steps, random_steps, words, seconds in (
            (40, "4", "words/T40", "time/T40"),
            (10, "1", "words/T10", "time/T10"),
            (5, "1", "words/T5", "time/T5"),
            (40, "all but the last", "words/noisy-T40", "time/noisy-T40"),
            (10, "all but the last", "words/noisy-T10", "time/noisy-T10"),
            (40, "all but the last, weighted", "weighted/T40", "time/noisy-T40"),
            (10, "all but the last, weighted", "weighted/T10", "time/noisy-T10")):
        read = finals(words, "eval_accuracy")
        first_epoch = curve(runs(seconds)[0], "seconds")[1]  # without an evaluation
        rows.append([steps, random_steps, spread(read), f"{first_epoch:.1f}"])
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
            before = finals(f"base/{base}", f"eval_reward/{name}")[0]
            after = finals(run, f"eval_reward/{name}")
            row += [f"{before:.2f}", f"{np.mean(after):.2f} ({min(after):.2f})"]
        rows.append(row)
    write_table("quality", header, rows)


def numbers():
    """Those of results/README.md that are in no table. last_step, marginals and where_noise_decides
    have the others.
    """
    for name in ("base/geneval", "geneval/default"):
        for tag in ("single_object", "two_object", "counting", "colors", "position", "color_attr"):
            print(name, tag, spread(finals(name, f"eval_accuracy/{tag}")))
    started = [curve(row, "eval_accuracy")[0] for row in runs("generalization/default")]
    print("without cross, purple and four:", spread(started), "->",
          spread(finals("generalization/default", "eval_accuracy")))
    print("text without the KL penalty:", spread(finals("ocr/beta0", "eval_accuracy")))
    for beta in ("0", "0.3"):
        for row in runs(f"hacking/beta{beta}"):
            taste = curve(row, "eval_reward/toy_taste")
            print(f"far too hard, beta {beta}, seed {row['seed']}: taste", taste)


def curve(row, key):
    """{epoch: value}"""
    return dict(row["curves"][key])


def save(figure, name):
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(FIGURES / f"{name}.png")


def curves():
    """The evaluations of every seed, for the three tasks"""
    figure = Figure(figsize=(8.8, 3.1), layout="constrained")
    text, scenes, preference = figure.subplots(1, 3)
    for axes, title, label, color, name, key in (
            (text, "text", "words read without a mistake", TEXT, "ocr/default", "eval_accuracy"),
            (scenes, "scenes", "images with all as asked", SCENES, "geneval/default",
             "eval_accuracy"),
            (preference, "preference", "score of the toy's PickScore", PREFERENCE,
             "pickscore/default", "eval_reward")):
        all_values = []
        for row in runs(name):
            points = curve(row, key)
            axes.plot(points.keys(), points.values(), ".-", color=color, alpha=0.5)
            all_values.append(list(points.values()))
        epochs = points.keys()  # all seeds were evaluated after the same epochs
        axes.plot(epochs, np.mean(all_values, 0), "k", label=f"mean of {len(all_values)} seeds")
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.legend(loc="lower right")
        axes.grid(alpha=0.3)
    text.set_ylim(0.5, 1)
    scenes.set_ylim(0.5, 1)
    save(figure, "curves")


def hacking():
    """Preference, trained far too hard with the KL penalty and without it"""
    figure = Figure(figsize=(8.8, 3.1), layout="constrained")
    reward, taste, diversity = figure.subplots(1, 3)
    for axes, title, label, key in (
            (reward, "trained: the toy's PickScore", "score", "eval_reward"),
            (taste, "watched: quality", "quality, at most 1", "eval_reward/toy_taste"),
            (diversity, "watched: diversity", "rms difference of images",
             "eval_reward/diversity")):
        for beta, penalty, color in (
                ("0.3", "KL penalty (beta 0.3)", PREFERENCE), ("0", "no KL penalty", WRONG)):
            for row in runs(f"hacking/beta{beta}"):
                points = curve(row, key)
                line, = axes.plot(points.keys(), points.values(), ".-", color=color)
            line.set_label(penalty)  # of the last seed
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    taste.legend(loc="lower left")
    title = "Without the KL penalty: more reward, but less quality and diversity"
    figure.suptitle(title, fontsize=9)
    save(figure, "hacking")


OPTIONS = {
    "default": "the default",
    "noise0.4": "noise_level 0.4 instead of 0.7",
    "noise0.1": "noise_level 0.1",
    "start0-3": "another random step in each epoch, of the first 4",
    "different-noise": "each image of a group starts from its own noise",
    "groups4x32": "4 groups of 32 instead of 16 of 8",
    "std-group": "advantages divided by the std of the group",
    "clip1e-4": "clip_range 1e-4 instead of 1e-3",
    "beta0": "beta 0 instead of 0.5",
    "cps": "CPS, with noise_level 0.8 and beta 0.05",
}


def options():
    """One option changed at a time"""
    figure = Figure(figsize=(8.8, 3.2), layout="constrained")
    axes = figure.subplots()
    for place, setting in enumerate(OPTIONS):
        values = finals(f"words/{setting}", "eval_accuracy")
        color = "black" if setting == "default" else TEXT
        places = place + np.linspace(-0.2, 0.2, len(values))  # so that equal dots are seen
        axes.plot(values, places, "o", color=color, alpha=0.7, markersize=5)
        axes.plot(np.mean(values), place, "|", color=color, markersize=16)
    before = curve(runs("words/default")[0], "eval_accuracy")[0]
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


def densities(x, t):
    """How much each mode adds to the density of x at time t: x is [N], the result [N, 2]"""
    variance = (1 - t) ** 2 * STDS**2 + t**2
    distance = x[:, None] - (1 - t) * MEANS
    return WEIGHTS * torch.exp(-distance**2 / (2 * variance)) / (2 * math.pi * variance).sqrt()


def best_v(x, t):
    """The mean of noise - data over all pairs of noise and data that give x at time t"""
    variance = (1 - t) ** 2 * STDS**2 + t**2
    distance = x[:, None] - (1 - t) * MEANS
    # In each mode, the mean noise and the mean data of these pairs
    noise = t * distance / variance
    data = MEANS + (1 - t) * STDS**2 * distance / variance
    share = densities(x, t)
    return (share * (noise - data)).sum(1) / share.sum(1)


def sample(T, sde, noise_level, correct_drift=True, samples=100_000):
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
        elif correct_drift:
            x, _ = flow_grpo.sde_step(x, v, step, fresh_noise)
        else:  # noise is added, but nothing is taken away for it
            x = x + v * (step.s - step.t) + step.std * fresh_noise
        path.append(x.flatten())
    return path


def width(x):
    """The std within the wider mode, divided by that of the data"""
    data = STDS[1] * torch.randn(1_000_000) + MEANS[1]
    # Both are cut off at the same places, between the modes and as far on the other side.
    inside = x[(x > -0.3) & (x < 2.3)]
    data_inside = data[(data > -0.3) & (data < 2.3)]
    return (inside.std() / data_inside.std()).item()


def marginals():
    """Is x distributed as it should be? At half time and in the end, with 40 steps and with 10"""
    figure = Figure(figsize=(8.8, 3.4), layout="constrained")
    half, end_of_40, end_of_10 = figure.subplots(1, 3)
    for axes, T, t, title in (
            (half, 40, 0.5, "40 steps, half time (t = 0.5)"),
            (end_of_40, 40, 0.0, "40 steps, the end (t = 0)"),
            (end_of_10, 10, 0.0, "10 steps, the end (t = 0)")):
        x = torch.linspace(-3, 6, 450)
        axes.fill_between(x, densities(x, t).sum(1), color="0.85", label="exact")
        for label, color, path in (
                ("ODE", ODE, sample(T, "flow", noise_level=0.0)),
                ("paper's SDE", SDE, sample(T, "flow", noise_level=0.7)),
                ("CPS", CPS, sample(T, "cps", noise_level=0.7)),
                ("drift not corrected", WRONG,
                 sample(T, "flow", noise_level=0.7, correct_drift=False))):
            at_t = path[round((1 - t) * T)]
            if t == 0:
                label = f"{label}: {width(at_t):.2f}"
            outline(axes, at_t, color, label)
        axes.set_title(title)
        axes.set_xlabel("x")
        axes.set_xlim(-3, 4.5)
        axes.set_yticks([])
        axes.margins(y=0.6)  # room for the legend
        axes.set_ylim(bottom=0)
        axes.legend(loc="upper right", handlelength=1,
                    title="width of the right mode" if t == 0 else None, title_fontsize=8)
    half.set_ylabel("density")
    save(figure, "marginals")


def outline(axes, x, color, label):
    """A histogram as a line"""
    counts, edges = np.histogram(x, 180, (-3, 6), density=True)
    middles = (edges[1:] + edges[:-1]) / 2
    axes.plot(middles, counts, color=color, lw=1.2, label=label)


def last_step():
    """How much noise is in x before each of 10 steps, and how much should be there"""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)  # that of SD3.5
    scheduler.set_timesteps(10)
    times = scheduler.sigmas
    early = noise_before_steps(times, range(3))
    all_but_the_last = noise_before_steps(times, range(9))
    figure = Figure(figsize=(8.8, 3), layout="constrained")
    axes = figure.subplots()
    shown = times[:-1]
    axes.plot(shown, shown, "o-", color=ODE, label="as it should be, and with the ODE")
    axes.plot(shown, early, "^--", color="0.6", label="only the first 3 steps are random")
    axes.plot(shown, all_but_the_last, "s-", color=SDE, label="all steps but the last are random")
    axes.set_xlabel("time t, from noise to image, on SD3.5's grid of 10 steps")
    axes.set_xlim(1.02, -0.02)
    axes.set_ylabel("std of the noise in x")
    left = all_but_the_last[-1]
    axes.annotate(f"{left:.2f}, where 0.009 belongs", (0.009, left), (0.21, 0.42), fontsize=9,
                  arrowprops=dict(arrowstyle="->"))
    axes.legend()
    axes.set_title("All steps but the last random: too much noise is left in the image")
    save(figure, "last_step")


def noise_before_steps(times, window):
    """The std of the noise in x before each of the 10 steps, for a perfect guess of the data

    noise_guess is then the true noise divided by t. Its std is not 1, but `excess`.
    """
    stds = [1.0]
    for i in range(9):
        step = flow_grpo.make_step(times, i, 0.7)
        excess = stds[-1] / step.t.item()
        if i in window:
            stds.append(math.hypot(step.keep.item() * excess, step.std.item()))
        else:
            stds.append(step.s.item() * excess)
    return stds


def where_noise_decides():
    """How much the rewards of a group differ if only one step is random, at each place in turn, and
    how large the gradient of each step is if all steps but the last are random
    """
    figure = Figure(figsize=(8.8, 3), layout="constrained")
    differences, gradients = figure.subplots(1, 2)
    for name, title, color in (("ocr", "text", TEXT), ("geneval", "scenes", SCENES)):
        config = flow_grpo.Config(reward=name, groups=8, group_size=16)
        policy = flow_grpo.load_policy(config)
        reward = rewards.load(name, "--reward")

        stds = []
        for i in range(9):
            _, scores = draw_groups(policy, config, reward, range(i, i + 1))
            stds.append(scores.std(1))
        step_numbers = range(1, 10)
        differences.plot(step_numbers, np.mean(stds, 1), "o-", color=color, label=title)

        episodes, scores = draw_groups(policy, config, reward, range(9))
        advantages = flow_grpo.group_advantages(torch.tensor(scores, dtype=torch.float32))
        norms = gradient_norms(policy, config, episodes, advantages.flatten())
        gradients.plot(step_numbers, norms, "o-", color=color, label=title)
        print(f"{title}: the ninth step's gradient is {norms[8] / norms[0]:.0f} times the first's")
    differences.set_title("Early steps change the reward most ...")
    differences.set_xlabel("which of the 10 steps is random, the others are not")
    differences.set_ylabel("std of the reward in a group")
    differences.legend()
    gradients.set_title("... but late steps have the largest gradients")
    gradients.set_xlabel("step (steps 1 to 9 are all random)")
    gradients.set_ylabel("norm of its gradient")
    gradients.set_yscale("log")
    gradients.legend()
    save(figure, "where_noise_decides")


def draw_groups(policy, config, reward, window):
    """A group for each of the first training prompts -> the Rollout, scores [groups, group_size]"""
    rows = rewards.load_prompts(config, "train")[:config.groups]
    prompts = [row["prompt"] for row in rows]
    first_seeds = flow_grpo.repeat_each(range(config.groups), config.group_size)
    fresh_seeds = range(1000, 1000 + config.groups * config.group_size)
    episodes = flow_grpo.rollout(policy, config, prompts, first_seeds, 10, window, fresh_seeds)
    all_rows = flow_grpo.repeat_each(rows, config.group_size)
    scores = rewards.score(reward, episodes.images, all_rows)
    return episodes, scores["reward"].reshape(config.groups, config.group_size)


def gradient_norms(policy, config, episodes, advantages):
    """The norm of the gradient of each SDE step alone, before the first update"""
    images = torch.arange(len(advantages))
    norms = []
    for k in range(len(episodes.window)):
        pairs = torch.stack([images, torch.full_like(images, k)], 1)
        for batch in pairs.split(config.batch_size):
            policy_loss, _, _ = flow_grpo.losses(policy, config, episodes, advantages, batch)
            (policy_loss.sum() / len(pairs)).backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.params])
        norms.append(gradient.norm().item())
        policy.optimizer.zero_grad()
    return norms


def pictures():
    """Of the first seed of scenes, and the film of the README"""
    before_after = RUNS / "geneval-default-seed8101/before_after.png"
    if before_after.exists():
        Image.open(before_after).convert("RGB").save(FIGURES / "before_after_geneval.png")
    film = RUNS / "ocr-film-seed0"
    frames = []
    for after in sorted(film.glob("samples/[0-9]*")):
        flow_grpo.draw_before_after(film / "samples/0000", after, film)
        frames.append(Image.open(film / "before_after.png").convert("RGB"))
    if frames:
        # One palette for all frames, or the images before training would change their colors, too
        strip = np.concatenate([np.asarray(frame) for frame in frames])
        palette = Image.fromarray(strip).quantize(256)
        frames = [frame.quantize(palette=palette) for frame in frames]
        milliseconds = [1000] * (len(frames) - 1) + [3000]
        frames[0].save(FIGURES / "film.gif", save_all=True, append_images=frames[1:], loop=0,
                       duration=milliseconds)


ALL = [results_table, denoising_table, quality_table, numbers, curves, hacking, options, marginals,
       last_step, where_noise_decides, pictures]

if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    functions = {function.__name__: function for function in ALL}
    for name in sys.argv[1:] or functions:
        functions[name]()
