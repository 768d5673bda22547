"""Loading the pipeline that the command line of a diffusion recipe names, and noising latents as it was trained to."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DDPMScheduler, DiffusionPipeline
from torch import Tensor

from .arguments import fail


def load_pipeline(
    options: argparse.Namespace, dtype: torch.dtype | dict[str, torch.dtype], *kinds: str
) -> DiffusionPipeline:
    """The pipeline of `diffusion_options.add_pipeline_options`, its weights in `dtype`, which may differ by component.

    One line and status 2 if it cannot be loaded or its class is none of `kinds`.
    """
    name = options.pretrained_model_name_or_path
    try:
        pipeline = DiffusionPipeline.from_pretrained(
            name, revision=options.revision, variant=options.variant, dtype=dtype
        )
    except (OSError, ValueError) as error:
        where = "no such folder, and on the hub: " if not Path(name).is_dir() else ""
        fail(f"--pretrained-model-name-or-path {name} cannot be loaded: {where}{' '.join(str(error).split())[:300]}")
    kind = type(pipeline).__name__
    if kind not in kinds:
        fail(f"--pretrained-model-name-or-path {name} holds a {kind}, not a {' or '.join(kinds)}")
    return pipeline


def noise_scheduler(pipeline: DiffusionPipeline) -> DDPMScheduler:
    """The scheduler that `pipeline` was trained with. One line and status 2 if its model predicts neither the noise nor
    the velocity."""
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        fail(f"the model predicts {scheduler.config.prediction_type!r}, not the noise or the velocity")
    return scheduler


def noisy_latents(scheduler: DDPMScheduler, latents: Tensor, noise: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """What the model gets, and what it shall predict, both of the shape of `latents`; for `noise_scheduler`'s."""
    noisy = scheduler.add_noise(latents, noise, times)
    velocity = scheduler.config.prediction_type == "v_prediction"
    return noisy, scheduler.get_velocity(latents, noise, times) if velocity else noise
