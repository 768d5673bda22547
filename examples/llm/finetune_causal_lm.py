"""Tune a language model to follow instructions with BOFT: PEFT's layers on boft_ext, transformers' Trainer.

    python examples/llm/finetune_causal_lm.py --model meta-llama/Llama-2-7b-hf --task alpaca --mixed-precision bf16 \\
        --gradient-checkpointing --train-batch-size 8 --gradient-accumulation-steps 8

Defaults are the paper's settings for Llama-2-7B: m = 2 factors of 8 x 8 blocks on all seven linears of each layer,
AdamW, cosine schedule after 100 steps of warm-up, 64 sequences of at most 512 tokens a step, 2 epochs. Only answers are
learned. Leaves the adapter, logs, metrics.json with the loss and the share of right answers before and after, and
answers.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipe_tools.arguments import Parser, add_boft_options, existing_file, whole  # noqa: E402
from recipe_tools.training_options import add_training_options, parse  # noqa: E402

# Data set on the model hub, learning rate, dropout.
TASKS = {"alpaca": ("tatsu-lab/alpaca", 1e-4, 0.1), "metamath": ("meta-math/MetaMathQA-40K", 8e-4, 0.05)}


def parse_options() -> argparse.Namespace:
    """The command line, checked as far as it can be without the data and the model."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="name on the model hub, or folder, of a causal language model")
    parser.add_argument(
        "--task",
        choices=TASKS,
        default="alpaca",
        help="sets data, learning rate and dropout: "
        + "; ".join(f"{name}: {data}, {rate:g}, {dropout:g}" for name, (data, rate, dropout) in TASKS.items())
        + " (default %(default)s)",
    )
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", help="name on the model hub of instructions with answers, instead of the task's")
    data.add_argument(
        "--train-file", type=existing_file, help="JSON or JSON lines instead: instruction, input, output or messages"
    )
    data.add_argument(
        "--eval-file", type=existing_file, help="the same, to measure on; default: records held out of the others"
    )
    data.add_argument(
        "--eval-records", type=whole(1, 10**6), default=500, help="how many are held out then (default %(default)s)"
    )
    data.add_argument(
        "--prompt",
        choices=("plain", "chat"),
        default="plain",
        help="below plain headings, or in the tokenizer's chat template, which messages always are "
        "(default %(default)s)",
    )
    data.add_argument("--max-length", type=whole(8, 2**20), default=512, help="tokens of a row (default %(default)s)")
    data.add_argument(
        "--answers",
        type=whole(0, 10**6),
        default=64,
        help="evaluation prompts to answer and check (default %(default)s)",
    )
    data.add_argument("--max-new-tokens", type=whole(1, 2**16), default=256, help="of an answer (default %(default)s)")
    add_boft_options(parser, block_size=8, factors=2, dropout=None, bias="none")
    add_training_options(
        parser,
        output="runs/llm",
        checkpointing_steps=500,
        learning_rate=None,
        batch_size=64,
        epochs=2,
        warmup=100,
    )
    options = parse(parser)
    dataset, rate, dropout = TASKS[options.task]
    options.dataset = options.dataset or dataset
    options.learning_rate = options.learning_rate or rate
    options.boft_dropout = dropout if options.boft_dropout is None else options.boft_dropout
    return options


def main() -> None:
    """Tune, and leave adapter, logs, metrics.json and answers.json in the output folder."""
    options = parse_options()
    # Not before the options are known to be right: it takes seconds.
    from instruction_tuning import tune

    tune(options)


if __name__ == "__main__":
    main()
