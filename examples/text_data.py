"""A text classification task that needs no download: which standard-library module is a docstring from?

The docstrings are read from the source files beside the running interpreter (CPython 3.10 to 3.13 all have the 16
modules below). Nothing is imported, and ``python -OO`` makes no difference.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Where a module's docstrings are, if not in the file or package of its own name: decimal and datetime are written in C
# with a twin in Python, and datetime's moved in Python 3.12.
_TWINS = {"decimal": "_pydecimal", "datetime": "_pydatetime"}
MODULES = tuple(
    "asyncio datetime decimal email imaplib importlib ipaddress logging mailbox multiprocessing pathlib statistics "
    "tarfile typing unittest xml".split()
)
MASK = "[MASK]"
SHORTEST = 40
FEWEST_PER_MODULE = 40
TEST_FRACTION = 0.25

_names = re.compile("|".join(MODULES), re.IGNORECASE)


class Example(NamedTuple):
    """A docstring with the module names masked, and the index in `MODULES` of the module it came from."""

    text: str
    label: int


class Corpus(NamedTuple):
    """`found` counts all usable docstrings; `train` and `test` hold those that were drawn, without a shared text."""

    train: list[Example]
    test: list[Example]
    found: int


def _docstrings(source: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(source.read_bytes())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def _source_files(stdlib: Path, module: str) -> list[Path]:
    package = stdlib / module
    if package.is_dir():
        files = package.rglob("*.py")
        return sorted(file for file in files if not {"test", "tests"} & set(file.relative_to(package).parts))
    files = [stdlib / f"{name}.py" for name in (module, _TWINS.get(module)) if name]
    return [file for file in files if file.is_file()]


def _masked(docstring: str) -> str:
    """One line without any module name, also inside words such as XMLParser, so that no name gives its text away."""
    return _names.sub(MASK, " ".join(docstring.split()))


def load_corpus(per_module: int, seed: int, stdlib: Path | None = None) -> Corpus:
    """Draw up to `per_module` docstrings of each module and split them by docstring.

    Texts that differ only in case or white space count once, and those that occur in two modules not at all.

    Args:
        per_module: at most this many of each module, so that no module dominates; at least 5.
        seed: of the draw and the split; equal seeds give equal corpora on one Python version.
        stdlib: the folder of the standard library's sources; the running interpreter's by default.

    Raises: ValueError if a module has fewer than `FEWEST_PER_MODULE` usable docstrings, or `per_module` is too small.
    """
    if per_module < 5:
        raise ValueError(f"{per_module} docstrings per module are too few to split: at least 5 are needed")
    stdlib = stdlib or Path(sysconfig.get_path("stdlib"))
    texts = {
        module: {
            text.lower(): text
            for file in _source_files(stdlib, module)
            for text in map(_masked, _docstrings(file))
            if len(text) >= SHORTEST
        }
        for module in MODULES
    }
    modules_with = Counter(key for found in texts.values() for key in found)
    draw = random.Random(seed)
    train, test, found = [], [], 0
    for label, module in enumerate(MODULES):
        usable = sorted(text for key, text in texts[module].items() if modules_with[key] == 1)
        if len(usable) < FEWEST_PER_MODULE:
            raise ValueError(
                f"{len(usable)} docstrings of {module} found in {stdlib}, but {FEWEST_PER_MODULE} are needed: "
                "are the standard library's source files installed?"
            )
        found += len(usable)
        examples = [Example(text, label) for text in draw.sample(usable, min(per_module, len(usable)))]
        held_out = round(TEST_FRACTION * len(examples))
        test += examples[:held_out]
        train += examples[held_out:]
    return Corpus(train, test, found)
