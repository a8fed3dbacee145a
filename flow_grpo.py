"""Flow-GRPO in one file: reinforcement learning for flow-matching image models (arXiv 2505.05470).

A flow-matching model turns noise into an image by following an ordinary differential equation, an
ODE. After the first noise nothing is random. So there is no action whose probability reinforcement
learning could raise. Flow-GRPO adds randomness, learns from it, and takes it away:

  sde_step          Each step drops some old noise and adds fresh noise. The images are as likely as
                    before, but a step is now a Gaussian with a known density: a policy.
  rollout           The policy draws a group of images for each prompt, in few steps.
  group_advantages  A reward scores every image. Is it better than the others of its group?
  update            Better images become likelier, worse ones less likely. Clipping keeps an update
                    small. A penalty, the KL divergence, holds the model near its start.
  evaluate          The ODE draws again, in more steps. These images are the result.

Symbols
  t, s   time: 1 is noise, 0 is data. A step goes from t down to s. (diffusers says `sigmas`.)
  x      latents at time t: x = (1-t) data + t noise
  v      velocity, v = noise - data: what the network predicts
  sigma  noise_level * sqrt(t/(1-t)): how strong the SDE's noise is. noise_level is the paper's a
  T, K   how many steps a drawing has, and how many of them are SDE steps
  B      how many images a tensor has. Square brackets are shapes: [B, ...]

PAPER/CODE marks where the paper and its official code (github.com/yifan123/flow_grpo) differ.
Mostly we follow the code: the published learning rate, clip range and beta were made for it.
Chapters 1 to 4 are the method, 5 drives diffusers' models, 6 to 8 are options, files and pictures.
The toy, an SD3 pipeline of 5 MB for 48 x 48 pixels, is in toy/. rewards.py has the rewards.

  python flow_grpo.py --reward ocr                           # teach the toy to write
  python flow_grpo.py --reward flow_grpo.py:redness          # your own reward is a function
  python flow_grpo.py --preset sd3.5-medium-fast --dataset FOLDER           # on a GPU
  accelerate launch flow_grpo.py --preset sd3.5-medium --dataset FOLDER     # on all GPUs
"""
import argparse
import inspect
import io
import json
import math
import os
import random
import re
import signal
import textwrap
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # for onnxruntime, which diffusers imports

import diffusers
import numpy as np
import peft
import safetensors.torch
import torch
import transformers
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather, gather_object, reduce
from matplotlib.figure import Figure
from PIL import Image, ImageDraw
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from tqdm import tqdm

import rewards

# ------------------------------------------------------------------------------ 1. the mathematics
# Pure functions, in float32 whatever the network computes in: the ratio of new to old probability
# is the exponential of a tiny difference, and half precision would leave nothing of it.
#
# As x = (1-t) * data + t * noise = data + t * v, the network's v gives a best guess of both:
#     data = x - t * v,   noise = x + (1-t) * v
# A step mixes them anew for the time s:
#     x_next = (1-s) * data + keep * noise + std * fresh_noise
#
#     ODE, a = 0   std = 0                  keep = s                  the Euler step x + v * (s-t)
#     flow SDE     std = sigma * sqrt(t-s)  keep = s - std^2 / (2t)   equation 9
#     CPS          std = s * sin(a * pi/2)  keep = sqrt(s^2 - std^2)  arXiv 2509.05952
#
# Why does the SDE keep the marginal, the distribution of x at one time? Fresh noise adds std^2 to
# the variance of x. Dropping d * noise, a small part of the old noise, lowers it by
# 2 * d * cov(x, noise). This covariance is t, for the real noise and for the best guess of it. So
# d = std^2 / (2t) makes both equal, for small steps and any sigma: equation 9 (and appendix A).
#
# CPS never leaves noise behind, however large the steps: independent noises of sizes keep and std
# are like one of size s if keep^2 + std^2 = s^2. But the old noise is a guess, and a guess is
# smaller than real noise. So CPS makes x a little too narrow.


class Steps(NamedTuple):
    """The T steps of a drawing. Each field is [T]."""
    t: torch.Tensor       # the time before the step
    s: torch.Tensor       # the time after it
    keep: torch.Tensor    # how much of the old noise stays
    std: torch.Tensor     # how much fresh noise is added
    kl_std: torch.Tensor  # what the KL divides by: sigma, or for CPS std

    def at(self, i):
        """Step number i [1, 1, 1, 1], or with i [B] a step for each image [B, 1, 1, 1]"""
        return Steps(*(field[i].view(-1, 1, 1, 1) for field in self))


def sde_steps(times, noise_level, sde="flow"):
    """The time grid [T+1], from 1 down to 0 -> Steps

    sigma is large near t = 1, where nothing is decided yet and there is much to explore. It falls
    to 0 at t = 0, where there is hardly any old noise to drop, and fresh noise would stay visible.
    """
    t, s = times[:-1], times[1:]
    if sde == "cps":
        std = s * math.sin(noise_level * math.pi / 2)
        keep = torch.sqrt(s**2 - std**2)
        return Steps(t, s, keep, std, kl_std=std)
    # At t = 1 sigma would be infinite. The official code divides by 1-s there: the first std is
    # noise_level. That is no small step: with T = 10 the first two leave 4 to 9 % too much noise.
    below_one = torch.where(t == 1, s[0], t)
    sigma = noise_level * torch.sqrt(t / (1 - below_one))
    std = sigma * torch.sqrt(t - s)
    keep = s - std**2 / (2 * t)
    return Steps(t, s, keep, std, kl_std=sigma)


def sde_mean(x, v, step):
    """Where a step goes on average. x, v: [B, C, H, W] -> [B, C, H, W]

    With the flow SDE's keep this is the mean of equation 9, as the paper prints it:
        x + [v + sigma^2 / (2t) * (x + (1-t) * v)] * (s-t)
    What is added to v there, times s-t < 0, is a step to likelier x, along the gradient of log p(x)
    of the marginal p: -noise/t (equation 27). It narrows x as much as the fresh noise widens it.
    """
    x, v = x.float(), v.float()
    data = x - step.t * v
    noise = x + (1 - step.t) * v
    return (1 - step.s) * data + step.keep * noise


def sde_step(x, v, step, noise=None, x_next=None):
    """One step of the policy -> x_next [B, C, H, W], its log_prob [B], the mean [B, C, H, W]

    Draws x_next = mean + std * noise with standard normal noise, or rates a given x_next. So old
    and new log-probabilities come from the same lines. The gradient of log_prob pulls the mean
    towards the noise that the image happened to draw. If the image was good, the mean moves there;
    if it was bad, away. So the model learns to do by itself what helped by chance.
    """
    mean = sde_mean(x, v, step)
    if x_next is None:
        x_next = mean + step.std * noise
    distance = (x_next - mean) / step.std
    normalizer = torch.log(step.std) + math.log(2 * math.pi) / 2
    log_density = -0.5 * distance**2 - normalizer
    # PAPER/CODE: a log-density is a sum over all D dimensions; the code averages. So our ratio is
    # the D-th root of the true one. At ratio 1 its gradient has the same direction: the first
    # update is a true policy gradient. Later, the true ratio would correct for images of an older
    # policy. The root does not: it only tells how far the policy has moved. Clipping needs no more.
    # With D = 10^5, a root of 1.001 is a true ratio of e^100: so clip ranges are small. (For CPS
    # the code also leaves out 1 / (2 * std^2), which is 0.55 / s^2 at a = 0.8. We keep it. In late
    # steps it is huge, and these would outweigh all others: CPS wants an early window.)
    log_prob = log_density.flatten(1).mean(1)
    return x_next, log_prob, mean


def gaussian_kl(mean, mean_ref, kl_std):
    """KL between two steps that differ in their means only. [B, C, H, W] -> [B]

    A reward is only a stand-in for what we want. Far from the base model there are images that it
    likes and nobody else does: reward hacking. The KL makes that distance cost something.

    PAPER/CODE: the paper divides by the variance, sigma^2 (t-s). The code leaves (t-s) out, and
    averages over the dimensions. That only changes the weights of the steps and the scale of beta:
    the published 0.04 belongs to the code's form. (With (t-s) the authors used 0.004.)
    """
    kl = (mean - mean_ref) ** 2 / (2 * kl_std**2)
    return kl.flatten(1).mean(1)


def group_advantages(scores, std_over="batch"):
    """How much better each image is than its group (equation 4). scores: [groups, group_size]

    Some prompts are easy and some are hard. PPO learns a second network, the critic, to know what
    reward to expect. Here the mean of the group, same prompt and same policy, estimates it.

    PAPER/CODE: the paper divides by the group's std. The code divides by the whole batch's, so that
    a group of nearly equal rewards is not blown up. 1e-4 and the clamp are from the code, too.
    """
    scores = scores.float().double()  # sums are exact: in a group of equal scores `better` is 0
    dims = (0, 1) if std_over == "batch" else 1
    std = scores.std(dims, unbiased=False, keepdim=True)
    better = scores - scores.mean(1, keepdim=True)
    return (better / (std + 1e-4)).clamp(-5, 5).float()


def clipped_loss(ratio, advantages, clip_range):
    """The negative of the policy's part of equation 5, to be minimised. All are [B].

    Equation 5 wants the mean of this, over images and steps, to be large:
        min(ratio * advantage, clip(ratio) * advantage) - beta * KL
    ratio: how much likelier a step is than when it was drawn. In an epoch's first update it is 1,
    and the gradient is that of log_prob * advantage: a plain policy gradient. Later updates use
    images of an older policy, which say little about a policy far from it. Clipping keeps the new
    one near. Once the ratio is above the range with a good image, or below it with a bad one, min
    picks the constant: no gradient. On the other side nothing is clipped: a mistake can be undone.

    (Far from the old policy nearly all ratios are below 1: their logs have mean -KL/D. GRPO-Guard,
    arXiv 2510.22319, centres them. Flow-DPPO, 2606.11025, masks by this KL instead of clipping.)
    """
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.min(ratio * advantages, clipped * advantages)


# -------------------------------------------------------------------------------------- 2. rollout
# In the words of reinforcement learning: a state is (prompt, t, x), an action is x_next, an episode
# is one drawing from noise to image. The reward comes once, at the end. Nobody knows which of the
# steps deserves it, so each step of an image gets the image's advantage. On average that is right:
# what the other steps did is chance and cancels out. (Later methods, DiffusionNFT and AWM, need no
# SDE: they add noise to finished images and train on those.)
#
# The class Policy of chapter 5 is the network and what it takes to use it:
#     encode(prompts)            the condition, tensors [B, ...]: what the network is told
#     velocity(x, t, condition)  the network's v [B, C, H, W]
#     time_grid(T)               times [T+1]. SD3.5, T = 10: 1, 0.96, 0.91, ... 0.28, 0.009, 0
#     decode(x)                  latents -> B images
#     reference(), averaged()    contexts with other weights: the base model's, the moving average
#     optimize()                 one step of AdamW


@dataclass
class Rollout:
    images: list            # B PIL images, group after group
    condition: list         # the encoded prompts: tensors [B, ...]
    steps: Steps            # all T
    window: range           # the K of them that are SDE steps
    latents: torch.Tensor   # [B, K+1, C, H, W] before the first SDE step and after each
    log_prob: torch.Tensor  # [B, K]


def choose_window(config, rng):
    """Which steps are SDE steps. Only these are trained.

    PAPER/CODE: the paper trains all steps. The code leaves out the last, and so do we. With SD3 and
    the toy that step begins at t = 0.009 or 0.001: no reward sees noise that small. With FLUX it
    begins at 0.27 (T = 6): such noise would stay in the image. With CPS its std is 0. (The official
    train_sd3.py still adds this noise, untrained. train_sd3_fast.py takes an ODE step; so do we.)

    A short window, the authors' later Flow-GRPO-Fast, is enough: the first, noisy steps decide what
    an image shows, so noise there makes the rewards of a group differ most (results/ measures it).
    It saves work in the update: K steps of each image, not T-1. Drawing costs T passes as before.
    """
    if config.window == 0:
        return range(config.train_steps - 1)
    start = rng.randint(0, config.latest_start)
    return range(start, start + config.window)


def draw(policy, noise, prompts, condition, steps, window):
    """The first x and each SDE step's noise, [B, K+1, C, H, W] -> the last x, latents, log_prob"""
    x = noise[:, 0]
    latents = torch.empty_like(noise)
    log_prob = x.new_empty(len(x), len(window))
    for i in range(len(steps.t)):
        step = steps.at(i)
        v = policy.velocity(x, step.t, condition)
        if i in window:
            k = i - window.start
            latents[:, k] = x  # needed for k = 0 only
            x, log_prob[:, k], _ = sde_step(x, v, step, noise[:, k + 1])
            latents[:, k + 1] = x
        else:
            x = x + v * (step.s - step.t)  # the ODE
        check_finite(x, prompts, f"the latents after step {i}")
    return x, latents, log_prob


@torch.no_grad()
def rollout(policy, config, prompts, seeds, T, window=range(0), alike=1):
    """An image for each prompt and seed in T steps -> Rollout

    Denoising reduction: training draws with T = 10. Such images are worse than those of 40 steps.
    But an advantage only compares images of the same T, and for that they are good enough.
    What is learned holds for 40 steps, too: both follow the same v, at more or fewer places.
    """
    steps = sde_steps(policy.time_grid(T), config.noise_level, config.sde)
    condition = policy.encode(prompts)
    shape = len(window) + 1, *policy.latent_shape
    noise = torch.stack(  # an image's noise depends on its seed only
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    noise[:, 0] = noise[::alike, 0].repeat_interleave(alike, 0)  # `alike` in a row begin the same
    images, paths = [], []
    for start in progress(range(0, len(seeds), config.batch_size), "sampling"):
        micro = slice(start, start + config.batch_size)
        x, *path = draw(policy, noise[micro].to(policy.device), prompts[micro],
                        [c[micro] for c in condition], steps, window)
        images += policy.decode(x)
        paths.append(path)
    latents, log_prob = [torch.cat(parts) for parts in zip(*paths)]
    return Rollout(images, condition, steps, window, latents, log_prob)


# --------------------------------------------------------------------------------------- 3. update
def update(policy, config, drawn, advantages, rng):
    """An epoch's optimizer steps, each on an equal part of every group's images -> metrics

    drawn and advantages [B] are of this process's groups. rng is the same on every process.
    PAPER/CODE: the code leaves out images whose advantage is 0. We keep them: their KL counts.
    """
    size, K = config.group_size, len(drawn.window)
    orders = my_part([rng.sample(range(size), size) for _ in range(config.groups)])
    first = size * torch.arange(len(orders))[:, None]  # each group's first image
    shuffled = first + torch.tensor(orders)  # [groups, group_size], numbers of images
    terms, norms = [], []
    for part in shuffled.chunk(config.updates, dim=1):
        pairs = torch.cartesian_prod(part.flatten(), torch.arange(K))  # each image at each SDE step
        count = len(pairs) * PROCESSES.num_processes  # optimize() sums the gradients of all
        for micro in progress(pairs.split(config.batch_size), "update"):
            policy_loss, kl, ratio = losses(policy, config, drawn, advantages, *micro.T)
            if not norms:  # in the first update
                check_ratio(ratio, config.clip_range)
            loss = policy_loss + config.beta * kl
            (loss.sum() / count).backward()  # equation 5: the mean over all images and steps
            terms.append(torch.stack([kl, ratio], 1).detach())
        norms.append(policy.optimize())
    kl, ratio = gather(torch.cat(terms)).unbind(1)  # of all processes
    moved = ratio - 1
    return dict(
        kl=kl.mean(),  # how far the policy is from the base model
        ratio_deviation=moved.abs().max(),  # 0 in the first update, so later ones show here
        clip_low=(moved < -config.clip_range).float().mean(),  # the share below the clip range
        clip_high=(moved > config.clip_range).float().mean(),  # the share above it
        grad_norm=np.mean(norms))


def losses(policy, config, drawn, advantages, i, k):
    """Equation 5's terms for the k-th SDE step of image i -> policy_loss, kl, ratio. All: [b]"""
    x = drawn.latents[i, k]
    x_next = drawn.latents[i, k + 1]
    log_prob_old = drawn.log_prob[i, k]
    step = drawn.steps.at(drawn.window.start + k)  # for each image its own: [b, 1, 1, 1]
    condition = [c[i] for c in drawn.condition]

    v = policy.velocity(x, step.t, condition)
    _, log_prob, mean = sde_step(x, v, step, x_next=x_next)
    ratio = torch.exp(log_prob - log_prob_old)
    policy_loss = clipped_loss(ratio, advantages[i].to(ratio.device), config.clip_range)

    with policy.reference(), torch.no_grad():
        v_ref = policy.velocity(x, step.t, condition)
    mean_ref = sde_mean(x, v_ref, step)
    kl = gaussian_kl(mean, mean_ref, step.kl_std)  # with beta 0 only logged: how far we are
    return policy_loss, kl, ratio


def check_ratio(ratio, clip_range):
    """Until the first optimizer step, the policy is the one that drew: each ratio must be 1."""
    off = (ratio - 1).abs().max().item()
    if off > min(1e-4, max(clip_range / 2, 1e-5)):  # up to 1e-5 it may be rounding
        stop(f"the ratio is off by {off:.2g} before the first update, where it must be 1: sampling "
             "and training differ (guidance, dropout, a changed rollout, or, with bf16, uneven "
             "micro-batches: let --batch_size divide the images of a process in one update)")


# ------------------------------------------------------------------------------------- 4. training
def redness(images, prompts, metadata):
    """A reward in two lines: how much more red than green or blue. Yours can be as simple."""
    means = [np.asarray(image).mean((0, 1)) / 255 for image in images]
    return [r - max(g, b) for r, g, b in means]


def train_epoch(policy, config, reward, train_set, epoch):
    """Sample, score, compare, update -> metrics. All randomness comes from (seed, epoch)."""
    rng = random.Random(f"{config.seed}/{epoch - 1}")  # random streams count from 0
    groups, size = config.groups, config.group_size
    repeats = math.ceil(groups / len(train_set))  # above 1 for a dataset smaller than an epoch
    chosen = rng.sample(train_set * repeats, groups)
    samples = [(*row, rng.getrandbits(60)) for row in chosen for _ in range(size)]  # with seeds
    window = choose_window(config, rng)

    prompts, metadata, seeds = zip(*my_part(samples))
    alike = size if config.same_noise else 1
    drawn = rollout(policy, config, prompts, seeds, config.train_steps, window, alike)
    scores, means = score(reward, drawn.images, prompts, metadata, "reward")
    total = compared = torch.tensor(scores["reward"]).view(groups, size)
    if config.combine == "gdpo":  # arXiv 2601.05242
        # Each reward is divided by its own spread, or the one that spreads most would decide most.
        compared = sum(
            weight * group_advantages(torch.tensor(scores[name]).view(groups, size), "group")
            for name, (_, weight) in reward.items())
    advantages = my_part(group_advantages(compared, config.std_over)).flatten()
    metrics = update(policy, config, drawn, advantages, rng)

    equal = compared.amax(1) == compared.amin(1)
    metrics["no_signal"] = equal.float().mean()  # the share of groups with equal scores
    metrics["group_std"] = total.std(1).mean()
    metrics["reward_std"] = total.std()
    return means | metrics


def evaluate(policy, config, reward, test_set, folder, epoch):
    """Draw the test prompts by the ODE, from the same seeds every time -> metrics

    SDE and ODE follow the same v. A change of v moves the mean of an SDE step and the ODE's step in
    the same direction. And as both have the same marginals, the ODE meets the x that v was trained
    on. Both are exact only for small steps and a perfect v: here we see how far they hold.

    The weights are a moving average: single updates wander, their average less so. Accuracy is the
    share of images whose first reward in --reward is 1, the most that OCR and GenEval give.
    """
    n = config.eval_per_prompt
    test_set = test_set[:config.eval_prompts or None]
    numbered = my_part(list(enumerate(test_set)))
    samples = [(*row, i * n + j) for i, row in numbered for j in range(n)]
    prompts, metadata, seeds = zip(*samples)
    with policy.averaged():
        images = rollout(policy, config, prompts, seeds, config.eval_steps).images
    scores, metrics = score(reward, images, prompts, metadata, "eval_reward")
    right = scores[next(iter(reward))] == 1
    metrics["eval_accuracy"] = right.mean()
    tags = np.repeat([row.get("tag", "") for _, row in test_set], n)  # GenEval's tasks
    for tag in sorted({*tags} - {""}):
        metrics[f"eval_accuracy/{tag}"] = right[tags == tag].mean()
    if n > 1:  # how far the pixels of a prompt's first and last image differ, from 0 to 1
        rms = [np.square(np.subtract(a, b, dtype=float)).mean() ** 0.5 / 255
               for a, b in zip(images[::n], images[n - 1::n])]
        metrics["eval_diversity"] = np.mean(gather_object(rms))
    draw_grid(images[::n], test_set, scores["reward"][::n], folder, epoch)
    return metrics


def train(config):
    """The whole run: train, evaluate now and then, write everything down. Epoch 0 is the base."""
    train_set, test_set = (load_prompts(config, split) for split in ("train", "test"))
    reward, watched = rewards.load_both(config, train_set + test_set)
    policy = load_policy(config, [prompt for prompt, _ in train_set + test_set])
    folder, rows, tracker = begin(config, policy)
    for epoch in range(len(rows), config.epochs + 1):
        clock, metrics = time.time(), {}
        if epoch > 0:
            # Once most groups have equal rewards, only the KL has a gradient. It is small, but Adam
            # rescales what is small: at a constant rate the toy can walk back towards the base.
            left = 1 - (epoch - 1) / config.epochs if config.lr_decay else 1
            policy.optimizer.param_groups[0]["lr"] = config.learning_rate * left
            metrics |= train_epoch(policy, config, reward, train_set, epoch)
        if epoch % config.eval_every == 0 or epoch == config.epochs:
            metrics |= evaluate(policy, config, watched, test_set, folder, epoch)
        metrics["seconds"] = time.time() - clock
        rows.append({"epoch": epoch} | {key: float(metrics[key]) for key in metrics})
        record(policy, folder, rows, tracker)
    for key in ("eval_reward", "eval_accuracy"):  # what was gained
        values = [row[key] for row in rows if key in row]
        if any(values):  # no PickScore is 1: then there is no accuracy
            PROCESSES.print(f"{key} {values[0]:.3f} -> {values[-1]:.3f}")
    tracker.end_training()


# ---------------------------------------------------------------------------------- 5. the network
class Policy:
    """A pipeline of SD3's family, as is the toy, with a LoRA, its average and its optimizer"""

    lora_layers = (  # the official code's: joint attention, for the image's tokens and the text's
        "attn.to_q attn.to_k attn.to_v attn.to_out.0 "
        "attn.add_q_proj attn.add_k_proj attn.add_v_proj attn.to_add_out").split()

    def __init__(self, pipe, config):
        self.pipe, self.config, self.device = pipe, config, PROCESSES.device
        self.encoders = torch.nn.ModuleList(
            part for name, part in pipe.components.items() if "text_encoder" in name and part)
        pipe.vae.to(self.device)
        if config.gradient_checkpointing:
            pipe.transformer.enable_gradient_checkpointing()
        torch.manual_seed(config.seed)  # for the LoRA's first values
        lora = peft.LoraConfig(
            r=config.lora_rank, lora_alpha=2 * config.lora_rank, init_lora_weights="gaussian",
            target_modules=self.lora_layers)
        # peft keeps the LoRA in float32: bf16 would round small steps away.
        self.network = peft.get_peft_model(pipe.transformer.to(self.device), lora)
        self.reference = self.network.disable_adapter  # the model that training began with
        self.params = [p for p in self.network.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.params, config.learning_rate, eps=config.adam_eps, weight_decay=1e-4)
        self.average = parameters_to_vector(self.params).detach()  # of the params, in one row
        self.empty = self.encode([""])  # for guidance
        side = config.resolution // pipe.vae_scale_factor
        self.latent_shape = pipe.vae.config.latent_channels, side, side

    def velocity(self, x, t, condition):
        """The network's v in float32. x: [B, C, H, W], t: one time, or one for each image

        Classifier-free guidance makes one velocity of two, and so one Gaussian: that is the policy.
        Sampling and training must share it, or the ratio would compare two policies.
        """
        v = self.predict(x, t, condition)
        if self.config.guidance != 1:
            v_empty = self.predict(x, t, self.empty)  # the gradient flows through both
            v = v_empty + self.config.guidance * (v - v_empty)
        return v

    def predict(self, x, t, condition):
        """The same without guidance. condition: a row for each image, or one for all"""
        t = t.flatten().expand(len(x))
        condition = [c.to(self.device).expand(len(x), *c.shape[1:]) for c in condition]
        with torch.autocast(x.device.type, torch.bfloat16, self.config.precision == "bf16"):
            return self.forward(x.to(self.network.dtype), t, *condition).float()

    def forward(self, x, t, embeds, pooled):
        return self.network(
            hidden_states=x, timestep=1000 * t, encoder_hidden_states=embeds,
            pooled_projections=pooled).sample

    @torch.no_grad()
    def encode(self, prompts):
        """Prompts -> their condition: embeds [B, L, D] and pooled [B, P], in the CPU's memory"""
        if self.config.offload:
            self.network.cpu()
        self.encoders.to(self.device)
        unique = [*dict.fromkeys(prompts)]  # the images of a group have the same prompt
        options = dict(device=self.device, max_sequence_length=self.config.max_sequence_length)
        size = self.config.batch_size
        parts = [[c.cpu() for c in self.ask_encoders(unique[i:i + size], **options)]
                 for i in range(0, len(unique), size)]
        if self.config.offload:
            self.encoders.cpu()
            self.network.to(self.device)
        return [torch.cat(part)[[unique.index(p) for p in prompts]] for part in zip(*parts)]

    def ask_encoders(self, prompts, **options):
        return self.pipe.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, **options)[::2]

    def time_grid(self, T, **options):
        """The scheduler's times [T+1], from 1 down to 0"""
        self.pipe.scheduler.set_timesteps(T, device=self.device, **options)
        return self.pipe.scheduler.sigmas.float()

    @torch.no_grad()
    def decode(self, latents):
        """Latents [B, C, H, W] -> PIL images"""
        vae = self.pipe.vae
        latents = latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0)
        return self.pipe.image_processor.postprocess(vae.decode(latents).sample)

    @contextmanager
    def averaged(self):
        """Inside this context, the weights are their average."""
        own = parameters_to_vector(self.params)
        vector_to_parameters(self.average, self.params)
        yield
        vector_to_parameters(own, self.params)

    def optimize(self):
        """One optimizer step with the gradients of all processes -> their norm before clipping"""
        for p in self.params:
            p.grad = reduce(p.grad, "sum")
        norm = clip_grad_norm_(self.params, 1.0)
        if not norm.isfinite():
            raise FloatingPointError("the gradients are not finite: lower --learning_rate")
        eps, rms = self.config.adam_eps, norm / math.sqrt(len(self.average))
        if not self.optimizer.state and 0 < rms < 10 * eps:
            PROCESSES.print(f"gradients of {rms:.0e} are lost in --adam_eps {eps:.0e}: try 1e-15")
        self.optimizer.step()
        self.optimizer.zero_grad()
        n = self.optimizer.state[self.params[0]]["step"].item()  # updates so far
        if n % self.config.ema_every == 0 or self.config.ema_decay == 0:
            # The decay grows, so that the average does not stick to the start (official ema.py).
            decay = min(self.config.ema_decay, (1 + n) / (10 + n))
            self.average.lerp_(parameters_to_vector(self.params).detach(), 1 - decay)
        return norm.item()


class FluxPolicy(Policy):
    """FLUX packs its latents, tells the network their places, and has learned to guide itself."""

    lora_layers = Policy.lora_layers + (
        "ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2").split()
    velocity = Policy.predict  # without the empty prompt

    def forward(self, x, t, embeds, pooled):
        packed = torch.pixel_unshuffle(x, 2)  # [B, 4C, H/2, W/2]
        B, _, H, W = packed.shape
        learned = self.network.config.guidance_embeds  # not by FLUX.1-schnell
        v = self.network(
            hidden_states=packed.flatten(2).mT,  # [B, H/2 * W/2, 4C]
            img_ids=self.pipe._prepare_latent_image_ids(B, H, W, x.device, x.dtype),
            txt_ids=x.new_zeros(embeds.shape[1], 3),
            guidance=x.new_full([B], self.config.guidance) if learned else None,
            timestep=t, encoder_hidden_states=embeds, pooled_projections=pooled).sample
        return torch.pixel_shuffle(v.mT.unflatten(2, (H, W)), 2)

    def ask_encoders(self, prompts, **options):
        return self.pipe.encode_prompt(prompts, None, **options)[:2]

    def time_grid(self, T):
        """The more tokens an image has, the denser near 1"""
        tokens = (self.latent_shape[1] // 2) ** 2
        mu = diffusers.pipelines.flux.pipeline_flux.calculate_shift(tokens)
        return super().time_grid(T, sigmas=np.linspace(1, 1 / T, T), mu=mu)


class SanaPolicy(Policy):
    """SANA masks its text's padding, has no pooled embedding, and puts an instruction before."""

    lora_layers = "to_q to_k to_v to_out.0".split()  # of attn1, and of attn2 for the text

    def __init__(self, pipe, config):
        # Its own scheduler, DPM-Solver, looks back at earlier steps. A policy may not.
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        super().__init__(pipe, config)

    def forward(self, x, t, embeds, mask):
        return self.network(
            hidden_states=x, timestep=1000 * self.network.config.timestep_scale * t,
            encoder_hidden_states=embeds, encoder_attention_mask=mask).sample

    def ask_encoders(self, prompts, **options):
        defaults = inspect.signature(self.pipe.__call__).parameters
        instruction = defaults["complex_human_instruction"].default if any(prompts) else None
        return self.pipe.encode_prompt(
            prompts, False, complex_human_instruction=instruction, **options)[:2]


def load_policy(config, prompts=()):
    """The pipeline of --model -> the Policy of its family"""
    rewards.quiet(diffusers, transformers)  # they warn of the toy's unusual VAE
    kinds = dict(StableDiffusion3Pipeline=Policy, FluxPipeline=FluxPolicy, SanaPipeline=SanaPolicy)
    source = rewards.TOY if config.model == "toy" else config.model
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    try:  # the VAE stays float32: a reward would see its rounding
        pipe = diffusers.DiffusionPipeline.from_pretrained(
            source, dtype={"vae": torch.float32, "default": dtype})
        policy = kinds[type(pipe).__name__](pipe, config)
        policy.time_grid(config.train_steps)
    except Exception as error:  # whatever a wrong or damaged folder makes diffusers raise
        stop(f"--model {config.model}: {type(error).__name__}: {error}. It must be one of "
             f"{', '.join(kinds)}, with its own scheduler; is the name right, the licence "
             "accepted, the hub reachable, the memory enough (--offload)?")
    token = 2 * pipe.vae_scale_factor  # in pixels
    most = token * policy.network.config.get("pos_embed_max_size", 2**20)
    if config.resolution not in range(token, most + 1, token):
        stop(f"--resolution {config.resolution}: must be a multiple of {token}, at most {most}")
    tokenizer = [part for name, part in pipe.components.items() if "tokenizer" in name and part][-1]
    unknown = [p for p in prompts if tokenizer.unk_token_id in tokenizer(p).input_ids]
    if unknown:
        PROCESSES.print(f"{len(unknown)} prompts have an unknown word, such as {unknown[0]!r}")
    return policy


# -------------------------------------------------------------------------------------- 6. options
@dataclass
class Config:
    preset: str = ""                   # one of PRESETS; default: that of the reward, if it has one
    reward: str = "ocr"                # of rewards.py, "file.py:function", or "ocr:1,pickscore:0.5"
    eval_reward: str = ""              # the same, but only measured: they show reward hacking
    model: str = "toy"                 # folder or hub name of an SD3, FLUX or SANA pipeline
    dataset: str = ""                  # folder of prompts; default: the toy's words or scenes
    resolution: int = 48               # height and width of the images in pixels
    max_sequence_length: int = 14      # tokens of the T5 encoder, or of SANA's Gemma
    precision: str = "fp32"            # of the network: fp32, or bf16 for half the memory
    gradient_checkpointing: bool = False  # less memory, slower updates
    offload: bool = False              # text encoders and network take turns on the GPU
    name: str = ""                     # folder under runs/; default: the reward's name, numbered
    resume: str = ""                   # a run's folder, to go on with its own options
    report_to: str = ""                # also log to tensorboard, wandb, trackio, swanlab, ...
    seed: int = 0                      # of everything random: on a CPU, same seed, same run
    epochs: int = 6                    # an epoch: sample, score, update. 0 only evaluates
    eval_every: int = 3                # epochs between evaluations
    groups: int = 16                   # prompts an epoch; more: a gradient with less noise
    group_size: int = 8                # images of each prompt; in the paper 6 and 12 collapsed
    train_steps: int = 10              # T of training: enough to tell good from bad
    eval_steps: int = 40               # T of the evaluation
    noise_level: float = 0.7           # a: too little explores nothing, too much spoils the images
    window: int = 1                    # SDE steps, and only they are trained. 0: all but the last
    latest_start: int = 0              # the window begins at a random step from 0 to this
    same_noise: bool = True            # one first noise a group: faster here, worse in the paper
    sde: str = "flow"                  # flow, the paper's, or cps, which leaves no noise in images
    guidance: float = 1.0              # classifier-free. 1 is off. FLUX: its distilled guidance
    updates: int = 2                   # optimizer steps an epoch; clipping acts from the second on
    learning_rate: float = 3e-3        # of AdamW
    lr_decay: bool = True              # it falls evenly; with the next epoch it would be 0
    adam_eps: float = 1e-8             # must be far below the gradients of one weight
    clip_range: float = 1e-3           # how far a ratio may leave 1: less clips more, learns less
    beta: float = 0.5                  # weight of the KL: more keeps quality and slows the reward
    std_over: str = "batch"            # whose std divides the advantages: batch or group
    combine: str = "sum"               # several rewards: their weighted sum, or gdpo
    lora_rank: int = 32                # size of what is trained. Its alpha is twice the rank
    ema_decay: float = 0.9             # of the averaged weights that are evaluated. 0 is off
    ema_every: int = 1                 # updates between averagings
    batch_size: int = 64               # samples in a forward pass: memory and speed only
    eval_prompts: int = 60             # so many prompts of the test file. 0: all
    eval_per_prompt: int = 2           # images of each, always from the same seeds


# The paper's setting: section 5.1 and, for guidance, learning rate, clip range and EMA, the code,
# which trains in fp16. Its beta is 0.04 for GenEval and OCR; for PickScore it is 0.01.
PAPER = dict(
    model="stabilityai/stable-diffusion-3.5-medium", resolution=512, max_sequence_length=128,
    precision="bf16", epochs=1000, eval_every=60, groups=48, group_size=24, window=0,
    same_noise=False, guidance=4.5, learning_rate=3e-4, lr_decay=False, clip_range=1e-4, beta=0.04,
    ema_every=8, batch_size=8, eval_prompts=0, eval_per_prompt=1)
# For one GPU of 24 GB (an estimate). From verl-omni's 159 and 178; adam_eps is UniRL's (407).
FAST = PAPER | dict(
    resolution=384, epochs=100, eval_every=10, groups=8, group_size=8, eval_steps=28, window=3,
    latest_start=2, sde="cps", noise_level=0.8, guidance=1.0, clip_range=1e-5, beta=0.0,
    adam_eps=1e-15, gradient_checkpointing=True, offload=True, eval_prompts=64)
PRESETS = {
    # The toy: for OCR the defaults above; these two rewards take longer.
    "geneval": dict(reward="geneval", group_size=16, epochs=36, eval_every=12, window=2,
                    learning_rate=1.5e-3, lr_decay=False, beta=0.1),
    "toy_pickscore": dict(reward="toy_pickscore", groups=8, group_size=16, epochs=24, eval_every=12,
                          window=2, learning_rate=2e-3, beta=0.1),
    "sd3.5-medium": PAPER,
    "sd3.5-medium-fast": FAST,
    "sana-0.6b": FAST | dict(  # 8 GB; nobody has reported a run with these numbers
        model="Efficient-Large-Model/Sana_600M_512px_diffusers", resolution=512,
        max_sequence_length=300, batch_size=4),
    "flux.1-dev": PAPER | dict(  # the official pickscore_flux; the paper's appendix has only scores
        model="black-forest-labs/FLUX.1-dev", reward="pickscore", eval_every=30, train_steps=6,
        eval_steps=28, guidance=3.5, noise_level=0.9, beta=0.0, lora_rank=64, batch_size=4,
        gradient_checkpointing=True),
}
MAY_BE_0 = "seed epochs window latest_start beta ema_decay eval_prompts".split()
RANGES = [f"0 {'<=' if f.name in MAY_BE_0 else '<'} {f.name} < 2**31"
          for f in fields(Config) if f.type in (int, float)]
RULES = RANGES + [
    f"preset in {['', *PRESETS]}", "report_to in pip_installed",
    "precision in ['fp32', 'bf16']", "sde in ['flow', 'cps']", "std_over in ['batch', 'group']",
    "combine in ['sum', 'gdpo']", "train_steps >= 2", "group_size >= 2", "ema_decay < 1",
    "noise_level >= 1e-3", "adam_eps >= 1e-18", "max_sequence_length >= 2",
    "window + latest_start < train_steps", "sde == 'flow' or noise_level < 1",
    "group_size % updates == 0", "groups % processes == 0",
    "eval_prompts == 0 or eval_prompts >= processes"]
MAY_CHANGE = ("name resume report_to epochs eval_every eval_reward learning_rate batch_size "
              "gradient_checkpointing offload").split()  # on resuming


def parse_config(argv=None):
    """Config's defaults < the preset < the run to resume < the command line: the last one wins."""
    parser = argparse.ArgumentParser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.error = lambda message: stop(f"{message}; --help lists the options")
    parser.format_help = lambda: f"{__doc__}\n{inspect.getsource(Config)}"  # it explains them all
    for f in fields(Config):  # a bool has two: --offload and, against a preset, --no-offload
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type)
        parser.add_argument(f"--{f.name}", **kind)
    given = vars(parser.parse_args(argv))
    preset = PRESETS.get(given.get("preset", given.get("reward")), {})
    saved, resume = {}, given.get("resume")
    try:
        if resume:
            saved = json.loads(Path(resume, "config.json").read_text())
            if {name: type(saved[name]) for name in saved} != Config.__annotations__:
                raise ValueError("other options, or of other types")
    except Exception as error:  # whatever a damaged file makes these lines raise
        stop(f"--resume {resume}: has no config.json of a run of this version ({error})")
    for name in saved.keys() & given.keys() - MAY_CHANGE:
        if given[name] != saved[name]:
            stop(f"--{name} {given[name]}: the run to resume has {saved[name]}, which must stay")
    config = Config(**preset | saved | given)
    values = vars(config) | dict(
        processes=PROCESSES.num_processes, pip_installed=["", *map(str, get_available_trackers())])
    for rule in RULES:
        if not eval(rule, {}, values):
            broken = [f"{name} {values[name]!r}" for name in rule.split() if name in values]
            stop(f"--{', '.join(broken)}: {rule} must hold")
    return config


# ------------------------------------------------------------------------- 7. processes and files
# `accelerate launch` and torchrun start this script once for each GPU. Each process takes whole
# groups. Without cpu=..., torchrun on a CPU would silently make independent runs.
PROCESSES = PartialState(cpu=not torch.accelerator.is_available())
# disable=None: a bar on a terminal, nothing in a log file
progress = partial(tqdm, leave=False, disable=None if PROCESSES.is_main_process else True)


def my_part(items):
    """This process's part of a list or tensor. gather and gather_object are the inverse."""
    n, rank = PROCESSES.num_processes, PROCESSES.process_index
    return items[len(items) * rank // n:len(items) * (rank + 1) // n]


def stop(message):
    """Ends the run with one line and exit code 2, without a traceback."""
    argparse.ArgumentParser().exit(2, f"flow_grpo.py: {' '.join(message.split())}\n")


def load_prompts(config, split):
    """The dataset's prompts as [(prompt, metadata)], in either layout of the official repository"""
    task = "ocr" if "ocr" in re.split("[,:]", config.reward) else "geneval"
    folder, rows = Path(config.dataset or f"{rewards.TOY}/{task}"), []
    text, table = folder / f"{split}.txt", folder / f"{split}_metadata.jsonl"
    try:
        path = text if text.exists() else table
        for line in filter(str.strip, path.read_text("utf-8-sig").split("\n")):
            row = json.loads(line) if path == table else {"prompt": line}
            rows.append((row["prompt"].strip(), row))
    except Exception as error:  # whatever a wrong file makes these lines raise
        stop(f"--dataset {folder}: needs {text.name} in UTF-8, or {table.name} with a JSON object "
             f"with a prompt on each line (after {len(rows)} good ones: {error!r})")
    if len(rows) < PROCESSES.num_processes:
        stop(f"--dataset {folder}: needs a {split} prompt for each process")
    return rows


def begin(config, policy):
    """-> the run's folder, the metrics that it has already, and accelerate's tracker"""
    rows = load(policy, config.resume) if config.resume else []
    folder = Path(config.resume or gather_object([claim(config)])[0])
    config.resume = str(folder)  # so that main can say how to go on
    write(folder / "config.json", json.dumps(vars(config), indent=1).encode())
    save(policy, folder, rows)  # after config.json: a run with a checkpoint can be resumed
    PROCESSES.print(f"{folder}: {config.groups} groups x {config.group_size} images an epoch on "
                    f"{PROCESSES.num_processes} x {policy.device.type}", flush=True)
    tracker = Accelerator(log_with=config.report_to or None, project_dir=folder)
    tracker.init_trackers("flow_grpo", vars(config).copy())
    return folder, rows, tracker


@PROCESSES.on_main_process
def claim(config):
    """A folder that no other run has: runs/<name>, or the first free of ocr, ocr-2, ocr-3, ..."""
    name = config.name or re.sub(r"[^\w.-]+", "-", config.reward)
    for number in range(1, 2 if config.name else 10**6):  # a given name is tried once
        folder = Path("runs", name if number == 1 else f"{name}-{number}")
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
            return folder
    stop(f"--name {name}: {folder} exists; take another, or --resume {folder}")


@PROCESSES.on_main_process
def write(path, content):
    """Under another name first: a run that is killed here leaves the last good file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


def save(policy, folder, rows):
    """The averaged LoRA in diffusers' format, and everything that a later epoch depends on"""
    lora = {}
    with policy.averaged():
        for key, value in peft.get_peft_model_state_dict(policy.network).items():
            scale = 2 if "lora_B" in key else 1  # alpha / rank, which diffusers takes to be 1
            lora[key.replace("base_model.model", "transformer")] = scale * value
    write(folder / "pytorch_lora_weights.safetensors", safetensors.torch.save(lora))
    buffer = io.BytesIO()  # no generator's state: all that is random comes from (seed, epoch)
    torch.save(([*policy.params, policy.average], policy.optimizer.state_dict(), rows), buffer)
    write(folder / "checkpoint.pt", buffer.getvalue())


def load(policy, folder):
    """Puts a checkpoint back -> the metrics so far"""
    try:
        tensors, optimizer, rows = torch.load(
            f"{folder}/checkpoint.pt", map_location="cpu", weights_only=True)
        for own, saved in zip([*policy.params, policy.average], tensors, strict=True):
            own.data.copy_(saved)
        policy.optimizer.load_state_dict(optimizer)
        return rows
    except Exception as error:  # whatever a damaged file makes torch raise
        stop(f"--resume: {folder}/checkpoint.pt is missing, damaged or not of this run ({error})")


# ------------------------------------------------------------------------ 8. numbers and pictures
def check_finite(values, prompts, what):
    """Raises FloatingPointError for the first prompt with values that are not finite. [B, ...]"""
    for prompt, value in zip(prompts, values):
        if not value.isfinite().all():
            raise FloatingPointError(f"{what} of {prompt!r} are not finite: lower --learning_rate")


def score(reward, images, prompts, metadata, key):
    """All processes' images -> {name: [B], ..., "reward": their weighted sum}, and their means"""
    scores = rewards.score(reward, images, prompts, metadata)
    scores = {name: np.array(gather_object(values)) for name, values in scores.items()}
    means = {f"{key}/{name}".removesuffix("/reward"): scores[name].mean() for name in scores}
    return scores, means


def draw_grid(images, rows, scores, folder, epoch):
    """The first 32 images, each under its prompt and score -> samples/<epoch>.png"""
    images = gather_object(images[:32])[:32]
    sheet = Image.new("RGB", (1200, 40 + 200 * math.ceil(len(images) / 8)), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((8, 4), f"after {epoch} epoch{'s' * (epoch != 1)}", "black", font_size=24)
    for n, (image, (prompt, _), value) in enumerate(zip(images, rows, scores)):
        x, y = n % 8 * 150 + 8, n // 8 * 200 + 38
        pen.text((x, y), textwrap.fill(f"{value:.2f}: {prompt[:60]}", 22), "black", font_size=12)
        sheet.paste(image.resize((140, 140)), (x, y + 48))
    if PROCESSES.is_main_process:
        (folder / "samples").mkdir(exist_ok=True)
        sheet.save(folder / f"samples/{epoch:04d}.png")


@PROCESSES.on_main_process
def record(policy, folder, rows, tracker):
    """After an epoch: a line, the metrics, after an evaluation the pictures, and a checkpoint"""
    row = rows[-1]
    tracker.log(row, step=row["epoch"])
    write(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    shown = "epoch reward eval_reward eval_accuracy kl clip_low clip_high grad_norm seconds".split()
    print(*(f"{key} {row[key]:.4g}" for key in shown if key in row), sep=", ", flush=True)
    if "eval_reward" in row:
        frames = [Image.open(path).copy() for path in sorted(folder.glob("samples/*.png"))]
        Image.fromarray(np.vstack([frames[0], frames[-1]])).save(folder / "before_after.png")
        palette = Image.fromarray(np.vstack(frames)).quantize()  # one for all, or colours jump
        first, *others = [frame.quantize(palette=palette, dither=0) for frame in frames]
        first.save(folder / "film.gif", save_all=True, append_images=others, duration=1000, loop=0)
        axes = Figure().subplots()
        for key in sorted({"reward", "eval_reward", "eval_accuracy"} & row.keys()):
            axes.plot(*zip(*[(r["epoch"], r[key]) for r in rows if key in r]), "o-", label=key)
        axes.set_xlabel("epoch")
        axes.legend()
        axes.figure.savefig(folder / "curve.png")
    save(policy, folder, rows)  # last: an epoch in the checkpoint has all its other files


def main(argv=None):
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's Ctrl-C
    config = parse_config(argv)
    try:
        return train(config)
    except torch.OutOfMemoryError:
        problem = "out of GPU memory: lower --batch_size, add --gradient_checkpointing, --offload"
    except (KeyboardInterrupt, FloatingPointError, rewards.RewardError, OSError) as error:
        problem = str(error) or "interrupted"
    if config.resume and Path(config.resume, "checkpoint.pt").exists():
        problem += f"; --resume {config.resume} goes on after the last whole epoch"
    stop(problem)


if __name__ == "__main__":
    main()
