"""The options of the ControlNet recipe, with the paper's settings as defaults. Imports nothing that takes time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from control_rows import read_rows
from recipe_tools.arguments import Parser, add_boft_options, existing_folder, number, whole
from recipe_tools.diffusion_options import MANY, add_drawing_options, add_pipeline_options, add_training_options
from recipe_tools.diffusion_options import parse as parse_training

HINT_CHANNELS = (16, 32, 96, 256)
INFERENCE_STEPS = 20


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what training and drawing both need to find the base model."""
    add_pipeline_options(parser, "Stable Diffusion 1.x or 2.x", 8)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of `argv`, as of `recipe_tools.diffusion_options.parse`, with `rows`, the data."""
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
    training = add_training_options(parser, 16, "pairs", 1e-5, None)
    training.add_argument(
        "--num-train-epochs", type=whole(1, 10**6), default=20, help="passes over the data (default %(default)s)"
    )
    _add_validation_options(parser)
    options = parse_training(parser, argv)
    options.rows = read_rows(
        options.train_data_dir, options.image_column, options.conditioning_image_column, options.caption_column
    )
    if len(options.rows) <= options.held_out:
        parser.error(f"--held-out {options.held_out} of {len(options.rows)} rows leaves none to train on")
    return options


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--train-data-dir",
        type=existing_folder,
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


def _add_validation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("validation")
    group.add_argument(
        "--held-out",
        type=whole(1, 10**6),
        default=8,
        help="rows at the end of the data that are not trained on but measured and drawn (default %(default)s)",
    )
    group.add_argument(
        "--validation-steps", type=whole(1, MANY), default=500, help="steps per drawing of them (default %(default)s)"
    )
    group.add_argument(
        "--control-metric",
        choices=("loss", "shapes"),
        default="loss",
        help="loss: denoising loss of the held-out rows; shapes: also the control error of drawn shapes",
    )
    add_drawing_options(group, INFERENCE_STEPS)
