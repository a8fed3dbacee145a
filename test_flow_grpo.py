"""Tests of flow_grpo.py and rewards.py: no GPU, no downloads.  pytest test_flow_grpo.py

First the mathematics against independent references, then the real model, the rewards, the command line, and runs
that are killed. The model is the embedded toy, so these are the lines that SD3.5 runs through.
"""
import json
import os
import random
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import flow_grpo
import rewards
from flow_grpo import Config, clipped_loss, gaussian_kl, group_advantages, sde_mean, sde_noise, sde_step

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "toy"))

# Computed with the official functions (sd3_sde_with_logprob.py, stat_tracking.py) at noise level 0.7 on SD3.5's own
# grid of 10 steps. x, v, noise: two samples of shape [2, 2, 2], flat.
GOLDEN = dict(
    t=[1, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876, 0.278049, 0.00892857, 0],
    x=[-2.31041, -0.373251, -1.06082, 0.999509, -0.884025, -1.27555, -0.623225, -0.866442, -1.29563, 1.52363,
        0.323661, 2.01773, 1.13574, -1.22688, 0.0713885, 0.338017],
    v=[0.153519, -0.633275, -1.26092, -0.726951, -0.0199648, 0.2103, 0.177189, -0.83051, 1.01119, -0.242679,
        -0.773011, -1.59518, -0.687004, 1.48807, -0.448416, -0.891003],
    v_ref=[0.144345, -0.577642, -1.26187, -0.84872, -0.146511, 0.0983464, 0.293838, -0.737887, 1.07658, -0.227858,
        -0.887622, -1.4079, -0.717995, 1.51209, -0.583292, -0.866563],
    noise=[-3.1453, -0.113731, 1.6962, -0.665203, -0.587223, 2.8321, 0.903997, 0.947837, -1.38094, -2.05475,
        0.0475766, -0.385569, -0.275035, 0.88659, 1.48574, -0.00785562],
    steps={  # step: mean, x_next, log_prob, sigma, KL averaged over the batch
        0: ([-1.75048, -0.256555, -0.750643, 0.783614, -0.666643, -0.971423, -0.477599, -0.62105, -1.01852,
            1.16002, 0.275184, 1.58698, 0.884877, -0.985626, 0.0717769, 0.290728], [-3.95219, -0.336167,
            0.436699, 0.317971, -1.0777, 1.01105, 0.155199, 0.042435, -1.98517, -0.278308, 0.308488, 1.31709,
            0.692352, -0.365013, 1.1118, 0.285229], [-2.01893, -1.14658], 3.505671, 5.730676e-07),
        4: ([-2.10193, -0.271495, -0.827364, 0.977649, -0.796113, -1.17344, -0.581034, -0.696389, -1.27442,
            1.40078, 0.372196, 1.9868, 1.09652, -1.26168, 0.110843, 0.397364], [-3.33424, -0.316054,
            -0.162802, 0.717026, -1.02618, -0.0638335, -0.226853, -0.325032, -1.81546, 0.595739, 0.390836,
            1.83574, 0.988763, -0.914317, 0.692948, 0.394287], [-1.43859, -0.566238], 1.359203, 2.566295e-05),
        8: ([-2.15084, -0.126981, -0.541456, 1.15179, -0.796599, -1.22952, -0.625675, -0.509045, -1.5161,
            1.46579, 0.553102, 2.36792, 1.2622, -1.61342, 0.215112, 0.605682], [-2.85967, -0.152611,
            -0.159199, 1.00188, -0.928936, -0.591271, -0.421949, -0.29544, -1.82731, 1.00273, 0.563824,
            2.28103, 1.20022, -1.41362, 0.54994, 0.603911], [-0.885552, -0.0132025], 0.4344148, 0.002635496),
    },
    cps={  # step: mean, x_next, sigma, KL averaged over the batch; noise level 0.8
        0: ([-0.783729, -0.100375, -0.306762, 0.365386, -0.296738, -0.437692, -0.216821, -0.258503, -0.476382, 0.52248,
            0.139754, 0.742701, 0.409645, -0.472258, 0.0419056, 0.14929], [-3.65582, -0.204227, 1.2421, -0.242036,
            -0.832952, 2.14841, 0.608652, 0.607002, -1.73737, -1.35379, 0.183198, 0.390624, 0.1585, 0.33732, 1.39859,
            0.142117], 0.913137, 8.44647e-06),
        4: ([-1.20976, -0.0733386, -0.308425, 0.645911, -0.448282, -0.691184, -0.35152, -0.288903, -0.850048, 0.824033,
            0.308907, 1.3276, 0.708152, -0.903381, 0.119699, 0.33814], [-3.32548, -0.149841, 0.832546, 0.198454,
            -0.843284, 1.21386, 0.256565, 0.34867, -1.77895, -0.558119, 0.34091, 1.06824, 0.523147, -0.307006, 1.1191,
            0.332855], 0.672662, 0.000337073),
        8: ([-2.33816, -0.1977, -0.709315, 1.19222, -0.873109, -1.32521, -0.667854, -0.63389, -1.56427, 1.58062, 0.53314,
            2.44168, 1.31668, -1.62641, 0.193623, 0.579687], [-2.36486, -0.198666, -0.694912, 1.18657, -0.878096, -1.30116,
            -0.660178, -0.625841, -1.576, 1.56317, 0.533544, 2.4384, 1.31435, -1.61888, 0.206239, 0.579621],
            0.00849158, 4.59848),
    },
    rewards=[0.1, 0.4, 0.9, 0.3, 1, 1, 1, 1, 0, 0, 1, 0.5], advantages=dict(batch=[-0.795889, -0.0612222, 1.16322,
        -0.306111, 0, 0, 0, 0, -0.918334, -0.918334, 1.53056, 0.306111], group=[-1.10227, -0.0847901, 1.61101,
        -0.423951, 0, 0, 0, 0, -0.904316, -0.904316, 1.50719, 0.301439]),
)

def golden(key):
    return torch.tensor(GOLDEN[key]).view(2, 2, 2, 2)


def step_args(i, t, noise_level=0.7, batch=2, sde="flow"):
    sigma = sde_noise(t, noise_level, sde)
    return t[i].expand(batch), t.diff()[i].expand(batch), sigma[i].expand(batch)


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b).to(torch.as_tensor(a).dtype), rtol=tolerance,
                               atol=tolerance)


# ------------------------------------------------------------------------------------------------- mathematics


@pytest.mark.parametrize("i", [0, 4, 8])  # 0: t = 1, where sigma_t needs the second grid point
def test_sde_step_gives_the_official_numbers(i):
    t, (mean, x_next, log_prob, sigma, kl) = torch.tensor(GOLDEN["t"]), GOLDEN["steps"][i]
    now, dt, s = step_args(i, t)
    got = sde_step(golden("x"), golden("v"), now, dt, s, noise=golden("noise"))
    close(got[0].flatten(), x_next)
    close(got[1], log_prob)
    close(got[2].flatten(), mean)
    close(s[0], sigma)
    mean_ref = sde_mean(golden("x"), golden("v_ref"), now, dt, s)
    close(gaussian_kl(got[2], mean_ref, s).mean() / kl, 1.0, 1e-3)
    # Rescoring the sample gives its own log-probability, bit for bit.
    again = sde_step(golden("x"), golden("v"), now, dt, s, x_next=got[0])
    assert torch.equal(again[1], got[1]) and torch.equal(again[0], got[0])


@pytest.mark.parametrize("i", [0, 4, 8])
def test_cps_gives_the_official_numbers(i):
    t, (mean, x_next, sigma, kl) = torch.tensor(GOLDEN["t"]), GOLDEN["cps"][i]
    now, dt, s = step_args(i, t, 0.8, sde="cps")
    got = sde_step(golden("x"), golden("v"), now, dt, s, "cps", noise=golden("noise"))
    close(got[0].flatten(), x_next)
    close(got[2].flatten(), mean)
    close(s[0], sigma)
    # Not the official log-probability, which has no variance in it: the density's own.
    close(got[1][0], torch.distributions.Normal(got[2][0], s[0]).log_prob(got[0][0]).mean())
    close(gaussian_kl(got[2], sde_mean(golden("x"), golden("v_ref"), now, dt, s, "cps"), s).mean() / kl, 1.0, 1e-3)


@pytest.mark.parametrize("std_over", ["batch", "group"])
def test_advantages_are_the_official_numbers(std_over):
    got = group_advantages(torch.tensor(GOLDEN["rewards"]).view(3, 4), std_over)
    close(got.flatten(), GOLDEN["advantages"][std_over])


@pytest.mark.parametrize("std_over", ["batch", "group"])
def test_equal_rewards_give_exactly_zero(std_over):
    for value in (0.0, 0.1, 1 / 3, 0.7, 1e6):
        for size in (7, 24):
            for dtype in (torch.float32, torch.float64):
                equal = torch.full((3, size), value, dtype=dtype)
                assert torch.equal(group_advantages(equal, std_over), torch.zeros(3, size))
    mixed = torch.tensor([[0.1] * 7, [0.0, 1.0, 0.5, 0.1, 0.2, 0.3, 0.4]])
    assert (group_advantages(mixed, std_over)[0] == 0).all() and (group_advantages(mixed, std_over)[1] != 0).any()


def test_advantages_are_clamped():
    assert group_advantages(torch.tensor([[0.0] * 99 + [1e9]]), "group").max() == 5


@pytest.mark.parametrize("shape", [(3, 4, 5, 5), (3, 1024, 64)])  # images, and the packed latents of other models
def test_log_prob_is_the_mean_gaussian_log_density(shape):
    torch.manual_seed(0)
    x, v, noise = torch.randn(3, *shape)
    t, dt, s = torch.tensor([0.9, 0.5, 0.2]), torch.tensor([-0.1, -0.2, -0.05]), torch.tensor([0.8, 0.7, 0.3])
    x_next, log_prob, mean = sde_step(x, v, t, dt, s, noise=noise)
    for i in range(3):
        normal = torch.distributions.Normal(mean[i], s[i] * (-dt[i]) ** 0.5)
        close(log_prob[i], normal.log_prob(x_next[i]).mean())
        close((x_next[i] - mean[i]) / normal.scale, noise[i])
    moved = mean + torch.tensor([0.1, 0.2, 0.0]).view(-1, *[1] * len(shape))  # each sample has its own KL
    close(gaussian_kl(mean, moved, s), torch.tensor([0.01, 0.04, 0.0]) / (2 * s**2))


@pytest.mark.parametrize("sde", ["flow", "cps"])
def test_without_noise_a_step_is_the_euler_step(sde):
    x, v, noise = torch.randn(3, 2, 4, 4, 4)
    t, dt = torch.tensor([0.9, 0.5]), torch.tensor([-0.1, -0.2])
    assert (sde_noise(torch.tensor([1.0, 0.9, 0.5, 0.0]), 0.0, sde) == 0).all()
    x_next, _, mean = sde_step(x, v, t, dt, torch.zeros(2), sde, noise=noise)
    close(x_next, x + v * dt.view(2, 1, 1, 1), 1e-6)


def test_cps_keeps_data_and_noise_in_proportion_however_large_the_step():
    """From x_t = (1-t) data + t noise to exactly (1-t') data + t' new noise; a step of the SDE ends with too much."""
    torch.manual_seed(0)
    data, noise, fresh_noise = torch.ones(1, 200_000), *torch.randn(2, 1, 200_000)
    t, dt = torch.tensor([0.9]), torch.tensor([-0.4])
    step = {sde: sde_step(0.1 * data + 0.9 * noise, noise - data, t, dt, sde_noise(torch.tensor([0.9, 0.5]), 0.7, sde), sde,
                          noise=fresh_noise)[0] for sde in ("flow", "cps")}
    assert abs(step["cps"].mean() - 0.5) < 0.005 and abs(step["cps"].std() - 0.5) < 0.005
    assert step["flow"].std() > 0.6


def test_guard_centres_the_ratio():
    """The plain ratio's logarithm is negative on average, GRPO-Guard's is 0; each sample has its own."""
    torch.manual_seed(0)
    mean_old = torch.randn(2000, 64)
    mean, std = mean_old + 0.2 * torch.randn(2000, 64), torch.full((2000,), 0.3)
    x_next = mean_old + 0.3 * torch.randn(2000, 64)
    log_prob = lambda m: torch.distributions.Normal(m, 0.3).log_prob(x_next).mean(1)
    plain = log_prob(mean) - log_prob(mean_old)
    guarded = flow_grpo.guarded(plain, mean, mean_old, std)
    assert abs(guarded.mean()) < 4 * guarded.std() / 2000**0.5
    assert plain.mean() < -20 * plain.std() / 2000**0.5
    moved = mean.clone()
    moved[0] += 1
    assert torch.equal(flow_grpo.guarded(plain, moved, mean_old, std)[1:], guarded[1:])  # flow_grpo issue 244


def test_the_drift_contains_the_score():
    """-(x + (1-t) v) / t is the score of x_t: for one data point x0 it is -noise / t."""
    x0, noise, t = torch.randn(2, 3, 8), torch.randn(2, 3, 8), 0.6
    x, v = (1 - t) * x0 + t * noise, noise - x0
    dt, s = torch.tensor([-0.01]).expand(2), torch.tensor([0.7]).expand(2)
    mean = sde_mean(x, v, torch.tensor([t]).expand(2), dt, s)
    score = ((x + v * -0.01) - mean) / (0.7**2 / 2 * -0.01)  # what is left of the drift without v
    close(score, -noise / t, 1e-3)


def simulate(step, t, m, s, samples):
    """Samples of N(m, s^2) data pushed from t[0] down to t[-1] with the exact velocity; yields (t, x)."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(samples, 1, generator=generator)
    std = lambda t: ((1 - t) ** 2 * s**2 + t**2) ** 0.5
    x = (1 - t[0]) * m + std(t[0]) * draw()
    sigma = sde_noise(t, 0.7)
    for i, dt in enumerate(t.diff()):
        slope = (t[i] - (1 - t[i]) * s**2) / std(t[i]) ** 2
        v = -m + slope * (x - (1 - t[i]) * m)  # E[noise - x0 | x_t]
        x = step(x, v, *(a.expand(samples) for a in (t[i], dt, sigma[i])), draw())
        yield t[i + 1], x, (1 - t[i + 1]) * m, std(t[i + 1])


def test_the_sde_keeps_the_marginals_of_the_ode_at_every_time():
    """The claim of section 4.2. Gaussian data, for which the velocity is known: mean and std of 40,000 samples agree
    with the ODE's exact marginal at each of 200 grid times. Tolerance: 5 standard errors (0.025 for the mean, 0.018
    relative for the std) and 0.01 for the discretisation. The grid begins at t = 0.95: at t = 1 sigma_t is the
    grid's own choice, not the SDE's.
    """
    t, n = torch.linspace(0.95, 0, 201), 40_000
    worst = lambda step: max(max(abs(x.mean() - m).item() / (5 * s.item() / n**0.5 + 0.01),
                                 abs(x.std() / s - 1).item() / (5 / (2 * n) ** 0.5 + 0.01))
                             for _, x, m, s in simulate(step, t, m=1.5, s=0.5, samples=n))
    assert worst(lambda x, v, t, dt, s, noise: sde_step(x, v, t, dt, s, noise=noise)[0]) < 1
    # What must fail: noise without the drift that balances it, and that drift with a wrong sign or half its size.
    without = lambda x, v, t, dt, s, noise: x + v * dt[:, None] + (s * (-dt) ** 0.5)[:, None] * noise
    assert worst(without) > 2
    for factor in (-1, 0.5):
        wrong = lambda x, v, t, dt, s, noise: without(x, v, t, dt, s, noise) + factor * (
            sde_mean(x, v, t, dt, s) - x - v * dt[:, None])
        assert worst(wrong) > 2


def test_clipping_stops_the_gradient_on_its_side_only():
    for advantage, moved, grows in ((1.0, 0.1, False), (1.0, -0.1, True), (-1.0, -0.1, False), (-1.0, 0.1, True)):
        log_prob = torch.tensor([moved], requires_grad=True)
        loss, ratio = clipped_loss(log_prob, torch.tensor([advantage]), 0.05)
        loss.sum().backward()
        assert bool(log_prob.grad.abs() > 0) == grows
        close(ratio, np.exp([moved]))
        assert loss.item() == pytest.approx(-min(ratio.item() * advantage, ratio.clamp(0.95, 1.05).item() * advantage))


# ------------------------------------------------------------------------------------------------------- model


def small(**options):
    return Config(**{**dict(groups=2, group_size=4, batch_size=8, beta=0.0, eval_prompts=2, eval_steps=4, train_steps=6, window=2,
                            guidance=2.0, dataset=str(HERE / "toy/ocr")), **options})


@pytest.fixture(scope="module")
def fresh():
    """A function: config -> the model as load_model gives it (loaded once for each precision)."""
    models = {}

    def reset(config):
        if config.precision not in models:
            model = flow_grpo.load_model(config)
            models[config.precision] = model, [p.detach().clone() for p in model.params]
        model, start = models[config.precision]
        for p, value in zip(model.params, start):
            p.data = value.clone()
        model.optimizer.state.clear()
        model.optimizer.zero_grad()
        model.ema, model.updates_done = [value.clone() for value in start], 0
        return model
    return reset


def perturb(model, size=0.02):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.params:
            p += size * torch.randn_like(p)


def draw(model, config, sde_steps=range(1, 3), prompts=("CAT", "DOG"), seed=0):
    prompts = [f'a sign that says "{w}"' for w in prompts for _ in range(config.group_size)]
    return flow_grpo.rollout(model, config, prompts, range(seed, seed + len(prompts)), config.train_steps, sde_steps)


def spread_advantages(n):
    return torch.linspace(-1, 1, n)


def learn(model, config, batch, advantages=None):
    advantages = spread_advantages(len(batch.images)) if advantages is None else advantages
    return flow_grpo.update(model, config, batch, advantages, random.Random(0))


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_ratio_is_1_before_the_first_update(fresh, guidance, precision):
    config = small(updates=1, guidance=guidance, precision=precision)
    model = fresh(config)
    perturb(model)
    metrics = learn(model, config, draw(model, config))
    assert metrics["ratio_deviation"] < 1e-5


@pytest.mark.parametrize("spoil", [
    lambda batch, config: batch.log_prob.add_(0.1),
    lambda batch, config: batch.latents.mul_(1.05),  # as when sampling stored them in another precision
    lambda batch, config: batch.t.mul_(0.98),
    lambda batch, config: setattr(config, "guidance", 3.0),
    lambda batch, config: batch.sigma.mul_(1.1),
    lambda batch, config: (setattr(config, "clip_range", 1e-4), batch.log_prob.add_(6e-5)),  # little, but half of the clip range
], ids=["log_prob", "latents", "t", "guidance", "sigma", "clip_range"])
def test_a_run_stops_when_sampling_and_training_disagree(fresh, spoil, capsys):
    config = small()
    model = fresh(config)
    batch = draw(model, config)
    spoil(batch, config)
    before = [p.clone() for p in model.params]
    with pytest.raises(SystemExit) as stopped:
        learn(model, config, batch)
    assert stopped.value.code == 2 and "ratio" in capsys.readouterr().err
    assert all(torch.equal(a, b) for a, b in zip(before, model.params))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_kl_is_0_at_the_start_and_pulls_back_once_the_lora_has_moved(fresh, precision):
    config = small(beta=0.5, updates=1, precision=precision)
    model, nothing = fresh(config), torch.zeros(8)
    assert learn(model, config, draw(model, config), nothing)["kl"] == 0
    model = fresh(config)
    perturb(model, 0.05)
    kl = [learn(model, config, draw(model, config), nothing)["kl"] for _ in range(6)]  # only the KL has a gradient
    assert kl[0] > 0 and kl[5] < 0.6 * kl[0]


def plain_gradient(model, config, drawn, advantages, order, beta):
    total = 0
    for image in order:
        for step, i in enumerate(drawn.sde_steps):
            one = lambda a: a[i:i + 1]
            condition = [c[drawn.prompt_index[image]][None] for c in drawn.condition]
            x, t, dt, s = drawn.latents[image:image + 1, step], one(drawn.t), one(drawn.t.diff()), one(drawn.sigma)
            v = flow_grpo.velocity(model, config, x, t, condition)
            log_prob, mean = sde_step(x, v, t, dt, s, x_next=drawn.latents[image:image + 1, step + 1])[1:]
            total = total - advantages[image] * torch.exp(log_prob - drawn.log_prob[image, step])
            if beta:
                model.pipe.transformer.disable_adapters()
                with torch.no_grad():
                    mean_ref = sde_mean(x, flow_grpo.velocity(model, config, x, t, condition), t, dt, s)
                model.pipe.transformer.enable_adapters()
                total = total + beta * gaussian_kl(mean, mean_ref, s)
    (total / 8).sum().backward()  # 4 images x 2 steps
    gradient = [p.grad.clone() for p in model.params]
    model.optimizer.zero_grad()
    return gradient


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_an_update_is_the_gradient_of_equation_5(fresh, beta):
    """Against plain loops over images and steps: every pair once, its own advantage, the mean over all."""
    config = small(beta=beta, updates=2, batch_size=3)
    model = fresh(config)
    perturb(model, 0.005)
    drawn = draw(model, small())
    advantages = torch.tensor([1.0, 0.0, -0.5, 0.0, 2.0, 0.0, 0.0, -1.0])
    expected = []
    rng = random.Random(0)
    members = [rng.sample(range(4), 4) for _ in range(2)]
    for own in (slice(0, 2), slice(2, 4)):  # each update has its own half of each group
        order = [4 * group + image for group in range(2) for image in members[group][own]]
        expected.append(plain_gradient(model, config, drawn, advantages, order, beta))
    got = []
    model.optimizer.step = lambda: got.append([torch.zeros_like(p) if p.grad is None else p.grad.clone()
                                               for p in model.params])
    try:
        learn(model, config, drawn, advantages)
    finally:
        del model.optimizer.step
    assert len(got) == 2
    for each, wanted in zip(got, expected):
        norm = torch.cat([g.flatten() for g in wanted]).norm()
        assert 0 < norm < 1  # below 1: it was not clipped
        for a, b in zip(each, wanted):
            close(a / norm, b / norm, 1e-4)


def test_the_reference_pass_does_not_swallow_lora_gradients_under_autocast(fresh):
    """A gradient through velocity() must not depend on a no_grad pass before it."""
    config = small(precision="bf16", guidance=1.0)
    model = fresh(config)
    perturb(model)
    condition = flow_grpo.encode(model.pipe, config, ['a sign that says "CAT"'])
    x, t = torch.randn(1, 8, 12, 12), torch.tensor([0.7])
    cache = []
    hook = model.pipe.transformer.register_forward_pre_hook(lambda *_: cache.append(torch.is_autocast_cache_enabled()))
    flow_grpo.velocity(model, config, x, t, condition)
    hook.remove()
    assert cache == [False]  # not every version of torch shows what the cache does

    def gradient(first):
        model.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):  # as if a caller had opened one around both
            if first:
                with torch.no_grad():
                    flow_grpo.velocity(model, config, x, t, condition)
            loss = flow_grpo.velocity(model, config, x, t, condition).square().mean()
        loss.backward()
        return [None if p.grad is None else p.grad.clone() for p in model.params]
    for a, b in zip(gradient(False), gradient(True)):
        assert a is not None and b is not None and torch.equal(a, b)


def test_both_branches_of_guidance_carry_gradient(fresh):
    config = small(guidance=3.0)
    model = fresh(config)
    perturb(model)
    condition = flow_grpo.encode(model.pipe, config, ['a sign that says "CAT"'])
    x, t = torch.randn(1, 8, 12, 12), torch.tensor([0.7])
    branch = lambda c: flow_grpo.velocity(model, small(guidance=1.0), x, t, c)
    by_hand = lambda: branch(model.empty) + 3 * (branch(condition) - branch(model.empty))
    guided = flow_grpo.velocity(model, config, x, t, condition)
    close(guided, by_hand(), 1e-4)
    gradients = []
    for loss in (guided.sum(), by_hand().sum()):
        model.optimizer.zero_grad()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.params]))
    close(gradients[0], gradients[1], 1e-3)


def test_an_image_does_not_depend_on_its_batch(fresh):
    config = small()
    model = fresh(config)
    together, apart = draw(model, config), draw(model, small(batch_size=3))
    close(together.latents, apart.latents, 1e-4)
    alone = flow_grpo.rollout(model, config, ['a sign that says "DOG"'], [5], config.train_steps, range(1, 3))
    close(together.latents[5], alone.latents[0], 1e-4)
    close(together.log_prob[5], alone.log_prob[0], 1e-4)


def test_a_record_contains_the_sde_steps_and_each_member_of_a_group_is_different(fresh):
    config = small()
    model = fresh(config)
    batch = draw(model, config, sde_steps=range(1, 3))
    assert batch.latents.shape == (8, 3, 8, 12, 12) and batch.log_prob.shape == (8, 2)
    for i in range(8):
        for j in range(i):
            assert (batch.latents[i, 0] - batch.latents[j, 0]).abs().mean() > 0.1
    for k, i in enumerate(batch.sde_steps):  # the noise that was added has the std that is scored
        args = batch.t[i].expand(8), batch.t.diff()[i].expand(8), batch.sigma[i].expand(8)
        v = flow_grpo.velocity(model, config, batch.latents[:, k], args[0], [c[batch.prompt_index] for c in batch.condition])
        noise = (batch.latents[:, k + 1] - sde_mean(batch.latents[:, k], v, *args)) / (args[2] * (-args[1]) ** 0.5)[0]
        assert abs(noise.std().item() - 1) < 0.05 and abs(noise.mean().item()) < 0.05


def test_with_the_same_noise_a_group_differs_by_the_sde_alone(fresh, monkeypatch):
    config, drawn = small(same_noise=True, batch_size=3), []
    model, update = fresh(config), flow_grpo.update
    monkeypatch.setattr(flow_grpo, "update", lambda model, config, rollout, *rest: drawn.append(rollout) or update(model, config, rollout, *rest))
    train_set = [(f'a sign that says "{word}"', {}) for word in ("CAT", "DOG")]
    flow_grpo.train_epoch(model, config, rewards.load("jpeg_compressibility"), train_set, 0)
    latents = drawn[0].latents.unflatten(0, (2, 4))  # [groups, members, K+1, C, H, W]
    before, after = latents[:, :, 0], latents[:, :, 1]
    close(before, before[:, :1].expand_as(before), 1e-4)  # the steps before the window are the same, too
    assert (before[0, 0] - before[1, 0]).abs().mean() > 0.3
    for a in range(4):
        for b in range(a):
            assert (after[:, a] - after[:, b]).abs().mean() > 0.1
    noise = after - after.mean(1, keepdim=True)  # and its noise is not the first noise again
    assert np.abs(np.corrcoef(noise.flatten(2).flatten(0, 1), before[:, :1].expand_as(before).flatten(2).flatten(0, 1))[:8, 8:]).max() < 0.5


def test_the_grid_is_the_schedulers_own_shifted_once(fresh):
    """SD3.5's shift is 3. Setting the steps again must not shift again (diffusers PR 13962)."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    config = small(train_steps=10, group_size=1)
    model = fresh(config)
    own, model.pipe.scheduler = model.pipe.scheduler, FlowMatchEulerDiscreteScheduler(shift=3.0)
    for _ in range(2):
        close(draw(model, config).t, GOLDEN["t"])
    model.pipe.scheduler = own


def test_the_window_never_has_the_last_step():
    for steps in (4, 5, 10):
        for window in (0, 1, 2):
            config = small(train_steps=steps, window=window)
            windows = [flow_grpo.choose_sde_steps(config, random.Random(i)) for i in range(50)]
            assert all(w.stop <= steps - 1 and len(w) == (window or steps - 1) for w in windows)
            assert window == 0 or len(set(windows)) == steps // 2 - window + 1


def test_a_sample_without_advantage_changes_nothing(fresh):
    config = small(updates=1)
    model = fresh(config)
    batch = draw(model, config)
    before = [p.clone() for p in model.params]
    assert learn(model, config, batch, torch.zeros(8))["grad_norm"] == 0
    for a, b in zip(before, model.params):
        close(a, b, 1e-6)  # AdamW's weight decay is all that is left


def test_an_epoch_has_every_prompt_exactly_group_size_times(monkeypatch):
    seen = []

    def fake_rollout(model, config, prompts, seeds, *rest):
        seen.append((prompts, seeds))
        raise StopIteration
    monkeypatch.setattr(flow_grpo, "rollout", fake_rollout)
    config = small(groups=3, group_size=5)
    train_set = [(f"prompt {i}", {"i": i}) for i in range(7)]
    for epoch in range(50):
        with pytest.raises(StopIteration):
            flow_grpo.train_epoch(None, config, None, train_set, epoch)
    every_seed = [s for _, seeds in seen for s in seeds]
    assert len(set(every_seed)) == len(every_seed) == 50 * 15
    for prompts, _ in seen:
        assert [prompts[i] for i in range(0, 15, 5)] == list(dict.fromkeys(prompts))
        assert all(prompts.count(p) == 5 for p in prompts)
    assert len({prompts for prompts, _ in seen}) > 40


def test_what_is_not_finite_stops_the_run_before_the_weights_change(fresh, monkeypatch):
    config = small()
    model = fresh(config)
    batch = draw(model, config)
    before = [p.clone() for p in model.params]
    with pytest.raises(FloatingPointError, match=r"the loss of 'a sign that says \"(CAT|DOG)\"' at step [12] is nan"):
        learn(model, config, batch, torch.full((8,), torch.nan))
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda params, limit: torch.tensor(torch.inf))
        with pytest.raises(FloatingPointError, match="the gradient is inf in update 1"):
            learn(model, config, batch)
    assert all(torch.equal(a, b) for a, b in zip(before, model.params))
    velocity = flow_grpo.velocity

    def broken(model, config, x, t, condition):
        v = velocity(model, config, x, t, condition)
        return torch.where(t.view(-1, 1, 1, 1) < 0.6, v * torch.tensor([1, 1, torch.inf, 1]).view(-1, 1, 1, 1), v)
    monkeypatch.setattr(flow_grpo, "velocity", broken)
    with pytest.raises(FloatingPointError, match="'a sign that says \"CAT\"' are not finite after step 3"):
        draw(model, small(batch_size=4))


def test_the_ema_grows_into_its_decay(fresh):
    config = small(ema_decay=0.9, ema_every=2)
    model = fresh(config)
    with torch.no_grad():
        for p in model.params:
            p += 1
    for model.updates_done in (1, 2):
        flow_grpo.ema_step(model, config)
    decay = 3 / 12  # (1 + n) / (10 + n) with n = 2: of two updates only the second counts
    close(model.params[0] - model.ema[0], torch.full_like(model.ema[0], decay), 1e-4)
    before = model.params[0].clone(), model.ema[0].clone()
    flow_grpo.swap_ema(model)
    assert torch.equal(model.params[0], before[1]) and torch.equal(model.ema[0], before[0])
    flow_grpo.swap_ema(model)
    assert torch.equal(model.params[0], before[0]) and torch.equal(model.ema[0], before[1])

    model.updates_done = 3  # off: the weights themselves, also where ema_every would skip this update
    flow_grpo.ema_step(model, small(ema_decay=0, ema_every=2))
    assert torch.equal(model.params[0], model.ema[0])


def test_an_evaluation_draws_with_the_averaged_weights(fresh, tmp_path):
    config = small(eval_prompts=1)
    model, prompt, drawn = fresh(config), 'a sign that says "CAT"', []
    with torch.no_grad():
        for average in model.ema:
            average += 0.05 * torch.randn_like(average)
    weights = [p.clone() for p in model.params]
    reward = {"keep": (lambda images, prompts, metadata: drawn.extend(images) or [0.0] * len(images), 1.0)}
    flow_grpo.evaluate(model, config, reward, {}, [(prompt, {})], tmp_path, 0)
    assert all(torch.equal(a, b) for a, b in zip(weights, model.params))
    draw_with = lambda: np.asarray(flow_grpo.rollout(model, config, [prompt], [0], config.eval_steps, range(0)).images[0], float)
    off = lambda: np.abs(np.asarray(drawn[0], float) - draw_with()).mean()
    assert off() > 1  # these are not the averaged ones
    flow_grpo.swap_ema(model)
    assert off() < 0.1


def test_lora_is_on_the_official_projections_only(fresh):
    model = fresh(small())
    names = {re.sub(r"transformer_blocks\.\d+\.|\.lora_.*", "", n) for n, p in model.pipe.transformer.named_parameters()
             if p.requires_grad}
    assert names == {"attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
                     "attn.add_v_proj", "attn.to_add_out"}
    assert len(model.params) == 2 * (4 * 8 - 1)  # the last block has no to_add_out
    others = [*model.pipe.vae.parameters(), *model.pipe.text_encoder.parameters(), *model.pipe.text_encoder_3.parameters()]
    assert not any(p.requires_grad for p in others)


# ------------------------------------------------------------------------------------- real models, tiny and random


def clip_tokenizer(length=77):
    from transformers import CLIPTokenizer
    letters = [chr(c) for c in range(33, 127)]
    tokens = letters + [c + "</w>" for c in letters] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=length)


def t5_tokenizer():
    from transformers import T5Tokenizer
    tokens = ["<pad>", "</s>", "<unk>", "▁"] + [chr(c) for c in range(33, 127)]
    return T5Tokenizer(vocab=[(token, -float(i)) for i, token in enumerate(tokens)], extra_ids=0, model_max_length=512)


def tiny_pipeline(family):
    """A random pipeline of the real classes: SD3.5-Medium's (dual attention, qk norm, AutoencoderKL) or FLUX.1-dev's."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel
    torch.manual_seed(0)
    tokenizer, t5_tokens = clip_tokenizer(), t5_tokenizer()
    clip = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, projection_dim=32, num_hidden_layers=2,
                          num_attention_heads=2, bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1)
    t5 = T5EncoderModel(T5Config(vocab_size=len(t5_tokens), d_model=32 if family == "flux" else 64, d_kv=16, d_ff=32, num_layers=1,
                                 num_heads=2))
    vae = diffusers.AutoencoderKL(block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2, layers_per_block=1,
                                  up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, norm_num_groups=4, scaling_factor=1.5305,
                                  shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler
    if family == "flux":
        transformer = diffusers.FluxTransformer2DModel(in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
                                                       num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
                                                       guidance_embeds=True, axes_dims_rope=(4, 6, 6))
        return diffusers.FluxPipeline(transformer=transformer, vae=vae, text_encoder=CLIPTextModel(clip), text_encoder_2=t5,
                                      tokenizer=tokenizer, tokenizer_2=t5_tokens,
                                      scheduler=scheduler(shift=3.0, use_dynamic_shifting=True))
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, pos_embed_max_size=16, qk_norm="rms_norm",
        dual_attention_layers=(0,))
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, vae=vae, scheduler=scheduler(shift=3.0), text_encoder=CLIPTextModelWithProjection(clip),
        text_encoder_2=CLIPTextModelWithProjection(clip), text_encoder_3=t5, tokenizer=tokenizer, tokenizer_2=tokenizer,
        tokenizer_3=t5_tokens)


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_on_the_real_classes(desk, family, precision):
    """An epoch, evaluation, save, resume for another; then stock diffusers, with the LoRA, draws the evaluation's image."""
    pipe = tiny_pipeline(family)
    pipe.save_pretrained("tiny")
    options = ["--model", "tiny", "--resolution", "32", "--max_sequence_length", "16", "--guidance", "2", "--dataset",
               str(HERE / "toy/ocr"), "--name", "x", "--learning_rate", "0.03", "--precision", precision, "--offload",
               "--gradient_checkpointing", "--reward", "custom:by_hue", "--lora_rank", "4", "--lora_alpha", "8"]
    flow_grpo.main([*TINY, *options])
    flow_grpo.main(["--resume", "--name", "x", "--epochs", "2"])
    rows = [json.loads(line) for line in open("runs/x/metrics.jsonl")]
    assert [row["epoch"] for row in rows] == [0, 1, 2] and rows[1]["ratio_deviation"] > 0 and rows[1]["grad_norm"] > 0
    if precision == "fp32":
        prompt = (HERE / "toy/ocr/test.txt").read_text().splitlines()[0]
        picture = lambda: np.asarray(pipe(prompt, generator=torch.Generator().manual_seed(0), num_inference_steps=2, height=32,
                                          width=32, guidance_scale=2.0, max_sequence_length=16, output_type="pil").images[0]
                                     .resize((144, 144), Image.LANCZOS), float)
        pipe.set_progress_bar_config(disable=True)
        ours = np.asarray(Image.open("runs/x/samples/0002.png").crop((3, 0, 147, 144)), float)
        base = picture()
        pipe.load_lora_weights("runs/x")
        off = lambda image: np.abs(image - ours).mean()  # of 255
        assert off(picture()) < 0.5 < 2 < off(base)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_gradient_checkpointing_changes_memory_only(tmp_path, family):
    tiny_pipeline(family).save_pretrained(tmp_path)
    gradients, kept = [], []
    for checkpointing in (False, True):
        config = small(model=str(tmp_path), resolution=32, max_sequence_length=16, gradient_checkpointing=checkpointing)
        model = flow_grpo.load_model(config)
        perturb(model)
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.update({x.data_ptr(): x.numel()}) or x, lambda x: x):
            v = flow_grpo.velocity(model, config, torch.ones(1, 4, 16, 16), torch.tensor([0.7]),
                                   flow_grpo.encode(model.pipe, config, ["a cat"]))
        v.square().mean().backward()
        kept.append(sum(sizes.values()))
        gradients.append(torch.cat([p.grad.flatten() for p in model.params]))
    close(*gradients, 1e-6)
    assert gradients[0].norm() > 0 and kept[1] < kept[0] / 2


def test_the_memory_estimate_is_what_autograd_keeps(tmp_path):
    """For SD3.5-Medium's blocks, with fewer channels, at its 1024 image tokens: with and without checkpointing."""
    from diffusers import SD3Transformer2DModel
    pipe = tiny_pipeline("sd3")
    pipe.transformer = SD3Transformer2DModel(
        sample_size=64, patch_size=2, in_channels=4, out_channels=4, num_layers=4, attention_head_dim=64, num_attention_heads=4,
        joint_attention_dim=64, caption_projection_dim=256, pooled_projection_dim=64, pos_embed_max_size=64, qk_norm="rms_norm",
        dual_attention_layers=(0, 1))
    pipe.save_pretrained(tmp_path)
    for checkpointing in (False, True):
        config = small(model=str(tmp_path), resolution=128, max_sequence_length=16, precision="bf16", guidance=1.0, lora_rank=2,
                       gradient_checkpointing=checkpointing, batch_size=1)
        model = flow_grpo.load_model(config)
        own, kept = {p.untyped_storage().data_ptr() for p in model.pipe.transformer.parameters()}, {}
        def keep(x):
            if x.untyped_storage().data_ptr() not in own:
                kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                alive.append(x)  # or the next would be put at the same address
            return x
        alive = []
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            flow_grpo.velocity(model, config, torch.randn(1, 4, 64, 64), torch.tensor([0.5]), flow_grpo.encode(model.pipe, config, ["a cat"]))
        estimate = flow_grpo.memory(model, config) - flow_grpo.memory(model, replace(config, batch_size=0))
        if checkpointing:  # one layer at a time is computed anew: 25 of them in the estimate
            estimate *= 4 / (4 + 25)
        assert sum(kept.values()) == pytest.approx(estimate, rel=0.3)


def test_a_run_says_what_follows_from_its_options(fresh, monkeypatch):
    config = small(groups=3, group_size=4, updates=2, window=2, batch_size=5)
    model = fresh(config)
    text = flow_grpo.describe(model, config)
    assert "3 groups x 4 = 12 images per epoch on 1 process (" in text and "2 of 6 steps trained, 2 updates per epoch" in text
    calls = []  # forward passes that gradients go through, by their size
    velocity = flow_grpo.velocity
    def counted(model, config, x, *rest):
        calls.append(len(x)) if torch.is_grad_enabled() else None
        return velocity(model, config, x, *rest)
    drawn = draw(model, config, prompts=("CAT", "DOG", "SUN"))
    monkeypatch.setattr(flow_grpo, "velocity", counted)
    learn(model, config, drawn)
    images, steps, micro, size = map(int, re.search(r"each of (\d+) images x (\d+) steps in (\d+) micro-batches of (\d+)", text).groups())
    assert (len(calls), max(calls), sum(calls)) == (2 * micro, size, 2 * images * steps)
    assert f"LoRA on {len(model.params)} tensors with {sum(p.numel() for p in model.params):,} parameters" in text
    assert "5 of 6 steps trained" in flow_grpo.describe(model, small(window=0))


def test_lora_at_the_real_size():
    """SD3.5-Medium's own configuration, without its weights: 382 tensors, as with the official code."""
    from diffusers import SD3Transformer2DModel
    with torch.device("meta"):
        transformer = SD3Transformer2DModel(
            sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24,
            joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=384,
            qk_norm="rms_norm", dual_attention_layers=tuple(range(13)))
        assert sum(p.numel() for p in transformer.parameters()) == 2_243_171_520
        transformer.requires_grad_(False)
        params = flow_grpo.add_lora(transformer, flow_grpo.parse_config(["--preset", "sd3.5-medium"]))
    assert len(params) == 382 and sum(p.numel() for p in params) == 18_776_064


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_the_grid_is_the_stock_pipelines(family):
    pipe = tiny_pipeline(family)
    pipe.set_progress_bar_config(disable=True)
    options = dict(height=32, width=32, num_inference_steps=6, max_sequence_length=16, output_type="latent")
    pipe("a cat", **options)
    stock = pipe.scheduler.sigmas.clone()
    close(flow_grpo.time_grid(pipe, small(resolution=32), 6), stock)


# ----------------------------------------------------------------------------------------------------- rewards


@pytest.fixture(scope="module")
def world():
    return __import__("make_toy")


def test_ocr_reads_signs(world):
    words = ["CAT", "LION", "MAP", "FROG", "XKWQ"]
    images = [world.paint_sign(w, random.Random(w)) for w in words]
    prompts = [f'a sign that says "{w}"' for w in words]
    reward = rewards.ocr()
    assert reward(images, prompts, [{}] * 5) == [1.0] * 5
    assert reward(images, [p.replace('"', '"x y z', 1) for p in prompts], None)[0] == pytest.approx(1 - 3 / 6)
    wrong = [prompts[1], prompts[0], *prompts[2:]]  # right images with right prompts, not all pairs
    scores = reward(images, wrong, None)
    assert max(scores[:2]) < 1 and scores[2:] == [1.0] * 3
    assert [reward([i], [p], None)[0] for i, p in zip(images, wrong)] == scores
    assert reward([Image.new("RGB", (48, 48), "white")], prompts[:1], None) == [0.0]
    careless = [world.paint_sign(w, random.Random(w), careless=True).resize((24, 24)).resize((48, 48)) for w in words]
    assert max(reward(careless, prompts, None)) < 1


def test_the_ocr_rule():
    from rapidfuzz.distance import Levenshtein
    score = lambda text, target: rewards.text_score(text, target, Levenshtein.distance)
    assert score("Hello World", "hello world") == 1 == score("say HELLOWORLD!", "Hello World")
    assert score("HELO", "HELLO") == pytest.approx(0.8)
    assert score("", "HELLO") == 0 == score("completely different", "HI")  # never below 0
    assert rewards.quoted('a "BIG CAT" and "X"') == "BIG CAT"


@pytest.mark.parametrize("tag", ["single_object", "two_object", "counting", "colors", "position", "color_attr"])
def test_geneval_knows_right_from_wrong(world, tag):
    rng, reward = random.Random(0), rewards.geneval()
    rows = rng.sample(world.scenes(tag), 4)
    good = [world.paint_scene(row, rng) for row in rows]
    bad = [world.paint_scene(row, rng, careless=True) for row in rows]
    prompts = [row["prompt"] for row in rows]
    assert reward(good, prompts, rows) == [1.0] * 4
    assert max(reward(bad, prompts, rows)) < 1
    assert [reward([i], [p], [r])[0] for i, p, r in zip(bad, prompts, rows)] == reward(bad, prompts, rows)


def test_the_geneval_rule():
    box = lambda x, y: (x, y, x + 10, y + 10)
    thing = lambda name, color="red", at=(0, 0): {"class": name, "color": color, "box": box(*at)}
    row = lambda *include: {"include": list(include)}
    score = rewards.geneval_score
    assert score([thing("cup")] * 3, row({"class": "cup", "count": 4})) == pytest.approx(0.75)
    assert score([thing("cup")], row({"class": "cup", "count": 1, "color": "red"})) == 1
    assert score([thing("cup", "blue")], row({"class": "cup", "count": 1, "color": "red"})) == 0.5
    assert score([thing("cup")] * 2, row({"class": "cup", "count": 1, "color": "red"})) == 0  # count 0, colour void
    assert score([thing("cup"), thing("cup", "blue")], row({"class": "cup", "count": 1, "color": "red"})) == 0  # even if one is right
    left = row({"class": "cup", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]})
    assert score([thing("cup", at=(30, 0)), thing("dog", at=(0, 2))], left) == 1
    assert score([thing("cup", at=(0, 0)), thing("dog", at=(30, 0))], left) == pytest.approx(2 / 3)  # not 0.75
    assert score([thing("cup", at=(1, 0)), thing("dog", at=(0, 0))], left) == pytest.approx(2 / 3)  # too near to tell
    assert score([thing("dog")], left) == pytest.approx(1 / 3)
    assert rewards.relations(box(0, 0), box(30, 40)) == {"left of", "above"}
    assert rewards.relations(box(0, 40), box(4, 0)) == {"below"}


def test_jpeg_rewards_are_opposite_and_know_noise_from_paper():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (48, 48, 3), np.uint8))
    images = [noise, Image.new("RGB", (48, 48), "white")]
    small_wins = rewards.jpeg_compressibility()(images, ["", ""], None)
    assert small_wins == [-s for s in rewards.jpeg_incompressibility()(images, ["", ""], None)]
    assert small_wins[0] < 2 * small_wins[1] < 0


def test_a_weighted_sum_keeps_its_parts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("def size(images, prompts, metadata):\n    return [i.width for i in images]\n")
    loaded = rewards.load("jpeg_compressibility:0.5,mine:size:2")
    images = [Image.new("RGB", (w, 8)) for w in (8, 16)]
    scores = rewards.score(loaded, images, ["a", "b"], [{}, {}])
    assert list(scores) == ["jpeg_compressibility", "mine:size", "reward"] and scores["mine:size"] == [8, 16]
    close(scores["reward"], [0.5 * a + 2 * b for a, b in zip(*list(scores.values())[:2])])


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A random CLIPModel with its processor in a folder; PickScore is one of these."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor
    torch.manual_seed(0)
    tokenizer, folder = clip_tokenizer(20), tmp_path_factory.mktemp("clip")
    text = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                max_position_embeddings=20, bos_token_id=len(tokenizer) - 2, eos_token_id=len(tokenizer) - 1)
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def photos():
    rng = np.random.default_rng(0)
    colors = [(200, 40, 40), (40, 180, 60), (50, 60, 220)]
    return [Image.fromarray((np.full((40, 48, 3), c) * rng.uniform(0.5, 1, (40, 48, 1))).astype(np.uint8)) for c in colors]


def test_clip_rewards_score_each_image_with_its_own_prompt(tiny_clip, photos):
    """Against the model called by hand, one image and one prompt at a time, without padding."""
    from transformers import CLIPModel, CLIPProcessor
    model, processor = CLIPModel.from_pretrained(tiny_clip), CLIPProcessor.from_pretrained(tiny_clip)
    prompts = ["a red wall", "grass", "x" * 60]  # the last is cut at the model's 20 tokens
    cosine, scale = [], model.logit_scale.exp().item()
    for image, prompt in zip(photos, prompts):
        inputs = processor(images=image, text=prompt, return_tensors="pt", truncation=True, max_length=20)
        out = model(**inputs)
        cosine.append(torch.nn.functional.cosine_similarity(out.image_embeds, out.text_embeds).item())
    for reward, expected in ((rewards.pickscore(name=tiny_clip, processor=tiny_clip), [scale * c / 26 for c in cosine]),
                             (rewards.pickscore(scale=1, name=tiny_clip, processor=tiny_clip), [scale * c for c in cosine]),
                             (rewards.clipscore(name=tiny_clip), [100 * c for c in cosine])):
        together = reward(photos, prompts, None)
        close(together, expected, 1e-4)
        close(together, [reward([i], [p], None)[0] for i, p in zip(photos, prompts)], 1e-4)
        assert reward(photos, prompts[::-1], None)[0] != pytest.approx(expected[0], rel=1e-3)


def test_aesthetic_is_a_linear_head_on_the_normalised_embedding(tiny_clip, photos, tmp_path):
    from transformers import CLIPModel, CLIPProcessor
    torch.manual_seed(0)
    head = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Dropout(), torch.nn.Linear(8, 1)).eval()
    torch.save({f"layers.{key}": value for key, value in head.state_dict().items()}, tmp_path / "head.pth")
    reward = rewards.aesthetic(name=tiny_clip, head=str(tmp_path / "head.pth"))
    inputs = CLIPProcessor.from_pretrained(tiny_clip)(images=photos, text=[""] * 3, return_tensors="pt")
    embeds = CLIPModel.from_pretrained(tiny_clip)(**inputs).image_embeds
    expected = head(embeds / embeds.norm(dim=-1, keepdim=True))[:, 0].tolist()
    close(reward(photos, ["ignored"] * 3, None), expected, 1e-4)
    close([reward([image], [""], None)[0] for image in photos], expected, 1e-4)
    torch.save({"layers.0.weight": print}, tmp_path / "evil.pth")  # anything but tensors is refused
    with pytest.raises(Exception, match="(?i)weights"):
        rewards.aesthetic(name=tiny_clip, head=str(tmp_path / "evil.pth"))


@pytest.fixture(scope="module")
def tiny_detector(tmp_path_factory):
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, SwinConfig
    folder = tmp_path_factory.mktemp("detector")
    torch.manual_seed(0)
    swin = SwinConfig(image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
                      out_features=["stage1", "stage2", "stage3", "stage4"])
    labels = {0: "dog", 1: "mouse"}
    Mask2FormerForUniversalSegmentation(Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32, encoder_layers=1,
        decoder_layers=2, num_attention_heads=2, dim_feedforward=32, num_queries=10, id2label=labels,
        label2id={v: k for k, v in labels.items()})).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 64}).save_pretrained(folder)
    return str(folder)


def test_geneval_photo_scores_what_the_detector_finds(tiny_detector, tiny_clip, photos, monkeypatch):
    """The detector's output is set by hand; thresholds, names, boxes and colours are the reward's."""
    from transformers import Mask2FormerImageProcessor
    mask = lambda left, right: torch.tensor(np.pad(np.ones((20, right - left)), ((10, 10), (left, 48 - right))))
    asked = []

    def result(processor, outputs, threshold, target_sizes, return_binary_maps):
        asked.append((threshold, target_sizes))
        found = [(mask(2, 12), 0, 0.95), (mask(30, 44), 1, 0.5), (mask(14, 24), 0, 0.8)]
        found = [f for f in found if f[2] > threshold]
        return [{"segmentation": torch.stack([f[0] for f in found]),
                 "segments_info": [{"label_id": f[1], "score": f[2]} for f in found]}]
    row = lambda *include, tag="": {"tag": tag, "include": list(include)}
    reward = rewards.geneval_photo(detector=tiny_detector, name=tiny_clip)
    score = lambda row: reward(photos[:1], ["p"], [row])[0]
    assert score(row({"class": "dog", "count": 1})) <= 1  # once with the random detector itself
    monkeypatch.setattr(Mask2FormerImageProcessor, "post_process_instance_segmentation", result)
    assert score(row({"class": "dog", "count": 2})) == 1 and asked[-1] == (0.3, [(40, 48)])
    assert score(row({"class": "dog", "count": 1}, tag="counting")) == 1 and asked[-1][0] == 0.9
    pair = {"class": "computer mouse", "count": 1}, {"class": "dog", "count": 2, "position": ["left of", 0]}
    assert score(row(*pair)) == 1
    assert score(row(*pair[:1], {**pair[1], "position": ["right of", 0]})) == pytest.approx(2 / 3)
    colors = [score(row({"class": "computer mouse", "count": 1, "color": color})) for color in rewards.PHOTO_COLORS]
    assert sorted(colors) == [0.5] * 9 + [1]  # the random CLIP names one of the ten
    with pytest.raises(rewards.RewardError, match="a photo.*zebra"):
        reward(photos[:1], ["a photo of a zebra"], [row({"class": "zebra", "count": 1})])


def test_taste_has_a_term_for_each_flaw():
    row = {"tag": "color_attr", "include": [{"class": "circle", "count": 1, "color": "red"}, {"class": "square", "count": 1, "color": "blue"}]}
    def picture(radius=9, apart=12, shift=0, fade=0.0, noise=0, second="blue"):
        image = Image.new("RGB", (192, 192), (245, 245, 245))
        for x, shape, color in ((24 - apart, "circle", "red"), (24 + apart, "square", second)):
            color = tuple(round(c + fade * (245 - c)) for c in rewards.COLORS[color])
            rewards.draw_shape(rewards.ImageDraw.Draw(image), shape, 4 * x, 4 * (24 + shift), 4 * radius, color)
        pixels = np.asarray(image.resize((48, 48), Image.LANCZOS)) + np.random.default_rng(0).normal(0, noise, (48, 48, 3))
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    taste = rewards.toy_taste()
    flaws = [dict(radius=6), dict(apart=9.5), dict(shift=11), dict(fade=0.4), dict(noise=12), dict(second="green")]
    best, *flawed = taste([picture(), *(picture(**flaw) for flaw in flaws)], ["a"] * 7, [row] * 7)
    assert 0.9 < best <= 1 and all(score < best - 0.02 for score in flawed)
    assert taste([Image.new("RGB", (48, 48), "white")], ["a"], [row]) == [0.0]


def test_toy_pickscore_has_learned_the_taste(world):
    """Through the same lines as PickScore; on pairs of the held-out captions, and each image with its own prompt."""
    pairs, tastes, prompts = world.paint_pairs(("test", 150, 1))
    images = [Image.fromarray(image) for pair in pairs for image in pair]
    pick = rewards.toy_pickscore()
    scores = pick(images, [p for p in prompts for _ in range(2)], None)
    right = [(a > b) == (c > d) for (a, b), (c, d) in zip(np.reshape(scores, (-1, 2)), tastes)]
    assert np.mean(right) > 0.65  # 0.77 of 2,000; a coin gives 0.5 +- 0.04 of 150
    assert pick(images[4:5], prompts[2:3], None) == pytest.approx(scores[4:5], abs=1e-4)
    assert np.mean(pick(images, [p for p in prompts[::-1] for _ in range(2)], None)) < np.mean(scores)


@pytest.fixture(scope="module")
def tiny_vlm(tmp_path_factory):
    """A random Qwen2.5-VL that speaks letter by letter and must answer with one digit -> its folder"""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessor
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    ids = {token: i for i, token in enumerate([*map(chr, range(32, 127)), "\n", *special])}
    letters = Tokenizer(models.WordLevel(ids, unk_token=" "))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, pad_token="<|endoftext|>", eos_token="<|im_end|>",
                                        additional_special_tokens=special[1:])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{m.role}}\n{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|>"
        "<|vision_end|>{% else %}{{c.text}}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant{{'\n'}}")
    torch.manual_seed(3)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=dict(vocab_size=len(ids), hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                         num_key_value_heads=1, rope_scaling=dict(type="mrope", mrope_section=[2, 3, 3]),
                         bos_token_id=None, eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"]),
        vision_config=dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=32, out_hidden_size=32, fullatt_block_indexes=[0],
                           window_size=56),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"]))
    for p in model.parameters():
        p.data *= 6 if p.ndim > 1 else 1  # so that images and prompts make a difference
    model.generation_config.begin_suppress_tokens = [i for token, i in ids.items() if token not in "12345"]
    model.generation_config.forced_eos_token_id = ids["<|im_end|>"]
    folder = tmp_path_factory.mktemp("vlm")
    for part in (model, tokenizer, Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=112 * 112)):
        part.save_pretrained(folder)
    return folder, model.eval(), ids


def test_vlm_rates_each_image_for_its_own_prompt(tiny_vlm):
    """Against one forward pass for each pair, with the question and the image's places spelled out here."""
    folder, model, ids = tiny_vlm
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (56 + 28 * (k % 3), 84, 3), dtype=np.uint8)) for k in range(10)]
    prompts = [f"caption {'abcdefghij'[k] * (k + 1)}" for k in range(10)]
    def expected(image, prompt):
        patches = (image.height // 28) * (image.width // 28)
        text = ["<|im_start|>", *"user\n", "<|vision_start|>", *["<|image_pad|>"] * patches, "<|vision_end|>",
                *rewards.QUESTION.format(prompt=prompt), "<|im_end|>", "\n", "<|im_start|>", *"assistant\n"]
        tokens = torch.tensor([[ids[token] for token in text]])
        mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
        pixels = ((np.asarray(image) / 255 - mean) / std).transpose(2, 0, 1)[None].repeat(2, 0)  # [2 frames, 3, H, W]
        h, w = image.height // 14, image.width // 14
        pixels = pixels.reshape(1, 2, 3, h // 2, 2, 14, w // 2, 2, 14).transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
        with torch.no_grad():
            logits = model(input_ids=tokens, pixel_values=torch.tensor(pixels.reshape(h * w, -1), dtype=torch.float32),
                           image_grid_thw=torch.tensor([[1, h, w]]), mm_token_type_ids=(tokens == ids["<|image_pad|>"]).int()).logits
        return max("12345", key=lambda digit: logits[0, -1, ids[digit]])
    rate = rewards.vlm(folder)
    digits = [int(expected(*pair)) / 5 for pair in zip(images, prompts)]
    assert len(set(digits)) > 2
    assert rate(images, prompts, None) == digits
    assert [rate([image], [prompt], None)[0] for image, prompt in zip(images, prompts)] == digits
    assert rate(images, prompts[::-1], None) == [int(expected(*pair)) / 5 for pair in zip(images, prompts[::-1])] != digits


def test_a_rating_is_one_digit():
    assert rewards.rating("4", "") == 0.8 == rewards.rating(" 4.\n", "")
    for answer in ("", "6", "4 or 5", "I would say 4", "45", "0", "3.5"):
        with pytest.raises(rewards.RewardError, match="a cat"):
            rewards.rating(answer, "a cat")


@pytest.mark.parametrize("name", ["pickscore", "clipscore", "aesthetic", "geneval_photo", "vlm"])
def test_without_weights_a_reward_says_so_in_one_line(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(rewards.RewardError, match=r"its model \S+/\S+ \([\d.]+ GB\) cannot be loaded") as error:
        rewards.load(name)
    assert "\n" not in str(error.value)
    assert not huggingface_hub.utils.are_progress_bars_disabled()  # gigabytes must not look like a hang


# ------------------------------------------------------------------------------------------------ command line

CUSTOM = '''
calls = 0
def fine(images, prompts, metadata): return [float(len(p)) for p in prompts]
def by_hue(images, prompts, metadata): return [float(i.resize((1, 1)).getpixel((0, 0))[0]) for i in images]
def raises(images, prompts, metadata): return [1 / 0 for p in prompts]
def nan(images, prompts, metadata): return [float("nan") for p in prompts]
def short(images, prompts, metadata): return [1.0]
def later(images, prompts, metadata):
    global calls
    calls += 1  # the check at the start, the evaluation, epochs 0 and 1; then
    return [i / len(images) if calls < 5 else 1 / 0 for i in range(len(images))]
'''
TINY = ["--groups", "2", "--group_size", "4", "--eval_prompts", "2", "--eval_steps", "2", "--train_steps", "4", "--window",
        "1", "--epochs", "1"]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """An empty current folder with a few files that a user might have."""
    monkeypatch.chdir(tmp_path)
    Path("custom.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("custom", None)
    Path("noquotes").mkdir()
    for split in ("train", "test"):
        Path(f"noquotes/{split}.txt").write_text("a sign without words\n")
    for folder, line in (("benches", '{"prompt": "a photo of a bench", "include": [{"class": "bench", "count": 1}]}'),
                         ("broken", '{"text": "no prompt here"}')):
        Path(folder).mkdir()
        for split in ("train", "test"):
            Path(f"{folder}/{split}_metadata.jsonl").write_text(line + "\n")
    Path("empty").mkdir()
    Path("empty/train.txt").write_text("\n")
    return tmp_path


@pytest.mark.parametrize("options, says", [
    (["--reward", "ocrr"], ["ocrr", "ocr", "geneval"]),
    (["--reward", "custom:nothing"], ["custom has no function nothing"]),
    (["--reward", "nofile:nothing"], ["nofile"]),
    (["--reward", "custom:raises"], ["custom:raises", "ZeroDivisionError", "custom.py line 5", "a photo of"]),
    (["--reward", "custom:nan"], ["custom:nan", "nan", "a photo of"]),
    (["--reward", "custom:short"], ["custom:short", "1 scores for 2 images"]),
    (["--reward", "ocr", "--dataset", "noquotes"], ["a sign without words", "double quotes"]),
    (["--reward", "geneval", "--dataset", "noquotes"], ["a sign without words", "metadata"]),
    (["--reward", "geneval", "--dataset", "benches"], ["a photo of a bench", "circle"]),
    (["--dataset", "broken"], ["--dataset broken", "train_metadata.jsonl", "prompt"]),
    (["--reward", "ocr:1,ocr:2"], ["ocr is there twice"]),
    (["--reward", "custom:broken:nan"], ["custom:broken:nan"]),
    (["--resolution", "50"], ["--resolution 50", "multiple of 8"]),
    (["--dataset", "nowhere"], ["--dataset nowhere", "train.txt"]),
    (["--dataset", "empty"], ["--dataset empty"]),
    (["--model", "./nowhere"], ["--model ./nowhere"]),
    (["--group_size", "1"], ["--group_size 1", "2 or more"]),
    (["--updates", "3"], ["--updates 3", "--group_size 4", "2 or 4"]),
    (["--eval_reward", "jpeg"], ["--reward jpeg", "ocr"]),
    (["--window", "3"], ["--window 3", "4 steps"]),
    (["--learning_rat", "1"], ["--learning_rat", "did you mean --learning_rate?"]),
    (["--learning_rate", "fast"], ["--learning_rate", "fast"]),
    (["--learning_rate", "0"], ["--learning_rate 0", "or more"]),
    (["--precision", "fp8"], ["--precision fp8", "fp32 or bf16"]),
    (["--preset", "sd4"], ["--preset sd4", "sd3.5-medium"]),
    (["--std_over", "all"], ["--std_over all", "batch or group"]),
    (["--name", "x", "--resume"], ["--resume", "holds no run"]),
])
def test_a_mistake_gives_one_clear_line_and_exit_code_2(desk, capsys, options, says):
    with pytest.raises(SystemExit) as stopped:
        flow_grpo.main([*TINY, *options])
    error = [line for line in capsys.readouterr().err.splitlines() if not re.search(r"\d+/\d+ \[|^\s*$", line)]
    assert stopped.value.code == 2 and len(error) == 1
    for part in says:
        assert part in error[0]


def test_a_reward_that_fails_late_leaves_the_last_checkpoint(desk, capsys):
    options = [*TINY, "--epochs", "4", "--save_every", "1", "--name", "x", "--reward", "custom:later"]
    with pytest.raises(SystemExit):
        flow_grpo.main(options)
    assert re.search(r"epoch 2: reward custom:later failed: .*--resume --name x$", one_line(capsys))
    assert len(load_file("runs/x/checkpoint/state.safetensors")) > 100
    assert [json.loads(line)["epoch"] for line in open("runs/x/metrics.jsonl")] == [0, 1]
    sys.modules.pop("custom")  # the user mends it
    Path("custom.py").write_text(CUSTOM.replace("1 / 0 for i in range", "0.5 for i in range"))
    flow_grpo.main(["--resume", "--name", "x"])
    rows = [json.loads(line) for line in open("runs/x/metrics.jsonl")]
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3, 4]
    flow_grpo.main(["--resume", "--name", "x", "--epochs", "5"])  # and it may go on for longer
    longer = [json.loads(line) for line in open("runs/x/metrics.jsonl")]
    assert longer[:4] == rows[:4] and [row["epoch"] for row in longer] == [0, 1, 2, 3, 4, 5]
    assert "eval_reward" in longer[4] and "reward" in longer[4]
    with pytest.raises(SystemExit):
        flow_grpo.main(["--resume", "--name", "x", "--epochs", "3"])
    assert "already at 5" in capsys.readouterr().err


def test_a_run_writes_what_the_readme_says(desk, capsys):
    flow_grpo.main([*TINY, "--reward", "custom:fine:2,jpeg_compressibility:0.1", "--name", "x", "--beta", "0.1"])
    for name in ("config.json", "metrics.jsonl", "curve.png", "before_after.png", "samples/0000.png", "samples/0001.png",
                 "checkpoint/state.safetensors", "pytorch_lora_weights.safetensors"):
        assert (desk / "runs/x" / name).stat().st_size > 0
    first, last = map(json.loads, open("runs/x/metrics.jsonl"))
    readme = (HERE / "README.md").read_text()
    for key in (*first, *last):
        assert f"`{key}`" in readme or f"`{key.split('/')[0]}/" in readme, f"README.md does not explain {key}"
    assert {"reward", "reward_std", "group_std", "no_signal", "policy_loss", "kl", "ratio", "ratio_deviation", "clip_low",
            "clip_high", "grad_norm", "seconds_sampling", "seconds_reward", "seconds_update", "eval_reward",
            "eval_accuracy", "eval_diversity"} <= set(first)
    assert set(last) >= {"epoch", "eval_reward", "eval_accuracy", "eval_diversity"}
    assert "runs/x" in capsys.readouterr().out
    assert not huggingface_hub.utils.are_progress_bars_disabled()  # a hub model's gigabytes must not look like a hang
    with pytest.raises(SystemExit):  # nothing is overwritten by accident
        flow_grpo.main([*TINY, "--name", "x"])
    assert "exists" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        flow_grpo.main(["--name", "x", "--resume", "--group_size", "8"])
    assert "--group_size 8: the run to resume has 4" in capsys.readouterr().err
    flow_grpo.main(["--resume", "--name", "x", "--epochs", "2", "--learning_rate", "0.02"])
    assert json.loads(Path("runs/x/config.json").read_text())["learning_rate"] == 0.02
    Path("runs/keep").mkdir()
    os.rename("runs/x", "runs/keep/y")  # it goes by its folder, not by the name that it once had
    flow_grpo.main(["--resume", "--name", "keep/y", "--eval_prompts", "1", "--eval_per_prompt", "3"])
    saved = json.loads(Path("runs/keep/y/config.json").read_text())
    assert (saved["name"], saved["epochs"], saved["eval_prompts"]) == ("keep/y", 2, 1) and not Path("runs/x").exists()
    away = str(desk / "away")  # a folder anywhere
    flow_grpo.main([*TINY, "--name", away])
    flow_grpo.main(["--resume", "--name", away, "--epochs", "2"])
    assert json.loads(Path(away, "config.json").read_text())["name"] == away


def test_the_readme_points_at_the_right_lines():
    readme, lines = (HERE / "README.md").read_text(), (HERE / "flow_grpo.py").read_text().splitlines()
    links = re.findall(r"\[`?(\w+)`?\]\(flow_grpo\.py#L(\d+)\)", readme)
    assert len(links) >= 7
    for name, number in links:
        assert re.match(rf"def {name}\b", lines[int(number) - 1]), f"{name} is not at line {number}"
    assert f"in {len(lines)} lines" in readme


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as stopped:
        flow_grpo.main(["--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert all(f"--{name}" in text for name in Config.__dataclass_fields__)


def test_the_presets_are_the_papers():
    config = flow_grpo.parse_config(["--preset", "sd3.5-medium", "--reward", "ocr"])
    expected = dict(resolution=512, train_steps=10, eval_steps=40, group_size=24, groups=48, updates=2, guidance=4.5,
                    noise_level=0.7, learning_rate=3e-4, clip_range=1e-4, lora_rank=32, lora_alpha=64, beta=0.04, window=0,
                    max_sequence_length=128, ema_decay=0.9, ema_every=8, std_over="batch")
    assert {key: getattr(config, key) for key in expected} == expected
    assert flow_grpo.parse_config(["--preset", "sd3.5-medium", "--beta", "0.01"]).beta == 0.01
    assert flow_grpo.parse_config(["--preset", "sd3.5-medium", "--updates", "3"]).updates == 3  # 3 divides 24, not 16
    small = flow_grpo.parse_config(["--preset", "sd3.5-medium-24gb", "--no-offload"])
    assert (small.group_size, small.clip_range, small.gradient_checkpointing, small.offload) == (24, 1e-4, True, False)
    flux = flow_grpo.parse_config(["--preset", "flux.1-dev"])
    expected = dict(train_steps=6, eval_steps=28, guidance=3.5, noise_level=0.9, beta=0, lora_rank=64, lora_alpha=128,
                    group_size=24, groups=48, clip_range=1e-4, precision="bf16")
    assert {key: getattr(flux, key) for key in expected} == expected


# -------------------------------------------------------------------------------------------------- whole runs


SABOTAGE = '''
"""Imported by the run as its reward: kills the process inside the named function at its n-th call."""
import os, signal, sys
run, (name, n) = sys.modules["__main__"], os.environ["KILL_IN"].split(":")
original, calls = getattr(run, name), [0]

def deadly(*args, **kwargs):
    calls[0] += 1
    if calls[0] == int(n):
        if name == "save_file":  # half a checkpoint
            original(*args, **kwargs)
            os.truncate(args[1], os.path.getsize(args[1]) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(run, name, deadly)

def ink(images, prompts, metadata): return [-sum(i.resize((1, 1)).getpixel((0, 0))) for i in images]
'''


def timeless(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows]


def assert_same_run(a, b):
    for name in ("checkpoint/state.safetensors", "pytorch_lora_weights.safetensors"):
        tensors = load_file(a / name), load_file(b / name)
        assert tensors[0].keys() == tensors[1].keys()
        assert all(torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0])
    assert timeless(a) == timeless(b)


def test_a_run_killed_anywhere_resumes_as_if_it_had_not_been(desk):
    """SIGKILL while sampling, updating, evaluating, and in the middle of writing a checkpoint."""
    Path("custom_ink.py").write_text(SABOTAGE.split("setattr(run, name, deadly)")[1])
    Path("deadly_ink.py").write_text(SABOTAGE)
    options = [*TINY, "--epochs", "3", "--eval_every", "2", "--save_every", "1", "--beta", "0.01"]
    flow_grpo.main([*options, "--reward", "custom_ink:ink", "--name", "whole"])
    points = ["evaluate:1", "velocity:19", "ema_step:3", "evaluate:2", "save_file:2"]
    processes = [subprocess.Popen(
        [sys.executable, str(HERE / "flow_grpo.py"), *options, "--reward", "deadly_ink:ink", "--name", point.replace(":", "")],
        env={**os.environ, "KILL_IN": point}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for point in points]
    for process, point in zip(processes, points):
        process.wait(timeout=300)
        run = desk / "runs" / point.replace(":", "")
        rows = timeless(run) if (run / "metrics.jsonl").exists() else []
        assert process.returncode == -signal.SIGKILL and len(rows) < 4 and bool(rows) == (point != "evaluate:1"), point
        config = run / "config.json"
        config.write_text(config.read_text().replace("deadly", "custom"))
        flow_grpo.main(["--resume", "--name", run.name])
        assert_same_run(desk / "runs/whole", run)


def test_ctrl_c_ends_the_epoch_and_keeps_it(desk, capsys):
    Path("press.py").write_text("""
import signal
presses = []
def ink(images, prompts, metadata):
    presses.append(1)
    if len(presses) == 4:  # the check at the start, the evaluation, epoch 0, epoch 1
        signal.raise_signal(signal.SIGINT)
    return [-sum(i.resize((1, 1)).getpixel((0, 0))) for i in images]
""")
    options = [*TINY, "--epochs", "3", "--save_every", "9", "--eval_every", "9"]
    with pytest.raises(SystemExit):
        flow_grpo.main([*options, "--reward", "press:ink", "--name", "pressed"])
    told = capsys.readouterr().err
    assert "stopping after this epoch" in told and "interrupted after epoch 1" in told
    assert [row["epoch"] for row in timeless(desk / "runs/pressed")] == [0, 1]
    assert (desk / "runs/pressed/checkpoint/state.safetensors").exists()
    flow_grpo.main(["--resume", "--name", "pressed"])
    flow_grpo.main([*options, "--reward", "press:ink", "--name", "whole"])
    assert_same_run(desk / "runs/whole", desk / "runs/pressed")


def test_a_full_gpu_is_one_line_that_says_what_helps(desk, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    monkeypatch.setattr(flow_grpo, "update", full)
    with pytest.raises(SystemExit):
        flow_grpo.main([*TINY, "--name", "x"])
    assert re.search("lower --batch_size, .*--gradient_checkpointing.*--resume --name x", one_line(capsys))


def one_line(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("flow_grpo.py: ")]
    assert len(lines) == 1
    return lines[0]


def test_a_bad_checkpoint_or_disk_is_one_line(desk, capsys, monkeypatch):
    Path("runs").write_text("a file, where the folder should be")
    with pytest.raises(SystemExit):
        flow_grpo.main([*TINY, "--name", "x"])
    assert "runs/x" in one_line(capsys)
    Path("runs").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**6}))
        with pytest.raises(SystemExit):
            flow_grpo.main([*TINY, "--name", "x"])
        assert re.search("runs/x has 1 MB left, and checkpoints need [1-9]", one_line(capsys))
    options = [*TINY, "--epochs", "2", "--save_every", "1", "--eval_every", "9", "--reward", "custom:fine"]
    flow_grpo.main([*options, "--name", "y", "--epochs", "1"])
    capsys.readouterr()
    good = (desk / "runs/y/checkpoint/state.safetensors").read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(flow_grpo, "save_file", full)
        with pytest.raises(SystemExit):
            flow_grpo.main(["--resume", "--name", "y", "--epochs", "2"])
    assert "No space left" in one_line(capsys)
    state = desk / "runs/y/checkpoint/state.safetensors"
    assert state.read_bytes() == good
    for damage in (lambda: state.write_bytes(good[:len(good) // 2]), lambda: state.write_bytes(b"hello"),
                   lambda: torch.save({"lora.0": 1}, state)):
        damage()
        with pytest.raises(SystemExit):
            flow_grpo.main(["--resume", "--name", "y", "--epochs", "2"])
        assert "runs/y/checkpoint/state.safetensors" in one_line(capsys)
    flow_grpo.main([*options, "--name", "z", "--epochs", "1", "--lora_rank", "2"])
    state.write_bytes((desk / "runs/z/checkpoint/state.safetensors").read_bytes())
    capsys.readouterr()
    with pytest.raises(SystemExit):
        flow_grpo.main(["--resume", "--name", "y", "--epochs", "2"])
    assert "not of this run" in one_line(capsys)
    for damage in ("", '{"group', '{"no_such_option": 1}'):
        (desk / "runs/y/config.json").write_text(damage)
        with pytest.raises(SystemExit):
            flow_grpo.main(["--resume", "--name", "y"])
        assert "runs/y/config.json is not the config" in one_line(capsys)


def test_rewards_run_while_the_next_images_are_drawn(fresh, monkeypatch):
    import threading
    drawing = threading.Event()
    config, scored = small(batch_size=4), []
    model, decode = fresh(config), flow_grpo.decode

    def watched(pipe, latents):
        if scored:
            drawing.set()  # the second half was drawn before the first was scored
        return decode(pipe, latents)

    def brightness(images, prompts, metadata):
        scored.append(prompts[0])
        assert len(scored) > 1 or drawing.wait(60), "the reward kept the sampling waiting"
        return [float(np.mean(image)) for image in images]
    monkeypatch.setattr(flow_grpo, "decode", watched)
    seen = []
    monkeypatch.setattr(flow_grpo, "update", lambda m, c, drawn, advantages, rng: seen.append((drawn, advantages)) or {})
    train_set = [(f'a sign that says "{w}"', {}) for w in ("CAT", "DOG")]
    flow_grpo.train_epoch(model, config, {"brightness": (brightness, 1.0)}, train_set, 0)
    (drawn, advantages), = seen
    assert len(scored) == 2 and set(scored) == set(drawn.prompts)
    own = torch.tensor([float(np.mean(image)) for image in drawn.images]).view(2, 4)
    close(advantages, group_advantages(own).flatten(), 1e-4)  # in order: each image has its own score


def test_held_out_rewards_are_measured_and_not_trained_on(desk):
    options = [*TINY, "--reward", "jpeg_compressibility"]
    flow_grpo.main([*options, "--name", "plain"])
    flow_grpo.main([*options, "--name", "watched", "--eval_reward", "custom:fine,jpeg_incompressibility:0.1"])
    plain, watched = (timeless(desk / "runs" / name) for name in ("plain", "watched"))
    for a, b in zip(plain, watched):
        extra = {key: b.pop(key) for key in [*b] if key.startswith("eval_reward/")}
        assert a == b and extra["eval_reward/jpeg_incompressibility"] == -a["eval_reward"]
        assert set(extra) == {"eval_reward/jpeg_compressibility", "eval_reward/jpeg_incompressibility", "eval_reward/custom:fine"}


def launch(folder, *options):
    """Two processes on the CPU, by the launcher that `accelerate launch` uses for GPUs."""
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           str(HERE / "flow_grpo.py"), *options], cwd=folder, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, timeout=300)


def test_two_processes_are_as_good_as_one(desk):
    """The same weights and metrics. Each process has one of two groups, of which one never has an advantage."""
    Path("half.py").write_text("""
import os
def ink(images, prompts, metadata):
    open(f"rank{os.environ.get('RANK', 0)}", "a").write(str([hash(i.tobytes()) for i in images]))
    return [0.5 if "dull" in p else -float(sum(i.resize((1, 1)).getpixel((0, 0)))) for i, p in zip(images, prompts)]
""")
    Path("prompts").mkdir()
    for split in ("train", "test"):
        Path(f"prompts/{split}.txt").write_text("a dull circle\na red cross\n")
    options = [*TINY, "--epochs", "2", "--dataset", "prompts", "--reward", "half:ink", "--std_over", "group", "--beta", "0"]
    flow_grpo.main([*options, "--name", "one"])
    done = launch(desk, *options, "--name", "two")
    assert done.returncode == 0, done.stdout
    one, two = (load_file(f"runs/{name}/checkpoint/state.safetensors") for name in ("one", "two"))
    for kind in ("lora", "ema"):
        # The second matrices of the LoRA, which begin at 0: all of them was learned.
        a, b = (torch.cat([state[key].flatten() for key in sorted(state) if key.startswith(kind) and state[key].shape[1] == 32])
                for state in (one, two))
        assert a.norm() > 0 and (a - b).norm() < 1e-3 * a.norm()
    for a, b in zip(timeless(desk / "runs/one"), timeless(desk / "runs/two")):
        assert a.keys() == b.keys()
        for key in a.keys() - {"kl", "clip_low", "clip_high"}:
            assert a[key] == pytest.approx(b[key], rel=1e-2, abs=1e-6), key
    assert "2 processes" in done.stdout and done.stdout.count("look at") == 1  # only the first one speaks
    assert Path("rank0").exists() and Path("rank1").exists()


def test_a_process_that_dies_ends_the_run(desk):
    Path("mortal.py").write_text("""
import os
calls = []
def ink(images, prompts, metadata):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        os._exit(9)
    return [float(i.getpixel((0, 0))[0]) for i in images]
""")
    done = launch(desk, *TINY, "--reward", "mortal:ink")
    assert done.returncode != 0 and "exitcode" in done.stdout.replace(" ", "")


@pytest.mark.parametrize("options, says", [(["--groups", "3"], "multiple of the 2 processes: 2 or 4 would do")])
def test_groups_must_fit_the_processes(desk, capsys, monkeypatch, options, says):
    monkeypatch.setattr(flow_grpo, "WORLD", 2)
    with pytest.raises(SystemExit):
        flow_grpo.main([*TINY, *options])
    assert says in one_line(capsys)


def test_stock_diffusers_reproduces_an_evaluation_image(desk):
    """As in the README: load_lora_weights, and the seed of the evaluation image."""
    flow_grpo.main([*TINY, "--learning_rate", "0.03", "--epochs", "2", "--beta", "0", "--name", "x", "--dataset", str(HERE / "toy/ocr"),
                    "--eval_steps", "6", "--guidance", "2"])
    from diffusers import StableDiffusion3Pipeline
    pipe = StableDiffusion3Pipeline.from_pretrained(HERE / "toy")
    prompt = (HERE / "toy/ocr/test.txt").read_text().splitlines()[0]
    options = dict(num_inference_steps=6, guidance_scale=2.0, max_sequence_length=14, height=48, width=48)
    ours = np.asarray(Image.open("runs/x/samples/0002.png").crop((3, 0, 147, 144)), float)  # seed 0, drawn at 144 pixels
    picture = lambda: np.asarray(pipe(prompt, generator=torch.Generator().manual_seed(0), **options).images[0]
                                 .resize((144, 144), Image.LANCZOS), float)
    base = picture()
    pipe.load_lora_weights("runs/x")
    tuned = picture()
    assert np.abs(tuned - ours).max() <= 2
    assert np.abs(base - ours).max() > 20, "the run did not change the picture enough to tell"


def test_the_toy_loads_as_a_stock_pipeline_without_arguments():
    from diffusers import StableDiffusion3Pipeline
    pipe = StableDiffusion3Pipeline.from_pretrained(HERE / "toy")
    assert pipe.text_encoder and pipe.text_encoder_2 and pipe.text_encoder_3
    files = [f for f in (HERE / "toy").rglob("*") if f.is_file() and "build" not in f.parts]
    assert sum(f.stat().st_size for f in files) < 10e6
    words = [set((HERE / f"toy/ocr/{split}.txt").read_text().split("\n")) - {""} for split in ("train", "test")]
    assert len(words[0]) >= 200 and len(words[1]) >= 100 and not words[0] & words[1]
    rows = [{json.loads(line)["prompt"] for line in open(HERE / f"toy/geneval/{split}_metadata.jsonl")}
            for split in ("train", "test")]
    assert not rows[0] & rows[1]


def test_training_raises_the_toy_reward(desk):
    flow_grpo.main(["--epochs", "5", "--groups", "4", "--group_size", "12", "--eval_prompts", "12", "--eval_steps", "10",
                    "--learning_rate", "5e-3", "--beta", "0", "--guidance", "1", "--name", "x"])
    rows = [json.loads(line) for line in open("runs/x/metrics.jsonl")]
    assert rows[-1]["eval_reward"] > rows[0]["eval_reward"] + 0.02
