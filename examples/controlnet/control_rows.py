"""The rows of a folder of pictures, their conditions and their texts. Imports nothing that takes time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from recipe_tools.arguments import fail

METADATA = "metadata.jsonl"


class Row(NamedTuple):
    image: Path
    condition: Path
    text: str


def read_rows(folder: Path, image: str, condition: str, text: str) -> list[Row]:
    """The rows of ``folder/metadata.jsonl``, whose columns have these names.

    One line and status 2 if it is not there, a line of it is not such a row, or names a file that is not there.
    """
    path = folder / METADATA
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        fail(f"--train-data-dir {folder}: {METADATA} cannot be read: {error.strerror}")
    rows = []
    for count, line in enumerate(lines, 1):
        try:
            columns = json.loads(line)
            row = Row(folder / columns[image], folder / columns[condition], str(columns[text]))
        except (ValueError, TypeError) as error:
            fail(f"{path}, line {count}: not a row: {error}")
        except KeyError as error:
            fail(f"{path}, line {count}: there is no column {error.args[0]!r} among {', '.join(map(repr, columns))}")
        for file in (row.image, row.condition):
            if not file.is_file():
                fail(f"{path}, line {count}: there is no file {file}")
        rows.append(row)
    return rows
