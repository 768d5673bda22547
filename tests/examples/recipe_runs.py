"""How the tests of the recipes start them: as users do, by path, in a process of their own and without the hub."""

import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script, *arguments, check=True):
    """The finished process of ``python examples/SCRIPT ARGUMENTS``; it must have status 0 if `check`."""
    return _start([str(EXAMPLES / script), *map(str, arguments)], [], check)


def run_code(code, recipe, *arguments):
    """What `code` prints in a fresh process that can import the modules of a recipe; it must have status 0."""
    return _start(["-c", code, *map(str, arguments)], [str(EXAMPLES / recipe), str(EXAMPLES)], True).stdout


def _start(command, path, check):
    paths = [*path, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, encoding="utf-8", env=environment
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


def call_main(monkeypatch, script, *arguments):
    """``main()`` of ``examples/SCRIPT`` in this process: for arguments that end it before it loads anything."""
    import importlib

    path = EXAMPLES / script
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "argv", [path.name, *map(str, arguments)])
    importlib.import_module(path.stem).main()


def assert_refused(status, output, error, *named):
    """Status 2, nothing on stdout, and one line on stderr with all of `named`."""
    assert status == 2
    assert output == "" and len(error.splitlines()) == 1, output + error
    for text in named:
        assert str(text) in error
