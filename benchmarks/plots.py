"""``python -m benchmarks.plots``: the figures of the tables in benchmarks/results, as PNG files beside them.

Layers and models: for every measure a panel for each case, bars for the providers as multiples of `base`, or
milliseconds where `base` has no such time; a logarithmic axis where they differ by more than LOGARITHMIC. Another figure
of that kind for the peaks of memory. Operators: a roofline, flops a second against flops a byte, under the bandwidth of
the provider's copy, in cache and in memory, and the measured multiply-add peak.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402  (the backend that needs no screen must be chosen first)

LOGARITHMIC = 10
PROVIDERS = (
    *("base", "base-trainable", "boft_ext", "boft_ext-wrap"),
    *("lora", "oft", "pr3540", "peft", "peft-m"),
)
DTYPES = ("f32", "bf16")
COLOURS = {"f32": "tab:blue", "bf16": "tab:orange"}
CASES = ("rotate", "rotate backward", "scale", "scale backward", "blocks", "blocks backward", "merge")
REFERENCES = {"boft_ext-c": "copy", "boft_ext-graph": "clone-graph", "boft_ext": "clone"}
TITLES = {
    "boft_ext-c": "C entry points on warm buffers",
    "boft_ext-graph": "operators, replayed from a CUDA graph",
    "boft_ext": "operators that allocate their results",
}
# Below this many rows a call is most of an operator's time.
ROOFLINE_TOKENS = 512

BAR_COLUMNS = ("case", "provider", "dtype", "measure", "tokens", "median_ms", "ratio")
OP_COLUMNS = ("case", "provider", "dtype", "d", "tokens", "gb_per_s", "gflop_per_s", "fma_peak_gflops")

Row = dict[str, str]


def main(arguments: list[str] | None = None) -> int:
    """Draw the figures of all tables; one line on stderr for a table that cannot be drawn. 1 if none can, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description="Draw the tables of measurements.")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of the CSV files")
    folder = parser.parse_args(arguments).results
    drawn = 0
    tables = [("ops", roofline, OP_COLUMNS), ("layers", all_bars, BAR_COLUMNS), ("models", all_bars, BAR_COLUMNS)]
    on_gpu = [(f"{level}-cuda", *rest) for level, *rest in (*tables, ("metamath", all_bars, BAR_COLUMNS))]
    # Tables of a CUDA device are there only where somebody had one.
    for level, draw, columns in tables + [entry for entry in on_gpu if (folder / f"{entry[0]}.csv").exists()]:
        try:
            draw(folder, level, read(folder / f"{level}.csv", columns))
            drawn += 1
        except ValueError as error:
            print(f"{level}: not drawn: {error}", file=sys.stderr)
    return 0 if drawn else 1


def read(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a table; ValueError if it is not there, has no rows or lacks one of `columns`."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} has no column {', '.join(missing)}")
        rows = list(reader)
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def all_bars(folder: Path, level: str, rows: Sequence[Row]) -> None:
    """The figures of a level of layers or models: one for each measure, and one for its peaks of memory."""
    for measure in dict.fromkeys(row["measure"] for row in rows):
        of_measure = [row for row in rows if row["measure"] == measure]
        name = f"{level}-{measure.replace('+', '-')}"
        if any(row["ratio"] for row in of_measure):
            bars(folder / f"{name}.png", of_measure, "ratio", f"{level}: {measure}, time as a multiple of base")
        else:
            bars(folder / f"{name}.png", of_measure, "median_ms", f"{level}: {measure}, milliseconds")
        if any(row.get("peak_ratio") for row in of_measure):
            title = f"{level}: {measure}, peak of live tensors as a multiple of base"
            bars(folder / f"{name}-peak.png", of_measure, "peak_ratio", title)


def bars(path: Path, rows: Sequence[Row], column: str, title: str) -> None:
    """A figure with a panel for each case and a bar for each provider and dtype, from the rows that have `column`."""
    rows = [row for row in rows if row[column]]
    panels: dict[str, list[Row]] = {}
    for row in rows:
        tokens = f", {row['tokens']} rows" if row["tokens"] else ""
        panels.setdefault(row["case"] + tokens, []).append(row)
    names = {row["provider"] for row in rows}
    others = sorted(names - set(PROVIDERS))
    providers = [name for name in (*PROVIDERS, *others) if name in names]
    dtypes = [dtype for dtype in DTYPES if any(row["dtype"] == dtype for row in rows)]
    values = [float(row[column]) for row in rows]
    logarithmic = max(values) > LOGARITHMIC * (1 if column != "median_ms" else min(values))

    across = min(len(panels), 3)
    down = math.ceil(len(panels) / across)
    size = (2 + across * max(3.0, 0.6 * len(providers)), 1.3 + 2.7 * down)
    figure, axes = pyplot.subplots(down, across, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, (panel, of_panel) in zip(axes.flat, panels.items()):
        _bar_panel(axis, of_panel, column, providers, dtypes)
        axis.set_title(panel, fontsize=9)
    # The axes are shared: one scale for all. The factors leave room for the numbers over the bars.
    if logarithmic:
        axes[0, 0].set(yscale="log", ylim=(min(values) / 1.5, max(values) * (max(values) / min(values)) ** 0.25))
        axes[0, 0].yaxis.set_major_formatter("{x:g}")
    else:
        axes[0, 0].set_ylim(0, max(values) * 1.2)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(f"{title}\n{textwrap.fill(_conditions(rows), round(13 * size[0]))}", fontsize=10)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=COLOURS[dtype]) for dtype in dtypes]
    figure.legend(handles, dtypes, loc="outside lower center", ncols=len(dtypes))
    _save(figure, path)


def _bar_panel(
    axis: pyplot.Axes, rows: Sequence[Row], column: str, providers: Sequence[str], dtypes: Sequence[str]
) -> None:
    width = 0.8 / len(dtypes)
    for i, dtype in enumerate(dtypes):
        of_dtype = {row["provider"]: float(row[column]) for row in rows if row["dtype"] == dtype}
        shown = [(at, of_dtype[name]) for at, name in enumerate(providers) if name in of_dtype]
        places = [at + (i - (len(dtypes) - 1) / 2) * width for at, _ in shown]
        heights = [value for _, value in shown]
        drawn = axis.bar(places, heights, width, color=COLOURS[dtype])
        axis.bar_label(drawn, [_short(height) for height in heights], fontsize=6, rotation=90, padding=2)
    if column != "median_ms":
        axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_xticks(range(len(providers)), providers, rotation=40, ha="right", fontsize=8)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)


def roofline(folder: Path, level: str, rows: Sequence[Row]) -> None:
    """A figure with a panel for each provider of the op level, from the rows of its first kernels and all threads."""
    threads = max(int(row["threads"]) for row in rows)
    rows = [row for row in rows if row["isa"] == rows[0]["isa"] and int(row["threads"]) == threads]
    shown = {name: reference for name, reference in REFERENCES.items() if any(row["provider"] == name for row in rows)}
    figure, axes = pyplot.subplots(
        1, len(shown), figsize=(6.5 * len(shown), 5.5), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    axes = axes[0]
    for axis, (provider, reference) in zip(axes, shown.items()):
        copies = [row for row in rows if row["provider"] == reference and row["tokens"] and _is_large(row)]
        points = [row for row in rows if row["provider"] == provider and _is_large(row)]
        if points:
            _roofline_panel(axis, points, copies)
        axis.set_title(TITLES[provider], fontsize=10)
        axis.set_xlabel("flops for each byte that must move")
        axis.grid(which="both", alpha=0.2)
    axes[0].set_ylabel("GF/s")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=8)
    conditions = textwrap.fill(_conditions(rows), 150)
    figure.suptitle(f"ops, at least {ROOFLINE_TOKENS} rows\n{conditions}", fontsize=10)
    _save(figure, folder / f"{level}-roofline.png")


def _is_large(row: Row) -> bool:
    return not row["tokens"] or int(row["tokens"]) >= ROOFLINE_TOKENS


def _roofline_panel(axis: pyplot.Axes, points: Sequence[Row], copies: Sequence[Row]) -> None:
    axis.set(xscale="log", yscale="log")
    intensity: Callable[[Row], float] = lambda row: float(row["gflop_per_s"]) / float(row["gb_per_s"])
    for case in CASES:
        for dtype, marker in zip(DTYPES, "o^"):
            shown = [row for row in points if row["case"] == case and row["dtype"] == dtype]
            x, y = [intensity(row) for row in shown], [float(row["gflop_per_s"]) for row in shown]
            style = {"color": f"C{CASES.index(case)}", "marker": marker, "s": 18, "alpha": 0.6, "linewidths": 0}
            if shown:
                axis.scatter(x, y, label=f"{case} {dtype}", **style)
    peak = max(float(row["fma_peak_gflops"]) for row in points)
    bandwidths = sorted(float(row["gb_per_s"]) for row in copies)
    roofs = [("slowest", "-", bandwidths[0]), ("fastest", "--", bandwidths[-1])] if bandwidths else []
    span = [min(map(intensity, points)) / 2, max(map(intensity, points)) * 2]
    for name, style, bandwidth in roofs:
        edge = peak / bandwidth
        corners = [span[0], *([edge] if span[0] < edge < span[1] else []), span[1]]
        heights = [min(peak, bandwidth * corner) for corner in corners]
        axis.plot(corners, heights, color="black", linewidth=1, linestyle=style, label=f"roof: {name} copy, FMA peak")
        axis.annotate(
            f"{bandwidth:.0f} GB/s", (span[0], heights[0]), textcoords="offset points", xytext=(8, -6), fontsize=8
        )
    axis.annotate(
        f"{peak:.0f} GF/s", (span[1], peak), textcoords="offset points", xytext=(-4, 4), ha="right", fontsize=8
    )


def _conditions(rows: Sequence[Row]) -> str:
    """The machine and versions of the rows, with the cases of each where they differ."""
    cases: dict[str, list[str]] = {}
    for row in rows:
        of_condition = cases.setdefault(_condition(row), [])
        if row["case"] not in of_condition:
            of_condition.append(row["case"])
    if len(cases) == 1:
        return next(iter(cases))
    return "; ".join(f"{', '.join(names)}: {condition}" for condition, names in cases.items())


def _condition(row: Row) -> str:
    versions = f"torch {row['torch']}, PEFT {row['peft']}, boft_ext {row['boft_ext']} {row['commit']}".strip()
    if row.get("device", "cpu") != "cpu":
        return f"{row['device']}, CUDA {row['cuda']}, {versions}, {row['date']}"
    return f"{row['cpu']}, {row['isa']}, {row['threads']} threads, {versions}, {row['date']}"


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _save(figure: pyplot.Figure, path: Path) -> None:
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
