"""Tune a text encoder to a GLUE task, or to your own of the same form, with BOFT on every linear of every block.

    python examples/glue/finetune_glue.py --model microsoft/deberta-v3-base --task mrpc

The defaults are the paper's for DeBERTaV3-base: m = 2 factors of 8 x 8 blocks, their layers' biases train too, batches
of 32, and a learning rate for each task. Dropout is 0.1, of the paper's 0.05 to 0.15; epochs and schedule are ours.
Leaves the adapter with the classifier, logs, and metrics.json with the task's metrics before and after.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from glue_tasks import TASKS  # noqa: E402
from recipe_tools.arguments import Parser, add_boft_options, existing_file, whole  # noqa: E402
from recipe_tools.training_options import add_training_options, parse  # noqa: E402


def parse_options() -> argparse.Namespace:
    """The command line, checked as far as it can be without the data and the model."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name, such as microsoft/deberta-v3-base")
    parser.add_argument(
        "--task",
        required=True,
        choices=TASKS,
        help="columns, metrics, and learning rate: "
        + ", ".join(f"{name} {task.learning_rate:g}" for name, task in TASKS.items()),
    )
    parser.add_argument(
        "--train-file",
        type=existing_file,
        help="TSV, CSV, JSON or JSON lines with the task's columns and label, not the hub's data",
    )
    parser.add_argument("--validation-file", type=existing_file, help="the same, to measure on")
    parser.add_argument("--max-length", type=whole(8, 2**20), default=256, help="tokens of a row (default %(default)s)")
    add_boft_options(parser, block_size=8, factors=2, dropout=0.1, bias="boft_only")
    add_training_options(
        parser,
        output="runs/glue",
        checkpointing_steps=500,
        learning_rate=None,
        batch_size=32,
        epochs=None,
        warmup=0.06,
        schedule="linear",
    )
    options = parse(parser)
    task = TASKS[options.task]
    options.learning_rate = options.learning_rate or task.learning_rate
    options.num_train_epochs = task.epochs if options.num_train_epochs is None else options.num_train_epochs
    if (options.train_file is None) != (options.validation_file is None):
        parser.error("--train-file and --validation-file: give both or none")
    return options


def main() -> None:
    """Tune, and leave adapter, logs and metrics.json in the output folder."""
    options = parse_options()
    # Not before the options are known to be right: it takes seconds.
    from glue_tuning import tune

    tune(options)


if __name__ == "__main__":
    main()
