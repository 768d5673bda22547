"""Diffusion pipelines small enough to build, train and draw with in seconds: the real classes, random weights.

Their folders look like those of the real models, so a recipe runs on them unchanged. Images have 64 x 64 pixels,
latents 8 x 8. Every linear layer that BOFT adapts has 32 or 64 inputs: blocks of 4 with up to three factors fit
everywhere, as do 8 blocks per layer with up to four factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from tqdm import tqdm
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from .images import to_batch

RESOLUTION = 64
FAMILIES = ("sd", "sdxl", "flux")

_TEXT_WIDTH = 32
_TEXT_TOKENS = 77
_START, _END = "<|startoftext|>", "<|endoftext|>"


def tiny_pipeline(family: str = "sd", seed: int = 0) -> DiffusionPipeline:
    """A pipeline of one of `FAMILIES` with random weights, the same for the same `seed`; ``save_pretrained`` writes it.

    Raises: ValueError for another family. The global random generators are left as they were.
    """
    builders = {"sd": _stable_diffusion, "sdxl": _stable_diffusion_xl, "flux": _flux}
    if family not in builders:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = builders[family]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with one token per byte: its vocabulary without the merges."""
    symbols = list(_byte_symbols())
    words = symbols + [symbol + "</w>" for symbol in symbols] + [_START, _END]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=_TEXT_TOKENS)


def pretrain(
    pipeline: StableDiffusionPipeline,
    draw: Callable[[torch.Generator], tuple[Image.Image, str]],
    *,
    autoencoder_steps: int = 300,
    denoiser_steps: int = 600,
    batch_size: int = 8,
    seed: int = 0,
) -> dict[str, float]:
    """Teach a tiny "sd" pipeline the images of `draw`, which returns one with its text; all weights train in place.

    Returns: the mean losses over the last tenth of the steps: "autoencoder" (squared error of pixels in -1 ... 1) and
        "denoiser" (squared error of the predicted noise).
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = [draw(generator) for _ in range(64 * batch_size)]
    pixels, texts = to_batch([image for image, _ in pairs]), [text for _, text in pairs]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        autoencoder = _pretrain_autoencoder(pipeline, pixels, autoencoder_steps, batch_size)
        denoiser = _pretrain_denoiser(pipeline, pixels, texts, denoiser_steps, batch_size)
    return {"autoencoder": autoencoder, "denoiser": denoiser}


def _stable_diffusion() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=_autoencoder(),
        text_encoder=CLIPTextModel(_clip_config()),
        tokenizer=clip_tokenizer(),
        unet=UNet2DConditionModel(**_unet_arguments(), cross_attention_dim=_TEXT_WIDTH),
        scheduler=_noise_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _stable_diffusion_xl() -> StableDiffusionXLPipeline:
    time_width = 8
    unet = UNet2DConditionModel(
        **_unet_arguments(),
        cross_attention_dim=2 * _TEXT_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=time_width,
        projection_class_embeddings_input_dim=_TEXT_WIDTH + 6 * time_width,
    )
    return StableDiffusionXLPipeline(
        vae=_autoencoder(),
        text_encoder=CLIPTextModel(_clip_config()),
        text_encoder_2=CLIPTextModelWithProjection(_clip_config()),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=_noise_scheduler(),
    )


def _flux() -> FluxPipeline:
    tokens = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [(symbol, -1.0) for symbol in ("▁", *_byte_symbols())]
    tokenizer = T5Tokenizer(vocab=tokens, extra_ids=0, model_max_length=_TEXT_TOKENS)
    t5 = T5Config(
        vocab_size=len(tokens), d_model=_TEXT_WIDTH, d_kv=8, d_ff=37, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_TEXT_WIDTH,
        pooled_projection_dim=_TEXT_WIDTH,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.05, scaling_factor=1.5),
        text_encoder=CLIPTextModel(_clip_config()),
        tokenizer=clip_tokenizer(),
        text_encoder_2=T5EncoderModel(t5),
        tokenizer_2=tokenizer,
        transformer=transformer,
    )


def _unet_arguments() -> dict[str, Any]:
    return {
        "sample_size": RESOLUTION // 8,
        "in_channels": 4,
        "out_channels": 4,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 8,
        "norm_num_groups": 8,
    }


def _autoencoder(**more: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,  # with 8, of one channel each, no colour would get through
        sample_size=RESOLUTION,
        **more,
    )


def _clip_config() -> CLIPTextConfig:
    tokenizer = clip_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_TEXT_WIDTH,
        projection_dim=_TEXT_WIDTH,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=_TEXT_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _noise_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _byte_symbols() -> list[str]:
    """The printable stand-ins of the 256 bytes in byte-level vocabularies, in the order of GPT-2's."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = 256 - len(printable)
    return [chr(code) for code in printable] + [chr(256 + index) for index in range(others)]


def _pretrain_autoencoder(pipeline: Any, pixels: torch.Tensor, steps: int, batch_size: int) -> float:
    vae = pipeline.vae
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    losses = []
    for _ in tqdm(range(steps), desc="autoencoder", leave=False):
        batch = pixels[torch.randint(len(pixels), (batch_size,))]
        latent = vae.encode(batch).latent_dist
        error = torch.nn.functional.mse_loss(vae.decode(latent.sample()).sample, batch)
        (error + 1e-7 * latent.kl().mean()).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(error.item())
    vae.eval()
    with torch.no_grad():
        deviation = vae.encode(pixels[:256]).latent_dist.mean.std().item()
    vae.register_to_config(scaling_factor=1 / deviation)
    return _end_of(losses)


def _pretrain_denoiser(pipeline: Any, pixels: torch.Tensor, texts: list[str], steps: int, batch_size: int) -> float:
    unet, encoder, scheduler = pipeline.unet, pipeline.text_encoder, pipeline.scheduler
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.sample() * pipeline.vae.config.scaling_factor
    tokens = pipeline.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    empty = pipeline.tokenizer([""], padding="max_length", return_tensors="pt").input_ids
    parameters = [*unet.parameters(), *encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    losses = []
    unet.train()
    encoder.train()
    for _ in tqdm(range(steps), desc="denoiser", leave=False):
        chosen = torch.randint(len(pixels), (batch_size,))
        noise = torch.randn(batch_size, *latents.shape[1:])
        times = torch.randint(scheduler.config.num_train_timesteps, (batch_size,))
        noisy = scheduler.add_noise(latents[chosen], noise, times)
        # Every tenth text is left out, for classifier-free guidance.
        words = torch.where(torch.rand(batch_size, 1) < 0.1, empty, tokens[chosen])
        loss = torch.nn.functional.mse_loss(unet(noisy, times, encoder(words)[0]).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    unet.eval()
    encoder.eval()
    return _end_of(losses)


def _end_of(losses: Sequence[float]) -> float:
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)
