"""Drawing images that follow conditions."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from control import Control, Frozen
from control_data import condition_tensor
from diffusers import UniPCMultistepScheduler
from PIL import Image
from recipe_tools.images import save_grid


@torch.no_grad()
def draw(
    control: Control,
    frozen: Frozen,
    conditions: Sequence[Image.Image],
    texts: Sequence[str],
    options: argparse.Namespace,
) -> list[Image.Image]:
    """One image for each condition and text, from the seeds ``options.seed``, ``options.seed + 1``, …

    Args:
        options: of `diffusion_options.add_drawing_options`, and `seed`.
    """
    device, dtype = frozen.vae.device, frozen.vae.dtype
    images: list[Image.Image] = []
    for first in range(0, len(texts), options.sample_batch_size):
        batch = slice(first, first + options.sample_batch_size)
        condition = torch.stack([condition_tensor(image) for image in conditions[batch]]).to(device)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            images += control.draw(
                frozen,
                UniPCMultistepScheduler.from_config(frozen.noise_scheduler.config),
                condition,
                prompt=list(texts[batch]),
                num_inference_steps=options.inference_steps,
                guidance_scale=options.guidance_scale,
                generator=[torch.Generator().manual_seed(options.seed + first + i) for i in range(len(condition))],
            )
    return images


def save_beside_conditions(
    path: Path, conditions: Sequence[Image.Image], drawn: dict[str, Sequence[Image.Image]], texts: Sequence[str]
) -> None:
    """Write a PNG with one row per condition: the condition, then the image of each column of `drawn`."""
    rows = [
        (text, [condition, *(images[index] for images in drawn.values())])
        for index, (text, condition) in enumerate(zip(texts, conditions, strict=True))
    ]
    save_grid(path, rows, ["condition", *drawn])
