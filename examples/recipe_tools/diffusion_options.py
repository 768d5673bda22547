"""Options that the recipes of diffusion models have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from .arguments import number, rate, whole
from .checkpoint_options import add_checkpoint_options, check_output

MANY = 10**9
_SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "polynomial")


def multiple_of(step: int) -> Callable[[str], int]:
    """An argparse type: pixels of a side that are a multiple of `step`."""

    def convert(text: str) -> int:
        value = whole(8, 8192)(text)
        if value % step:
            raise argparse.ArgumentTypeError(f"expected a multiple of {step}, got {text!r}")
        return value

    return convert


def add_pipeline_options(parser: argparse.ArgumentParser, models: str, step: int) -> None:
    """Add what training and drawing both need to find the base model, a pipeline of `models`; ``--resolution`` is a
    multiple of `step`."""
    parser.add_argument(
        "--pretrained-model-name-or-path",
        required=True,
        metavar="MODEL",
        help=f"a {models} pipeline: a name on the hub, or a folder",
    )
    parser.add_argument("--revision", help="revision of the model on the hub")
    parser.add_argument("--variant", help="variant of its files, such as fp16")
    parser.add_argument(
        "--resolution",
        type=multiple_of(step),
        default=512,
        help=f"pixels of a side, a multiple of {step} (default %(default)s)",
    )
    parser.add_argument("--seed", type=whole(0, 2**31), default=0, help="of everything random (default %(default)s)")


def add_drawing_options(parser: argparse.ArgumentParser, inference_steps: int, other_guidance: str = "") -> None:
    """Add how pictures are drawn; `other_guidance` says where the default of ``--guidance-scale`` does not suit."""
    parser.add_argument(
        "--inference-steps",
        type=whole(1, 10**4),
        default=inference_steps,
        help="steps per picture (default %(default)s)",
    )
    parser.add_argument(
        "--guidance-scale",
        type=number(0, 100),
        default=7.5,
        help=f"how much the text counts (default %(default)s{other_guidance})",
    )
    parser.add_argument(
        "--sample-batch-size", type=whole(1, 1024), default=4, help="pictures drawn at once (default %(default)s)"
    )


def add_training_options(
    parser: argparse.ArgumentParser, batch_size: int, samples: str, learning_rate: float, steps: int | None
) -> argparse._ArgumentGroup:
    """Add where results go, how AdamW steps and when checkpoints are written, with a recipe's settings as defaults.

    Args:
        samples: what a batch has.
        steps: None where another option says how long training takes.
    Returns: the group, for what else one recipe has.
    """
    group = parser.add_argument_group("training")
    group.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="where everything is written")
    group.add_argument(
        "--train-batch-size",
        type=whole(1, 4096),
        default=batch_size,
        help=f"{samples} per process and backward pass (default %(default)s)",
    )
    group.add_argument(
        "--gradient-accumulation-steps",
        type=whole(1, 4096),
        default=1,
        help="backward passes per step (default %(default)s)",
    )
    group.add_argument(
        "--max-train-steps",
        type=whole(1, MANY),
        default=steps,
        help=f"updates of the weights{f' (default {steps})' if steps else ', instead of epochs'}",
    )
    group.add_argument(
        "--gradient-checkpointing", action="store_true", help="recompute activations in the backward pass"
    )
    group.add_argument("--learning-rate", type=rate, default=learning_rate, help="of AdamW (default %(default)g)")
    group.add_argument("--adam-weight-decay", type=number(0, 1), default=1e-2, help="(default %(default)g)")
    group.add_argument("--adam-epsilon", type=number(0, 1), default=1e-8, help="(default %(default)g)")
    group.add_argument(
        "--max-grad-norm", type=number(0, 1e9), default=1.0, help="clips the gradient (default %(default)g)"
    )
    group.add_argument("--lr-scheduler", choices=_SCHEDULES, default=_SCHEDULES[0], help="(default %(default)s)")
    group.add_argument("--lr-warmup-steps", type=whole(0, MANY), default=0, help="(default %(default)s)")
    group.add_argument(
        "--mixed-precision",
        choices=("no", "fp16", "bf16"),
        help="16 bits for the frozen weights and the arithmetic (default: what accelerate is configured for)",
    )
    group.add_argument(
        "--dataloader-num-workers",
        type=whole(0, 256),
        default=0,
        help="processes that read pictures (default %(default)s)",
    )
    add_checkpoint_options(parser, every=500)
    return group


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of `argv`, with ``checkpoint``, where to go on from, a path or None.

    Bad ones end the program in one line and status 2. The output folder exists afterwards.
    """
    options = parser.parse_args(argv)
    check_output(parser, options, "random_states_0.pkl")
    return options
