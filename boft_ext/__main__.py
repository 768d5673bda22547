"""The command line: ``python -m boft_ext info``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from .info import build_info


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line with `arguments` (those of the process if None) and return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m boft_ext", description="Fast BOFT fine-tuning: command line.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="print versions and kernels of this installation")
    info.add_argument("--json", action="store_true", help="as JSON")
    options = parser.parse_args(arguments)
    values = build_info()
    print(json.dumps(values, indent=2) if options.json else _table(values))
    return 0


def _table(values: dict[str, Any]) -> str:
    width = max(len(name) for name in values)
    return "\n".join(f"{name:{width}}  {_readable(value)}" for name, value in values.items())


def _readable(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "not installed" if value is None else str(value)


if __name__ == "__main__":
    sys.exit(main())
