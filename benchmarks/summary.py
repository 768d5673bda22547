"""``python -m benchmarks.summary``: what the tables in benchmarks/results come to, as the Markdown tables of
benchmarks/README.md.

Operators: of the C entry points on all workers, 512 rows and more, by the variant of kernels that most rows have, time as
a multiple of the floor: median, least and largest over d, T and (b, m). Models: time, and peak of live tensors, as a
multiple of `base`, float32 / bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.plots import Row, read

DTYPES = ("f32", "bf16")
# Data of at most so many bytes counts as in cache.
CACHE_BYTES = 8 << 20
OP_TOKENS = 512
OP_COLUMNS = ("case", "provider", "dtype", "d", "tokens", "group", "levels", "workers", "isa", "floor_ratio")
MODEL_COLUMNS = ("case", "provider", "dtype", "measure", "ratio", "peak_ratio")
MODEL_PROVIDERS = ("lora", "oft", "pr3540", "boft_ext", "boft_ext-compact", "boft_ext-recompute", "peft", "peft-m")


def main(arguments: list[str] | None = None) -> int:
    """Print the tables; one line on stderr for a table that cannot be read. 1 if none can, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.summary", description="Sum up the tables.")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results"), help="folder of the CSV files")
    folder = parser.parse_args(arguments).results
    printed = 0
    for level, summary, columns in (("ops", floors, OP_COLUMNS), ("models", models, MODEL_COLUMNS)):
        try:
            print(*summary(read(folder / f"{level}.csv", columns)), sep="\n", end="\n\n")
            printed += 1
        except ValueError as error:
            print(error, file=sys.stderr)
    return 0 if printed else 1


def floors(rows: Sequence[Row]) -> Iterable[str]:
    """The lines of a table with a row for each operator and kind of rotation."""
    places = [(dtype, place) for dtype in DTYPES for place in ("cache", "memory")]
    kernels = [row for row in rows if row["provider"] == "boft_ext-c" and int(row["tokens"] or 0) >= OP_TOKENS]
    if not kernels:
        raise ValueError(f"no rows of boft_ext-c with {OP_TOKENS} tokens and more")
    isa = Counter(row["isa"] for row in kernels).most_common(1)[0][0]
    workers = max(int(row["workers"]) for row in kernels)
    ratios: dict[str, dict[tuple[str, str], list[float]]] = {}
    for row in kernels:
        if row["isa"] == isa and int(row["workers"]) == workers and (name := kind(row)):
            value_bytes = 4 if row["dtype"] == "f32" else 2
            in_cache = int(row["d"]) * int(row["tokens"]) * value_bytes <= CACHE_BYTES
            place = (row["dtype"], "cache" if in_cache else "memory")
            ratios.setdefault(name, {}).setdefault(place, []).append(float(row["floor_ratio"]))
    yield from table([f"{isa}, {workers} workers", *(", ".join(place) for place in places)])
    for name in sorted(ratios):
        cells = (ratios[name].get(place) for place in places)
        yield line(name, *(f"{statistics.median(c):.2f} ({min(c):.2f}–{max(c):.2f})" if c else "-" for c in cells))


def kind(row: Row) -> str | None:
    """The row of the table that a case belongs to; None for those of other floors."""
    if row["case"] in ("scale", "scale backward"):
        return row["case"]
    if row["case"] not in ("rotate", "rotate backward"):
        return None
    group = int(row["group"])
    if row["levels"] != "1":
        mixed = "several levels"
    elif group in (16, 32):
        mixed = f"G = {group}"
    elif group < 16:
        mixed = "G < 16"
    else:
        mixed = "G ≥ 64" if group >= 64 else "other G"
    return f"{row['case']}, {mixed}"


def models(rows: Sequence[Row]) -> Iterable[str]:
    """The lines of a table with a row for each case and measure that has a ratio to `base`."""
    found = {(row["case"], row["measure"], row["provider"], row["dtype"]): row for row in rows}
    cases = dict.fromkeys((row["case"], row["measure"]) for row in rows if row["ratio"])
    columns = [("ratio", measure) for measure in ("step", "decode")] + [("peak_ratio", "step")]
    yield from table(["", *MODEL_PROVIDERS])
    for value, of_measure in columns:
        for case, measure in cases:
            if measure == of_measure:
                cells = (
                    [found.get((case, measure, provider, dtype), {}).get(value) for dtype in DTYPES]
                    for provider in MODEL_PROVIDERS
                )
                name = f"{case}, {'peak' if value == 'peak_ratio' else measure}"
                yield line(name, *(" / ".join(f"{float(one):.2f}" if one else "-" for one in pair) for pair in cells))


def table(heads: Sequence[str]) -> Iterable[str]:
    """The two lines that a Markdown table begins with."""
    yield line(*heads)
    yield line("---", *("---:" for _ in heads[1:]))


def line(*cells: str) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
