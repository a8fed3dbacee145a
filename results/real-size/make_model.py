"""A StableDiffusion3Pipeline of SD3.5-Medium's real size with random weights, to see that the script can carry it.

    python results/real-size/make_model.py big-random     # writes a folder of 5 GB

Transformer and VAE have SD3.5-Medium's own configurations. The text encoders have its output widths and nothing else:
real ones would add 11 GB that take no part in training. What it draws is noise.
"""
import sys

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

letters = [chr(c) for c in range(33, 127)]
tokens = letters + [letter + "</w>" for letter in letters] + ["<|startoftext|>", "<|endoftext|>"]
tokenizer = CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)
t5_tokenizer = T5Tokenizer(vocab=[(token, -float(i)) for i, token in enumerate(["<pad>", "</s>", "<unk>", "▁", *letters])],
                           extra_ids=0, model_max_length=512)


def clip(width):
    return CLIPTextModelWithProjection(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=64, projection_dim=width, num_hidden_layers=2,
        num_attention_heads=width // 64, bos_token_id=len(tokens) - 2, eos_token_id=len(tokens) - 1))


torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
transformer = SD3Transformer2DModel(
    sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64, num_attention_heads=24,
    joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048, pos_embed_max_size=384, qk_norm="rms_norm",
    dual_attention_layers=tuple(range(13)))
print(f"{sum(p.numel() for p in transformer.parameters()):,} parameters")
vae = AutoencoderKL(
    block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    layers_per_block=2, latent_channels=16, norm_num_groups=32, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
    use_post_quant_conv=False)
t5 = T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer), d_model=4096, d_kv=64, d_ff=64, num_layers=1, num_heads=2))
StableDiffusion3Pipeline(
    transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), text_encoder=clip(768),
    text_encoder_2=clip(1280), text_encoder_3=t5, tokenizer=tokenizer, tokenizer_2=tokenizer,
    tokenizer_3=t5_tokenizer).save_pretrained(sys.argv[1])
