"""``make examples``: run what the README of each example says under "Run it here", and say how long it took.

The commands are the one ``sh`` block below the heading ``## Run it here`` of ``examples/NAME/README.md``, run from the
repository root by a shell that stops at the first command that fails. Names on the command line pick some examples.
They write below ``runs/NAME``, which is emptied first, so that nothing is left from an earlier run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADING = "## Run it here"


def commands(readme: Path) -> str:
    """The ``sh`` block below the heading.

    Raises: ValueError naming the file if there is not exactly one.
    """
    sections = re.split(r"^(?=## )", readme.read_text(encoding="utf-8"), flags=re.MULTILINE)
    chosen = "".join(section for section in sections if section.startswith(f"{HEADING}\n"))
    blocks = re.findall(r"^```sh\n(.*?)^```$", chosen, flags=re.MULTILINE | re.DOTALL)
    if len(blocks) != 1:
        raise ValueError(f"{readme.relative_to(ROOT)} has {len(blocks)} sh blocks below '{HEADING}', expected 1")
    return blocks[0]


def run(name: str, script: str) -> tuple[int, float]:
    """Exit status and seconds of the commands of one example; ``python`` in them is this interpreter."""
    python = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{python}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)
    print(f"\n== {name}\n{script}", flush=True)
    start = time.perf_counter()
    status = subprocess.run(["sh", "-eu", "-c", script], cwd=ROOT, env=environment).returncode
    return status, time.perf_counter() - start


def main() -> int:
    """Run the examples in turn. Returns 1 after the first one that fails, whose name it prints, and 2 for bad names."""
    found = {readme.parent.name: readme for readme in sorted(ROOT.glob("examples/*/README.md"))}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(found)}; all if none is given")
    chosen = parser.parse_args().names or list(found)
    unknown = [name for name in chosen if name not in found]
    if unknown:
        print(f"examples: there is no example {', '.join(unknown)}: choose from {', '.join(found)}", file=sys.stderr)
        return 2
    try:
        scripts = {name: commands(found[name]) for name in chosen}
    except ValueError as error:
        print(f"examples: {error}", file=sys.stderr)
        return 2
    seconds = {}
    for name, script in scripts.items():
        status, seconds[name] = run(name, script)
        if status:
            print(f"\nexamples: {name} failed with exit status {status}", file=sys.stderr)
            return 1
    print("\n" + "\n".join(f"{name:<16} {taken:6.1f} s" for name, taken in seconds.items()))
    print(f"{'all':<16} {sum(seconds.values()):6.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
