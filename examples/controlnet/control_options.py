"""The options of the ControlNet recipe, with the paper's settings as defaults. Imports nothing that takes time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from control_rows import read_rows
from recipe_tools.arguments import (
    Parser,
    add_boft_options,
    add_checkpoint_options,
    chosen_blocks,
    number,
    output_folder,
    rate,
    whole,
)

HINT_CHANNELS = (16, 32, 96, 256)
_MANY = 10**9
_SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "polynomial")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what training and drawing both need to find the base model."""
    parser.add_argument(
        "--pretrained-model-name-or-path",
        required=True,
        metavar="MODEL",
        help="a Stable Diffusion 1.x or 2.x pipeline: a name on the hub, or a folder",
    )
    parser.add_argument("--revision", help="revision of the model on the hub")
    parser.add_argument("--variant", help="variant of its files, such as fp16")
    parser.add_argument(
        "--resolution", type=_pixels, default=512, help="pixels of a side, a multiple of 8 (default %(default)s)"
    )
    parser.add_argument("--seed", type=whole(0, 2**31), default=0, help="of everything random (default %(default)s)")


def add_drawing_options(parser: argparse.ArgumentParser) -> None:
    """Add how images are drawn."""
    parser.add_argument(
        "--inference-steps", type=whole(1, 10**4), default=20, help="steps per image (default %(default)s)"
    )
    parser.add_argument(
        "--guidance-scale", type=number(0, 100), default=7.5, help="of the text (default %(default)s)"
    )
    parser.add_argument(
        "--sample-batch-size", type=whole(1, 1024), default=4, help="images drawn at once (default %(default)s)"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of `argv`, with `boft_blocks`, the pair ``(boft_block_size, boft_block_num)``, and `rows`, the data.

    Bad ones end the program in one line and status 2. The output folder exists afterwards.
    """
    parser = Parser(
        prog="train_controlnet_boft.py",
        description="ControlNet with BOFT: teach a text-to-image model to follow a second picture.",
    )
    add_model_options(parser)
    parser.add_argument(
        "--control",
        choices=("light", "full"),
        default="light",
        help="light: the paper's hint encoder of eight convolutions; full: diffusers' ControlNetModel",
    )
    parser.add_argument(
        "--hint-channels",
        type=whole(1, 4096),
        nargs=4,
        default=HINT_CHANNELS,
        metavar="N",
        help="channels of the hint encoder at 1, 1/2, 1/4 and 1/8 of the size (default: 16 32 96 256)",
    )
    _add_data_options(parser)
    add_boft_options(parser, block_num=32, factors=2, dropout=0.1, bias="boft_only")
    _add_training_options(parser)
    add_checkpoint_options(parser, every=500)
    _add_validation_options(parser)
    options = parser.parse_args(argv)
    options.boft_blocks = chosen_blocks(parser, options)
    options.rows = read_rows(
        options.train_data_dir, options.image_column, options.conditioning_image_column, options.caption_column
    )
    if len(options.rows) <= options.held_out:
        parser.error(f"--held-out {options.held_out} of {len(options.rows)} rows leaves none to train on")
    output_folder(parser, options.output_dir)
    return options


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--train-data-dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder with metadata.jsonl, one object a line whose columns name the pictures and hold the text",
    )
    group.add_argument("--image-column", default="image", help="(default %(default)s)")
    group.add_argument("--conditioning-image-column", default="conditioning_image", help="(default %(default)s)")
    group.add_argument("--caption-column", default="text", help="(default %(default)s)")
    group.add_argument(
        "--proportion-empty-prompts",
        type=number(0, 1),
        default=0.0,
        help="share of the texts that training leaves out (default %(default)g)",
    )
    group.add_argument(
        "--dataloader-num-workers", type=whole(0, 256), default=0, help="processes that read (default %(default)s)"
    )


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="where everything is written")
    group.add_argument(
        "--num-train-epochs", type=whole(1, 10**6), default=20, help="passes over the data (default %(default)s)"
    )
    group.add_argument("--max-train-steps", type=whole(1, _MANY), help="updates of the weights, instead of epochs")
    group.add_argument(
        "--train-batch-size",
        type=whole(1, 4096),
        default=16,
        help="pairs per process and backward pass (default %(default)s)",
    )
    group.add_argument(
        "--gradient-accumulation-steps", type=whole(1, 4096), default=1, help="backward passes per step"
    )
    group.add_argument(
        "--gradient-checkpointing", action="store_true", help="recompute activations in the backward pass"
    )
    group.add_argument("--learning-rate", type=rate, default=1e-5, help="of AdamW (default %(default)g)")
    group.add_argument("--adam-weight-decay", type=number(0, 1), default=1e-2, help="(default %(default)g)")
    group.add_argument("--adam-epsilon", type=number(0, 1), default=1e-8, help="(default %(default)g)")
    group.add_argument("--max-grad-norm", type=number(0, 1e9), default=1.0, help="(default %(default)g)")
    group.add_argument("--lr-scheduler", choices=_SCHEDULES, default="constant", help="(default %(default)s)")
    group.add_argument("--lr-warmup-steps", type=whole(0, _MANY), default=0, help="(default %(default)s)")
    group.add_argument(
        "--mixed-precision",
        choices=("no", "fp16", "bf16"),
        help="16 bits for the frozen weights and the arithmetic (default: what accelerate is configured for)",
    )


def _add_validation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--held-out",
        type=whole(1, 10**6),
        default=8,
        help="rows at the end of the data that are not trained on but measured and drawn (default %(default)s)",
    )
    group.add_argument(
        "--validation-steps", type=whole(1, _MANY), default=500, help="steps per drawing of them (default %(default)s)"
    )
    group.add_argument(
        "--control-metric",
        choices=("loss", "shapes"),
        default="loss",
        help="loss: denoising loss of the held-out rows; shapes: also the control error of drawn shapes",
    )
    add_drawing_options(group)


def _pixels(text: str) -> int:
    value = whole(8, 8192)(text)
    if value % 8:
        raise argparse.ArgumentTypeError(f"expected a multiple of 8, got {text!r}")
    return value
