"""The specification of flow_grpo.py and rewards.py. No GPU, no downloads: pytest test_flow_grpo.py

In the order of flow_grpo.py, then whole runs of the toy. toy/golden.json has the long tables.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

os.environ["CUDA_VISIBLE_DEVICES"] = ""

import diffusers
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import flow_grpo
import rewards
from flow_grpo import Config, load_policy, sde_mean, sde_step, sde_steps

signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell takes it away
torch.set_num_threads(1)  # for tensors as small as here, more threads only wait for each other
HERE = Path(__file__).resolve().parent
GOLDEN = json.loads((HERE / "toy/golden.json").read_text())
tiny, world = (rewards.load_file(HERE / "toy" / name) for name in ("tiny.py", "world.py"))


def close(a, b, tolerance=2e-5):
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    torch.testing.assert_close(a, b.to(a.dtype), rtol=tolerance, atol=tolerance)


# --------------------------------------------------------------------------------- the mathematics
OFFICIAL = GOLDEN["official"]
X, V, V_REF, NOISE = (torch.tensor(OFFICIAL[key]).view(2, 2, 2, 2)
                      for key in ("x", "v", "v_ref", "noise"))


@pytest.mark.parametrize("i", [0, 4, 8])  # 0: t = 1, where sigma needs the second time
@pytest.mark.parametrize("sde, noise_level", [("flow", 0.7), ("cps", 0.8)])
def test_a_step_gives_the_official_numbers(sde, noise_level, i):
    expected = OFFICIAL[sde][str(i)]
    step = sde_steps(torch.tensor(OFFICIAL["times"]), noise_level, sde).at(i)
    x_next, log_prob, mean = sde_step(X, V, step, noise=NOISE)
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
    kl = flow_grpo.gaussian_kl(mean, reference.mean, step.kl_std)
    close(kl.mean() / expected["kl"], 1.0, 1e-3)
    kl = torch.distributions.kl_divergence(gaussian, reference).mean((1, 2, 3))
    close(flow_grpo.gaussian_kl(mean, reference.mean, step.std), kl)


@pytest.mark.parametrize("noise_level", [0.0, 0.7])
def test_a_step_is_equation_9_and_without_noise_the_euler_step(noise_level):
    step = sde_steps(torch.linspace(1, 0, 11), noise_level).at(torch.tensor([0, 8]))
    t, dt, sigma = step.t, step.s - step.t, step.kl_std  # with sigma 0 it is x + v * dt
    close(sde_mean(X, V, step), X + (V + sigma**2 / (2 * t) * (X + (1 - t) * V)) * dt)
    close(step.std, sigma * (-dt).sqrt())
    close(sigma.flatten(), noise_level * torch.tensor([1 / 0.1, 0.2 / 0.8]).sqrt())


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
    torch.manual_seed(0)
    variance = lambda t: (1 - t) ** 2 * 0.5**2 + t**2
    steps = sde_steps(torch.linspace(0.95, 0, 201), 0.7)
    steps = steps._replace(keep=keep(steps))
    x, worst = variance(0.95) ** 0.5 * torch.randn(40_000, 1, 1, 1), 0
    for i in range(200):
        step = steps.at(i)
        v = (step.t - (1 - step.t) * 0.5**2) / variance(step.t) * x  # E[noise - data], given x
        x, _, _ = sde_step(x, v, step, noise=torch.randn_like(x))
        worst = max(worst, (x.std() / variance(step.s).sqrt() - 1).abs())
    tolerance = 5 / 80_000**0.5 + 0.01
    assert worst < tolerance if right else worst > 2 * tolerance


@pytest.mark.parametrize("std_over", ["batch", "group"])
def test_advantages_are_the_official_numbers(std_over):
    got = flow_grpo.group_advantages(torch.tensor(OFFICIAL["rewards"]).view(3, 4), std_over)
    close(got.flatten(), OFFICIAL["advantages"][std_over])
    assert flow_grpo.group_advantages(torch.tensor([[0.0] * 99 + [1e9]]), std_over).max() == 5
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


# ------------------------------------------------------------------------------ rollout and update
PROMPTS = ['a sign that says "CAT"', 'a sign that says "DOG"']
SMALL = dict(
    groups=2, group_size=4, batch_size=8, train_steps=6, window=2, latest_start=3, guidance=2.0,
    same_noise=False, updates=2, beta=0.0, learning_rate=1.5e-3, clip_range=1e-3, eval_prompts=2,
    eval_steps=4)
small = lambda **options: Config(**SMALL | options)
weights = lambda policy: torch.cat([p.detach().flatten() for p in policy.params])


def perturb(policy, size=0.02):
    torch.manual_seed(1)
    for p in policy.params:
        p.data += size * torch.randn_like(p)
    return policy


def replace_step(policy, monkeypatch, action, updates_before=0):
    """The optimizer does this instead of its step. It still counts."""
    count = torch.tensor(float(updates_before))
    policy.optimizer.state[policy.params[0]]["step"] = count
    monkeypatch.setattr(policy.optimizer, "step", lambda: (action(), count.add_(1)))


def optimize(policy, norm):
    """One update with a gradient of this norm"""
    for p in policy.params:
        p.grad = torch.full_like(p, norm / len(weights(policy)) ** 0.5)
    return policy.optimize()


def gradient(policy):
    """Of all that is trained, in one row, and then none is left"""
    row = torch.cat([p.grad.flatten() for p in policy.params])
    policy.optimizer.zero_grad()
    return row


def draw(policy, window=range(1, 3), **changes):
    config = replace(policy.config, **changes)
    prompts = [prompt for prompt in PROMPTS for _ in range(config.group_size)]
    return flow_grpo.rollout(policy, config, prompts, [*range(8)], config.train_steps, window)


def learn(policy, drawn, advantages=torch.linspace(-1, 1, 8)):
    return flow_grpo.update(policy, policy.config, drawn, advantages, random.Random(0))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_before_the_first_update_the_ratio_is_1_and_for_the_base_the_kl_is_0(guidance, precision):
    policy = load_policy(small(updates=1, guidance=guidance, precision=precision, train_steps=3))
    first = learn(policy, draw(policy, range(1, 2)))
    moved = learn(perturb(policy), draw(policy, range(1, 2)))
    assert first["kl"] == 0 < moved["kl"]
    assert max(first["ratio_deviation"], moved["ratio_deviation"]) < 1e-5


@pytest.mark.parametrize("off, clip_range", [(0.1, 1e-3), (-0.1, 1e-3), (6e-5, 1e-4)])
def test_a_run_stops_when_sampling_and_training_disagree(capsys, off, clip_range):
    """By more than half the clip range, in the last case"""
    policy = load_policy(small(clip_range=clip_range))
    drawn, before = draw(policy), weights(policy)
    drawn.log_prob += off
    with pytest.raises(SystemExit):
        learn(policy, drawn)
    assert "ratio" in capsys.readouterr().err and torch.equal(weights(policy), before)


def equation_5(policy, drawn, advantages, images):
    """Its gradient by plain loops: every image at every step, one at a time, and the mean of all"""
    losses = []
    for image in images:
        for k, i in enumerate(drawn.window):
            step = drawn.steps.at(i)
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


@pytest.mark.parametrize("sde", ["flow", "cps"])
def test_an_update_is_the_gradient_of_equation_5(monkeypatch, sde):
    """Each of two updates has half of each group, in micro-batches that do not divide it."""
    policy = perturb(load_policy(small(beta=0.3, sde=sde, updates=2, batch_size=3)), 0.005)
    drawn = draw(policy)
    advantages = torch.tensor([1.0, 0.0, -0.5, 0.0, 2.0, 0.0, 0.0, -1.0])
    rng, expected, got = random.Random(0), [], []
    orders = [rng.sample(range(4), 4) for _ in range(2)]
    for half in (slice(0, 2), slice(2, 4)):
        images = [4 * group + member for group in range(2) for member in orders[group][half]]
        expected.append(equation_5(policy, drawn, advantages, images))
    replace_step(policy, monkeypatch, lambda: got.append(gradient(policy)))
    learn(policy, drawn, advantages)
    for own, wanted in zip(got, expected, strict=True):
        assert 0 < wanted.norm() < 1  # below 1 it was not clipped
        close(own / wanted.norm(), wanted / wanted.norm(), 1e-4)


def test_a_gradient_is_clipped_at_1_and_its_norm_before_that_is_noted(monkeypatch):
    policy, clipped = load_policy(small()), []
    replace_step(policy, monkeypatch, lambda: clipped.append(gradient(policy).norm()))
    for norm in (0.5, 7.0):
        assert optimize(policy, norm) == pytest.approx(norm, rel=1e-3)
    close(torch.stack(clipped), [0.5, 1.0], 1e-3)


@pytest.mark.parametrize("eps, warned", [(1e-8, False), (1e-6, True)])
def test_adams_eps_must_be_far_below_the_gradient(capsys, eps, warned):
    policy = load_policy(small(adam_eps=eps))
    assert {"eps": eps, "weight_decay": 1e-4}.items() <= policy.optimizer.param_groups[0].items()
    for _ in range(2):  # it is said once
        optimize(policy, 1e-3)
    said = capsys.readouterr().out
    assert (f"--adam_eps {eps:.0e}" in said and said.count("\n") == 1) == warned


@pytest.mark.parametrize("options, updates_before, expected", [
    (dict(ema_every=1), 0, [1 - 2 / 11]),  # the decay is (1 + n) / (10 + n), this update counted
    (dict(ema_every=2), 0, [0, 2 * (1 - 3 / 12), 2 * (1 - 3 / 12)]),
    (dict(ema_decay=0.9), 1000, [0.1]),
    (dict(ema_decay=0.0), 0, [1, 2])])  # off: the weights themselves
def test_the_average_grows_into_its_decay(monkeypatch, options, updates_before, expected):
    """How far it has come, when every update adds 1 to all weights"""
    policy = load_policy(small(**options))
    add_1 = lambda: [p.data.add_(1) for p in policy.params]
    replace_step(policy, monkeypatch, add_1, updates_before)
    start = policy.average.clone()
    for far in expected:
        optimize(policy, 0)
        close((policy.average - start).mean(), far, 1e-4)


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


def test_offload_lets_the_network_and_the_text_encoders_take_turns(monkeypatch):
    policy, moves = load_policy(small(offload=True)), []
    assert len(policy.encoders) == 3
    for name, module in (("network", policy.network), ("encoders", policy.encoders)):
        monkeypatch.setattr(module, "cpu", lambda name=name: moves.append(f"{name} leaves"))
        monkeypatch.setattr(module, "to", lambda _, name=name: moves.append(f"{name} comes"))
    policy.encode(PROMPTS)
    assert moves == ["network leaves", "encoders comes", "encoders leaves", "network comes"]


@pytest.mark.parametrize("sde", ["flow", "cps"])
def test_a_rollout_holds_its_sde_steps_as_they_are_scored(sde):
    """And none of its images depends on the others, or on the size of micro-batches."""
    policy = load_policy(small(sde=sde, guidance=1.0))
    drawn, apart = draw(policy, range(3)), draw(policy, batch_size=3)
    assert drawn.latents.shape == (8, 4, 8, 12, 12) and drawn.log_prob.shape == (8, 3)
    close(draw(policy).latents, apart.latents, 1e-4)
    for seed in range(8):  # a seed's generator gives the first noise, as in a stock pipeline,
        generator = torch.Generator().manual_seed(seed)
        close(drawn.latents[seed, 0], torch.randn(8, 12, 12, generator=generator))
        for k in range(3):  # and then the noise of each SDE step
            step = drawn.steps.at(k)
            x, x_next = drawn.latents[seed:seed + 1, k], drawn.latents[seed:seed + 1, k + 1]
            v = policy.velocity(x, step.t, [c[seed:seed + 1] for c in drawn.condition])
            noise = (x_next - sde_mean(x, v, step)) / step.std
            close(noise[0], torch.randn(8, 12, 12, generator=generator), 1e-3)


def test_with_the_same_noise_a_group_differs_by_the_sde_alone(monkeypatch):
    config = small(same_noise=True, batch_size=3)
    policy, drawn = load_policy(config), []
    monkeypatch.setattr(flow_grpo, "update", lambda *args: drawn.append(args[2]) or {})
    train_set = [(prompt, {}) for prompt in PROMPTS]
    flow_grpo.train_epoch(policy, config, rewards.load("flow_grpo:redness"), train_set, 0)
    latents = drawn[0].latents.unflatten(0, (2, 4))  # [groups, group_size, K+1, C, H, W]
    before, after = latents[:, :, 0], latents[:, :, 1]
    close(before, before[:, :1].expand_as(before), 1e-4)
    assert (before[0, 0] - before[1, 0]).abs().mean() > 0.3
    for other in range(1, 4):
        assert (after[:, 0] - after[:, other]).abs().mean() > 0.1


@pytest.mark.parametrize("steps, window", [(4, 1), (5, 2), (10, 8)])
def test_the_window_never_has_the_last_step(steps, window):
    latest = steps - 1 - window
    config = small(train_steps=steps, window=window, latest_start=latest)
    windows = {flow_grpo.choose_window(config, random.Random(i)) for i in range(200)}
    assert windows == {range(start, start + window) for start in range(latest + 1)}
    assert flow_grpo.choose_window(replace(config, window=0), None) == range(steps - 1)


def test_an_epoch_has_each_prompt_group_size_times_and_no_seed_twice(monkeypatch):
    epochs = []
    monkeypatch.setattr(flow_grpo, "rollout", lambda *args: epochs.append(args[2:4]) or 1 / 0)
    config, train_set = small(groups=3, group_size=5), [(f"prompt {i}", {}) for i in range(7)]
    for epoch, seed in [*((epoch, 0) for epoch in range(50)), (0, 1)]:
        with pytest.raises(ZeroDivisionError):
            flow_grpo.train_epoch(None, replace(config, seed=seed), None, train_set, epoch)
    for prompts, _ in epochs:
        assert len(set(prompts)) == 3
        assert list(prompts) == [prompt for prompt in prompts[::5] for _ in range(5)]
    assert len({prompts for prompts, _ in epochs}) > 40
    assert len({seed for _, seeds in epochs for seed in seeds}) == 51 * 15


def test_what_is_not_finite_stops_the_run_before_the_weights_change(monkeypatch):
    policy = load_policy(small())
    drawn, before, advantages = draw(policy), weights(policy), torch.zeros(8)
    advantages[5] = torch.nan
    with pytest.raises(FloatingPointError, match="gradients.*lower --learning_rate"):
        learn(policy, drawn, advantages)
    assert torch.equal(weights(policy), before)
    monkeypatch.setattr(policy, "velocity", lambda x, t, condition: x / (t > 0.6))
    with pytest.raises(FloatingPointError, match='latents after step 3 of .*"CAT"'):
        draw(policy)


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


# -------------------------------------------------------------------------------- what is measured
grey = lambda *levels: [Image.new("RGB", (8, 8), (level, level, level)) for level in levels]
bright = lambda images, prompts, metadata: [image.getpixel((0, 0))[0] / 255 for image in images]
half = lambda images, prompts, metadata: [0.5] * len(images)
floats = lambda metrics: {key: float(value) for key, value in metrics.items()}


def test_the_metrics_of_an_update(monkeypatch):
    kl = torch.tensor([0.5, 0.0, 0.1, 0.0], requires_grad=True)
    terms = [(kl, kl, torch.tensor(ratio)) for ratio in ([1.0] * 4, [1.2, 0.85, 1.11, 1.0])]
    monkeypatch.setattr(flow_grpo, "losses", Mock(side_effect=terms))
    policy = Mock(config=small(groups=1, clip_range=0.1), optimize=Mock(side_effect=[0.25, 0.75]))
    assert floats(learn(policy, Mock(window=range(2)))) == pytest.approx(dict(
        kl=0.15, ratio_deviation=0.2, clip_low=0.125, clip_high=0.25, grad_norm=0.5), rel=1e-4)


def test_the_metrics_of_an_epoch(monkeypatch):
    """Three groups: rewards 0, 1, 0, 1, and twice four equal ones, which teach nothing"""
    drawn, updates = SimpleNamespace(images=grey(0, 255, 0, 255, *[51] * 8)), []
    train_set, config = [("a", {}), ("b", {}), ("c", {})], small(groups=3)
    monkeypatch.setattr(flow_grpo, "rollout", lambda *args: drawn)
    monkeypatch.setattr(flow_grpo, "update", lambda *args: updates.append(args) or {"kl": 0.25})
    reward = {"bright": (bright, 2.0), "half": (half, 0.5)}
    metrics = flow_grpo.train_epoch(None, config, reward, train_set, 1)
    total = np.array([0, 2, 0, 2, *[0.4] * 8]) + 0.25
    assert floats(metrics) == pytest.approx({
        "reward/bright": 0.3, "reward/half": 0.5, "reward": total.mean(), "kl": 0.25,
        "reward_std": total.std(ddof=1), "group_std": (4 / 3) ** 0.5 / 3, "no_signal": 2 / 3})
    (_, _, its_drawn, advantages, _), = updates
    assert its_drawn is drawn
    close(advantages, [-1 / total.std(), 1 / total.std()] * 2 + [0] * 8, 1e-3)
    # GDPO divides each reward by its own spread in a group: the narrow one counts, too.
    flow_grpo.train_epoch(None, replace(config, combine="gdpo"), reward, train_set, 1)
    close(updates[1][3], [-(3**0.5), 3**0.5] * 2 + [0] * 8, 1e-3)  # of std 1 over the batch
    wide, narrow = np.random.default_rng(0).normal(0, [[[100]], [[1]]], (2, 3, 4))
    reward = {"wide": (lambda *_: wide.flatten(), 1), "narrow": (lambda *_: narrow.flatten(), 9)}
    flow_grpo.train_epoch(None, replace(config, combine="gdpo"), reward, train_set, 1)
    standard = lambda own: (own - own.mean(1, keepdims=True)) / own.std(1, keepdims=True)
    expected = standard(wide) + 9 * standard(narrow)
    close(updates[2][3], expected.flatten() / expected.std(), 1e-3)


def test_the_metrics_of_an_evaluation(monkeypatch, tmp_path):
    """Averaged weights draw. Every image has its own seed. It is right if the first reward is 1."""
    config = small(eval_prompts=3, eval_per_prompt=2, eval_steps=7)
    policy, asked = load_policy(config), []
    before = weights(policy)
    policy.average += 1

    def rollout(policy, config, *args):
        asked.append(args)
        close(weights(policy), before + 1)
        return SimpleNamespace(images=grey(255, 0, 255, 255, 51, 102)[:len(args[0])])
    monkeypatch.setattr(flow_grpo, "rollout", rollout)
    reward = {"bright": (bright, 1.0), "half": (half, 0.0)}
    test_set = [("a", {"tag": "x"}), ("b", {"tag": "y"}), ("c", {"tag": "x"}), ("d", {})]
    metrics = flow_grpo.evaluate(policy, config, reward, test_set, tmp_path, 12)
    assert asked == [(("a", "a", "b", "b", "c", "c"), (0, 1, 2, 3, 4, 5), 7)]
    assert floats(metrics) == pytest.approx({
        "eval_reward": 0.6, "eval_reward/bright": 0.6, "eval_reward/half": 0.5,
        "eval_accuracy": 0.5, "eval_accuracy/x": 0.25, "eval_accuracy/y": 1.0,
        "eval_diversity": (1 + 0 + 0.2) / 3})
    assert (tmp_path / "samples/0012.png").exists() and torch.equal(weights(policy), before)
    one = replace(config, eval_per_prompt=1)  # of which there is no diversity
    one = flow_grpo.evaluate(policy, one, reward, test_set, tmp_path, 12)
    assert "eval_accuracy" in one and "eval_diversity" not in one


# ------------------------------------------------------------------------------- diffusers' models
def stock_image(pipe, prompt, seed, **options):
    """What diffusers itself draws, as the README says"""
    pipe.set_progress_bar_config(disable=True)
    if "Sana" in type(pipe).__name__:
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        options["use_resolution_binning"] = False  # it would draw another size
    generator = torch.Generator().manual_seed(seed)
    image, = pipe(prompt, generator=generator, height=32, width=32, max_sequence_length=14,
                  **options).images
    return np.asarray(image, float)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("family", ["toy", "sd3", "flux", "flux-schnell", "sana"])
def test_a_rollout_without_noise_is_the_stock_pipelines_image(tmp_path, family, guidance):
    pipe = tiny.pipeline(family)
    pipe.save_pretrained(tmp_path)
    policy = load_policy(small(model=str(tmp_path), resolution=32, guidance=guidance))
    drawn = flow_grpo.rollout(policy, policy.config, ("<pad> cat", "a dog"), [3, 4], 6)
    expected = stock_image(pipe, "a dog", 4, num_inference_steps=6, guidance_scale=guidance)
    other, own = (np.asarray(image, float) for image in drawn.images)
    assert np.abs(own - expected).max() <= 1 < np.abs(other - expected).max()
    for _ in range(2):  # asked again, the times are not shifted again (diffusers PR 13962)
        close(policy.time_grid(6), pipe.scheduler.sigmas)


@pytest.mark.parametrize("family, precision", [
    ("sd3", "fp32"), ("sd3", "bf16"), ("flux", "fp32"), ("sana", "fp32")])
def test_stock_diffusers_with_the_lora_draws_the_evaluations_image(desk, family, precision):
    """After an epoch, and a second one on resuming, with the options that save memory"""
    pipe = tiny.pipeline(family)
    pipe.save_pretrained("tiny")
    run(*TINY, "--model", "tiny", "--resolution", 32, "--guidance", 2, "--reward",
        "custom:keeps_the_first", "--learning_rate", 0.1, "--beta", 0, "--no-lr_decay",
        "--precision", precision, "--offload", "--gradient_checkpointing", "--name", "x")
    run("--resume", "runs/x", "--epochs", 2)
    _, first, second = metrics("runs/x")
    assert first["kl"] < second["kl"] and second["grad_norm"] > 0
    lora = safe_open("runs/x/pytorch_lora_weights.safetensors", "pt")
    assert lora.metadata() is None  # peft's has a set, in any order
    if precision == "fp32":
        prompt = flow_grpo.load_prompts(Config(reward="geneval"), "test")[0][0]
        ours = np.asarray(Image.open("first.png"), float)
        draw = lambda: stock_image(pipe, prompt, 0, num_inference_steps=2, guidance_scale=2.0)
        before = draw()
        pipe.load_lora_weights("runs/x")
        assert np.abs(draw() - ours).max() <= 1 < 10 < np.abs(before - ours).mean()


@pytest.mark.parametrize("preset, real", GOLDEN["networks"].items())
def test_the_lora_at_the_real_size(preset, real, monkeypatch):
    """The real networks' own configurations, without their weights"""
    kind = getattr(flow_grpo, real["policy"])
    monkeypatch.setattr(flow_grpo.PROCESSES, "device", "meta")
    monkeypatch.setattr(kind, "encode", Mock())
    with torch.device("meta"):
        network = getattr(diffusers, real["class"])(**real["config"])
        pipe = Mock(transformer=network, components={}, vae_scale_factor=8)
        policy = kind(pipe, flow_grpo.parse_config(["--preset", preset]))
    assert len(policy.params) == real["lora_tensors"]
    assert sum(p.numel() for p in policy.params) == real["lora_weights"]


# ------------------------------------------------------------------------------------------ rewards
PAPER = Image.new("RGB", (48, 48), "white")
metadata = lambda *include, tag="": {"tag": tag, "include": list(include)}
asked = lambda name, count=1, **more: {"class": name, "count": count, **more}
box = lambda x, y: (x, y, x + 10, y + 10)
thing = lambda name, x=0, y=0, color="red": {"class": name, "color": color, "box": box(x, y)}


def error_of(function, *args):
    with pytest.raises(rewards.RewardError) as error:
        function(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_the_ocr_rule():
    words = ["CAT", "LION", "MAP", "FROG", "XKWQ"]
    signs = [world.paint_sign(word, random.Random(word)) for word in words]
    prompts = [f'a sign that says "{word}"' for word in ("x y zCAT", *words[1:], "CAT")]
    images = [*signs[:4], signs[4].convert("CMYK"), PAPER]
    assert rewards.ocr()(images, prompts, None) == [0.5, 1, 1, 1, 1, 0]
    from rapidfuzz.distance import Levenshtein
    score = lambda text, target: rewards.text_score(text, target, Levenshtein.distance)
    assert score("say HELLOWORLD!", "Hello World") == 1
    assert score("HELO", "HELLO") == pytest.approx(0.8)
    assert score("completely different", "HI") == 0  # never below 0
    assert rewards.quoted('a "BIG CAT" and "X"') == "BIG CAT"


@pytest.mark.parametrize(
    "tag", ["single_object", "two_object", "counting", "colors", "position", "color_attr"])
def test_geneval_knows_right_from_wrong(tag):
    rng, reward = random.Random(0), world.geneval()
    rows = rng.sample(world.scenes(tag), 4)
    prompts = [row["prompt"] for row in rows]
    good, bad = ([world.paint_scene(row, rng, careless=careless) for row in rows]
                 for careless in (False, True))
    assert reward(good, prompts, rows) == [1] * 4 and max(reward(bad, prompts, rows)) < 1


def test_the_geneval_rule():
    score = lambda found, *include: pytest.approx(rewards.geneval_score(found, metadata(*include)))
    cup, blue, red = thing("cup"), thing("cup", color="blue"), asked("cup", color="red")
    assert score([cup] * 3, asked("cup", 4)) == 0.75
    assert score([cup] * 4, asked("cup")) == -2  # PAPER: not cut off at 0
    assert score([cup], red) == 1
    assert score([blue], red) == 0.5
    assert score([cup] * 2, red) == 0  # the count gives 0 and makes the colour void
    assert score([cup, blue], red) == 0  # even if one of them is red
    assert score([cup, blue], asked("cup", 2, color="red")) == 0.75

    assert rewards.relations(box(0, 0), box(30, 40)) == {"left of", "above"}
    assert rewards.relations(box(0, 40), box(4, 0)) == {"below"}
    left = asked("dog", position=["left of", 0])
    assert score([thing("cup", 30), thing("dog", 0, 2)], asked("cup"), left) == 1
    assert score([cup, thing("dog", 30)], asked("cup"), left) == 2 / 3  # official code: 0.75
    assert score([thing("cup", 1), thing("dog")], asked("cup"), left) == 2 / 3  # too near to tell
    assert score([thing("dog")], asked("cup"), left) == 1 / 3
    cups = [thing("cup", 30), thing("cup", 60)]  # a place must hold against both
    assert score([*cups, thing("dog")], asked("cup", 2), left) == 1
    assert score([*cups, thing("dog", 45)], asked("cup", 2), left) == 2 / 3

    # Nothing has a place next to what is itself wrong: numbers of the official evaluate_reward
    found = [thing("hydrant", 0, 40), thing("hydrant", 3, 40), thing("vase")]
    vase = asked("vase", position=["above", 0])
    assert score(found, asked("hydrant"), vase) == 1 / 3
    assert score(found, asked("hydrant", 2), vase) == 1
    assert score(found, asked("hydrant", 2, color="blue"), vase) == 2 / 4


@pytest.mark.parametrize("name", ["geneval", "toy_taste"])
def test_all_prompts_are_checked_by_name_and_with_what_would_work(name):
    config, good = Config(reward=name), ("good", world.scenes("position")[0])
    rewards.load_both(config, [good])
    check = lambda row: error_of(rewards.load_both, config, [good, ("bad", row)])
    problem = check(metadata(asked("wine glass")))
    assert f"reward {name}: the prompt 'bad' asks for a wine glass;" in problem
    assert "geneval_photo" in problem and "circle" in problem
    assert "pink circle" in check(metadata(asked("circle", color="pink")))
    place = check(metadata(asked("circle"), asked("cross", position=["left", 0])))
    assert "'left'" in place and "left of, right of, above, below" in place
    assert "*_metadata.jsonl" in check({})


# Rewards of one's own: found by file, protected from each other, never trusted.

CUSTOM = '''
from __future__ import annotations
import os, sys, numpy
from dataclasses import dataclass
@dataclass
class Score:  # dataclasses look up the module that they are in
    value: float = 3.0
def three(images, prompts, metadata): return [Score().value] * len(images)
def ink(images, prompts, metadata):
    return [-numpy.asarray(image, float).mean() for image in images]
def keeps_the_first(images, prompts, metadata):
    images[0].save("first.png")
    return ink(images, prompts, metadata)
def paints(images, prompts, metadata):
    for image, row in zip(images, metadata):
        image.paste("red", (0, 0, *image.size))
        row["asked"].clear()
    return [1.0] * len(images)
def looks(images, prompts, metadata):
    return [image.getpixel((0, 0))[1] + len(row["asked"]) for image, row in zip(images, metadata)]
def text(images, prompts, metadata): return "12"
def table(images, prompts, metadata): return {1: 1.0, 2: 2.0}
def once(images, prompts, metadata): return {1.0, 2.0}
def leaves(images, prompts, metadata): sys.exit(0)
def stops(images, prompts, metadata): return [float("nan")] * len(images)
def short(images, prompts, metadata): return [1.0]
def raises(images, prompts, metadata): raise KeyError("two\\nlines")
def dull(images, prompts, metadata):
    open(f"rank{os.environ.get('RANK', 0)}", "a").close()
    scores = zip(prompts, ink(images, prompts, metadata))
    return [0.5 if "dull" in prompt else score for prompt, score in scores]
'''


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A current folder with a user's rewards only"""
    monkeypatch.chdir(tmp_path)
    Path("custom.py").write_text(CUSTOM)
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    yield tmp_path
    signal.signal(signal.SIGTERM, handler)


def score_two(*specs):
    """Of two white images, which must stay as they are"""
    images = [Image.new("RGB", (width, 8), "white") for width in (8, 16)]
    rows = [{"asked": ["a", "b"]}, {"asked": ["c"]}]
    loaded = rewards.load(",".join(specs))
    scores = rewards.score(loaded, images, ["first", "second"], rows)
    assert images[0].getpixel((0, 0)) == (255, 255, 255) and rows[0]["asked"] == ["a", "b"]
    return scores


def test_a_weighted_sum_keeps_its_parts_and_no_reward_sees_what_another_did(desk):
    assert score_two("custom:paints:0.5", "custom:looks:2") == {
        "custom:paints": [1, 1], "custom:looks": [257, 256], "reward": [514.5, 512.5]}


@pytest.mark.parametrize("name, says", [
    ("text", "gave a str, not a list of numbers"), ("table", "gave a dict, not a list of numbers"),
    ("once", "gave a set, not a list of numbers"), ("leaves", "SystemExit: 0 (custom.py line 24)"),
    ("short", "gave 1 scores for 2 images"), ("stops", "gave nan for 'first'"),
    ("raises", "KeyError: 'two\\nlines' (custom.py line 27)")])
def test_a_bad_result_stops_the_run_with_the_rewards_name(desk, name, says):
    problem = error_of(score_two, f"custom:{name}")
    assert f"reward custom:{name}" in problem and says in problem and "'first'" in problem


@pytest.mark.parametrize("spec, says", GOLDEN["rewards_not_found"].items())
def test_a_reward_that_cannot_be_loaded_is_one_line(desk, monkeypatch, spec, says):
    monkeypatch.setitem(rewards.REWARDS, "ocr", lambda: None)
    Path("bye.py").write_text("raise SystemExit(0)")
    for option in ("--reward ", "--eval_reward "):
        assert says.replace("--reward ", option) in error_of(rewards.load, spec, option.strip())


def test_a_file_is_loaded_by_its_path(desk):
    assert score_two("custom.py:three")["reward"] == [3, 3]
    Path("sub").mkdir()
    Path("sub/neighbour.py").touch()
    Path("sub/other.py").write_text(CUSTOM + "import neighbour")
    for spec in ("sub/other.py:three", "sub/other:three", f"{Path.cwd()}/sub/other.py:three"):
        assert score_two(spec)["reward"] == [3, 3]
    Path("rewards.py").write_text(CUSTOM)  # the user's own goes first
    assert score_two("rewards.py:three")["reward"] == [3, 3]
    assert rewards.load("math:hypot")["math:hypot"][0](3, 4) == 5  # any module will do
    first, again = (rewards.load(name)[name][0] for name in ["flow_grpo:redness"] * 2)
    assert first is again  # a file is run once


def test_a_users_file_does_not_hide_a_library(desk):
    """In a new process, as this one has imported everything."""
    Path("colorsys.py").write_text("raise SystemExit('the wrong colorsys')")
    script = (f"import sys; sys.path.insert(0, {str(HERE)!r}); import rewards; "
              "sys.path.remove(''); rewards.load('custom:three'); import colorsys")
    subprocess.run([sys.executable, "-c", script], check=True)


# Rewards with models: tiny random ones of the real classes.

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
    with pytest.raises(Exception, match="(?i)weights"):
        rewards.aesthetic(clip, str(tmp_path / "evil.pth"))


def test_geneval_photo_scores_what_the_detector_finds(models, monkeypatch):
    """The detector's output is set by hand. Thresholds, boxes and colours are the reward's."""
    from transformers import Mask2FormerImageProcessor
    clip, detector = models
    reward = rewards.geneval_photo(detector, clip)
    reward(PHOTOS, "abc", [metadata(asked("dog"))] * 3)  # whatever the random detector finds

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


def test_geneval_photo_refuses_what_it_cannot_know(models, tmp_path):
    clip, detector = models
    check = rewards.geneval_photo(detector, clip).check
    problem = error_of(check, ["p"], [metadata(asked("sofa"))])
    assert "the prompt 'p' asks for a sofa;" in problem and "couch" in problem
    tiny.detector(tmp_path, {0: "cat", 1: "dog"})
    problem = error_of(rewards.geneval_photo, str(tmp_path), clip)
    assert "has 2 labels" in problem and "COCO's 80" in problem


def test_taste_has_a_term_for_each_flaw():
    row = metadata(asked("circle", color="red"), asked("square", color="blue"), tag="color_attr")

    def picture(radius=9, apart=12, shift=0, fade=0.0, noise=0, second="blue"):
        image = Image.new("RGB", (192, 192), (245, 245, 245))
        draw = world.ImageDraw.Draw(image)
        for x, shape, color in ((24 - apart, "circle", "red"), (24 + apart, "square", second)):
            ink = world.fade(world.COLORS[color], (245, 245, 245), fade)
            world.draw_shape(draw, shape, 4 * x, 4 * (24 + shift), 4 * radius, ink)
        clouds = np.random.default_rng(0).normal(0, noise, (48, 48, 3))
        pixels = np.asarray(image.resize((48, 48), Image.LANCZOS)) + clouds
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    flaws = [dict(radius=6), dict(apart=9.5), dict(shift=11), dict(fade=0.4), dict(noise=12),
             dict(second="green")]
    pictures = [picture(), *(picture(**flaw) for flaw in flaws), PAPER]
    best, *flawed, empty = world.toy_taste()(pictures, ["a"] * 8, [row] * 8)
    assert 0.9 < best <= 1 and empty == 0
    assert all(score < best - 0.02 for score in flawed)


def test_toy_sign_likes_what_the_painter_made_and_toy_inks_what_is_rare():
    signs = [world.paint_sign("CAT", random.Random(i)) for i in range(12)]
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8))
    *quality, of_noise = rewards.REWARDS["toy_sign"]()([*signs, noise], None, None)
    assert min(quality) > 0.8 and max(quality) <= 1 and of_noise < 0.6
    red, blue = (Image.new("RGB", (48, 48), world.COLORS[color]) for color in ("red", "blue"))
    for image in (red, blue):
        image.paste("white", (0, 0, 48, 24))
    inks = rewards.REWARDS["toy_inks"]()
    assert inks([red, red, red, blue], None, None) == [0.25, 0.25, 0.25, 0.75]


def test_toy_pickscore_has_learned_the_taste():
    """Through the same lines as PickScore, on pairs of paintings for held-out captions."""
    rng = random.Random("test")
    test_set = flow_grpo.load_prompts(Config(reward="geneval"), "test")
    drawn = [rng.choice(test_set) for _ in range(150)]
    prompts, rows = zip(*[pair for pair in drawn for _ in range(2)])
    images = [world.paint_scene(row, rng, careless=rng.random() < 0.3, restless=True)
              for row in rows]
    pick = rewards.REWARDS["toy_pickscore"]()
    scores, tastes = pick(images, prompts, None), world.toy_taste()(images, prompts, rows)
    first_is_better = lambda scores: np.greater(scores[::2], scores[1::2])
    right = first_is_better(scores) == first_is_better(tastes)
    assert right.mean() > 0.65  # 0.77 of 2,000; a coin gives 0.5 +- 0.04
    assert np.mean(pick(images, prompts[::-1], None)) < np.mean(scores)


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "aesthetic", "geneval_photo"])
def test_without_weights_a_reward_says_so_in_one_line(name, monkeypatch, capfd):
    """The hub cannot be reached: it is asked once, not for a minute, and prints nothing."""
    hub = Mock(side_effect=ConnectionError("no network"))
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", hub)
    problem = error_of(rewards.load, name, "--eval_reward")
    assert problem.startswith(f"--eval_reward {name}: its model ")
    assert " GB) cannot be loaded: ConnectionError: no network;" in problem
    assert capfd.readouterr().err == "" and hub.call_count == 1
    assert not huggingface_hub.utils.are_progress_bars_disabled()  # a download is no hang


# --------------------------------------------------------------------------- options and mistakes
TINY = ("--groups 2 --group_size 4 --eval_prompts 2 --eval_steps 2 --train_steps 4 --window 1 "
        "--latest_start 1 --no-same_noise --beta 0.1 --learning_rate 1.5e-3 --epochs 1").split()
run = lambda *options: flow_grpo.main([str(option) for option in options])


def metrics(folder):
    """Those of a run, without the seconds"""
    rows = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return [{key: row[key] for key in row if key != "seconds"} for row in rows]


@pytest.fixture
def refused(desk, capsys):
    """A function: options of a run that must end with exit code 2 and one line -> that line"""
    def line_of(*options):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run(*options)
        line, = filter(str.strip, capsys.readouterr().err.splitlines())
        assert stopped.value.code == 2 and line.startswith("flow_grpo.py: ")
        return line
    return line_of


@pytest.mark.parametrize("options, says", GOLDEN["mistakes"].items())
def test_a_mistake_gives_one_clear_line_and_exit_code_2(refused, options, says):
    line = refused(*TINY, *options.split())
    assert re.search(says, line) and "goes on" not in line and not Path("runs").exists()


SIGN = b'a sign that says "CAT"\n'
BENCH = b'{"prompt": "a photo of a bench", "include": [{"class": "bench", "count": 1}]}\n'
CIRCLE = BENCH.replace(b"bench", b"circle")
ODD = CIRCLE.replace(b"a photo", "a\u2028photo".encode())  # no end of a line in JSON
BOM = b"\xef\xbb\xbf"  # the byte order mark is no part of the first prompt


@pytest.mark.parametrize("reward, name, content, says", [
    ("ocr", "test.txt", SIGN + b"no quotes\n", "reward ocr.*'no quotes'.*double quotes"),
    ("ocr", "train.txt", SIGN + b"no quotes\n", "reward ocr.*'no quotes'.*double quotes"),
    ("ocr", "train.txt", 'a café that says "CAT"'.encode("latin-1"), "train.txt.*UTF-8"),
    ("ocr", "train.txt", b"\n\n", "train prompt"),
    ("geneval", "train_metadata.jsonl", BOM + CIRCLE + BENCH, "a photo of a bench.*circle"),
    ("geneval", "test_metadata.jsonl", CIRCLE + b'{"text": "a"}\n', "test.*after 1 good.*prompt"),
    ("geneval", "train_metadata.jsonl", CIRCLE + b"\n" + ODD + b'{"prompt": 7}', "after 2 good"),
    ("geneval", "train_metadata.jsonl", CIRCLE + b"[1]\n", "after 1 good"),
    ("geneval", "train_metadata.jsonl", b'{"prompt": \n', "after 0 good")])
def test_every_prompt_is_checked_at_the_start(refused, reward, name, content, says):
    options = [*TINY, "--reward", reward, "--dataset", "."]
    assert "train.txt" in refused(*options)
    for file in (name.replace("test", "train"), name.replace("train", "test")):
        Path(file).write_bytes(SIGN if reward == "ocr" else CIRCLE)
    Path(name).write_bytes(content)
    assert re.search(says, refused(*options)) and not Path("runs").exists()


@pytest.mark.parametrize("old, new", [
    (b"StableDiffusion3Pipeline", b"StableDiffusion3Img2ImgPipeline"),
    (b"FlowMatchEulerDiscrete", b"DDIM"),  # another scheduler
    (b"proj_out.weight", b"proj_out.waits_"),  # a tensor that is missing
    (b"shared.weight", b"shared")])  # a file that is too short
def test_a_damaged_model_is_one_line(refused, old, new):
    shutil.copytree(HERE / "toy", "model", ignore=shutil.ignore_patterns("pickscore", "build"))
    for path in filter(Path.is_file, Path("model").rglob("*")):
        path.write_bytes(path.read_bytes().replace(old, new))
    assert "--model model" in refused(*TINY, "--reward", "custom:three", "--model", "model")
    assert not Path("runs").exists()


def test_groups_and_prompts_must_fit_the_processes(refused, monkeypatch):
    monkeypatch.setattr(flow_grpo.PROCESSES, "num_processes", 2)
    assert "groups 3" in refused(*TINY, "--groups", 3)
    assert "eval_prompts 1" in refused(*TINY, "--eval_prompts", 1)


def test_the_presets_are_the_papers():
    parse = flow_grpo.parse_config
    for preset, values in GOLDEN["presets"].items():
        assert values.items() <= vars(parse(["--preset", preset])).items()
    geneval, same = parse(["--reward", "geneval"]), parse(["--preset", "geneval"])
    assert geneval.groups == 16 and replace(geneval, preset="geneval") == same
    own = parse(["--preset", "sd3.5-medium-fast", "--beta", "0.01", "--no-offload"])
    assert (own.beta, own.offload, own.gradient_checkpointing) == (0.01, False, True)
    for preset in flow_grpo.PRESETS.values():  # of the right types, or no run could be resumed
        assert all(type(preset[name]) is Config.__annotations__[name] for name in preset)


def test_on_resuming_only_these_options_may_change(refused):
    may_change = ("name resume report_to epochs eval_every eval_reward learning_rate batch_size "
                  "gradient_checkpointing offload")
    assert set(flow_grpo.MAY_CHANGE) == set(may_change.split())
    Path("config.json").write_text(json.dumps(vars(Config())))
    changed = "--epochs 9 --name y --learning_rate 0.1 --offload --eval_reward ocr".split()
    assert flow_grpo.parse_config(["--resume", ".", *changed]).epochs == 9
    for option in ("--groups 6", "--preset flux.1-dev", "--no-lr_decay", "--beta 0", "--sde cps"):
        line = refused("--resume", ".", *option.split())
        assert re.search(f"{option.split()[0].replace('no-', '')} .*the run to resume has", line)


# -------------------------------------------------------------------------------------- whole runs
@pytest.mark.parametrize("reward", ["ocr", "flow_grpo:redness"])
def test_the_first_editions_numbers_come_out(desk, reward):
    """Training raises redness, from -0.007 to 0.001."""
    edition = GOLDEN["first_edition"]
    options = f"{edition['options']} {edition[reward]['options']}".split()
    run(*options, "--reward", reward, "--dataset", HERE / "toy/ocr", "--name", "x")
    rows = metrics("runs/x")
    for epoch, expected in enumerate(edition[reward]["metrics"]):
        for key, value in expected.items():
            own = rows[epoch if key.startswith("eval_") else epoch + 1][key]
            absolute = 1e-5 if "reward" in key else 0  # a pixel may be rounded the other way
            assert own == pytest.approx(value, rel=1e-3, abs=absolute), key


def test_a_run_writes_what_the_readme_says_and_trains_on_its_reward_alone(desk, capsys):
    before = os.umask(0o027)
    run(*TINY, "--reward", "custom:ink:2", "--eval_reward", "custom:three,custom:ink:3",
        "--name", "x")
    os.umask(before)
    expected = {name: set(values) for name, values in GOLDEN["a_run"].items()}
    files = {str(path.relative_to("runs/x")) for path in Path("runs/x").rglob("*.*")}
    assert files == expected["files"]
    for file in files:
        assert Path("runs/x", file).stat().st_mode & 0o777 == 0o640, file
    assert Image.open("runs/x/film.gif").n_frames == 2
    sheets = [Image.open(f"runs/x/samples/000{epoch}.png") for epoch in (0, 1)]
    assert np.array_equal(Image.open("runs/x/before_after.png"), np.concatenate(sheets))
    first, last = metrics("runs/x")
    assert set(first) == expected["evaluation"]  # epoch 0 is the base model
    assert set(last) == expected["evaluation"] | expected["training"]
    for key in ("reward", "eval_reward"):
        assert last[key] == pytest.approx(2 * last[f"{key}/custom:ink"])
    told = capsys.readouterr().out.splitlines()
    assert "runs/x" in told[0] and "2 groups x 4 images" in told[0]
    assert f"eval_reward {first['eval_reward']:.3f} -> {last['eval_reward']:.3f}" in told[-2:]


def test_a_folder_belongs_to_one_run(desk, refused):
    """Eight starts at the same time get eight folders. A name that is taken is refused."""
    for n in range(5):
        with ThreadPoolExecutor(8) as pool:
            folders = {*map(str, pool.map(flow_grpo.claim, [small(reward=f"custom.py:{n}")] * 8))}
        assert folders == {f"runs/custom.py-{n}{number}" for number in ("", *range(-2, -9, -1))}
    assert "runs/custom.py-0 exists" in refused(*TINY, "--name", "custom.py-0")


WHOLE = [*TINY, "--epochs", 2, "--eval_every", 2, "--reward", "custom:ink"]


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
    (6, Path, "write_bytes", 1),  # the first epoch's checkpoint
    (3, flow_grpo.Policy, "optimize", 2),
    (2, flow_grpo.Figure, "savefig", 3),  # the last pictures
    (11, Path, "write_bytes", 3)])  # the last LoRA
def test_a_run_killed_anywhere_resumes_as_if_it_had_not_been(
        desk, whole_run, n, owner, name, rows):
    """To the same weights, optimizer and metrics, bit for bit"""
    function, calls = getattr(owner, name), []

    def dies_at_call_n(*args):
        calls.append(args)
        if len(calls) == n:
            if name == "write_bytes":  # half a file
                function(args[0], args[1][:len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

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
    for file in ("pytorch_lora_weights.safetensors", "before_after.png", "film.gif"):
        assert Path("runs/killed", file).read_bytes() == Path(whole_run, file).read_bytes()
    saved = [torch.load(Path(run, "checkpoint.pt")) for run in ("runs/killed", whole_run)]
    own, other = ([tensors, optimizer["state"]] for tensors, optimizer, rows in saved)
    torch.testing.assert_close(own, other, rtol=0, atol=0)


@pytest.mark.parametrize("problem, says", [
    (lambda *_: signal.raise_signal(signal.SIGINT), "interrupted"),
    (lambda *_: signal.raise_signal(signal.SIGTERM), "interrupted"),  # a cluster's
    (torch.OutOfMemoryError("CUDA"), "--batch_size.*--gradient_checkpointing.*--offload"),
    (FloatingPointError("the losses"), "the losses"),
    (rewards.RewardError("reward x"), "reward x"),
    (OSError(28, "No space left on device"), "No space left")])
def test_what_ends_a_run_is_one_line_with_how_to_go_on(refused, monkeypatch, problem, says):
    monkeypatch.setattr(flow_grpo, "update", Mock(side_effect=problem))
    line = refused(*TINY, "--reward", "custom:ink", "--name", "x")
    assert re.search(f"{says}.*--resume runs/x", line)


def test_a_damaged_run_is_one_line(desk, refused, whole_run):
    shutil.copytree(whole_run, "runs/x")
    path, resume = Path("runs/x/checkpoint.pt"), ["--resume", "runs/x", "--epochs", 3]
    good = path.read_bytes()
    torch.save((torch.load(path)[0][:3], *torch.load(path)[1:]), "other")  # too few tensors
    for damaged in (good[:len(good) // 2], b"hello", b"", Path("other").read_bytes()):
        path.write_bytes(damaged)
        assert "runs/x/checkpoint.pt" in refused(*resume)
    path.write_bytes(good)
    config = json.loads(Path("runs/x/config.json").read_text())
    others = [json.dumps(config | change)
              for change in ({"no_such_option": 1}, {"groups": None}, {"reward": None})]
    for damaged in ("", "null", "[]", "{}", '{"group', *others):
        Path("runs/x/config.json").write_text(damaged)
        assert "config.json" in refused(*resume)


def test_going_on_from_a_finished_run_keeps_its_last_evaluation(desk, refused, whole_run):
    short = metrics(whole_run)
    shutil.copytree(whole_run, "runs/keep/y")  # a run goes by its folder, not by its first name
    os.remove("runs/keep/y/samples/0000.png")
    run("--resume", "runs/keep/y", "--epochs", 3, "--learning_rate", 0.02)
    longer = metrics("runs/keep/y")
    assert longer[:3] == short and len(longer) == 4
    assert {"grad_norm", "eval_reward"} <= set(longer[3])
    config = json.loads(Path("runs/keep/y/config.json").read_text())
    assert (config["epochs"], config["learning_rate"]) == (3, 0.02)
    optimizer = torch.load("runs/keep/y/checkpoint.pt")[1]
    assert optimizer["param_groups"][0]["lr"] == pytest.approx(0.02 / 3)  # the third of three
    run("--resume", "runs/keep/y")  # there is nothing to do
    assert metrics("runs/keep/y") == longer
    os.remove("runs/keep/y/checkpoint.pt")  # now it must not begin again
    assert "checkpoint.pt" in refused("--resume", "runs/keep/y")
    assert metrics("runs/keep/y") == longer


def test_report_to_tensorboard_writes_events(desk):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(*TINY, "--reward", "custom:ink", "--name", "x", "--report_to", "tensorboard")
    path = min(Path("runs/x").rglob("*tfevents*"), key=lambda path: len(path.parts))
    logged = events.EventAccumulator(str(path)).Reload().Scalars("eval_reward")
    expected = [row["eval_reward"] for row in metrics("runs/x")]
    assert [event.value for event in logged] == pytest.approx(expected)
    assert [event.step for event in logged] == [0, 1]


@pytest.fixture(scope="module", autouse=True)
def two(tmp_path_factory):
    """A run in two processes, on the second core while the other tests are on the first"""
    folder = tmp_path_factory.mktemp("two")
    (folder / "custom.py").write_text(CUSTOM)
    for name in ("train.txt", "test.txt"):
        (folder / name).write_text("a dull circle\na red cross\n")
    options = [*TINY, "--dataset", ".", "--reward", "custom.py:dull", "--std_over", "group",
               "--eval_every", "1", "--name"]
    script = f"'{sys.executable}' -m torch.distributed.run --standalone --nproc_per_node=2"
    launch = f"{script} '{HERE}/flow_grpo.py'"
    command = f"{launch} {' '.join(options)} two && {launch} --resume runs/two --epochs 2"
    process = subprocess.Popen(command, cwd=folder, shell=True, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    yield SimpleNamespace(folder=folder, options=options, process=process)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)


def test_two_processes_are_as_good_as_one(desk, two, monkeypatch):
    """Each has one of two groups, of which one never has an advantage. They are resumed once."""
    monkeypatch.chdir(two.folder)
    run(*two.options, "one", "--epochs", 2)
    said, _ = two.process.communicate(timeout=300)
    assert two.process.returncode == 0, said
    one, both = (torch.load(f"runs/{name}/checkpoint.pt")[0] for name in ("one", "two"))
    # The second matrices of the LoRA, which begin at 0: all of them was learned.
    a, b = (torch.cat([t.flatten() for t in tensors if t.shape[-1] == 32])
            for tensors in (one, both))
    assert a.norm() > 0 and (a - b).norm() < 1e-3 * a.norm()
    for a, b in zip(metrics("runs/one"), metrics("runs/two"), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"kl", "clip_low", "clip_high"}:
            assert a[key] == pytest.approx(b[key], rel=1e-2, abs=1e-6), key
    assert said.count("on 2 x cpu") == 2 and said.count("epoch 0") == 1  # one of them speaks
    assert "2 prompts have an unknown word, such as 'a dull circle'" in said
    assert Path("rank0").exists() and Path("rank1").exists()


def test_the_toy_is_small_and_its_prompts_are_held_out():
    files = [f for f in (HERE / "toy").rglob("*") if f.is_file() and "build" not in f.parts]
    assert sum(f.stat().st_size for f in files) < 10e6
    for reward in ("ocr", "geneval"):
        splits = [flow_grpo.load_prompts(small(reward=reward), s) for s in ("train", "test")]
        train, test = ({prompt for prompt, _ in rows} for rows in splits)
        assert len(train) > 150 and len(test) > 50 and not train & test
