"""Command lines that report a bad argument in one line, before anything is loaded."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line on stderr and exits with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def fail(message: str) -> NoReturn:
    """End the program with status 2 and one line on stderr: for what shows only once the data or the model is there."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


def whole(low: int, high: int) -> Callable[[str], int]:
    """An argparse type: whole numbers from `low` to `high`."""

    def convert(text: str) -> int:
        value = int(text) if text.isdecimal() else low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {text!r}")
        return value

    return convert


def number(low: float, high: float, meaning: str = "a number") -> Callable[[str], float]:
    """An argparse type: numbers from `low` to `high`, both allowed."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {meaning} from {low:g} to {high:g}, got {text!r}")
        return value

    return convert


def rate(text: str) -> float:
    """An argparse type: learning rates between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a learning rate between 0 and 1, got {text!r}")
    return value


def output_folder(parser: argparse.ArgumentParser, path: Path, option: str = "--output-dir") -> Path:
    """`path` as a folder that exists and can be written to; otherwise `parser` reports `option` and its value."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{option} {path} cannot be a folder for the results: {error.strerror}")
    if not os.access(path, os.W_OK):
        parser.error(f"{option} {path} is a folder that cannot be written to")
    return path


def add_boft_options(
    parser: argparse.ArgumentParser, *, block_size: int = 0, block_num: int = 0, factors: int, dropout: float, bias: str
) -> None:
    """Add ``--boft-block-size``, ``--boft-block-num`` (one of them; 0 leaves it out), ``--boft-factors``,
    ``--boft-dropout`` and ``--boft-bias`` to `parser`, with a recipe's settings as defaults.

    Giving one of the two sizes turns the default of the other off: `chosen_blocks`.
    """
    group = parser.add_argument_group("BOFT")
    default = f"block size {block_size}" if block_size else f"{block_num} blocks"
    group.add_argument(
        "--boft-block-size", type=whole(1, 2**20), help=f"size b of the blocks; default of this recipe: {default}"
    )
    group.add_argument("--boft-block-num", type=whole(1, 2**20), help="number r = d / b of the blocks, instead of b")
    group.add_argument(
        "--boft-factors", type=whole(1, 30), default=factors, help="butterfly factors m (default %(default)s)"
    )
    group.add_argument(
        "--boft-dropout",
        type=number(0, 1, "a probability"),
        default=dropout,
        help="share of the blocks that a training step replaces by the identity (default %(default)s)",
    )
    group.add_argument(
        "--boft-bias",
        choices=("none", "all", "boft_only"),
        default=bias,
        help="which biases train (default %(default)s)",
    )
    parser.set_defaults(boft_default_blocks=(block_size, block_num))


def chosen_blocks(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[int, int]:
    """``(boft_block_size, boft_block_num)`` for a BOFTConfig, one of them 0; `parser` reports it if both were given."""
    size, count = options.boft_block_size, options.boft_block_num
    if size and count:
        parser.error(f"--boft-block-size {size} and --boft-block-num {count}: give one of the two")
    return (size or 0, count or 0) if size or count else options.boft_default_blocks


def add_checkpoint_options(parser: argparse.ArgumentParser, every: int) -> None:
    """Add ``--checkpointing-steps``, every `every` by default, ``--checkpoints-total-limit`` and
    ``--resume-from-checkpoint`` to `parser`, for `recipe_tools.checkpoints`."""
    group = parser.add_argument_group("checkpoints")
    group.add_argument(
        "--checkpointing-steps", type=whole(1, 10**9), default=every, help="steps per checkpoint (default %(default)s)"
    )
    group.add_argument(
        "--checkpoints-total-limit", type=whole(1, 10**6), help="how many checkpoints to keep (default: all)"
    )
    group.add_argument(
        "--resume-from-checkpoint",
        metavar="PATH",
        help="a checkpoint, or 'latest' for the last one of the output folder, if it has any",
    )
