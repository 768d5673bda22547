"""The command line of the comparisons, and the run of one of them."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from comparison import HEAD_RATE, VALIDATION, Settings, Task, compare
from comparison_report import table, write
from recipe_tools.arguments import Parser, output_folder, rate, whole
from recipe_tools.report import patch
from recipe_tools.quiet import quiet
from tuning_methods import METHODS


def parse_options(description: str, *, rates: Sequence[float], epochs: int, batch_size: int) -> argparse.Namespace:
    """The options, with the folder for the results made. One line and status 2 for wrong ones."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path(__file__).parent / "results",
        help="for the results (default: results beside the script)",
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="some of the methods, by the start of their names")
    grid = " ".join(f"{value:g}" for value in rates)
    parser.add_argument("--rates", nargs="+", type=rate, default=rates, help=f"the grid (default {grid})")
    parser.add_argument("--seeds", type=whole(1, 1000), default=3, help="runs on the test set (default %(default)s)")
    parser.add_argument("--epochs", type=whole(1, 1000), default=epochs, help="default %(default)s")
    parser.add_argument("--batch-size", type=whole(1, 1024), default=batch_size, help="default %(default)s")
    options = parser.parse_args()
    options.parser = parser
    output_folder(parser, options.output_dir)
    return options


def run(options: argparse.Namespace, make_task: Callable[[], Task]) -> None:
    """Compare the methods on the task, print the table and write the results."""
    wanted = tuple(options.methods or ("",))
    methods = [method for method in METHODS if method.name.startswith(wanted)]
    if not methods:
        names = ", ".join(method.name for method in METHODS)
        options.parser.error(f"--methods {' '.join(options.methods)}: there is none of that name: {names}")
    quiet()
    patch()
    started = time.perf_counter()
    task = make_task()
    settings = Settings(options.rates, options.seeds, options.epochs, options.batch_size)
    runs = compare(task, methods, settings)
    notes = [
        f"{len(task.train.labels)} training and {len(task.test.labels)} test examples, "
        f"{_counted(options.epochs, 'epoch')} in batches of {options.batch_size}, AdamW without weight decay, 10 % "
        "warm-up, then linear decay to zero.",
        f"Rates: for each method the best of {', '.join(f'{value:g}' for value in options.rates)} by the accuracy on "
        f"1/{VALIDATION} of the training examples, in one run on the others; the classifier's is {HEAD_RATE:g} in all "
        f"methods but the probe. Then {_counted(options.seeds, 'run')} on all training examples, with other "
        "initial values and another order of the batches each; their mean and standard deviation on the test examples.",
    ]
    print("\n" + table(runs) + "\n\n" + "\n\n".join(notes))
    write(options.output_dir, task.name, task.title, runs, notes)
    print(f"\n{time.perf_counter() - started:.0f} s; written to {options.output_dir}: {task.name}.csv, .md, .png")


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"
