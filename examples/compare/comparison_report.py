"""What a comparison leaves: every run as CSV, the table in Markdown, and a plot of the test accuracies."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend that needs no screen must be chosen first)
from comparison import Run  # noqa: E402


def _test_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
    methods: dict[str, list[Run]] = {}
    for run in runs:
        if run.split == "test":
            methods.setdefault(run.method, []).append(run)
    return methods


def _mean_and_deviation(runs: Sequence[Run]) -> tuple[float, float]:
    values = [run.accuracy for run in runs]
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(runs: Sequence[Run]) -> str:
    """A Markdown table, a row per method: parameters, chosen rate, validation accuracy, test accuracy."""
    lines = [
        "| method | parameters in the encoder | rate chosen | validation accuracy | test accuracy, mean ± deviation |",
        "|---|---:|---:|---:|---:|",
    ]
    for method, tested in _test_runs(runs).items():
        mean, deviation = _mean_and_deviation(tested)
        found = max(run.accuracy for run in runs if run.method == method and run.split == "validation")
        first = tested[0]
        lines.append(
            f"| {method} | {first.parameters:,} | {first.rate:g} | {found:.3f} | "
            + (f"{mean:.3f} ± {deviation:.3f} |" if len(tested) > 1 else f"{mean:.3f} |")
        )
    return "\n".join(lines)


def write(folder: Path, name: str, title: str, runs: Sequence[Run], notes: Sequence[str]) -> None:
    """``NAME.csv``, ``NAME.md`` and ``NAME.png`` in `folder`."""
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(Run._fields)
        writer.writerows(runs)
    text = "\n\n".join([f"# {title}", table(runs), *notes])
    (folder / f"{name}.md").write_text(text + "\n", encoding="utf-8")
    _plot(folder / f"{name}.png", title, runs)


def _plot(path: Path, title: str, runs: Sequence[Run]) -> None:
    """Every run as a point, the means with their deviation beside them. The probe is far from all others: left out."""
    methods = {name: tested for name, tested in _test_runs(runs).items() if tested[0].parameters}
    figure, axes = pyplot.subplots(figsize=(7, 1 + 0.55 * len(methods)), layout="constrained")
    for row, tested in enumerate(methods.values()):
        mean, deviation = _mean_and_deviation(tested)
        points = axes.plot([run.accuracy for run in tested], [row + 0.15] * len(tested), "o", alpha=0.5, markersize=4)
        axes.errorbar(mean, row - 0.1, xerr=deviation, fmt="D", capsize=4, color=points[0].get_color())
    labels = [f"{name}\n{tested[0].parameters:,} parameters" for name, tested in methods.items()]
    axes.set_yticks(range(len(methods)), labels)
    axes.invert_yaxis()
    axes.set(xlabel="test accuracy: each run, and mean and deviation", title=title)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
