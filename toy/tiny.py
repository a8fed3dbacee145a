"""Random models of the real classes, for the tests: pipelines of SD3.5-Medium, FLUX.1-dev and
SANA, and CLIP and Mask2Former for rewards. They are small and know nothing.
"""
from pathlib import Path

import torch


def clip_tokenizer(length):
    """A CLIP tokenizer that spells, and fills up or cuts off to so many tokens"""
    from transformers import CLIPTokenizer
    signs = [chr(c) for c in range(33, 127)]
    signs += [sign + "</w>" for sign in signs] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {sign: i for i, sign in enumerate(signs)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=length)


def text_encoders(width):
    """CLIP's configuration, its tokenizer, T5 and its tokenizer"""
    from transformers import CLIPTextConfig, T5Config, T5EncoderModel, T5Tokenizer
    tokenizer = clip_tokenizer(32)  # the real one has 77, which would only be slower
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, projection_dim=32,
        num_hidden_layers=2, num_attention_heads=2, bos_token_id=len(tokenizer) - 2,
        eos_token_id=len(tokenizer) - 1)
    signs = ["<pad>", "</s>", "<unk>", "▁"] + [chr(c) for c in range(33, 127)]
    t5_tokenizer = T5Tokenizer(
        vocab=[(sign, -float(i)) for i, sign in enumerate(signs)], extra_ids=0,
        model_max_length=512)
    t5 = T5EncoderModel(T5Config(
        vocab_size=len(t5_tokenizer), d_model=width, d_kv=16, d_ff=32, num_layers=1, num_heads=2))
    return clip, tokenizer, t5.eval(), t5_tokenizer  # without eval, T5 drops out


def pipeline(family):
    """The toy, or random weights in the classes of SD3.5-Medium, FLUX.1-dev or SANA

    The weights are so large that time, prompt and mask change the image by many gray levels. For
    another family: its VAE has to scale by the pipeline's vae_scale_factor, and an instruction
    before the prompt has to leave room for it in the 14 tokens of the tests.
    """
    import diffusers
    if family == "toy":
        return diffusers.StableDiffusion3Pipeline.from_pretrained(Path(__file__).parent)
    torch.manual_seed(0)
    pipe = sana() if family == "sana" else sd3_or_flux(family)
    for name, part in pipe.components.items():
        factor = 2 if name == "transformer" else 4 if name.startswith("text_encoder") else 1
        if factor > 1 and part is not None:
            for weight in part.parameters():
                weight.data *= factor if weight.ndim > 1 else 1
    return pipe


def sd3_or_flux(family):
    import diffusers
    from transformers import CLIPTextModel, CLIPTextModelWithProjection
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=1, latent_channels=4,
        norm_num_groups=4, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
        use_post_quant_conv=False)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler
    if family in ("flux", "flux-schnell"):
        clip, tokenizer, t5, t5_tokenizer = text_encoders(32)
        return diffusers.FluxPipeline(
            vae=vae, scheduler=scheduler(
                shift=3.0, use_dynamic_shifting=True, base_shift=0.1, max_shift=2.0,
                base_image_seq_len=16, max_image_seq_len=128),  # not the defaults
            text_encoder=CLIPTextModel(clip), tokenizer=tokenizer,
            text_encoder_2=t5, tokenizer_2=t5_tokenizer,
            transformer=diffusers.FluxTransformer2DModel(
                in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
                num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
                guidance_embeds=family == "flux", axes_dims_rope=(4, 6, 6)))
    clip, tokenizer, t5, t5_tokenizer = text_encoders(64)
    return diffusers.StableDiffusion3Pipeline(
        vae=vae, scheduler=scheduler(shift=3.0),
        text_encoder=CLIPTextModelWithProjection(clip), tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(clip), tokenizer_2=tokenizer,
        text_encoder_3=t5, tokenizer_3=t5_tokenizer,
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2,
            attention_head_dim=16, num_attention_heads=3, joint_attention_dim=64,
            caption_projection_dim=48, pooled_projection_dim=64, pos_embed_max_size=16,
            qk_norm="rms_norm", dual_attention_layers=(0,)))


def sana():
    """SANA as its hub repository has it, with its DPM-Solver"""
    import diffusers
    from transformers import Gemma2Config, Gemma2Model, GemmaTokenizer
    signs = ["<pad>", "<eos>", "<bos>", "<unk>", "▁", *map(chr, range(33, 127)), "\n"]
    tokenizer = GemmaTokenizer(vocab={sign: i for i, sign in enumerate(signs)}, merges=[])
    gemma = Gemma2Model(Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16))
    vae = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1), encoder_block_types="ResBlock",
        decoder_block_types="ResBlock", encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), upsample_block_type="interpolate",
        downsample_block_type="stride_conv", scaling_factor=0.41407)
    return diffusers.SanaPipeline(
        tokenizer=tokenizer, text_encoder=gemma, vae=vae,
        scheduler=diffusers.DPMSolverMultistepScheduler(
            use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
            num_layers=1, num_cross_attention_heads=2, cross_attention_head_dim=16,
            cross_attention_dim=32, caption_channels=32, sample_size=16, timestep_scale=0.5))


def clip(folder):
    """A CLIPModel with its processor into a folder. PickScore is one of these."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor
    torch.manual_seed(0)
    tokenizer = clip_tokenizer(20)
    size = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    last = len(tokenizer) - 1
    text = dict(vocab_size=last + 1, max_position_embeddings=20, bos_token_id=last - 1,
                eos_token_id=last, **size)
    vision = dict(image_size=32, patch_size=8, **size)
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)


def detector(folder, labels):
    """A Mask2Former that finds things of these labels, {number: name}, into a folder"""
    from transformers import (Mask2FormerConfig, Mask2FormerForUniversalSegmentation,
                              Mask2FormerImageProcessor, SwinConfig)
    torch.manual_seed(0)
    swin = SwinConfig(image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2,
                      out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32,
        encoder_feedforward_dim=32, encoder_layers=1, decoder_layers=2, dim_feedforward=32,
        num_attention_heads=2, num_queries=10, id2label=labels,
        label2id={label: index for index, label in labels.items()})
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    size = {"shortest_edge": 64, "longest_edge": 64}
    Mask2FormerImageProcessor(size=size).save_pretrained(folder)
