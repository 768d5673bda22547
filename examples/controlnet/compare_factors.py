"""Control error against the number of butterfly factors m, at a fixed number of blocks r (the paper's figure 8).

    python examples/controlnet/compare_factors.py

Trains the light control on the tiny model once for every m and seed, with the same data and settings, and writes
factors.csv, factors.md and factors.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from control_options import parse as parse_training
from recipe_tools.arguments import Parser, output_folder, whole

COLUMNS = ("m", "seed", "effective_boft_parameters", "denoising_loss", "control_error")
SETTINGS = (
    *("--resolution", "64", "--hint-channels", "8", "16", "24", "32", "--boft-block-num", "8"),
    *("--learning-rate", "2e-3", "--lr-scheduler", "cosine", "--lr-warmup-steps", "10", "--control-metric", "shapes"),
    *("--held-out", "64", "--sample-batch-size", "64", "--inference-steps", "10", "--guidance-scale", "2"),
)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of `argv`; bad ones end the program in one line and status 2."""
    here = Path(__file__).resolve().parent
    parser = Parser(prog="compare_factors.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tiny-dir",
        type=Path,
        default=Path("runs/controlnet"),
        help="folder of make_tiny_model.py, which is run if it is not there (default %(default)s)",
    )
    parser.add_argument(
        "--output-dir", type=Path, default=here / "results", help="(default: results beside the script)"
    )
    parser.add_argument("--factors", type=whole(1, 4), nargs="+", default=[1, 2, 3, 4], help="(default: 1 2 3 4)")
    parser.add_argument("--seeds", type=whole(1, 100), default=3, help="runs for each m (default %(default)s)")
    parser.add_argument("--steps", type=whole(1, 10**6), default=200, help="per run (default %(default)s)")
    options = parser.parse_args(argv)
    output_folder(parser, options.output_dir)
    output_folder(parser, options.tiny_dir, "--tiny-dir")
    return options


def train_once(tiny: Path, m: int, seed: int, steps: int) -> dict[str, float]:
    """One row of the results."""
    from control_loop import train

    output = tiny / "factors" / f"m{m}-seed{seed}"
    arguments = [
        *("--pretrained-model-name-or-path", str(tiny / "model"), "--train-data-dir", str(tiny / "data")),
        *("--output-dir", str(output), "--boft-factors", str(m), "--seed", str(seed), "--max-train-steps", str(steps)),
        *("--checkpointing-steps", str(steps + 1)),
    ]
    train(parse_training([*SETTINGS, *arguments]))
    metrics = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    return {
        "m": m,
        "seed": seed,
        "effective_boft_parameters": metrics["effective_boft_parameters"],
        "denoising_loss": metrics["denoising_loss"]["after"],
        "control_error": metrics["control_error"]["after"],
        "control_error_before": metrics["control_error"]["before"],
    }


def summary(rows: Sequence[dict[str, float]]) -> list[tuple[int, int, list[float], list[float]]]:
    """For each m: m, effective parameters, and the control errors and denoising losses of its seeds."""
    found = []
    for m in dict.fromkeys(int(row["m"]) for row in rows):
        own = [row for row in rows if row["m"] == m]
        errors, losses = [row["control_error"] for row in own], [row["denoising_loss"] for row in own]
        found.append((m, int(own[0]["effective_boft_parameters"]), errors, losses))
    return found


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation of single runs."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.4f} ± {deviation:.4f}"


def write_results(folder: Path, rows: Sequence[dict[str, float]], steps: int) -> str:
    """Write the three files; returns the table."""
    with (folder / "factors.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    table = ["| m | effective parameters | control error | denoising loss |", "|--:|--:|--:|--:|"]
    table += [f"| {m} | {count:,} | {spread(e)} | {spread(loss)} |" for m, count, e, loss in summary(rows)]
    before = statistics.mean(row["control_error_before"] for row in rows)
    seeds = len({row["seed"] for row in rows})
    table += ["", f"Mean ± standard deviation over {seeds} seeds, {steps} steps each."]
    table[-1] += f" Control error untrained: {before:.4f}."
    text = "\n".join(table) + "\n"
    (folder / "factors.md").write_text(text, encoding="utf-8")
    _plot(folder / "factors.png", summary(rows))
    return text


def _plot(path: Path, points: Sequence[tuple[int, int, list[float], list[float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.5), layout="constrained")
    for m, _, errors, _ in points:
        axes.plot([m] * len(errors), errors, "o", color="tab:gray", markersize=4)
    axes.plot([m for m, *_ in points], [statistics.mean(errors) for _, _, errors, _ in points], "-", color="tab:blue")
    axes.set(xlabel="butterfly factors m, at 8 blocks", ylabel="control error of held-out outlines")
    axes.set_xticks([m for m, *_ in points])
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison as the command line says."""
    options = parse(argv)
    start = time.perf_counter()
    if not (options.tiny_dir / "model" / "model_index.json").is_file():
        from make_tiny_model import main as make_tiny_model

        make_tiny_model([str(options.tiny_dir)])
    rows = [
        train_once(options.tiny_dir, m, seed, options.steps) for seed in range(options.seeds) for m in options.factors
    ]
    print(write_results(options.output_dir, rows, options.steps))
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
