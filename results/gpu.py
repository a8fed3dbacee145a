"""What the presets for SD3.5 and FLUX cost on a GPU: seconds and memory, with random weights

  python results/gpu.py FILE sd3.5-medium sd3.5-medium-fast flux.1-dev
  python results/gpu.py FILE sd3.5-medium:4                    # with a --batch_size of 4

The networks, text encoders and VAEs have the real sizes, so time and memory are the real ones. Only
the images mean nothing. For each preset, one batch goes through sampling, decoding and an update.
An epoch is extrapolated from that. FILE gets a line of JSON for each preset.
"""
import json
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers import T5Config, T5EncoderModel

TOP = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TOP))
import flow_grpo  # noqa: E402
from toy import tiny  # noqa: E402

# The classes of the real networks, and their configurations
REAL = json.loads((TOP / "toy/golden.json").read_text())["networks"]
GPU = torch.device("cuda")


def on_gpu(make):
    """A model with random weights, made on the GPU in bf16"""
    torch.set_default_dtype(torch.bfloat16)
    with GPU:
        model = make()
    torch.set_default_dtype(torch.float32)
    for weight in model.parameters():
        weight.data *= 0.5  # random weights of the usual size let FLUX's gradients overflow
    return model.eval()


def clip_config(width, layers, heads, projection):
    return CLIPTextConfig(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
                          num_attention_heads=heads, projection_dim=projection)


def pipeline(preset):
    """The pipeline of a preset, as large as the real one"""
    real = REAL[preset.removesuffix("-fast")]
    network_class = getattr(diffusers, real["class"])
    # Those of the tests, because the real tokenizers would have to be downloaded
    _, _, _, t5_tokenizer = tiny.text_encoders(32)
    tokenizer = tiny.clip_tokenizer(77)
    clip_l = clip_config(width=768, layers=12, heads=12, projection=768)
    clip_g = clip_config(width=1280, layers=32, heads=20, projection=1280)
    t5 = on_gpu(lambda: T5EncoderModel(T5Config(
        d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, vocab_size=32128,
        feed_forward_proj="gated-gelu")))
    network = on_gpu(lambda: network_class(**real["config"]))
    # In float32, as load_policy has it
    vae = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4, layers_per_block=2, latent_channels=16,
        scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler
    if preset == "flux.1-dev":
        return diffusers.FluxPipeline(
            vae=vae, transformer=network, tokenizer=tokenizer, tokenizer_2=t5_tokenizer,
            scheduler=scheduler(shift=3.0, use_dynamic_shifting=True),
            text_encoder=on_gpu(lambda: CLIPTextModel(clip_l)), text_encoder_2=t5)
    return diffusers.StableDiffusion3Pipeline(
        vae=vae, transformer=network, scheduler=scheduler(shift=3.0), tokenizer=tokenizer,
        tokenizer_2=tokenizer, tokenizer_3=t5_tokenizer, text_encoder_3=t5,
        text_encoder=on_gpu(lambda: CLIPTextModelWithProjection(clip_l)),
        text_encoder_2=on_gpu(lambda: CLIPTextModelWithProjection(clip_g)))


def timed(function, *args):
    """function(*args) -> what it returns, its seconds, and the most memory it needed in GB"""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.time()
    result = function(*args)
    torch.cuda.synchronize()
    return result, time.time() - start, torch.cuda.max_memory_allocated() / 1e9


def measure(preset, batch_size):
    preset_config = flow_grpo.Config(**flow_grpo.PRESETS[preset])
    size = preset_config.batch_size
    if batch_size:
        size = int(batch_size)
    # One batch of images, all of which go into one update, at as many SDE steps as in the preset
    config = replace(preset_config, groups=1, group_size=size, updates=1, batch_size=size)
    policy_class = flow_grpo.FluxPolicy if preset == "flux.1-dev" else flow_grpo.Policy
    policy = policy_class(pipeline(preset), config)
    prompts = ["a shop with a large sign over its door that says \"FLOW\""]
    window = flow_grpo.choose_window(config, random.Random(0))
    seeds = list(range(size))
    row = {"preset": preset, "card": torch.cuda.get_device_name(), "batch_size": size,
           "torch": torch.__version__}

    condition, row["encode_seconds"], row["encode_gb"] = timed(policy.encode, prompts)
    policy.encode = lambda prompts: condition  # the rollouts below would encode again
    advantages = torch.linspace(-1, 1, size)
    drawn = flow_grpo.rollout(policy, config, prompts, seeds, 2, range(1), seeds)  # to warm up
    flow_grpo.update(policy, config, drawn, advantages)
    drawn, seconds, row["sample_gb"] = timed(
        flow_grpo.rollout, policy, config, prompts, seeds, config.train_steps, window, seeds)
    _, row["decode_seconds"], _ = timed(policy.decode, drawn.latents[:, -1])
    row["sample_seconds"] = seconds - row["decode_seconds"]  # a rollout also decodes
    metrics, row["update_seconds"], row["update_gb"] = timed(
        flow_grpo.update, policy, config, drawn, advantages)
    # Nothing changed since the rollout, so it must be 0.
    row["ratio_off_by"] = float(metrics["ratio_deviation"])
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        policy.velocity(drawn.latents[:, 0], drawn.times[:1], drawn.condition)
    flops = counter.get_total_flops() * config.train_steps
    row["sample_tflops_a_second"] = flops / row["sample_seconds"] / 1e12
    images = preset_config.groups * preset_config.group_size
    one_batch = row["sample_seconds"] + row["decode_seconds"] + row["update_seconds"]
    row["epoch_minutes"] = (row["encode_seconds"] + images / size * one_batch) / 60
    row["images_an_epoch"] = images
    row["sde_steps"] = len(window)
    return row


def main(file, *presets):
    for preset in presets:
        preset, _, batch_size = preset.partition(":")
        row = measure(preset, batch_size)
        for key, value in row.items():
            if isinstance(value, float):
                row[key] = float(f"{value:.3g}")
        line = json.dumps(row)
        print(line, flush=True)
        with open(file, "a") as rows:
            rows.write(line + "\n")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(*sys.argv[1:])
