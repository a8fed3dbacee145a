"""The specification of flow_grpo.py and rewards.py. No GPU, no downloads: pytest test_flow_grpo.py

In the order of flow_grpo.py, then whole runs of the toy. toy/golden.json has the official numbers.
"""
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
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


def test_the_mathematics_is_in_float32_whatever_the_network_computes_in():
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
        scores = torch.full((2, 7), value, dtype=torch.float64)
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
    groups=2, group_size=4, batch_size=8, train_steps=6, window=2, latest_start=3, guidance=2.0,
    same_noise=False, updates=2, beta=0.0, learning_rate=1.5e-3, clip_range=1e-3, eval_prompts=2,
    eval_steps=4)
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
    assert drawn.latents.shape == (8, 3, 8, 12, 12) and drawn.log_prob.shape == (8, 2)
    assert drawn.window == range(1, 3) and torch.equal(drawn.times, policy.time_grid(6))
    for image in (0, 3, 5):
        condition = policy.encode([PROMPTS[image // 4]])
        generator = torch.Generator().manual_seed(FRESH[image])
        x = torch.randn(1, 8, 12, 12, generator=torch.Generator().manual_seed(FIRST[image]))
        with torch.no_grad():
            for i in range(6):
                v = policy.velocity(x, drawn.times[i], condition)
                if i in (1, 2):
                    close(drawn.latents[image, i - 1], x[0], 1e-4)
                    step = make_step(drawn.times, i, noise_level, sde)
                    fresh_noise = torch.randn(1, 8, 12, 12, generator=generator)
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_before_the_first_update_the_ratio_is_1_and_for_the_base_the_kl_is_0(guidance, precision):
    policy = load_policy(small(updates=1, guidance=guidance, precision=precision, train_steps=3))
    first = learn(policy, draw(policy, range(1, 2)))
    moved = learn(perturb(policy), draw(policy, range(1, 2)))
    assert first["kl"] == 0 < moved["kl"]
    assert max(first["ratio_deviation"], moved["ratio_deviation"]) < 1e-5


def test_a_wrong_ratio_stops_the_run_whichever_image_has_it():
    """The last micro-batch of the first update holds the image that is off."""
    policy = load_policy(small(batch_size=3))
    for image, off, problem in [(5, 0.1, "off by 0.1"), (0, -0.1, "must be 1"),
                                (5, torch.nan, "not finite"), (7, torch.nan, "not finite")]:
        drawn, before = draw(policy), weights(policy)
        drawn.log_prob[image, 1] += off
        assert problem in exits(learn, policy, drawn)
        assert torch.equal(weights(policy), before) or image == 7  # only in the second update
        policy = load_policy(small(batch_size=3))


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
    policy = perturb(load_policy(small(beta=0.3, sde=sde, noise_level=noise_level, batch_size=3)),
                     0.005)
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
    assert "velocity at t = 1.000 is not finite" in message and "--model toy itself" in message
    policy.updates = 1
    assert "lower --learning_rate" in exits(draw, policy)
    assert "pixels" in exits(policy.decode, torch.full((1, 8, 12, 12), torch.nan))


# ------------------------------------------------------------------------------------- 4. training
def grey(*levels):
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
    drawn, updates = SimpleNamespace(images=grey(0, 255, 0, 255, *[51] * 8)), []
    train_set, config = [{"prompt": p} for p in "abc"], small(groups=3)
    monkeypatch.setattr(flow_grpo, "rollout", lambda *args: drawn)
    monkeypatch.setattr(flow_grpo, "update", lambda *args: updates.append(args) or {"kl": 0.25})
    reward = {"bright": (bright, 2.0), "half": (half, 0.5)}
    metrics = flow_grpo.train_epoch(None, config, reward, train_set, 1)
    total = np.array([0, 2, 0, 2, *[0.4] * 8]) + 0.25
    assert {key: float(value) for key, value in metrics.items()} == pytest.approx({
        "reward/bright": 0.3, "reward/half": 0.5, "reward": total.mean(), "kl": 0.25,
        "group_std": (4 / 3) ** 0.5 / 3, "no_signal": 2 / 3})
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
        return SimpleNamespace(images=grey(255, 0, 254, 255, 51, 102)[:len(args[1])])
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
        load_policy(small(precision=precision, gradient_checkpointing=True, seed=seed))
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
    x = torch.ones(2, 8, 12, 12)
    v = policy.velocity(x, torch.tensor([0.999, 0.4441]), policy.encode(PROMPTS))
    for x, t in given:
        assert x.dtype == torch.bfloat16 and t.tolist() == pytest.approx([0.999, 0.4441], rel=1e-6)
    assert v.dtype == torch.float32
    close(v, torch.full_like(v, 3 + 4.37 * (2 - 3)))


def test_both_branches_of_guidance_carry_gradient():
    policy = perturb(load_policy(small(guidance=3.0)))
    condition, x, t = policy.encode(PROMPTS[:1]), torch.ones(1, 8, 12, 12), torch.tensor(0.7)
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
    close(torch.stack(clipped), [0.5, 1.0], 1e-3)


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
TEXTS = ["a <pad> cat", "the dog"]  # of different lengths


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


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_rollout_without_noise_is_the_stock_pipelines_image(family, name, guidance):
    """For another model, add it to FAMILIES and to toy/tiny.py. If it passes, it is right."""
    pipe, folder = family(name)
    policy = load_policy(small(model=folder, resolution=32, guidance=guidance))
    for image, text, seed in zip(ode_images(policy), TEXTS, (3, 4)):
        expected = stock_image(pipe, text, seed, num_inference_steps=6, guidance_scale=guidance)
        assert np.abs(image - expected).max() <= 1
    for _ in range(2):  # asked again, the times are not shifted again (diffusers PR 13962)
        close(policy.time_grid(6), pipe.scheduler.sigmas)


MISTAKES = {
    "1 - t": lambda forward: lambda x, t, *c: forward(x, 1 - t, *c),
    "t in thousandths": lambda forward: lambda x, t, *c: forward(x, t / 1000, *c),
    "-v": lambda forward: lambda x, t, *c: -forward(x, t, *c),
    "no second condition": lambda forward: lambda x, t, a, b: forward(x, t, a, torch.ones_like(b)),
    "the first prompt": lambda forward: lambda x, t, *c: forward(
        x, t, *[part[:1].expand_as(part) for part in c]),
    "one token": lambda forward: lambda x, t, a, b: forward(x, t, a[:, :1].expand_as(a), b),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("name", FAMILIES[1:])
def test_a_mistake_in_the_class_of_a_family_would_be_seen(family, name, mistake):
    """By far more than the one grey level that the test above allows"""
    _, folder = family(name)
    policy = load_policy(small(model=folder, resolution=32, guidance=1.0))
    right = ode_images(policy)
    policy.forward = MISTAKES[mistake](policy.forward)
    assert max(np.abs(a - b).max() for a, b in zip(right, ode_images(policy))) >= 8


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
    config = small(model=str(folder))
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
    config = small(max_sequence_length=9)
    policy = load_policy(config)
    rows = [{"prompt": p} for p in ('a sign that says "CAT"', "a photo of a bench",
                                    'a sign that says "CATALOGUES"')]
    flow_grpo.warn_about_prompts(policy, config, rows)
    said = capsys.readouterr().out
    assert "1 prompts are longer than --max_sequence_length 9" in said and "CATALOGUES" in said
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
    assert f"--model {tmp_path}/x" in exits(load_policy, small(model=f"{tmp_path}/x"))
