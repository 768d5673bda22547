"""How the tests of the recipes start them: as users do, by path, in a process of their own and without the hub."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import boft_ext

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(script, *arguments, processes=1, check=True):
    """The finished ``python examples/SCRIPT ARGUMENTS``, or so many of it on the CPU; it must have status 0 if `check`.

    Without MPI `accelerate launch --cpu` starts one process only, so torch's launcher starts several.
    """
    several = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={processes}")
    launch = several if processes > 1 else ()
    settings = {"ACCELERATE_USE_CPU": "true"} if processes > 1 else {}
    return _start([*launch, str(EXAMPLES / script), *map(str, arguments)], settings, check)


def run_code(code, recipe, *arguments):
    """What `code` prints in a fresh process that can import the modules of a recipe; it must have status 0."""
    path = [str(EXAMPLES / recipe), str(EXAMPLES), *filter(None, [os.environ.get("PYTHONPATH")])]
    return _start(["-c", code, *map(str, arguments)], {"PYTHONPATH": os.pathsep.join(path)}, True).stdout


def _start(command, settings, check):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **settings}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, encoding="utf-8", env=environment
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


def call_main(monkeypatch, script, *arguments):
    """``main()`` of ``examples/SCRIPT`` in this process, which leaves PEFT and accelerate as they were."""
    from accelerate.state import AcceleratorState

    path = EXAMPLES / script
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "argv", [path.name, *map(str, arguments)])
    try:
        importlib.import_module(path.stem).main()
    finally:
        boft_ext.unpatch_peft()
        AcceleratorState._reset_state(reset_partial_state=True)


def recipe_modules(*recipes):
    """A fixture: the modules of these recipes can be imported; PEFT is as before afterwards."""

    @pytest.fixture
    def modules(monkeypatch):
        for folder in ("", *recipes):
            monkeypatch.syspath_prepend(str(EXAMPLES / folder))
        yield
        boft_ext.unpatch_peft()

    return modules


def refused(monkeypatch, capsys, script, arguments, *named):
    """``main()`` of ``examples/SCRIPT`` refuses `arguments`, as `assert_refused` says."""
    with pytest.raises(SystemExit) as stopped:
        call_main(monkeypatch, script, *arguments)
    assert_refused(stopped.value.code, *capsys.readouterr(), *named)


def assert_refused(status, output, error, *named):
    """Status 2, nothing on stdout, and one line on stderr with all of `named`, besides bars of loading."""
    assert status == 2
    lines = [line for line in error.splitlines() if line and "it/s" not in line]
    assert output == "" and len(lines) == 1, output + error
    for text in named:
        assert str(text) in lines[0]
