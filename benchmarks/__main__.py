"""``python -m benchmarks [ops] [layers] [models] [metamath]``: measure and write CSV files."""

from __future__ import annotations

import argparse
import importlib
import math
import os
from pathlib import Path
from typing import NoReturn

# Read when torch's threads start. Threads that spin while they wait take the processor from the next step.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

LEVELS = ("ops", "layers", "models", "metamath")
# A model of three thousand million parameters is no work for a CPU.
ON_CPU = LEVELS[:3]


class _Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, with the folder for the results created; SystemExit 2 after one line for a bad one."""
    parser = _Parser(
        prog="python -m benchmarks",
        description="Measure boft_ext beside the frozen model, LoRA, OFT and other forms of BOFT; one CSV file a level.",
    )
    named = f"{', '.join(LEVELS)}; if none is named, all of them, on the CPU without metamath"
    parser.add_argument("levels", nargs="*", metavar="level", help=named)
    parser.add_argument("--device", default="cpu", help="cpu (the default) or cuda")
    parser.add_argument("--quick", action="store_true", help="a subset that takes five minutes for all levels")
    parser.add_argument("--tiny", action="store_true", help="metamath: a small model, to try the code")
    parser.add_argument("--minutes", type=float, default=math.inf, help="metamath: start no case after so many")
    parser.add_argument("--threads", type=int, help="threads for torch; otherwise torch's own choice")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder of the CSV files")
    parser.add_argument("--only", metavar="TEXT", help="only cases whose name, with its dtype, contains TEXT")
    options = parser.parse_args(arguments)
    for level in options.levels:
        if level not in LEVELS:
            parser.error(f"there is no level {level!r}; levels are {', '.join(LEVELS)}")
    if options.device not in ("cpu", "cuda"):
        parser.error(f"--device must be cpu or cuda, got {options.device!r}")
    if "metamath" in options.levels and options.device == "cpu" and not options.tiny:
        parser.error("metamath on the CPU needs --tiny")
    options.levels = options.levels or (ON_CPU if options.device == "cpu" else LEVELS)
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"cannot write to {options.out}: {error.strerror}")
    return options


def main() -> None:
    """Run the levels that the command line names."""
    options = parse_arguments()
    import torch

    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("python -m benchmarks: there is no CUDA device")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    for level in LEVELS:
        if level not in options.levels:
            continue
        if device.type == "cuda" and level != "ops":
            importlib.import_module("benchmarks.providers").try_peft_kernel_once()
        run = importlib.import_module(f"benchmarks.{level}").run
        if level == "metamath":
            run(options.out, options.tiny, options.only, device, 60 * options.minutes)
        else:
            run(options.out, options.quick, options.only, device)


if __name__ == "__main__":
    main()
