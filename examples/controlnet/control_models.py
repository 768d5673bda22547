"""Loading a Stable Diffusion model: what stays frozen, and the UNet that is controlled."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from control import Frozen
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from recipe_tools.arguments import fail
from torch import Tensor

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_frozen(
    options: argparse.Namespace, dtype: torch.dtype, device: torch.device
) -> tuple[Frozen, UNet2DConditionModel]:
    """The model of `control_options.add_model_options`, frozen, in evaluation mode. One line and status 2 if it cannot
    be loaded or is of another family."""
    name = options.pretrained_model_name_or_path
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            name, revision=options.revision, variant=options.variant, dtype=dtype
        )
    except (OSError, ValueError) as error:
        where = "no such folder, and on the hub: " if not Path(name).is_dir() else ""
        fail(f"--pretrained-model-name-or-path {name} cannot be loaded: {where}{' '.join(str(error).split())[:300]}")
    if not isinstance(pipeline, StableDiffusionPipeline):
        fail(f"--pretrained-model-name-or-path {name} holds a {type(pipeline).__name__}, no StableDiffusionPipeline")
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        fail(f"the model predicts {scheduler.config.prediction_type!r}, not the noise or the velocity")
    for module in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        module.requires_grad_(False).eval().to(device)
    return Frozen(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, scheduler), pipeline.unet


def tokens_of(frozen: Frozen, texts: list[str]) -> Tensor:
    """``(texts, length)``, cut or padded to what the text encoder takes."""
    length = frozen.tokenizer.model_max_length
    encoded = frozen.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return encoded.input_ids


def noisy_latents(frozen: Frozen, latents: Tensor, noise: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    """What the UNet gets, and what it shall predict: both of the shape of `latents` and in float32."""
    scheduler = frozen.noise_scheduler
    noisy = scheduler.add_noise(latents, noise, timesteps)
    if scheduler.config.prediction_type == "v_prediction":
        return noisy, scheduler.get_velocity(latents, noise, timesteps)
    return noisy, noise
