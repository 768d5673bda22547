"""Run the tests of the PEFT patch with other PEFT versions. Run by ``make test-peft-versions``.

Usage: run_peft_versions.py VERSION...

VERSION is a release, which pip installs into ``.peft-versions`` (kept between runs, ignored by git), or the folder of a
checkout of PEFT, for example of one of its pull requests. Each is put before the installed PEFT; everything else is
that of the environment. For each, these tests and PEFT's own BOFT tests of that version run; the exit status is 1 if
any fail.
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import run_peft_suite

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".peft-versions"
TESTS = ["tests/test_peft_swap.py", "tests/test_peft_training.py"]
# What PEFT itself makes of m where its kernel does not build; nothing in a PEFT that has no kernel.
KERNEL_TESTS = [
    "tests/test_peft_swap.py::test_layers_made_before_keep_their_factors",
    "tests/test_peft_swap.py::test_a_pickle_made_before_works",
]


def install(version: str) -> Path:
    """The folder that holds PEFT `version` and nothing else, filled by pip if it is not there yet."""
    folder = FOLDER / version
    if not folder.is_dir():
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / ".gitignore").write_text("*\n")
        unfinished = FOLDER / f"{version}.part"
        command = ["install", "--no-deps", "--upgrade", "--target", str(unfinished), f"peft=={version}"]
        subprocess.run([sys.executable, "-m", "pip", *command], check=True)
        unfinished.rename(folder)
    return folder


def run_tests(version: str) -> list[str]:
    """Names of what failed with PEFT `version`."""
    if os.sep in version:
        checkout = Path(version).resolve()
        folder, suite = checkout / "src", checkout
        (suite / "tests" / "__init__.py").touch()
    else:
        folder = install(version)
        suite = run_peft_suite.unpack_suite(version)
        assert [d.version for d in importlib.metadata.distributions(name="peft", path=[str(folder)])] == [version]
    environment = run_peft_suite.environment(folder)
    print(f"\n== PEFT {version}", flush=True)
    has_kernel = "get_fbd_cuda" in (folder / "peft" / "tuners" / "boft" / "layer.py").read_text()
    left_out = [] if has_kernel else [f"--deselect={name}" for name in KERNEL_TESTS]
    own = subprocess.run([sys.executable, "-m", "pytest", "-q", *TESTS, *left_out], cwd=ROOT, env=environment)
    theirs = run_peft_suite.run(suite, environment)
    return [name for name, status in (("boft_ext's tests", own.returncode), ("PEFT's tests", theirs)) if status]


def main(versions: list[str]) -> int:
    if not versions:
        sys.exit(__doc__)
    failed = {version: names for version in versions if (names := run_tests(version))}
    for version, names in failed.items():
        print(f"PEFT {version}: failures in {' and '.join(names)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
