"""The training options of the recipes that run under transformers' Trainer; nothing here imports it."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import Parser, number, rate, whole
from .checkpoint_options import add_checkpoint_options, check_output

SCHEDULES = ("constant", "constant_with_warmup", "cosine", "linear")


def add_training_options(
    parser: Parser,
    *,
    output: str,
    checkpointing_steps: int,
    learning_rate: float | None,
    batch_size: int,
    epochs: float | None,
    warmup: float,
    schedule: str = "cosine",
    weight_decay: float = 0.0,
) -> None:
    """Add to `parser` what `trainer.training_arguments` reads, with a recipe's settings as defaults.

    Args:
        output: default of ``--output-dir``.
        learning_rate, epochs: None where they depend on another option; the recipe then fills them in.
        warmup: steps, or below 1 a share of all steps.
    """
    parser.add_argument("--output-dir", type=Path, default=Path(output), help="for all results (default %(default)s)")
    parser.add_argument(
        "--merged-dir",
        type=Path,
        metavar="DIR",
        help="write the model with the adapter merged to this folder, too; it loads without PEFT and boft_ext",
    )
    add_checkpoint_options(parser, every=checkpointing_steps)
    group = parser.add_argument_group("training")
    group.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="of everything random (default %(default)s)")
    group.add_argument(
        "--learning-rate",
        type=rate,
        default=learning_rate,
        help=f"highest rate of the schedule (default {learning_rate or 'that of the task'})",
    )
    group.add_argument(
        "--train-batch-size",
        type=whole(1, 2**16),
        default=batch_size,
        help="rows per device in one pass; a step takes this times --gradient-accumulation-steps times the number of "
        "processes (default %(default)s)",
    )
    group.add_argument(
        "--gradient-accumulation-steps", type=whole(1, 2**16), default=1, help="passes per step (default %(default)s)"
    )
    group.add_argument(
        "--eval-batch-size",
        type=whole(1, 2**16),
        default=batch_size,
        help="rows per device when it measures (default %(default)s)",
    )
    group.add_argument(
        "--num-train-epochs",
        type=number(0, 1e6),
        default=epochs,
        help=f"passes over the data (default {epochs or 'that of the task'})",
    )
    group.add_argument("--max-train-steps", type=whole(1, 10**9), help="stop after so many steps instead")
    group.add_argument(
        "--lr-warmup",
        type=number(0, 1e9),
        default=warmup,
        help="steps in which the rate rises; below 1 a share of all steps (default %(default)g)",
    )
    group.add_argument(
        "--lr-schedule", choices=SCHEDULES, default=schedule, help="what the rate does then (default %(default)s)"
    )
    group.add_argument("--weight-decay", type=number(0, 1), default=weight_decay, help="of AdamW (default %(default)g)")
    group.add_argument(
        "--max-grad-norm", type=number(0, 1e9), default=1.0, help="0 clips nothing (default %(default)g)"
    )
    group.add_argument(
        "--mixed-precision",
        choices=("no", "bf16"),
        default="no",
        help="bf16: frozen weights in bfloat16, what trains in float32 under autocast (default %(default)s)",
    )
    group.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="compute activations again in the backward pass: less memory",
    )
    group.add_argument(
        "--logging-steps", type=whole(1, 10**9), default=10, help="steps per logged loss (default %(default)s)"
    )


def parse(parser: Parser) -> argparse.Namespace:
    """The options of the command line, with ``checkpoint``, where to go on from, a path or None.

    One line and status 2 for wrong ones. The output folder exists afterwards.
    """
    options = parser.parse_args()
    check_output(parser, options, "trainer_state.json")
    return options
