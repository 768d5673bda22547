"""scripts/examples.py, which make examples starts, on examples that take no time."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = """# Title

```sh
exit 3
```

## Run it here

```sh
{}
```

## At full size

```sh
exit 4
```
"""


@pytest.fixture
def examples(tmp_path, monkeypatch):
    """Runs the script on the folders `good` and `bad` below a root of its own; its status."""
    spec = importlib.util.spec_from_file_location("examples_script", ROOT / "scripts" / "examples.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "ROOT", tmp_path)
    commands = {
        "good": 'mkdir -p runs/good\n[ ! -e runs/good/file ]\ntouch runs/good/file\n[ "$(command -v python)" ]',
        "bad": "false\ntouch runs/too-far",
    }
    for name, command in commands.items():
        (tmp_path / "examples" / name).mkdir(parents=True)
        (tmp_path / "examples" / name / "README.md").write_text(README.format(command), encoding="utf-8")

    def run(*names):
        monkeypatch.setattr(sys, "argv", ["examples.py", *names])
        return script.main()

    return run


def test_only_the_block_below_the_heading_runs_and_its_time_is_shown(examples, tmp_path, capsys):
    assert examples("good") == 0
    # Again: what an earlier run left is gone first.
    assert examples("good") == 0
    assert (tmp_path / "runs" / "good" / "file").is_file()
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0].startswith("good") and last[1].startswith("all") and last[0].endswith(" s")


def test_the_example_that_fails_is_named(examples, tmp_path, capsys):
    assert examples("--jobs", "1") == 1
    assert "bad failed with exit status 1" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "too-far").exists()


def test_several_at_a_time_leave_a_log_each(examples, tmp_path, capsys):
    assert examples("--jobs", "2") == 1
    printed = capsys.readouterr()
    assert "bad failed with exit status 1" in printed.err and "runs/bad.log" in printed.out
    (tmp_path / "examples" / "bad" / "README.md").write_text(
        README.format("echo first; echo second >&2; echo $OMP_NUM_THREADS threads"), encoding="utf-8"
    )
    assert examples("--jobs", "2") == 0
    log = (tmp_path / "runs" / "bad.log").read_text(encoding="utf-8").splitlines()
    assert log[:2] == ["first", "second"] and log[2].endswith("threads")
    assert (tmp_path / "runs" / "good" / "file").is_file()


def test_unknown_names_and_readmes_without_commands_are_one_line(examples, tmp_path, capsys):
    assert examples("good", "--jobs", "0") == 2
    assert "--jobs must be at least 1, got 0" in capsys.readouterr().err
    assert examples("good", "other") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "other" in error and "bad, good" in error
    (tmp_path / "examples" / "bad" / "README.md").write_text("# Title\n", encoding="utf-8")
    assert examples("bad") == 2
    assert "examples/bad/README.md has 0 sh blocks" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_every_recipe_says_how_to_run_it_here():
    readmes = sorted((ROOT / "examples").glob("*/README.md"))
    assert {"vision", "segmentation", "compare"} <= {readme.parent.name for readme in readmes}
    table = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    for readme in readmes:
        assert f"({readme.parent.name}/README.md)" in table
        assert readme.read_text(encoding="utf-8").count("\n## Run it here\n") == 1
