"""Loading a Stable Diffusion model: what stays frozen, and the UNet that is controlled."""

from __future__ import annotations

import argparse

import torch
from control import Frozen
from diffusers import UNet2DConditionModel
from recipe_tools.pipelines import load_pipeline, noise_scheduler
from torch import Tensor


def load_frozen(
    options: argparse.Namespace, dtype: torch.dtype, device: torch.device
) -> tuple[Frozen, UNet2DConditionModel]:
    """The model of `control_options.add_model_options`, frozen, in evaluation mode. One line and status 2 if it cannot
    be loaded or is of another family."""
    pipeline = load_pipeline(options, dtype, "StableDiffusionPipeline")
    scheduler = noise_scheduler(pipeline)
    for module in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        module.requires_grad_(False).eval().to(device)
    return Frozen(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, scheduler), pipeline.unet


def tokens_of(frozen: Frozen, texts: list[str]) -> Tensor:
    """``(texts, length)``, cut or padded to what the text encoder takes."""
    length = frozen.tokenizer.model_max_length
    encoded = frozen.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return encoded.input_ids
