"""The progress bar of what takes long."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress_bar(what: str, steps: int, shown: bool) -> Iterator[Callable[[], object]]:
    """A bar of so many steps on standard error, unless `shown` is False; yields the function that makes one step."""
    # Only here, because importing this package should not cost what a notebook's widgets do.
    from tqdm.auto import tqdm

    with tqdm(total=steps, desc=what, disable=not shown) as bar:
        yield bar.update
