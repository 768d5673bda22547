"""What the diffusion recipes share of a training run under accelerate: its start, its steps, its checkpoints."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.optimization import get_scheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from . import checkpoints
from .arguments import fail
from .checkpoint_options import step_of
from .report import first_line, patch

# Of what does not train, by accelerate's names of its precisions.
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Outcome(NamedTuple):
    """What `Training.run` returns, for ``metrics.json``.

    `measured`: the numbers of `measure` by name, each with its values "before" and "after"; empty but on the main
        process. `facts`: about the run itself.
    """

    measured: dict[str, dict[str, float]]
    facts: dict[str, Any]


def start(options: argparse.Namespace, *handlers: Any) -> Accelerator:
    """The accelerator of a run with the options of `diffusion_options.parse`. Seeds, and patches PEFT.

    `handlers` are accelerate's, for what one recipe sets differently.
    """
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        log_with="tensorboard",
        project_config=ProjectConfiguration(
            project_dir=str(options.output_dir), logging_dir=str(options.output_dir / "logs")
        ),
        kwargs_handlers=list(handlers),
    )
    set_seed(options.seed)
    patch()
    return accelerator


class Training:
    """The training of what requires gradients in `model`, one module, so that all of it is synchronised alike."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, options: argparse.Namespace, steps: int) -> None:
        """One line and status 2 if ``options.checkpoint`` is of a later step than `steps`."""
        self.accelerator, self.model, self.options, self.steps = accelerator, model, options, steps
        reached = step_of(options.checkpoint) if options.checkpoint else None
        if reached is not None and reached > steps:
            fail(f"--max-train-steps {steps}: the checkpoint is of step {reached}")
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def run(
        self,
        name: str,
        settings: dict[str, Any],
        samples: Dataset,
        losses: Callable[[nn.Module, dict[str, Tensor]], tuple[Tensor, dict[str, float]]],
        measure: Callable[[int], dict[str, float]],
    ) -> Outcome:
        """Print the first log line, measure, train from ``options.checkpoint`` on, measure again.

        Args:
            name, settings: what tensorboard shows of the run.
            samples: indexed by pairs ``(index, draw)`` as of `checkpoints.micro_batches`.
            losses: of the prepared model and a batch: the loss, and what is logged of it.
            measure: measures and draws what was learned until a step: 0 before anything is, every
                ``options.validation_steps``, and the last one. Only the main process calls it: the others wait at the
                next step, where gradients are synchronised. Random states stay as they are.
        """
        accelerator, options = self.accelerator, self.options
        accelerator.print(first_line(self.model))
        optimizer = torch.optim.AdamW(
            self.parameters, lr=options.learning_rate, weight_decay=options.adam_weight_decay, eps=options.adam_epsilon
        )
        processes = accelerator.num_processes  # a prepared schedule takes as many steps at a time
        schedule = get_scheduler(
            options.lr_scheduler,
            optimizer,
            num_warmup_steps=options.lr_warmup_steps * processes,
            num_training_steps=self.steps * processes,
        )
        prepared = accelerator.prepare(self.model, optimizer, schedule)
        checkpoints.keep_only_what_trains(accelerator)
        accelerator.init_trackers(name, config={key: str(value) for key, value in sorted(settings.items())})
        before = self._measure(measure, 0)
        set_seed(options.seed, device_specific=True)
        first_step = checkpoints.resume(accelerator, options.checkpoint)
        seconds = self._steps(*prepared, first_step, samples, losses, measure)
        after = self._measure(measure, self.steps)
        facts = {
            "steps": self.steps,
            "median_step_seconds": sorted(seconds)[len(seconds) // 2] if seconds else None,
            "processes": processes,
            # Of every process: sum and sum of squares of what it trained. They are equal.
            "trained_sums": self._trained_sums(),
        }
        # With several processes the wrapped model must go before the group that it talks through: the group's threads are
        # joined where its last holder goes, and a wrapper that goes later does that while it keeps Python from them.
        prepared = accelerator.free_memory(*prepared)
        accelerator.end_training()
        return Outcome({key: {"before": value, "after": after[key]} for key, value in before.items()}, facts)

    def _steps(self, model, optimizer, schedule, first_step: int, samples: Dataset, losses, measure) -> list[float]:
        """Train from `first_step` on. Returns the seconds of each step."""
        accelerator, options = self.accelerator, self.options
        batches = checkpoints.micro_batches(
            accelerator, len(samples), options.train_batch_size, options.seed, first_step, self.steps
        )
        # A loader draws from the default generator where it is given none, and then a resumed run would differ.
        loader = DataLoader(
            samples, batch_sampler=batches, num_workers=options.dataloader_num_workers, generator=torch.Generator()
        )
        bar = tqdm(total=self.steps, initial=first_step, desc="steps", disable=not accelerator.is_local_main_process)
        step, seconds, begun = first_step, [], time.perf_counter()
        model.train()
        for batch in loader:
            with accelerator.accumulate(model):
                loss, logs = losses(model, batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(self.parameters, options.max_grad_norm)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            step += 1
            accelerator.log({**logs, "lr": schedule.get_last_lr()[0]}, step=step)
            bar.set_postfix(loss=f"{loss.item():.4f}")
            bar.update()
            seconds.append(time.perf_counter() - begun)
            if step % options.checkpointing_steps == 0:
                checkpoints.save_checkpoint(accelerator, options.output_dir, step, options.checkpoints_total_limit)
            if step % options.validation_steps == 0 and step < self.steps:
                self._measure(measure, step)
                model.train()
            begun = time.perf_counter()
        bar.close()
        return seconds

    def _measure(self, measure: Callable[[int], dict[str, float]], step: int) -> dict[str, float]:
        if not self.accelerator.is_main_process:
            return {}
        with torch.random.fork_rng(), torch.no_grad():
            return measure(step)

    def _trained_sums(self) -> list[list[float]]:
        values = torch.cat([parameter.detach().double().flatten() for parameter in self.parameters])
        return self.accelerator.gather(torch.stack([values.sum(), values.square().sum()])[None]).tolist()
