"""The specification of flow_grpo.py and rewards.py. No GPU, no downloads: pytest test_flow_grpo.py

In the order of flow_grpo.py, then whole runs of the toy. toy/golden.json has the official numbers.
"""
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import flow_grpo
import rewards
from flow_grpo import Config, load_policy, make_step, sde_mean, sde_step
from toy import tiny, world

torch.set_num_threads(1)  # for tensors as small as here, more threads only wait for each other
HERE = Path(__file__).resolve().parent
GOLDEN = json.loads((HERE / "toy/golden.json").read_text())
TINY_SD3 = tempfile.mkdtemp()  # a hundred times smaller than the toy
tiny.pipeline("sd3").save_pretrained(TINY_SD3)


def close(a, b, tolerance=2e-5):
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    torch.testing.assert_close(a, b.to(a.dtype), rtol=tolerance, atol=tolerance)


def exits(function, *args, **options):
    """The line with which sys.exit or a RewardError ends the run"""
    with pytest.raises((SystemExit, rewards.RewardError)) as stopped:
        function(*args, **options)
    message = str(stopped.value)
    assert message and "\n" not in message
    return message


# ------------------------------------------------------------------------------ 1. the mathematics
OFFICIAL = GOLDEN["official"]
X, V, V_REF, NOISE = (torch.tensor(OFFICIAL[key]).view(2, 2, 2, 2)
                      for key in ("x", "v", "v_ref", "noise"))


@pytest.mark.parametrize("i", [0, 4, 8])  # 0: t = 1, where sigma needs the second time
@pytest.mark.parametrize("sde, noise_level", [("flow", 0.7), ("cps", 0.8)])
def test_a_step_gives_the_official_numbers(sde, noise_level, i):
    expected = OFFICIAL[sde][str(i)]
    step = make_step(torch.tensor(OFFICIAL["times"]), i, noise_level, sde)
    x_next, log_prob, mean = sde_step(X, V, step, fresh_noise=NOISE)
    close(x_next.flatten(), expected["x_next"])
    close(mean.flatten(), expected["mean"])
    close(step.kl_std.item(), expected["kl_std"])
    if sde == "flow":  # CPS's official log-probability is none: it has no variance in it
        close(log_prob, expected["log_prob"])
    gaussian = torch.distributions.Normal(mean, step.std)
    close(log_prob, gaussian.log_prob(x_next).mean((1, 2, 3)))
    again, log_prob_again, _ = sde_step(X, V, step, x_next=x_next)
    assert torch.equal(again, x_next) and torch.equal(log_prob_again, log_prob)  # bit for bit

    reference = torch.distributions.Normal(sde_mean(X, V_REF, step), step.std)
    penalty = flow_grpo.kl_penalty(mean, reference.mean, step.kl_std)
    close(penalty.mean() / expected["kl"], 1.0, 1e-3)
    kl = torch.distributions.kl_divergence(gaussian, reference).mean((1, 2, 3))
    times_dt = (step.t - step.s).item() if sde == "flow" and i > 0 else 1
    if sde == "cps" or i > 0:
        close(penalty / (kl * times_dt), torch.ones(2), 1e-3)


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
def test_a_step_is_equation_9_and_without_noise_the_euler_step(noise_level):
    """With a tensor of step numbers, each image has its own step."""
    step = make_step(torch.linspace(1, 0, 11), torch.tensor([0, 8]), noise_level)
    t, dt, sigma = step.t, step.s - step.t, step.kl_std
    assert t.flatten().tolist() == pytest.approx([1, 0.2])
    close(sde_mean(X, V, step), X + (V + sigma**2 / (2 * t) * (X + (1 - t) * V)) * dt)
    close(step.std, sigma * (-dt).sqrt())
    close(sigma.flatten(), noise_level * torch.tensor([1 / 0.1, 0.2 / 0.8]).sqrt())


def test_the_mathematics_is_in_float32_whatever_its_input_is():
    step = make_step(torch.linspace(1, 0, 11), 3, 0.7)
    x, v = X.bfloat16(), V.bfloat16()
    mean = sde_mean(x, v, step)
    assert mean.dtype == torch.float32 and torch.equal(mean, sde_mean(x.float(), v.float(), step))


@pytest.mark.parametrize("keep, right", [
    (lambda step: step.keep, True),
    (lambda step: step.s, False),  # no old noise goes for the fresh noise,
    (lambda step: (step.keep + step.s) / 2, False),  # or half of what should,
    (lambda step: 2 * step.s - step.keep, False)])  # or the drift has the wrong sign
def test_the_sde_keeps_the_marginals_of_the_ode_at_every_time(keep, right):
    """The claim of section 4.2, for data from N(0, 0.5^2), for which v is known

    The grid begins at 0.95, as at t = 1 sigma is its own choice. The tolerance is five standard
    errors of 40,000 samples, and 0.01 for the size of the steps.
    """
    def variance(t):
        return (1 - t) ** 2 * 0.5**2 + t**2

    torch.manual_seed(0)
    times = torch.linspace(0.95, 0, 201)
    x = variance(0.95) ** 0.5 * torch.randn(40_000, 1, 1, 1)
    worst = 0
    for i in range(200):
        step = make_step(times, i, 0.7)
        step = step._replace(keep=keep(step))
        v = (step.t - (1 - step.t) * 0.5**2) / variance(step.t) * x  # E[noise - data], given x
        x, _, _ = sde_step(x, v, step, fresh_noise=torch.randn_like(x))
        worst = max(worst, (x.std() / variance(step.s).sqrt() - 1).abs())
    tolerance = 5 / 80_000**0.5 + 0.01
    assert worst < tolerance if right else worst > 2 * tolerance


@pytest.mark.parametrize("std_over", ["epoch", "group"])
def test_advantages_are_the_official_numbers(std_over):
    got = flow_grpo.group_advantages(torch.tensor(OFFICIAL["rewards"]).view(3, 4), std_over)
    close(got.flatten(), OFFICIAL["advantages"]["batch" if std_over == "epoch" else "group"])
    assert flow_grpo.group_advantages(torch.tensor([[0.0] * 99 + [1e9]]), std_over).max() == 5
    assert flow_grpo.group_advantages(torch.tensor([[0.0] * 99 + [-1e9]]), std_over).min() == -5
    for value in (0.1, 1 / 3, 0.7, 1e6):  # equal rewards give exactly 0
        scores = torch.full((2, 7), value)
        scores[1, 0] = 0
        equal, different = flow_grpo.group_advantages(scores, std_over)
        assert (equal == 0).all() and (different != 0).all()


@pytest.mark.parametrize("advantage, ratio, has_gradient", [
    (1, 1.1, False), (1, 0.9, True), (-1, 0.9, False), (-1, 1.1, True), (1, 1.02, True)])
def test_clipping_stops_the_gradient_on_its_side_only(advantage, ratio, has_gradient):
    r = torch.tensor([ratio], requires_grad=True)
    loss = flow_grpo.clipped_loss(r, torch.tensor([advantage]), 0.05)
    loss.sum().backward()
    assert r.grad.item() == (-advantage if has_gradient else 0)
    clipped = min(max(ratio, 0.95), 1.05)
    assert loss.item() == pytest.approx(-min(ratio * advantage, clipped * advantage))


# -------------------------------------------------------------------------------------- 2. rollout
PROMPTS = ['a sign that says "CAT"', 'a sign that says "DOG"']
SMALL = dict(
    model=TINY_SD3, resolution=32, groups=2, group_size=4, batch_size=8, train_steps=6, window=2,
    latest_start=3, guidance=2.0, same_noise=False, updates=2, beta=0.0, learning_rate=1.5e-3,
    clip_range=1e-3, eval_prompts=2, eval_steps=4)
FIRST = range(8)
FRESH = range(100, 108)


def small(**options):
    return Config(**SMALL | options)


def perturb(policy, size=0.02):
    """The LoRA of a policy that has learned something"""
    torch.manual_seed(1)
    for p in policy.params:
        p.data += size * torch.randn_like(p)
    return policy


def draw(policy, window=range(1, 3), **changes):
    config = replace(policy.config, **changes)
    return flow_grpo.rollout(policy, config, PROMPTS, FIRST, config.train_steps, window, FRESH)


def pixels(image):
    return np.asarray(image, float)


@pytest.mark.parametrize("sde, noise_level, guidance", [
    ("flow", 0.7, 2.0), ("flow", 0.3, 1.0), ("cps", 0.7, 1.0)])
def test_a_rollout_is_the_ode_with_sde_steps_in_its_window(sde, noise_level, guidance):
    """Against plain loops, image for image. The options that the method reads change it."""
    policy = perturb(load_policy(small(sde=sde, noise_level=noise_level, guidance=guidance)))
    drawn = draw(policy, range(1, 3))
    assert drawn.latents.shape == (8, 3, 4, 16, 16) and drawn.log_prob.shape == (8, 2)
    assert drawn.window == range(1, 3) and torch.equal(drawn.times, policy.time_grid(6))
    for image in (0, 3, 5):
        condition = policy.encode([PROMPTS[image // 4]])
        generator = torch.Generator().manual_seed(FRESH[image])
        x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(FIRST[image]))
        with torch.no_grad():
            for i in range(6):
                v = policy.velocity(x, drawn.times[i], condition)
                if i in (1, 2):
                    close(drawn.latents[image, i - 1], x[0], 1e-4)
                    step = make_step(drawn.times, i, noise_level, sde)
                    fresh_noise = torch.randn(1, 4, 16, 16, generator=generator)
                    x, log_prob, _ = sde_step(x, v, step, fresh_noise)
                    close(drawn.latents[image, i], x[0], 1e-4)
                    close(drawn.log_prob[image, i - 1], log_prob[0], 1e-4)
                else:
                    x = x + v * (drawn.times[i + 1] - drawn.times[i])
        assert np.abs(pixels(policy.decode(x)[0]) - pixels(drawn.images[image])).max() <= 1


def test_an_image_depends_on_its_seeds_and_its_prompt_alone():
    """Not on its pass through the network. So an empty window gives the ODE's image."""
    policy = load_policy(small(guidance=1.0))
    whole, parts = draw(policy), draw(policy, batch_size=3)
    close(whole.latents, parts.latents, 1e-4)
    close(whole.log_prob, parts.log_prob, 1e-4)
    assert np.abs(pixels(whole.images[6]) - pixels(parts.images[6])).max() <= 1
    with torch.no_grad():
        one = flow_grpo.rollout(policy, policy.config, PROMPTS[1:], [6], 6, range(1, 3), [106])
        ode = flow_grpo.rollout(policy, policy.config, PROMPTS, [5, 6], 6, range(0))
    close(one.latents[0], whole.latents[6], 1e-4)
    assert np.abs(pixels(ode.images[1]) - pixels(one.images[0])).max() > 10
    assert ode.log_prob.shape == (2, 0)


@pytest.mark.parametrize("steps, window", [(4, 1), (5, 2), (10, 8)])
def test_the_window_never_has_the_last_step(steps, window):
    latest = steps - 1 - window
    config = small(train_steps=steps, window=window, latest_start=latest)
    windows = {flow_grpo.choose_window(config, random.Random(i)) for i in range(200)}
    assert windows == {range(start, start + window) for start in range(latest + 1)}
    assert flow_grpo.choose_window(replace(config, window=0), None) == range(steps - 1)


# --------------------------------------------------------------------------------------- 3. update
def weights(policy):
    return torch.cat([p.detach().flatten() for p in policy.params])


def gradient(policy):
    """Of all that is trained, in one row, and then none is left"""
    row = torch.cat([p.grad.flatten() for p in policy.params])
    policy.optimizer.zero_grad()
    return row


def learn(policy, drawn, advantages=torch.linspace(-1, 1, 8)):
    return flow_grpo.update(policy, policy.config, drawn, advantages)


@pytest.mark.parametrize("guidance, precision", [(1.0, "fp32"), (2.0, "fp32"), (2.0, "bf16")])
def test_before_the_first_update_the_ratio_is_1_and_for_the_base_the_kl_is_0(guidance, precision):
    policy = load_policy(small(updates=1, guidance=guidance, precision=precision, train_steps=3))
    first = learn(policy, draw(policy, range(1, 2)))
    moved = learn(perturb(policy), draw(policy, range(1, 2)))
    assert first["kl"] == 0 < moved["kl"]
    assert max(first["ratio_deviation"], moved["ratio_deviation"]) < 1e-5


def test_a_wrong_ratio_stops_the_run_whichever_image_has_it():
    """The last micro-batch of the first update holds the image that is off."""
    policy = load_policy(small(batch_size=3, guidance=1.0))
    drawn, before = draw(policy), weights(policy)
    right = drawn.log_prob.clone()
    for image, off, problem in [(5, 0.1, "off by 0.095"), (0, -0.1, "must be 1"),
                                (5, torch.nan, "not finite"), (7, torch.nan, "not finite")]:
        drawn.log_prob = right.clone()
        drawn.log_prob[image, 1] += off
        assert problem in exits(learn, policy, drawn)
        assert torch.equal(weights(policy), before) or image == 7  # it is in the second update


@pytest.mark.parametrize("off, clip_range, right", [
    (5e-6, 1e-5, True), (2e-5, 1e-5, False), (4e-5, 1e-4, True), (6e-5, 1e-4, False),
    (9e-5, 1e-2, True), (1.2e-4, 1e-2, False)])
def test_a_ratio_may_be_off_by_rounding_and_by_half_of_the_clip_range(off, clip_range, right):
    for sign in (1, -1):
        ratio = 1 + sign * off * torch.tensor([0.0, 1.0], dtype=torch.float64)
        flow_grpo.check_ratio(ratio, clip_range, is_first=False)
        if right:
            flow_grpo.check_ratio(ratio, clip_range, is_first=True)
        else:
            assert "off by" in exits(flow_grpo.check_ratio, ratio, clip_range, is_first=True)


def equation_5(policy, drawn, advantages, images):
    """Its gradient by plain loops: every image at every step, one at a time, and the mean of all"""
    losses = []
    for image in images:
        for k, i in enumerate(drawn.window):
            step = make_step(drawn.times, i, policy.config.noise_level, policy.config.sde)
            condition = [c[image:image + 1] for c in drawn.condition]
            x, x_next = drawn.latents[image:image + 1, k], drawn.latents[image:image + 1, k + 1]
            v = policy.velocity(x, step.t, condition)
            _, log_prob, mean = sde_step(x, v, step, x_next=x_next)
            ratio = torch.exp(log_prob - drawn.log_prob[image, k])
            with policy.reference(), torch.no_grad():
                mean_ref = sde_mean(x, policy.velocity(x, step.t, condition), step)
            kl = ((mean - mean_ref) ** 2).mean() / (2 * step.kl_std.item() ** 2)
            losses.append(-ratio * advantages[image] + policy.config.beta * kl)
    torch.cat(losses).mean().backward()
    return gradient(policy)


@pytest.mark.parametrize("sde, noise_level", [("flow", 0.7), ("flow", 0.4), ("cps", 0.7)])
def test_an_update_is_the_gradient_of_equation_5(monkeypatch, sde, noise_level):
    """The first update has the first half of each group, and micro-batches do not divide it."""
    options = dict(beta=0.3, sde=sde, noise_level=noise_level, batch_size=3, guidance=1.0)
    policy = perturb(load_policy(small(**options)), 0.005)
    drawn = draw(policy, range(2, 4))
    advantages = torch.tensor([1.0, 0.0, -0.5, 0.0, 2.0, 0.0, 0.0, -1.0])
    expected = [equation_5(policy, drawn, advantages, images)
                for images in ((0, 1, 4, 5), (2, 3, 6, 7))]
    got = []
    monkeypatch.setattr(policy.optimizer, "step", lambda: got.append(gradient(policy)))
    metrics = learn(policy, drawn, advantages)
    for own, wanted in zip(got, expected, strict=True):
        assert 0 < wanted.norm() < 1  # below 1 it was not clipped
        close(own / wanted.norm(), wanted / wanted.norm(), 1e-4)
    norms = [gradient.norm() for gradient in expected]
    assert metrics["grad_norm"] == pytest.approx(sum(norms).item() / 2, rel=1e-3)


def test_the_metrics_of_an_update(monkeypatch):
    """Over both updates. None of them keeps a graph alive."""
    kl = torch.tensor([0.5, 0.0, 0.1, 0.0], requires_grad=True)
    terms = [(kl, kl, torch.tensor(ratio, requires_grad=True))
             for ratio in ([1.0] * 4, [1.2, 0.85, 1.11, 1.0])]
    monkeypatch.setattr(flow_grpo, "losses", Mock(side_effect=terms))
    policy = Mock(config=small(groups=1, clip_range=0.1), optimize=Mock(side_effect=[0.25, 0.75]))
    metrics = learn(policy, Mock(window=range(2)), torch.zeros(4))
    assert {key: float(value) for key, value in metrics.items()} == pytest.approx(dict(
        kl=0.15, ratio_deviation=0.2, clip_low=0.125, clip_high=0.25, grad_norm=0.5), rel=1e-4)
    assert not any(torch.is_tensor(value) and value.requires_grad for value in metrics.values())


def test_what_is_not_finite_stops_the_run_and_says_where_it_came_from(monkeypatch):
    policy = load_policy(small())
    drawn, before, advantages = draw(policy), weights(policy), torch.zeros(8)
    advantages[5] = torch.nan
    assert "gradient is not finite: lower --learning_rate" in exits(
        learn, policy, drawn, advantages)
    assert torch.equal(weights(policy), before)
    policy.params[0].data[:] = torch.nan
    message = exits(draw, policy)
    assert "velocity at t = 1.000 is not finite" in message
    assert f"--model {TINY_SD3} itself" in message
    policy.updates = 1
    assert "lower --learning_rate" in exits(draw, policy)
    assert "pixels" in exits(policy.decode, torch.full((1, 4, 16, 16), torch.nan))


# ------------------------------------------------------------------------------------- 4. training
def gray(*levels):
    return [Image.new("RGB", (8, 8), (level, level, level)) for level in levels]


def bright(images, prompts, metadata):
    return [image.getpixel((0, 0))[0] / 255 for image in images]


def half(images, prompts, metadata):
    return [0.5] * len(images)


@pytest.mark.parametrize("same_noise", [True, False])
def test_an_epoch_has_its_own_prompts_and_seeds(monkeypatch, same_noise):
    """They depend on seed and epoch only. With same_noise each group has one first noise."""
    calls = []
    monkeypatch.setattr(flow_grpo, "rollout", lambda *args: calls.append(args[2:]) or 1 / 0)
    config = small(groups=3, group_size=5, same_noise=same_noise)
    train_set = [{"prompt": f"prompt {number}"} for number in range(7)]
    runs = [*((epoch, 0) for epoch in range(1, 50)), (1, 1), (1, 0)]
    for epoch, seed in runs:
        with pytest.raises(ZeroDivisionError):
            flow_grpo.train_epoch(None, replace(config, seed=seed), None, train_set, epoch)
    assert calls[-1] == calls[0]
    for prompts, first_seeds, T, window, fresh_seeds in calls:
        assert len(set(prompts)) == 3 and T == 6 and len(window) == 2
        groups = [first_seeds[5 * group:5 * group + 5] for group in range(3)]
        assert [len(set(group)) for group in groups] == [1 if same_noise else 5] * 3
        assert len(set(first_seeds)) == (3 if same_noise else 15) and len(set(fresh_seeds)) == 15
    assert len({tuple(prompts) for prompts, *_ in calls}) > 40
    assert len({window for *_, window, _ in calls}) == 4
    for place in (1, 4):
        assert len({seed for call in calls[:-1] for seed in call[place]}) == (
            150 if place == 1 and same_noise else 750)


@pytest.mark.parametrize("number", [3, 4, 5])
def test_no_prompt_comes_twice_while_there_are_enough(monkeypatch, number):
    """And a dataset may be smaller than an epoch."""
    calls = []
    monkeypatch.setattr(flow_grpo, "rollout", lambda *args: calls.append(args[2]) or 1 / 0)
    train_set = [{"prompt": str(i)} for i in range(number)]
    for epoch in range(20):
        with pytest.raises(ZeroDivisionError):
            flow_grpo.train_epoch(None, small(groups=4), None, train_set, epoch)
    assert all(len(prompts) == 4 and len(set(prompts)) >= min(number, 2) for prompts in calls)
    assert number == 3 or all(len(set(prompts)) == 4 for prompts in calls)


def test_the_metrics_of_an_epoch(monkeypatch):
    """Three groups: rewards 0, 1, 0, 1, and twice four equal ones, which teach nothing"""
    drawn, updates = SimpleNamespace(images=gray(0, 255, 0, 255, *[51] * 8)), []
    train_set, config = [{"prompt": p} for p in "abc"], small(groups=3)
    monkeypatch.setattr(flow_grpo, "rollout", lambda *args: drawn)
    monkeypatch.setattr(flow_grpo, "update", lambda *args: updates.append(args) or {"kl": 0.25})
    reward = {"bright": (bright, 2.0), "half": (half, 0.5)}
    metrics = flow_grpo.train_epoch(None, config, reward, train_set, 1)
    total = np.array([0, 2, 0, 2, *[0.4] * 8]) + 0.25
    assert {key: float(value) for key, value in metrics.items()} == pytest.approx({
        "reward/bright": 0.3, "reward/half": 0.5, "reward": total.mean(), "kl": 0.25,
        "group_std": 1 / 3, "no_signal": 2 / 3})
    (_, _, its_drawn, advantages), = updates
    assert its_drawn is drawn
    close(advantages, [-1 / total.std(), 1 / total.std()] * 2 + [0] * 8, 1e-3)
    flow_grpo.train_epoch(None, replace(config, std_over="group"), reward, train_set, 1)
    close(updates[1][3], [-1, 1] * 2 + [0] * 8, 1e-3)
    huge = {"bright": (bright, 1e300)}
    assert "advantage" in exits(flow_grpo.train_epoch, None, config, huge, train_set, 1)


def test_an_evaluation_measures_the_average_from_the_same_seeds_every_time(monkeypatch, tmp_path):
    """An image is right if the first reward is 1, and only if that reward can be right."""
    monkeypatch.setattr(rewards, "HAVE_A_RIGHT_ANSWER", ("bright",))
    config = small(eval_prompts=3, eval_per_prompt=2, eval_steps=7, seed=5)
    policy, asked = load_policy(config), []
    before = weights(policy)
    policy.average += 1

    def rollout(policy, config, *args):
        asked.append(args)
        close(weights(policy), before + 1)
        return SimpleNamespace(images=gray(255, 0, 254, 255, 51, 102)[:len(args[1])])
    monkeypatch.setattr(flow_grpo, "rollout", rollout)
    reward = {"bright": (bright, 0.5), "half": (half, 1.0)}
    test_set = [{"prompt": "a", "tag": "x"}, {"prompt": "b", "tag": "y"},
                {"prompt": "c", "tag": "x"}, {"prompt": "d"}]
    metrics = flow_grpo.evaluate(policy, config, reward, test_set, tmp_path / "0012")
    assert asked == [(["a", "b", "c"], [0, 1, 2, 3, 4, 5], 7, range(0))]
    of_bright = (255 + 0 + 254 + 255 + 51 + 102) / 6 / 255
    expected = {
        "eval_reward": of_bright / 2 + 0.5, "eval_reward/bright": of_bright,
        "eval_reward/half": 0.5, "eval_accuracy": 1 / 3, "eval_accuracy/x": 0.25,
        "eval_accuracy/y": 0.5}
    assert {key: float(value) for key, value in metrics.items()} == pytest.approx(expected)
    assert torch.equal(weights(policy), before)
    shown = flow_grpo.read_images(tmp_path / "0012")  # the first image of each prompt
    assert [(image.getpixel((0, 0))[0], prompt) for image, prompt, _ in shown] == [
        (255, "a"), (254, "b"), (51, "c")]
    assert [score for *_, score in shown] == pytest.approx([1, 0.5 + 127 / 255, 0.6])

    everything = replace(config, eval_prompts=0, eval_per_prompt=1, seed=9)
    metrics = flow_grpo.evaluate(policy, everything, {"half": (half, 1)}, test_set, tmp_path / "b")
    assert asked[1] == (["a", "b", "c", "d"], [0, 1, 2, 3], 7, range(0))
    assert set(metrics) == {"eval_reward", "eval_reward/half"}


def test_redness():
    images = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "white", (255, 51, 102))]
    assert flow_grpo.redness(images, None, None) == pytest.approx([1, -1, 0, 0.6])


# ---------------------------------------------------------------------------------- 5. the network
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lora_is_on_the_official_layers_in_float32_and_begins_as_the_seed_says(precision):
    policy, again, other = (
        load_policy(Config(precision=precision, gradient_checkpointing=True, seed=seed))
        for seed in (0, 0, 1))
    assert policy.network.is_gradient_checkpointing
    assert torch.equal(weights(policy), weights(again))
    assert not torch.equal(weights(policy), weights(other))
    trained = {name: p for name, p in policy.network.named_parameters() if p.requires_grad}
    layers = {re.sub(r".*transformer_blocks\.\d+\.attn\.|\.lora_.*", "", name) for name in trained}
    assert layers == set(
        "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out".split())
    assert len(trained) == 2 * (4 * 8 - 1)  # the last block has no to_add_out
    assert {p.dtype for p in trained.values()} == {torch.float32} == {policy.pipe.vae.dtype}
    assert policy.network.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    lora = policy.network.peft_config["default"]
    assert (lora.r, lora.lora_alpha) == (32, 64)


def test_in_bf16_only_the_network_is_rounded():
    policy = perturb(load_policy(small(precision="bf16", guidance=4.37)))
    given = []
    policy.forward = lambda x, t, *condition: given.append((x, t)) or x * (1 + len(given))
    x = torch.ones(2, 4, 16, 16)
    v = policy.velocity(x, torch.tensor([0.999, 0.4441]), policy.encode(PROMPTS))
    for x, t in given:
        assert x.dtype == torch.bfloat16 and t.tolist() == pytest.approx([0.999, 0.4441], rel=1e-6)
    assert v.dtype == torch.float32
    close(v, torch.full_like(v, 3 + 4.37 * (2 - 3)))


def test_both_branches_of_guidance_carry_gradient():
    policy = perturb(load_policy(small(guidance=3.0)))
    condition, x, t = policy.encode(PROMPTS[:1]), torch.ones(1, 4, 16, 16), torch.tensor(0.7)
    guided = policy.velocity(x, t, condition)
    guided.sum().backward()
    its_gradient = gradient(policy)
    policy.config.guidance = 1.0
    plain, empty = policy.velocity(x, t, condition), policy.velocity(x, t, policy.encode([""]))
    by_hand = empty + 3 * (plain - empty)
    by_hand.sum().backward()
    close(guided, by_hand, 1e-4)
    close(its_gradient, gradient(policy), 1e-3)


def test_prompts_are_encoded_in_micro_batches_each_as_if_alone():
    policy = load_policy(small(batch_size=2))
    prompts = [*PROMPTS, PROMPTS[0], "a photo of a red circle", PROMPTS[1]]
    for together, *alone in zip(policy.encode(prompts), *map(policy.encode, ([p] for p in prompts)),
                                strict=True):
        close(together, torch.cat(alone))
        assert together.device.type == "cpu" and not together.requires_grad


def test_offload_lets_the_network_and_the_text_encoders_take_turns(monkeypatch):
    policy, moves = load_policy(small(offload=True)), []
    assert len(policy.encoders) == 3
    for name, module in (("network", policy.network), ("encoders", policy.encoders)):
        monkeypatch.setattr(module, "cpu", lambda name=name: moves.append(f"{name} leaves"))
        monkeypatch.setattr(module, "to", lambda _, name=name: moves.append(f"{name} comes"))
    policy.encode(PROMPTS)
    assert moves == ["network leaves", "encoders comes", "encoders leaves", "network comes"]


def optimize(policy, norm):
    """One update with a gradient of this norm"""
    for p in policy.params:
        p.grad = torch.full_like(p, norm / len(weights(policy)) ** 0.5)
    return policy.optimize()


def test_a_gradient_is_clipped_at_1_and_its_norm_before_that_is_noted(monkeypatch):
    policy, clipped = load_policy(small(adam_eps=1e-9)), []
    options = policy.optimizer.param_groups[0]
    assert (options["eps"], options["weight_decay"], options["lr"]) == (1e-9, 1e-4, 1.5e-3)
    assert options["betas"] == (0.9, 0.999) and type(policy.optimizer) is torch.optim.AdamW
    monkeypatch.setattr(policy.optimizer, "step", lambda: clipped.append(gradient(policy).norm()))
    for norm in (0.5, 7.0):
        assert optimize(policy, norm) == pytest.approx(norm, rel=1e-3)
    # The gradients of two processes are added up first.
    monkeypatch.setattr(flow_grpo, "reduce", lambda grad, how: 2 * grad if how == "sum" else grad)
    assert optimize(policy, 0.9) == pytest.approx(1.8, rel=1e-3)
    close(torch.stack(clipped), [0.5, 1.0, 1.0], 1e-3)


@pytest.mark.parametrize("options, updates_before, expected", [
    (dict(ema_every=1), 0, [1 - 2 / 11]),  # the decay is (1 + n) / (10 + n), this update counted
    (dict(ema_every=2), 0, [0, 2 * (1 - 3 / 12), 2 * (1 - 3 / 12)]),
    (dict(ema_decay=0.9), 1000, [0.1]),
    (dict(ema_decay=0.0, ema_every=3), 0, [1, 2])])  # off: the weights themselves
def test_the_average_grows_into_its_decay(monkeypatch, options, updates_before, expected):
    """How far it has come, when every update adds 1 to all weights"""
    policy = load_policy(small(**options))
    monkeypatch.setattr(policy.optimizer, "step",
                        lambda: [p.data.add_(1) for p in policy.params])
    policy.updates = updates_before
    start = policy.average.clone()
    for far in expected:
        optimize(policy, 0)
        close((policy.average - start).mean(), far, 1e-4)


def stock_image(pipe, prompt, seed, **options):
    """What diffusers itself draws, as the README says"""
    pipe.set_progress_bar_config(disable=True)
    if "Sana" in type(pipe).__name__:
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        options["use_resolution_binning"] = False  # it would draw another size
    generator = torch.Generator().manual_seed(seed)
    image, = pipe(prompt, generator=generator, height=32, width=32, max_sequence_length=14,
                  **options).images
    return pixels(image)


FAMILIES = ["toy", "sd3", "flux", "flux-schnell", "sana"]
TEXTS = ["a <pad> cat", "a dog"]  # of different lengths for every tokenizer


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A function: the name of a family -> its tiny stock pipeline, and a folder with it"""
    made = {}

    def get(name):
        if name not in made:
            pipe, folder = tiny.pipeline(name), str(tmp_path_factory.mktemp(name))
            pipe.save_pretrained(folder)
            made[name] = (pipe, folder)
        return made[name]
    return get


def ode_images(policy):
    drawn = flow_grpo.rollout(policy, policy.config, TEXTS, [3, 4], 6, range(0))
    return [pixels(image) for image in drawn.images]


@pytest.mark.parametrize("name, guidance", [
    *((name, guidance) for name in FAMILIES[1:] for guidance in (1.0, 2.0)), ("toy", 1.0)])
def test_a_rollout_without_noise_is_the_stock_pipelines_image(family, name, guidance):
    """For another model, add it to FAMILIES and to toy/tiny.py. If this test and the next pass, the
    class is right, but for the choice of its lora_layers."""
    pipe, folder = family(name)
    policy = load_policy(small(model=folder, resolution=32, guidance=guidance))
    embeds, _ = policy.encode(TEXTS)
    assert not torch.equal(*embeds), "the prompts are cut off: does an instruction fill 14 tokens?"
    for image, text, seed in zip(ode_images(policy), TEXTS, (3, 4)):
        expected = stock_image(pipe, text, seed, num_inference_steps=6, guidance_scale=guidance)
        assert image.shape == (32, 32, 3) and np.abs(image - expected).max() <= 1
    for _ in range(2):  # asked again, the times are not shifted again (diffusers PR 13962)
        close(policy.time_grid(6), pipe.scheduler.sigmas)


MISTAKES = {
    "1 - t": lambda forward: lambda x, t, *c: forward(x, 1 - t, *c),
    "t in thousandths": lambda forward: lambda x, t, *c: forward(x, t / 1000, *c),
    "-v": lambda forward: lambda x, t, *c: -forward(x, t, *c),
    "no second condition": lambda forward: lambda x, t, a, b: forward(x, t, a, torch.ones_like(b)),
    "the first prompt's second condition": lambda forward: lambda x, t, a, b: forward(
        x, t, a, b[:1].expand_as(b)),
    "the first prompt": lambda forward: lambda x, t, *c: forward(
        x, t, *[part[:1].expand_as(part) for part in c]),
    "one token": lambda forward: lambda x, t, a, b: forward(x, t, a[:, :1].expand_as(a), b),
}


@pytest.mark.parametrize("name", FAMILIES[1:])
def test_a_mistake_in_the_class_of_a_family_would_be_seen(family, name):
    """By far more than the one gray level that the test above allows"""
    _, folder = family(name)
    policy = load_policy(small(model=folder, resolution=32, guidance=1.0))
    right, forward = ode_images(policy), policy.forward
    for mistake, wrong in MISTAKES.items():
        policy.forward = wrong(forward)
        assert max(np.abs(a - b).max() for a, b in zip(right, ode_images(policy))) >= 8, mistake


@pytest.mark.parametrize("preset, real", GOLDEN["networks"].items())
def test_the_lora_at_the_real_size(preset, real, monkeypatch):
    """The real networks' own configurations, without their weights"""
    kind = getattr(flow_grpo, real["policy"])
    monkeypatch.setattr(flow_grpo.WORLD, "device", "meta")
    monkeypatch.setattr(kind, "encode", Mock())
    with torch.device("meta"):
        network = getattr(diffusers, real["class"])(**real["config"])
        pipe = Mock(transformer=network, components={}, vae_scale_factor=8)
        policy = kind(pipe, Config(**flow_grpo.PRESETS[preset]))
    assert len(policy.params) == real["lora_tensors"]
    assert sum(p.numel() for p in policy.params) == real["lora_weights"]


def with_scheduler(folder, changes, kind=None):
    path = Path(folder, "scheduler/scheduler_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    index = Path(folder, "model_index.json")
    if kind:
        index.write_text(index.read_text().replace("FlowMatchEulerDiscreteScheduler", kind))
        path.write_text(path.read_text().replace("FlowMatchEulerDiscreteScheduler", kind))


@pytest.mark.parametrize("changes, kind", [
    ({"shift": 1.43}, None), ({"shift": 1.32}, None), ({"shift": 5.0}, None),
    ({}, "FlowMatchHeunDiscreteScheduler"), ({}, "EulerDiscreteScheduler"),
    ({"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
     "DPMSolverMultistepScheduler"),
    ({"use_flow_sigmas": True, "prediction_type": "flow_prediction"}, "UniPCMultistepScheduler")])
def test_the_times_fall_from_1_to_0_or_the_scheduler_is_refused(tmp_path, changes, kind):
    folder = tmp_path / "model"
    shutil.copytree(HERE / "toy", folder, ignore=shutil.ignore_patterns("pickscore", "*.py"))
    with_scheduler(folder, changes, kind)
    config = Config(model=str(folder))
    if kind:
        assert kind in exits(load_policy, config)
    else:
        times = load_policy(config).time_grid(10)
        assert times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()
        assert make_step(times, 0, 0.7).std.item() == pytest.approx(0.7, rel=1e-4)


def test_flux_takes_its_times_from_its_schedulers_configuration(family, tmp_path):
    pipe, folder = family("flux")
    shutil.copytree(folder, tmp_path / "flux")
    with_scheduler(tmp_path / "flux", dict(
        base_shift=0.1, max_shift=2.0, base_image_seq_len=16, max_image_seq_len=128))
    changed = stock = diffusers.FluxPipeline.from_pretrained(tmp_path / "flux")
    for model, pipe in ((folder, pipe), (tmp_path / "flux", changed)):
        stock = stock_image(pipe, "a", 0, num_inference_steps=6, guidance_scale=1.0)
        times = load_policy(small(model=str(model), resolution=32)).time_grid(6)
        close(times, pipe.scheduler.sigmas)
    assert stock is not None and (times - load_policy(
        small(model=folder, resolution=32)).time_grid(6)).abs().max() > 0.1


def test_prompts_that_the_model_does_not_fully_see_are_named(capsys):
    config = Config(max_sequence_length=11)
    policy = load_policy(config)
    rows = [{"prompt": p} for p in ('a sign that says "CAT"', "a photo of a bench",
                                    'a sign that says "CATALOGUES"')]
    flow_grpo.warn_about_prompts(policy, config, rows)
    said = capsys.readouterr().out
    assert "1 prompts are longer than --max_sequence_length 11" in said and "CATALOGUES" in said
    assert "1 prompts have words that the model does not know, such as 'a photo of a bench'" in said
    flow_grpo.warn_about_prompts(policy, config, rows[:1])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("old, new", [
    (b"StableDiffusion3Pipeline", b"StableDiffusion3Img2ImgPipeline"),
    (b"proj_out.weight", b"proj_out.waits_"),  # a tensor that is missing
    (b"shared.weight", b"shared")])  # a file that is too short
def test_a_damaged_model_is_one_line(tmp_path, old, new):
    shutil.copytree(HERE / "toy", tmp_path / "x", ignore=shutil.ignore_patterns("pickscore"))
    for path in filter(Path.is_file, (tmp_path / "x").rglob("*")):
        path.write_bytes(path.read_bytes().replace(old, new))
    assert f"--model {tmp_path}/x" in exits(load_policy, Config(model=f"{tmp_path}/x"))


# ------------------------------------------------------------------------------- rewards: the rules
PAPER = Image.new("RGB", (48, 48), "white")


def metadata(*include, tag=""):
    return {"tag": tag, "include": list(include)}


def asked(name, count=1, **more):
    return {"class": name, "count": count, **more}


def box(x, y):
    return (x, y, x + 10, y + 10)


def thing(name, x=0, y=0, color="red"):
    return {"class": name, "color": color, "box": box(x, y)}


def test_the_ocr_reward_reads_whole_words_in_several_lines():
    words = ["CAT", "LION", "MAP", "FROG", "XKWQ"]
    signs = [world.paint_sign(word, random.Random(word)) for word in words]
    prompts = [f'a sign that says "{word}"' for word in ("x y zCAT", *words[1:], "CAT")]
    images = [*signs[:4], signs[4].convert("CMYK"), PAPER]
    ocr = rewards.ocr()
    assert ocr(images, prompts, None) == [0.5, 1, 1, 1, 1, 0]
    two_lines = Image.fromarray(np.vstack([np.asarray(signs[1]), np.asarray(signs[3])]))
    assert ocr([two_lines], ['"lion FROG"'], None) == [1]
    with pytest.raises(rewards.RewardError):
        ocr.check(["no quotes"], None)


def test_the_ocr_rule():
    from rapidfuzz.distance import Levenshtein

    def score(text, target):
        return rewards.text_score(text, target, Levenshtein.distance)

    assert score("say HELLOWORLD!", "Hello World") == 1
    assert score("HELO", "HELLO") == pytest.approx(0.8)
    assert score("HELLLO", "HELLO") == pytest.approx(0.8)
    assert score("completely different", "HI") == 0  # never below 0
    assert score("You're", "You\u2019re") == 1 == score("You\u2019re", "You're\u00a0")
    assert score("caf\u00e9 fi 10", "cafe\u0301 \ufb01\t\uff11\uff10") == 1
    assert score("You\u2019re", "You're") == pytest.approx(5 / 6)  # as in the official code
    assert rewards.quoted('a "BIG CAT" and "X"') == "BIG CAT"
    for wrong in ('no quotes', 'one "', 'an empty ""', 'a 12" ruler with the word "GIRL"',
                  'a sign that says \\"GIRL\\"'):
        assert wrong in exits(rewards.quoted, wrong) or "\\" in wrong


@pytest.mark.parametrize(
    "tag", ["single_object", "two_object", "counting", "colors", "position", "color_attr"])
def test_geneval_knows_right_from_wrong(tag):
    rng, reward = random.Random(0), world.geneval()
    rows = rng.sample(world.scenes(tag), 4)
    prompts = [row["prompt"] for row in rows]
    good, bad = ([world.paint_scene(row, rng, careless=careless) for row in rows]
                 for careless in (False, True))
    assert reward(good, prompts, rows) == [1] * 4 and max(reward(bad, prompts, rows)) < 1


RED = asked("cup", color="red")
LEFT = asked("dog", position=["left of", 0])
VASE = asked("vase", position=["above", 0])
BLUE_CUP = thing("cup", color="blue")
CUPS = [thing("cup", 30), thing("cup", 60)]
HYDRANTS = [thing("hydrant", 0, 40), thing("hydrant", 3, 40), thing("vase")]


@pytest.mark.parametrize("found, include, score", [
    ([thing("cup")] * 3, [asked("cup", 4)], 0.75),
    ([thing("cup")] * 4, [asked("cup")], -2),  # PAPER: not cut off at 0
    ([], [asked("cup")], 0),
    ([thing("cup")], [RED], 1),
    ([thing("cup")], [asked("cup", color=None, position=None)], 1),  # null is the same as absent
    ([BLUE_CUP], [RED], 0.5),
    ([thing("cup")] * 2, [RED], 0),  # the count gives 0 and makes the color void
    ([thing("cup"), BLUE_CUP], [RED], 0),  # even if one of them is red
    ([thing("cup"), BLUE_CUP], [asked("cup", 2, color="red")], 0.75),
    ([thing("cup", 30), thing("dog", 0, 2)], [asked("cup"), LEFT], 1),
    ([thing("cup"), thing("dog", 30)], [asked("cup"), LEFT], 2 / 3),  # official code: 0.75
    ([thing("cup", 1), thing("dog")], [asked("cup"), LEFT], 2 / 3),  # too near to tell
    ([thing("dog")], [asked("cup"), LEFT], 1 / 3),
    ([thing("cup", 30), thing("dog"), thing("dog", 2)], [asked("cup"), LEFT], 1 / 3),  # two dogs
    ([*CUPS, thing("dog")], [asked("cup", 2), LEFT], 1),
    ([*CUPS, thing("dog", 45)], [asked("cup", 2), LEFT], 2 / 3),  # it must hold against both
    ([thing("cup", 30), thing("dog", 0, color="blue")],  # color wrong, so the place is void
     [asked("cup"), asked("dog", color="red", position=["left of", 0])], 0.5),
    # Nothing has a place next to what is itself wrong: numbers of the official evaluate_reward
    (HYDRANTS, [asked("hydrant"), VASE], 1 / 3),
    (HYDRANTS, [asked("hydrant", 2), VASE], 1),
    (HYDRANTS, [asked("hydrant", 2, color="blue"), VASE], 2 / 4)])
def test_the_geneval_rule(found, include, score):
    assert rewards.geneval_score(found, metadata(*include)) == pytest.approx(score)


@pytest.mark.parametrize("x, y, holds", [
    (30, 40, {"left of", "above"}), (-30, -40, {"right of", "below"}), (4, -40, {"below"}),
    (2, 0, set()),  # a tenth of the summed sizes is 2
    (2.1, 0, set()), (4.1, 0, {"left of"}), (-4.1, 0, {"right of"}), (0, 4.1, {"above"}),
    (30, 20, {"left of"}), (30, 24, {"left of", "above"})])  # (20 - 2) / 36.1 is just below 0.5
def test_where_a_box_lies_from_another(x, y, holds):
    """The other is x to the right and y below. Shortened by 2, more than half of the distance."""
    assert rewards.relations(box(0, 0), box(x, y)) == holds


@pytest.mark.parametrize("name", ["geneval", "toy_taste"])
def test_all_that_the_scoring_uses_is_checked_at_the_start(name):
    loaded, good = rewards.load(name, "--reward"), world.scenes("position")[0] | {"prompt": "good"}
    rewards.check(loaded, [good])

    def check(*include):
        row = {"prompt": "bad", "include": list(include)}
        problem = exits(rewards.check, loaded, [good, row])
        assert f"reward {name}: the prompt 'bad'" in problem
        return problem

    bench = check(asked("wine glass"))
    assert "asks for a wine glass; geneval_photo knows it" in bench and "circle" in bench
    assert "pink circle" in check(asked("circle", color="pink"))
    assert "*_metadata.jsonl" in check()
    for count in (None, 0, "2", 1.0, True, -1):
        assert "count of circle" in check(asked("circle", count))
    for position in (["left", 0], [None, 0]):
        assert "left of, right of, above, below" in check(
            asked("circle"), asked("cross", position=position))
    for number in (1, 2, -1, "0", None, True):  # itself, a later object, no object
        assert "comes before" in check(
            asked("circle"), asked("cross", position=["left of", number]), asked("square"))
    for position in ("left of", ["left of"]):
        assert "[relation, " in check(asked("circle"), asked("cross", position=position))


def shape(kind, color="red", radius=9, x=24, y=24, ground=(245, 245, 245)):
    image = Image.new("RGB", (192, 192), ground)
    ink = world.COLORS.get(color, color)
    world.draw_shape(world.ImageDraw.Draw(image), kind, 4 * x, 4 * y, 4 * radius, ink)
    return image.resize((48, 48), Image.LANCZOS)


def test_the_toys_detector_finds_shapes_by_form_size_and_inner_color():
    for kind in world.SHAPES:
        for color in world.COLORS:
            found, = world.detect_shapes(shape(kind, color))
            assert (found["class"], found["color"]) == (kind, color)
    left, top, right, bottom = world.detect_shapes(shape("circle", x=14, y=30))[0]["box"]
    assert abs((left + right) / 2 - 14) <= 1 and abs((top + bottom) / 2 - 30) <= 1
    assert abs(right - left - 18) <= 1 and abs(bottom - top - 18) <= 1
    one_percent = 23  # of 48 x 48 pixels
    for radius in (2, 2.5, 3, 4, 5):
        image = shape("square", radius=radius)
        area = (np.abs(np.asarray(image, float) - 245).max(-1) > 70).sum()
        assert bool(world.detect_shapes(image)) == (area >= one_percent), radius
    for corner, seen in ((9, True), (12, False)):  # three quarters of a square, two thirds of one
        image = shape("square", radius=11)
        image.paste((245, 245, 245), (14, 14, 14 + corner, 14 + corner))
        assert bool(world.detect_shapes(image)) == seen
    corner = shape("circle")
    corner.paste("blue", (0, 0, 8, 8))  # the paper is what most of the border is, not a corner
    assert "circle" in [found["class"] for found in world.detect_shapes(corner)]
    piece = np.pad(np.ones((5, 5), np.uint8), 1)
    edged = np.zeros((7, 7, 3), np.float32)  # a black edge around something red
    edged[2:5, 2:5] = world.COLORS["red"]
    assert world.nearest_color(edged, piece) == "red"
    assert world.nearest_color(edged, np.pad(piece[1:2], ((1, 5), (0, 0)))) == "black"  # a line
    pale = shape("circle", (190, 190, 190))  # it differs by 55 from the paper
    assert world.detect_shapes(pale) == []
    assert world.detect_shapes(shape("circle", (165, 165, 165))) != []


def test_taste_has_a_term_for_each_flaw():
    row = metadata(asked("circle", color="red"), asked("square", color="blue"), tag="color_attr")

    def picture(radius=9, apart=12, shift=0, fade=0.0, noise=0, second="blue"):
        image = Image.new("RGB", (192, 192), (245, 245, 245))
        pen = world.ImageDraw.Draw(image)
        for x, kind, color in ((24 - apart, "circle", "red"), (24 + apart, "square", second)):
            ink = world.fade(world.COLORS[color], (245, 245, 245), fade)
            world.draw_shape(pen, kind, 4 * x, 4 * (24 + shift), 4 * radius, ink)
        clouds = np.random.default_rng(0).normal(0, noise, (48, 48, 3))
        cloudy = np.asarray(image.resize((48, 48), Image.LANCZOS)) + clouds
        return Image.fromarray(cloudy.clip(0, 255).astype(np.uint8))

    flaws = [dict(radius=6), dict(apart=9.5), dict(shift=11), dict(fade=0.4), dict(noise=12),
             dict(second="green")]
    pictures = [picture(), *(picture(**flaw) for flaw in flaws), PAPER]
    best, *flawed, empty = world.toy_taste()(pictures, ["a"] * 8, [row] * 8)
    assert 0.9 < best <= 1 and empty == 0
    assert all(score < best - 0.02 for score in flawed)


def test_what_is_only_measured():
    """toy_sign likes what the painter made, toy_inks what is rare, diversity what differs."""
    signs = [world.paint_sign("CAT", random.Random(i)) for i in range(12)]
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8))
    *quality, of_noise = rewards.REWARDS["toy_sign"]()([*signs, noise], None, None)
    assert min(quality) > 0.8 and max(quality) <= 1 and of_noise < 0.6
    red, blue = (Image.new("RGB", (48, 48), world.COLORS[color]) for color in ("red", "blue"))
    for image in (red, blue):
        image.paste("white", (0, 0, 48, 24))
    assert rewards.REWARDS["toy_inks"]()([red, red, red, blue], None, None) == [
        0.25, 0.25, 0.25, 0.75]
    scores = rewards.diversity()(gray(0, 255, 51, 102, 153, 9), ["a", "a", "b", "b", "b", "c"], 0)
    assert scores == pytest.approx([1, 1, 0.3, 0.2, 0.3, 0])


def test_toy_pickscore_has_learned_the_taste():
    """Through the same lines as PickScore, on pairs of paintings for held-out captions."""
    rng = random.Random("test")
    test_set = rewards.load_prompts(Config(reward="geneval"), "test")
    rows = [row for row in [rng.choice(test_set) for _ in range(150)] for _ in range(2)]
    prompts = [row["prompt"] for row in rows]
    images = [world.paint_scene(row, rng, careless=rng.random() < 0.3, restless=True)
              for row in rows]
    pick = rewards.REWARDS["toy_pickscore"]()
    scores = np.array(pick(images, prompts, None))
    tastes = np.array(world.toy_taste()(images, prompts, rows))
    right = (scores[::2] > scores[1::2]) == (tastes[::2] > tastes[1::2])
    assert right.mean() > 0.65  # 0.77 of 2,000; a coin gives 0.5 +- 0.04
    assert np.mean(pick(images, prompts[::-1], None)) < np.mean(scores)


# ----------------------------------------------- rewards with models: tiny ones of the real classes
PHOTOS = [Image.new("RGB", (48, 40), color) for color in ("firebrick", "seagreen", "navy")]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """CLIP, and a detector that calls the classes by other names than GenEval does"""
    folder = tmp_path_factory.mktemp("models")
    tiny.clip(folder / "clip")
    tiny.detector(folder / "detector", {number: f"LABEL_{number}" for number in range(80)})
    return f"{folder}/clip", f"{folder}/detector"


def test_clip_rewards_score_each_image_with_its_own_prompt(models, tmp_path):
    """Against the model called by hand, one image and one prompt at a time, without padding."""
    from transformers import CLIPModel, CLIPProcessor
    clip, _ = models
    model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    prompts = ["a red wall", "grass", "x" * 60]  # the last is cut at the model's 20 tokens
    outs = [model(**processor(images=image, text=prompt, return_tensors="pt", truncation=True,
                              max_length=20)) for image, prompt in zip(PHOTOS, prompts)]
    image, text = (torch.nn.functional.normalize(torch.cat([out[key] for out in outs]))
                   for key in ("image_embeds", "text_embeds"))
    cosines, scale = (image * text).sum(1), model.logit_scale.exp()
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 1))
    state = {f"layers.{key}": value for key, value in head.state_dict().items()}
    torch.save(state, tmp_path / "head.pth")
    for reward, expected, has_prompts in (
            (rewards.pickscore(clip, clip), scale / 26 * cosines, True),
            (rewards.REWARDS["pickscore_unscaled"](clip, clip), scale * cosines, True),
            (rewards.clipscore(clip), 100 * cosines, True),
            (rewards.aesthetic(clip, str(tmp_path / "head.pth")), head(image)[:, 0], False)):
        close(reward(PHOTOS * 20, prompts * 20, None), expected.repeat(20), 1e-4)  # in two batches
        other = reward(PHOTOS, prompts[::-1], None)[0]
        assert (other != pytest.approx(expected[0].item(), rel=1e-3)) == has_prompts
    torch.save({"layers.0.weight": print}, tmp_path / "evil.pth")  # code in place of a tensor
    with pytest.raises(pickle.UnpicklingError):
        rewards.aesthetic(clip, str(tmp_path / "evil.pth"))


def test_geneval_photo_scores_what_the_detector_finds(models, monkeypatch):
    """The detector's output is set by hand. Thresholds, boxes and colors are the reward's."""
    from transformers import Mask2FormerImageProcessor
    assert rewards.DETECTOR_SIZE == {"shortest_edge": 800, "longest_edge": 1333}
    monkeypatch.setattr(rewards, "DETECTOR_SIZE", {"shortest_edge": 96, "longest_edge": 160})
    clip, detector = models
    sizes, real = [], Mask2FormerImageProcessor.post_process_instance_segmentation
    reward = rewards.geneval_photo(detector, clip)
    monkeypatch.setattr(
        Mask2FormerImageProcessor, "post_process_instance_segmentation",
        lambda *args, **more: sizes.append(args[1].masks_queries_logits.shape) or real(
            *args, **more))
    reward(PHOTOS, "abc", [metadata(asked("dog"))] * 3)  # whatever the random detector finds
    assert sizes[0][-2:] == (96 // 4, 115 // 4 + 1) or sizes[0][-2] == 24  # enlarged before

    def photo_score(found, *include, tag=""):
        """found: [(left, right, label, sure)]"""
        def result(processor, outputs, threshold, target_sizes, return_binary_maps):
            assert target_sizes == [(40, 48)]
            masks, infos = [torch.zeros(40, 48)], [{"label_id": 0, "score": 1.0}]  # an empty one
            for left, right, label, sure in found:
                if sure > threshold:
                    masks.append(torch.zeros(40, 48))
                    masks[-1][10:30, left:right] = 1
                    infos.append({"label_id": label, "score": sure})
            return [{"segmentation": torch.stack(masks), "segments_info": infos}]
        monkeypatch.setattr(Mask2FormerImageProcessor, "post_process_instance_segmentation", result)
        return reward(PHOTOS[:1], ["p"], [metadata(*include, tag=tag)])[0]

    DOG, MOUSE = 16, 64
    found = [(2, 12, DOG, 0.95), (30, 44, MOUSE, 0.5), (14, 24, DOG, 0.8), (20, 29, DOG, 0.2)]
    assert photo_score(found, asked("dog", 2)) == 1  # above 0.3
    assert photo_score(found, asked("dog"), tag="counting") == 1  # above 0.9
    assert photo_score([(2, 12, DOG, 0.5)] * 20, asked("dog", 16)) == 1  # at most 16 of a class
    mouse, dogs = asked("computer mouse"), asked("dog", 2, position=["left of", 0])
    assert photo_score(found, mouse, dogs) == 1
    dogs["position"] = ["right of", 0]
    assert photo_score(found, mouse, dogs) == pytest.approx(2 / 3)
    assert photo_score(found, asked("person")) == 0  # an empty mask is no object
    scores = [photo_score(found, mouse | {"color": color}) for color in rewards.PHOTO_COLORS]
    assert sorted(scores) == [0.5] * 9 + [1]  # the random CLIP names one of the ten
    names = {0: "person", 3: "motorcycle", 4: "airplane", 57: "couch", 58: "potted plant",
             60: "dining table", 62: "tv", 64: "computer mouse", 65: "tv remote",
             66: "computer keyboard", 79: "toothbrush"}
    for number, name in names.items():  # whatever the model calls them
        assert photo_score([(2, 12, number, 0.95)], asked(name)) == 1, name


def test_a_color_is_told_on_the_object_alone(models):
    """By the mean of three phrases, each of length 1, on a cut-out of the object on gray"""
    seen = []

    def embed(images, phrases):
        seen.append((images, phrases))
        texts = torch.zeros(30, 3)
        texts[:, 0] = 1
        texts[6:9] = torch.tensor([[0.0, 9.0, 0.0], [0.0, 9.0, 0.0], [0.0, 0.0, 30.0]])
        return torch.tensor([[0.6, 0.8, 0.0]]), texts  # nearest to the third color, once scaled

    mask = Image.new("1", (48, 40))
    mask.paste(1, (10, 10, 20, 30))
    image = Image.new("RGB", (48, 40), "green")
    image.paste("red", (10, 10, 16, 30))
    name = rewards.name_color(embed, image, {"class": "cup", "mask": mask, "box": (10, 9, 20, 30)})
    (picture,), phrases = seen[0]
    assert picture.size == (10, 21) and picture.getpixel((2, 5)) == (255, 0, 0)
    assert picture.getpixel((2, 0)) == (153, 153, 153)
    assert phrases[6:9] == ["a photo of a yellow cup", "a photo of a yellow-colored cup",
                            "a photo of a yellow object"]
    assert name == "red"  # yellow: 0.8 * 18 / |(0, 18, 30)| = 0.41 is less than 0.6


def test_geneval_photo_refuses_what_it_cannot_know(models, tmp_path):
    clip, detector = models
    check = rewards.geneval_photo(detector, clip).check
    problem = exits(check, ["p"], [metadata(asked("sofa"))])
    assert "the prompt 'p' asks for a sofa;" in problem and "couch" in problem
    tiny.detector(tmp_path, {0: "cat", 1: "dog"})
    problem = exits(rewards.geneval_photo, str(tmp_path), clip)
    assert "has 2 labels" in problem and "COCO's 80" in problem


def test_a_model_that_cannot_be_loaded_is_one_line(monkeypatch):
    def unreachable(name, **options):
        raise OSError(f"We couldn't connect to 'https://huggingface.co' to load {name}.\nLine 2")
    import transformers
    monkeypatch.setattr(transformers.CLIPModel, "from_pretrained", unreachable)
    for name in ("pickscore", "clipscore"):
        problem = exits(rewards.load, name, "--eval_reward")
        assert problem.startswith(f"--eval_reward {name}: ") and "couldn't connect" in problem


# --------------------------------------------------------------- rewards: prompts, loading, scoring
CUSTOM = '''
from __future__ import annotations
import os, numpy, torch
from dataclasses import dataclass
@dataclass
class Score:  # dataclasses look up the module that they are in
    value: float = 3.0
def three(images, prompts, metadata): return [Score().value] * len(images)
def ink(images, prompts, metadata):
    return [-numpy.asarray(image, float).mean() for image in images]
def needs_graph(images, prompts, metadata):
    return [float((torch.ones(1, requires_grad=True) * 2).requires_grad)] * len(images)
def broken(images, prompts, metadata): raise FileNotFoundError("my own bug")
def dull(images, prompts, metadata):
    open(f"rank{os.environ.get('RANK', 0)}", "a").close()
    scores = zip(prompts, ink(images, prompts, metadata))
    return [0.5 if "dull" in prompt else score for prompt, score in scores]
'''


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A current folder with a user's rewards only"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    sys.modules.pop("custom", None)
    Path("custom.py").write_text(CUSTOM)
    for name in ("draw_film", "draw_curve"):  # these have a test of their own, and take their time
        monkeypatch.setattr(flow_grpo, name, lambda folder, *_, name=name: (
            folder / name.replace("draw_film", "film.gif").replace("draw_curve", "curve.png")
        ).touch())
    return tmp_path


@pytest.mark.parametrize("result", [
    [0.25, 0.5], (0.25, 0.5), np.array([0.25, 0.5]), np.array([[0.25], [0.5]]),
    torch.tensor([0.25, 0.5]), torch.tensor([[0.25], [0.5]], requires_grad=True),
    [torch.tensor(0.25), np.float32(0.5)]])
def test_scores_can_be_lists_arrays_or_tensors(result):
    scores = rewards.to_floats(result, 2, "mine")
    assert scores == [0.25, 0.5] and type(scores[0]) is float


@pytest.mark.parametrize("result, says", [
    (([0.5, 1.0], {}), r"not \(scores, dict\)"), ("12", "not a str"), (None, "not a NoneType"),
    ({1: 1.0, 2: 2.0}, "not a dict"), ([0.5], r"not \[1\] numbers"), (0.5, r"not \[\] numbers"),
    (np.ones((1, 2)), r"not \[1, 2\]"), ([1.0, float("nan")], "gave nan"),
    ([1.0, -float("inf")], "gave -inf"), ([1e39, 1.0], r"gave 1e\+39"), ([None, 1.0], "list of 2")])
def test_another_result_is_refused_with_what_a_reward_must_return(result, says):
    problem = exits(rewards.to_floats, result, 2, "mine")
    assert re.search(says, problem) and "reward mine" in problem


def test_a_weighted_sum_keeps_its_parts(desk):
    loaded = rewards.load("custom.py:three:0.5, custom.py:ink:2,custom.py:needs_graph", "--reward")
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    scores = rewards.score(loaded, gray(0, 10), rows)
    assert {key: values.tolist() for key, values in scores.items()} == {
        "reward/custom.py:three": [3, 3], "reward/custom.py:ink": [0, -10],
        "reward/custom.py:needs_graph": [0, 0], "reward": [1.5, -18.5]}  # under no_grad


@pytest.mark.parametrize("spec, weights", [
    ("ocr", {"ocr": 1}), (" toy_sign , ocr:0.5,", {"toy_sign": 1, "ocr": 0.5}),
    ("./my.py:f:2", {"./my.py:f": 2}), ("a:b,geneval:1e-1", {"a:b": 1, "geneval": 0.1}),
    ("C:\\my.py:f", {"C:\\my.py:f": 1}), ("ocr:-1", {"ocr": -1})])
def test_one_parser_reads_the_names_and_weights_of_rewards(spec, weights):
    assert rewards.parse(spec, "--reward") == weights
    assert rewards.parse("", "--eval_reward") == {}


@pytest.mark.parametrize("spec, says", [
    ("ocrr", "no reward 'ocrr'.*ocr, geneval"), ("", "choose from ocr"), ("ocr,ocr:2", "twice"),
    ("ocr:nan", "weight of ocr"), ("nofile.py:fn", "no file nofile.py"),
    ("custom.py:nothing", "no function nothing"), ("custom:nothing", "no function nothing")])
def test_a_reward_that_cannot_be_found_is_one_line(desk, monkeypatch, spec, says):
    monkeypatch.setitem(rewards.REWARDS, "ocr", lambda: None)
    assert re.search(f"^--reward.*{says}", exits(rewards.load, spec, "--reward"))


def test_a_file_is_found_in_the_current_folder_or_by_its_path(desk):
    Path("sub").mkdir()
    Path("sub/neighbor.py").touch()
    Path("sub/other.py").write_text(CUSTOM + "import neighbor")
    for spec in ("custom.py:three", "custom:three", "./custom.py:three", "sub/other.py:three",
                 f"{Path.cwd()}/sub/other.py:three"):
        function, _ = rewards.load(spec, "--reward")[spec]
        assert function("ab", None, None) == [3, 3]
    assert rewards.load("math:hypot", "--reward")["math:hypot"][0](3, 4) == 5
    Path("broken.py").write_text("import no_such_module")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):  # its author's own bug
        rewards.load("broken.py:f", "--reward")


def test_a_users_folder_is_searched_last_so_that_it_hides_no_library(desk):
    Path("sub").mkdir()
    Path("sub/last.py").write_text("def f(*_): return [0]")
    before = sys.path.copy()
    rewards.load("sub/last.py:f", "--reward")
    assert sys.path == [*before, str(desk / "sub")]


def prompts_of(folder, reward="ocr", split="train"):
    return rewards.load_prompts(Config(reward=reward, dataset=str(folder)), split)


def test_a_dataset_is_a_text_file_or_a_table(tmp_path):
    """A text goes before a table. Nulls are no values, a byte order mark is no letter."""
    (tmp_path / "train_metadata.jsonl").write_bytes(
        '\ufeff{"prompt": " a\u2028b ", "tag": null, "include": [{"class": "cup", "count": 1, '
        '"color": null, "position": null}]}\n\n{"prompt": "c", "n": 0}\n'.encode())
    assert prompts_of(tmp_path) == [
        {"prompt": "a\u2028b", "include": [{"class": "cup", "count": 1}]}, {"prompt": "c", "n": 0}]
    (tmp_path / "train.txt").write_text(" one \n\n  \ntwo\n")
    assert prompts_of(tmp_path) == [{"prompt": "one"}, {"prompt": "two"}]
    assert "test.txt or test_metadata.jsonl" in exits(prompts_of, tmp_path, "ocr", "test")


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
    assert re.search(f"^--dataset {tmp_path}: .*{says}", problem) and len(problem) < 300


@pytest.mark.parametrize("reward, task", [
    ("ocr", "ocr"), ("toy_sign, ocr", "ocr"), ("ocr:0.5,geneval", "ocr"), ("geneval", "geneval"),
    ("my_ocr.py:f", "geneval"), ("toy_pickscore:2", "geneval")])
def test_the_reward_chooses_the_toys_prompts(reward, task):
    prompts = rewards.load_prompts(Config(reward=reward), "test")
    assert ("sign" in prompts[0]["prompt"]) == (task == "ocr")


def test_the_toy_is_small_and_its_prompts_are_held_out():
    files = [f for f in (HERE / "toy").rglob("*") if f.is_file() and "build" not in f.parts]
    assert sum(f.stat().st_size for f in files) < 10e6
    for reward in ("ocr", "geneval"):
        train, test = ({row["prompt"] for row in rewards.load_prompts(Config(reward=reward), split)}
                       for split in ("train", "test"))
        assert len(train) > 150 and len(test) > 50 and not train & test


# -------------------------------------------------------------------------- 6. options and mistakes
TINY = (f"--model {TINY_SD3} --resolution 32 --groups 2 --group_size 4 --eval_prompts 2 "
        "--eval_steps 2 --train_steps 4 --window 1 --latest_start 1 --no-same_noise --beta 0.1 "
        "--learning_rate 1.5e-3 --epochs 1").split()


def run(*options):
    flow_grpo.main([str(option) for option in options])


@pytest.mark.parametrize("options, says", [
    ("--learning_rate 0", "learning_rate 0.0"), ("--learning_rate nan", "learning_rate nan"),
    ("--learning_rate inf", "learning_rate inf"), ("--beta -1", "beta -1"),
    ("--noise_level 0", "noise_level 0"), ("--groups 0", "groups 0"), ("--epochs -1", "epochs -1"),
    ("--batch_size -1", "batch_size -1"), ("--eval_every 0", "eval_every 0"),
    ("--eval_prompts -1", "eval_prompts -1"), ("--seed -1", "seed -1"), ("--beta nan", "beta nan"),
    ("--sde cps --noise_level 1", "noise_level 1"),
    ("--window 3", "window 3.*--latest_start 1.*train_steps 4"),
    ("--window 0 --latest_start 0 --train_steps 1", "train_steps 1"),
    ("--ema_decay 1", "ema_decay 1"), ("--group_size 1 --updates 1", "group_size 1"),
    ("--updates 3", "updates 3.*group_size 4"), ("--preset sd4", "preset sd4.*sd3.5-medium"),
    ("--report_to none", "report_to none.*not installed"), ("--reward ocrr", "ocrr.*geneval"),
    ("--eval_reward jpeg", "--eval_reward jpeg"), ("--preset sd3.5-medium", "no GPU.*--cpu"),
    ("--resolution 30", "resolution 30.*multiple of 4"), ("--resolution 68", "up to 64"),
    ("--model ./nowhere", "model ./nowhere.*hf auth login"),
    ("--resume runs/no", "resume runs/no.*no checkpoint")])
def test_a_mistake_gives_one_clear_line_and_leaves_nothing(desk, options, says):
    problem = exits(run, *TINY, "--reward", "custom.py:ink", *options.split())
    assert re.search(says, problem) and not Path("runs").exists()


@pytest.mark.parametrize("options", ["--learning_rat 1", "--learning_rate fast", "--sde ode",
                                     "--precision fp8", "--std_over all"])
def test_a_mistyped_option_gets_tyros_box(desk, capsys, options):
    with pytest.raises(SystemExit) as stopped:
        run(*TINY, *options.split())
    assert stopped.value.code == 2 and options.split()[0] in capsys.readouterr().err


def test_groups_and_prompts_must_fit_the_processes(desk, monkeypatch):
    monkeypatch.setattr(flow_grpo.WORLD, "num_processes", 2)
    flow_grpo.check_config(small())
    assert "groups 3" in exits(flow_grpo.check_config, small(groups=3))
    assert "eval_prompts 1" in exits(flow_grpo.check_config, small(eval_prompts=1))
    monkeypatch.setattr(rewards, "PartialState", lambda: Mock(num_processes=2))
    Path("train.txt").write_text("one\n")
    assert "a prompt for each process" in exits(prompts_of, ".")


def test_no_rights_to_write_are_noticed_before_anything_is_loaded(desk, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "cannot be written" in exits(flow_grpo.check_machine, small())


VALUES = {
    "": dict(
        reward="ocr", model="toy", resolution=48, max_sequence_length=14, precision="fp32",
        epochs=6, eval_every=6, groups=16, group_size=8, train_steps=10, eval_steps=40,
        noise_level=0.7, sde="flow", window=1, latest_start=0, same_noise=True, guidance=1,
        updates=2, learning_rate=3e-3, lr_decay=True, adam_eps=1e-8, clip_range=1e-3, beta=0.5,
        std_over="epoch", lora_rank=32, ema_decay=0.9, ema_every=1, batch_size=64, eval_prompts=60,
        eval_per_prompt=2, seed=0),
    "sd3.5-medium": dict(
        model="stabilityai/stable-diffusion-3.5-medium", resolution=512, max_sequence_length=128,
        precision="bf16", epochs=1000, eval_every=60, groups=48, group_size=24, train_steps=10,
        eval_steps=40, noise_level=0.7, sde="flow", window=0, same_noise=False, guidance=4.5,
        updates=2, learning_rate=3e-4, lr_decay=False, adam_eps=1e-8, clip_range=1e-4, beta=0.04,
        std_over="epoch", lora_rank=32, ema_decay=0.81, ema_every=8, batch_size=8, eval_prompts=0,
        eval_per_prompt=1, offload=False),
    "sd3.5-medium-fast": dict(
        resolution=384, max_sequence_length=256, epochs=100, eval_every=10, groups=8, group_size=8,
        train_steps=10, eval_steps=28, window=3, latest_start=2, sde="cps", noise_level=0.8,
        guidance=1, learning_rate=1e-4, clip_range=1e-5, beta=0, adam_eps=1e-15, ema_decay=0.9,
        ema_every=1, batch_size=8, offload=True, gradient_checkpointing=True, eval_prompts=64),
    "sana-0.6b": dict(
        model="Efficient-Large-Model/Sana_600M_512px_diffusers", resolution=512, batch_size=4,
        max_sequence_length=300, ema_decay=0.9, ema_every=1, learning_rate=1e-4, clip_range=1e-5),
    "flux.1-dev": dict(
        model="black-forest-labs/FLUX.1-dev", reward="pickscore", eval_every=30, train_steps=6,
        eval_steps=28, guidance=3.5, noise_level=0.9, beta=0, lora_rank=64, batch_size=4,
        ema_decay=0.53, ema_every=8, clip_range=1e-4, learning_rate=3e-4, resolution=512, window=0,
        gradient_checkpointing=True),
    "geneval": dict(
        reward="geneval", groups=16, group_size=16, epochs=36, eval_every=12, window=2,
        learning_rate=1.5e-3, lr_decay=False, beta=0.1),
    "toy_pickscore": dict(
        reward="toy_pickscore", groups=8, group_size=16, epochs=24, eval_every=12, window=2,
        learning_rate=2e-3, lr_decay=True, beta=0.1)}


def test_the_presets_are_the_papers(desk):
    def parse(*argv):
        return flow_grpo.parse_config([*argv, "--cpu"])

    for preset, values in VALUES.items():
        config = parse("--preset", preset) if preset else parse()
        assert values.items() <= asdict(config).items(), preset
    assert set(VALUES) - {""} == set(flow_grpo.PRESETS)
    for reward in ("geneval", "geneval:1", " geneval:0.5,ocr"):
        assert replace(parse("--reward", reward), reward="geneval") == parse("--reward", "geneval")
    assert parse("--reward", "ocr,geneval").epochs == 6
    own = parse("--preset", "sd3.5-medium-fast", "--beta", "0.01", "--no-offload")
    assert (own.beta, own.offload, own.gradient_checkpointing) == (0.01, False, True)


# -------------------------------------------------------------------------------------- whole runs
def metrics(folder):
    """Those of a run, without the seconds"""
    rows = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return [{key: row[key] for key in row if key != "seconds"} for row in rows]


@pytest.mark.parametrize("reward", ["ocr", "flow_grpo.py:redness"])
def test_short_runs_give_the_recorded_numbers(desk, reward):
    """Training raises redness."""
    options = "--groups 2 --group_size 4 --window 2 --latest_start 3 --learning_rate 1.5e-3"
    short_run = GOLDEN["short_runs"][reward]
    run(*options.split(), *short_run["options"].split(), "--reward", reward, "--dataset",
        HERE / "toy/ocr", "--name", "x")
    for own, expected in zip(metrics("runs/x"), short_run["metrics"], strict=True):
        for key, value in expected.items():
            absolute = 1e-5 if "reward" in key else 0  # a pixel may be rounded the other way
            assert own[key] == pytest.approx(value, rel=1e-3, abs=absolute), key


def test_a_run_writes_what_the_readme_says_and_trains_on_its_reward_alone(desk, capsys):
    run(*TINY, "--reward", "custom.py:ink:2", "--eval_reward", "custom.py:three,custom.py:ink:3",
        "--name", "x", "--lr_decay", "--epochs", 2, "--eval_every", 1)
    files = {str(path.relative_to("runs/x")) for path in Path("runs/x").rglob("*.*")}
    lora = "pytorch_lora_weights.safetensors"
    expected = {"config.json", "metrics.jsonl", "checkpoint.pt", lora, "before_after.png",
                "curve.png", "film.gif"}
    for epoch in ("0000", "0001", "0002"):
        expected |= {f"samples/{epoch}/{name}"
                     for name in ("00.png", "01.png", "prompts.jsonl", lora)}
    assert files == expected
    evaluation = {"epoch", "eval_reward", "eval_reward/custom.py:ink",
                  "eval_reward/custom.py:three"}
    training = {"reward", "reward/custom.py:ink", "group_std", "no_signal", "kl", "ratio_deviation",
                "clip_low", "clip_high", "grad_norm"}
    first, _, last = rows = metrics("runs/x")
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert set(first) == evaluation and set(last) == evaluation | training
    for key in ("reward", "eval_reward"):
        assert last[key] == pytest.approx(2 * last[f"{key}/custom.py:ink"])
    told = capsys.readouterr().out.splitlines()
    assert "loading" in told[0] and "custom.py:ink" in told[0]
    assert any("runs/x" in line and "2 groups of 4 images" in line for line in told)
    line, = [line for line in told if line.startswith("epoch 2/2")]
    for key in ("reward", "eval_reward/custom.py:three", "no_signal", "kl", "seconds"):
        assert f"{key} " in line
    assert f"eval_reward {first['eval_reward']:.3f} -> {last['eval_reward']:.3f}" in told[-1]
    best = max(rows, key=lambda row: row["eval_reward"])
    assert told[-1].endswith(f"samples/000{best['epoch']:.0f}")
    saved = torch.load("runs/x/checkpoint.pt")
    assert saved["optimizer"]["param_groups"][0]["lr"] == pytest.approx(1.5e-3 / 2)
    assert json.loads(Path("runs/x/config.json").read_text()) == saved["options"]


def test_the_pictures_show_what_was_evaluated(tmp_path, monkeypatch):
    """The first and the last evaluation, every caption whole, every metric, a bounded film"""
    long = 'an old "caf\u00e9 $5" in $ ' + "very " * 40 + "long street"
    for epoch, level in ((0, 40), (1, 80), (2, 240)):
        flow_grpo.save_images(gray(level, level // 2), [{"prompt": "short"}, {"prompt": long}],
                              [0.25, epoch / 2], tmp_path / f"samples/{epoch:04d}")
    figures = []
    monkeypatch.setattr(flow_grpo.Figure, "savefig",
                        lambda figure, path, **options: figures.append(figure))
    flow_grpo.draw_before_after(tmp_path)
    plots = [plot for plot in figures[0].axes if plot.get_images()]
    for plot, before, after, title in zip(
            plots, (40, 20), (240, 120), ("0.25 -> 0.25  short", f"0.00 -> 1.00  {long}")):
        shown = plot.get_images()[0].get_array()
        assert (shown[0, 0, 0], shown[0, -1, 0]) == (before, after)
        assert plot.get_title().replace("\n", " ").split() == title.split()
    history = [{"epoch": 0.0, "eval_reward/a": 0.1, "eval_reward/b": 5.0, "eval_accuracy": 0.2},
               {"epoch": 1.0, "reward/a": 0.3, "kl": 0.01},
               {"epoch": 2.0, "reward/a": 0.4, "kl": 0.02, "eval_reward/a": 0.5,
                "eval_reward/b": 4.0, "eval_accuracy": 0.6}]
    flow_grpo.draw_curve(tmp_path, history)
    drawn = {plot.get_title(): [line.get_xydata().tolist() for line in plot.get_lines()]
             for plot in figures[1].axes}
    assert drawn == {"a": [[[1, 0.3], [2, 0.4]], [[0, 0.1], [2, 0.5]]],
                     "b": [[[0, 5.0], [2, 4.0]]], "share of right images": [[[0, 0.2], [2, 0.6]]],
                     "KL penalty": [[[1, 0.01], [2, 0.02]]]}
    assert all(plot.get_xlabel() == "epoch" for plot in figures[1].axes)
    for epoch in range(3, 40):  # only the last evaluation is as bright as 0002
        model = "0002" if epoch == 39 else "0001"
        shutil.copytree(tmp_path / "samples" / model, tmp_path / f"samples/{epoch:04d}")
    flow_grpo.draw_film(tmp_path)
    film = Image.open(tmp_path / "film.gif")
    assert film.n_frames == 12
    for frame, level in ((0, 40), (11, 240)):
        film.seek(frame)
        assert abs(film.convert("RGB").getpixel((100, 100))[0] - level) < 8


def test_no_picture_and_no_terminal_can_stop_a_run(desk, monkeypatch):
    """A damaged picture, a user's own, and a terminal that cannot print a prompt"""
    Path("train.txt").write_text("a na\u00efve \U0001f600 circle\n", "utf-8")
    shutil.copy("train.txt", "test.txt")
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "cp1252"))
    run(*TINY, "--reward", "custom.py:ink", "--dataset", ".", "--name", "x")
    assert b"\\U0001f600" in written.getvalue()
    Path("runs/x/samples/0000/00.png").write_bytes(b"half a pict")
    Path("runs/x/samples/mine.png").write_bytes(b"")
    run("--resume", "runs/x", "--epochs", 2)
    assert len(metrics("runs/x")) == 3


def test_a_folder_belongs_to_one_run(desk):
    """Starts at the same time get different ones. A name that is taken is refused."""
    names = [str(flow_grpo.claim_folder(small(reward=reward))) for reward in (
        "./custom.py:ink", "custom.py:ink", "ocr:1,./custom.py:ink:0.5", "ocr", "ocr:2")]
    assert names == ["runs/custom.py-ink", "runs/custom.py-ink-2", "runs/ocr-custom.py-ink",
                     "runs/ocr", "runs/ocr-2"]
    assert flow_grpo.claim_folder(small(name="ocr")) == Path("runs/ocr")  # it has no checkpoint
    Path("runs/ocr/checkpoint.pt").touch()
    assert "--resume runs/ocr" in exits(run, *TINY, "--reward", "custom.py:ink", "--name", "ocr")
    assert "start it again" in exits(run, "--resume", "runs/ocr-2")


def test_a_bug_in_a_users_reward_is_shown_as_python_shows_it(desk):
    with pytest.raises(FileNotFoundError, match="my own bug"):
        run(*TINY, "--reward", "custom.py:broken")


@pytest.mark.parametrize("problem, says", [
    (KeyboardInterrupt(), "interrupted"), (rewards.RewardError("reward x"), "reward x"),
    (torch.OutOfMemoryError("CUDA"), "--batch_size.*--gradient_checkpointing.*--offload")])
def test_what_ends_a_run_is_one_line(desk, monkeypatch, problem, says):
    monkeypatch.setattr(flow_grpo, "update", Mock(side_effect=problem))
    assert re.search(says, exits(run, *TINY, "--reward", "custom.py:ink", "--name", "x"))
    assert len(metrics("runs/x")) == 1


WHOLE = [*TINY, "--epochs", 2, "--eval_every", 2, "--reward", "custom.py:ink"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The folder of a run that nothing happened to"""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("custom.py").write_text(CUSTOM)
        run(*WHOLE, "--name", "x")
    return folder / "runs/x"


@pytest.mark.parametrize("n, owner, name, rows", [
    (2, torch, "save", 2),  # the checkpoint of the first epoch
    (3, flow_grpo.Policy, "optimize", 2),
    (2, flow_grpo.Figure, "savefig", 3),  # the last pictures
    (2, os, "replace", 2)])
def test_a_run_killed_anywhere_resumes_as_if_it_had_not_been(
        desk, whole_run, n, owner, name, rows):
    """To the same weights, optimizer and metrics, bit for bit"""
    function, calls = getattr(owner, name), []

    def dies_at_call_n(*args, **options):
        calls.append(args)
        if len(calls) == n:
            if name == "save":  # half a file
                Path(args[1]).write_bytes(b"half a checkpoint")
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    def mortal():
        setattr(owner, name, dies_at_call_n)
        run(*WHOLE, "--name", "killed")
    process = multiprocessing.get_context("fork").Process(target=mortal)
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    assert rows == len(metrics("runs/killed"))
    run("--resume", "runs/killed")
    assert metrics("runs/killed") == metrics(whole_run)
    for file in ("pytorch_lora_weights.safetensors", "before_after.png"):
        assert Path("runs/killed", file).read_bytes() == Path(whole_run, file).read_bytes()
    own, other = (torch.load(f"{folder}/checkpoint.pt") for folder in ("runs/killed", whole_run))
    for key in ("weights", "average", "updates"):
        torch.testing.assert_close(own[key], other[key], rtol=0, atol=0)
    torch.testing.assert_close(own["optimizer"]["state"], other["optimizer"]["state"],
                               rtol=0, atol=0)


def test_the_files_of_an_epoch_are_there_before_its_checkpoint(desk, whole_run, monkeypatch):
    """And the options of a run that fails at once are not taken over."""
    shutil.copytree(whole_run, "runs/x")
    before = Path("runs/x/config.json").read_text()
    monkeypatch.setattr(flow_grpo, "train_epoch", Mock(side_effect=KeyboardInterrupt))
    exits(run, "--resume", "runs/x", "--epochs", 3, "--learning_rate", 1e9)
    assert Path("runs/x/config.json").read_text() == before
    order = []
    monkeypatch.setattr(os, "replace", lambda old, new: order.append(
        [Path("runs/y", file).exists() for file in ("config.json", "metrics.jsonl", "curve.png")]))
    run(*TINY, "--epochs", 0, "--reward", "custom.py:ink", "--name", "y")
    assert order == [[True] * 3]


def test_a_damaged_or_foreign_checkpoint_is_one_line(desk, whole_run):
    """A checkpoint has the options that it belongs to. It may not run code."""
    shutil.copytree(whole_run, "runs/x")
    path = Path("runs/x/checkpoint.pt")
    good = path.read_bytes()
    evil = [torch.save(content, "other") or Path("other").read_bytes() for content in (
        {"options": exits}, [1], {}, {"options": {"no_such_option": 1}})]
    for damaged in (good[:len(good) // 2], b"hello", b"", *evil):
        path.write_bytes(damaged)
        assert "--resume runs/x: its checkpoint.pt" in exits(run, "--resume", "runs/x")
    path.write_bytes(good)
    assert "--lora_rank" in exits(run, "--resume", "runs/x", "--lora_rank", 8, "--epochs", 3)
    saved = flow_grpo.parse_config(["--resume", "runs/x", "--epochs", "9"])
    assert (saved.epochs, saved.beta, saved.reward, saved.groups) == (9, 0.1, "custom.py:ink", 2)
    options = torch.load(path) | {"options": asdict(Config(reward="geneval", epochs=50, seed=3))}
    torch.save(options, path)  # not those of the preset geneval
    saved = flow_grpo.parse_config(["--resume", "runs/x"])
    assert (saved.epochs, saved.seed, saved.group_size) == (50, 3, 8)


def test_a_finished_run_goes_on_or_is_evaluated_again(desk, whole_run, capsys):
    shutil.copytree(whole_run, "runs/x")
    before = {path: path.read_bytes() for path in Path("runs/x").rglob("*.*")}
    capsys.readouterr()
    run("--resume", "runs/x", "--eval_prompts", 3)
    again = capsys.readouterr().out
    assert re.search(r"eval_reward -\d+", again)
    for path, content in before.items():
        assert path.read_bytes() == content
    assert len(list(Path("runs/x/samples/again").glob("*.png"))) == 3
    run("--resume", "runs/x", "--epochs", 3, "--learning_rate", 0.02)
    longer = metrics("runs/x")
    assert longer[:3] == metrics(whole_run) and len(longer) == 4
    assert {"grad_norm", "eval_reward"} <= set(longer[3])
    config = json.loads(Path("runs/x/config.json").read_text())
    assert (config["epochs"], config["learning_rate"], config["groups"]) == (3, 0.02, 2)
    optimizer = torch.load("runs/x/checkpoint.pt")["optimizer"]
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(0.02 / 3)  # the third of three


@pytest.mark.parametrize("name", ["sd3", "flux", "sana"])
def test_stock_diffusers_with_the_lora_draws_the_evaluations_image(desk, family, name):
    """After an epoch, and a second one on resuming, with the options that save memory"""
    _, folder = family(name)
    run(*TINY, "--model", folder, "--resolution", 32, "--guidance", 2, "--reward", "custom.py:ink",
        "--learning_rate", 0.02, "--beta", 0, "--no-lr_decay", "--offload",
        "--gradient_checkpointing", "--name", "x")
    run("--resume", "runs/x", "--epochs", 2)
    _, first, second = metrics("runs/x")
    assert first["kl"] > 0 and second["kl"] > 0 and second["grad_norm"] > 0
    prompt = rewards.load_prompts(Config(reward="geneval"), "test")[0]["prompt"]
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)

    def image():
        return stock_image(pipe, prompt, 0, num_inference_steps=2, guidance_scale=2.0)

    ours = pixels(Image.open("runs/x/samples/0002/00.png"))
    before = image()
    pipe.load_lora_weights("runs/x")
    assert np.abs(image() - ours).max() <= 1 < 10 < np.abs(before - ours).mean()
    pipe.unload_lora_weights()
    pipe.load_lora_weights("runs/x/samples/0001")  # each evaluation keeps its own
    assert np.abs(image() - pixels(Image.open("runs/x/samples/0001/00.png"))).max() <= 1


def test_report_to_tensorboard_writes_events(desk):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(*TINY, "--reward", "custom.py:ink", "--name", "x", "--report_to", "tensorboard")
    path = min(Path("runs/x").rglob("*tfevents*"), key=lambda path: len(path.parts))
    logged = events.EventAccumulator(str(path)).Reload()
    scores, pictures = logged.Scalars("eval_reward"), logged.Images("before_after")
    expected = [row["eval_reward"] for row in metrics("runs/x")]
    assert [event.value for event in scores] == pytest.approx(expected)
    assert [event.step for event in scores] == [event.step for event in pictures] == [0, 1]
    shown = Image.open(io.BytesIO(pictures[1].encoded_image_string)).convert("RGB")
    drawn = Image.open("runs/x/before_after.png").convert("RGB")
    assert np.array_equal(shown, drawn)


@pytest.fixture(scope="module", autouse=True)
def two(tmp_path_factory):
    """A run in two processes, on the second core while the other tests are on the first"""
    folder = tmp_path_factory.mktemp("two")
    (folder / "custom.py").write_text(CUSTOM)
    for name in ("train.txt", "test.txt"):
        (folder / name).write_text("a dull circle\na red cross, painted\n")
    options = [*TINY, "--dataset", ".", "--reward", "custom.py:dull", "--std_over", "group",
               "--eval_every", "1", "--eval_reward", "diversity", "--seed", "1", "--name"]
    script = f"'{sys.executable}' -m torch.distributed.run --standalone --nproc_per_node=2"
    launch = f"{script} '{HERE}/flow_grpo.py'"
    command = f"{launch} {' '.join(options)} two && {launch} --resume runs/two --epochs 2"
    process = subprocess.Popen(command, cwd=folder, shell=True, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    yield SimpleNamespace(folder=folder, options=options, process=process)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)


def test_two_processes_are_as_good_as_one(desk, two, monkeypatch):
    """Each has one of two groups, of which one never has an advantage. They are resumed once.

    With this seed the other group is that of the first process, and then that of the second.
    """
    monkeypatch.chdir(two.folder)
    run(*two.options, "one", "--epochs", 2)
    said, _ = two.process.communicate(timeout=300)
    assert two.process.returncode == 0, said
    one, both = (torch.load(f"runs/{name}/checkpoint.pt")["weights"] for name in ("one", "two"))
    start = torch.cat([p.detach().flatten() for p in load_policy(small()).params])
    assert (one - start).norm() > 0 and (one - both).norm() < 1e-3 * (one - start).norm()
    for a, b in zip(metrics("runs/one"), metrics("runs/two"), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"kl", "clip_low", "clip_high"}:
            assert a[key] == pytest.approx(b[key], rel=1e-2, abs=1e-6), key
    assert said.count("on 2 x cpu") == 2 and said.count("epoch 0") == 1  # one of them speaks
    assert said.count("prompts are longer than --max_sequence_length 14 and get cut off") == 2
    assert Path("rank0").exists() and Path("rank1").exists()
