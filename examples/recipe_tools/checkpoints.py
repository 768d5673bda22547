"""Checkpoints of a run under accelerate from which it goes on exactly as if it had never stopped.

A checkpoint holds what trains, the optimiser, the schedule and the random generators of every process. The order of the
data needs no file: `micro_batches` computes it from the seed and the step.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from accelerate import Accelerator
from torch import nn

from .arguments import fail
from .checkpoint_options import PREFIX, checkpoints_in, step_of

_UNFINISHED = "unfinished-checkpoint"


def keep_only_what_trains(accelerator: Accelerator) -> None:
    """From now on checkpoints of `accelerator` hold the trainable parameters of its prepared models, and no others."""

    def save(models: list[nn.Module], weights: list[Any], folder: str) -> None:
        # Accelerate writes what is left in this list; on all processes, or some would write whole models.
        weights.clear()
        if accelerator.is_main_process:
            for index, model in enumerate(models):
                tensors = {name: value.detach().contiguous() for name, value in _trainable(accelerator, model).items()}
                safetensors.torch.save_file(tensors, Path(folder) / f"trainable_{index}.safetensors")

    def load(models: list[nn.Module], folder: str) -> None:
        for index, model in enumerate(models):
            stored = safetensors.torch.load_file(Path(folder) / f"trainable_{index}.safetensors")
            current = _trainable(accelerator, model)
            if {name: value.shape for name, value in stored.items()} != {n: p.shape for n, p in current.items()}:
                fail(f"--resume-from-checkpoint {folder}: what it holds does not have this run's layers and sizes")
            with torch.no_grad():
                for name, value in stored.items():
                    current[name].copy_(value)
        models.clear()

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)


def save_checkpoint(accelerator: Accelerator, output: Path, step: int, limit: int | None) -> Path:
    """Write ``output/checkpoint-STEP`` and remove the oldest ones beyond `limit`. Every process calls it.

    The folder gets its name when it is complete, so that an interrupted write is never resumed from.
    """
    unfinished, final = output / _UNFINISHED, output / f"{PREFIX}{step}"
    if accelerator.is_main_process:
        shutil.rmtree(unfinished, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(unfinished))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        shutil.rmtree(final, ignore_errors=True)
        unfinished.rename(final)
        if limit is not None:
            for old in checkpoints_in(output)[:-limit]:
                shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return final


def resume(accelerator: Accelerator, checkpoint: Path | None) -> int:
    """Put everything back as `checkpoint` holds it. Returns its step, 0 without one. Every process calls it."""
    if checkpoint is None:
        return 0
    if not (checkpoint / f"random_states_{accelerator.process_index}.pkl").is_file():
        fail(f"--resume-from-checkpoint {checkpoint}: fewer than {accelerator.num_processes} processes wrote it")
    accelerator.load_state(str(checkpoint))
    return step_of(checkpoint) or 0


def micro_batches(
    accelerator: Accelerator, samples: int, batch_size: int, seed: int, first_step: int, last_step: int
) -> Iterator[list[tuple[int, int]]]:
    """The batches of this process for the steps from `first_step` to before `last_step`, as a DataLoader's
    ``batch_sampler``: every epoch goes through all `samples` in an order of its own.

    Yields: lists of `batch_size` pairs ``(index, draw)``: a sample, and a number for this use of it that no other use
        in the run has, to seed what is random about it (`generator_of`).
    """
    processes, accumulation = accelerator.num_processes, accelerator.gradient_accumulation_steps
    epoch, order = -1, torch.empty(0, dtype=torch.int64)
    for micro_step in range(first_step * accumulation, last_step * accumulation):
        start = (micro_step * processes + accelerator.process_index) * batch_size
        batch = []
        for draw in range(start, start + batch_size):
            if draw // samples != epoch:
                epoch = draw // samples
                order = torch.randperm(samples, generator=generator_of(seed, epoch))
            batch.append((int(order[draw % samples]), draw))
        yield batch


def generator_of(seed: int, number: int) -> torch.Generator:
    """A random generator that depends on both numbers alone, for whatever is drawn outside of the training loop."""
    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + number) % 2**63)


def _trainable(accelerator: Accelerator, model: nn.Module) -> dict[str, nn.Parameter]:
    named = accelerator.unwrap_model(model).named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}
