"""The options of the DreamBooth recipe, with the paper's settings as defaults. Imports nothing that takes time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from recipe_tools.arguments import Parser, add_boft_options, existing_folder, number, whole
from recipe_tools.diffusion_options import MANY, add_drawing_options, add_pipeline_options, add_training_options
from recipe_tools.diffusion_options import parse as parse_training


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what training and drawing both need to find the base model."""
    add_pipeline_options(parser, "Stable Diffusion, Stable Diffusion XL or FLUX.1", 16)
    parser.add_argument(
        "--max-sequence-length",
        type=whole(1, 4096),
        default=512,
        help="tokens of FLUX's second text encoder (default %(default)s)",
    )


def add_dreambooth_drawing_options(parser: argparse.ArgumentParser) -> None:
    """Add how pictures are drawn, in validations and afterwards."""
    add_drawing_options(parser, 25, "; for FLUX.1-dev 3.5")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of `argv`, as of `recipe_tools.diffusion_options.parse`."""
    parser = Parser(
        prog="train_dreambooth_boft.py",
        description="DreamBooth with BOFT: teach a text-to-image model one subject from a few pictures.",
    )
    add_model_options(parser)
    _add_data_options(parser)
    add_boft_options(parser, block_size=8, factors=2, dropout=0.1, bias="boft_only")
    parser.add_argument(
        "--target-modules", nargs="+", metavar="NAME", help="layers that BOFT adapts (default: query, key and value)"
    )
    parser.add_argument("--train-text-encoder", action="store_true", help="adapt q, k, v of the CLIP encoders too")
    add_training_options(parser, 4, "pictures of the subject", 3e-5, 2000)
    _add_validation_options(parser)
    options = parse_training(parser, argv)
    _check_class(parser, options)
    return options


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--instance-data-dir",
        type=existing_folder,
        required=True,
        metavar="DIR",
        help="folder with pictures of the subject",
    )
    group.add_argument(
        "--instance-prompt", required=True, metavar="TEXT", help="their text, such as 'a photo of sks dog'"
    )
    group.add_argument(
        "--with-prior-preservation", action="store_true", help="also train on pictures that the base model drew"
    )
    group.add_argument("--class-data-dir", type=Path, metavar="DIR", help="their folder; missing ones are drawn first")
    group.add_argument("--class-prompt", metavar="TEXT", help="their text, such as 'a photo of a dog'")
    group.add_argument(
        "--num-class-images", type=whole(1, 10**6), default=200, help="how many of them (default %(default)s)"
    )
    group.add_argument(
        "--prior-loss-weight", type=number(0, 1000), default=1.0, help="weight of their loss (default %(default)g)"
    )
    group.add_argument("--center-crop", action="store_true", help="crop the middle, not a random part")
    group.add_argument("--random-flip", action="store_true", help="mirror half of the pictures")


def _add_validation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("validation")
    group.add_argument("--validation-prompt", metavar="TEXT", help="draw pictures of it before, during and after")
    group.add_argument(
        "--num-validation-images", type=whole(1, 64), default=4, help="how many each time (default %(default)s)"
    )
    group.add_argument(
        "--validation-steps", type=whole(1, MANY), default=500, help="steps between them (default %(default)s)"
    )
    add_dreambooth_drawing_options(group)


def _check_class(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    given = [name for name in ("class_data_dir", "class_prompt") if getattr(options, name)]
    if options.with_prior_preservation and len(given) < 2:
        parser.error("--with-prior-preservation needs both --class-data-dir and --class-prompt")
    if given and not options.with_prior_preservation:
        parser.error(f"--{given[0].replace('_', '-')} is used only with --with-prior-preservation")
