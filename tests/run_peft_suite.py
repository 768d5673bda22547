"""Run the BOFT tests of Hugging Face PEFT's own suite on boft_ext's kernels. Run by ``make test-peft``.

The tests come with the source distribution of the installed PEFT version, which pip downloads into ``.peft-suite``
(kept between runs, ignored by git). Arguments are passed on to pytest; the exit status is pytest's.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".peft-suite"

FILES = ["tests/test_custom_models.py", "tests/test_boft.py"]
SELECTION = [*FILES, "-k", "boft or test_adapter_name_makes_no_difference"]
DESELECTED = [
    # Pins that grouped convolutions are refused; boft_ext adapts them.
    "tests/test_boft.py::TestBoft::test_boft_conv2d_groups_greater_than_one_raises",
    # Download a model from the hub; they fail without a network whether PEFT is patched or not.
    "tests/test_boft.py::TestBoft::test_boft_state_dict",
    "tests/test_boft.py::TestBoft::test_boft_old_checkpoint_including_boft_P",
]


def unpack_suite(version: str) -> Path:
    """The unpacked source distribution of PEFT `version`, downloaded if it is not there yet."""
    source = FOLDER / f"peft-{version}"
    if not (source / "tests" / "__init__.py").is_file():
        FOLDER.mkdir(exist_ok=True)
        (FOLDER / ".gitignore").write_text("*\n")
        download = ["download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation", f"peft=={version}"]
        subprocess.run([sys.executable, "-m", "pip", *download, "--dest", str(FOLDER)], check=True)
        shutil.unpack_archive(FOLDER / f"peft-{version}.tar.gz", FOLDER)
        # Its tests import each other as a package. Written last, as the sign that unpacking was complete.
        (source / "tests" / "__init__.py").touch()
    return source


def environment(*first: Path) -> dict[str, str]:
    """Environment variables for a Python that finds the packages in `first`, then this one and its tests' modules."""
    paths = [*map(str, first), str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run(source: Path, environment: dict[str, str], *arguments: str) -> int:
    """pytest's exit status for the BOFT tests of the suite in `source`."""
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "boft_ext_peft_plugin", "-q", *SELECTION]
    command += [f"--deselect={name}" for name in DESELECTED]
    return subprocess.run([*command, *arguments], cwd=source, env=environment).returncode


def main() -> int:
    return run(unpack_suite(importlib.metadata.version("peft")), environment(), *sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
