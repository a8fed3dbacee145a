"""Flow-GRPO in one file: reinforcement learning for flow-matching image models (arXiv 2505.05470).

A flow-matching model such as Stable Diffusion 3.5 turns noise into an image by solving an ordinary
differential equation (ODE). After the first noise, nothing is random. But reinforcement learning
needs random choices: it tries some, and makes the ones that turned out well more likely. So
Flow-GRPO trains with random steps, and later samples without the randomness:

  sde_step          One denoising step, made random: some of the noise in x is replaced by fresh
                    noise. So x_next comes from a Gaussian whose density is known, and this Gaussian
                    is the policy. With the paper's SDE and small steps, the images have nearly the
                    same distribution as with the ODE.
  rollout           Samples a group of images for each prompt, in 10 steps instead of 40.
  group_advantages  Compares the reward of each image with the rewards of its own group.
  update            Makes the steps behind the better images more likely and the others less, with
                    PPO's clipping. A KL penalty can keep the model close to where it started.
  evaluate          Samples with the ODE again, in 40 steps.

Notation
  t, s    time, from 1 (noise) to 0 (data). A step goes from t down to s.
  x       the latent at time t: x = (1-t) * data + t * noise
  v       the velocity: the network's estimate of noise - data
  a       how random the sampler is, the option noise_level
  sigma   a * sqrt(t / (1-t)), the strength of the SDE's noise. (What diffusers calls `sigmas` is
          our t.)
  T, K    how many denoising steps there are, and how many of them are random (SDE steps)
  i, k    the index of a denoising step, from 0 to T-1, and of an SDE step, from 0 to K-1
  B       the number of images in a tensor. Shapes are written in brackets: [B, C, H, W].
  D       C * H * W, the number of dimensions of a latent

PAPER/CODE marks where the paper, the official code (github.com/yifan123/flow_grpo) and this file
differ. We mostly follow the code, because the published learning rate, clip range and beta (the
weight of the KL penalty) were tuned with it.

Chapters 1 to 4 are the method. Chapter 5 drives the diffusers models, 6 has the options, 7 the
files and pictures. The default model is a toy, an SD3 pipeline of 5 MB (toy/). Its options differ
from the paper's: only one or two steps are random, and trained.

  python flow_grpo.py --reward ocr                     # teach the toy to write: 2 minutes on a CPU
  python flow_grpo.py --reward my_rewards.py:red       # your own reward, see `redness` and README
  python flow_grpo.py --resume runs/ocr                # go on after a stop
  python flow_grpo.py --preset sd3.5-medium-fast --reward ocr --dataset FOLDER        # on one GPU
  accelerate launch flow_grpo.py --preset sd3.5-medium --reward ocr --dataset FOLDER  # on all GPUs
"""
import inspect
import json
import math
import os
import random
import re
import sys
import textwrap
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # for onnxruntime, which diffusers imports
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep instead of spinning

import diffusers
import numpy as np
import peft
import torch
import transformers
import tyro
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list, gather, gather_object, reduce
from diffusers.utils.torch_utils import randn_tensor
from matplotlib.figure import Figure
from PIL import Image
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from tqdm import tqdm

import rewards  # the prompts and the rewards

# `accelerate launch` starts this script once for each GPU, plain `python` starts it once. Without
# a GPU, cpu=True is needed for several processes.
WORLD = PartialState(cpu=not torch.accelerator.is_available())
# With torch 2.11 on an H200, cuDNN's attention produced gradients that were not finite (in a FLUX
# with random weights).
torch.backends.cuda.enable_cudnn_sdp(False)
for library in (diffusers, transformers):  # no warnings, no progress bars
    library.utils.logging.set_verbosity_error()
    library.utils.logging.disable_progress_bar()

# ------------------------------------------------------------------------------ 1. the mathematics
# This chapter computes in float32 or better, even if the network runs in bf16: the update compares
# nearly equal probabilities, and bf16 would round their ratio to exactly 1.
#
# Many pairs of data and noise give the same x. The best v that the network can predict, the one
# with the least squared error, is the average of noise - data over these pairs. From x and v we get
# estimates of the data and the noise:
#
#     data_guess = x - t * v          noise_guess = x + (1-t) * v
#
# A step mixes these two again, with less noise, for the next time s. A random step keeps less of
# noise_guess than the ODE does, and puts fresh noise in its place:
#
#     x_next = (1-s) * data_guess + keep * noise_guess + std * fresh_noise
#
# The samplers differ only in std and keep:
#
#     ODE          std = 0                  keep = s                  the Euler step x + v * (s-t)
#     flow SDE     std = sigma * sqrt(t-s)  keep = s - std^2 / (2t)   equation 9 of the paper
#     CPS          std = s * sin(a * pi/2)  keep = sqrt(s^2 - std^2)  arXiv 2509.05952
#
# If v is the best one and steps are small, equation 9 gives x the same distribution as the ODE, at
# every time and whatever sigma is. (Appendix A of the paper proves it. If you trust that, go on at
# "In practice".) Let p be the density of x. A step of equation 9 does two things that the ODE's
# step does not, and by the Fokker-Planck equation their effects on p cancel if the step is small:
#
#   1. It adds fresh noise. This blurs p, as heat spreads: p changes by std^2 / 2 * laplacian(p).
#   2. It keeps less of noise_guess, which moves x by m = -std^2 / (2t) * noise_guess. This sharpens
#      p, because m leads to where x is more likely. By Tweedie's formula (equation 27 of the paper)
#      noise_guess is -t * grad(log p), so
#
#          m     = -std^2 / (2t) * (-t * grad(log p)) = std^2 / 2 * grad(log p)
#          p * m = std^2 / 2 * grad(p)            because p * grad(log p) = grad(p)
#
#      A move m changes p by -div(p * m), here by -std^2 / 2 * laplacian(p).
#
# In practice the images of the SDE are distributed only roughly like those of the ODE:
#
#   - The v of a network is only roughly the best one. With guidance, or after training towards a
#     reward, it is not even meant to be.
#   - At t = 1 sigma would be infinite. Like the official code, we take 1-s instead of 1-t there.
#     Then std = sigma * sqrt(1-s) = a: the first step adds noise of std a, however short it is.
#     This leaves a bit too much noise in x. At t = 1 noise_guess is x itself, with the variance 1.
#     So if s is near 1, the noise in x_next has the variance
#     keep^2 + std^2 = (1 - a^2 / 2)^2 + a^2 = 1 + a^4 / 4 instead of 1.
#   - Ten steps are not small, and leave too much noise in x. `choose_window` has the worst example.
#
# CPS (coefficients-preserving sampling) has the opposite error. If noise_guess had the variance 1,
# the noise in x would have the variance keep^2 + std^2 = s^2, as it should. But noise_guess is an
# average and varies less. So x_next varies too little: after a short step, the variance that is
# missing is (s - keep)^2 * (1 - variance of noise_guess). (data_guess and noise_guess are
# correlated. The formula includes this.) The images are clean, but vary less than they should.
# Smaller steps do not help, because std and keep depend on s alone: however short a step is, it
# replaces the same share of the noise. The paper's results are with the flow SDE, our default.


class Step(NamedTuple):
    """A step from t to s. Its tensors are [1, 1, 1, 1], or [B, 1, 1, 1] if times differ."""
    t: torch.Tensor
    s: torch.Tensor
    keep: torch.Tensor  # the factor of noise_guess
    std: torch.Tensor  # how much fresh noise is added
    kl_scale: torch.Tensor  # kl_penalty divides by it: sigma for the flow SDE, std for CPS


def make_step(times, i, noise_level, sde="flow"):
    """Step number i of the time grid [T+1] -> Step. i is a number, or a tensor [B] for B images."""
    t = times[i].view(-1, 1, 1, 1)
    s = times[i + 1].view(-1, 1, 1, 1)
    if sde == "cps":
        std = s * math.sin(noise_level * math.pi / 2)
        keep = torch.sqrt(s**2 - std**2)
        return Step(t, s, keep, std, kl_scale=std)
    one_minus_t = torch.where(t == 1, 1 - s, 1 - t)  # at the first time 1 - t is 0
    sigma = noise_level * torch.sqrt(t / one_minus_t)
    std = sigma * torch.sqrt(t - s)
    keep = s - std**2 / (2 * t)
    return Step(t, s, keep, std, kl_scale=sigma)


def sde_mean(x, v, step):
    """Where a step goes on average. x, v and the mean are [B, C, H, W].

    For the flow SDE this is the mean in equation 9, which the paper writes as
        x + [v + sigma^2 / (2t) * (x + (1-t) * v)] * (s-t)
    """
    data_guess = x - step.t * v
    noise_guess = x + (1 - step.t) * v
    return (1 - step.s) * data_guess + step.keep * noise_guess


def sde_step(x, v, step, fresh_noise):
    """One step of the policy. x, v and fresh_noise are [B, C, H, W] -> x_next, its log_prob [B]"""
    mean = sde_mean(x, v, step)
    x_next = mean + step.std * fresh_noise
    return x_next, gaussian_log_prob(x_next, mean, step.std)


def gaussian_log_prob(x_next, mean, std):
    """How likely a step is, as the log of a density. x_next and mean are [B, C, H, W] -> [B]

    Raising log_prob moves the mean towards x_next, lowering it moves the mean away. So if an image
    turned out well, the model learns to do by itself what the fresh noise did by chance.

    PAPER/CODE: log p(x_next) is a sum over all D dimensions. The code takes their mean instead, and
    so do we. `clipped_loss` says what this means for the ratio.

    PAPER/CODE: For CPS the code leaves out the factor 1 / (2 * std^2) of a Gaussian. We keep it.
    This factor gives late steps the largest gradients, because the std of CPS shrinks with s. In
    the early steps that the preset sd3.5-medium-fast trains, the factor is about 1, so the preset's
    clip range still fits.
    """
    z = (x_next - mean) / std
    log_density = -0.5 * z**2 - torch.log(std) - 0.5 * math.log(2 * math.pi)
    return log_density.flatten(1).mean(1)


def kl_penalty(mean, mean_ref, kl_scale):
    """How far a step is from the base model's step. The means are [B, C, H, W] -> [B]

    Far from the base model, a reward can give high scores to images that people do not like. This
    is called reward hacking. The KL penalty makes it expensive to move that far.

    The KL divergence of two Gaussians with the same std is known exactly: the sum over all D
    dimensions of (mean - mean_ref)^2 / (2 * std^2). So it need not be estimated from samples, as it
    is for language models.

    PAPER/CODE: The code takes the mean over D, and for the flow SDE it has sigma^2 in place of
    std^2 = sigma^2 * (t-s). We do the same, because the published beta was tuned with it. For CPS
    the code divides by std^2, as it should. On SD3.5's grid of 10 steps with a = 0.8, this makes
    the penalty 5 to 20 times larger than the flow SDE's sigma^2 would, and thousands of times in
    the last SDE step, where s is almost 0. So with CPS a smaller beta is right.
    """
    penalty = (mean - mean_ref) ** 2 / (2 * kl_scale**2)
    return penalty.flatten(1).mean(1)


def group_advantages(scores, std_over="epoch"):
    """How much better each image is than its group (equation 4). scores: [groups, group_size].

    Some prompts are easy and some are hard, so a reward says little by itself. PPO trains a second
    network, the critic, to predict the reward. GRPO (group relative policy optimization) takes the
    mean reward of a group instead: its images have the same prompt and come from the same policy.

    PAPER/CODE: The paper divides by the std of the group, the code by the std of all images of the
    epoch. The std of the epoch does not enlarge tiny differences within a group. The 1e-4 and the
    clamp are from the code.
    """
    # In float64 the mean of equal float32 scores is exact, so their advantages are exactly 0.
    scores = scores.double()
    difference = scores - scores.mean(1, keepdim=True)
    if std_over == "epoch":
        std = scores.std(unbiased=False)
    else:
        std = scores.std(1, unbiased=False, keepdim=True)
    advantages = difference / (std + 1e-4)
    return advantages.clamp(-5, 5).float()


def clipped_loss(ratio, advantages, clip_range):
    """The part of the loss that raises the reward. All are [B].

    Equation 5 maximizes the mean of min(ratio * advantage, clip(ratio) * advantage) - beta * KL
    over all images and steps. This function returns minus the min. `update` adds the KL.

    The ratio says how much more likely a step is now than when it was sampled. Its gradient is
    ratio * grad(log_prob). In the first update of an epoch the ratio is 1, so the loss has the
    gradient -advantage * grad(log_prob), a plain policy gradient. Later updates still use the
    images of the old policy, and clipping limits how far these can push the new one:

        advantage > 0    the gradient is 0 once the ratio is above 1 + clip_range
        advantage < 0    the gradient is 0 once the ratio is below 1 - clip_range

    Because log_prob is a mean over D dimensions, our ratio is the D-th root of the true one:
    exp(sum / D) = exp(sum)^(1/D). It is always very near 1, so clip ranges are very small. For
    SD3.5 at 512 pixels D is 65,536, and with the published clip range of 1e-4 clipping begins at
    1.0001, a true ratio of 1.0001^65536, about 700. In PPO the ratio has a second task: as a factor
    of the gradient, it corrects for samples that come from an old policy. Ours is too near 1 for
    that, and only decides when to clip.
    """
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.min(ratio * advantages, clipped * advantages)


# -------------------------------------------------------------------------------------- 2. rollout
# In terms of reinforcement learning, a state is (prompt, t, x), an action is x_next, and an episode
# is the way from noise to an image. There is one reward, at the end, and we cannot know which of
# the steps earned it. So every step of an image gets the advantage of the image.
#
# `policy` is the network with its LoRA, its text encoders and its VAE, the class Policy of chapter
# 5. policy.velocity(x, t, condition) is v, with guidance if there is any.


@dataclass
class Rollout:
    images: list            # B PIL images, one group after the other
    condition: list         # the encoded prompts, two tensors [B, ...]
    times: torch.Tensor     # [T+1]
    window: range           # which of the T steps were SDE steps, K of them
    latents: torch.Tensor   # [B, K+1, C, H, W]: x before the first SDE step, and after each of them
    log_prob: torch.Tensor  # [B, K]


def choose_window(config, rng):
    """Which steps are SDE steps -> range. Only these are trained.

    They are `window` steps in a row, from a random start between 0 and `latest_start`. If `window`
    is 0, they are all steps but the last.

    PAPER/CODE: In the paper all steps are random and trained. In the code all are random, but the
    last one is not trained. We take the last one with the ODE.

    With the flow SDE and `window` 0, images of ten steps are visibly noisy. At a = 0.7 on SD3.5's
    time grid, the last SDE step goes from t = 0.278 to s = 0.009. Its keep is even negative, -0.08.
    It adds noise of std 0.225, and the only step left, from t = 0.009 to 0, removes noise of 0.009.
    But all images of a group are equally noisy, so many rewards can still compare them.

    A window of a few early steps leaves no such noise, and makes the update cheaper. Early steps
    decide most of what an image shows, and even one of them makes the images of a group differ.
    Late steps decide little, yet have the largest gradients: late steps have a small std, and the
    gradient of log_prob grows with 1 / std. (On SD3.5's time grid the late steps are also longer,
    so their mean depends more on v.) In the toy, the late steps drown out the early ones. The
    authors found later (Flow-GRPO-Fast, with PickScore) that two random steps are enough.
    """
    if config.window == 0:
        return range(config.train_steps - 1)
    start = rng.randint(0, config.latest_start)
    return range(start, start + config.window)


@torch.no_grad()
def rollout(policy, config, prompts, first_seeds, T, window, fresh_seeds=()):
    """Sample B images in T steps, a group of them for each prompt -> Rollout

    first_seeds [B] are for the first noise of each image, fresh_seeds [B] for its SDE steps. For
    an empty window, fresh_seeds is empty, too.

    Training samples in 10 steps instead of 40, which the paper calls denoising reduction. The
    images are worse, but good enough to be compared. The same network gives v in 10 and in 40
    steps, so what it learns should carry over.
    """
    B = len(first_seeds)
    K = len(window)
    images_per_prompt = B // len(prompts)
    times = policy.time_grid(T)
    condition = [c.repeat_interleave(images_per_prompt, 0) for c in policy.encode(prompts)]

    # Each image has its own generators, on the CPU. So its noise does not depend on the batch or
    # the device.
    first_noise = randn_tensor((B, *policy.latent_shape), generators(first_seeds))
    fresh_generators = generators(fresh_seeds)

    images = []
    latents = torch.empty(B, K + 1, *policy.latent_shape, device=WORLD.device)
    log_prob = torch.empty(B, K, device=WORLD.device)
    for start in progress(range(0, B, config.batch_size), "sampling"):
        batch = slice(start, start + config.batch_size)
        batch_condition = [c[batch] for c in condition]
        x = first_noise[batch].to(WORLD.device)
        for i in range(T):
            step = make_step(times, i, config.noise_level, config.sde)
            v = policy.velocity(x, step.t, batch_condition)
            if i in window:
                k = i - window.start
                fresh_noise = randn_tensor(x.shape, fresh_generators[batch], x.device)
                latents[batch, k] = x
                x, step_log_prob = sde_step(x, v, step, fresh_noise)
                latents[batch, k + 1] = x
                log_prob[batch, k] = step_log_prob
            else:
                x = x + v * (step.s - step.t)  # the ODE needs neither std nor keep
        images += policy.decode(x)
    return Rollout(images, condition, times, window, latents, log_prob)


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# --------------------------------------------------------------------------------------- 3. update
def update(policy, config, episodes, advantages):
    """The updates of an epoch -> metrics

    episodes is the Rollout of this process, with an episode for each of its B images. advantages
    [B] has the advantage of each image.

    Several small updates usually get further than a large one. So the images are split, and each
    update gets a part of every group. From the second update on, the images come from a slightly
    older policy, and our ratio cannot correct for that (see `clipped_loss`). Using an image again
    would make this worse. So each image is used only once, as in the official code.

    PAPER/CODE: Most of the official scripts shuffle the images of the epoch first, we do not. All
    images of a group are drawn in the same way, so its first half is as good as a random half.

    PAPER/CODE: The official train_sd3.py leaves out images with an advantage of 0, train_flux.py
    keeps them. We keep them for their KL penalty.
    """
    # [groups, group_size]. With 2 updates, [[0, 1, 2, 3], [4, 5, 6, 7]] is split into
    # [[0, 1], [4, 5]] for the first and [[2, 3], [6, 7]] for the second.
    image_numbers = torch.arange(len(advantages)).view(-1, config.group_size)
    sde_steps = torch.arange(len(episodes.window))

    kls, ratios, norms = [], [], []
    parts = image_numbers.chunk(config.updates, dim=1)
    for update_number, part in enumerate(parts):
        # [image, k]: each image of the part at each of its SDE steps
        pairs = torch.cartesian_prod(part.flatten(), sde_steps)
        pairs_of_all_processes = len(pairs) * WORLD.num_processes
        for batch in progress(pairs.split(config.batch_size), "update"):
            policy_loss, kl, ratio = losses(policy, config, episodes, advantages, batch)
            check_ratio(ratio, config.clip_range, is_first_update=update_number == 0)
            loss = policy_loss + config.beta * kl
            # Gradients add up over the batches, and in optimize() over the processes. Dividing by
            # the number of all pairs makes their sum the gradient of the mean loss.
            share_of_the_mean = loss.sum() / pairs_of_all_processes
            share_of_the_mean.backward()
            kls.append(kl.detach())
            ratios.append(ratio.detach())
        norms.append(policy.optimize())

    kl = gather(torch.cat(kls))
    ratio = gather(torch.cat(ratios))
    # The share of ratios outside of the clip range, whatever the sign of their advantage. The first
    # update counts, too, though its ratios are all 1. clip_low is usually the larger one: averaged
    # over what the old policy drew, log(ratio) is minus a KL divergence, so it is negative.
    clip_low = ratio < 1 - config.clip_range
    clip_high = ratio > 1 + config.clip_range
    return {
        "kl": kl.mean(),  # how far the policy is from the base model
        "ratio_deviation": (ratio - 1).abs().max(),
        "clip_low": clip_low.float().mean(),
        "clip_high": clip_high.float().mean(),
        "grad_norm": np.mean(norms),
    }


def losses(policy, config, episodes, advantages, batch):
    """What equation 5 is made of -> policy_loss, kl, ratio, all [b]

    The batch [b, 2] has b pairs: the index of an image, and that of an SDE step.
    """
    image = batch[:, 0]
    k = batch[:, 1]
    x = episodes.latents[image, k]
    x_next = episodes.latents[image, k + 1]
    old_log_prob = episodes.log_prob[image, k]
    advantage = advantages[image].to(x.device)
    condition = [c[image] for c in episodes.condition]
    i = episodes.window.start + k  # [b]
    step = make_step(episodes.times, i, config.noise_level, config.sde)

    v = policy.velocity(x, step.t, condition)
    mean = sde_mean(x, v, step)
    log_prob = gaussian_log_prob(x_next, mean, step.std)
    ratio = torch.exp(log_prob - old_log_prob)
    policy_loss = clipped_loss(ratio, advantage, config.clip_range)

    # reference() turns the LoRA off. With a beta of 0 the KL is only measured, to see how far the
    # policy has moved.
    with torch.no_grad(), policy.reference():
        v_ref = policy.velocity(x, step.t, condition)
    mean_ref = sde_mean(x, v_ref, step)
    kl = kl_penalty(mean, mean_ref, step.kl_scale)
    return policy_loss, kl, ratio


def check_ratio(ratio, clip_range, is_first_update):
    """Stop if a ratio is not finite, or if in the first update it differs from 1.

    Before the first update, the policy is still the one that drew the images, so each ratio must be
    1. If it is not, the update computes another log_prob than the rollout did, and the gradient is
    wrong.
    """
    if not ratio.isfinite().all():
        sys.exit("a ratio of new to old probability is not finite: lower --learning_rate")
    off = (ratio - 1).abs().max().item()
    # Rounding may move a ratio a little. We allow half the clip range, but at least 1e-5 and at
    # most 1e-4.
    allowed = np.clip(clip_range / 2, 1e-5, 1e-4)
    if is_first_update and off > allowed:
        sys.exit(f"before the first update a ratio is off by {off:.2g}, but it must be 1: sampling "
                 "and training do not compute the same thing (other guidance? dropout?)")


# ------------------------------------------------------------------------------------- 4. training
def redness(images, prompts, metadata):
    """A toy reward: how much more red than green or blue (--reward flow_grpo.py:redness)

    It gets PIL images, their prompts, and their rows of the dataset (metadata). It returns a number
    for each image, and need not be differentiable.
    """
    scores = []
    for image in images:
        red, green, blue = np.asarray(image).mean((0, 1)) / 255
        scores.append(red - max(green, blue))
    return scores


def train_epoch(policy, config, train_rewards, train_set, epoch):
    """Sample, score, compare, update -> metrics. All randomness comes from (seed, epoch).

    train_rewards are {name: (function, weight)}.
    """
    groups = config.groups
    group_size = config.group_size
    rng = random.Random(f"{config.seed}/{epoch}")
    repeats = math.ceil(groups / len(train_set))  # above 1 if there are fewer prompts than groups
    pool = train_set * repeats
    chosen = rng.sample(pool, groups)
    first_seeds = [rng.getrandbits(60) for _ in range(groups * group_size)]
    fresh_seeds = [rng.getrandbits(60) for _ in range(groups * group_size)]
    if config.same_noise:  # then the images of a group differ only by their SDE steps
        group_seeds = first_seeds[:groups]
        first_seeds = repeat_each(group_seeds, group_size)
    window = choose_window(config, rng)

    # If there are several processes, each has its part of the groups. check_config makes sure that
    # these parts are equal.
    rows = my_part(chosen)
    prompts = [row["prompt"] for row in rows]
    episodes = rollout(policy, config, prompts, my_part(first_seeds), T=config.train_steps,
                       window=window, fresh_seeds=my_part(fresh_seeds))

    # Each process scores its own images and gets the scores of all: a dict of arrays, "reward/NAME"
    # for each reward and "reward", their weighted sum.
    scores = rewards.score(train_rewards, episodes.images, repeat_each(rows, group_size))

    group_scores = torch.tensor(scores["reward"], dtype=torch.float32).view(groups, group_size)
    advantages = group_advantages(group_scores, config.std_over)
    if not advantages.isfinite().all():
        sys.exit("an advantage is not finite: the scores of the reward are too large")
    own_advantages = my_part(advantages).flatten()

    metrics = update(policy, config, episodes, own_advantages)

    # The share of groups without a signal from the reward: all their images have the same score.
    equal = group_scores.amax(1) == group_scores.amin(1)
    metrics["no_signal"] = equal.float().mean()
    for key, values in scores.items():
        metrics[key] = values.mean()
    return metrics


def repeat_each(items, n):
    """[a, b], 2 -> [a, a, b, b]"""
    repeated = []
    for item in items:
        repeated += [item] * n
    return repeated


def evaluate(policy, config, eval_rewards, test_set, folder):
    """Sample the test prompts with the ODE -> metrics. The images go to the folder.

    Why can we train with the SDE and sample with the ODE? Both use the same v, and a change of v
    moves the mean of an SDE step and the step of the ODE in the same direction. One LoRA serves all
    times, so what it learns in the window also changes v outside of the window.

    We evaluate a moving average of the LoRA's weights, which is less noisy than the weights
    themselves. The seeds are always the same, so that runs can be compared.
    """
    n = config.eval_per_prompt
    if config.eval_prompts > 0:
        test_set = test_set[:config.eval_prompts]
    numbers = my_part(range(len(test_set)))
    rows = [test_set[number] for number in numbers]
    prompts = [row["prompt"] for row in rows]
    seeds = []
    for number in numbers:
        for copy in range(n):
            seeds.append(number * n + copy)
    no_window = range(0)
    with policy.averaged():
        episodes = rollout(policy, config, prompts, seeds, T=config.eval_steps, window=no_window)
    # As in train_epoch, each process gets the scores of all.
    scores = rewards.score(eval_rewards, episodes.images, repeat_each(rows, n))

    metrics = {f"eval_{key}": values.mean() for key, values in scores.items()}
    # For OCR and GenEval also the share of images that are entirely right
    metrics |= rewards.accuracy(scores, repeat_each(test_set, n))
    # The first image of each prompt
    save_images(episodes.images[::n], test_set, scores["reward"][::n], folder)
    return metrics


def train(config):
    """The whole run. Epoch 0 only evaluates, to see what the base model can do."""
    say(f"loading the reward {config.reward} and the model {config.model}")
    train_set = rewards.load_prompts(config, "train")
    test_set = rewards.load_prompts(config, "test")
    train_rewards = rewards.load(config.reward, "--reward")
    eval_rewards = dict(train_rewards)
    only_measured = rewards.load(config.eval_reward, "--eval_reward")
    for name in only_measured:
        if name not in train_rewards:
            function, _ = only_measured[name]
            eval_rewards[name] = (function, 0)  # with a weight of 0 in the sum
    rewards.check(eval_rewards, train_set + test_set)

    policy = load_policy(config)
    all_prompts = [row["prompt"] for row in train_set + test_set]
    max_tokens = config.max_sequence_length
    for warning in rewards.prompt_warnings(policy.tokenizer, max_tokens, all_prompts):
        say(warning)

    folder = claim_folder(config)
    history = []  # the metrics of each epoch
    if config.resume:
        checkpoint = read_checkpoint(folder)
        policy.restore(checkpoint)
        history = checkpoint["history"]
    # This object only logs. `optimize` adds up the gradients of all processes.
    accelerator = Accelerator(log_with=config.report_to or None, project_dir=folder)
    name_in_wandb = {"wandb": {"name": folder.name}}
    accelerator.init_trackers("flow_grpo", asdict(config), name_in_wandb)
    say(f"{folder}: {config.groups} groups of {config.group_size} images in an epoch, on "
        f"{WORLD.num_processes} x {WORLD.device.type}. After a stop: --resume {folder}")

    is_finished = len(history) > config.epochs  # history also has epoch 0
    if is_finished:  # only evaluate once more, for example with other options
        metrics = evaluate(policy, config, eval_rewards, test_set, folder / "samples/again")
        say(", ".join(f"{key} {value:.4g}" for key, value in metrics.items()))
    for epoch in progress(range(len(history), config.epochs + 1), "epochs"):
        start = time.time()
        metrics = {"epoch": epoch}
        if epoch > 0:
            # Late in a run, all images of most groups may have the same score. What then moves the
            # weights is mostly the noise of the few other groups, and the KL penalty. A learning
            # rate that falls keeps these moves small.
            learning_rate = config.learning_rate
            if config.lr_decay:
                learning_rate *= 1 - (epoch - 1) / config.epochs
            policy.set_learning_rate(learning_rate)
            metrics |= train_epoch(policy, config, train_rewards, train_set, epoch)
        if epoch % config.eval_every == 0 or epoch == config.epochs:
            samples = folder / f"samples/{epoch:04d}"
            metrics |= evaluate(policy, config, eval_rewards, test_set, samples)
        metrics["seconds"] = time.time() - start
        history.append({key: float(value) for key, value in metrics.items()})
        if WORLD.is_main_process:
            report(config, folder, history, accelerator)
            save(policy, config, folder, history)
    say(summary(folder, history))
    accelerator.end_training()


# ---------------------------------------------------------------------------------- 5. the network
ALPHA_OVER_RANK = 2  # as in the official code


class Policy:
    """An SD3 pipeline (the toy is one) with a LoRA, an optimizer and a moving average of the LoRA

    For another family, write a subclass like SanaPolicy below and enter it in POLICIES. It always
    needs its own lora_layers, forward (where v and t get the family's sign and scale) and
    encode_batch (which returns two tensors), and sometimes more. Latents must be square.

    To test it, sample with an empty window. The images must be those of the family's own pipeline,
    with the same scheduler and noise. The tests do this for all in their list FAMILIES.
    """

    lora_layers = [  # as in the official code: the attention of image tokens and of text tokens
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]

    def __init__(self, pipe, config):
        self.pipe = pipe
        self.config = config
        self.encoders = torch.nn.ModuleList()
        for name, part in pipe.components.items():
            if "text_encoder" in name and part is not None:
                self.encoders.append(part)
            if "tokenizer" in name and part is not None:
                self.tokenizer = part  # the last one stays: that of T5 or Gemma
        pipe.vae.to(WORLD.device)
        pipe.transformer.to(WORLD.device)
        if config.gradient_checkpointing:
            pipe.transformer.enable_gradient_checkpointing()
        torch.manual_seed(config.seed)  # for the initial LoRA
        # A LoRA adds alpha / rank times the product of two thin matrices to the weights of a layer.
        # One of the two starts at 0, so training starts at the base model.
        self.network = peft.get_peft_model(pipe.transformer, peft.LoraConfig(
            r=config.lora_rank,
            lora_alpha=ALPHA_OVER_RANK * config.lora_rank,
            init_lora_weights="gaussian",
            target_modules=self.lora_layers,
        ))
        # peft keeps the LoRA in float32. In bf16, small updates would be rounded away.
        self.params = [p for p in self.network.parameters() if p.requires_grad]
        self.average = parameters_to_vector(self.params).detach()
        self.optimizer = torch.optim.AdamW(
            self.params, config.learning_rate, eps=config.adam_eps, weight_decay=1e-4)
        self.updates_made = 0
        self.empty = self.encode([""])  # for guidance
        side = config.resolution // pipe.vae_scale_factor
        self.latent_shape = (pipe.vae.config.latent_channels, side, side)

    def velocity(self, x, t, condition):
        """v [B, C, H, W] in float32. x is [B, C, H, W], t is one time or one for each image.

        With classifier-free guidance, the policy is the Gaussian around the guided step. So
        sampling and training must both use it, or the ratio would compare two policies.
        """
        v = self.predict(x, t, condition)
        if self.config.guidance != 1:
            empty = [c.repeat_interleave(len(x), 0) for c in self.empty]  # a row for each image
            v_empty = self.predict(x, t, empty)
            v = v_empty + self.config.guidance * (v - v_empty)
        return v

    def predict(self, x, t, condition):
        """v without guidance"""
        t = t.flatten().expand(len(x))  # one for each image, even if they all have the same
        condition = [c.to(x.device) for c in condition]
        bf16 = self.config.precision == "bf16"
        # network.dtype is that of the base model. Under autocast the LoRA computes in bf16, too.
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            v = self.forward(x.to(self.network.dtype), t, *condition)
        return v.float()

    def forward(self, x, t, embeds, pooled):
        """The network's noise - data. t [B] is 1 for noise."""
        return self.network(
            hidden_states=x,
            timestep=1000 * t,  # the scale that SD3 was trained with
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
        ).sample

    @torch.no_grad()
    def encode(self, prompts):
        """Prompts -> the condition: tensors [len(prompts), ...] on the CPU"""
        if self.config.offload:
            self.network.cpu()
        self.encoders.to(WORLD.device)
        embeds = []
        others = []  # pooled embeddings for SD3 and FLUX, the attention mask for SANA
        for start in range(0, len(prompts), self.config.batch_size):
            batch = prompts[start:start + self.config.batch_size]
            its_embeds, its_others = self.encode_batch(batch)
            embeds.append(its_embeds.cpu())
            others.append(its_others.cpu())
        if self.config.offload:
            self.encoders.cpu()
            self.network.to(WORLD.device)
        return [torch.cat(embeds), torch.cat(others)]

    def encode_batch(self, prompts):
        """The two tensors of the condition, with a row for each prompt"""
        embeds, _, pooled, _ = self.pipe.encode_prompt(
            prompts, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False,
            device=WORLD.device, max_sequence_length=self.config.max_sequence_length)
        return embeds, pooled

    def time_grid(self, T, **options):
        """The scheduler's times [T+1]. For SD3.5 and T = 10: 1, 0.96, 0.91, ... 0.28, 0.009, 0."""
        scheduler = self.pipe.scheduler
        scheduler.set_timesteps(T, device=WORLD.device, **options)
        times = scheduler.sigmas.float().clone()  # so the scheduler's own stay as they are
        is_complete = len(times) == T + 1
        falls = (times.diff() < 0).all()
        starts_at_1 = abs(times[0] - 1) <= 1e-6
        ends_at_0 = times[-1] == 0
        if not (is_complete and falls and starts_at_1 and ends_at_0):
            sys.exit(f"--model {self.config.model}: the times of its {type(scheduler).__name__} do "
                     f"not fall from 1 to 0 in {T} steps. It needs a "
                     "FlowMatchEulerDiscreteScheduler")
        times[0] = 1  # for some values of `shift` it is rounded to just below 1
        return times

    @torch.no_grad()
    def decode(self, latents):
        """Latents [B, C, H, W] -> B PIL images"""
        vae = self.pipe.vae
        shift = vae.config.get("shift_factor")
        if shift is None:  # some VAEs have none
            shift = 0
        pixels = vae.decode(latents / vae.config.scaling_factor + shift).sample
        if not pixels.isfinite().all():
            sys.exit("the pixels of an image are not finite. In epoch 0, the cause is --model "
                     f"{self.config.model} itself. Later, try a lower --learning_rate")
        return self.pipe.image_processor.postprocess(pixels)

    def reference(self):
        """A context in which the LoRA is off, which makes the network the base model"""
        return self.network.disable_adapter()

    @contextmanager
    def averaged(self):
        """A context in which the weights are their moving average"""
        own = parameters_to_vector(self.params)
        vector_to_parameters(self.average, self.params)
        try:
            yield
        finally:
            vector_to_parameters(own, self.params)

    def set_learning_rate(self, learning_rate):
        self.optimizer.param_groups[0]["lr"] = learning_rate

    def optimize(self):
        """One update with the gradients of all processes -> their norm before clipping"""
        for p in self.params:
            p.grad = reduce(p.grad, "sum")
        # The 1.0 is from the code. The toy's norms are far below it, so nothing is clipped.
        norm = clip_grad_norm_(self.params, 1.0)
        if not norm.isfinite():
            sys.exit("the gradient is not finite: lower --learning_rate")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.updates_made += 1
        n = self.updates_made
        # The decay starts small, so that the average soon forgets the untrained weights (as in the
        # code's ema.py).
        decay = min(self.config.ema_decay, (1 + n) / (10 + n))
        weights = parameters_to_vector(self.params).detach()
        self.average = decay * self.average + (1 - decay) * weights
        return norm.item()

    def lora(self):
        """The averaged LoRA as diffusers and other programs read it

        It was trained for --guidance, so sample with the same.
        """
        with self.averaged():
            state = peft.get_peft_model_state_dict(self.network)
            layers = {}
            for name, weights in state.items():
                # The file has no alpha, so its readers take alpha / rank to be 1. So we multiply
                # one of the two matrices by alpha / rank here.
                if "lora_B" in name:
                    weights = ALPHA_OVER_RANK * weights
                layers[name.removeprefix("base_model.model.")] = weights
        return layers

    def checkpoint(self):
        """All that later epochs depend on"""
        return {
            "weights": parameters_to_vector(self.params).detach(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "updates": self.updates_made,
        }

    def restore(self, checkpoint):
        """Go on where a checkpoint was made"""
        if checkpoint["average"].shape != self.average.shape:
            sys.exit("--resume: the checkpoint has another number of weights than this model: "
                     "keep its --model and --lora_rank")
        self.average = checkpoint["average"].to(WORLD.device)
        vector_to_parameters(checkpoint["weights"].to(WORLD.device), self.params)
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.optimizer.param_groups[0]["eps"] = self.config.adam_eps  # --resume may change it
        self.updates_made = checkpoint["updates"]


class FluxPolicy(Policy):
    """FLUX packs 2 x 2 latents into a token, and wants the position of each token.

    It was distilled to guide itself: the guidance scale is an input of the network.
    """

    lora_layers = Policy.lora_layers + [
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]

    def velocity(self, x, t, condition):
        return self.predict(x, t, condition)

    def forward(self, x, t, embeds, pooled):
        packed = torch.pixel_unshuffle(x, 2)  # [B, 4C, H/2, W/2], in the pipeline's own order
        B, _, rows, columns = packed.shape
        tokens = packed.flatten(2).mT  # [B, rows * columns, 4C]
        guidance = None
        if self.network.config.guidance_embeds:  # FLUX.1-schnell has none
            guidance = torch.full([B], self.config.guidance, device=x.device)
        v = self.network(
            hidden_states=tokens,
            timestep=t,  # FLUX multiplies it by 1000 itself
            guidance=guidance,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            txt_ids=x.new_zeros(embeds.shape[1], 3),
            img_ids=self.pipe._prepare_latent_image_ids(B, rows, columns, x.device, x.dtype),
        ).sample
        v = v.mT.unflatten(2, (rows, columns))  # [B, 4C, H/2, W/2]
        return torch.pixel_shuffle(v, 2)

    def encode_batch(self, prompts):
        embeds, pooled, _ = self.pipe.encode_prompt(
            prompts, prompt_2=None, device=WORLD.device,
            max_sequence_length=self.config.max_sequence_length)
        return embeds, pooled

    def time_grid(self, T):
        tokens = (self.latent_shape[1] // 2) ** 2
        options = self.pipe.scheduler.config
        mu = diffusers.pipelines.flux.pipeline_flux.calculate_shift(
            tokens, options.base_image_seq_len, options.max_image_seq_len, options.base_shift,
            options.max_shift)
        return super().time_grid(T, sigmas=np.linspace(1, 1 / T, T), mu=mu)


class SanaPolicy(Policy):
    """SANA has one text encoder, whose attention mask the network needs."""

    lora_layers = ["to_q", "to_k", "to_v", "to_out.0"]  # of attn1, and of attn2 for the text

    def __init__(self, pipe, config):
        # Its own DPM-Solver looks back at earlier steps. A policy may see only the current x.
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
        # The instruction that the stock pipeline puts before each prompt
        parameters = inspect.signature(pipe.__call__).parameters
        self.instruction = parameters["complex_human_instruction"].default
        super().__init__(pipe, config)

    def forward(self, x, t, embeds, mask):
        return self.network(
            hidden_states=x,
            timestep=1000 * self.network.config.timestep_scale * t,
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask,
        ).sample

    def encode_batch(self, prompts):
        instruction = self.instruction
        if prompts == [""]:  # the empty prompt of guidance gets no instruction
            instruction = None
        embeds, mask, _, _ = self.pipe.encode_prompt(
            prompts, do_classifier_free_guidance=False, complex_human_instruction=instruction,
            device=WORLD.device, max_sequence_length=self.config.max_sequence_length)
        return embeds, mask


POLICIES = {
    "StableDiffusion3Pipeline": Policy,
    "FluxPipeline": FluxPolicy,
    "SanaPipeline": SanaPolicy,
}


def load_policy(config):
    """The pipeline of --model -> the Policy of its family"""
    source = rewards.TOY if config.model == "toy" else config.model
    network_dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    # In bf16 the VAE's rounding would be visible in the images.
    dtype = {"vae": torch.float32, "default": network_dtype}
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(source, dtype=dtype)
        policy_class = POLICIES[type(pipe).__name__]
    except Exception as error:  # diffusers raises almost anything for a wrong or damaged folder
        reason = " ".join(str(error).split())[:300]
        sys.exit(f"--model {config.model} cannot be loaded. It must be the folder or hub name of a "
                 f"{', '.join(POLICIES)}. From the hub, a gated model needs its license accepted "
                 f"there and `hf auth login`. {type(error).__name__}: {reason}")
    policy = policy_class(pipe, config)
    for T in (config.train_steps, config.eval_steps):
        policy.time_grid(T)  # stops now if the scheduler cannot be used
    unit = 2 * pipe.vae_scale_factor  # SD3 and FLUX join 2 x 2 latents in a token
    if config.resolution % unit:
        sys.exit(f"--resolution {config.resolution} must be a multiple of {unit}")
    limit = policy.network.config.get("pos_embed_max_size")  # in tokens per side. Only SD3 has one
    if limit and config.resolution > limit * unit:
        sys.exit(f"--resolution {config.resolution} must be at most {limit * unit}")
    return policy


# -------------------------------------------------------------------------------------- 6. options
@dataclass
class Config:
    # sd3.5-medium, sd3.5-medium-fast, sana-0.6b, flux.1-dev, geneval or toy_pickscore (PRESETS). If
    # empty, the preset with the name of the first reward, if it exists
    preset: str = ""
    reward: str = "ocr"  # a name in rewards.py, "file.py:function", or a sum "ocr:1,pickscore:0.5"
    eval_reward: str = ""  # rewards that are only measured, to see whether --reward is being hacked
    # Folder or hub name of an SD3, FLUX or SANA pipeline. Name a preset as well, because the other
    # defaults are the toy's
    model: str = "toy"
    # Folder with train.txt and test.txt, a prompt on each line, or train_metadata.jsonl and
    # test_metadata.jsonl. If empty, the toy's words or scenes
    dataset: str = ""
    resolution: int = 48  # height and width of the images in pixels
    max_sequence_length: int = 14  # tokens of the T5 text encoder, or of SANA's Gemma
    precision: Literal["fp32", "bf16"] = "fp32"  # of the network. bf16 (on a GPU) halves its memory
    gradient_checkpointing: bool = False  # less memory, slower updates
    offload: bool = False  # text encoders and network take turns on the GPU
    name: str = ""  # folder under runs/. If empty, the name of the reward, numbered
    # Folder of a run to continue, with its options. This runs the reward that its checkpoint names:
    # do not resume a folder that you do not trust
    resume: str = ""
    report_to: str = ""  # also log to tensorboard, wandb, trackio, swanlab or another tracker
    seed: int = 0  # on a CPU, the same seed gives the same run
    epochs: int = 4  # an epoch: sample, score, compare, update. 0 only evaluates
    eval_every: int = 4  # epochs between evaluations
    groups: int = 16  # prompts in an epoch. More make the gradient less noisy
    group_size: int = 8  # images of each prompt
    train_steps: int = 10  # T in training
    eval_steps: int = 40  # T in evaluations
    # a. Too little explores nothing, too much spoils the images. With 0 a step has no density
    noise_level: float = 0.7
    sde: Literal["flow", "cps"] = "flow"  # the paper's, or CPS (see chapter 1)
    window: int = 1  # how many steps are SDE steps, and trained. 0: all but the last
    latest_start: int = 0  # the window starts at a random step from 0 to this
    # One first noise for a group: its images then differ only by steps that are trained. Otherwise
    # a lucky first noise would be credited to the few trained steps. In the paper, where all
    # steps are random, different noises got higher rewards
    same_noise: bool = True
    guidance: float = 1.0  # classifier-free guidance, 1 is off. For FLUX its distilled guidance
    updates: int = 2  # optimizer steps in an epoch
    learning_rate: float = 3e-3  # of AdamW
    lr_decay: bool = True  # the learning rate falls linearly, epoch by epoch, towards 0
    # Adam divides the gradient by its recent size plus adam_eps. Our losses are means over D, so in
    # large models gradients can be as small as 1e-8, and then hardly anything moves. If the kl
    # stays at 0, try 1e-15
    adam_eps: float = 1e-8
    clip_range: float = 1e-3  # a ratio this far from 1 is not pushed further away
    beta: float = 0.5  # weight of the KL penalty. A larger one keeps quality, but slows learning
    std_over: Literal["epoch", "group"] = "epoch"  # whose std divides the advantages
    lora_rank: int = 32  # alpha is twice the rank
    ema_decay: float = 0.9  # of the averaged weights, which are evaluated and saved. 0: no average
    # How many images the network takes at once, or in the update, pairs of image and step. More are
    # faster, and take more memory
    batch_size: int = 64
    eval_prompts: int = 0  # evaluate only on the first N test prompts. 0: on all
    eval_per_prompt: int = 2  # images of each of them


# Steps, group size, noise level, resolution, beta and LoRA are from appendix B.3 of the paper. The
# rest is from the code, except where a comment says otherwise.
PAPER = dict(
    model="stabilityai/stable-diffusion-3.5-medium",
    resolution=512,
    max_sequence_length=128,
    # PAPER/CODE: The code trains SD3.5 in fp16. bf16 needs no scaling of the loss.
    precision="bf16",
    epochs=1000,  # ours
    eval_every=60,
    groups=48,
    group_size=24,  # with 6 and 12, long PickScore runs collapsed
    train_steps=10,
    eval_steps=40,
    noise_level=0.7,
    sde="flow",
    window=0,
    same_noise=False,
    guidance=4.5,
    updates=2,
    learning_rate=3e-4,
    lr_decay=False,
    clip_range=1e-4,
    beta=0.04,  # for GenEval and OCR. For PickScore it is 0.01
    std_over="epoch",
    lora_rank=32,
    # PAPER/CODE: After every 8th update the code updates the average twice, with a decay of 0.9. We
    # do it after each update. In 8 updates a decay of 0.974 has the same effect: 0.974^8 = 0.9^2.
    ema_decay=0.974,
    batch_size=8,  # ours
    eval_prompts=0,
    eval_per_prompt=1,
)

# A cheaper setting for one GPU of 24 GB, but never tried on one. Lines without a comment are from
# verl-omni's script for SD3.5 and OCR (pull request 178 of github.com/verl-project/verl-omni). The
# authors' own geneval_sd3_fast_nocfg has the same window, CPS, noise level, clip range and beta.
FAST = PAPER | dict(
    resolution=384,
    max_sequence_length=256,
    epochs=100,
    eval_every=10,  # ours
    groups=8,
    group_size=8,
    eval_steps=28,
    window=3,
    latest_start=2,
    sde="cps",
    noise_level=0.8,
    guidance=1.0,
    learning_rate=1e-4,
    clip_range=1e-5,
    beta=0.0,
    adam_eps=1e-15,  # from pull request 407 of UniRL
    ema_decay=0.9,  # ours
    gradient_checkpointing=True,  # ours
    offload=True,  # ours
    eval_prompts=64,  # ours
)

PRESETS = {
    "sd3.5-medium": PAPER,
    "sd3.5-medium-fast": FAST,
    # FAST for a smaller model. Nobody has reported a run with these numbers.
    "sana-0.6b": FAST | dict(
        model="Efficient-Large-Model/Sana_600M_512px_diffusers",
        resolution=512,
        max_sequence_length=300,
        batch_size=4,
    ),
    # From the official pickscore_flux
    "flux.1-dev": PAPER | dict(
        model="black-forest-labs/FLUX.1-dev",
        reward="pickscore",
        eval_every=30,
        train_steps=6,
        eval_steps=28,
        guidance=3.5,
        noise_level=0.9,
        beta=0.0,
        lora_rank=64,
        ema_decay=0.924,  # the code updates it six times after every 8th update: 0.924^8 = 0.9^6
        batch_size=4,  # this and the next to save memory
        gradient_checkpointing=True,
    ),
    # For the toy. The defaults in Config are for OCR.
    "geneval": dict(
        reward="geneval",
        group_size=16,
        epochs=36,
        eval_every=12,
        window=2,
        learning_rate=1.5e-3,
        lr_decay=False,
        beta=0.1,
        eval_prompts=60,  # of 144, to save time
    ),
    "toy_pickscore": dict(
        reward="toy_pickscore",
        groups=8,
        group_size=16,
        epochs=24,
        eval_every=12,
        window=2,
        learning_rate=2e-3,
        beta=0.1,
        eval_prompts=60,
    ),
}


def parse_config(argv=None):
    """The options of a run -> Config

    The command line wins over the preset or the run to resume, and these win over Config. So tyro
    parses twice. The first time is only to find the preset or the run. The second time, its values
    are the defaults, which --help shows.
    """
    if argv is None:
        argv = sys.argv[1:]
    without_help = [word for word in argv if word not in ("-h", "--help")]
    asked = parse_command_line(without_help, {})
    if asked.resume:
        if asked.preset:
            sys.exit(f"--preset {asked.preset}: not with --resume, which keeps a run's options")
        options = read_checkpoint(asked.resume)["options"]
    elif asked.preset:
        if asked.preset not in PRESETS:
            sys.exit(f"--preset {asked.preset}: choose from {', '.join(PRESETS)}")
        options = PRESETS[asked.preset]
    else:
        reward_names = list(rewards.parse(asked.reward, "--reward"))
        options = PRESETS.get(reward_names[0], {})  # --reward geneval takes the preset geneval
    config = parse_command_line(argv, options)
    check_config(config)
    check_machine(config)
    return config


def parse_command_line(argv, defaults):
    return tyro.cli(Config, default=Config(**defaults), args=argv, use_underscores=True,
                    description=__doc__)


def check_config(config):
    """Stop for options that would fail late, or silently do the wrong thing."""
    may_be_0 = ("seed", "epochs", "window", "latest_start", "beta", "ema_decay", "eval_prompts")
    for name, value in asdict(config).items():
        if type(value) not in (int, float):  # bool is neither
            continue
        if name in may_be_0:
            if not 0 <= value < math.inf:  # nan fails this, too
                sys.exit(f"--{name} {value}: must be a number, at least 0")
        elif not 0 < value < math.inf:
            sys.exit(f"--{name} {value}: must be a number above 0")
    if config.group_size < 2:
        sys.exit("--group_size 1: must be 2 or more, because the images are compared")
    if config.group_size % config.updates:
        sys.exit(f"--updates {config.updates}: must divide --group_size {config.group_size}")
    if config.groups % WORLD.num_processes:
        sys.exit(f"--groups {config.groups}: must be a multiple of the number of processes, "
                 f"{WORLD.num_processes}")
    # In bf16, batches of different sizes are rounded differently. Then the first ratio is not 1.
    own_groups = config.groups // WORLD.num_processes
    images = own_groups * (config.group_size // config.updates)
    if config.precision == "bf16" and images % config.batch_size:
        sys.exit(f"--batch_size {config.batch_size}: with bf16 it must divide {images}, the number "
                 "of images that a process uses in an update, so that all batches have one size")
    if 0 < config.eval_prompts < WORLD.num_processes:
        sys.exit(f"--eval_prompts {config.eval_prompts}: must be at least one for each of the "
                 f"{WORLD.num_processes} processes, or 0 for all prompts")
    if config.train_steps < 2:
        sys.exit("--train_steps 1: must be at least 2, as the last is never an SDE step")
    if config.window + config.latest_start >= config.train_steps:
        sys.exit(f"--window {config.window} --latest_start {config.latest_start}: their sum must "
                 f"be below --train_steps {config.train_steps}, as the last is never an SDE step")
    if config.sde == "cps" and config.noise_level >= 1:
        sys.exit(f"--noise_level {config.noise_level}: must be below 1 with --sde cps, or nothing "
                 "of the old noise stays")


def check_machine(config):
    """Stop for what this machine lacks, before anything is loaded."""
    trackers = [str(tracker) for tracker in get_available_trackers()]
    if config.report_to and config.report_to not in trackers:
        sys.exit(f"--report_to {config.report_to}: it is not installed. "
                 f"Installed are: {', '.join(trackers) or 'none'}")
    if config.precision == "bf16" and WORLD.device.type == "cpu":
        sys.exit("torch finds no GPU (is this a CPU build of it, or the driver too old?), and "
                 "--precision bf16 needs one. On a CPU take fp32, which is slow for a large model")
    if config.name and not config.resume and Path("runs", config.name, "checkpoint.pt").exists():
        sys.exit(f"--name {config.name}: this run exists. Continue it with "
                 f"--resume runs/{config.name}, or take another name")
    runs = "runs" if Path("runs").exists() else "."  # if there is no folder runs, it is made here
    if not os.access(runs, os.W_OK):
        sys.exit(f"the folder {Path(runs).resolve()} cannot be written to")


# ------------------------------------------------------------------- 7. processes, files, pictures
# The folder of a run has config.json, metrics.jsonl (a line for each epoch), checkpoint.pt (for
# --resume), pytorch_lora_weights.safetensors (for diffusers), before_after.png and curve.png.
# samples/0004 has the first images of the evaluation after epoch 4, and its LoRA.


def progress(items, title):
    if not WORLD.is_main_process:
        return items
    return tqdm(items, title, leave=False, disable=None)  # None shows no bar in a log file


def say(line):
    """Print a line once, whatever the number of processes"""
    if WORLD.is_main_process:
        tqdm.write(line)
        sys.stdout.flush()


def my_part(items):
    """The part of a list or tensor that is for this process. In order, the parts give the whole."""
    n = WORLD.num_processes
    rank = WORLD.process_index
    start = len(items) * rank // n
    end = len(items) * (rank + 1) // n
    return items[start:end]


def claim_folder(config):
    """The folder of this run -> Path, the same in all processes"""
    if config.resume:
        return Path(config.resume)
    folder = None
    if config.name:
        folder = Path("runs", config.name)
    elif WORLD.is_main_process:
        folder = new_folder(list(rewards.parse(config.reward, "--reward")))
    folder = broadcast_object_list([folder])[0]  # that of the main process
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def new_folder(names):
    """runs/ocr, or the first free one of runs/ocr-2, runs/ocr-3, ... for the rewards of a run"""
    folder_name = "-".join(names)
    folder_name = re.sub(r"\W+", "-", folder_name).strip("-")  # "./my.py:f" becomes "my-py-f"
    folder = Path("runs", folder_name)
    number = 1
    while folder.exists():
        number += 1
        folder = Path("runs", f"{folder_name}-{number}")
    folder.mkdir(parents=True)  # fails if another run has taken it in this moment
    return folder


def save(policy, config, folder, history):
    """The options, the LoRA for diffusers (load_lora_weights), the checkpoint for --resume"""
    (folder / "config.json").write_text(json.dumps(asdict(config), indent=1))
    epoch = len(history) - 1
    layers = policy.lora()
    policy.pipe.save_lora_weights(folder, transformer_lora_layers=layers)
    was_evaluated = "eval_reward" in history[-1]
    if was_evaluated:
        samples = folder / f"samples/{epoch:04d}"
        policy.pipe.save_lora_weights(samples, transformer_lora_layers=layers)
    # Written last and then renamed. So wherever a run is killed, the checkpoint is whole, and only
    # the epoch in progress is lost.
    checkpoint = policy.checkpoint() | {"options": asdict(config), "history": history}
    torch.save(checkpoint, folder / "checkpoint.tmp")
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")


def read_checkpoint(folder):
    path = Path(folder, "checkpoint.pt")
    if not path.exists():
        sys.exit(f"--resume {folder}: there is no checkpoint.pt. If the run was stopped before its "
                 "first one, start it again, with the same --name")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        Config(**checkpoint["options"])  # fails for options that this version does not have
        return checkpoint
    except Exception as error:  # torch raises almost anything for a damaged file
        sys.exit(f"--resume {folder}: its checkpoint.pt is damaged, or of another version of this "
                 f"script ({type(error).__name__})")


def report(config, folder, history, accelerator):
    """Print the main metrics of an epoch, write all of them, and draw the pictures"""
    row = history[-1]
    epoch = len(history) - 1
    names = [key for key in row if key.startswith("eval_reward/")]
    shown = ["reward", "eval_reward"]
    if len(names) > 1:
        shown += names
    shown += ["eval_accuracy", "no_signal", "kl", "clip_low", "clip_high", "grad_norm", "seconds"]
    numbers = [f"{key} {row[key]:.4g}" for key in shown if key in row]
    say(f"epoch {epoch}/{config.epochs}: {', '.join(numbers)}")
    lines = [json.dumps(row) + "\n" for row in history]
    (folder / "metrics.jsonl").write_text("".join(lines))
    accelerator.log(row, step=epoch)
    if "eval_reward" in row:
        try:
            draw_curve(folder, history)
            samples = folder / "samples"
            draw_before_after(samples / "0000", samples / f"{epoch:04d}", folder)
        except Exception as error:  # no picture may stop a run
            say(f"warning: no pictures this time: {error!r}")


def summary(folder, history):
    """What was gained, and which evaluation was the best"""
    evaluated = [row for row in history if "eval_reward" in row]
    best = max(evaluated, key=lambda row: row["eval_reward"])
    gains = []
    for key in ("eval_reward", "eval_accuracy"):
        if key in evaluated[0]:
            gains.append(f"{key} {evaluated[0][key]:.3f} -> {evaluated[-1][key]:.3f}")
    return f"{', '.join(gains)}. The best LoRA is in {folder}/samples/{int(best['epoch']):04d}"


def save_images(images, rows, scores, folder):
    """The first 12 images of an evaluation, with a file of their prompts and scores

    images are those of this process, and are gathered here. rows and scores are those of all.
    """
    gathered = gather_object(images[:12])  # 12 of each process, in order
    images = gathered[:12]
    if not WORLD.is_main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "prompts.jsonl", "w") as file:
        for number, image in enumerate(images):
            image.save(folder / f"{number:02d}.png")
            line = {"prompt": rows[number]["prompt"], "score": scores[number]}
            file.write(json.dumps(line) + "\n")


def read_images(folder):
    """What save_images has written -> the images, and for each a row with its prompt and score"""
    with open(folder / "prompts.jsonl") as file:
        rows = [json.loads(line) for line in file]
    images = [Image.open(folder / f"{number:02d}.png") for number in range(len(rows))]
    return images, rows


def draw_before_after(before, after, folder):
    """Each prompt in two evaluations -> before_after.png. before and after are their folders."""
    images_before, rows_before = read_images(before)
    images_after, rows_after = read_images(after)
    titles = []
    for row_before, row_after in zip(rows_before, rows_after):
        title = f"{row_before['score']:.2f} -> {row_after['score']:.2f}  {row_after['prompt']}"
        titles.append(textwrap.fill(title, 44))
    longest = max(title.count("\n") + 1 for title in titles)  # in lines
    rows = math.ceil(len(titles) / 3)
    height = 1.5 + 0.15 * longest  # of two images and their title, in inches
    figure = Figure(figsize=(8.8, 0.3 + rows * height), layout="constrained")
    epoch = int(after.name)
    figure.suptitle(f"before training (left) and after epoch {epoch} (right), with their rewards")
    for number, (image_before, image_after) in enumerate(zip(images_before, images_after)):
        gap = Image.new("RGB", (image_before.width // 24, image_before.height), "white")
        plot = figure.add_subplot(rows, 3, number + 1)
        plot.set_axis_off()
        plot.imshow(np.hstack([image_before, gap, image_after]))
        plot.set_title(titles[number], fontsize=8, parse_math=False)
    figure.savefig(folder / "before_after.png")


def draw_curve(folder, history):
    """A panel for each reward, and for the accuracy and the KL penalty -> curve.png"""
    panels = []
    for key in history[0]:  # epoch 0 is an evaluation
        if key.startswith("eval_reward/") or key == "eval_accuracy":
            training_key = key.removeprefix("eval_")
            panels.append([training_key, key])  # in one panel. Training has no accuracy
    panels.append(["kl"])
    figure = Figure(figsize=(3.2 * len(panels), 3), layout="constrained")
    for plot, keys in zip(figure.subplots(1, len(panels)), panels):
        for key in keys:
            rows = [row for row in history if key in row]
            epochs = [row["epoch"] for row in rows]
            values = [row[key] for row in rows]
            if rows:
                plot.plot(epochs, values, ".-", label=key)
        plot.set_xlabel("epoch")
        if plot.get_lines():
            plot.legend()
    figure.savefig(folder / "curve.png")


def main(argv=None):
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # for terminals that lack a character
    try:
        config = parse_config(argv)
        train(config)
    except torch.OutOfMemoryError:
        sys.exit("out of GPU memory: lower --batch_size, add --gradient_checkpointing or --offload")
    except rewards.RewardError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted")


if __name__ == "__main__":
    main()
