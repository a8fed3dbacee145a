"""Flow-GRPO in one file: online reinforcement learning for flow-matching image models (arXiv 2505.05470).

A flow-matching model draws by following an ordinary differential equation from noise to an image. Nothing in
that is random after the first noise, so there is no action whose probability reinforcement learning could
raise. Flow-GRPO's answer, and the order of this file:

  1. The ODE becomes a stochastic differential equation with the same marginals. Each of its Euler steps is
     a Gaussian with a known density: a policy.                                       sde_step
  2. For each prompt a group of images is drawn this way, with few steps (T = 10).     rollout
  3. A reward scores each image; its advantage is how far it is above its own group.   group_advantages
  4. The policy is moved towards the good images, no further than a clip range, and
     held near the model that it started from by a KL penalty.                         update
  5. Nothing random is left for the images that count: the ODE with T = 40.            evaluate

Symbols (diffusers calls t `sigma`, and never names sigma_t)
  t        time: 1 is noise, 0 is data; sampling runs from 1 down to 0, so dt < 0    x_t = (1-t) x_0 + t noise
  x, v     latents, and the velocity dx/dt = noise - data that the network predicts
  sigma_t  how much noise the SDE adds per unit of time, a sqrt(t/(1-t));  a is `noise_level`
  mean, std of the Gaussian step from x_t to x_{t+dt}

Where paper and official code (github.com/yifan123/flow_grpo) disagree, this file follows the code, as the
paper's numbers came from it: log-probabilities are averaged over the latent's dimensions, not summed; the KL
has no dt; advantages are divided by the standard deviation of the whole batch (`--std_over group` for the
paper's). Each is marked PAPER/CODE at its line.

  python flow_grpo.py                                       # a colour reward on the embedded toy model
  python flow_grpo.py --reward ocr                          # teach it to write, judged by a real OCR engine
  python flow_grpo.py --reward ocr --preset sd3.5-medium    # the paper's setting, on GPUs
"""
import argparse
import difflib
import json
import math
import os
import random
import re
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import rewards as reward_library

# ------------------------------------------------------------------------------------------ 1. configuration


def opt(default, why):  # `why` is the comment of the line and its text in --help
    return field(default=default, metadata={"help": why})


@dataclass
class Config:
    # what to train, on what
    preset: str = opt("toy", "a set of defaults: toy or sd3.5-medium; other options override it")
    reward: str = opt("flow_grpo:redness", 'a name of rewards.py, your own "file:function", or a weighted sum "ocr:1,jpeg_compressibility:0.1"')
    model: str = opt("toy", "folder or hub name of a StableDiffusion3Pipeline")
    dataset: str = opt("", "folder with train.txt and test.txt, or {train,test}_metadata.jsonl; default: toy/ocr for ocr, else toy/geneval")
    resolution: int = opt(48, "height and width of the images in pixels")
    max_sequence_length: int = opt(14, "tokens of the T5 encoder; SD3.5's official training used 128")
    precision: str = opt("fp32", "of the network: fp32, or bf16 (half the memory, faster on GPUs); the mathematics stays float32")
    # the run
    name: str = opt("", "folder under runs/; default: the reward's name, numbered if taken")
    resume: bool = opt(False, "continue the run --name (default: the newest run of this reward) with its own options")
    seed: int = opt(0, "of everything random; same seed, same machine: same run")
    epochs: int = opt(30, "one epoch = sample, score, update; 0 only evaluates the base model")
    eval_every: int = opt(10, "epochs between evaluations, which also happen before the first epoch and after the last")
    save_every: int = opt(5, "epochs between checkpoints; one is also written after the last")
    # sampling
    groups: int = opt(8, "prompts an epoch; more make the gradient less noisy and the epoch longer")
    group_size: int = opt(16, "images of each prompt; under 12 the paper saw training collapse")
    train_steps: int = opt(10, "T while training: few steps are enough to tell good from bad (denoising reduction)")
    eval_steps: int = opt(40, "T of the evaluation")
    noise_level: float = opt(0.7, "a in sigma_t: less explores too little, more spoils the images")
    window: int = opt(2, "SDE in this many successive steps, at a random place in the noisy half, and only they are trained; 0: SDE in every step but the last, as in the paper")
    guidance: float = opt(2.0, "classifier-free guidance while sampling and training alike; 1 is off and twice as fast")
    # learning
    updates: int = opt(2, "optimizer steps an epoch; only the first is on-policy, the others need the clipping")
    learning_rate: float = opt(1e-3, "of AdamW")
    clip_range: float = opt(1e-2, "epsilon: how far a ratio may leave 1; small, because log-probabilities are averages")
    beta: float = opt(0.0, "weight of the KL to the starting model; more keeps its quality and diversity, slows the reward")
    std_over: str = opt("batch", "divide advantages by the std of the whole batch or of the group")
    lora_rank: int = opt(32, "size of what is trained")
    lora_alpha: int = opt(64, "LoRA's output is scaled by alpha / rank")
    ema_decay: float = opt(0.9, "averages the weights for evaluation and the saved LoRA; 0 is off")
    ema_every: int = opt(1, "updates between two steps of that average")
    batch_size: int = opt(128, "samples in one forward pass; changes memory and speed, not the result")
    # evaluation
    eval_prompts: int = opt(60, "prompts of the test file to evaluate; 0 is all")
    eval_per_prompt: int = opt(2, "images of each, always from the same seeds; 2 or more measure diversity")


PRESETS = {
    "toy": {},
    # The paper's setting: section 5.1 and the official config/grpo.py (general_ocr_sd3). Learning rate, clip range
    # and EMA are printed only there.
    "sd3.5-medium": dict(
        model="stabilityai/stable-diffusion-3.5-medium", dataset="dataset/ocr", resolution=512,
        max_sequence_length=128, precision="bf16", epochs=1000, eval_every=30, save_every=10, groups=48, group_size=24,
        window=0, guidance=4.5, learning_rate=3e-4, clip_range=1e-4, beta=0.04, ema_every=8, batch_size=8,
        eval_prompts=0, eval_per_prompt=1),
}
# The paper's beta belongs to the task: 0.04 for GenEval and OCR, 0.01 for PickScore (section 5.1).


def stop(message):
    """A user's mistake: one line, exit code 2, no traceback."""
    print(f"flow_grpo.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_config(argv=None):
    """Command line -> Config. What an option is not given comes from the preset, or from the run to resume."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=HelpFormatter)
    parser.error = stop
    for f in fields(Config):
        kind = dict(action="store_true") if f.type is bool else dict(type=f.type, metavar=f.type.__name__)
        parser.add_argument("--" + f.name, default=f.default, help=f.metadata["help"].replace("%", "%%"), **kind)

    def parse():
        options, unknown = parser.parse_known_args(argv)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], ["--" + f.name for f in fields(Config)], 1)
            stop(f"unknown option {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; see --help"))
        return Config(**vars(options))

    config = parse()
    if config.preset not in PRESETS:
        stop(f"--preset {config.preset}: choose {' or '.join(PRESETS)}")
    parser.set_defaults(**PRESETS[config.preset])
    if config.resume:
        saved = read_config(run_folder(config))
        parser.set_defaults(**saved, resume=True)
        config = parse()
        for key, value in saved.items():
            if getattr(config, key) != value and key not in MAY_CHANGE:
                stop(f"--{key} {getattr(config, key)}: the run to resume has {value}, and this cannot change on the way")
    config = parse()
    check_config(config)
    return config


MAY_CHANGE = ("epochs", "eval_every", "save_every", "batch_size")  # on resuming


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def check_config(config):
    """Stops with one line for values that cannot work."""
    c = config
    for name in ("group_size", "train_steps", "eval_steps"):
        if getattr(c, name) < 2:
            stop(f"--{name} {getattr(c, name)}: must be 2 or more" +
                 ("; an advantage compares images of the same prompt" if name == "group_size" else ""))
    for name in ("resolution", "groups", "updates", "lora_rank", "ema_every", "batch_size", "eval_every", "save_every",
                 "eval_per_prompt", "max_sequence_length"):
        if getattr(c, name) < 1:
            stop(f"--{name} {getattr(c, name)}: must be 1 or more")
    for name in ("learning_rate", "clip_range", "noise_level"):
        if not getattr(c, name) > 0:
            stop(f"--{name} {getattr(c, name)}: must be above 0")
    for name, choices in (("precision", ("fp32", "bf16")), ("std_over", ("batch", "group"))):
        if getattr(c, name) not in choices:
            stop(f"--{name} {getattr(c, name)}: choose {' or '.join(choices)}")
    if not 0 <= c.window <= c.train_steps // 2:
        stop(f"--window {c.window}: must lie in the noisy half of {c.train_steps} steps: 1 to {c.train_steps // 2}, or 0")
    if c.groups * c.group_size % c.updates:
        stop(f"--updates {c.updates}: must divide the {c.groups * c.group_size} images of an epoch (groups x group_size)")
    if c.epochs < 0 or c.beta < 0:
        stop(f"--epochs {c.epochs}, --beta {c.beta}: must be 0 or more")
    if not 0 <= c.ema_decay < 1:
        stop(f"--ema_decay {c.ema_decay}: must be in [0, 1)")


# -------------------------------------------------------------------------------------------- 2. mathematics
# Pure functions on tensors, always in float32: log-probabilities do not survive half precision.


def sde_noise(t, noise_level):
    """sigma_t of every step, below equation 9. t: the grid [T+1], 1 to 0 -> [T]

    At t = 1 the formula divides by zero; the official code (sd3_sde_with_logprob.py) puts the second grid
    point's t in its denominator.
    """
    now = t[:-1]
    return noise_level * torch.sqrt(now / (1 - torch.where(now == 1, t[1], now)))


def sde_step(x, v, t, dt, sigma, noise=None, x_next=None):
    """One step of the SDE whose marginals are those of the ODE dx = v dt (equation 9): the policy.

    Samples x_next with the given standard normal noise; or, where x_next is given, only rescores it, so that the
    old and the new log-probability come from the same lines.
    x, v, noise, x_next: [B, ...]; t, dt, sigma: [B], dt < 0 -> x_next [B, ...], log_prob [B], mean [B, ...], std [B]
    """
    x, v = x.float(), v.float()
    wide = (-1,) + (1,) * (x.ndim - 1)
    t, dt, sigma = t.view(wide), dt.view(wide), sigma.view(wide)  # [B, 1, ...]
    # Equation 8: the noise that sigma adds is balanced by a drift along the score, -(x + (1-t) v) / t (equation 27).
    drift = v + sigma**2 / (2 * t) * (x + (1 - t) * v)
    mean, std = x + drift * dt, sigma * torch.sqrt(-dt)
    if x_next is None:
        x_next = mean + std * noise
    log_prob = -((x_next - mean) / std) ** 2 / 2 - torch.log(std) - math.log(2 * math.pi) / 2
    # PAPER/CODE: a density would sum over the dimensions; the code averages. With the sum, ratios of 10^5 dimensions
    # overflow. The average is why the clip range is as small as 1e-4.
    return x_next, log_prob.flatten(1).mean(1), mean, std.flatten()


def gaussian_kl(mean, mean_ref, sigma):
    """KL of two SDE steps of equal noise. mean, mean_ref: [B, ...]; sigma: [B] -> [B]

    PAPER/CODE: the paper prints the variance sigma^2 |dt|; the code leaves out dt and averages over the dimensions.
    The paper's beta = 0.04 belongs to the code's form.
    """
    return ((mean - mean_ref) ** 2).flatten(1).mean(1) / (2 * sigma**2)


def group_advantages(rewards, std_over="batch"):
    """How good each image is for its prompt (equation 4). rewards: [groups, group_size] -> the same shape

    PAPER/CODE: the paper divides by the group's std; the code, by default, by that of the whole batch, so that a
    group of nearly equal rewards is not blown up. The 1e-4 and the clamp are the code's (stat_tracking.py, train_sd3.py).
    """
    rewards = rewards.double()
    centred = rewards - rewards.mean(1, keepdim=True)
    centred[rewards.amax(1) == rewards.amin(1)] = 0  # no signal: exactly 0, whatever the mean was rounded to
    std = rewards.std(unbiased=False) if std_over == "batch" else rewards.std(1, unbiased=False, keepdim=True)
    return (centred / (std + 1e-4)).clamp(-5, 5).float()


def clipped_loss(log_prob, log_prob_old, advantages, clip_range):
    """The policy part of equation 5, to be minimised. All [B] -> loss [B], ratio [B]"""
    ratio = torch.exp(log_prob - log_prob_old)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.min(ratio * advantages, clipped * advantages), ratio


# -------------------------------------------------------------------------------------------------- 3. model


@dataclass
class Model:
    pipe: object                     # a StableDiffusion3Pipeline with a LoRA on its transformer
    params: list                     # the LoRA's parameters, all that is trained
    optimizer: torch.optim.Optimizer
    ema: list                        # moving averages of params
    updates: int = 0                 # optimizer steps so far

    @property
    def device(self):
        return self.pipe.transformer.device


def load_model(config):
    """A pipeline with a fresh LoRA on its transformer.

    The toy and SD3.5 take the same path. Only the LoRA is trained and it stays float32; so does the VAE, whose
    half-precision errors a reward would see.
    """
    import diffusers
    import transformers
    from peft import LoraConfig
    for library in (diffusers, transformers):  # they warn of the toy's unusual VAE, and draw bars for reading 5 MB
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = Path(__file__).with_name("toy") if config.model == "toy" else config.model
    try:
        pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError) as error:
        stop(f"--model {config.model}: {str(error).splitlines()[0]}")
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        module.requires_grad_(False).to(device)
    pipe.vae.float()
    torch.manual_seed(config.seed)  # for the LoRA's first values
    pipe.transformer.add_adapter(LoraConfig(  # the official code's eight projections, in each block's joint attention
        r=config.lora_rank, lora_alpha=config.lora_alpha, init_lora_weights="gaussian", target_modules=[
            "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
            "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]))
    params = [p for p in pipe.transformer.parameters() if p.requires_grad]
    for p in params:
        p.data = p.data.float()
    # AdamW's constants are the official config's.
    optimizer = torch.optim.AdamW(params, config.learning_rate, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)
    return Model(pipe, params, optimizer, ema=[p.detach().clone() for p in params])


@torch.no_grad()
def encode(model, config, prompts):
    """Prompts -> embeds [B, n, L, D], pooled [B, n, P]; n = 2 with guidance: the prompt and the empty prompt"""
    def run(texts):
        embeds, _, pooled, _ = model.pipe.encode_prompt(
            texts, None, None, device=model.device, do_classifier_free_guidance=False,
            max_sequence_length=config.max_sequence_length)
        return embeds, pooled
    parts = [run(prompts[i:i + config.batch_size]) for i in range(0, len(prompts), config.batch_size)]
    condition = [torch.cat(part) for part in zip(*parts)]
    if config.guidance != 1:
        condition = [torch.stack([c, e.expand_as(c)], 1) for c, e in zip(condition, run([""]))]
    else:
        condition = [c.unsqueeze(1) for c in condition]
    return condition


def velocity(model, config, x, t, condition):
    """The network, with classifier-free guidance. x: [B, C, H, W], t: [B], condition: see encode -> [B, C, H, W]

    Sampling and training both come through here: the same guidance in both, and gradients through both of its
    branches. Anything else makes the ratio a lie.
    """
    embeds, pooled = condition
    n = embeds.shape[1]
    # Autocast keeps the LoRA's half-precision copies for reuse. Copies made under no_grad would carry no gradient into
    # a later pass, so its cache is off.
    with torch.autocast(x.device.type, torch.bfloat16, enabled=config.precision == "bf16", cache_enabled=False):
        v = model.pipe.transformer(hidden_states=x.repeat_interleave(n, 0).to(embeds.dtype),  # [B * n, C, H, W]
                                   timestep=1000 * t.repeat_interleave(n), encoder_hidden_states=embeds.flatten(0, 1),
                                   pooled_projections=pooled.flatten(0, 1), return_dict=False)[0]
    v = v.float().unflatten(0, (-1, n))  # [B, n, C, H, W]
    return v[:, 0] if n == 1 else v[:, 1] + config.guidance * (v[:, 0] - v[:, 1])


@torch.no_grad()
def decode(pipe, latents):
    """Latents [B, C, H, W] -> PIL images"""
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return pipe.image_processor.postprocess(pipe.vae.decode(latents, return_dict=False)[0], output_type="pil")


# ------------------------------------------------------------------------------------------------ 4. rollout


@dataclass
class Rollout:
    images: list            # B PIL images
    condition: list         # of the distinct prompts, see encode
    which: torch.Tensor     # [B] each image's index among the distinct prompts
    t: torch.Tensor         # [T+1] the time grid
    sigma: torch.Tensor     # [T]
    steps: range            # the K steps that were SDE
    latents: torch.Tensor   # [B, K+1, C, H, W] before the first of these steps and after each
    log_prob: torch.Tensor  # [B, K]


def choose_window(config, rng):
    """Which steps are SDE. Never the last: its sigma_t is next to nothing, so its ratio would explode."""
    if config.window == 0:
        return range(config.train_steps - 1)
    start = rng.randint(0, config.train_steps // 2 - config.window)
    return range(start, start + config.window)


@torch.no_grad()
def rollout(model, config, prompts, seeds, total_steps, steps):
    """Draw one image for each prompt and seed: SDE in `steps`, ODE in the others of `total_steps`.

    Each image has its own generator, so that it does not depend on which others share its batch. Its first draw
    is the initial noise: a stock pipeline given the same seed starts from the same point.
    """
    pipe, device = model.pipe, model.device
    pipe.scheduler.set_timesteps(total_steps, device=device)
    t = pipe.scheduler.sigmas.float()  # with the model's own shift
    sigma, dt = sde_noise(t, config.noise_level), t.diff()
    distinct = list(dict.fromkeys(prompts))
    condition = encode(model, config, distinct)
    which = torch.tensor([distinct.index(p) for p in prompts], device=device)
    side = config.resolution // pipe.vae_scale_factor
    shape = (pipe.transformer.config.in_channels, side, side)
    images, kept, log_probs = [], [], []
    batches = [slice(i, i + config.batch_size) for i in range(0, len(prompts), config.batch_size)]
    for batch in tqdm(batches, desc="sampling", leave=False, disable=len(batches) == 1):
        generators = [torch.Generator().manual_seed(s) for s in seeds[batch]]
        x = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)  # [b, C, H, W]
        path, log_prob = [], []
        for i in range(total_steps):
            now = t[i].expand(len(x))
            v = velocity(model, config, x, now, [c[which[batch]] for c in condition])
            if i in steps:
                noise = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
                path = path or [x]
                x, p, _, _ = sde_step(x, v, now, dt[i].expand(len(x)), sigma[i].expand(len(x)), noise)
                path.append(x)
                log_prob.append(p)
            else:
                x = x + v * dt[i]
        images += decode(pipe, x)
        if path:
            kept.append(torch.stack(path, 1))  # [b, K+1, C, H, W]
            log_probs.append(torch.stack(log_prob, 1))  # [b, K]
    return Rollout(images, condition, which, t, sigma, steps,
                   torch.cat(kept) if kept else None, torch.cat(log_probs) if kept else None)


# ------------------------------------------------------------------------------------------------- 5. update


@contextmanager
def reference(model):
    """The model that training started from: the same one with its LoRA off."""
    model.pipe.transformer.disable_adapters()
    try:
        yield
    finally:
        model.pipe.transformer.enable_adapters()


def update(model, config, batch, advantages, rng):
    """The epoch's optimizer steps, each on its share of the images (equation 5). advantages: [B] -> metrics"""
    K, dt = len(batch.steps), batch.t.diff()
    order = list(range(len(advantages)))
    rng.shuffle(order)
    share = len(order) // config.updates
    seen = []  # of each micro-batch
    grad_norms = []
    for k in range(config.updates):
        # A sample that has no advantage has no policy gradient; without a KL there is nothing to compute for it.
        pairs = [(i, j) for i in order[k * share:(k + 1) * share] for j in range(K) if config.beta or advantages[i] != 0]
        for start in range(0, len(pairs), config.batch_size):
            i, j = torch.tensor(pairs[start:start + config.batch_size], device=batch.which.device).T
            step, condition = batch.steps.start + j, [c[batch.which[i]] for c in batch.condition]
            x, t, sigma, A = batch.latents[i, j], batch.t[step], batch.sigma[step], advantages[i]
            v = velocity(model, config, x, t, condition)
            _, log_prob, mean, _ = sde_step(x, v, t, dt[step], sigma, x_next=batch.latents[i, j + 1])
            policy_loss, ratio = clipped_loss(log_prob, batch.log_prob[i, j], A, config.clip_range)
            if k == 0:
                check_ratio(ratio, config)
            loss, row = policy_loss, dict(policy_loss=policy_loss, ratio=ratio)
            if config.beta or start == 0:  # without the penalty it is still measured, on one micro-batch an update
                with reference(model), torch.no_grad():
                    v_ref = velocity(model, config, x, t, condition)
                row["kl"] = gaussian_kl(mean, sde_step(x, v_ref, t, dt[step], sigma, x_next=x)[2], sigma)
                loss = loss + config.beta * row["kl"]
            (loss.sum() / (share * K)).backward()
            seen.append({key: value.detach() for key, value in row.items()})
        grad_norms.append(torch.nn.utils.clip_grad_norm_(model.params, 1.0).item())  # 1.0: the official config
        if not math.isfinite(grad_norms[-1]):
            stop(f"the gradient of update {k} is {grad_norms[-1]}; the weights were not changed. Try --precision fp32")
        model.optimizer.step()
        model.optimizer.zero_grad()
        model.updates += 1
        ema_step(model, config)
    all_of = lambda key: torch.cat([row[key] for row in seen if key in row] or [torch.ones(1) * math.nan]).cpu()
    ratio = all_of("ratio")
    return dict(policy_loss=all_of("policy_loss").mean().item(), kl=all_of("kl").mean().item(),
                ratio=ratio.mean().item(), ratio_deviation=(ratio - 1).abs().max().item(),
                clip_low=(ratio < 1 - config.clip_range).float().mean().item(),
                clip_high=(ratio > 1 + config.clip_range).float().mean().item(),
                grad_norm=sum(grad_norms) / len(grad_norms))


def check_ratio(ratio, config):
    """Before the first optimizer step, the policy that trains is the one that sampled."""
    deviation = (ratio.detach() - 1).abs().max().item()
    if not deviation <= config.clip_range / 2:
        stop(f"the ratio is off by {deviation:.2g} before the first update, where it must be 1: sampling and training "
             "do not compute the same log-probability (precision, guidance, dropout or a changed rollout)")


def ema_step(model, config):
    """The official decay grows with the number of updates, so that the average is not stuck at the start."""
    if model.updates % config.ema_every == 0:
        n = model.updates // config.ema_every
        decay = min(config.ema_decay, (1 + n) / (10 + n))
        for mean, p in zip(model.ema, model.params):
            mean.lerp_(p.detach(), 1 - decay)


@contextmanager
def averaged(model):
    """Within, the model has the averaged weights."""
    current = [p.detach().clone() for p in model.params]
    for p, mean in zip(model.params, model.ema):
        p.data.copy_(mean)
    try:
        yield
    finally:
        for p, value in zip(model.params, current):
            p.data.copy_(value)


# --------------------------------------------------------------------------------------------- 6. evaluation


def evaluate(model, config, scorer, test, folder, epoch):
    """Draw the test prompts by the ODE with the averaged weights, from the same seeds every time -> metrics

    Image j of test prompt i has the seed i * eval_per_prompt + j. Accuracy is the share of images whose (first)
    reward is 1, the most that OCR and GenEval give: the whole word was read, every object is as asked.
    """
    rows = [row for row in test[:config.eval_prompts or None] for _ in range(config.eval_per_prompt)]
    prompts, metadata = zip(*rows)
    with averaged(model):
        images = rollout(model, config, prompts, range(len(rows)), config.eval_steps, range(0)).images
    scores = scorer(images, prompts, metadata)
    right = np.array(next(iter(scores.values()))) >= 1
    metrics = dict(eval_reward=np.mean(scores["reward"]), eval_accuracy=right.mean(),
                   eval_diversity=diversity(images, config.eval_per_prompt))
    tags = np.array([m.get("tag", "") for m in metadata])  # GenEval's sub-tasks
    metrics |= {f"eval_accuracy/{tag}": right[tags == tag].mean() for tag in sorted(set(tags) - {""})}
    draw_grid(images, prompts, scores["reward"], config.eval_per_prompt, folder / f"samples/{epoch:04d}.png")
    return metrics


def diversity(images, per_prompt):
    """Mean distance between two images of the same prompt: the root mean square of pixel differences, 0 to 1."""
    pixels = torch.stack([torch.from_numpy(np.asarray(image, np.float32).ravel() / 255) for image in images])
    return np.mean([torch.pdist(group).mean().item() / pixels.shape[1] ** 0.5 for group in pixels.split(per_prompt)])


def draw_grid(images, prompts, scores, per_prompt, path, columns=8, rows=4, cell=150):
    """The first prompts' first images, each over its prompt and score."""
    font = ImageFont.load_default(11)
    grid = Image.new("RGB", (columns * cell, rows * (cell + 28)), "white")
    draw = ImageDraw.Draw(grid)
    for k, (image, prompt, score) in enumerate(list(zip(images, prompts, scores))[::per_prompt][:columns * rows]):
        x, y = k % columns * cell, k // columns * (cell + 28)
        grid.paste(image.resize((cell - 6, cell - 6), Image.LANCZOS), (x + 3, y))
        text = prompt if len(prompt) < 27 else prompt[:24] + "..."
        draw.text((x + 4, y + cell - 5), f"{text}\n{score:.2f}", font=font, fill="black", spacing=1)
    path.parent.mkdir(exist_ok=True)
    grid.save(path)


def draw_before_after(folder, epoch):
    """The first and the last sample grid in one picture."""
    before, after = (Image.open(folder / f"samples/{e:04d}.png") for e in (0, epoch))
    both = Image.new("RGB", (before.width, before.height + after.height + 60), "white")
    draw, font = ImageDraw.Draw(both), ImageFont.load_default(20)
    for y, title, grid in ((0, "before", before), (before.height + 30, f"after {epoch} epochs", after)):
        draw.text((4, y + 2), title, font=font, fill="black")
        both.paste(grid, (0, y + 30))
    both.save(folder / "before_after.png")


def draw_curve(folder):
    """metrics.jsonl -> curve.png"""
    import matplotlib.figure  # without pyplot: no window, no global state
    rows = read_metrics(folder)
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("reward", "training reward (SDE)", "-"), ("eval_reward", "evaluation reward (ODE)", "o-"),
                              ("eval_accuracy", "evaluation accuracy (ODE)", "s-")):
        points = [(row["epoch"], row[key]) for row in rows if key in row]
        axes.plot([x for x, _ in points], [y for _, y in points], style, label=label)
    axes.set(xlabel="epoch", title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "curve.png", dpi=110)


# ------------------------------------------------------------------------------------------ 7. what a run writes


def run_folder(config):
    """runs/<name>. Without --name: the first free of ocr, ocr-2, ... or, to resume, the last of them."""
    base = config.name or re.sub(r"[^\w.-]+", "-", config.reward)
    folders = [Path("runs") / (base if n == 1 else f"{base}-{n}") for n in range(1, 2 if config.name else 1000)]
    taken = [folder for folder in folders if folder.exists()]
    if config.resume:
        if not taken or not (taken[-1] / "config.json").exists():
            stop(f"--resume: {folders[0]} holds no run to continue")
        return taken[-1]
    if config.name and taken:
        stop(f"--name {config.name}: {taken[0]} exists; choose another name, or add --resume to continue it")
    return next(folder for folder in folders if folder not in taken)


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def read_metrics(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write(path, text):
    """Under another name first, then renamed: a run killed here leaves the last good file."""
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)


def save(model, folder, epoch):
    """Everything that a later epoch depends on, and the averaged LoRA in diffusers' format.

    Prompts, windows and noise are drawn anew from (seed, epoch), so no generator's state is among it.
    """
    from peft import get_peft_model_state_dict
    tensors = {}
    for i, (p, mean) in enumerate(zip(model.params, model.ema)):
        tensors |= {f"lora.{i}": p.detach().contiguous(), f"ema.{i}": mean.contiguous()}
        tensors |= {f"optimizer.{i}.{key}": value.contiguous() for key, value in model.optimizer.state[p].items()}
    path = folder / "checkpoint/state.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path.with_suffix(".tmp"), metadata=dict(epoch=str(epoch), updates=str(model.updates)))
    os.replace(path.with_suffix(".tmp"), path)
    with averaged(model):
        # The adapter's settings go with it: without lora_alpha diffusers would scale it by 1, not by alpha / rank.
        model.pipe.save_lora_weights(
            folder, get_peft_model_state_dict(model.pipe.transformer), weight_name="lora.tmp.safetensors",
            transformer_lora_adapter_metadata=model.pipe.transformer.peft_config["default"].to_dict())
    os.replace(folder / "lora.tmp.safetensors", folder / "pytorch_lora_weights.safetensors")


def load(model, folder):
    """Put a checkpoint back -> the epoch to go on with; 0 where there is none yet."""
    path = folder / "checkpoint/state.safetensors"
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        for key in file.keys():
            kind, i, *rest = key.split(".")
            p, value = model.params[int(i)], file.get_tensor(key)
            if kind == "optimizer":
                model.optimizer.state[p][rest[0]] = value if rest[0] == "step" else value.to(p.device)
            else:
                (p.data if kind == "lora" else model.ema[int(i)]).copy_(value)
        model.updates = int(file.metadata()["updates"])
        return int(file.metadata()["epoch"])


# --------------------------------------------------------------------------------------- 8. rewards and the loop


def load_prompts(config, split):
    """The dataset's prompts as [(prompt, metadata)]; both layouts of the official repository."""
    toy = Path(__file__).with_name("toy")
    folder = Path(config.dataset or toy / ("ocr" if config.reward.startswith("ocr") else "geneval"))
    text, rows = folder / f"{split}.txt", folder / f"{split}_metadata.jsonl"
    if text.exists():
        prompts = [(line.strip(), {}) for line in text.read_text().splitlines() if line.strip()]
    elif rows.exists():
        prompts = [(row["prompt"], row) for row in map(json.loads, rows.read_text().splitlines())]
    else:
        stop(f"--dataset {folder}: has neither {text.name} nor {rows.name}")
    if not prompts:
        stop(f"--dataset {folder}: no prompts for {split}")
    return prompts


def redness(images, prompts, metadata):
    """The toy reward: how much more red than green and blue an image is, -1 to 1. Yours can be as simple as this."""
    means = [np.asarray(image, float).mean((0, 1)) / 255 for image in images]
    return [r - (g + b) / 2 for r, g, b in means]


def train_epoch(model, config, scorer, train_set, epoch):
    """Sample, score, update -> metrics. All of an epoch's randomness comes from (seed, epoch)."""
    rng, clock = random.Random(f"{config.seed}/{epoch}"), [time.time()]
    repeats = -(-config.groups // len(train_set))  # more than 1 only for a data set smaller than one epoch
    chosen = rng.sample(train_set * repeats, config.groups)
    prompts, metadata = zip(*[row for row in chosen for _ in range(config.group_size)])
    seeds = [rng.getrandbits(60) for _ in prompts]  # members of a group differ from their first noise on
    batch = rollout(model, config, prompts, seeds, config.train_steps, choose_window(config, rng))
    clock.append(time.time())

    scores = scorer(batch.images, prompts, metadata)
    rewards = torch.tensor(scores["reward"]).view(config.groups, config.group_size)
    advantages = group_advantages(rewards, config.std_over)
    clock.append(time.time())

    metrics = update(model, config, batch, advantages.flatten().to(model.device), rng)
    clock.append(time.time())
    metrics |= dict(reward=rewards.mean().item(), reward_std=rewards.std().item(), group_std=rewards.std(1).mean().item(),
                    no_signal=(rewards.amax(1) == rewards.amin(1)).float().mean().item())
    if len(scores) > 2:  # a sum: each of its parts
        metrics |= {f"reward/{name}": np.mean(values) for name, values in scores.items() if name != "reward"}
    return metrics | {f"seconds_{name}": end - begin for name, begin, end
                      in zip(("sampling", "reward", "update"), clock, clock[1:])}


def train(config):
    folder = run_folder(config)
    config.name = folder.name
    train_set, test_set = load_prompts(config, "train"), load_prompts(config, "test")
    rewards = reward_library.load(config.reward)
    scorer = lambda images, prompts, metadata: reward_library.score(rewards, images, prompts, metadata)
    model = load_model(config)
    folder.mkdir(parents=True, exist_ok=True)
    start = load(model, folder) if config.resume else 0
    write(folder / "config.json", json.dumps(asdict(config), indent=1))
    rows = [row for row in read_metrics(folder) if row["epoch"] < start]
    trained = len(choose_window(config, random.Random(0)))
    print(f"{folder}: {config.groups} groups x {config.group_size} = {config.groups * config.group_size} images an epoch, "
          f"{trained} of {config.train_steps} steps trained, {config.updates} updates; "
          f"LoRA of {sum(p.numel() for p in model.params):,} parameters on {model.device}")

    bar = tqdm(initial=start, total=config.epochs, unit="epoch")
    for epoch in range(start, config.epochs + 1):
        row, last = {"epoch": epoch}, epoch == config.epochs
        if last or epoch % config.eval_every == 0:
            row |= evaluate(model, config, scorer, test_set, folder, epoch)
            bar.write(", ".join(f"{key} {value:.3g}" for key, value in row.items()))
        if not last:
            row |= train_epoch(model, config, scorer, train_set, epoch)
            bar.set_postfix_str("reward {reward:.3f}, kl {kl:.2g}, clipped {clip_low:.0%} {clip_high:.0%}".format(**row))
            bar.update()
        rows.append({key: float(value) for key, value in row.items()} | {"epoch": epoch})
        write(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        if last or (epoch + 1) % config.save_every == 0:
            save(model, folder, min(epoch + 1, config.epochs))
    bar.close()
    draw_curve(folder)
    draw_before_after(folder, config.epochs)
    print(f"look at {folder / 'before_after.png'} and {folder / 'curve.png'}")


def main(argv=None):
    try:
        train(parse_config(argv))
    except reward_library.RewardError as error:
        stop(str(error))


if __name__ == "__main__":
    main()
