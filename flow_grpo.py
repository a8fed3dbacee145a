"""Flow-GRPO in one file: online reinforcement learning for flow-matching image models (arXiv 2505.05470).

A flow-matching model draws by following an ordinary differential equation from noise to an image. Nothing in
that is random after the first noise, so there is no action whose probability reinforcement learning could
raise. Flow-GRPO's answer:

  sde_step          The ODE becomes a stochastic differential equation with the same marginals. Each of its Euler
                    steps is a Gaussian with a known density: a policy.
  rollout           For each prompt a group of images is drawn this way, in few steps (T = 10).
  group_advantages  A reward scores each image. Its advantage is how far it is above its own group.
  update            The policy moves towards the good images, no further than a clip range, and held near the
                    model that it started from by a KL penalty.
  evaluate          The images that count are drawn by the ODE again, with T = 40.

Symbols (diffusers calls t `sigma` and has no name for sigma_t)
  t          time: 1 is noise, 0 is data, x_t = (1-t) x_0 + t noise; sampling runs from 1 to 0, so dt < 0
  x, v       latents, and the velocity dx/dt = noise - data, which the network predicts
  sigma_t    how much noise the SDE adds, a sqrt(t/(1-t)); a is `noise_level`; `sigma` in the code
  mean, std  of the Gaussian step from x_t to x_{t+dt}

Where paper and official code (github.com/yifan123/flow_grpo) disagree this file follows the code, as the paper's
numbers came from it: log-probabilities are averaged over the latent's dimensions, not summed; the KL has no dt;
advantages are divided by the standard deviation of the whole batch (the paper's: --std_over group); the last step is
not trained. Each is marked PAPER/CODE at its line. In the paper all steps are stochastic (--window 0); by default
here only two are, at a random place, which is the authors' later and faster Flow-GRPO-Fast.

  python flow_grpo.py                                       # a colour reward on the embedded toy model
  python flow_grpo.py --reward ocr                          # teach it to write, judged by a real OCR engine
  python flow_grpo.py --reward ocr --preset sd3.5-medium    # the paper's setting, on a GPU
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


def opt(default, why, least=None, choices=None):
    """An option: its default, what it does (the comment of its line and its text in --help), the values that work."""
    return field(default=default, metadata=dict(why=why, least=least, choices=choices))


@dataclass
class Config:
    # what to train, on what
    preset: str = opt("toy", "a set of defaults; other options override it", choices=("toy", "sd3.5-medium"))
    reward: str = opt("flow_grpo:redness", 'a name in rewards.py, your own "file:function", or a sum "ocr:1,jpeg_compressibility:0.1"')
    model: str = opt("toy", "folder or hub name of a StableDiffusion3Pipeline")
    dataset: str = opt("", "folder of train.txt and test.txt, or {train,test}_metadata.jsonl; by default toy/ocr for ocr, else toy/geneval")
    resolution: int = opt(48, "height and width of the images in pixels", least=8)
    max_sequence_length: int = opt(14, "tokens of the T5 encoder; the official SD3.5 runs used 128", least=1)
    precision: str = opt("fp32", "of the network: bf16 takes half the memory; the mathematics stays float32", choices=("fp32", "bf16"))
    # the run
    name: str = opt("", "folder under runs/; default: the reward's name, numbered if taken")
    resume: bool = opt(False, "continue the run --name (default: the newest of this reward) with its own options")
    seed: int = opt(0, "of everything random: same seed, same machine, same run")
    epochs: int = opt(24, "one epoch = sample, score, update; 0 only evaluates the model as it is", least=0)
    eval_every: int = opt(8, "epochs between evaluations; there is always one before the first epoch and after the last", least=1)
    save_every: int = opt(5, "epochs between checkpoints; there is always one after the last", least=1)
    # sampling
    groups: int = opt(8, "prompts an epoch; more make the gradient less noisy and the epoch longer", least=1)
    group_size: int = opt(16, "images of each prompt, compared with each other; the paper saw 6 and 12 collapse", least=2)
    train_steps: int = opt(10, "T while training: few steps are enough to tell good from bad (denoising reduction)", least=2)
    eval_steps: int = opt(40, "T of the evaluation", least=2)
    noise_level: float = opt(0.7, "a in sigma_t: too little explores nothing, too much spoils the images", least=1e-6)
    window: int = opt(2, "SDE in so many successive steps at a random place in the noisy half, only they are trained; 0: in all but the last", least=0)
    guidance: float = opt(1.2, "classifier-free guidance, in sampling and training alike; 1 is off and twice as fast", least=1)
    # learning
    updates: int = opt(2, "optimizer steps an epoch; the first is on-policy, the others need the clipping", least=1)
    learning_rate: float = opt(1e-3, "of AdamW", least=1e-12)
    clip_range: float = opt(1e-3, "epsilon: how far a ratio may leave 1; small, because log-probabilities are averages", least=1e-12)
    beta: float = opt(0.3, "weight of the KL to the model as it was: more keeps its quality and diversity, and slows the reward", least=0)
    std_over: str = opt("batch", "whose standard deviation divides the advantages", choices=("batch", "group"))
    lora_rank: int = opt(32, "size of what is trained", least=1)
    lora_alpha: int = opt(64, "the LoRA's output is scaled by alpha / rank", least=1)
    ema_decay: float = opt(0.9, "of the averaged weights that are evaluated and saved; 0 is off", least=0)
    ema_every: int = opt(1, "updates between two steps of that average", least=1)
    batch_size: int = opt(64, "samples in one forward pass: memory and speed, and the result only in its rounding", least=1)
    # evaluation
    eval_prompts: int = opt(60, "so many prompts of the test file; 0 is all", least=0)
    eval_per_prompt: int = opt(2, "images of each, from the same seeds every time; from 2 on they measure diversity", least=1)


PRESETS = {
    "toy": {},
    # The paper's setting: section 5.1 and, for learning rate, clip range and EMA, the official config/grpo.py, the
    # only place that prints them. 0.04 is the paper's beta for GenEval and OCR; for PickScore it is 0.01.
    "sd3.5-medium": dict(
        model="stabilityai/stable-diffusion-3.5-medium", resolution=512, max_sequence_length=128, precision="bf16",
        epochs=1000, eval_every=30, save_every=10, groups=48, group_size=24, window=0, guidance=4.5, learning_rate=3e-4,
        clip_range=1e-4, beta=0.04, ema_every=8, batch_size=8, eval_prompts=0, eval_per_prompt=1),
}
MAY_CHANGE = ("resume", "epochs", "eval_every", "save_every", "batch_size")  # when a run is resumed


def stop(message):
    """A user's mistake: one line, exit code 2, no traceback."""
    print(f"flow_grpo.py: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_config(argv=None):
    """Command line -> Config. Options that are not given come from the preset, or from the run to resume."""
    parser = argparse.ArgumentParser(description=__doc__, usage="python flow_grpo.py [--option value ...]",
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop
    for f in fields(Config):
        kind = dict(action="store_true") if f.type is bool else dict(type=f.type, metavar=f.type.__name__)
        notes = [" or ".join(f.metadata["choices"] or ()), f"default: {f.default}" if f.default != "" else ""]
        text = f"{f.metadata['why']} ({'; '.join(filter(None, notes))})".replace("%", "%%").removesuffix(" ()")
        parser.add_argument("--" + f.name, default=f.default, help=text, **kind)

    def parse():
        options, unknown = parser.parse_known_args(argv)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], ["--" + f.name for f in fields(Config)], 1)
            stop(f"unknown option {unknown[0]}; " + (f"did you mean {near[0]}?" if near else "see --help"))
        return Config(**vars(options))

    config = parse()
    parser.set_defaults(**PRESETS.get(config.preset, {}))
    saved = json.loads((run_folder(config) / "config.json").read_text()) if config.resume else {}
    parser.set_defaults(**saved)
    config = parse()
    check_config(config)
    for key, value in saved.items():
        if getattr(config, key) != value and key not in MAY_CHANGE:
            stop(f"--{key} {getattr(config, key)}: the run to resume has {value}, which cannot change on the way")
    return config


def check_config(config):
    """Stops with one line for values that cannot work."""
    for f in fields(Config):
        value, least, choices = getattr(config, f.name), f.metadata["least"], f.metadata["choices"]
        if choices and value not in choices:
            stop(f"--{f.name} {value}: choose {' or '.join(choices)}")
        if least is not None and not value >= least:  # "not >=": so that nan does not pass
            stop(f"--{f.name} {value}: must be {least} or more")
    c = config
    if c.window > c.train_steps // 2:
        stop(f"--window {c.window}: must fit in the noisy half of {c.train_steps} steps: 1 to {c.train_steps // 2}, or 0")
    if c.groups * c.group_size % c.updates:
        stop(f"--updates {c.updates}: must divide the {c.groups * c.group_size} images of an epoch (groups x group_size)")
    if c.ema_decay >= 1:
        stop(f"--ema_decay {c.ema_decay}: must be below 1")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        stop(f"WORLD_SIZE {os.environ['WORLD_SIZE']}: this script runs as one process; start it with python")


# -------------------------------------------------------------------------------------------- 2. mathematics
# Pure functions on tensors. All of it is float32, whatever the network computes in: a ratio is the exponential of a
# difference of log-probabilities, and half precision would leave nothing of it.


def sde_noise(t, noise_level):
    """sigma_t of every step, below equation 9. t: the grid [T+1] from 1 to 0 -> [T]

    At t = 1 the formula divides by zero. There the official code (sd3_sde_with_logprob.py) puts the second grid
    point's t in the denominator.
    """
    now = t[:-1]
    return noise_level * torch.sqrt(now / (1 - torch.where(now == 1, t[1], now)))


def sde_mean(x, v, t, dt, sigma):
    """Where a step of the SDE goes on average. x, v: [B, ...]; t, dt, sigma: [B], dt < 0 -> [B, ...]

    Equation 9, without its noise. To keep the marginals of the ODE dx = v dt, the noise is balanced by a drift
    towards more likely x: along the score, which is -(x + (1-t) v) / t (equation 27).
    """
    x, v = x.float(), v.float()
    t, dt, sigma = (a.view(-1, *[1] * (x.ndim - 1)) for a in (t, dt, sigma))  # [B, 1, ...]
    return x + (v + sigma**2 / (2 * t) * (x + (1 - t) * v)) * dt


def sde_step(x, v, t, dt, sigma, noise=None, x_next=None):
    """One step of the SDE: the policy. Arguments as sde_mean -> x_next [B, ...], log_prob [B], mean [B, ...]

    Draws x_next with the given standard normal noise [B, ...]; or, where x_next is given, only computes its
    log-probability, so that old and new log-probabilities come from the same lines.
    """
    mean = sde_mean(x, v, t, dt, sigma)
    std = (sigma * torch.sqrt(-dt)).view(-1, *[1] * (x.ndim - 1))  # [B, 1, ...]
    if x_next is None:
        x_next = mean + std * noise
    log_density = -((x_next - mean) / std) ** 2 / 2 - torch.log(std) - math.log(2 * math.pi) / 2
    # PAPER/CODE: a log-density is a sum over the dimensions; the code averages. A ratio of sums would overflow with
    # 10^5 dimensions. With averages it stays within thousandths of 1, and so the clip range is that small.
    return x_next, log_density.flatten(1).mean(1), mean


def gaussian_kl(mean, mean_ref, sigma):
    """KL between two SDE steps that differ in their means. mean, mean_ref: [B, ...]; sigma: [B] -> [B]

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
    pipe: object                      # a StableDiffusion3Pipeline with a LoRA on its transformer
    params: list                      # the LoRA's parameters: all that is trained, in float32
    optimizer: torch.optim.Optimizer
    ema: list                         # moving averages of params
    empty: list                       # the empty prompt's condition, for guidance
    updates: int = 0                  # optimizer steps so far

    @property
    def device(self):
        return self.pipe.transformer.device


def load_model(config):
    """A pipeline with a fresh LoRA on its transformer; the toy and SD3.5 take the same path."""
    import diffusers
    import transformers
    from peft import LoraConfig
    for library in (diffusers, transformers):  # they warn of the toy's unusual VAE, and draw bars for reading 5 MB
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    source = Path(__file__).with_name("toy") if config.model == "toy" else config.model
    try:  # the VAE stays float32: a reward would see its rounding
        pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(source, dtype={"vae": torch.float32, "default": dtype})
    except (OSError, ValueError) as error:
        stop(f"--model {config.model}: cannot be loaded ({str(error).strip().splitlines()[0]}); is the name right, the "
             "licence accepted and the hub reachable?")
    multiple = pipe.vae_scale_factor * pipe.transformer.config.patch_size
    if config.resolution % multiple:
        stop(f"--resolution {config.resolution}: must be a multiple of {multiple}")
    for module in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.text_encoder_3):
        module.requires_grad_(False).to(device)
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
    return Model(pipe, params, optimizer, [p.detach().clone() for p in params], encode(pipe, config, [""]))


@torch.no_grad()
def encode(pipe, config, prompts):
    """Prompts -> their condition: embeds [B, L, D], pooled [B, P]"""
    parts = [pipe.encode_prompt(prompts[i:i + config.batch_size], None, None, device=pipe.transformer.device,
                                do_classifier_free_guidance=False, max_sequence_length=config.max_sequence_length)
             for i in range(0, len(prompts), config.batch_size)]
    return [torch.cat([part[k] for part in parts]) for k in (0, 2)]  # 1 and 3 would be the negative prompt's


def velocity(model, config, x, t, condition):
    """The network, with classifier-free guidance. x: [B, C, H, W], t: [B] -> v [B, C, H, W], float32

    Sampling and training both come through here: the same guidance in both, and gradients through both of its
    branches. Otherwise the ratio would compare two different policies.
    """
    embeds, pooled = condition
    guided = config.guidance != 1
    if guided:
        x, t = torch.cat([x, x]), torch.cat([t, t])  # [2B, C, H, W], [2B]
        embeds, pooled = (torch.cat([c, e.expand_as(c)]) for c, e in zip(condition, model.empty))
    # Autocast's cache would keep the LoRA's half-precision copies; copies made under no_grad carry no gradient into
    # a later pass. So: no cache.
    with torch.autocast(x.device.type, torch.bfloat16, enabled=config.precision == "bf16", cache_enabled=False):
        v = model.pipe.transformer(hidden_states=x.to(embeds.dtype), timestep=1000 * t, encoder_hidden_states=embeds,
                                   pooled_projections=pooled, return_dict=False)[0].float()
    if guided:
        v, v_empty = v.chunk(2)
        v = v_empty + config.guidance * (v - v_empty)
    return v


@torch.no_grad()
def decode(pipe, latents):
    """Latents [B, C, H, W] -> PIL images"""
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return pipe.image_processor.postprocess(pipe.vae.decode(latents, return_dict=False)[0], output_type="pil")


# ------------------------------------------------------------------------------------------------ 4. rollout


@dataclass
class Rollout:
    images: list                # B PIL images
    condition: list             # of the distinct prompts: embeds, pooled
    prompt_index: torch.Tensor  # [B] each image's place among the distinct prompts
    t: torch.Tensor             # [T+1] the time grid
    sigma: torch.Tensor         # [T]
    sde_steps: range            # K successive steps
    latents: torch.Tensor       # [B, K+1, C, H, W] before the first SDE step and after each; None if K is 0
    log_prob: torch.Tensor      # [B, K]


def choose_sde_steps(config, rng):
    """All but the last step, or a random window in the noisy half.

    PAPER/CODE: the paper trains every step; the code leaves out the last, whose sigma_t is next to nothing and whose
    ratio would explode.
    """
    if config.window == 0:
        return range(config.train_steps - 1)
    start = rng.randint(0, config.train_steps // 2 - config.window)
    return range(start, start + config.window)


@torch.no_grad()
def rollout(model, config, prompts, seeds, T, sde_steps):
    """Draw an image for each prompt and seed in T steps: SDE in `sde_steps`, ODE in the others.

    Each image has its own generator: it does not depend on the others in its batch. The first draw is the initial
    noise, so a stock float32 pipeline given a CPU generator with that seed starts from the same point.
    """
    pipe, device = model.pipe, model.device
    pipe.scheduler.set_timesteps(T, device=device)
    t = pipe.scheduler.sigmas.float()  # already shifted as the model wants it
    sigma, dt = sde_noise(t, config.noise_level), t.diff()
    distinct = list(dict.fromkeys(prompts))
    condition = encode(pipe, config, distinct)
    prompt_index = torch.tensor([distinct.index(p) for p in prompts], device=device)
    side = config.resolution // pipe.vae_scale_factor
    shape = (pipe.transformer.config.in_channels, side, side)
    normal = lambda generators: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

    images, latents, log_probs = [], [], []
    starts = range(0, len(prompts), config.batch_size)
    with tqdm(total=len(starts) * T, desc="sampling", unit="step", leave=False) as bar:
        for start in starts:
            micro = slice(start, start + config.batch_size)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[micro]]
            x = normal(generators)  # [b, C, H, W]
            path, path_log_prob = [x], []
            for i in range(T):
                now = t[i].expand(len(x))
                v = velocity(model, config, x, now, [c[prompt_index[micro]] for c in condition])
                if i in sde_steps:
                    path = path if path_log_prob else [x]
                    x, log_prob, _ = sde_step(x, v, now, dt[i].expand(len(x)), sigma[i].expand(len(x)), normal(generators))
                    path.append(x)
                    path_log_prob.append(log_prob)
                else:
                    x = x + v * dt[i]
                bar.update()
            images += decode(pipe, x)
            if sde_steps:
                latents.append(torch.stack(path, 1))  # [b, K+1, C, H, W]
                log_probs.append(torch.stack(path_log_prob, 1))  # [b, K]
    return Rollout(images, condition, prompt_index, t, sigma, sde_steps,
                   torch.cat(latents) if latents else None, torch.cat(log_probs) if latents else None)


# ------------------------------------------------------------------------------------------------- 5. update


def update(model, config, drawn, advantages, rng):
    """The epoch's optimizer steps, each on its share of the images. drawn: Rollout, advantages: [B] -> metrics"""
    K, dt = len(drawn.sde_steps), drawn.t.diff()
    order = rng.sample(range(len(advantages)), len(advantages))
    share = len(order) // config.updates
    rows, grad_norms = [], []
    for k in range(config.updates):
        pairs = [(image, step) for image in order[k * share:(k + 1) * share] for step in range(K)]
        if not config.beta:
            # Without advantage there is no policy gradient, and without a KL nothing else to compute. Such pairs only
            # fill the last micro-batch: in another size it would take other kernels, and round differently.
            pairs.sort(key=lambda pair: advantages[pair[0]].item() == 0)
            signal = sum(advantages[image].item() != 0 for image, _ in pairs)
            pairs = pairs[:math.ceil(signal / config.batch_size) * config.batch_size]
        for start in range(0, len(pairs), config.batch_size):
            image, step = torch.tensor(pairs[start:start + config.batch_size], device=model.device).T  # [b], [b]
            i, condition = drawn.sde_steps.start + step, [c[drawn.prompt_index[image]] for c in drawn.condition]
            x, t, sigma = drawn.latents[image, step], drawn.t[i], drawn.sigma[i]
            v = velocity(model, config, x, t, condition)
            _, log_prob, mean = sde_step(x, v, t, dt[i], sigma, x_next=drawn.latents[image, step + 1])
            policy_loss, ratio = clipped_loss(log_prob, drawn.log_prob[image, step], advantages[image], config.clip_range)
            if k == 0:
                check_ratio(ratio.detach(), config)
            loss, row = policy_loss, dict(policy_loss=policy_loss.detach(), ratio=ratio.detach())
            if config.beta or start == 0:  # without the penalty it is still measured, on one micro-batch an update
                model.pipe.transformer.disable_adapters()  # the reference is the same model without its LoRA
                with torch.no_grad():
                    v_ref = velocity(model, config, x, t, condition)
                model.pipe.transformer.enable_adapters()
                kl = gaussian_kl(mean, sde_mean(x, v_ref, t, dt[i], sigma), sigma)
                loss, row["kl"] = loss + config.beta * kl, kl.detach()
            (loss.sum() / (share * K)).backward()  # equation 5: the mean over images and steps
            rows.append(row)
        grad_norms.append(torch.nn.utils.clip_grad_norm_(model.params, 1.0).item())  # 1.0: the official config
        if not math.isfinite(grad_norms[-1]):
            stop(f"the gradient of the epoch's update {k + 1} is {grad_norms[-1]}; the last checkpoint is from before it")
        model.optimizer.step()
        model.optimizer.zero_grad()
        model.updates += 1
        ema_step(model, config)
    join = lambda key: torch.cat([row[key] for row in rows if key in row] or [torch.tensor([math.nan])]).cpu()
    ratio = join("ratio")
    return dict(policy_loss=join("policy_loss").mean(), kl=join("kl").mean(), ratio=ratio.mean(),
                ratio_deviation=(ratio - 1).abs().max(), clip_low=(ratio < 1 - config.clip_range).float().mean(),
                clip_high=(ratio > 1 + config.clip_range).float().mean(), grad_norm=sum(grad_norms) / len(grad_norms))


def check_ratio(ratio, config):
    """Before the first optimizer step the policy is still the one that sampled, so each ratio is 1 up to rounding."""
    deviation, rounding = (ratio - 1).abs().max().item(), 1e-4 if config.precision == "fp32" else config.clip_range
    if not deviation <= rounding:
        stop(f"the ratio is off by {deviation:.2g} before the first update, where it must be 1: sampling and training "
             "do not compute the same log-probability (precision, guidance, dropout, or a changed rollout)")


def ema_step(model, config):
    """The decay grows with the number of updates, so that the average is not stuck at the start (official ema.py)."""
    if model.updates % config.ema_every == 0:
        decay = min(config.ema_decay, (1 + model.updates) / (10 + model.updates))
        for mean, p in zip(model.ema, model.params):
            mean.lerp_(p.detach(), 1 - decay)


def swap_ema(model):
    """Exchange weights and averaged weights; a second call puts them back."""
    for mean, p in zip(model.ema, model.params):
        p.data, mean.data = mean.data, p.data


# --------------------------------------------------------------------------------------------- 6. evaluation


def evaluate(model, config, scorer, test, folder, epoch):
    """Draw the test prompts by the ODE with the averaged weights, from the same seeds every time -> metrics

    Image j of test prompt i has the seed i * eval_per_prompt + j. Accuracy is the share of images whose (first)
    reward is 1, the most that OCR and GenEval give: the whole word was read, every object is as asked.
    """
    rows = [row for row in test[:config.eval_prompts or None] for _ in range(config.eval_per_prompt)]
    prompts, metadata = zip(*rows)
    swap_ema(model)
    images = rollout(model, config, prompts, range(len(rows)), config.eval_steps, range(0)).images
    swap_ema(model)
    scores = scorer(images, prompts, metadata)
    right = np.array(next(iter(scores.values()))) >= 1
    metrics = dict(eval_reward=np.mean(scores["reward"]), eval_accuracy=right.mean(),
                   eval_diversity=diversity(images, config.eval_per_prompt))
    tags = np.array([m.get("tag", "") for m in metadata])  # GenEval's tasks
    metrics |= {f"eval_accuracy/{tag}": right[tags == tag].mean() for tag in sorted(set(tags) - {""})}
    draw_grid(images, prompts, scores["reward"], config.eval_per_prompt, folder / f"samples/{epoch:04d}.png")
    return metrics


def diversity(images, per_prompt):
    """Mean distance between two images of the same prompt: the root mean square of pixel differences, 0 to 1."""
    def distance(a, b):
        return np.sqrt(np.mean((np.asarray(a, np.float32) - np.asarray(b, np.float32)) ** 2)) / 255
    groups = [images[i:i + per_prompt] for i in range(0, len(images), per_prompt)]
    distances = [distance(a, b) for group in groups for k, a in enumerate(group) for b in group[:k]]
    return np.mean(distances) if distances else math.nan


def draw_grid(images, prompts, scores, per_prompt, path, columns=8, rows=4, cell=150):
    """The first prompts' first images, each over its prompt and score."""
    grid = Image.new("RGB", (columns * cell, rows * (cell + 28)), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(11)
    for k, (image, prompt, score) in enumerate(list(zip(images, prompts, scores))[::per_prompt][:columns * rows]):
        x, y = k % columns * cell, k // columns * (cell + 28)
        grid.paste(image.resize((cell - 6, cell - 6), Image.LANCZOS), (x + 3, y))
        text = prompt if len(prompt) < 27 else prompt[:24] + "..."
        draw.text((x + 4, y + cell - 5), f"{text}\n{score:.2f}", font=font, fill="black", spacing=1)
    path.parent.mkdir(exist_ok=True)
    grid.save(path)


def draw_results(folder, epoch):
    """before_after.png, the first and the last sample grid, and curve.png from metrics.jsonl"""
    before, after = (Image.open(folder / f"samples/{e:04d}.png") for e in (0, epoch))
    both = Image.new("RGB", (before.width, before.height + after.height + 60), "white")
    draw, font = ImageDraw.Draw(both), ImageFont.load_default(20)
    for y, title, grid in ((0, "before", before), (before.height + 30, f"after {epoch} epochs", after)):
        draw.text((4, y + 2), title, font=font, fill="black")
        both.paste(grid, (0, y + 30))
    both.save(folder / "before_after.png")

    import matplotlib.figure  # without pyplot: no window, no global state
    figure = matplotlib.figure.Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("reward", "training reward (SDE)", "-"), ("eval_reward", "evaluation reward (ODE)", "o-"),
                              ("eval_accuracy", "evaluation accuracy (ODE)", "s-")):
        points = [(row["epoch"], row[key]) for row in read_metrics(folder) if key in row]
        if any(value for _, value in points):  # a reward that cannot reach 1 has no accuracy
            axes.plot(*zip(*points), style, label=label)
    axes.set(xlabel="epoch", title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "curve.png", dpi=110)


# ------------------------------------------------------------------------------------------ 7. what a run writes


def run_folder(config):
    """runs/<name>. Without --name: the first free of ocr, ocr-2, ... or, to resume, the newest of them."""
    base = Path("runs") / (config.name or re.sub(r"[^\w.-]+", "-", config.reward))
    if config.resume:
        found = [base] if config.name else [f for f in base.parent.glob(f"{base.name}*")
                                            if re.fullmatch(re.escape(base.name) + r"(-\d+)?", f.name)]
        found = [f for f in found if (f / "config.json").exists()]
        return max(found, key=lambda f: (f / "metrics.jsonl").stat().st_mtime) if found else stop(
            f"--resume: {base} holds no run to continue")
    if config.name and base.exists():
        stop(f"--name {config.name}: {base} exists; choose another name, or add --resume to continue it")
    folder, n = base, 1
    while folder.exists():
        n += 1
        folder = base.with_name(f"{base.name}-{n}")
    return folder


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
    swap_ema(model)
    # The adapter's settings go with it: without lora_alpha diffusers would scale it by 1, not by alpha / rank.
    model.pipe.save_lora_weights(
        folder, get_peft_model_state_dict(model.pipe.transformer), weight_name="lora.tmp.safetensors",
        transformer_lora_adapter_metadata=model.pipe.transformer.peft_config["default"].to_dict())
    swap_ema(model)
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


def load_prompts(config, split):
    """The dataset's prompts as [(prompt, metadata)], in either layout of the official repository."""
    task = "ocr" if "ocr" in re.split("[,:]", config.reward) else "geneval"
    folder = Path(config.dataset or Path(__file__).with_name("toy") / task)
    text, rows = folder / f"{split}.txt", folder / f"{split}_metadata.jsonl"
    if text.exists():
        prompts = [(line.strip(), {}) for line in text.read_text().splitlines() if line.strip()]
    elif rows.exists():
        try:
            prompts = [(row["prompt"], row) for row in map(json.loads, filter(str.strip, rows.read_text().splitlines()))]
        except (ValueError, KeyError, TypeError) as error:
            stop(f"--dataset {folder}: each line of {rows.name} must be a JSON object with a prompt ({error!r})")
    else:
        stop(f"--dataset {folder}: has neither {text.name} nor {rows.name}")
    return prompts or stop(f"--dataset {folder}: no prompts for {split}")


# --------------------------------------------------------------------------------------- 8. the algorithm, the run


def redness(images, prompts, metadata):
    """The toy reward: how much more red than green and blue an image is, -1 to 1. Yours can be as simple as this."""
    means = [np.asarray(image, float).mean((0, 1)) / 255 for image in images]
    return [r - (g + b) / 2 for r, g, b in means]


def train_epoch(model, config, scorer, train_set, epoch):
    """Sample, score, update -> metrics. All of an epoch's randomness comes from (seed, epoch)."""
    rng, clock = random.Random(f"{config.seed}/{epoch}"), [time.time()]
    repeats = math.ceil(config.groups / len(train_set))  # more than 1 only for a dataset smaller than one epoch
    chosen = rng.sample(train_set * repeats, config.groups)
    prompts, metadata = zip(*[row for row in chosen for _ in range(config.group_size)])
    seeds = [rng.getrandbits(60) for _ in prompts]  # members of a group differ from their first noise on
    drawn = rollout(model, config, prompts, seeds, config.train_steps, choose_sde_steps(config, rng))
    clock.append(time.time())

    scores = scorer(drawn.images, prompts, metadata)
    rewards = torch.tensor(scores["reward"]).view(config.groups, config.group_size)
    advantages = group_advantages(rewards, config.std_over)
    clock.append(time.time())

    metrics = update(model, config, drawn, advantages.flatten().to(model.device), rng)
    clock.append(time.time())
    metrics |= dict(reward=rewards.mean(), reward_std=rewards.std(), group_std=rewards.std(1).mean(),
                    no_signal=(rewards.amax(1) == rewards.amin(1)).float().mean())
    if len(scores) > 2:  # a weighted sum: each of its parts
        metrics |= {f"reward/{name}": np.mean(values) for name, values in scores.items() if name != "reward"}
    return metrics | {f"seconds_{name}": end - begin for name, begin, end
                      in zip(("sampling", "reward", "update"), clock, clock[1:])}


def train(config):
    folder = run_folder(config)
    config.name = folder.name
    train_set, test_set = load_prompts(config, "train"), load_prompts(config, "test")
    rewards = reward_library.load(config.reward)
    scorer = lambda images, prompts, metadata: reward_library.score(rewards, images, prompts, metadata)
    scorer([Image.new("RGB", (64, 64))] * 2, *zip(train_set[0], test_set[0]))  # what does not fit fails here, not later
    model = load_model(config)
    start = load(model, folder) if config.resume else 0
    if start > config.epochs:
        stop(f"--epochs {config.epochs}: the run to resume is already at {start}")
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "config.json", json.dumps(asdict(config) | {"resume": False}, indent=1))
    rows = read_metrics(folder)  # those after the checkpoint are drawn again, but for an evaluation of just that model
    known = {k: v for row in rows if row["epoch"] == start for k, v in row.items() if k.startswith("eval")}
    rows = [row for row in rows if row["epoch"] < start]
    trained = len(choose_sde_steps(config, random.Random(0)))
    print(f"{folder}: {config.groups} groups x {config.group_size} = {config.groups * config.group_size} images an epoch, "
          f"{trained} of {config.train_steps} steps trained, {config.updates} updates; "
          f"LoRA of {sum(p.numel() for p in model.params):,} parameters on {model.device}")

    with tqdm(initial=start, total=config.epochs, unit="epoch") as bar:
        for epoch in range(start, config.epochs + 1):
            row, last = {"epoch": epoch}, epoch == config.epochs
            if last or epoch % config.eval_every == 0 or known:
                row |= known or evaluate(model, config, scorer, test_set, folder, epoch)
                known = {}
                bar.write(", ".join(f"{key} {value:.3g}" for key, value in row.items()))
            if not last:
                row |= train_epoch(model, config, scorer, train_set, epoch)
                bar.set_postfix_str("reward {reward:.3f}, kl {kl:.2g}, clipped {clip_low:.0%} {clip_high:.0%}".format(**row))
                bar.update()
            rows.append({key: float(value) for key, value in row.items() if math.isfinite(value)} | {"epoch": epoch})
            write(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            if last or (epoch + 1) % config.save_every == 0:
                save(model, folder, min(epoch + 1, config.epochs))
    draw_results(folder, config.epochs)
    print(f"look at {folder / 'before_after.png'} and {folder / 'curve.png'}")


def main(argv=None):
    try:
        train(parse_config(argv))
    except reward_library.RewardError as error:
        stop(str(error))


if __name__ == "__main__":
    main()
