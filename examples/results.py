"""The results of the comparison as aligned text, Markdown, JSON and a figure of the loss curves."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend that needs no screen must be chosen first)

SMOOTHED_OVER = 15


@dataclasses.dataclass(frozen=True)
class Row:
    """One way of fine-tuning; None where it was not measured. Times in seconds, memory in bytes."""

    name: str
    test_accuracy: float | None
    trainable_parameters: int
    training_step: float | None
    step_in_turns: float
    ratio_to_frozen: float
    peak_memory: int


COLUMNS = ("", "test accuracy", "trainable", "ms/step trained", "ms/step in turns", "x frozen", "peak MiB")


def _cells(row: Row) -> list[str]:
    return [
        row.name,
        "-" if row.test_accuracy is None else f"{row.test_accuracy:.3f}",
        f"{row.trainable_parameters:,}",
        "-" if row.training_step is None else f"{1e3 * row.training_step:.0f}",
        f"{1e3 * row.step_in_turns:.0f}",
        f"{row.ratio_to_frozen:.2f}",
        f"{row.peak_memory / 2**20:.0f}",
    ]


def table(rows: Sequence[Row]) -> str:
    """An aligned Markdown table, which is readable as plain text too."""
    cells = [list(COLUMNS), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(
        "| " + " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) + " |" for line in cells
    )


def write_table(folder: Path, rows: Sequence[Row], conditions: Mapping[str, Any], notes: Sequence[str]) -> None:
    """``results.md`` (the table with its notes) and ``results.json`` (the unrounded numbers and the conditions)."""
    (folder / "results.md").write_text("\n".join([table(rows), "", *notes, ""]), encoding="utf-8")
    content = {"conditions": dict(conditions), "rows": [dataclasses.asdict(row) for row in rows]}
    (folder / "results.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _smoothed(values: Sequence[float]) -> list[float]:
    return [
        sum(values[max(0, i + 1 - SMOOTHED_OVER) : i + 1]) / min(i + 1, SMOOTHED_OVER) for i in range(len(values))
    ]


def plot_losses(path: Path, losses: Mapping[str, Sequence[float]], title: str) -> None:
    """A PNG of the training losses by label: every step pale, the mean over the last steps strong."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for label, values in losses.items():
        steps = range(1, len(values) + 1)
        (line,) = axes.plot(steps, _smoothed(values), linewidth=2, label=label)
        axes.plot(steps, values, linewidth=0.8, alpha=0.25, color=line.get_color())
    axes.set(xlabel="optimiser step", ylabel=f"training loss (mean over {SMOOTHED_OVER} steps)", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
