"""The command line: ``python -m boft_ext info | run | enable | disable | status``, also installed as ``boft-ext``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import environment
from .info import build_info
from .peft_swap import checked_dropout
from .runner import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line with `arguments` (those of the process if None) and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m boft_ext", description="Fast BOFT fine-tuning: command line.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="print versions and kernels of this installation")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(action=_info)
    program = commands.add_parser(
        "run",
        help="run a script or module with PEFT's BOFT layers on boft_ext",
        usage="python -m boft_ext run [options] SCRIPT ARGUMENTS...\n"
        "       python -m boft_ext run [options] -m MODULE ARGUMENTS...",
        allow_abbrev=False,
    )
    program.add_argument("-m", action="store_true", dest="as_module", help="the program is a module")
    program.add_argument(
        "--dropout", type=_dropout, default="peft", metavar="RULE", help="peft (default), paper, or two shares P1,P2"
    )
    program.add_argument(
        "--keep-merged",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep the originals of merged 16-bit weights, so that unmerging restores every bit",
    )
    program.add_argument("--strict", action="store_true", help="an error where the layout of PEFT is not known")
    # One list: argparse would take a "--" between a program and its arguments for its own.
    program.add_argument("program", nargs=argparse.REMAINDER, metavar="...", help="the program and its arguments")
    program.set_defaults(action=_run, parser=program)
    for name, action, text in (
        ("enable", _enable, "have every Python of this environment patch PEFT when it imports it (BOFT_EXT=0: not)"),
        ("disable", _disable, "undo enable"),
        ("status", _status, "say whether this environment is enabled"),
    ):
        commands.add_parser(name, help=text).set_defaults(action=action)
    options = parser.parse_args(arguments)
    options.action(options)
    return 0


def _dropout(text: str) -> str | tuple[float, float]:
    try:
        return checked_dropout(tuple(map(float, text.split(","))) if "," in text else text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected peft, paper or P1,P2 in 0 ... 1, got {text!r}") from None


def _info(options: argparse.Namespace) -> None:
    values = build_info()
    print(json.dumps(values, indent=2) if options.json else _table(values))


def _run(options: argparse.Namespace) -> None:
    if not options.program:
        options.parser.error("no program to run")
    program, *arguments = options.program
    patch = {name: getattr(options, name) for name in ("dropout", "keep_merged", "strict")}
    run(program, arguments, options.as_module, **patch)


def _enable(options: argparse.Namespace) -> None:
    print(f"wrote {_or_stop(environment.enable)}")


def _disable(options: argparse.Namespace) -> None:
    path = _or_stop(environment.disable)
    print(f"removed {path}" if path else f"nothing to remove: {environment.startup_file()} does not exist")


def _or_stop(change: Callable[[], Path | None]) -> Path | None:
    try:
        return change()
    except OSError as error:
        raise SystemExit(f"boft_ext: the environment is as it was: {error}") from None


def _status(options: argparse.Namespace) -> None:
    print(environment.describe())


def _table(values: dict[str, Any]) -> str:
    width = max(len(name) for name in values)
    return "\n".join(f"{name:{width}}  {_readable(value)}" for name, value in values.items())


def _readable(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "not installed" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
