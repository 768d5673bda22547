"""Where a run goes on, as its command line says. Imports nothing that takes time."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import fail, output_folder, whole

PREFIX = "checkpoint-"


def add_checkpoint_options(parser: argparse.ArgumentParser, every: int) -> None:
    """Add ``--checkpointing-steps``, every `every` by default, ``--checkpoints-total-limit`` and
    ``--resume-from-checkpoint`` to `parser`."""
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


def check_output(parser: argparse.ArgumentParser, options: argparse.Namespace, last_file: str) -> None:
    """Make ``options.output_dir`` and turn ``--resume-from-checkpoint`` into ``options.checkpoint``, a path or None.

    One line and status 2 if the folder cannot be written to, or the checkpoint is not there or lacks `last_file`, which
    whoever writes checkpoints writes last.
    """
    wanted = options.resume_from_checkpoint
    path = None if wanted in (None, "latest") else Path(wanted)
    if path and (step_of(path) is None or not path.is_dir()):
        parser.error(f"--resume-from-checkpoint {path}: there is no such folder of the form {PREFIX}STEP")
    output_folder(parser, options.output_dir)
    if wanted == "latest":
        path = (checkpoints_in(options.output_dir) or [None])[-1]
    if path and not (path / last_file).is_file():
        fail(f"--resume-from-checkpoint {path} is not complete: it has no {last_file}")
    options.checkpoint = path


def checkpoints_in(output: Path) -> list[Path]:
    """The checkpoints of an output folder, by their steps."""
    found = [path for path in output.glob(f"{PREFIX}*") if path.is_dir() and step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0)


def step_of(path: Path) -> int | None:
    """The step that the name of a checkpoint says; None for any other name."""
    step = path.name.removeprefix(PREFIX)
    return int(step) if path.name.startswith(PREFIX) and step.isdecimal() else None
