"""The command line of finetune_text.py."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

from text_model import LAYERS


class Options(NamedTuple):
    """What can be chosen; the defaults are those of the full run."""

    output: Path = Path("demo-output")
    quick: bool = False
    seed: int = 0
    per_module: int = 130
    epochs: int = 3
    batch_size: int = 16
    max_tokens: int = 48
    layers: int = LAYERS
    rounds: int = 20
    block_size: int = 8
    factors: int = 2
    boft_lr: float = 2e-3
    lora_lr: float = 2e-3


QUICK = {"per_module": 10, "epochs": 1, "max_tokens": 16, "layers": 2, "rounds": 2}


class _Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def _whole(low: int, high: int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        value = int(text) if text.isdecimal() else -1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got {text!r}")
        return value

    return convert


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a learning rate between 0 and 1, got {text!r}")
    return value


def parse_options(arguments: list[str] | None, description: str) -> Options:
    """The options in `arguments` (None: of the process), with the folder for the results created.

    Raises: SystemExit 2 after one line on stderr for bad arguments or a folder that cannot be written to, and 0 for
        ``--help``.
    """
    parser = _Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, type: Callable[[str], object], text: str) -> None:
        quick = f"; with --quick {QUICK[name]}" if name in QUICK else ""
        default = f" (default {Options._field_defaults[name]}{quick})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=type, help=text + default)

    parser.add_argument("--quick", action="store_true", help="a run of seconds: shows that all works, not how well")
    add("output", Path, "folder for the results")
    add("seed", _whole(0, 2**31), "of the data, the initial values and the batches")
    add("per_module", _whole(5, 1000), "docstrings of each module, at most")
    add("epochs", _whole(1, 100), "passes over the training texts")
    add("batch_size", _whole(1, 64), "texts in a step")
    add("max_tokens", _whole(4, 512), "length to which texts are cut or padded")
    add("layers", _whole(1, LAYERS), "layers of the encoder that are used, from the first")
    add("rounds", _whole(1, 1000), "steps of each way that are timed in turns")
    add("block_size", _whole(1, 1536), "BOFT block size b")
    add("factors", _whole(1, 20), "BOFT butterfly factors m")
    add("boft_lr", _rate, "learning rate of BOFT")
    add("lora_lr", _rate, "learning rate of LoRA")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    options = Options(**(QUICK if given["quick"] else {}) | given)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--output {options.output} cannot be a folder for the results: {error.strerror}")
    if not os.access(options.output, os.W_OK):
        parser.error(f"--output {options.output} is a folder that cannot be written to")
    return options
