"""The specification of flow_grpo.py and rewards.py. No GPU, no downloads: pytest test_flow_grpo.py

In the order of flow_grpo.py, with rewards.py before the options, and whole runs at the end.
toy/golden.json has the official numbers.
"""
import copy
import functools
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import diffusers
import numpy as np
import pytest
import torch
from accelerate import PartialState, debug_launcher
from accelerate.state import AcceleratorState
from PIL import Image

import flow_grpo
import rewards
from flow_grpo import Config, gaussian_log_prob, load_policy, make_step, sde_mean, sde_step
from toy import tiny, world

torch.set_num_threads(1)  # for tensors as small as here, more threads only wait for each other
HERE = Path(__file__).resolve().parent
GOLDEN = json.loads((HERE / "toy/golden.json").read_text())
FOLDERS = tempfile.TemporaryDirectory()


@functools.cache
def family(name):
    """The stock pipeline of a family, tiny and with random weights, or the toy, and its folder"""
    pipe = tiny.pipeline(name)
    folder = f"{FOLDERS.name}/{name}"
    pipe.save_pretrained(folder)
    return pipe, folder


_, TINY_SD3 = family("sd3")  # about ten times smaller than the toy


def close(a, b, tolerance=2e-5):
    a = torch.as_tensor(a)
    b = torch.as_tensor(b).to(a.dtype)
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def exits(function, *args, **options):
    """The line with which sys.exit or a RewardError ends the run"""
    with pytest.raises((SystemExit, rewards.RewardError)) as stopped:
        function(*args, **options)
    message = str(stopped.value)
    assert message and "\n" not in message
    return message


# ------------------------------------------------------------------------------ 1. the mathematics
OFFICIAL = GOLDEN["official"]
X = torch.tensor(OFFICIAL["x"]).view(2, 2, 2, 2)
V = torch.tensor(OFFICIAL["v"]).view(2, 2, 2, 2)
V_REF = torch.tensor(OFFICIAL["v_ref"]).view(2, 2, 2, 2)
NOISE = torch.tensor(OFFICIAL["noise"]).view(2, 2, 2, 2)

@pytest.mark.parametrize("i", [0, 4, 8])  # the first step, where t is 1, and the last SDE step
@pytest.mark.parametrize("sde, noise_level", [("flow", 0.7), ("cps", 0.8)])
def test_a_step_gives_the_official_numbers(sde, noise_level, i):
    expected = OFFICIAL[sde][str(i)]
    step = make_step(torch.tensor(OFFICIAL["times"]), i, noise_level, sde)
    x_next, log_prob = sde_step(X, V, step, NOISE)
    mean = sde_mean(X, V, step)
    close(x_next.flatten(), expected["x_next"])
    close(mean.flatten(), expected["mean"])
    close(step.kl_scale.item(), expected["kl_std"])
    if sde == "flow":  # the official log-density of CPS has no variance in it
        close(log_prob, expected["log_prob"])
    gaussian = torch.distributions.Normal(mean, step.std)
    close(log_prob, gaussian.log_prob(x_next).mean((1, 2, 3)))
    kl = flow_grpo.kl_penalty(mean, sde_mean(X, V_REF, step), step.kl_scale)
    assert kl.shape == (2,)
    # Its means differ little, so float32 leaves few digits of their difference.
    assert kl.mean().item() == pytest.approx(expected["kl"], rel=1e-3)


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
def test_a_step_is_equation_9(noise_level):
    """Which without noise is the Euler step. Here, each image has a step of its own."""
    t = torch.tensor([1.0, 0.2]).view(2, 1, 1, 1)
    s = torch.tensor([0.9, 0.1]).view(2, 1, 1, 1)
    t_over_1_minus_t = torch.tensor([1 / 0.1, 0.2 / 0.8]).view(2, 1, 1, 1)  # 1 - s where t is 1
    sigma = noise_level * t_over_1_minus_t.sqrt()
    noise_guess = X + (1 - t) * V
    mean = X + (V + sigma**2 / (2 * t) * noise_guess) * (s - t)

    step = make_step(torch.linspace(1, 0, 11), torch.tensor([0, 8]), noise_level)
    close(step.t, t)
    close(step.s, s)
    close(step.kl_scale, sigma)
    close(step.std, sigma * (t - s).sqrt())
    close(sde_mean(X, V, step), mean)


@pytest.mark.parametrize("share_of_the_correction", [1, 0, 0.5])
def test_the_sde_gives_x_the_distribution_of_the_ode_at_every_time(share_of_the_correction):
    """The claim of section 4.2, for data from N(0, 0.5^2), for which the best v is known

    With less than the whole correction of equation 9 it must fail, or this test would see nothing.
    The times begin at 0.95, because at t = 1 sigma is infinite, and its substitute is not exact.
    """
    def std(t):
        return ((1 - t) ** 2 * 0.5**2 + t**2).sqrt()

    torch.manual_seed(0)
    times = torch.linspace(0.95, 0, 201)
    x = std(times[0]) * torch.randn(40_000, 1, 1, 1)
    errors = []
    for i in range(200):
        step = make_step(times, i, noise_level=0.7)
        step = step._replace(keep=step.s - share_of_the_correction * (step.s - step.keep))
        v = (step.t - (1 - step.t) * 0.5**2) / std(step.t) ** 2 * x  # E[noise - data], given x
        x, _ = sde_step(x, v, step, torch.randn_like(x))
        error = x.std() / std(step.s) - 1
        errors.append(error.abs().item())
    allowed = 0.028  # five standard errors of 40,000 samples, and 0.01 for the size of the steps
    if share_of_the_correction == 1:
        assert max(errors) < allowed
    else:
        assert max(errors) > 2 * allowed


@pytest.mark.parametrize("std_over, official_name", [("epoch", "batch"), ("group", "group")])
def test_advantages_are_the_official_numbers(std_over, official_name):
    scores = torch.tensor(OFFICIAL["rewards"]).view(3, 4)
    advantages = flow_grpo.group_advantages(scores, std_over)
    close(advantages.flatten(), OFFICIAL["advantages"][official_name])


def test_an_advantage_is_at_most_5():
    scores = torch.zeros(1, 100)
    scores[0, 7] = 1e9
    assert flow_grpo.group_advantages(scores).max() == 5
    assert flow_grpo.group_advantages(-scores).min() == -5


@pytest.mark.parametrize("std_over", ["epoch", "group"])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 1e6])
def test_equal_scores_give_an_advantage_of_exactly_0(std_over, value):
    scores = torch.full((2, 7), value)  # the float32 mean of 7 equal numbers would not be exact
    scores[1, 0] = 0
    equal, different = flow_grpo.group_advantages(scores, std_over)
    assert (equal == 0).all()
    assert (different != 0).all()


@pytest.mark.parametrize("advantage, ratio, loss, slope", [
    (1, 1.10, -1.05, 0),  # has gone far enough up
    (1, 0.90, -0.90, -1),
    (-1, 0.90, 0.95, 0),  # far enough down
    (-1, 1.10, 1.10, 1),
    (1, 1.02, -1.02, -1)])
def test_clipping_stops_the_gradient_on_its_side_only(advantage, ratio, loss, slope):
    ratio = torch.tensor([ratio], requires_grad=True)
    got = flow_grpo.clipped_loss(ratio, torch.tensor([advantage]), clip_range=0.05)
    got.sum().backward()
    assert got.item() == pytest.approx(loss)
    assert ratio.grad.item() == slope


# -------------------------------------------------------------------------------------- 2. rollout
PROMPTS = ['a sign that says "CAT"', 'a sign that says "DOG"']
FIRST_SEEDS = range(8)
FRESH_SEEDS = range(100, 108)


SMALL = Config(
    model=TINY_SD3, resolution=32, groups=2, group_size=4, batch_size=8, train_steps=6, window=2,
    latest_start=3, guidance=1.0, same_noise=False, updates=2, beta=0.0, learning_rate=1.5e-3,
    clip_range=1e-3, eval_prompts=2, eval_steps=4)


def small(**options):
    return replace(SMALL, **options)


@functools.cache
def loaded_policy():
    policy = load_policy(SMALL)
    return policy, copy.deepcopy(policy.checkpoint())


def small_policy(**options):
    """The policy that load_policy gives, for options that are read later than in load_policy

    Loading it each time would be slow.
    """
    policy, start = loaded_policy()
    policy.config = small(**options)
    policy.restore(copy.deepcopy(start))
    policy.optimizer.zero_grad()
    return policy


def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.params])


def perturb(policy, size=0.02):
    """Moves the LoRA away from its start, as learning would"""
    torch.manual_seed(1)
    for p in policy.params:
        p.data += size * torch.randn_like(p)
    return policy


def draw(policy, window=range(1, 3)):
    config = policy.config
    images = len(PROMPTS) * config.group_size
    return flow_grpo.rollout(policy, config, PROMPTS, FIRST_SEEDS[:images], config.train_steps,
                             window, FRESH_SEEDS[:images])


def pixels(image):
    return np.asarray(image, float)


def difference(a, b):
    """The largest difference of two images, in gray levels"""
    return np.abs(pixels(a) - pixels(b)).max()


@torch.no_grad()
def draw_by_hand(policy, image, window):
    """One image alone, in 6 steps -> the latents around its SDE steps, their log_prob, the image"""
    config = policy.config
    times = policy.time_grid(6)
    condition = policy.encode([PROMPTS[image // 4]])
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(FIRST_SEEDS[image]))
    fresh = torch.Generator().manual_seed(FRESH_SEEDS[image])
    latents = []
    log_probs = []
    for i in range(6):
        v = policy.velocity(x, times[i], condition)
        if i not in window:
            x = x + v * (times[i + 1] - times[i])
            continue
        if not latents:
            latents.append(x[0])
        step = make_step(times, i, config.noise_level, config.sde)
        x, log_prob = sde_step(x, v, step, torch.randn(1, 4, 16, 16, generator=fresh))
        latents.append(x[0])
        log_probs.append(log_prob[0])
    decoded, = policy.decode(x)
    return torch.stack(latents), torch.stack(log_probs), decoded


@pytest.mark.parametrize("sde, noise_level, guidance", [("flow", 0.3, 2.0), ("cps", 0.7, 1.0)])
def test_a_rollout_is_the_ode_with_sde_steps_in_its_window(sde, noise_level, guidance):
    """An image does not depend on the others in its pass. Here there are three passes."""
    policy = perturb(small_policy(
        sde=sde, noise_level=noise_level, guidance=guidance, batch_size=3))
    window = range(1, 3)
    drawn = draw(policy, window)
    for number in (2, 7):
        latents, log_prob, image = draw_by_hand(policy, number, window)
        close(drawn.latents[number], latents, 1e-4)
        close(drawn.log_prob[number], log_prob, 1e-4)
        assert difference(drawn.images[number], image) <= 1


def test_a_window_of_0_has_all_steps_but_the_last():
    assert flow_grpo.choose_window(small(train_steps=6, window=0), None) == range(5)


# --------------------------------------------------------------------------------------- 3. update
def take_gradient(policy):
    """The gradient of all that is trained, in one row. After this there is none left."""
    gradient = torch.cat([p.grad.flatten() for p in policy.params])
    policy.optimizer.zero_grad()
    return gradient


def learn(policy, drawn, advantages=torch.linspace(-1, 1, 8)):
    return flow_grpo.update(policy, policy.config, drawn, advantages)


def test_in_bf16_the_first_ratio_is_1():
    """In float32, check_ratio makes all runs of these tests see to it. The LoRA computes in bf16,
    too, although its weights are in float32."""
    policy = perturb(load_policy(small(
        group_size=2, updates=1, guidance=2.0, precision="bf16", train_steps=3)))
    dtypes = set()
    for name, module in policy.network.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    metrics = learn(policy, draw(policy, range(1, 2)), torch.ones(4))
    assert metrics["ratio_deviation"] < 1e-5
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("image, off, says", [
    (5, 0.1, "off by 0.095"),  # exp(-0.1) is 0.905
    (7, torch.nan, "a ratio of new to old")])  # image 7 is in the second update
def test_a_wrong_ratio_stops_the_run_whichever_image_has_it(image, off, says):
    policy = small_policy(batch_size=3)
    drawn = draw(policy)
    drawn.log_prob[image, 1] += off
    assert says in exits(learn, policy, drawn)


@pytest.mark.parametrize("clip_range, allowed", [(1e-5, 1e-5), (1e-4, 5e-5), (1e-2, 1e-4)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_first_ratio_may_be_off_by_half_the_clip_range(clip_range, allowed, sign):
    """But at least by 1e-5, and at most by 1e-4. Later ratios may be anything finite."""
    right = torch.tensor([1, 1 + sign * 0.9 * allowed], dtype=torch.float64)
    wrong = torch.tensor([1, 1 + sign * 1.1 * allowed], dtype=torch.float64)
    flow_grpo.check_ratio(right, clip_range, is_first_update=True)
    assert "off by" in exits(flow_grpo.check_ratio, wrong, clip_range, is_first_update=True)
    flow_grpo.check_ratio(wrong, clip_range, is_first_update=False)


def equation_5(policy, drawn, advantages, images):
    """The gradient of equation 5 by plain loops: every image at every step, and the mean of all

    There is no clipping, as all ratios are 1.
    """
    config = policy.config
    losses = []
    for image in images:
        condition = [c[[image]] for c in drawn.condition]
        for k, i in enumerate(drawn.window):
            step = make_step(drawn.times, i, config.noise_level, config.sde)
            x = drawn.latents[[image], k]
            x_next = drawn.latents[[image], k + 1]
            v = policy.velocity(x, step.t, condition)
            mean = sde_mean(x, v, step)
            log_prob = gaussian_log_prob(x_next, mean, step.std)
            ratio = torch.exp(log_prob - drawn.log_prob[image, k])
            with policy.reference(), torch.no_grad():
                v_ref = policy.velocity(x, step.t, condition)
            mean_ref = sde_mean(x, v_ref, step)
            kl = ((mean - mean_ref) ** 2).mean() / (2 * step.kl_scale.item() ** 2)
            losses.append(-ratio * advantages[image] + config.beta * kl)
    torch.cat(losses).mean().backward()
    return take_gradient(policy)


@pytest.mark.parametrize("sde, noise_level", [("flow", 0.4), ("cps", 0.7)])
def test_an_update_is_the_gradient_of_equation_5(monkeypatch, sde, noise_level):
    """The first update has the first half of each group. Passes of 3 do not divide its 4 pairs."""
    policy = perturb(small_policy(
        group_size=2, beta=0.3, sde=sde, noise_level=noise_level, batch_size=3), 0.005)
    drawn = draw(policy, range(2, 4))
    advantages = torch.tensor([1.0, 0.0, -0.5, 2.0])
    first = equation_5(policy, drawn, advantages, images=(0, 2))
    second = equation_5(policy, drawn, advantages, images=(1, 3))

    got = []  # the optimizer makes no step, so the second update begins where the first one did
    monkeypatch.setattr(policy.optimizer, "step", lambda: got.append(take_gradient(policy)))
    metrics = learn(policy, drawn, advantages)
    assert len(got) == 2
    for own, expected in zip(got, (first, second)):
        assert 0 < expected.norm() < 1  # so it was not clipped
        assert (own - expected).norm() < 1e-3 * expected.norm()
    assert metrics["ratio_deviation"] < 1e-5
    mean_norm = (first.norm() + second.norm()).item() / 2
    assert metrics["grad_norm"] == pytest.approx(mean_norm, rel=1e-3)


@pytest.mark.parametrize("clip_range, clipped", [(1e-3, True), (0.1, False)])
def test_an_image_that_has_moved_far_enough_gets_no_further_push(monkeypatch, clip_range, clipped):
    policy = small_policy(clip_range=clip_range)  # with a beta of 0
    drawn = draw(policy)
    drawn.log_prob[[2, 3, 6, 7]] -= 0.005  # those of the second update are likelier by now
    norms = []
    monkeypatch.setattr(
        policy.optimizer, "step", lambda: norms.append(take_gradient(policy).norm()))
    learn(policy, drawn, torch.ones(8))
    assert norms[0] > 0
    assert (norms[1] == 0) == clipped


def test_the_metrics_of_an_update_are_of_the_whole_epoch(monkeypatch):
    kl = torch.tensor([0.5, 0.0, 0.1, 0.0], requires_grad=True)
    first = torch.tensor([1.0, 1.0, 1.0, 1.0], requires_grad=True)
    second = torch.tensor([1.2, 0.85, 1.11, 1.0], requires_grad=True)
    losses = Mock(side_effect=[(kl, kl, first), (kl, kl, second)])
    monkeypatch.setattr(flow_grpo, "losses", losses)
    policy = Mock(config=small(groups=1, clip_range=0.1), optimize=Mock(side_effect=[0.25, 0.75]))
    another = torch.ones(8)  # a second process, where the KL and all ratios are 1
    monkeypatch.setattr(flow_grpo, "gather", lambda values: torch.cat([values, another]))
    metrics = learn(policy, Mock(window=range(2)), torch.zeros(4))
    assert not any(torch.is_tensor(value) and value.requires_grad for value in metrics.values())
    metrics = {key: float(value) for key, value in metrics.items()}
    assert metrics == pytest.approx(dict(
        kl=(2 * 0.6 + 8) / 16, ratio_deviation=0.2, clip_low=1 / 16, clip_high=2 / 16,
        grad_norm=0.5), rel=1e-4)


def test_pixels_that_are_not_finite_name_the_culprit(monkeypatch):
    policy = small_policy()
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[0, 0, 0, 0] = torch.nan  # a single one is enough
    monkeypatch.setattr(policy.pipe.vae, "decode", lambda latents: Mock(sample=pixels))
    says = exits(draw, policy)
    assert "pixels of an image are not finite" in says
    assert f"--model {TINY_SD3} itself. Later, try a lower --learning_rate" in says


# ------------------------------------------------------------------------------------- 4. training
def gray(*levels):
    return [Image.new("RGB", (8, 8), (level, level, level)) for level in levels]


def bright(images, prompts, metadata):
    return [image.getpixel((0, 0))[0] / 255 for image in images]


def half(images, prompts, metadata):
    return [0.5] * len(images)


def test_redness_is_that_of_the_mean_color():
    half_red = Image.fromarray(np.uint8([[[255, 0, 0], [0, 51, 102]]]))
    assert flow_grpo.redness([half_red, *gray(99)], None, None) == pytest.approx([0.3, 0])


class EndOfTest(Exception):
    """Ends an epoch as soon as its rollout is asked for"""


def rollout_arguments(monkeypatch, config, number_of_prompts, epoch):
    """The arguments that train_epoch gives to the rollout, for a dataset of so many prompts"""
    rollout = Mock(side_effect=EndOfTest)
    monkeypatch.setattr(flow_grpo, "rollout", rollout)
    train_set = [{"prompt": f"prompt {number}"} for number in range(number_of_prompts)]
    with pytest.raises(EndOfTest):
        flow_grpo.train_epoch(None, config, None, train_set, epoch)
    _, _, prompts, first = rollout.call_args.args
    named = rollout.call_args.kwargs
    return SimpleNamespace(prompts=prompts, first=first, T=named["T"], window=named["window"],
                           fresh=named["fresh_seeds"])


def test_an_epoch_depends_on_the_seed_and_its_number_alone(monkeypatch):
    config = small(groups=3, group_size=5)
    other_seed = replace(config, seed=1)
    first = rollout_arguments(monkeypatch, config, 7, epoch=1)
    second = rollout_arguments(monkeypatch, config, 7, epoch=2)
    assert rollout_arguments(monkeypatch, config, 7, epoch=1) == first
    assert rollout_arguments(monkeypatch, other_seed, 7, epoch=1) not in (first, second)


@pytest.mark.parametrize("same_noise, new_seeds", [(False, 15 + 15), (True, 3 + 15)])
def test_an_epoch_draws_its_prompts_its_window_and_its_seeds(monkeypatch, same_noise, new_seeds):
    """With same_noise the images of a group share their first noise, and nothing else."""
    config = small(groups=3, group_size=5, same_noise=same_noise)
    epochs = [rollout_arguments(monkeypatch, config, 7, epoch) for epoch in range(1, 50)]
    seeds = set()
    for asked in epochs:
        assert asked.T == 6
        assert len(set(asked.prompts)) == 3
        assert len(asked.first) == len(asked.fresh) == 15
        if same_noise:
            assert asked.first == np.repeat(asked.first[::5], 5).tolist()
        seeds.update(asked.first, asked.fresh)
    assert len(seeds) == 49 * new_seeds  # none is used twice
    assert {asked.window for asked in epochs} == {range(start, start + 2) for start in range(4)}
    assert len({tuple(asked.prompts) for asked in epochs}) > 40  # of 49, as 210 are possible


def test_no_prompt_comes_twice_in_an_epoch_if_there_are_enough(monkeypatch):
    config = small(groups=4)
    for epoch in range(20):
        assert len(set(rollout_arguments(monkeypatch, config, 4, epoch).prompts)) == 4
        # Of three prompts, some come again.
        assert len(rollout_arguments(monkeypatch, config, 3, epoch).prompts) == 4


TWO_REWARDS = {"bright": (bright, 2.0), "half": (half, 0.5)}
TOTAL = np.array([0, 2, 0, 2, *[0.4] * 8]) + 0.25  # for the 12 images below


def scored_epoch(monkeypatch, reward, **options):
    """An epoch of three groups, in which only the first has different images

    -> its metrics, and the advantages that the update gets
    """
    drawn = SimpleNamespace(images=gray(0, 255, 0, 255, *[51] * 8))
    update = Mock(return_value={"kl": 0.25})
    monkeypatch.setattr(flow_grpo, "rollout", lambda *args, **named: drawn)
    monkeypatch.setattr(flow_grpo, "update", update)
    train_set = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]
    metrics = flow_grpo.train_epoch(None, small(groups=3, **options), reward, train_set, 1)
    _, _, its_drawn, advantages = update.call_args.args
    assert its_drawn is drawn
    return {key: float(value) for key, value in metrics.items()}, advantages


@pytest.mark.parametrize("std_over, std", [("epoch", TOTAL.std()), ("group", 1.0)])
def test_an_epoch_compares_the_weighted_sums_of_the_rewards(monkeypatch, std_over, std):
    metrics, advantages = scored_epoch(monkeypatch, TWO_REWARDS, std_over=std_over)
    close(advantages, np.array([-1, 1, -1, 1, *[0] * 8]) / std, 1e-3)
    assert metrics == pytest.approx({
        "reward/bright": 0.3,
        "reward/half": 0.5,
        "reward": TOTAL.mean(),
        "kl": 0.25,  # that of the update
        "no_signal": 2 / 3})  # two of three groups have equal rewards


def test_scores_too_large_for_an_advantage_stop_the_run(monkeypatch):
    def white(images, prompts, metadata):  # only the first group has any
        return [level == 1 for level in bright(images, prompts, metadata)]
    huge = {"white": (white, 1e300)}
    assert "advantage" in exits(scored_epoch, monkeypatch, huge, std_over="group")


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_the_parts_of_the_processes_are_the_whole_in_order(monkeypatch, processes):
    parts = []
    for rank in range(processes):
        world_of_rank = SimpleNamespace(num_processes=processes, process_index=rank)
        monkeypatch.setattr(flow_grpo, "WORLD", world_of_rank)
        parts += flow_grpo.my_part(range(8))
    assert parts == list(range(8))


TAGGED = [
    {"prompt": "a", "tag": "x"}, {"prompt": "b", "tag": "y"}, {"prompt": "c", "tag": "x"},
    {"prompt": "d"}]


def evaluate_gray_images(monkeypatch, tmp_path, config, reward, levels):
    """An evaluation whose images have these gray levels

    -> its metrics, and the arguments of its rollout: the prompts and seeds, then T and the window
    """
    policy = MagicMock()  # the network is not asked
    averaged = policy.averaged.return_value

    def draw_with_the_average(*args, **named):
        assert averaged.__enter__.called and not averaged.__exit__.called
        return SimpleNamespace(images=gray(*levels))
    rollout = Mock(side_effect=draw_with_the_average)
    monkeypatch.setattr(flow_grpo, "rollout", rollout)
    metrics = flow_grpo.evaluate(policy, config, reward, TAGGED, tmp_path / "0012")
    asked = (*rollout.call_args.args[2:], rollout.call_args.kwargs)
    return {key: float(value) for key, value in metrics.items()}, asked


def test_every_evaluation_draws_the_same_prompts_from_the_same_seeds(monkeypatch, tmp_path):
    """Whatever --seed is. With eval_prompts 0 it draws all."""
    config = small(eval_prompts=3, eval_per_prompt=2, eval_steps=7, seed=5)
    reward = {"half": (half, 1)}
    _, asked = evaluate_gray_images(monkeypatch, tmp_path, config, reward, [9] * 6)
    assert asked == (["a", "b", "c"], [0, 1, 2, 3, 4, 5], {"T": 7, "window": range(0)})
    config.eval_prompts = 0
    _, asked = evaluate_gray_images(monkeypatch, tmp_path, config, reward, [9] * 8)
    assert asked[0] == ["a", "b", "c", "d"]


def test_the_average_is_used_and_then_the_weights_are_put_back():
    policy = small_policy()
    before = weights(policy)
    policy.average += 1
    with policy.averaged():
        close(weights(policy), before + 1)
    assert torch.equal(weights(policy), before)


def test_the_metrics_and_pictures_of_an_evaluation(monkeypatch, tmp_path):
    """An image is right if the first reward is 1. The first image of each prompt is kept."""
    right_answers = ("reward/ocr", "reward/geneval", "reward/geneval_photo")
    assert rewards.HAVE_A_RIGHT_ANSWER == right_answers
    monkeypatch.setattr(rewards, "HAVE_A_RIGHT_ANSWER", ("reward/bright",))
    config = small(eval_prompts=3, eval_per_prompt=2)
    reward = {"bright": (bright, 0.5), "half": (half, 1.0)}
    levels = [255, 0, 254, 255, 51, 102]
    metrics, _ = evaluate_gray_images(monkeypatch, tmp_path, config, reward, levels)
    mean = sum(levels) / 6 / 255
    assert metrics == pytest.approx({
        "eval_reward": 0.5 * mean + 0.5, "eval_reward/bright": mean, "eval_reward/half": 0.5,
        "eval_accuracy": 2 / 6, "eval_accuracy/x": 1 / 4, "eval_accuracy/y": 1 / 2})
    images, rows = flow_grpo.read_images(tmp_path / "0012")
    assert [image.getpixel((0, 0))[0] for image in images] == [255, 254, 51]
    assert [row["prompt"] for row in rows] == ["a", "b", "c"]
    assert [row["score"] for row in rows] == pytest.approx([1, 0.5 + 127 / 255, 0.6])

    reward = {"half": (half, 1.0), "bright": (bright, 0.5)}  # the first has no right answer
    metrics, _ = evaluate_gray_images(monkeypatch, tmp_path, config, reward, levels)
    assert set(metrics) == {"eval_reward", "eval_reward/half", "eval_reward/bright"}


# ---------------------------------------------------------------------------------- 5. the network
def test_the_network_the_lora_and_the_optimizer_are_as_the_options_say():
    """The LoRA and the VAE are in float32 even if the network is not."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert small_policy().network.dtype == torch.float32
    policy = load_policy(small(precision="bf16", gradient_checkpointing=True, adam_eps=1e-9))
    assert policy.network.is_gradient_checkpointing
    assert policy.network.dtype == torch.bfloat16
    assert policy.pipe.vae.dtype == torch.float32
    lora = policy.network.peft_config["default"]
    assert (lora.r, lora.lora_alpha) == (32, 64)
    assert {p.dtype for p in policy.params} == {torch.float32}
    assert type(policy.optimizer) is torch.optim.AdamW
    options = policy.optimizer.param_groups[0]
    assert (options["lr"], options["eps"], options["weight_decay"]) == (1.5e-3, 1e-9, 1e-4)
    assert options["betas"] == (0.9, 0.999)
    policy.set_learning_rate(0.5)
    assert options["lr"] == 0.5


@pytest.mark.parametrize("name, layers", [
    ("sd3", "attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.add_q_proj attn.add_k_proj "
            "attn.add_v_proj attn.to_add_out"),
    ("flux", "attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.add_q_proj attn.add_k_proj "
             "attn.add_v_proj attn.to_add_out ff.net.0.proj ff.net.2 ff_context.net.0.proj "
             "ff_context.net.2"),
    ("sana", "attn1.to_q attn1.to_k attn1.to_v attn1.to_out.0 attn2.to_q attn2.to_k attn2.to_v "
             "attn2.to_out.0")])
def test_the_lora_is_on_the_official_layers(name, layers):
    pipe, folder = family(name)
    policy = load_policy(small(model=folder))
    trained = [name for name, p in policy.network.named_parameters() if p.requires_grad]
    got = {re.search(r"blocks\.\d+\.(.+)\.lora_", name).group(1) for name in trained}
    assert got == set(layers.split())
    endings = tuple(f".{layer}" for layer in layers.split())
    in_all_blocks = [name for name, _ in pipe.transformer.named_modules() if name.endswith(endings)]
    assert len(trained) == 2 * len(in_all_blocks)


def test_the_lora_begins_as_the_seed_says():
    first = weights(small_policy(seed=0))
    again, other = [weights(load_policy(small(seed=seed))) for seed in (0, 1)]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_guidance_is_in_float32_and_both_of_its_branches_carry_gradient():
    """In bf16 the network gets a rounded x, but t is not rounded."""
    policy = load_policy(small(precision="bf16", guidance=4.37))
    two = torch.full((2, 4, 16, 16), 2.0, dtype=torch.bfloat16, requires_grad=True)
    three = torch.full_like(two, 3.0, requires_grad=True)
    policy.forward = Mock(side_effect=[two, three])  # for the prompts, for the empty prompt
    t = torch.tensor([0.999, 0.4441])
    v = policy.velocity(torch.ones(2, 4, 16, 16), t, policy.encode(PROMPTS))
    x, its_t, _, _ = policy.forward.call_args.args
    assert x.dtype == torch.bfloat16
    assert torch.equal(its_t, t)
    close(v, torch.full_like(v, 3 + 4.37 * (2 - 3)))
    v.sum().backward()
    close(two.grad, torch.full_like(two, 4.37))
    close(three.grad, torch.full_like(three, 1 - 4.37))


def test_the_encoding_of_a_prompt_does_not_depend_on_the_others():
    policy = small_policy(batch_size=2)
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], "a photo of a red circle", PROMPTS[1]]
    together = policy.encode(prompts)
    alone = [policy.encode([prompt]) for prompt in prompts]
    assert len(together) == 2
    for part in (0, 1):
        close(together[part], torch.cat([condition[part] for condition in alone]))
        assert not together[part].requires_grad


def test_offload_lets_the_network_and_the_text_encoders_take_turns(monkeypatch):
    policy = small_policy(offload=True)
    assert len(policy.encoders) == 3
    moves = Mock()
    monkeypatch.setattr(policy.network, "cpu", moves.network_leaves)
    monkeypatch.setattr(policy.network, "to", moves.network_comes)
    monkeypatch.setattr(policy.encoders, "cpu", moves.encoders_leave)
    monkeypatch.setattr(policy.encoders, "to", moves.encoders_come)
    policy.encode(PROMPTS)
    names = [name for name, args, options in moves.mock_calls]
    assert names == ["network_leaves", "encoders_come", "encoders_leave", "network_comes"]


def optimize(policy, norm):
    """One update with a gradient of this norm"""
    for p in policy.params:
        p.grad = torch.full_like(p, norm / len(weights(policy)) ** 0.5)
    return policy.optimize()


def test_the_gradient_is_clipped_at_1_and_its_norm_before_that_is_returned(monkeypatch):
    """If it is not finite, the run stops."""
    policy = small_policy()
    used = []
    monkeypatch.setattr(
        policy.optimizer, "step", lambda: used.append(take_gradient(policy).norm()))
    assert optimize(policy, 0.5) == pytest.approx(0.5, rel=1e-3)
    assert optimize(policy, 7.0) == pytest.approx(7.0, rel=1e-3)
    monkeypatch.setattr(flow_grpo, "reduce", lambda gradient, how: 2 * gradient)  # two processes
    assert optimize(policy, 0.9) == pytest.approx(1.8, rel=1e-3)
    assert "gradient is not finite: lower --learning_rate" in exits(optimize, policy, torch.nan)
    close(torch.stack(used), [0.5, 1.0, 1.0], 1e-3)


@pytest.mark.parametrize("ema_decay, expected", [
    (0.9, [9 / 11]),  # the decay is (1 + n) / (10 + n), this update counted: 2 / 11
    (0.2, [9 / 11, 0.2 * 9 / 11 + 0.8 * 2]),  # 3 / 12 would be above 0.2
    (0.1, [0.9 * 1]),
    (0.0, [1, 2])])  # off: the weights themselves
def test_the_decay_of_the_average_grows_up_to_ema_decay(monkeypatch, ema_decay, expected):
    """How far it has come, when every update adds 1 to all weights"""
    policy = small_policy(ema_decay=ema_decay)

    def add_1():
        for p in policy.params:
            p.data += 1
    monkeypatch.setattr(policy.optimizer, "step", add_1)
    start = policy.average.clone()
    for moved in expected:
        optimize(policy, 0)
        close((policy.average - start).mean(), moved, 1e-4)


# ------------------------------------------------------------------- 5. the families of pipelines
FAMILIES = ["toy", "sd3", "flux", "flux-schnell", "sana"]
TEXTS = ["a <pad> cat", "a dog"]  # of different lengths for every tokenizer


def stock_image(pipe, prompt, seed, **options):
    """What diffusers itself draws, as the README says"""
    pipe.set_progress_bar_config(disable=True)
    if "Sana" in type(pipe).__name__:
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        options["use_resolution_binning"] = False  # it would draw another size
    generator = torch.Generator().manual_seed(seed)
    image, = pipe(prompt, generator=generator, height=32, width=32, max_sequence_length=14,
                  **options).images
    return image


def our_images(policy):
    """Those of TEXTS by the ODE in 3 steps, from the seeds 3 and 4"""
    return flow_grpo.rollout(policy, policy.config, TEXTS, [3, 4], 3, range(0)).images


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rollout_without_noise_is_the_stock_pipelines_image(name):
    """For another model, add it to FAMILIES and to toy/tiny.py. If this test and the next pass, the
    class is right, but for the choice of its lora_layers."""
    pipe, folder = family(name)
    guidance = 1.0 if name == "toy" else 2.0  # without and with it
    policy = load_policy(small(model=folder, guidance=guidance))
    embeds, _ = policy.encode(TEXTS)
    assert not torch.equal(*embeds), "cut off: does an instruction, as SANA's, fill the 14 tokens?"
    for image, text, seed in zip(our_images(policy), TEXTS, (3, 4)):
        expected = stock_image(pipe, text, seed, num_inference_steps=3, guidance_scale=guidance)
        assert image.size == (32, 32)
        assert difference(image, expected) <= 1
    for _ in range(2):  # asked again, the times are not shifted again (diffusers PR 13962)
        close(policy.time_grid(3), pipe.scheduler.sigmas)


def of_the_first(tensor):
    """That of the first prompt, for all prompts"""
    return tensor[:1].expand_as(tensor)


MISTAKES = {  # what a wrong class would compute. f is the right forward, a and b the condition
    "-v": lambda f, x, t, a, b: -f(x, t, a, b),
    "1 - t": lambda f, x, t, a, b: f(x, 1 - t, a, b),
    "t in thousandths": lambda f, x, t, a, b: f(x, t / 1000, a, b),
    "the first prompt's embeds": lambda f, x, t, a, b: f(x, t, of_the_first(a), b),
    "the first token": lambda f, x, t, a, b: f(x, t, a[:, :1].expand_as(a), b),
    "no second condition": lambda f, x, t, a, b: f(x, t, a, torch.ones_like(b)),
    "the first prompt's second condition": lambda f, x, t, a, b: f(x, t, a, of_the_first(b)),
}


@pytest.mark.parametrize("name", FAMILIES[1:])
def test_a_mistake_in_the_class_of_a_family_would_be_seen(name):
    """By far more than the one gray level that the test above allows"""
    _, folder = family(name)
    policy = load_policy(small(model=folder))
    policy.encode = Mock(return_value=policy.encode(TEXTS))  # once, which is slow for SANA
    right = our_images(policy)
    forward = policy.forward
    for mistake, wrong_forward in MISTAKES.items():
        policy.forward = functools.partial(wrong_forward, forward)
        differences = [difference(a, b) for a, b in zip(right, our_images(policy))]
        assert max(differences) >= 8, mistake


@pytest.mark.parametrize("times, right", [
    ([1 - 1e-7, 0.6, 0.2, 0], True),  # as some values of `shift` give them
    ([0.999, 0.6, 0.2, 0], False),
    ([1, 0.6, 0.6, 0], False),
    ([1, 0.6, 0.2, 0.1], False),
    ([1, 0.6, 0], False)])
def test_the_times_must_fall_from_1_to_0(monkeypatch, times, right):
    policy = small_policy()
    monkeypatch.setattr(policy, "pipe", Mock(scheduler=Mock(sigmas=torch.tensor(times))))
    if right:
        assert policy.time_grid(3)[0] == 1
    else:
        assert "not fall from 1 to 0 in 3 steps" in exits(policy.time_grid, 3)


def test_prompts_that_the_model_does_not_fully_see_are_named():
    tokenizer = small_policy().tokenizer  # of its T5, which spells
    assert rewards.prompt_warnings(tokenizer, 7, ["a man"]) == []
    long, unknown = rewards.prompt_warnings(tokenizer, 7, ["a man", "caf\u00e9", "a woman"])
    assert "1 prompts are longer than --max_sequence_length 7 " in long and "'a woman'" in long
    assert "1 prompts have words that the model does not know, such as 'caf\u00e9'" in unknown


@pytest.mark.parametrize("old, new", [
    (b"StableDiffusion3Pipeline", b"StableDiffusion3Img2ImgPipeline"),
    (b"FlowMatchEuler", b"FlowMatchHeun")])  # a scheduler with other times
def test_a_damaged_model_is_one_line(tmp_path, old, new):
    folder = shutil.copytree(TINY_SD3, tmp_path / "model")
    for path in folder.rglob("*.*"):
        if path.is_file():
            path.write_bytes(path.read_bytes().replace(old, new))
    assert f"--model {folder}" in exits(load_policy, small(model=folder))


# ------------------------------------------------------------------------------- rewards: the rules
WHITE = Image.new("RGB", (48, 48), "white")


def scene(*include, tag=""):
    return {"tag": tag, "include": list(include)}


def wanted(name, count=1, **more):
    return {"class": name, "count": count, **more}


def box(x, y):
    return (x, y, x + 10, y + 10)


def thing(name, x=0, y=0, color="red"):
    return {"class": name, "color": color, "box": box(x, y)}


def test_the_ocr_reward_reads_whole_words_in_several_lines():
    def sign(word):
        return world.paint_sign(word, random.Random(word))

    ocr = rewards.ocr()
    lion = np.asarray(sign("LION"))
    frog = np.asarray(sign("FROG"))
    images = [sign("MAP"), sign("LION"), Image.fromarray(np.vstack([lion, frog])), sign("CAT"),
              sign("XKWQ").convert("CMYK"), WHITE]
    prompts = ['a sign that says "MAP"', '"MAP"', '"lion FROG"', '"x y zCAT"', '"XKWQ"', '"CAT"']
    assert ocr(images, prompts, None) == [1, 0, 1, 0.5, 1, 0]
    assert "no quotes" in exits(ocr.check, ["no quotes"], None)


@pytest.mark.parametrize("text, target, expected", [
    ("say HELLOWORLD!", "Hello World", 1),
    ("HELO", "HELLO", 0.8),
    ("HELLLO", "HELLO", 0.8),
    ("completely different", "HI", 0),  # never below 0
    ("You're", "You\u2019re", 1),
    ("You\u2019re", "You're\u00a0", 1),
    ("You\u2019re", "You're", 5 / 6),  # as in the official code, as the target is all ASCII
    ("caf\u00e9 fi 10", "cafe\u0301 \ufb01\t\uff11\uff10", 1)])
def test_the_ocr_rule(text, target, expected):
    from rapidfuzz.distance import Levenshtein
    assert rewards.text_score(text, target, Levenshtein.distance) == pytest.approx(expected)


def test_the_target_of_ocr_is_the_first_text_in_quotes():
    assert rewards.quoted('a "BIG CAT" and "X"') == "BIG CAT"
    for prompt in ("no quotes", 'one "', 'an empty ""', 'a 12" ruler with the word "GIRL"'):
        assert prompt in exits(rewards.quoted, prompt)
    assert "backslash" in exits(rewards.quoted, 'a sign that says \\"GIRL\\"')


@pytest.mark.parametrize(
    "tag", ["single_object", "two_object", "counting", "colors", "position", "color_attr"])
def test_geneval_knows_right_from_wrong(tag):
    rng = random.Random(0)
    rows = rng.sample(world.scenes(tag), 4)
    prompts = [row["prompt"] for row in rows]
    good = [world.paint_scene(row, rng, careless=False) for row in rows]
    bad = [world.paint_scene(row, rng, careless=True) for row in rows]
    reward = world.geneval()
    assert reward(good, prompts, rows) == [1, 1, 1, 1]
    assert max(reward(bad, prompts, rows)) < 1


CUP = wanted("cup")
RED_CUP = wanted("cup", color="red")
LEFT = wanted("dog", position=["left of", 0])
ABOVE = wanted("vase", position=["above", 0])
BLUE = thing("cup", color="blue")
CUPS = [thing("cup", 30), thing("cup", 60)]
HYDRANTS = [thing("hydrant", 0, 40), thing("hydrant", 3, 40), thing("vase")]


@pytest.mark.parametrize("found, include, score", [
    ([thing("cup")] * 3, [wanted("cup", 4)], 0.75),
    ([thing("cup")] * 4, [CUP], -2),  # PAPER: not cut off at 0
    ([BLUE], [RED_CUP], 0.5),
    ([thing("cup"), BLUE], [RED_CUP], 0),  # the wrong count makes the right color void
    ([thing("cup"), BLUE], [wanted("cup", 2, color="red")], 0.75),
    ([thing("cup", 30), thing("dog", 0, 2)], [CUP, LEFT], 1),
    ([thing("cup"), thing("dog", 30)], [CUP, LEFT], 2 / 3),  # official code: 0.75
    ([thing("cup", 30), thing("dog"), thing("dog", 2)], [CUP, LEFT], 1 / 3),  # two dogs
    ([*CUPS, thing("dog", 45)], [wanted("cup", 2), LEFT], 2 / 3),  # it must hold against both
    # the color is wrong, so the place is void
    ([thing("cup", 30), thing("dog", 0, color="blue")],
     [CUP, wanted("dog", color="red", position=["left of", 0])], 0.5),
    # Nothing has a place next to what is itself wrong: numbers of the official evaluate_reward
    (HYDRANTS, [wanted("hydrant"), ABOVE], 1 / 3),
    (HYDRANTS, [wanted("hydrant", 2), ABOVE], 1),
    (HYDRANTS, [wanted("hydrant", 2, color="blue"), ABOVE], 2 / 4)])
def test_the_geneval_rule(found, include, score):
    assert rewards.geneval_score(found, scene(*include)) == pytest.approx(score)


@pytest.mark.parametrize("other_x, other_y, holds", [
    (30, 40, {"left of", "above"}), (-30, -40, {"right of", "below"}), (4, -40, {"below"}),
    (1, 0, set()), (2, 0, set()),  # a tenth of the summed sizes is 2
    (4.1, 0, {"left of"}), (-4.1, 0, {"right of"}), (0, 4.1, {"above"}),
    (30, 20, {"left of"}), (30, 24, {"left of", "above"})])  # (20 - 2) / 36.1 is just below 0.5
def test_where_a_box_lies_from_another(other_x, other_y, holds):
    """Both are 10 wide and high. Shortened by 2, more than half of the distance must be left."""
    assert rewards.relations(box(5, 7), box(5 + other_x, 7 + other_y)) == holds


def test_in_x_the_widths_shorten_and_in_y_the_heights():
    assert rewards.relations((0, 0, 40, 4), (0, 6, 40, 10)) == {"above"}
    assert rewards.relations((0, 0, 4, 40), (6, 0, 10, 40)) == {"left of"}


CIRCLE = wanted("circle")


@pytest.mark.parametrize("include, says", [
    ([], "*_metadata.jsonl"),
    ([wanted("wine glass")], "a wine glass; geneval_photo knows it"),
    ([wanted("circle", color="pink")], "pink circle"),
    ([wanted("circle", 0)], "count of circle"),
    ([wanted("circle", "2")], "count of circle"),
    ([wanted("circle", True)], "count of circle"),
    ([CIRCLE, wanted("cross", position=["left", 0])], "left of, right of, above, below"),
    ([CIRCLE, wanted("cross", position=["left of", 1])], "comes before"),  # itself
    ([CIRCLE, wanted("cross", position=["left of", -1])], "comes before"),
    ([CIRCLE, wanted("cross", position=["left of", "0"])], "comes before"),
    ([CIRCLE, wanted("cross", position=["left of"])], "[relation, "),
    ([CIRCLE, wanted("cross", position=1)], "[relation, ")])
def test_a_scene_that_cannot_be_judged_is_refused(include, says):
    rows = [{"include": include}]
    problem = exits(rewards.check_metadata, ["bad"], rows, world.SHAPES, world.COLORS)
    assert "the prompt 'bad'" in problem
    assert says in problem


# -------------------------------------------------------------------- rewards: the toy's own
LIGHT = (245, 245, 245)


def shape(kind, color="red", radius=9, x=24, y=24):
    """A shape on light paper, drawn at four times the size"""
    image = Image.new("RGB", (192, 192), LIGHT)
    ink = world.COLORS.get(color, color)
    world.draw_shape(world.ImageDraw.Draw(image), kind, 4 * x, 4 * y, 4 * radius, ink)
    return image.resize((48, 48), Image.LANCZOS)


@pytest.mark.parametrize("kind", world.SHAPES)
@pytest.mark.parametrize("color", world.COLORS)
def test_the_toys_detector_finds_every_shape_in_every_color(kind, color):
    found, = world.detect_shapes(shape(kind, color))
    assert (found["class"], found["color"]) == (kind, color)


def test_the_toys_detector_overlooks_what_is_small_or_pale():
    for radius in (2, 2.5, 3, 4, 5):
        image = shape("square", radius=radius)
        area = (np.abs(pixels(image) - 245).max(-1) > 70).sum()
        one_percent = 23  # of 48 x 48 pixels
        assert len(world.detect_shapes(image)) == int(area >= one_percent), radius
    assert len(world.detect_shapes(shape("circle", (165, 165, 165)))) == 1
    assert len(world.detect_shapes(shape("circle", (190, 190, 190)))) == 0  # 55 from the paper


def test_the_toys_detector_wants_seven_tenths_of_a_shape():
    for corner, seen in ((11, 1), (12, 0)):  # a little more than 0.7 of a square, and a little less
        image = shape("square", radius=11)
        image.paste(LIGHT, (14, 14, 14 + corner, 14 + corner))
        assert len(world.detect_shapes(image)) == seen


def test_the_toys_detector_takes_most_of_the_border_for_the_paper():
    image = shape("circle")
    image.paste("blue", (0, 0, 8, 8))
    assert "circle" in [found["class"] for found in world.detect_shapes(image)]


def test_the_color_of_a_shape_is_that_of_its_inside():
    piece = np.zeros((7, 7), np.uint8)
    piece[1:6, 1:6] = 1
    image = np.zeros((7, 7, 3), np.float32)  # black,
    image[2:5, 2:5] = world.COLORS["red"]  # and red inside
    assert world.nearest_color(image, piece) == "red"
    piece[2:] = 0  # a line has no inside
    assert world.nearest_color(image, piece) == "black"


def two_shapes(radius=9, apart=12, shift=0, fade=0.0, noise=0, second="blue"):
    """A red circle and a blue square. The options are the flaws that toy_taste dislikes."""
    image = Image.new("RGB", (192, 192), LIGHT)
    pen = world.ImageDraw.Draw(image)
    for x, kind, color in ((24 - apart, "circle", "red"), (24 + apart, "square", second)):
        ink = world.fade(world.COLORS[color], LIGHT, fade)
        world.draw_shape(pen, kind, 4 * x, 4 * (24 + shift), 4 * radius, ink)
    clouds = np.random.default_rng(0).normal(0, noise, (48, 48, 3))
    cloudy = pixels(image.resize((48, 48), Image.LANCZOS)) + clouds
    return Image.fromarray(cloudy.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("flaw", [
    dict(radius=6), dict(apart=9.5), dict(shift=11), dict(fade=0.4), dict(noise=12),
    dict(second="green")])
def test_taste_has_a_term_for_each_flaw(flaw):
    row = scene(wanted("circle", color="red"), wanted("square", color="blue"), tag="color_attr")
    images = [two_shapes(), two_shapes(**flaw), WHITE]
    best, flawed, empty = world.toy_taste()(images, ["a"] * 3, [row] * 3)
    assert 0.9 < best <= 1
    assert flawed < best - 0.02
    assert empty == 0


def test_toy_sign_likes_what_the_painter_made():
    signs = [world.paint_sign("CAT", random.Random(i)) for i in range(12)]
    noise = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    *quality, of_noise = rewards.REWARDS["toy_sign"]()([*signs, Image.fromarray(noise)], None, None)
    assert 0.8 < min(quality) and max(quality) <= 1
    assert of_noise < 0.6


def test_toy_inks_likes_what_is_rare():
    red = shape("square", "red")
    blue = shape("square", "blue")
    toy_inks = rewards.REWARDS["toy_inks"]()
    assert toy_inks([red, red, red, blue], None, None) == [0.25, 0.25, 0.25, 0.75]


def test_diversity_likes_what_differs_from_the_others_of_its_prompt():
    images = gray(0, 255, 51, 102, 153, 9)
    scores = rewards.diversity()(images, ["a", "a", "b", "b", "b", "c"], None)
    assert scores == pytest.approx([1, 1, 0.3, 0.2, 0.3, 0])


def test_toy_pickscore_has_learned_the_taste():
    """Through the same lines as PickScore, on pairs of paintings for held-out captions."""
    rng = random.Random("test")
    test_set = rewards.load_prompts(Config(reward="geneval"), "test")
    rows = []
    for row in [rng.choice(test_set) for _ in range(100)]:
        rows += [row, row]
    prompts = [row["prompt"] for row in rows]
    images = [world.paint_scene(row, rng, careless=rng.random() < 0.3, restless=True)
              for row in rows]
    pick = rewards.REWARDS["toy_pickscore"]()
    scores = np.array(pick(images, prompts, None))
    tastes = np.array(world.toy_taste()(images, prompts, rows))
    agree = (scores[::2] > scores[1::2]) == (tastes[::2] > tastes[1::2])
    assert agree.mean() > 0.65  # 0.77 of 2,000; a coin gives 0.5 +- 0.05
    assert np.mean(pick(images, prompts[::-1], None)) < scores.mean()


# ----------------------------------------------- rewards with models: tiny ones of the real classes
PHOTOS = [Image.new("RGB", (48, 40), color) for color in ("firebrick", "seagreen", "navy")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """CLIP, and a detector that calls the classes by other names than GenEval does"""
    folder = tmp_path_factory.mktemp("models")
    tiny.clip(folder / "clip")
    tiny.detector(folder / "detector", {number: f"LABEL_{number}" for number in range(80)})
    return f"{folder}/clip", f"{folder}/detector"


CAPTIONS = ["a red wall", "grass", "x" * 60]  # the last is cut at the model's 20 tokens


@pytest.fixture(scope="module")
def by_hand(models):
    """The embeddings of each photo and its caption, one at a time -> images, texts, logit scale"""
    from transformers import CLIPModel, CLIPProcessor
    clip, _ = models
    model = CLIPModel.from_pretrained(clip)
    processor = CLIPProcessor.from_pretrained(clip)
    images = []
    texts = []
    for photo, caption in zip(PHOTOS, CAPTIONS):
        inputs = processor(images=photo, text=caption, return_tensors="pt", truncation=True,
                           max_length=20)
        out = model(**inputs)
        images.append(torch.nn.functional.normalize(out.image_embeds))
        texts.append(torch.nn.functional.normalize(out.text_embeds))
    return torch.cat(images), torch.cat(texts), model.logit_scale.exp()


@pytest.mark.parametrize("name", ["pickscore", "pickscore_unscaled", "clipscore"])
def test_clip_rewards_score_each_image_with_its_own_prompt(models, by_hand, name):
    clip, _ = models
    images, texts, logit_scale = by_hand
    scale = {
        "pickscore": logit_scale / 26, "pickscore_unscaled": logit_scale, "clipscore": 100 / 30}
    expected = scale[name] * (images * texts).sum(1)
    where = [clip] if name == "clipscore" else [clip, clip]
    reward = rewards.REWARDS[name](*where)
    close(reward(PHOTOS * 20, CAPTIONS * 20, None), expected.repeat(20), 1e-4)  # in two passes
    assert rewards.load_clip(clip, clip) is rewards.load_clip(clip, clip)  # its memory is shared


def test_the_aesthetic_score_is_a_head_on_clips_image(models, by_hand, tmp_path):
    clip, _ = models
    images, _, _ = by_hand
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 1))
    state = {f"layers.{key}": value for key, value in head.state_dict().items()}
    torch.save(state, tmp_path / "head.pth")
    reward = rewards.aesthetic(clip, str(tmp_path / "head.pth"))
    close(reward(PHOTOS, CAPTIONS[::-1], None), head(images)[:, 0], 1e-4)  # whatever the prompt

    torch.save({"layers.0.weight": print}, tmp_path / "evil.pth")  # code in place of a tensor
    with pytest.raises(pickle.UnpicklingError):
        rewards.aesthetic(clip, str(tmp_path / "evil.pth"))


@pytest.fixture(scope="module")
def photo_reward(models):
    clip, detector = models
    return rewards.geneval_photo(detector, clip)


DOG = 16  # as COCO numbers them
MOUSE = 64


@pytest.fixture
def photo_score(photo_reward, monkeypatch):
    """A function: the score of a photo in which the detector finds (left, right, label, sure)"""
    from transformers import Mask2FormerImageProcessor
    assert rewards.DETECTOR_SIZE == {"shortest_edge": 800, "longest_edge": 1333}
    monkeypatch.setattr(rewards, "DETECTOR_SIZE", {"shortest_edge": 96, "longest_edge": 160})

    def score(found, *include, tag=""):
        def result(processor, outputs, threshold, target_sizes, return_binary_maps):
            assert return_binary_maps  # or there would be one map, with the objects' numbers
            assert target_sizes == [(40, 48)]
            assert outputs.masks_queries_logits.shape[-2] == 96 // 4  # masks have a quarter
            masks = [torch.zeros(40, 48)]  # an empty mask is no object
            infos = [{"label_id": 0, "score": 1.0}]
            for left, right, label, sure in found:
                if sure > threshold:
                    mask = torch.zeros(40, 48)
                    mask[10:30, left:right] = 1
                    masks.append(mask)
                    infos.append({"label_id": label, "score": sure})
            return [{"segmentation": torch.stack(masks), "segments_info": infos}]
        monkeypatch.setattr(
            Mask2FormerImageProcessor, "post_process_instance_segmentation", result)
        value, = photo_reward(PHOTOS[:1], ["p"], [scene(*include, tag=tag)])
        return value
    return score


FOUND = [(2, 12, DOG, 0.95), (30, 44, MOUSE, 0.5), (14, 24, DOG, 0.8), (20, 29, DOG, 0.2)]


def test_geneval_photo_is_surer_when_it_counts(photo_score):
    assert photo_score(FOUND, wanted("dog", 2)) == 1  # above 0.3
    assert photo_score(FOUND, wanted("dog", 1), tag="counting") == 1  # above 0.9
    assert photo_score(FOUND, wanted("person")) == 0


def test_geneval_photo_keeps_the_16_surest_of_a_class(photo_score):
    # The 17th dog is the least sure, and the only one on the right of the mouse.
    found = [(42, 48, DOG, 0.31), *[(2, 12, DOG, 0.9)] * 16, (20, 30, MOUSE, 0.9)]
    left = wanted("dog", 16, position=["left of", 0])
    assert photo_score(found, wanted("computer mouse"), left) == 1


def test_geneval_photo_knows_places_and_colors(photo_score):
    mouse = wanted("computer mouse")
    left = wanted("dog", 2, position=["left of", 0])
    right = wanted("dog", 2, position=["right of", 0])
    assert photo_score(FOUND, mouse, left) == 1
    assert photo_score(FOUND, mouse, right) == pytest.approx(2 / 3)
    scores = [photo_score(FOUND, mouse | {"color": color}) for color in rewards.PHOTO_COLORS]
    assert sorted(scores) == [0.5] * 9 + [1]  # the random CLIP names one of the ten


def test_the_classes_of_photos_are_cocos_in_genevals_words():
    """Whatever the model calls them"""
    classes = rewards.PHOTO_CLASSES
    assert len(classes) == 80
    assert [classes[number] for number in (0, 3, 4, 57, 58, 60, 62, 64, 65, 66, 79)] == [
        "person", "motorcycle", "airplane", "couch", "potted plant", "dining table", "tv",
        "computer mouse", "tv remote", "computer keyboard", "toothbrush"]


def test_a_color_is_told_on_the_object_alone_by_the_mean_of_three_phrases():
    """By the direction of that mean. The object is cut out, on gray.

    Yellow would win by two of its three phrases, or if long embeddings counted more.
    """
    mask = Image.new("1", (48, 40))
    mask.paste(1, (10, 10, 20, 30))
    image = Image.new("RGB", (48, 40), "green")
    image.paste("red", (10, 10, 16, 30))
    texts = torch.zeros(30, 3)
    texts[:, 0] = 1  # a cosine of 0.6
    texts[6:9] = torch.tensor([[0.0, 9.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 30.0]])  # yellow: 0.41
    texts[12:15] = torch.tensor([0.0, 1.0, 0.0])  # blue: 0.8
    embed_images = Mock(return_value=torch.tensor([[0.6, 0.8, 0.0]]))
    embed_texts = Mock(return_value=texts)
    cup = {"class": "cup", "mask": mask, "box": (10, 9, 20, 30)}
    assert rewards.name_color(embed_images, embed_texts, image, cup) == "blue"
    (picture,), = embed_images.call_args.args
    phrases, = embed_texts.call_args.args
    assert picture.size == (10, 21)
    assert picture.getpixel((2, 5)) == (255, 0, 0)
    assert picture.getpixel((2, 0)) == (153, 153, 153)
    assert phrases[6:9] == [
        "a photo of a yellow cup", "a photo of a yellow-colored cup", "a photo of a yellow object"]


def test_geneval_photo_refuses_what_it_cannot_know(models, photo_reward, tmp_path):
    clip, _ = models
    problem = exits(photo_reward.check, ["p"], [scene(wanted("sofa"))])
    assert "the prompt 'p' asks for a sofa;" in problem and "couch" in problem
    problem = exits(photo_reward.check, ["p"], [scene(wanted("cup", color="silver"))])
    assert "silver cup" in problem and "geneval_photo" not in problem
    tiny.detector(tmp_path, {0: "cat", 1: "dog"})
    problem = exits(rewards.geneval_photo, str(tmp_path), clip)
    assert "has 2 labels" in problem and "COCO's 80" in problem


@pytest.mark.parametrize("name, model", [
    ("pickscore", "yuvalkirstain/PickScore_v1"), ("clipscore", "openai/clip-vit-large-patch14"),
    ("aesthetic", "openai/clip-vit-large-patch14"),
    ("geneval_photo", "facebook/mask2former-swin-small-coco-instance")])
def test_a_model_that_cannot_be_loaded_is_one_line(monkeypatch, name, model):
    import transformers
    error = OSError("We couldn't connect to 'https://huggingface.co' to load it.\nLine 2")
    from_pretrained = Mock(side_effect=error)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", from_pretrained)
    problem = exits(rewards.load, name, "--eval_reward")
    from_pretrained.assert_called_once_with(model)
    assert problem.startswith(f"--eval_reward {name}: ") and "couldn't connect" in problem


# --------------------------------------------------------------- rewards: prompts, loading, scoring
CUSTOM = '''
import numpy, torch

def three(images, prompts, metadata):
    return [3.0] * len(images)

def ink(images, prompts, metadata):
    return [-numpy.asarray(image, float).mean() for image in images]

def needs_graph(images, prompts, metadata):
    x = torch.ones(1, requires_grad=True)
    return [float((2 * x).requires_grad)] * len(images)

def broken(images, prompts, metadata):
    raise FileNotFoundError("my own bug")

def dull(images, prompts, metadata):
    """Every image of a prompt with "dull" in it has the same score."""
    scores = ink(images, prompts, metadata)
    return [0.5 if "dull" in prompt else score for prompt, score in zip(prompts, scores)]
'''


def enter(folder, monkeypatch):
    """Make a folder with custom.py in it the current one"""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    Path("custom.py").write_text(CUSTOM)


@pytest.fixture
def work_folder(tmp_path, monkeypatch):
    """The current folder has custom.py only, and no pictures are drawn, which would be slow."""
    enter(tmp_path, monkeypatch)
    for name in ("draw_before_after", "draw_curve"):
        monkeypatch.setattr(flow_grpo, name, Mock())
    return tmp_path


@pytest.mark.parametrize("result", [
    [0.25, 0.5], (0.25, 0.5), np.array([0.25, 0.5]), np.array([[0.25], [0.5]]),
    torch.tensor([0.25, 0.5]), torch.tensor([[0.25], [0.5]], requires_grad=True),
    [torch.tensor(0.25), np.float32(0.5)]])
def test_scores_can_be_lists_arrays_or_tensors(result):
    scores = rewards.to_floats(result, 2, "mine")
    assert scores == [0.25, 0.5]
    assert type(scores[0]) is float


@pytest.mark.parametrize("result, says", [
    (([0.5, 1.0], {}), r"not \(scores, dict\)"), ("12", "not a str"), (None, "not a NoneType"),
    ({1: 1.0, 2: 2.0}, "not a dict"), ([0.5], r"not \[1\] numbers"), (0.5, r"not \[\] numbers"),
    (np.ones((1, 2)), r"not \[1, 2\]"), ([1.0, float("nan")], "gave nan"),
    ([1.0, -float("inf")], "gave -inf"), ([1e39, 1.0], r"gave 1e\+39"), ([None, 1.0], "list of 2")])
def test_another_result_is_refused_with_what_a_reward_must_return(result, says):
    problem = exits(rewards.to_floats, result, 2, "mine")
    assert re.search(says, problem) and "reward mine" in problem


def test_a_weighted_sum_keeps_its_parts(work_folder):
    loaded = rewards.load("custom.py:three:0.5, custom.py:ink:2,custom.py:needs_graph", "--reward")
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    scores = rewards.score(loaded, gray(0, 10), rows)
    assert {key: values.tolist() for key, values in scores.items()} == {
        "reward/custom.py:three": [3, 3],
        "reward/custom.py:ink": [0, -10],
        "reward/custom.py:needs_graph": [0, 0],  # no reward is called with gradients
        "reward": [1.5, -18.5]}


@pytest.mark.parametrize("spec, weights", [
    ("ocr", {"ocr": 1}), (" toy_sign , ocr:0.5,", {"toy_sign": 1, "ocr": 0.5}),
    ("./my.py:f:2", {"./my.py:f": 2}), ("a:b,geneval:1e-1", {"a:b": 1, "geneval": 0.1}),
    ("C:\\my.py:f", {"C:\\my.py:f": 1}), ("ocr:-1", {"ocr": -1}), ("", {})])
def test_a_sum_of_rewards_is_read_as_names_and_weights(spec, weights):
    assert rewards.parse(spec, "--eval_reward") == weights


@pytest.mark.parametrize("spec, says", [
    ("ocrr", "no reward 'ocrr'.*ocr, geneval"), ("", "choose from ocr"), ("ocr,ocr:2", "twice"),
    ("ocr:nan", "weight of ocr"), ("nofile.py:fn", "no Python file nofile.py"),
    ("custom.py:nothing", "no function nothing"), ("custom:three", "no Python file custom")])
def test_a_reward_that_cannot_be_found_is_one_line(work_folder, spec, says):
    assert re.search(f"^--reward.*{says}", exits(rewards.load, spec, "--reward"))


def test_a_file_is_found_in_the_current_folder_or_by_its_path(work_folder):
    before = sys.path.copy()
    Path("sub").mkdir()
    Path("sub/neighbor.py").touch()
    Path("sub/json.py").write_text(CUSTOM + "import neighbor")  # Python has a json, too
    for spec in ("custom.py:three", "./custom.py:three", "sub/json.py:three",
                 f"{work_folder}/sub/json.py:three"):
        function, _ = rewards.load(spec, "--reward")[spec]
        assert function(gray(0, 0), None, None) == [3, 3]
    both = rewards.load("custom.py:three,./custom.py:ink", "--reward")
    (three, _), (ink, _) = both.values()
    assert three.__globals__ is ink.__globals__  # a file is run once
    assert sys.path[:len(before)] == before  # users' folders come last, so they hide no library


def test_a_bug_in_a_users_file_is_shown_as_python_shows_it(work_folder):
    Path("unfinished.py").write_text("import no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        rewards.load("unfinished.py:f", "--reward")
    with pytest.raises(FileNotFoundError, match="my own bug"):  # before a model is loaded
        run(*TINY, "--reward", "custom.py:broken", "--model", "nowhere")


def prompts_of(folder, split="train"):
    return rewards.load_prompts(Config(dataset=str(folder)), split)


def test_a_dataset_is_a_text_file_or_a_table(tmp_path):
    """A text goes before a table. Values that are null are dropped, and so is a byte order mark."""
    table = ('\ufeff{"prompt": " a\u2028b ", "tag": null, "include": [{"class": "cup", "count": 1, '
             '"color": null, "position": null}]}\n\n{"prompt": "c", "n": 0}\n')
    (tmp_path / "train_metadata.jsonl").write_text(table, "utf-8")
    assert prompts_of(tmp_path) == [
        {"prompt": "a\u2028b", "include": [{"class": "cup", "count": 1}]}, {"prompt": "c", "n": 0}]
    (tmp_path / "train.txt").write_text(" one \n\n  \ntwo\n")
    assert prompts_of(tmp_path) == [{"prompt": "one"}, {"prompt": "two"}]
    assert "test.txt or test_metadata.jsonl" in exits(prompts_of, tmp_path, "test")


@pytest.mark.parametrize("name, content, says", [
    ("train.txt", "a\nb caf\u00e9".encode("latin-1"), "train.txt is not UTF-8 .at byte 7"),
    ("train.txt", b"\n \n", "train.txt must have a prompt"),
    ("train_metadata.jsonl", b'{"prompt": "a"}\n{"text": "a"}', 'line 2 is not .* "prompt"'),
    ("train_metadata.jsonl", b'{"prompt": "a"}\n\n{"prompt": 7}', 'line 3 is not .* "prompt"'),
    ("train_metadata.jsonl", b'[1]', 'line 1 is not .* "prompt"'),
    ("train_metadata.jsonl", b'{"prompt": \n', "line 1 is not JSON"),
    ("train_metadata.jsonl", b'{"prompt": "a", "tag": ["x"]}', r"tag \['x'\]"),
    ("train_metadata.jsonl", b'{"prompt": "a \\ud800"}', "half of a character.*ud800")])
def test_what_a_dataset_must_be_is_said_in_one_line(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    problem = exits(prompts_of, tmp_path)
    assert re.search(f"^--dataset {tmp_path}: .*{says}", problem)
    assert len(problem) < 300


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_prompt_is_checked_for_every_reward_before_the_run(work_folder, split):
    good = json.dumps(world.scenes("position")[0])
    Path("train_metadata.jsonl").write_text(good)
    Path("test_metadata.jsonl").write_text(good)
    Path(f"{split}_metadata.jsonl").write_text(f'{good}\n{{"prompt": "bad"}}\n{good}')
    problem = exits(run, *TINY, "--dataset", ".", "--reward", "custom.py:ink", "--eval_reward",
                    "geneval")
    assert problem.startswith("reward geneval: the prompt 'bad'")
    assert not Path("runs").exists()


@pytest.mark.parametrize("reward, task", [
    ("ocr", "ocr"), ("toy_sign, ocr", "ocr"), ("ocr:0.5,geneval", "ocr"), ("geneval", "geneval"),
    ("my_ocr.py:f", "geneval"), ("toy_pickscore:2", "geneval")])
def test_the_reward_chooses_the_toys_prompts(reward, task):
    first = rewards.load_prompts(Config(reward=reward), "test")[0]
    assert ("sign" in first["prompt"]) == (task == "ocr")


@pytest.mark.parametrize("reward", ["ocr", "geneval"])
def test_the_toys_test_prompts_are_held_out(reward):
    train = {row["prompt"] for row in rewards.load_prompts(Config(reward=reward), "train")}
    test = {row["prompt"] for row in rewards.load_prompts(Config(reward=reward), "test")}
    assert len(train) > 150
    assert len(test) > 50
    assert not train & test


# -------------------------------------------------------------------------- 6. options and mistakes
PICTURES = Path(FOLDERS.name, "pictures")  # a dataset
PICTURES.mkdir()
(PICTURES / "train.txt").write_text("a red circle\na cat\na blue house\n")
(PICTURES / "test.txt").write_text("a green square\na dog\na tree\n")
TINY = (f"--model {TINY_SD3} --dataset {PICTURES} --resolution 32 --groups 2 --group_size 4 "
        "--eval_prompts 2 --eval_steps 2 --train_steps 4 --window 1 --latest_start 1 "
        "--no-same_noise --beta 0.1 --learning_rate 1.5e-3 --epochs 1").split()


def run(*options):
    flow_grpo.main([str(option) for option in options])


@pytest.mark.parametrize("options, says", [
    ("--learning_rate 0", "learning_rate 0.0"), ("--learning_rate inf", "learning_rate inf"),
    ("--noise_level 0", "noise_level 0"), ("--groups 0", "groups 0"), ("--epochs -1", "epochs -1"),
    ("--eval_every 0", "eval_every 0"), ("--eval_prompts -1", "eval_prompts -1"),
    ("--seed -1", "seed -1"), ("--beta -1", "beta -1"), ("--beta nan", "beta nan"),
    ("--sde cps --noise_level 1", "noise_level 1"),
    ("--window 3", "window 3.*--latest_start 1.*train_steps 4"),
    ("--window 0 --latest_start 0 --train_steps 1", "train_steps 1"),
    ("--group_size 1 --updates 1", "group_size 1"),
    ("--updates 3", "updates 3.*group_size 4"), ("--preset sd4", "preset sd4.*sd3.5-medium"),
    ("--report_to none", "report_to none.*not installed"), ("--reward ocrr", "ocrr.*geneval"),
    ("--eval_reward jpeg", "--eval_reward jpeg"),
    ("--precision bf16 --batch_size 4", "no GPU.*fp32"),
    ("--resolution 30", "resolution 30.*multiple of 4"), ("--resolution 68", "at most 64"),
    ("--model ./nowhere", "model ./nowhere.*hf auth login"),
    ("--resume runs/no", "resume runs/no.*no checkpoint"),
    ("--resume runs/no --preset geneval", "preset geneval: not with --resume")])
def test_a_mistake_gives_one_clear_line_and_leaves_nothing(work_folder, options, says):
    problem = exits(run, *TINY, "--reward", "custom.py:ink", *options.split())
    assert re.search(says, problem)
    assert not Path("runs").exists()


def test_what_may_be_0_and_what_is_the_largest():
    flow_grpo.check_config(small(
        seed=0, epochs=0, window=0, latest_start=0, beta=0.0, ema_decay=0.0, eval_prompts=0))
    flow_grpo.check_config(small(train_steps=6, window=3, latest_start=2))
    assert load_policy(small(resolution=64)).latent_shape == (4, 32, 32)


@pytest.mark.parametrize("option, value", [
    ("--learning_rat", 1), ("--learning_rate", "fast"), ("--sde", "ode"), ("--precision", "fp8"),
    ("--std_over", "all")])
def test_a_mistyped_option_gets_tyros_box(work_folder, capsys, option, value):
    with pytest.raises(SystemExit) as stopped:
        run(*TINY, option, value)
    assert stopped.value.code == 2
    assert option in capsys.readouterr().err


def test_groups_and_prompts_must_fit_the_processes(work_folder, monkeypatch):
    monkeypatch.setattr(flow_grpo.WORLD, "num_processes", 2)
    flow_grpo.check_config(small())
    assert "groups 3" in exits(flow_grpo.check_config, small(groups=3))
    assert "eval_prompts 1" in exits(flow_grpo.check_config, small(eval_prompts=1))
    Path("train.txt").write_text("one\n")
    assert "a prompt for each process" in exits(prompts_of, ".")


def test_in_bf16_all_batches_must_have_the_same_size():
    flow_grpo.check_config(small(precision="bf16", batch_size=4))  # of 2 * 4 images in 2 updates
    assert "must divide 4" in exits(flow_grpo.check_config, small(precision="bf16", batch_size=8))
    flow_grpo.check_config(small(precision="fp32", batch_size=8))


def test_a_folder_that_cannot_be_written_to_is_refused(work_folder, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != ".")
    assert "cannot be written" in exits(flow_grpo.check_machine, small())
    Path("runs").mkdir()
    flow_grpo.check_machine(small())
    monkeypatch.setattr(os, "access", lambda path, mode: path != "runs")
    assert "runs cannot be written" in exits(flow_grpo.check_machine, small())


VALUES = {
    "": dict(
        reward="ocr", eval_reward="", model="toy", dataset="", resolution=48,
        max_sequence_length=14, precision="fp32", gradient_checkpointing=False, offload=False,
        seed=0, epochs=4, eval_every=4, groups=16, group_size=8, train_steps=10, eval_steps=40,
        noise_level=0.7, sde="flow", window=1, latest_start=0, same_noise=True, guidance=1,
        updates=2, learning_rate=3e-3, lr_decay=True, adam_eps=1e-8, clip_range=1e-3, beta=0.5,
        std_over="epoch", lora_rank=32, ema_decay=0.9, batch_size=64, eval_prompts=0,
        eval_per_prompt=2, report_to="", name="", resume="")}
VALUES["sd3.5-medium"] = VALUES[""] | dict(
    model="stabilityai/stable-diffusion-3.5-medium", resolution=512, max_sequence_length=128,
    precision="bf16", epochs=1000, eval_every=60, groups=48, group_size=24, window=0,
    same_noise=False, guidance=4.5, learning_rate=3e-4, lr_decay=False, clip_range=1e-4, beta=0.04,
    ema_decay=0.974, batch_size=8, eval_prompts=0, eval_per_prompt=1)
VALUES["sd3.5-medium-fast"] = VALUES["sd3.5-medium"] | dict(
    resolution=384, max_sequence_length=256, epochs=100, eval_every=10, groups=8, group_size=8,
    eval_steps=28, window=3, latest_start=2, sde="cps", noise_level=0.8, guidance=1,
    learning_rate=1e-4, clip_range=1e-5, beta=0, adam_eps=1e-15, ema_decay=0.9,
    gradient_checkpointing=True, offload=True, eval_prompts=64)
VALUES["sana-0.6b"] = VALUES["sd3.5-medium-fast"] | dict(
    model="Efficient-Large-Model/Sana_600M_512px_diffusers", resolution=512,
    max_sequence_length=300, batch_size=4)
VALUES["flux.1-dev"] = VALUES["sd3.5-medium"] | dict(
    model="black-forest-labs/FLUX.1-dev", reward="pickscore", eval_every=30, train_steps=6,
    eval_steps=28, guidance=3.5, noise_level=0.9, beta=0, lora_rank=64, ema_decay=0.924,
    batch_size=4, gradient_checkpointing=True)
VALUES["geneval"] = VALUES[""] | dict(
    reward="geneval", group_size=16, epochs=36, eval_every=12, window=2, learning_rate=1.5e-3,
    lr_decay=False, beta=0.1, eval_prompts=60)
VALUES["toy_pickscore"] = VALUES[""] | dict(
    reward="toy_pickscore", groups=8, group_size=16, epochs=24, eval_every=12, window=2,
    learning_rate=2e-3, beta=0.1, eval_prompts=60)


@pytest.fixture
def parse(work_folder, monkeypatch):
    """parse_config on a machine that has all that a preset needs"""
    monkeypatch.setattr(flow_grpo, "check_machine", lambda config: None)
    return lambda *options: flow_grpo.parse_config(options)


@pytest.mark.parametrize("preset", VALUES)
def test_the_defaults_and_presets_have_these_values(parse, preset):
    config = parse("--preset", preset) if preset else parse()
    assert asdict(config) == VALUES[preset] | {"preset": preset}


def test_help_shows_the_values_of_the_preset(parse, capsys):
    with pytest.raises(SystemExit):
        parse("--preset", "sd3.5-medium", "--help")
    assert "pixels (default: 512)" in capsys.readouterr().out


def test_the_first_reward_chooses_a_preset_and_an_option_wins_over_it(parse):
    geneval = parse("--preset", "geneval")
    for reward in ("geneval", "geneval:1", " geneval:0.5,ocr"):
        assert replace(parse("--reward", reward), reward="geneval", preset="geneval") == geneval
    assert parse("--reward", "ocr,geneval").epochs == 4
    assert parse("--reward", "geneval", "--preset", "sd3.5-medium").groups == 48
    own = parse("--preset", "sd3.5-medium-fast", "--beta", "0.01", "--no-offload")
    assert (own.beta, own.offload, own.gradient_checkpointing) == (0.01, False, True)


# -------------------------------------------------------------------------------------- whole runs
def read_metrics(folder):
    """Those of a run, without the seconds"""
    rows = []
    for line in Path(folder, "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert 0 < row.pop("seconds") < 60
        rows.append(row)
    return rows


def test_a_short_run_gives_the_recorded_numbers(work_folder, capsys):
    short_run = GOLDEN["short_run"]
    run(*short_run["options"].split(), "--name", "x")
    for own, expected in zip(read_metrics("runs/x"), short_run["metrics"], strict=True):
        for key, value in expected.items():
            absolute = 1e-5 if "reward" in key else 0  # a pixel may be rounded the other way
            assert own[key] == pytest.approx(value, rel=1e-3, abs=absolute), key
    assert "eval_reward/" not in capsys.readouterr().out  # a single reward is printed once


WHOLE = [*TINY, "--reward", "custom.py:ink:2", "--eval_reward", "custom.py:three,custom.py:ink:3",
         "--epochs", 2, "--eval_every", 2, "--no-lr_decay"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run that nothing happened to -> its folder, and the lines that it printed"""
    folder = tmp_path_factory.mktemp("whole")
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        enter(folder, patch)
        patch.setattr(flow_grpo, "say", lines.append)
        run(*WHOLE, "--name", "x")
    return folder / "runs/x", lines


def test_a_run_writes_what_the_readme_says(whole_run):
    folder, _ = whole_run
    files = {str(path.relative_to(folder)) for path in folder.rglob("*.*")}
    lora = "pytorch_lora_weights.safetensors"
    expected = {"config.json", "metrics.jsonl", "checkpoint.pt", lora, "before_after.png",
                "curve.png"}
    for epoch in ("0000", "0002"):
        expected |= {f"samples/{epoch}/{name}" for name in (
            "00.png", "01.png", "prompts.jsonl", lora)}
    assert files == expected
    saved = torch.load(folder / "checkpoint.pt")
    assert json.loads((folder / "config.json").read_text()) == saved["options"]
    assert saved["optimizer"]["param_groups"][0]["lr"] == 1.5e-3
    steps = {int(state["step"]) for state in saved["optimizer"]["state"].values()}
    assert steps == {saved["updates"]} == {4}  # one optimizer makes all updates


def test_a_run_trains_on_its_reward_and_measures_the_others(whole_run):
    folder, _ = whole_run
    evaluation = {"epoch", "eval_reward", "eval_reward/custom.py:ink",
                  "eval_reward/custom.py:three"}
    training = {"reward", "reward/custom.py:ink", "no_signal", "kl", "ratio_deviation", "clip_low",
                "clip_high", "grad_norm"}
    first, second, last = read_metrics(folder)
    assert [first["epoch"], second["epoch"], last["epoch"]] == [0, 1, 2]
    assert set(first) == evaluation
    assert set(last) == evaluation | training
    assert last["eval_reward"] == pytest.approx(2 * last["eval_reward/custom.py:ink"])


def test_a_run_says_what_it_does(whole_run):
    _, said = whole_run
    assert "loading" in said[0] and "custom.py:ink" in said[0]
    assert any("runs/x" in line and "2 groups of 4 images" in line for line in said)
    line, = [line for line in said if line.startswith("epoch 2/2")]
    for key in ("reward", "eval_reward", "eval_reward/custom.py:three", "no_signal", "kl",
                "seconds"):
        assert f" {key} " in line
    assert "The best LoRA is in runs/x/samples/000" in said[-1]
    assert not any("no pictures" in line for line in said)


def test_the_last_line_says_what_was_gained_and_which_evaluation_was_the_best():
    history = [{"epoch": 0, "eval_reward": 0.1, "eval_accuracy": 0.2}, {"epoch": 3},
               {"epoch": 6, "eval_reward": 0.5, "eval_accuracy": 0.7},
               {"epoch": 9, "eval_reward": 0.4, "eval_accuracy": 0.8}]
    assert flow_grpo.summary(Path("runs/x"), history) == (
        "eval_reward 0.100 -> 0.400, eval_accuracy 0.200 -> 0.800. "
        "The best LoRA is in runs/x/samples/0006")


LONG = 'an old "caf\u00e9 $5" in $ ' + "very " * 40 + "long street"


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved"""
    saved = []

    def savefig(figure, path):
        saved.append(figure)
        Path(path).write_text("a picture")
    monkeypatch.setattr(flow_grpo.Figure, "savefig", savefig)
    return saved


def test_before_after_shows_two_evaluations_with_whole_captions(tmp_path, figures):
    rows = [{"prompt": "short"}, {"prompt": LONG}]
    folders = [tmp_path / "0000", tmp_path / "0002"]
    for folder, level, score in zip(folders, (40, 240), (0.0, 1.0)):
        flow_grpo.save_images(gray(level, level // 2), rows, [0.25, score], folder)
    flow_grpo.draw_before_after(*folders, tmp_path)
    assert (tmp_path / "before_after.png").read_text() == "a picture"
    assert figures[0].get_suptitle() == (
        "before training (left) and after epoch 2 (right), with their rewards")

    first, second = [plot for plot in figures[0].axes if plot.get_images()]
    assert (first.get_subplotspec().num1, second.get_subplotspec().num1) == (0, 1)
    for plot, levels, caption in (
            (first, (40, 240), "0.25 -> 0.25  short"),
            (second, (20, 120), f"0.00 -> 1.00  {LONG}")):
        shown = plot.get_images()[0].get_array()
        assert (shown[0, 0, 0], shown[0, -1, 0]) == levels
        assert plot.get_title().split() == caption.split()
        assert not plot.title.get_parse_math()  # two $ do not make a formula


def test_the_curve_has_a_panel_for_each_metric(tmp_path, figures):
    flow_grpo.draw_curve(tmp_path, [
        {"epoch": 0, "eval_reward/a": 0.1, "eval_reward/b": 5.0, "eval_accuracy": 0.2},
        {"epoch": 1, "reward/a": 0.3, "kl": 0.01},
        {"epoch": 2, "reward/a": 0.4, "kl": 0.02, "eval_reward/a": 0.5, "eval_reward/b": 4.0,
         "eval_accuracy": 0.6}])
    panels = []
    for plot in figures[0].axes:
        assert plot.get_xlabel() == "epoch"
        panels.append({line.get_label(): line.get_xydata().tolist() for line in plot.get_lines()})
    assert panels == [
        {"reward/a": [[1, 0.3], [2, 0.4]], "eval_reward/a": [[0, 0.1], [2, 0.5]]},
        {"eval_reward/b": [[0, 5.0], [2, 4.0]]},
        {"eval_accuracy": [[0, 0.2], [2, 0.6]]},
        {"kl": [[1, 0.01], [2, 0.02]]}]


def test_at_most_12_images_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(flow_grpo, "gather_object", lambda images: images + images)
    flow_grpo.save_images(gray(*range(13)), [{"prompt": "a"}] * 26, [0.0] * 26, tmp_path)
    images, _ = flow_grpo.read_images(tmp_path)
    assert len(images) == len(list(tmp_path.glob("*.png"))) == 12


def test_a_terminal_that_cannot_print_a_prompt_does_not_stop_a_run(work_folder, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "cp1252"))
    monkeypatch.setattr(flow_grpo, "train", lambda config: flow_grpo.say("\U0001f600"))
    run(*TINY)
    assert b"\\U0001f600" in written.getvalue()


@pytest.mark.parametrize("reward, folder", [
    ("./custom.py:ink", "runs/custom-py-ink"), ("ocr:2", "runs/ocr"),
    ("ocr:1,./custom.py:ink:0.5", "runs/ocr-custom-py-ink")])
def test_every_run_has_a_folder_of_its_own(work_folder, reward, folder):
    assert flow_grpo.claim_folder(small(reward=reward)) == Path(folder)
    assert flow_grpo.claim_folder(small(reward=reward)) == Path(f"{folder}-2")


def test_a_name_is_free_until_there_is_a_checkpoint(work_folder):
    for _ in range(2):
        assert flow_grpo.claim_folder(small(name="x")) == Path("runs/x")
    assert "start it again" in exits(run, "--resume", "runs/x")
    Path("runs/x/checkpoint.pt").touch()
    assert "--resume runs/x" in exits(run, *TINY, "--reward", "custom.py:ink", "--name", "x")


@pytest.fixture
def copied_run(work_folder, whole_run):
    """The same run in the current folder, as runs/x"""
    folder, _ = whole_run
    return shutil.copytree(folder, work_folder / "runs/x")


@pytest.mark.parametrize("problem, says", [
    (KeyboardInterrupt(), "interrupted"), (rewards.RewardError("reward x"), "reward x"),
    (torch.OutOfMemoryError("CUDA"), "--batch_size.*--gradient_checkpointing.*--offload")])
def test_what_ends_a_run_is_one_line(work_folder, monkeypatch, problem, says):
    monkeypatch.setattr(flow_grpo, "train", Mock(side_effect=problem))
    with pytest.raises(SystemExit, match=says):
        run(*TINY)


def test_a_picture_that_cannot_be_drawn_does_not_stop_a_run(work_folder, capsys):
    flow_grpo.draw_curve.side_effect = OSError("half a picture")
    flow_grpo.report(small(), work_folder, [{"epoch": 0, "eval_reward": 0.5}], Mock())
    assert "warning: no pictures this time" in capsys.readouterr().out


def run_until_killed():
    """A process that runs WHOLE, and dies while it writes the checkpoint of the second epoch"""
    save = torch.save
    saved = []

    def dies_in_the_third_checkpoint(content, path):
        saved.append(path)
        if len(saved) == 3:
            Path(path).write_bytes(b"half a checkpoint")
            os.kill(os.getpid(), signal.SIGKILL)
        save(content, path)

    def mortal():
        torch.save = dies_in_the_third_checkpoint
        run(*WHOLE, "--name", "killed")
    process = multiprocessing.get_context("fork").Process(target=mortal)
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL


def test_a_killed_run_resumes_as_if_it_had_not_been(work_folder, whole_run):
    """To the same weights, optimizer and metrics, bit for bit"""
    whole, _ = whole_run
    run_until_killed()
    assert len(read_metrics("runs/killed")) == 3
    run("--resume", "runs/killed")
    assert read_metrics("runs/killed") == read_metrics(whole)
    for file in ("pytorch_lora_weights.safetensors", "samples/0002/00.png"):
        assert Path("runs/killed", file).read_bytes() == Path(whole, file).read_bytes()
    own = torch.load("runs/killed/checkpoint.pt")
    other = torch.load(whole / "checkpoint.pt")
    for key in ("weights", "average", "updates"):
        torch.testing.assert_close(own[key], other[key], rtol=0, atol=0)
    torch.testing.assert_close(
        own["optimizer"]["state"], other["optimizer"]["state"], rtol=0, atol=0)


def test_the_files_of_an_epoch_are_there_before_its_checkpoint(work_folder, monkeypatch):
    files = ("config.json", "metrics.jsonl", "pytorch_lora_weights.safetensors",
             "samples/0000/00.png", "samples/0000/pytorch_lora_weights.safetensors")
    missing = []

    def name_the_checkpoint(old, new):
        missing.append([file for file in files if not Path("runs/y", file).exists()])
    monkeypatch.setattr(os, "replace", name_the_checkpoint)
    run(*TINY, "--epochs", 0, "--reward", "custom.py:ink", "--name", "y")
    assert missing == [[]]


def test_a_resumed_run_that_fails_at_once_leaves_its_config_json_alone(copied_run, monkeypatch):
    before = (copied_run / "config.json").read_text()
    monkeypatch.setattr(flow_grpo, "train_epoch", Mock(side_effect=KeyboardInterrupt))
    exits(run, "--resume", "runs/x", "--epochs", 3, "--learning_rate", 1e9)
    assert (copied_run / "config.json").read_text() == before


@pytest.mark.parametrize("content", [
    {"options": {}, "code": print}, {"options": {"no_such_option": 1}}, {}])
def test_a_damaged_or_foreign_checkpoint_is_one_line(tmp_path, content):
    path = tmp_path / "checkpoint.pt"
    says = f"--resume {tmp_path}: its checkpoint.pt is damaged"
    torch.save(content, path)
    assert says in exits(flow_grpo.read_checkpoint, tmp_path)
    path.write_bytes(path.read_bytes()[:100])
    assert says in exits(flow_grpo.read_checkpoint, tmp_path)


def test_a_resumed_run_has_the_options_of_its_checkpoint(copied_run):
    assert "--lora_rank" in exits(run, "--resume", "runs/x", "--lora_rank", 8, "--epochs", 3)
    path = copied_run / "checkpoint.pt"
    options = asdict(Config(reward="geneval", epochs=50, seed=3))
    torch.save(torch.load(path) | {"options": options}, path)
    config = flow_grpo.parse_config(["--resume", "runs/x"])  # not those of the preset geneval
    assert (config.epochs, config.seed, config.group_size) == (50, 3, 8)


def test_a_finished_run_is_evaluated_again_on_more_prompts(copied_run, capsys):
    before = {path: path.read_bytes() for path in copied_run.rglob("*.*")}
    run("--resume", "runs/x", "--eval_prompts", 3)
    assert re.search(r"eval_reward/custom.py:ink -\d+", capsys.readouterr().out)
    images, _ = flow_grpo.read_images(copied_run / "samples/again")
    trained, _ = flow_grpo.read_images(copied_run / "samples/0002")
    untrained, _ = flow_grpo.read_images(copied_run / "samples/0000")
    assert len(images) == 3
    assert difference(images[0], trained[0]) <= 1 < difference(images[0], untrained[0])
    for path, content in before.items():
        assert path.read_bytes() == content


@pytest.mark.parametrize("lr_decay, expected_rates", [
    ("--lr_decay", [0.01, 0.005]),  # the third and the fourth of four
    ("--no-lr_decay", [0.02, 0.02])])
def test_a_finished_run_goes_on_with_more_epochs(
        copied_run, monkeypatch, lr_decay, expected_rates):
    before = read_metrics(copied_run)
    set_learning_rate = Mock()
    monkeypatch.setattr(flow_grpo.Policy, "set_learning_rate", set_learning_rate)
    run("--resume", "runs/x", "--epochs", 4, "--learning_rate", 0.02, lr_decay, "--adam_eps",
        1e-15)
    rows = read_metrics(copied_run)
    assert rows[:3] == before
    assert len(rows) == 5
    assert {"grad_norm", "eval_reward"} <= set(rows[4])
    config = json.loads((copied_run / "config.json").read_text())
    assert (config["epochs"], config["learning_rate"], config["groups"]) == (4, 0.02, 2)
    rates = [call.args[0] for call in set_learning_rate.call_args_list]
    assert rates == pytest.approx(expected_rates)
    optimizer = torch.load(copied_run / "checkpoint.pt")["optimizer"]
    assert optimizer["param_groups"][0]["eps"] == 1e-15
    folder = Path("runs/x")
    flow_grpo.draw_before_after.assert_called_once_with(
        folder / "samples/0000", folder / "samples/0004", folder)


@pytest.mark.parametrize("name", ["sd3", "flux", "sana"])
def test_stock_diffusers_with_the_lora_draws_the_evaluations_image(work_folder, name):
    """With the options that save memory"""
    _, folder = family(name)
    run(*TINY, "--model", folder, "--guidance", 2, "--reward", "custom.py:ink",
        "--learning_rate", 0.02, "--beta", 0, "--no-lr_decay", "--offload",
        "--gradient_checkpointing", "--name", "x")
    _, row = read_metrics("runs/x")
    assert row["kl"] > 0
    assert row["grad_norm"] > 0
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)

    def distance_to(file):
        """From the stock pipeline's image to one of an evaluation"""
        image = stock_image(pipe, "a green square", 0, num_inference_steps=2, guidance_scale=2.0)
        return difference(image, Image.open(f"runs/x/samples/{file}"))
    assert distance_to("0000/00.png") <= 1  # the LoRA begins at the base model
    assert distance_to("0001/00.png") > 10
    pipe.load_lora_weights("runs/x")
    assert distance_to("0001/00.png") <= 1
    last, first, second = [
        Path("runs/x", place, "pytorch_lora_weights.safetensors").read_bytes()
        for place in (".", "samples/0000", "samples/0001")]
    assert last == second != first  # each evaluation keeps its own


def test_a_tracker_gets_the_metrics_and_is_closed(copied_run, monkeypatch):
    accelerator = Mock()
    monkeypatch.setattr(flow_grpo, "Accelerator", Mock(return_value=accelerator))
    monkeypatch.setattr(flow_grpo, "get_available_trackers", lambda: ["wandb"])
    run("--resume", "runs/x", "--epochs", 3, "--report_to", "wandb")
    flow_grpo.Accelerator.assert_called_once_with(log_with="wandb", project_dir=Path("runs/x"))
    accelerator.init_trackers.assert_called_once()
    *_, row = (copied_run / "metrics.jsonl").read_text().splitlines()
    accelerator.log.assert_called_once_with(json.loads(row), step=3)
    accelerator.end_training.assert_called_once_with()
    assert not (copied_run / "samples/again").exists()  # it goes on at once


def run_in_two_processes(*options):
    """A run as `accelerate launch` would start it -> what its two processes printed"""
    def one_of_two():
        AcceleratorState._reset_state(reset_partial_state=True)
        flow_grpo.WORLD = PartialState(cpu=True)
        torch.set_num_threads(1)
        sys.stdout = sys.stderr = open(f"said-by-{flow_grpo.WORLD.process_index}", "w")
        run(*options)
    debug_launcher(one_of_two, num_processes=2)
    return [Path(f"said-by-{rank}").read_text() for rank in (0, 1)]


def test_two_processes_give_the_same_run_as_one(work_folder):
    """The two are stopped after an epoch, and resumed.

    Each has one of two groups. Only the group that is not dull has advantages. With this seed it
    is that of the first process in epoch 1, and that of the second in epoch 2. Of three test
    prompts, one process has two.
    """
    Path("train.txt").write_text("a dull circle\na red cross, painted\n")
    Path("test.txt").write_text("a dull circle\na red cross, painted\na cat\n")
    options = [*TINY, "--dataset", ".", "--reward", "custom.py:dull", "--eval_prompts", 3,
               "--eval_every", 1, "--eval_reward", "diversity", "--seed", 1]
    run(*options, "--name", "one", "--epochs", 2)
    said = run_in_two_processes(*options)
    said_then = run_in_two_processes("--resume", "runs/custom-py-dull", "--epochs", 2)
    assert sorted(os.listdir("runs")) == ["custom-py-dull", "one"]  # both processes share a folder
    one = Path("runs/one")
    two = Path("runs/custom-py-dull")

    start = weights(load_policy(small(seed=1)))
    trained_by_one = torch.load(one / "checkpoint.pt")["weights"]
    trained_by_two = torch.load(two / "checkpoint.pt")["weights"]
    way = (trained_by_one - start).norm()
    assert (trained_by_one - trained_by_two).norm() < 0.01 * way
    for of_one, of_two in zip(read_metrics(one), read_metrics(two), strict=True):
        assert of_one.keys() == of_two.keys()
        for key in of_one.keys() - {"kl", "clip_low", "clip_high"}:  # tiny, or a count of few
            assert of_one[key] == pytest.approx(of_two[key], rel=1e-2, abs=1e-6), key
    images_of_one, _ = flow_grpo.read_images(one / "samples/0000")
    images_of_two, _ = flow_grpo.read_images(two / "samples/0000")
    for a, b in zip(images_of_one, images_of_two, strict=True):
        assert difference(a, b) <= 1

    assert "on 2 x cpu" in said[0] and "epoch 0/1" in said[0]
    # Two of the training file, and the same two of the test file
    assert "4 prompts are longer than --max_sequence_length 14 and get cut off" in said[0]
    assert "epoch 2/2" in said_then[0]
    assert said[1] == said_then[1] == ""  # one process speaks
