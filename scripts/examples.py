"""``make examples``: run what the README of each example says under "Run it here", and say how long it took.

The commands are the one ``sh`` block below the heading ``## Run it here`` of ``examples/NAME/README.md``, run from the
repository root by a shell that stops at the first command that fails. Names on the command line pick some examples.
They write below ``runs/NAME``, which is emptied first, so that nothing is left from an earlier run.

Small models leave most of a second processor idle, so several examples run side by side, and share the processors:
``--jobs``. What one prints is then in ``runs/NAME.log``, and its last lines are shown when it has ended.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEADING = "## Run it here"
# Of the log of an example that ran beside others.
SHOWN_LINES = 12


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


def run(name: str, script: str, threads: int | None = None, log: Path | None = None) -> tuple[int, float]:
    """Exit status and seconds of the commands of one example; ``python`` in them is this interpreter.

    `threads`: for its arithmetic, unless the environment says. `log`: the file that its output goes to.
    """
    python = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{python}{os.pathsep}{os.environ.get('PATH', os.defpath)}"}
    shutil.rmtree(ROOT / "runs" / name, ignore_errors=True)
    if threads is not None:
        environment.setdefault("OMP_NUM_THREADS", str(threads))
    with contextlib.nullcontext() if log is None else log.open("wb") as output:
        start = time.perf_counter()
        command = ["sh", "-eu", "-c", script]
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output).returncode
        return status, time.perf_counter() - start


def _run_beside_others(name: str, script: str, threads: int) -> tuple[int, float]:
    """`run` into a log in ``runs``, of which the last lines are shown."""
    log = ROOT / "runs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    status, taken = run(name, script, threads, log)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    # A progress bar is one line that it writes again and again.
    shown = "\n".join(line.rpartition("\r")[2] for line in lines[-SHOWN_LINES:])
    print(f"\n== {name}, {taken:.1f} s; all of it in {log.relative_to(ROOT)}\n{shown}", flush=True)
    return status, taken


def run_all(scripts: dict[str, str], jobs: int) -> tuple[dict[str, float], str | None]:
    """Run the examples, `jobs` at a time and none after one that failed.

    Returns: the seconds of those that ended well, and the name of one that failed, which is shown, or None.
    """
    seconds: dict[str, float] = {}
    failed: list[str] = []

    def one(name: str) -> None:
        if failed:
            return
        if jobs > 1:
            status, taken = _run_beside_others(name, scripts[name], max(1, (os.cpu_count() or 1) // jobs))
        else:
            print(f"\n== {name}\n{scripts[name]}", flush=True)
            status, taken = run(name, scripts[name])
        if status:
            failed.append(name)
            print(f"\nexamples: {name} failed with exit status {status}", file=sys.stderr)
        else:
            seconds[name] = taken

    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, scripts))
    return seconds, failed[0] if failed else None


def main() -> int:
    """Run the examples. Returns 1 if one fails, whose name it prints, and 2 for bad arguments."""
    found = {readme.parent.name: readme for readme in sorted(ROOT.glob("examples/*/README.md"))}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(found)}; all if none is given")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="examples at a time (one per processor: %(default)s)"
    )
    options = parser.parse_args()
    chosen = options.names or list(found)
    unknown = [name for name in chosen if name not in found]
    if unknown:
        print(f"examples: there is no example {', '.join(unknown)}: choose from {', '.join(found)}", file=sys.stderr)
        return 2
    if options.jobs < 1:
        print(f"examples: --jobs must be at least 1, got {options.jobs}", file=sys.stderr)
        return 2
    try:
        scripts = {name: commands(found[name]) for name in chosen}
    except ValueError as error:
        print(f"examples: {error}", file=sys.stderr)
        return 2
    start = time.perf_counter()
    seconds, failed = run_all(scripts, min(options.jobs, len(scripts)))
    if failed:
        return 1
    print("\n" + "\n".join(f"{name:<16} {taken:6.1f} s" for name, taken in seconds.items()))
    print(f"{'all':<16} {time.perf_counter() - start:6.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
