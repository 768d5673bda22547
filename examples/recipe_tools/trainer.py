"""What the recipes under transformers' Trainer share: its arguments, a first log line, files, exact resuming."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

import boft_ext

from .report import first_line

# What Trainer adds to the results of an evaluation that is about time, not about the model.
_TIMES = ("runtime", "samples_per_second", "steps_per_second", "epoch", "model_preparation_time")


def training_arguments(options: argparse.Namespace, **more: Any) -> TrainingArguments:
    """The TrainingArguments of ``training_options.add_training_options``.

    Logs for tensorboard go to ``logs`` in the output folder. `more` is for what one recipe sets differently.
    """
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(options.output_dir / "logs")
    settings: dict[str, Any] = {
        "output_dir": str(options.output_dir),
        "seed": options.seed,
        # Otherwise the order of the data would depend on what drew random numbers before.
        "data_seed": options.seed,
        "learning_rate": options.learning_rate,
        "per_device_train_batch_size": options.train_batch_size,
        "per_device_eval_batch_size": options.eval_batch_size,
        "gradient_accumulation_steps": options.gradient_accumulation_steps,
        "num_train_epochs": options.num_train_epochs,
        "max_steps": options.max_train_steps or -1,
        "lr_scheduler_type": options.lr_schedule,
        "warmup_steps": options.lr_warmup,
        "weight_decay": options.weight_decay,
        "max_grad_norm": options.max_grad_norm,
        "bf16": options.mixed_precision == "bf16",
        "use_cpu": not torch.accelerator.is_available(),
        "gradient_checkpointing": options.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if options.gradient_checkpointing else None,
        "logging_steps": options.logging_steps,
        # A loss that is no number should be seen.
        "logging_nan_inf_filter": False,
        "save_steps": options.checkpointing_steps,
        "save_total_limit": options.checkpoints_total_limit,
        "report_to": "tensorboard",
        "remove_unused_columns": False,
        "disable_tqdm": False,
    }
    return TrainingArguments(**(settings | more))


def start(trainer: Trainer, *notes: str) -> str:
    """Print the first log line of the run and then `notes`, on the main process. Returns the line.

    The trainer has to exist: it puts the model on the device that the line names.
    """
    line = first_line(trainer.model)
    if trainer.is_world_process_zero():
        print("\n".join([line, *notes]), flush=True)
    return line


def run(
    trainer: Trainer,
    options: argparse.Namespace,
    line: str,
    measure: Callable[[], dict[str, float]] | None = None,
) -> dict[str, Any]:
    """Measure, train (from ``options.checkpoint`` on, see ``training_options.parse``), measure again, save.

    Leaves in ``options.output_dir``: ``adapter`` in PEFT's format with the tokenizer or image processor, the logs, the
    checkpoints, and ``metrics.json`` with what is returned; and in ``options.merged_dir``, if given, the merged model.

    Args:
        line: what `start` returned.
        measure: gives the numbers of the model as it is; by default those of ``trainer.evaluate()``. All processes
            call it.

    Returns: ``before`` and ``after``, what `measure` gave; ``steps``; ``steps_here`` and ``seconds``, without those
        before a resumed checkpoint; ``seconds_per_step``; ``losses``, pairs of step and loss; ``first_line``;
        ``settings``.
    """
    measure = measure or (lambda: evaluation(trainer))
    checkpoint = options.checkpoint
    before = measure()
    _forget_evaluation(trainer)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    seconds = time.perf_counter() - started
    after = measure()

    done = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
    steps = trainer.state.global_step
    metrics = {
        "first_line": line,
        "before": before,
        "after": after,
        "steps": steps,
        "steps_here": steps - done,
        "seconds": round(seconds, 3),
        "seconds_per_step": round(seconds / (steps - done), 4) if steps > done else None,
        "losses": [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry],
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()},
    }
    if trainer.is_world_process_zero():
        adapter = options.output_dir / "adapter"
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.save_pretrained(adapter)
        trainer.processing_class.save_pretrained(adapter)
        (options.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        for name in before:
            print(f"{name}: {before[name]:.4f} before, {after[name]:.4f} after")
        print(f"{steps} steps; written to {options.output_dir}: adapter, logs, metrics.json", flush=True)
        if options.merged_dir:
            boft_ext.export_merged(model, options.merged_dir)
            trainer.processing_class.save_pretrained(options.merged_dir)
            print(f"merged model written to {options.merged_dir}", flush=True)
    return metrics


def _forget_evaluation(trainer: Trainer) -> None:
    """Let training prepare the model anew.

    `Trainer.evaluate` leaves a mark on a model that has not trained yet, with which accelerate does not wrap it for
    several processes afterwards: each would train on its own share of the data alone.
    """
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    trainer.accelerator.free_memory()
    vars(trainer.model).pop("_is_accelerate_prepared", None)


def evaluation(trainer: Trainer, **arguments: Any) -> dict[str, float]:
    """The results of ``trainer.evaluate(**arguments)`` without their prefix and without times."""
    results = {name.removeprefix("eval_"): value for name, value in trainer.evaluate(**arguments).items()}
    return {name: value for name, value in results.items() if name not in _TIMES}
