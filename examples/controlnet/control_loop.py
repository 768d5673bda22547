"""The ControlNet recipe's training run, under accelerate."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

import torch
from control import TARGETS, Control, make_control
from control_data import Pairs
from control_drawing import save_beside_conditions
from control_measure import HeldOut
from control_models import load_frozen, tokens_of
from recipe_tools.accelerate_loop import DTYPES, Outcome, Training, start
from recipe_tools.adapters import boft_config
from recipe_tools.arguments import fail
from recipe_tools.pipelines import noisy_latents
from recipe_tools.report import adapt
from torch import Tensor, nn
from torch.nn import functional

import boft_ext


class Run:
    """One training run: the model, its loss, and what measures it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.accelerator = start(options)
        self.dtype = DTYPES[self.accelerator.mixed_precision]
        self.frozen, unet = load_frozen(options, self.dtype, self.accelerator.device)
        config = boft_config(options, TARGETS)
        self.control: Control = adapt(lambda: make_control(options.control, unet, config, tuple(options.hint_channels)))
        self.control.to(self.accelerator.device)
        if options.gradient_checkpointing:
            self.control.enable_gradient_checkpointing()
        train_rows, held_out = options.rows[: -options.held_out], options.rows[-options.held_out :]
        try:
            self.held_out = HeldOut(held_out, self.frozen, options)
        except (OSError, ValueError) as error:
            fail(str(error))
        tokens = tokens_of(self.frozen, [*(row.text for row in train_rows), ""])
        self.pairs = Pairs(
            train_rows, options.resolution, tokens[:-1], tokens[-1], options.proportion_empty_prompts, options.seed
        )
        per_step = options.train_batch_size * options.gradient_accumulation_steps * self.accelerator.num_processes
        steps = options.max_train_steps or options.num_train_epochs * math.ceil(len(self.pairs) / per_step)
        self.training = Training(self.accelerator, self.control, options, steps)
        # Of the held-out pairs, before and after.
        self.drawn: dict[str, Any] = {}

    def train(self) -> None:
        """Train, and leave the adapter, the control, the metrics and the images in the output folder."""
        settings = {name: value for name, value in vars(self.options).items() if name != "rows"}
        outcome = self.training.run("controlnet", settings, self.pairs, self._losses, self._measure)
        if self.accelerator.is_main_process:
            self._write(outcome)

    def _losses(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        frozen, device = self.frozen, self.accelerator.device
        with torch.no_grad():
            latents = frozen.vae.encode(batch["pixels"].to(device, self.dtype)).latent_dist.mode().float()
            states = frozen.text_encoder(batch["tokens"].to(device))[0]
        latents = latents * frozen.vae.config.scaling_factor
        steps = frozen.noise_scheduler.config.num_train_timesteps
        timesteps = torch.randint(steps, (len(latents),), device=device)
        noisy, target = noisy_latents(frozen.noise_scheduler, latents, torch.randn_like(latents), timesteps)
        predicted = model(noisy.to(self.dtype), timesteps, states, batch["condition"].to(device))
        loss = functional.mse_loss(predicted.float(), target)
        return loss, {"loss": loss.item()}

    def _measure(self, step: int) -> dict[str, float]:
        """Measure and draw the held-out pairs; log it, and write ``validation/step-STEP.png``."""
        found = self.held_out.measure(self.control)
        for tracker in self.accelerator.trackers:
            tracker.log({f"held_out/{name}": value for name, value in found.items()}, step=step)
        self._draw_grid(f"validation/step-{step}.png", {f"step {step}": self.held_out.drawn})
        self.drawn.setdefault("before", self.held_out.drawn)
        self.drawn["after"] = self.held_out.drawn
        return found

    def _draw_grid(self, name: str, columns: dict[str, Any]) -> None:
        held_out = self.held_out
        save_beside_conditions(self.options.output_dir / name, held_out.conditions, columns, held_out.texts)

    def _write(self, outcome: Outcome) -> None:
        options = self.options
        self.control.save(options.output_dir, options.pretrained_model_name_or_path)
        self._draw_grid("validation.png", {**self.drawn, "asked for": self.held_out.images})
        report = boft_ext.parameter_report(self.control)
        counts = {
            "trainable_parameters": sum(parameter.numel() for parameter in self.training.parameters),
            "effective_boft_parameters": sum(total.effective for total in report.totals.values()),
        }
        metrics = {**outcome.measured, **outcome.facts, **counts}
        (options.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        pairs = f"{options.held_out} held-out pairs"
        for name, values in outcome.measured.items():
            print(f"{name.replace('_', ' ')}, {pairs}: {values['before']:.4f} before, {values['after']:.4f} after")


def train(options: argparse.Namespace) -> None:
    """Run the recipe with the options of `control_options.parse`."""
    Run(options).train()
