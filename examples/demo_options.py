"""The command line of finetune_text.py."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from recipe_tools.arguments import Parser, output_folder, rate, whole
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


def parse_options(arguments: list[str] | None, description: str) -> Options:
    """The options in `arguments` (None: of the process), with the folder for the results created.

    Raises: SystemExit 2 after one line on stderr for bad arguments or a folder that cannot be written to, and 0 for
        ``--help``.
    """
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, type: Callable[[str], object], text: str) -> None:
        quick = f"; with --quick {QUICK[name]}" if name in QUICK else ""
        default = f" (default {Options._field_defaults[name]}{quick})"
        parser.add_argument(f"--{name.replace('_', '-')}", type=type, help=text + default)

    parser.add_argument("--quick", action="store_true", help="a run of seconds: shows that all works, not how well")
    add("output", Path, "folder for the results")
    add("seed", whole(0, 2**31), "of the data, the initial values and the batches")
    add("per_module", whole(5, 1000), "docstrings of each module, at most")
    add("epochs", whole(1, 100), "passes over the training texts")
    add("batch_size", whole(1, 64), "texts in a step")
    add("max_tokens", whole(4, 512), "length to which texts are cut or padded")
    add("layers", whole(1, LAYERS), "layers of the encoder that are used, from the first")
    add("rounds", whole(1, 1000), "steps of each way that are timed in turns")
    add("block_size", whole(1, 1536), "BOFT block size b")
    add("factors", whole(1, 20), "BOFT butterfly factors m")
    add("boft_lr", rate, "learning rate of BOFT")
    add("lora_lr", rate, "learning rate of LoRA")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    options = Options(**(QUICK if given["quick"] else {}) | given)
    output_folder(parser, options.output, "--output")
    return options
