"""Writing the files of a directory all or nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def staged(directory: str | os.PathLike[str], obsolete: tuple[str, ...] = ()) -> Iterator[Path]:
    """A temporary directory whose files move into `directory` when the block ends, and vanish if it raises.

    Args:
        directory: created, with its parents; files of the same names are replaced, others stay.
        obsolete: patterns of files that must not survive there beside the new ones.

    Raises: ValueError if `directory` exists and is no directory. After an exception it is as it was before, or gone
        if it did not exist.
    """
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise ValueError(f"{directory} is a file, expected a directory")
    created = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=directory))
    try:
        yield work
        new = sorted(work.iterdir())
        for pattern in obsolete:
            for old in directory.glob(pattern):
                if old.name not in {path.name for path in new}:
                    old.unlink()
        for path in new:
            os.replace(path, directory / path.name)
    except BaseException:
        shutil.rmtree(work)
        for path in created:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise
    work.rmdir()
