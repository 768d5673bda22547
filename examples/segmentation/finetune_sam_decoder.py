"""Fine-tune the mask decoder of a SAM of transformers with BOFT on all its linear layers; a box is the prompt.

The defaults are the paper's for HQ-Seg: BOFT m = 4, b = 4, dropout 0.005, AdamW at 5e-4 with weight decay 0.01, a
cosine. The rest of SAM is frozen, so each picture goes through its image encoder once, if the results fit into memory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipe_tools.arguments import Parser, add_boft_options, existing_folder, number, whole  # noqa: E402
from recipe_tools.training_options import add_training_options, parse  # noqa: E402


def parse_options() -> argparse.Namespace:
    """The command line, checked as far as it can be without the data and the model."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name, such as facebook/sam-vit-huge")
    parser.add_argument(
        "--data-dir",
        type=existing_folder,
        required=True,
        help="folder with train and test, in each the two folders below",
    )
    parser.add_argument("--image-folder", default="images", help="of the pictures (default %(default)s)")
    parser.add_argument(
        "--mask-folder",
        default="masks",
        help="of a mask per picture, of the same name, black where the object is not (default %(default)s)",
    )
    parser.add_argument(
        "--embeddings-memory",
        type=number(0, 1e6),
        default=16.0,
        metavar="GIB",
        help="memory that the encoded pictures may take; if they need more, they are encoded again in each step "
        "(default %(default)g)",
    )
    parser.add_argument(
        "--grid-rows", type=whole(1, 100), default=6, help="test pictures drawn in masks.png (default %(default)s)"
    )
    add_training_options(
        parser,
        output="runs/segmentation",
        checkpointing_steps=500,
        learning_rate=5e-4,
        batch_size=8,
        epochs=12,
        warmup=0,
        weight_decay=0.01,
    )
    add_boft_options(parser, block_size=4, factors=4, dropout=0.005, bias="none")
    return parse(parser)


def main() -> None:
    """Tune, and leave adapter, logs, metrics.json and masks.png in the output folder."""
    options = parse_options()
    # Not before the options are known to be right: it takes seconds.
    from sam_training import tune

    tune(options)


if __name__ == "__main__":
    main()
