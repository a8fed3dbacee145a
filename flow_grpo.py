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
  sigma_t    how much noise the SDE adds, a sqrt(t/(1-t)); a is `noise_level`; `sigma` in the code (with --sde cps, where
             the formula is another, sigma is the std itself)
  mean, std  of the Gaussian step from x_t to x_{t+dt}
  T, K, B    steps of a drawing, the SDE steps among them, images in a tensor; [B, ...] are shapes

Where paper and official code (github.com/yifan123/flow_grpo) disagree this file follows the code, as the published learning
rate, clip range and beta were made for it: log-probabilities are averaged over the latent's dimensions, not summed; the KL has
no dt; advantages are divided by the standard deviation of the whole batch (the paper's: --std_over group); the last step is not
trained. Each is marked PAPER/CODE at its line. In the paper all steps are stochastic (--window 0: all but the last); by default
here only two are, at a random place, which is the authors' later and faster Flow-GRPO-Fast. Their other additions are options,
too: --sde cps, --guard, and training without guidance, --guidance 1.

Chapters 1 to 7 are the method, in the order of understanding; 8 to 10 are files, processes and the command line. With
one process RANK is 0, and my_part() and gather() return what they are given; stop() ends the run with one line.

  python flow_grpo.py                                       # a colour reward on the embedded toy model
  python flow_grpo.py --reward ocr                          # teach it to write, judged by a real OCR engine
  python flow_grpo.py --reward ocr --preset sd3.5-medium --dataset FOLDER             # the paper's setting, on a GPU
  accelerate launch flow_grpo.py --reward ocr --preset sd3.5-medium --dataset FOLDER  # the same on all GPUs
"""
import argparse
import contextlib
import difflib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import rewards

# --------------------------------------------------------------------------------------------------- 1. mathematics
# Pure functions on tensors. All of it is float32, whatever the network computes in: a ratio is the exponential of a
# difference of log-probabilities, and half precision would leave nothing of it.


def sde_noise(t, noise_level, sde="flow"):
    """How much noise each step adds. t: the grid [T+1] from 1 to 0 -> sigma [T]

    flow: sigma_t = a sqrt(t/(1-t)), printed below equation 9; a step's noise has the variance sigma_t^2 |dt|. At t = 1 the
    formula divides by zero. There the official code (sd3_sde_with_logprob.py) puts the second grid point's t in the denominator.
    cps: the noise's standard deviation itself.
    """
    now, later = t[:-1], t[1:]
    if sde == "cps":
        return later * math.sin(noise_level * math.pi / 2)
    return noise_level * torch.sqrt(now / (1 - torch.where(now == 1, t[1], now)))


def step_std(dt, sigma, sde="flow"):
    """The standard deviation of a step's noise. dt, sigma: [B] -> [B]"""
    return sigma if sde == "cps" else sigma * torch.sqrt(-dt)


def sde_mean(x, v, t, dt, sigma, sde="flow"):
    """Where a step of the SDE goes on average. x, v: [B, ...]; t, dt, sigma: [B], dt < 0 -> [B, ...]

    flow: equation 9, without its noise. To keep the marginals of the ODE dx = v dt, the noise is balanced by a drift
    towards more likely x: along the score, which is -(x + (1-t) v) / t (equation 27).
    cps: split x_t into the data and the noise that v predicts, and mix them anew for t + dt: less of the old noise, so
    that old and fresh noise together have the std t + dt, however large the step.
    """
    x, v = x.float(), v.float()
    t, dt, sigma = (a.view(-1, *[1] * (x.ndim - 1)) for a in (t, dt, sigma))  # [B, 1, ...]
    if sde == "cps":
        data_pred, noise_pred, later = x - t * v, x + (1 - t) * v, t + dt
        return (1 - later) * data_pred + torch.sqrt(later**2 - sigma**2) * noise_pred
    return x + (v + sigma**2 / (2 * t) * (x + (1 - t) * v)) * dt


def sde_step(x, v, t, dt, sigma, sde="flow", noise=None, x_next=None):
    """One step of the SDE: the policy. Arguments as sde_mean -> x_next [B, ...], log_prob [B], mean [B, ...]

    Draws x_next with the given standard normal noise [B, ...]; or, where x_next is given, only computes its
    log-probability, so that old and new log-probabilities come from the same lines.
    """
    mean = sde_mean(x, v, t, dt, sigma, sde)
    std = step_std(dt, sigma, sde).view(-1, *[1] * (x.ndim - 1))  # [B, 1, ...]
    if x_next is None:
        x_next = mean + std * noise
    # For cps the official code leaves out all but -(x_next - mean)^2; here it is the same density for both.
    log_density = -((x_next - mean) / std) ** 2 / 2 - torch.log(std) - math.log(2 * math.pi) / 2
    # PAPER/CODE: a log-density is a sum over the dimensions; the code averages. A ratio of sums would overflow with
    # 10^5 dimensions. With averages it stays within thousandths of 1, and so the clip range is that small.
    return x_next, log_density.flatten(1).mean(1), mean


def gaussian_kl(mean, mean_ref, sigma):
    """KL between two SDE steps that differ in their means. mean, mean_ref: [B, ...]; sigma: [B] -> [B]

    PAPER/CODE: the paper prints the variance sigma^2 |dt|; the code leaves out dt and averages over the dimensions.
    The published beta = 0.04 belongs to the code's form: before, with dt, the authors had 0.004. (For cps sigma already is the
    step's std, so this is the KL with dt; at T = 10 the same beta then weighs about ten times as much.)
    """
    return ((mean - mean_ref) ** 2).flatten(1).mean(1) / (2 * sigma**2)


def group_advantages(scores, std_over="batch"):
    """How good each image is for its prompt (equation 4). scores: the rewards, [groups, group_size] -> the same shape

    PAPER/CODE: the paper divides by the group's std; the code, by default, by that of the whole batch, so that a
    group of nearly equal rewards is not blown up. The 1e-4 and the clamp are the code's (stat_tracking.py, train_sd3.py).
    """
    scores = scores.float().double()  # float32 numbers add up exactly in float64: equal rewards give exactly 0
    centred = scores - scores.mean(1, keepdim=True)
    std = scores.std(unbiased=False) if std_over == "batch" else scores.std(1, unbiased=False, keepdim=True)
    return (centred / (std + 1e-4)).clamp(-5, 5).float()


def clipped_loss(log_ratio, advantages, clip_range):
    """The policy part of equation 5, to be minimised. log_ratio: log_prob - log_prob_old. All [B] -> loss [B], ratio [B]"""
    ratio = torch.exp(log_ratio)
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    return -torch.min(ratio * advantages, clipped * advantages), ratio


def guarded(log_ratio, mean, mean_old, std):
    """The log-ratio of GRPO-Guard (arXiv 2510.22319), in the official code's form -> [B]

    log_ratio, std: [B]; mean, mean_old: [B, ...]

    A log-ratio is on average -(mean - mean_old)^2 / (2 std^2), so ratios lie below 1 and hardly ever reach the upper
    clip; and it grows as std shrinks from step to step. So: add that average, and multiply by std.
    """
    return (log_ratio + ((mean - mean_old) ** 2).flatten(1).mean(1) / (2 * std**2)) * std


# ------------------------------------------------------------------------------------------------------- 2. options


def opt(default, why, least=None, choices=None):
    """An option: its default, what it does (the comment of its line and its text in --help), the values that work."""
    return field(default=default, metadata=dict(why=why, least=least, choices=choices))


@dataclass
class Config:
    # what to train, on what
    preset: str = opt("toy", "a set of defaults; other options override it",
                      choices=("toy", "sd3.5-medium", "sd3.5-medium-24gb", "flux.1-dev"))
    reward: str = opt("flow_grpo:redness", 'a name in rewards.py, your own "file:function", or a sum: "ocr:1,pickscore:0.5"')
    eval_reward: str = opt("", "rewards that are only measured, in evaluations, as in --reward: they show reward hacking")
    model: str = opt("toy", "folder or hub name of a StableDiffusion3Pipeline or FluxPipeline")
    dataset: str = opt("", "folder of {train,test}.txt or {train,test}_metadata.jsonl; default: toy/ocr or toy/geneval")
    resolution: int = opt(48, "height and width of the images in pixels", least=8)
    max_sequence_length: int = opt(14, "tokens of the T5 encoder; the official SD3.5 runs used 128", least=1)
    precision: str = opt("fp32", "of the network: bf16 takes half the memory; the mathematics stays float32",
                         choices=("fp32", "bf16"))
    gradient_checkpointing: bool = opt(False, "compute activations twice instead of keeping them: less memory, slower updates")
    offload: bool = opt(False, "text encoders live in the CPU's memory and visit the GPU to encode an epoch's prompts")
    # the run
    name: str = opt("", "folder under runs/; default: the reward's name, numbered if taken")
    resume: bool = opt(False, "continue the run --name (default: the newest of this reward) with its own options")
    seed: int = opt(0, "of everything random: same seed, same machine, same run")
    epochs: int = opt(16, "one epoch = sample, score, update; 0 only evaluates the model as it is", least=0)
    eval_every: int = opt(4, "epochs between evaluations; there is always one before the first epoch and after the last", least=1)
    save_every: int = opt(5, "epochs between checkpoints; there is always one after the last", least=1)
    # sampling
    groups: int = opt(8, "prompts per epoch; more make the gradient less noisy and the epoch longer", least=1)
    group_size: int = opt(16, "images of each prompt, compared with each other; the paper saw 6 and 12 collapse", least=2)
    train_steps: int = opt(10, "T while training: few steps are enough to tell good from bad (denoising reduction)", least=2)
    eval_steps: int = opt(40, "T of the evaluation", least=2)
    noise_level: float = opt(0.7, "a in sigma_t: too little explores nothing, too much spoils the images", least=1e-6)
    window: int = opt(2, "SDE steps, in a row somewhere in the noisy half, and only they are trained; 0: all but the last", 0)
    same_noise: bool = opt(False, "a group starts from one noise, so that its images differ by the SDE's noise alone; to be used "
                                  "with --window; in the paper they start from different ones")
    sde: str = opt("flow", "flow: the paper's; cps: coefficient-preserving (arXiv 2509.05952), leaves no noise in the image",
                   choices=("flow", "cps"))
    guidance: float = opt(1.0, "classifier-free, in sampling and training; 1 is off and twice as fast; FLUX: its distilled "
                               "guidance", least=1)
    # learning
    updates: int = opt(2, "optimizer steps per epoch; in the first all ratios are 1, clipping acts on the later ones", least=1)
    learning_rate: float = opt(1.5e-3, "of AdamW", least=1e-12)
    clip_range: float = opt(1e-3, "epsilon, how far a ratio may leave 1; small, as log-probabilities are averages", least=1e-12)
    guard: bool = opt(False, "GRPO-Guard (arXiv 2510.22319): ratios centred, of one scale at all steps; clip range 2e-6 to 4e-6")
    beta: float = opt(0.1, "weight of the KL to the base model: more keeps quality and diversity and slows the reward", least=0)
    std_over: str = opt("batch", "whose standard deviation divides the advantages", choices=("batch", "group"))
    lora_rank: int = opt(32, "size of what is trained", least=1)
    lora_alpha: int = opt(64, "the LoRA's output is scaled by alpha / rank", least=1)
    ema_decay: float = opt(0.9, "of the averaged weights that are evaluated and saved; 0 is off", least=0)
    ema_every: int = opt(1, "average the weights after every so many updates", least=1)
    batch_size: int = opt(64, "samples in one forward pass: changes memory and speed, and results only by rounding", least=1)
    # evaluation
    eval_prompts: int = opt(60, "so many prompts of the test file; 0 is all", least=0)
    eval_per_prompt: int = opt(2, "images of each, from the same seeds every time; from 2 on they measure diversity", least=1)

# The paper's setting: section 5.1 and, for learning rate, clip range and EMA, the official config/grpo.py, the only place
# that prints them. 0.04 is the paper's beta for GenEval and OCR; for PickScore it is 0.01.
PAPER = dict(model="stabilityai/stable-diffusion-3.5-medium", resolution=512, max_sequence_length=128, precision="bf16",
             epochs=1000, eval_every=30, save_every=10, groups=48, group_size=24, window=0, guidance=4.5, learning_rate=3e-4,
             clip_range=1e-4, beta=0.04, ema_every=8, batch_size=8, eval_prompts=0, eval_per_prompt=1)
PRESETS = {
    "toy": {},
    "sd3.5-medium": PAPER,
    # Smaller epochs, and evaluations that do not cost more than all the epochs between them.
    "sd3.5-medium-24gb": PAPER | dict(groups=12, batch_size=4, gradient_checkpointing=True, offload=True, eval_prompts=100),
    # The official config/grpo.py and train_flux.py; the paper has no settings for FLUX.
    "flux.1-dev": PAPER | dict(model="black-forest-labs/FLUX.1-dev", train_steps=6, eval_steps=28, guidance=3.5, noise_level=0.9,
                               beta=0.0, lora_rank=64, lora_alpha=128, batch_size=4, gradient_checkpointing=True),
}
MAY_CHANGE = ("resume", "epochs", "eval_every", "save_every", "learning_rate", "batch_size", "gradient_checkpointing",
              "offload", "eval_reward", "eval_prompts", "eval_per_prompt", "eval_steps")  # when a run is resumed


# --------------------------------------------------------------------------------------------------------- 3. model


@dataclass
class Model:
    pipe: object                      # a StableDiffusion3Pipeline or FluxPipeline with a LoRA on its transformer
    params: list                      # the LoRA's parameters: all that is trained, in float32
    optimizer: torch.optim.Optimizer
    ema: list                         # moving averages of params
    empty: list                       # the empty prompt's condition, for guidance
    updates_done: int = 0             # optimizer steps so far

    @property
    def device(self):
        return self.pipe.transformer.device


def is_flux(part):
    """Pipeline or transformer -> whether it is of FLUX's family; else it is of SD3's."""
    return "Flux" in type(part).__name__


def load_model(config):
    """A pipeline with a fresh LoRA on its transformer; the toy, SD3.5 and FLUX take the same path."""
    import diffusers
    import transformers
    rewards.quiet(diffusers, transformers)  # they warn of the toy's unusual VAE, and draw bars for reading 5 MB
    device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    source = Path(__file__).with_name("toy") if config.model == "toy" else config.model
    try:  # the VAE stays float32: a reward would see its rounding
        pipe = diffusers.DiffusionPipeline.from_pretrained(source, dtype={"vae": torch.float32, "default": dtype})
    except (OSError, ValueError) as error:
        stop(f"--model {config.model}: cannot be loaded ({str(error).strip().splitlines()[0]}); is the name right, the "
             "licence accepted and the hub reachable?")
    if not isinstance(pipe, (diffusers.StableDiffusion3Pipeline, diffusers.FluxPipeline)):
        stop(f"--model {config.model}: is a {type(pipe).__name__}; choose a StableDiffusion3Pipeline or a FluxPipeline")
    multiple = 2 * pipe.vae_scale_factor  # a token of the transformer is 2x2 latents
    if config.resolution % multiple:
        stop(f"--resolution {config.resolution}: must be a multiple of {multiple}")
    for module in (pipe.transformer, pipe.vae, *text_encoders(pipe)):
        module.requires_grad_(False)
    torch.manual_seed(config.seed)  # for the LoRA's first values, drawn on the CPU: the same on every device
    params = add_lora(pipe.transformer, config)
    for module in (pipe.transformer, pipe.vae):  # encode() moves the text encoders
        module.to(device)
    if config.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    # AdamW's constants are the official config's.
    optimizer = torch.optim.AdamW(params, config.learning_rate, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)
    return Model(pipe, params, optimizer, [p.detach().clone() for p in params], encode(pipe, config, [""]))


def add_lora(transformer, config):
    """Adds the LoRA, on the same layers as the official code -> its parameters, in float32"""
    from peft import LoraConfig
    layers = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",  # of the image's tokens in each block's joint attention,
              "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]  # and of the text's
    if is_flux(transformer):
        layers += ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
    transformer.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, init_lora_weights="gaussian",
                                       target_modules=layers))
    params = [p for p in transformer.parameters() if p.requires_grad]
    for p in params:
        p.data = p.data.float()
    return params


def text_encoders(pipe):
    return [getattr(pipe, name) for name in ("text_encoder", "text_encoder_2", "text_encoder_3") if getattr(pipe, name, None)]


@torch.no_grad()
def encode(pipe, config, prompts):
    """Prompts -> their condition: embeds [B, L, D], pooled [B, P], in the CPU's memory"""
    device, parts = pipe.transformer.device, []
    for module in text_encoders(pipe):
        module.to(device)
    for i in range(0, len(prompts), config.batch_size):
        batch, length = prompts[i:i + config.batch_size], config.max_sequence_length
        if is_flux(pipe):
            embeds, pooled, _ = pipe.encode_prompt(batch, None, device=device, max_sequence_length=length)
        else:  # the two that are left out would be the negative prompt's
            embeds, _, pooled, _ = pipe.encode_prompt(batch, None, None, device=device, do_classifier_free_guidance=False,
                                                      max_sequence_length=length)
        parts.append((embeds.cpu(), pooled.cpu()))
    if config.offload:
        for module in text_encoders(pipe):
            module.cpu()
    return [torch.cat(part) for part in zip(*parts)]


def velocity(model, config, x, t, condition):
    """The network, with classifier-free guidance. x: [B, C, H, W], t: [B] -> v [B, C, H, W], float32

    Sampling and training both call this. Were the guidance different in one of them, the ratio would compare two policies; were
    the gradient cut in the branch of the empty prompt, it would not be the gradient of the policy that sampled.
    """
    embeds, pooled = (c.to(x.device) for c in condition)
    guided = config.guidance != 1 and not is_flux(model.pipe)  # FLUX has learned to guide itself
    if guided:
        x, t = torch.cat([x, x]), torch.cat([t, t])  # [2B, C, H, W], [2B]
        embeds, pooled = (torch.cat([c, e.to(x.device).expand_as(c)]) for c, e in zip((embeds, pooled), model.empty))
    # Autocast's cache would keep the LoRA's half-precision copies; copies made under no_grad carry no gradient into
    # a later pass. So: no cache.
    with torch.autocast(x.device.type, torch.bfloat16, enabled=config.precision == "bf16", cache_enabled=False):
        inputs = dict(hidden_states=x.to(embeds.dtype), timestep=1000 * t, encoder_hidden_states=embeds,
                      pooled_projections=pooled, return_dict=False)
        v = flux_network(model.pipe, config, **inputs) if is_flux(model.pipe) else model.pipe.transformer(**inputs)[0]
    v = v.float()
    if guided:
        v, v_empty = v.chunk(2)
        v = v_empty + config.guidance * (v - v_empty)
    return v


def flux_network(pipe, config, hidden_states, timestep, encoder_hidden_states, **inputs):
    """FLUX wants the latents packed, [B, H/2 * W/2, 4C], their places, t up to 1 instead of 1000, and its guidance."""
    B, C, H, W = hidden_states.shape
    places = dict(img_ids=pipe._prepare_latent_image_ids(B, H // 2, W // 2, timestep.device, encoder_hidden_states.dtype),
                  txt_ids=torch.zeros(encoder_hidden_states.shape[1], 3, device=timestep.device))
    if pipe.transformer.config.guidance_embeds:
        places["guidance"] = torch.full([B], config.guidance, device=timestep.device)
    v = pipe.transformer(hidden_states=pipe._pack_latents(hidden_states, B, C, H, W), timestep=timestep / 1000,
                         encoder_hidden_states=encoder_hidden_states, **places, **inputs)[0]
    scale = pipe.vae_scale_factor
    return pipe._unpack_latents(v, H * scale, W * scale, scale)


def time_grid(pipe, config, T):
    """The scheduler's own grid [T+1] from 1 to 0: even for the toy, denser near 1 for SD3.5 and FLUX."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift
    options, settings = dict(num_inference_steps=T), pipe.scheduler.config
    if is_flux(pipe):
        options = dict(sigmas=np.linspace(1, 1 / T, T))
    if settings.get("use_dynamic_shifting"):  # the more tokens an image has, the nearer to 1
        tokens = (config.resolution // pipe.vae_scale_factor // 2) ** 2
        limits = [settings[key] for key in ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")]
        options["mu"] = calculate_shift(tokens, *limits)
    pipe.scheduler.set_timesteps(device=pipe.transformer.device, **options)
    return pipe.scheduler.sigmas.float()


@torch.no_grad()
def decode(pipe, latents):
    """Latents [B, C, H, W] -> PIL images"""
    latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
    return pipe.image_processor.postprocess(pipe.vae.decode(latents, return_dict=False)[0], output_type="pil")


# ------------------------------------------------------------------------------------------------------- 4. rollout


@dataclass
class Rollout:
    images: list                # B PIL images
    prompts: list               # the distinct prompts
    condition: list             # of the distinct prompts: embeds, pooled
    prompt_index: torch.Tensor  # [B] each image's place among the distinct prompts
    t: torch.Tensor             # [T+1] the time grid
    sigma: torch.Tensor         # [T]
    sde_steps: range            # K successive steps
    # Of those steps, in the CPU's memory, as an epoch may not fit on the GPU:
    latents: torch.Tensor       # [B, K+1, C, H, W] before the first and after each
    means: torch.Tensor         # [B, K, C, H, W] with --guard, else None
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
def rollout(model, config, prompts, seeds, T, sde_steps, first_seeds=None, on_images=lambda images, where: None):
    """Draw an image for each prompt and seed in T steps: SDE in `sde_steps`, ODE in the others.

    Each image has its own generator: it does not depend on the others in its batch. The first draw is the initial
    noise, so a stock float32 pipeline given a CPU generator with that seed starts from the same point; with first_seeds
    the initial noise is that of these seeds. on_images is called with each finished micro-batch and its slice. Raises
    FloatingPointError when latents are not finite.
    """
    pipe, device = model.pipe, model.device
    t = time_grid(pipe, config, T)
    sigma, dt = sde_noise(t, config.noise_level, config.sde), t.diff()
    distinct = list(dict.fromkeys(prompts))
    condition = encode(pipe, config, distinct)
    prompt_index = torch.tensor([distinct.index(p) for p in prompts])
    side = config.resolution // pipe.vae_scale_factor
    shape = (pipe.vae.config.latent_channels, side, side)
    normal = lambda generators: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)

    images, K = [], len(sde_steps)
    latents, log_prob = torch.empty(len(prompts), K + 1, *shape), torch.empty(len(prompts), K)
    means = torch.empty(len(prompts), K, *shape) if config.guard else None
    starts = range(0, len(prompts), config.batch_size)
    with tqdm(total=len(starts) * T, desc="sampling", unit="step", leave=False, disable=RANK > 0) as bar:
        for start in starts:
            micro = slice(start, start + config.batch_size)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[micro]]
            first = [torch.Generator().manual_seed(seed) for seed in first_seeds[micro]] if first_seeds else generators
            micro_condition = [c[prompt_index[micro]].to(device) for c in condition]
            x = normal(first)  # [b, C, H, W]
            for i in range(T):
                t_i, dt_i, sigma_i = (a[i].expand(len(x)) for a in (t, dt, sigma))  # [b]
                v = velocity(model, config, x, t_i, micro_condition)
                if i in sde_steps:
                    k = i - sde_steps.start
                    latents[micro, k] = x
                    x, log_prob[micro, k], mean = sde_step(x, v, t_i, dt_i, sigma_i, config.sde, noise=normal(generators))
                    latents[micro, k + 1] = x
                    if config.guard:
                        means[micro, k] = mean
                else:
                    x = x + v * dt[i]
                for prompt, finite in zip(prompts[micro], x.isfinite().flatten(1).all(1).tolist()):
                    if not finite:
                        raise FloatingPointError(f"the latents of {prompt!r} are not finite after step {i}")
                bar.update()
            images += decode(pipe, x)
            on_images(images[micro], micro)
    return Rollout(images, distinct, condition, prompt_index, t, sigma, sde_steps, latents, means, log_prob)


# -------------------------------------------------------------------------------------------------------- 5. update


def update(model, config, drawn, advantages, rng):
    """The epoch's optimizer steps, each on an equal part of every group's images -> metrics

    drawn, advantages [B]: this process's whole groups. rng: the same on every process. Raises FloatingPointError when
    loss or gradient are not finite, before the weights change.
    """
    size, K = config.group_size, len(drawn.sde_steps)
    share, rows, grad_norms = size // config.updates, [], []
    members = my_part([rng.sample(range(size), size) for _ in range(config.groups)])  # each group in a random order
    for part in range(config.updates):
        pairs = [(g * size + image, k) for g, order in enumerate(members)
                 for image in order[part * share:(part + 1) * share] for k in range(K)]
        for start in range(0, len(pairs), config.batch_size):
            i, k = torch.tensor(pairs[start:start + config.batch_size]).T  # [b], [b]
            loss, row = loss_of(model, config, drawn, advantages, i, k)
            if part == 0:
                check_ratio(row["ratio"], config)
            (loss.sum() / (config.groups * share * K)).backward()  # equation 5: the mean over images and steps
            rows.append({key: value.tolist() for key, value in row.items()})
        sum_gradients(model.params)
        grad_norms.append(torch.nn.utils.clip_grad_norm_(model.params, 1.0).item())  # 1.0: the official config
        if not math.isfinite(grad_norms[-1]):
            raise FloatingPointError(f"the gradient is {grad_norms[-1]} in update {part + 1}")
        model.optimizer.step()
        model.optimizer.zero_grad()
        model.updates_done += 1
        ema_step(model, config)
    rows = gather(rows)
    loss, kl, ratio = (np.concatenate([row[key] for row in rows]) for key in ("policy_loss", "kl", "ratio"))
    return dict(policy_loss=loss.mean(), kl=kl.mean(), ratio=ratio.mean(), ratio_deviation=np.abs(ratio - 1).max(),
                clip_low=np.mean(ratio < 1 - config.clip_range), clip_high=np.mean(ratio > 1 + config.clip_range),
                grad_norm=np.mean(grad_norms))


def loss_of(model, config, drawn, advantages, i, k):
    """Equation 5 for a micro-batch of steps, to be minimised -> loss [b], and of each its policy_loss, ratio and kl

    i, k: [b], which of the images, and which of its K recorded steps.
    """
    x, x_next, log_prob_old, A = (a.to(model.device) for a in (
        drawn.latents[i, k], drawn.latents[i, k + 1], drawn.log_prob[i, k], advantages[i]))
    place = (drawn.sde_steps.start + k).to(model.device)  # on the time grid
    t, dt, sigma = drawn.t[place], drawn.t.diff()[place], drawn.sigma[place]
    condition = [c[drawn.prompt_index[i]] for c in drawn.condition]
    v = velocity(model, config, x, t, condition)
    _, log_prob, mean = sde_step(x, v, t, dt, sigma, config.sde, x_next=x_next)
    log_ratio = log_prob - log_prob_old
    if config.guard:
        log_ratio = guarded(log_ratio, mean, drawn.means[i, k].to(model.device), step_std(dt, sigma, config.sde))
    policy_loss, ratio = clipped_loss(log_ratio, A, config.clip_range)

    model.pipe.transformer.disable_adapters()  # the reference is the same model without its LoRA
    with torch.no_grad():
        v_ref = velocity(model, config, x, t, condition)
    model.pipe.transformer.enable_adapters()
    kl = gaussian_kl(mean, sde_mean(x, v_ref, t, dt, sigma, config.sde), sigma)  # with beta 0 only to be logged

    weight = 1 / -dt if config.guard else 1  # as in the official code: short steps count as much as long ones
    loss = policy_loss * weight + config.beta * kl
    for n, value in enumerate(loss.tolist()):
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss of {drawn.prompts[drawn.prompt_index[i[n]]]!r} at step {place[n]} is {value}")
    return loss, dict(policy_loss=policy_loss.detach(), ratio=ratio.detach(), kl=kl.detach())


def check_ratio(ratio, config):
    """Before the first optimizer step the policy is still the one that sampled, so each ratio is 1 up to rounding.

    What is let through must not matter: at most half of the clip range, but never less than 1e-5, the noise of rounding. (With
    --guard's 2e-6 that is more than the clip range.)
    """
    deviation = (ratio - 1).abs().max().item()
    if not deviation <= min(1e-4, max(config.clip_range / 2, 1e-5)):  # "not <=": nan must stop, too
        stop(f"the ratio is off by {deviation:.2g} before the first update, where it must be 1: sampling and training "
             "do not compute the same log-probability (guidance, dropout, a changed rollout, or, with bf16, micro-batches of "
             "another size: let --batch_size divide the images)")


def ema_step(model, config):
    """The decay grows with the number of updates, so that the average is not stuck at the start (official ema.py)."""
    if model.updates_done % config.ema_every == 0 or config.ema_decay == 0:  # off: the weights themselves
        decay = min(config.ema_decay, (1 + model.updates_done) / (10 + model.updates_done))
        for average, p in zip(model.ema, model.params):
            average.lerp_(p.detach(), 1 - decay)


def swap_ema(model):
    """Exchange weights and averaged weights; a second call puts them back."""
    for average, p in zip(model.ema, model.params):
        p.data, average.data = average.data, p.data


# ---------------------------------------------------------------------------------------------------- 6. evaluation


def evaluate(model, config, reward_functions, watched, test_set, folder, epoch):
    """Draw the test prompts by the ODE with the averaged weights, from the same seeds every time -> metrics

    reward_functions, watched: as rewards.load gives them; those of --eval_reward are only noted. Image j
    of test prompt i has the seed i * eval_per_prompt + j. Accuracy is the share of images whose (first) reward is 1, the
    most that OCR and GenEval give: the whole word was read, every object is as asked.
    """
    per_prompt = config.eval_per_prompt
    mine = my_part(list(enumerate(test_set[:config.eval_prompts or None])))
    rows = [(prompt, row, i * per_prompt + j) for i, (prompt, row) in mine for j in range(per_prompt)]
    prompts, metadata, seeds = zip(*rows)
    swap_ema(model)
    images = rollout(model, config, prompts, seeds, config.eval_steps, range(0)).images
    swap_ema(model)
    scores = rewards.score(reward_functions, images, prompts, metadata)
    if watched:
        scores = rewards.score(watched, images, prompts, metadata) | scores  # the same name: the same score
    scores = {name: np.array(gather(values)) for name, values in scores.items()}
    total, right = scores.pop("reward"), scores[next(iter(reward_functions))] == 1
    metrics = dict(eval_reward=total.mean(), eval_accuracy=right.mean(),
                   eval_diversity=np.mean(gather(distances(images, per_prompt)) or [math.nan]))
    if len(scores) > 1:
        metrics |= {f"eval_reward/{name}": values.mean() for name, values in scores.items()}
    tags = np.array(gather([row.get("tag", "") for row in metadata]))  # GenEval's tasks
    if right.any():  # else this reward may have no full mark
        metrics |= {f"eval_accuracy/{tag}": right[tags == tag].mean() for tag in sorted(set(tags) - {""})}
    shown = gather(list(zip(images, prompts))[::per_prompt][:GRID[0] * GRID[1]])
    if RANK == 0:
        draw_grid(shown, total[::per_prompt], folder / f"samples/{epoch:04d}.png")
    return metrics


def distances(images, per_prompt):
    """Between any two images of the same prompt: the root mean square of pixel differences, 0 to 1."""
    def distance(a, b):
        return np.sqrt(np.mean((np.asarray(a, np.float32) - np.asarray(b, np.float32)) ** 2)) / 255
    groups = [images[i:i + per_prompt] for i in range(0, len(images), per_prompt)]
    return [distance(a, b) for group in groups for k, a in enumerate(group) for b in group[:k]]


GRID = 8, 4  # columns, rows


def draw_grid(shown, scores, path, cell=150):
    """The first prompts' first images, each over its prompt and score. shown: [(image, prompt)]"""
    columns, rows = GRID
    grid = Image.new("RGB", (columns * cell, rows * (cell + 28)), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(11)
    for k, ((image, prompt), score) in enumerate(zip(shown, scores)):
        x, y = k % columns * cell, k // columns * (cell + 28)
        grid.paste(image.resize((cell - 6, cell - 6), Image.LANCZOS), (x + 3, y))
        text = prompt if len(prompt) < 27 else prompt[:24] + "..."
        draw.text((x + 4, y + cell - 5), f"{text}\n{score:.2f}", font=font, fill="black", spacing=1)
    path.parent.mkdir(exist_ok=True)
    grid.save(path)


# ------------------------------------------------------------------------------------------------------ 7. training


def redness(images, prompts, metadata):
    """The toy reward: how much more red than green or blue an image is, -1 to 1. Yours can be as simple as this."""
    means = [np.asarray(image, float).mean((0, 1)) / 255 for image in images]
    return [r - max(g, b) for r, g, b in means]


def train_epoch(model, config, reward_functions, train_set, epoch):
    """Sample, score, update -> metrics. All of an epoch's randomness comes from (seed, epoch), on all processes alike."""
    rng, clock = random.Random(f"{config.seed}/{epoch}"), [time.time()]
    repeats = math.ceil(config.groups / len(train_set))  # more than 1 only for a dataset smaller than one epoch
    chosen = rng.sample(train_set * repeats, config.groups)
    # Members of a group differ from their first noise on; with --same_noise the group shares it, as in the first version of
    # the official Flow-GRPO-Fast.
    samples = [(*row, rng.getrandbits(60)) for row in chosen for _ in range(config.group_size)]
    sde_steps = choose_sde_steps(config, rng)
    prompts, metadata, seeds = zip(*my_part(samples))
    first_seeds = None
    if config.same_noise:  # + 1: with the first image's own seed its starting noise would come again as its SDE's noise
        first_seeds = [seeds[i - i % config.group_size] + 1 for i in range(len(seeds))]
    with ThreadPoolExecutor(1) as pool:  # rewards are computed while the next images are drawn
        futures = []
        score = lambda images, micro: futures.append(
            pool.submit(rewards.score, reward_functions, images, prompts[micro], metadata[micro]))
        drawn = rollout(model, config, prompts, seeds, config.train_steps, sde_steps, first_seeds, score)
        clock.append(time.time())
        parts = [future.result() for future in futures]
    scores = {name: gather([value for part in parts for value in part[name]]) for name in parts[0]}
    total = torch.tensor(scores["reward"]).view(config.groups, config.group_size)
    advantages = group_advantages(total, config.std_over)
    clock.append(time.time())

    metrics = update(model, config, drawn, my_part(advantages).flatten(), rng)
    clock.append(time.time())
    metrics |= dict(reward=total.mean(), reward_std=total.std(), group_std=total.std(1).mean(),
                    no_signal=(total.amax(1) == total.amin(1)).float().mean())
    if len(scores) > 2:  # a weighted sum: each of its parts
        metrics |= {f"reward/{name}": np.mean(values) for name, values in scores.items() if name != "reward"}
    return metrics | {f"seconds_{name}": end - begin for name, begin, end
                      in zip(("sampling", "reward", "update"), clock, clock[1:])}


def train(config):
    connect()
    train_set, test_set = load_prompts(config, "train"), load_prompts(config, "test")
    if len(test_set) < WORLD:
        stop(f"--dataset {config.dataset}: has {len(test_set)} test prompts, and each of the {WORLD} processes needs one")
    folder = gather([run_folder(config)])[0]
    config.name = config.name or folder.name
    reward_functions, watched = (rewards.load(spec) if spec else {} for spec in (config.reward, config.eval_reward))
    prompts, metadata = zip(train_set[0], test_set[0])  # blank images: a reward that does not suit the dataset fails now
    rewards.score(reward_functions | watched, [Image.new("RGB", (64, 64))] * 2, prompts, metadata)
    model = load_model(config)
    start, rows = begin(config, model, folder)
    with ctrl_c() as asked, tqdm(initial=start, total=config.epochs, unit="epoch", disable=RANK > 0) as bar:
        for epoch in range(start, config.epochs + 1):
            row, last = {"epoch": epoch}, epoch == config.epochs
            try:
                if last or epoch % config.eval_every == 0:
                    row |= evaluate(model, config, reward_functions, watched, test_set, folder, epoch)
                    if RANK == 0:
                        bar.write(", ".join(f"{key} {value:.3g}" for key, value in row.items() if math.isfinite(value)))
                if not last:
                    row |= train_epoch(model, config, reward_functions, train_set, epoch)
                    bar.set_postfix_str("reward {reward:.3f}, kl {kl:.2g}, clipped {clip_low:.0%} {clip_high:.0%}".format(**row))
                    bar.update()
            except (FloatingPointError, rewards.RewardError) as error:
                bar.close()  # so that the message has a line of its own
                stop(f"epoch {epoch}: {error}; to go on from the last checkpoint: --resume --name {config.name}" + (
                    ", where a lower --learning_rate may help" if isinstance(error, FloatingPointError) else ""))
            rows.append({key: float(value) for key, value in row.items() if math.isfinite(value)} | {"epoch": epoch})
            interrupted = any(gather(asked)) and not last
            if RANK == 0:
                write(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
                if last or interrupted or (epoch + 1) % config.save_every == 0:
                    save(model, folder, min(epoch + 1, config.epochs))
            if interrupted:
                bar.close()
                stop(f"interrupted after epoch {epoch}; to go on: --resume --name {config.name}")
    if RANK == 0:
        draw_results(folder, rows)
        print(f"look at {folder / 'before_after.png'} and {folder / 'curve.png'}")
    if WORLD > 1:
        dist.destroy_process_group()


# ----------------------------------------------------------------------------------- 8. what a run reads and writes


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


def run_folder(config):
    """runs/<name>. Without --name: the first free of ocr, ocr-2, ... or, to resume, the newest of them."""
    base = Path("runs") / (config.name or re.sub(r"[^\w.-]+", "-", config.reward))
    if config.resume:
        found = [base] if config.name else [f for f in base.parent.glob(f"{base.name}*")
                                            if re.fullmatch(re.escape(base.name) + r"(-\d+)?", f.name)]
        found = [f for f in found if (f / "config.json").exists()]
        return max(found, key=lambda f: (f / "config.json").stat().st_mtime) if found else stop(
            f"--resume: {base} holds no run to continue")
    if config.name and base.exists():
        stop(f"--name {config.name}: {base} exists; choose another name, or add --resume to continue it")
    folder, n = base, 1
    while folder.exists():
        n += 1
        folder = base.with_name(f"{base.name}-{n}")
    return folder


def begin(config, model, folder):
    """-> the epoch to start with, and the rows of metrics before it"""
    start = load(model, folder) if config.resume else 0
    if start > config.epochs:
        stop(f"--epochs {config.epochs}: the run to resume is already at {start}")
    if RANK == 0:
        folder.mkdir(parents=True, exist_ok=True)
        # A LoRA parameter's checkpoint has 16 bytes and its diffusers file 4, both twice while the new one replaces the old.
        free, needed = shutil.disk_usage(folder).free, 40 * sum(p.numel() for p in model.params) + 10**7
        if free < needed:
            stop(f"--name {folder.name}: {folder} has {free / 1e6:.0f} MB left, and checkpoints need {needed / 1e6:.0f} MB")
        write(folder / "config.json", json.dumps(asdict(config) | {"resume": False}, indent=1))
        print(f"{folder}\n{describe(model, config)}")
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if start else []
    return start, [row for row in rows if row["epoch"] < start]


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
    for i, (p, average) in enumerate(zip(model.params, model.ema)):
        tensors |= {f"lora.{i}": p.detach().contiguous(), f"ema.{i}": average.contiguous()}
        tensors |= {f"optimizer.{i}.{key}": value.contiguous() for key, value in model.optimizer.state[p].items()}
    path = folder / "checkpoint/state.safetensors"
    path.parent.mkdir(exist_ok=True)
    save_file(tensors, path.with_suffix(".tmp"), metadata=dict(epoch=str(epoch), updates=str(model.updates_done)))
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
    try:
        with safe_open(path, "pt") as file:
            for i, p in enumerate(model.params):
                p.data.copy_(file.get_tensor(f"lora.{i}"))
                model.ema[i].copy_(file.get_tensor(f"ema.{i}"))
            for key in file.keys():
                kind, i, *rest = key.split(".")
                if kind == "optimizer":
                    value, p = file.get_tensor(key), model.params[int(i)]
                    model.optimizer.state[p][rest[0]] = value if rest[0] == "step" else value.to(p.device)
            model.updates_done = int(file.metadata()["updates"])
            return int(file.metadata()["epoch"])
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError, IndexError) as error:
        stop(f"{path}: is damaged or not of this run ({str(error).splitlines()[0]}); to begin again at epoch 0 delete it")


def draw_results(folder, rows):
    """before_after.png, the first and the last sample grid, and curve.png from the rows of metrics.jsonl"""
    epoch = rows[-1]["epoch"]
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
        points = [(row["epoch"], row[key]) for row in rows if key in row]
        if any(value for _, value in points):  # a reward that cannot reach 1 has no accuracy
            axes.plot(*zip(*points), style, label=label)
    axes.set(xlabel="epoch", title=folder.name)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "curve.png", dpi=110)


# --------------------------------------------------------------------------------------------- 9. several processes


# `accelerate launch` or torchrun starts this script once for each GPU and numbers the copies. Each takes whole groups; what
# must be known of all is gathered; every file is written by the first.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def connect():
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if WORLD > 1:
        dist.init_process_group()


def my_part(items):
    """This process's part of a list or tensor; the parts of all processes, in order, are the whole."""
    return items[len(items) * RANK // WORLD:len(items) * (RANK + 1) // WORLD]


def gather(items):
    """The lists of all processes as one list: the inverse of my_part."""
    if WORLD == 1:
        return items
    parts = [None] * WORLD
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def sum_gradients(params):
    """Add up the processes' gradients, all in one message."""
    if WORLD > 1:
        gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in params])
        dist.all_reduce(gradient)
        for p, part in zip(params, gradient.split([p.numel() for p in params])):
            p.grad = part.view_as(p)


# --------------------------------------------------------------------------------------------- 10. the command line


def stop(message):
    """End the run with one line on stderr and exit code 2, no traceback."""
    print(f"flow_grpo.py: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def parse_config(argv=None):
    """Command line -> Config. Options that are not given come from the preset, or from the run to resume."""
    parser = argparse.ArgumentParser(description=__doc__, usage="python flow_grpo.py [--option value ...]",
                                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = stop
    for f in fields(Config):
        kind = dict(type=f.type, metavar=f.type.__name__)
        if f.type is bool:  # --offload and, against a preset, --no-offload
            kind = dict(action=argparse.BooleanOptionalAction)
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
    saved = {}
    if config.resume:
        path = run_folder(config) / "config.json"
        try:
            saved = asdict(Config(**json.loads(path.read_text()))) | {"name": config.name or path.parent.name}
        except (OSError, ValueError, TypeError) as error:
            stop(f"--resume: {path} is not the config of a run of this version ({error})")
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
    if c.group_size % c.updates:
        stop(f"--updates {c.updates}: each update takes its share of every group, so it must divide --group_size "
             f"{c.group_size}: {nearest(c.updates, lambda n: c.group_size % n == 0)}")
    if c.groups % WORLD:
        stop(f"--groups {c.groups}: must be a multiple of the {WORLD} processes: {nearest(c.groups, lambda n: n % WORLD == 0)}")
    if 0 < c.eval_prompts < WORLD:
        stop(f"--eval_prompts {c.eval_prompts}: each of the {WORLD} processes needs one: {WORLD} or more, or 0 for all")
    if c.ema_decay >= 1:
        stop(f"--ema_decay {c.ema_decay}: must be below 1")


def nearest(value, works):
    """The nearest numbers below and above that work, as text."""
    below = [n for n in range(value - 1, 0, -1) if works(n)][:1]
    above = [n for n in range(value + 1, 100 * value) if works(n)][:1]
    return " or ".join(map(str, below + above)) + " would do"


def describe(model, config):
    """What follows from the options, and what it will take."""
    c, K = config, len(choose_sde_steps(config, random.Random(0)))
    images = c.groups * c.group_size
    pairs = images // c.updates * K // WORLD
    lora = sum(p.numel() for p in model.params)
    processes = f"{WORLD} process{'es' * (WORLD > 1)} ({model.device})"
    lines = [f"{c.groups} groups x {c.group_size} = {images} images per epoch on {processes}",
             f"{K} of {c.train_steps} steps trained, {c.updates} updates per epoch, each of {images // c.updates} images x {K} "
             f"steps in {math.ceil(pairs / c.batch_size)} micro-batches of {c.batch_size} (per process)",
             f"evaluation of {c.eval_prompts or 'all'} test prompts x {c.eval_per_prompt} in {c.eval_steps} steps, every "
             f"{c.eval_every} epochs",
             f"LoRA on {len(model.params)} tensors with {lora:,} parameters",
             f"memory of a GPU: about {memory(model, config) / 1e9:.1f} GB, and what the reward's own models take"]
    return "\n".join(lines)


def memory(model, config):
    """Bytes, roughly: the weights; 20 for each LoRA parameter (itself, gradient, two of AdamW, average); and what
    the update keeps for its backward pass, or an encoding of the prompts, whichever is more.

    The network keeps about 25 numbers for each token, channel and layer, with checkpointing 1 and those of one layer.
    (The tests count them in SD3.5-Medium's blocks. Attention matrices are not among them: fused kernels do not keep them.)
    """
    size = lambda modules: sum(p.numel() * p.element_size() for m in modules for p in m.parameters())
    pipe, net = model.pipe, model.pipe.transformer.config
    channels = net.num_attention_heads * net.attention_head_dim
    layers = net.num_layers + (net.get("num_single_layers") or 0)
    tokens = (config.resolution // pipe.vae_scale_factor // 2) ** 2 + model.empty[0].shape[1]
    branches = 2 if config.guidance != 1 and not is_flux(pipe) else 1
    kept = layers + 25 if config.gradient_checkpointing else 25 * layers
    activations = kept * tokens * channels * config.batch_size * branches * (2 if config.precision == "bf16" else 4)
    encoders = size(text_encoders(pipe))
    resident = size([pipe.transformer, pipe.vae]) + 16 * sum(p.numel() for p in model.params)
    return resident + (max(encoders, activations) if config.offload else encoders + activations)


@contextlib.contextmanager
def ctrl_c():
    """While open: the first Ctrl-C only adds to the list that this gives; the second stops at once."""
    asked = []

    def first(*_):
        asked.append(True)
        if RANK == 0:
            print("\nstopping after this epoch; Ctrl-C again stops at once", file=sys.stderr, flush=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, first)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


def main(argv=None):
    config = parse_config(argv)
    try:
        train(config)
    except rewards.RewardError as error:
        stop(str(error))
    except torch.OutOfMemoryError:
        stop("the GPU's memory is full: lower --batch_size, then add --gradient_checkpointing, then --offload; once a run has "
             f"begun, --resume --name {config.name} takes them, too")
    except KeyboardInterrupt:
        stop(f"interrupted; to go on from the last checkpoint: --resume --name {config.name}")
    except (OSError, SafetensorError) as error:  # a full or unwritable disk; what was written whole stays
        stop(f"cannot read or write a file: {error}; to go on from the last checkpoint: --resume --name {config.name}")


if __name__ == "__main__":
    main()
