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


def existing_folder(text: str) -> Path:
    """An argparse type: a folder that is there."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a folder")
    return Path(text)


def existing_file(text: str) -> Path:
    """An argparse type: a file that is there."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text}")
    return Path(text)


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
    parser: argparse.ArgumentParser,
    *,
    block_size: int = 0,
    block_num: int = 0,
    factors: int,
    dropout: float | None,
    bias: str,
) -> None:
    """Add BOFT's options to `parser`, with a recipe's settings as defaults, for `recipe_tools.adapters.boft_config`.

    Args:
        block_size, block_num: one of them; 0 leaves it out. ``--boft-block-size`` and ``--boft-block-num`` both set
            ``boft_blocks``, the pair of them, and exclude each other.
        dropout: None where it depends on another option; the recipe then fills it in.
    """
    size = whole(1, 2**20)
    group = parser.add_argument_group("BOFT")
    blocks = group.add_mutually_exclusive_group()
    default = f"block size {block_size}" if block_size else f"{block_num} blocks"
    blocks.add_argument(
        "--boft-block-size",
        type=lambda text: (size(text), 0),
        dest="boft_blocks",
        default=(block_size, block_num),
        metavar="B",
        help=f"size b of the blocks; default of this recipe: {default}",
    )
    blocks.add_argument(
        "--boft-block-num",
        type=lambda text: (0, size(text)),
        dest="boft_blocks",
        default=(block_size, block_num),
        metavar="R",
        help="number r = d / b of the blocks, instead of b",
    )
    group.add_argument(
        "--boft-factors",
        type=whole(1, 30),
        default=factors,
        metavar="M",
        help="butterfly factors m (default %(default)s)",
    )
    group.add_argument(
        "--boft-dropout",
        type=number(0, 1, "a probability"),
        default=dropout,
        metavar="P",
        help="share of the blocks that a training step replaces by the identity "
        f"(default {'that of the task' if dropout is None else dropout})",
    )
    group.add_argument(
        "--boft-bias",
        choices=("none", "all", "boft_only"),
        default=bias,
        help="which biases train (default %(default)s)",
    )
