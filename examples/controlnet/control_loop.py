"""The ControlNet recipe's training run, under accelerate."""

from __future__ import annotations

import argparse
import json
import math
import time
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from control import TARGETS, Control, make_control
from control_data import Pairs
from control_drawing import save_beside_conditions
from control_measure import HeldOut
from control_models import DTYPES, load_frozen, noisy_latents, tokens_of
from diffusers.optimization import get_scheduler
from peft import BOFTConfig
from recipe_tools import checkpoints
from recipe_tools.arguments import fail
from recipe_tools.report import adapt, first_line, patch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from tqdm import tqdm

import boft_ext


class Run:
    """One training run: the model, what measures it, and the loop."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.checkpoint = checkpoints.find_checkpoint(options.output_dir, options.resume_from_checkpoint)
        self.accelerator = Accelerator(
            mixed_precision=options.mixed_precision,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            log_with="tensorboard",
            project_config=ProjectConfiguration(
                project_dir=str(options.output_dir), logging_dir=str(options.output_dir / "logs")
            ),
        )
        set_seed(options.seed)
        patch()
        self.dtype = DTYPES[self.accelerator.mixed_precision]
        self.frozen, unet = load_frozen(options, self.dtype, self.accelerator.device)
        size, count = options.boft_blocks
        config = BOFTConfig(
            boft_block_size=size,
            boft_block_num=count,
            boft_n_butterfly_factor=options.boft_factors,
            boft_dropout=options.boft_dropout,
            bias=options.boft_bias,
            target_modules=list(TARGETS),
        )
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
        self.steps = options.max_train_steps or options.num_train_epochs * math.ceil(len(self.pairs) / per_step)

    def train(self) -> None:
        """Train, and leave the adapter, the control, the metrics and the images in the output folder."""
        options, accelerator = self.options, self.accelerator
        accelerator.print(first_line(self.control))
        parameters = self.control.trainable()
        optimizer = torch.optim.AdamW(
            parameters, lr=options.learning_rate, weight_decay=options.adam_weight_decay, eps=options.adam_epsilon
        )
        processes = accelerator.num_processes  # a prepared schedule takes as many steps at a time
        schedule = get_scheduler(
            options.lr_scheduler,
            optimizer,
            num_warmup_steps=options.lr_warmup_steps * processes,
            num_training_steps=self.steps * processes,
        )
        # One module, so that the gradients of the adapter and of the control are synchronised alike.
        model, optimizer, schedule = accelerator.prepare(self.control, optimizer, schedule)
        checkpoints.keep_only_what_trains(accelerator)
        shown = {name: str(value) for name, value in sorted(vars(options).items()) if name != "rows"}
        accelerator.init_trackers("controlnet", config=shown)
        measured = {"before": self.measure(0)}
        set_seed(options.seed, device_specific=True)
        first_step = checkpoints.resume(accelerator, self.checkpoint)
        if first_step > self.steps:
            fail(f"--max-train-steps {self.steps}: the checkpoint is of step {first_step}")
        drawn = {"before": self.held_out.drawn}
        seconds = self._loop(model, parameters, optimizer, schedule, first_step)
        measured["after"] = self.measure(self.steps)
        drawn["after"] = self.held_out.drawn
        self._write(measured, drawn, seconds)
        accelerator.end_training()

    def _loop(self, model: nn.Module, parameters: Any, optimizer: Any, schedule: Any, first_step: int) -> float | None:
        """Train from `first_step` on. Returns the median seconds of a step, None if there was none."""
        options, accelerator = self.options, self.accelerator
        batches = checkpoints.micro_batches(
            accelerator, len(self.pairs), options.train_batch_size, options.seed, first_step, self.steps
        )
        # A loader draws from the default generator where it is given none, and then a resumed run would differ.
        loader = DataLoader(
            self.pairs,
            batch_sampler=batches,
            num_workers=options.dataloader_num_workers,
            generator=torch.Generator(),
        )
        bar = tqdm(
            total=self.steps, initial=first_step, desc="steps", disable=not accelerator.is_local_main_process
        )
        step, seconds, start = first_step, [], time.perf_counter()
        model.train()
        for batch in loader:
            with accelerator.accumulate(model):
                loss = self._loss(model, batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(parameters, options.max_grad_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            accelerator.log({"loss": loss.item(), "lr": schedule.get_last_lr()[0]}, step=step)
            bar.set_postfix(loss=f"{loss.item():.4f}")
            bar.update()
            seconds.append(time.perf_counter() - start)
            if step % options.checkpointing_steps == 0:
                checkpoints.save_checkpoint(accelerator, options.output_dir, step, options.checkpoints_total_limit)
            if step % options.validation_steps == 0 and step < self.steps:
                self.measure(step)
                model.train()
            start = time.perf_counter()
        bar.close()
        return sorted(seconds)[len(seconds) // 2] if seconds else None

    def _loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        frozen, device = self.frozen, self.accelerator.device
        with torch.no_grad():
            latents = frozen.vae.encode(batch["pixels"].to(device, self.dtype)).latent_dist.mode().float()
            states = frozen.text_encoder(batch["tokens"].to(device))[0]
        latents = latents * frozen.vae.config.scaling_factor
        steps = frozen.noise_scheduler.config.num_train_timesteps
        timesteps = torch.randint(steps, (len(latents),), device=device)
        noisy, target = noisy_latents(frozen, latents, torch.randn_like(latents), timesteps)
        predicted = model(noisy.to(self.dtype), timesteps, states, batch["condition"].to(device))
        return functional.mse_loss(predicted.float(), target)

    def measure(self, step: int) -> dict[str, float]:
        """Measure and draw the held-out pairs on the main process; log it, and write ``validation/step-STEP.png``.

        The other processes wait at the next step, where gradients are synchronised. Random states stay as they are.
        """
        if not self.accelerator.is_main_process:
            return {}
        with torch.random.fork_rng():
            found = self.held_out.measure(self.control)
        for tracker in self.accelerator.trackers:
            tracker.log({f"held_out/{name}": value for name, value in found.items()}, step=step)
        self._draw_grid(f"validation/step-{step}.png", {f"step {step}": self.held_out.drawn})
        return found

    def _draw_grid(self, name: str, columns: dict[str, Any]) -> None:
        held_out = self.held_out
        save_beside_conditions(self.options.output_dir / name, held_out.conditions, columns, held_out.texts)

    def _write(self, measured: dict[str, Any], drawn: dict[str, Any], seconds: float | None) -> None:
        options, accelerator = self.options, self.accelerator
        values = torch.cat([parameter.detach().double().flatten() for parameter in self.control.trainable()])
        sums = accelerator.gather(torch.stack([values.sum(), values.square().sum()])[None]).tolist()
        if not accelerator.is_main_process:
            return
        self.control.save(options.output_dir, options.pretrained_model_name_or_path)
        self._draw_grid("validation.png", {**drawn, "asked for": self.held_out.images})
        report = boft_ext.parameter_report(self.control)
        metrics = {
            name: {when: measured[when][name] for when in ("before", "after")} for name in measured["before"]
        } | {
            "steps": self.steps,
            "median_step_seconds": seconds,
            "trainable_parameters": sum(parameter.numel() for parameter in self.control.trainable()),
            "effective_boft_parameters": sum(total.effective for total in report.totals.values()),
            "processes": accelerator.num_processes,
            # Of every process: sum and sum of squares of what it trained. They are equal.
            "trained_sums": sums,
        }
        (options.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        for name in measured["before"]:
            before, after = metrics[name]["before"], metrics[name]["after"]
            print(f"{name.replace('_', ' ')}, {options.held_out} held-out pairs: {before:.4f} before, {after:.4f} after")


def train(options: argparse.Namespace) -> None:
    """Run the recipe with the options of `control_options.parse`."""
    Run(options).train()
