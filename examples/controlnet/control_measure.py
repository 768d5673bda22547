"""How well a control works on pairs that were kept out of training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from control import Control, Frozen
from control_data import condition_tensor, fitted
from control_drawing import draw
from control_models import tokens_of
from control_rows import Row
from PIL import Image
from recipe_tools.drawn_shapes import control_error
from recipe_tools.images import to_batch
from recipe_tools.pipelines import noisy_latents
from torch import Tensor
from torch.nn import functional

TIMES = 8


class HeldOut:
    """Pairs that are measured and drawn.

    Attributes:
        images, conditions, texts: the pairs, at the resolution of the run.
        drawn: the images of the last call of `measure`.
    """

    def __init__(self, rows: Sequence[Row], frozen: Frozen, options: argparse.Namespace) -> None:
        """`options`: of `control_options.parse`. Raises: as `control_data.fitted`."""
        pairs = [fitted(row, options.resolution) for row in rows]
        self.images, self.conditions = [image for image, _ in pairs], [condition for _, condition in pairs]
        self.texts = [row.text for row in rows]
        self.drawn: list[Image.Image] = []
        self._frozen, self._options = frozen, options
        self._batches = self._fixed_batches()

    @torch.no_grad()
    def _fixed_batches(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
        """Noisy latents, times, text states, conditions and targets: the same for every measurement."""
        frozen, device = self._frozen, self._frozen.vae.device
        generator = torch.Generator().manual_seed(self._options.seed)
        steps = frozen.noise_scheduler.config.num_train_timesteps
        times = torch.tensor([int((index + 0.5) / TIMES * steps) for index in range(TIMES)], device=device)
        batches = []
        for image, condition, text in zip(self.images, self.conditions, self.texts, strict=True):
            pixels = to_batch([image]).to(device, frozen.vae.dtype)
            latents = frozen.vae.encode(pixels).latent_dist.mode().float() * frozen.vae.config.scaling_factor
            latents = latents.expand(TIMES, -1, -1, -1)
            noise = torch.randn(latents.shape, generator=generator).to(device)
            states = frozen.text_encoder(tokens_of(frozen, [text]).to(device))[0]
            noisy, target = noisy_latents(frozen.noise_scheduler, latents, noise, times)
            conditions = condition_tensor(condition).to(device)[None].expand(TIMES, -1, -1, -1)
            batches.append((noisy, times, states.expand(TIMES, -1, -1), conditions, target))
        return batches

    @torch.no_grad()
    def denoising_loss(self, control: Control) -> float:
        """Mean squared error of the predictions at fixed noise and times, without dropout."""
        device, dtype = self._frozen.vae.device, self._frozen.vae.dtype
        total = 0.0
        for noisy, times, states, condition, target in self._batches:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                predicted = control(noisy.to(dtype), times, states, condition)
            total += functional.mse_loss(predicted.float(), target).item()
        return total / len(self._batches)

    def measure(self, control: Control) -> dict[str, float]:
        """Draw the held-out conditions, and measure; `control` is in evaluation mode afterwards."""
        control.eval()
        self.drawn = draw(control, self._frozen, self.conditions, self.texts, self._options)
        found = {"denoising_loss": self.denoising_loss(control)}
        if self._options.control_metric == "shapes":
            errors = [control_error(image, c) for image, c in zip(self.drawn, self.conditions, strict=True)]
            found["control_error"] = sum(errors) / len(errors)
        return found
