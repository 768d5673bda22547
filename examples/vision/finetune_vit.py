"""Fine-tune an image classifier of transformers (DINOv2, ViT, ...) with BOFT on every linear of attention and MLP.

The defaults are the paper's for VTAB-1K: BOFT m = 2, b = 8 (also m = 4, b = 4 and m = 6, b = 2), dropout 0.1, AdamW
with weight decay 0.02, a cosine after 10 % warm-up, batches of 64, 30 epochs. Its learning rate is not known: try a
few.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipe_tools.arguments import Parser, add_boft_options, existing_folder, whole  # noqa: E402
from recipe_tools.training_options import add_training_options, parse  # noqa: E402


def parse_options() -> argparse.Namespace:
    """The command line, checked as far as it can be without the data and the model."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name, such as facebook/dinov2-large")
    data = parser.add_mutually_exclusive_group(required=True)
    data.add_argument(
        "--data-dir", type=existing_folder, help="folder with train/CLASS/* and test/CLASS/* (or validation, val)"
    )
    data.add_argument("--dataset", help="folder or hub name that `datasets` loads, with splits of these names")
    parser.add_argument("--dataset-config", help="configuration of --dataset")
    parser.add_argument("--image-column", default="image", help="of --dataset (default %(default)s)")
    parser.add_argument("--label-column", default="label", help="of --dataset (default %(default)s)")
    parser.add_argument(
        "--dataloader-num-workers",
        type=whole(0, 256),
        default=0,
        help="processes that read pictures (default %(default)s)",
    )
    add_training_options(
        parser,
        output="runs/vision",
        checkpointing_steps=100,
        learning_rate=1e-3,
        batch_size=64,
        epochs=30,
        warmup=0.1,
        weight_decay=0.02,
    )
    add_boft_options(parser, block_size=8, factors=2, dropout=0.1, bias="none")
    return parse(parser)


def main() -> None:
    """Tune, and leave adapter, logs and metrics.json in the output folder."""
    options = parse_options()
    # Not before the options are known to be right: it takes seconds.
    from vit_training import tune

    tune(options)


if __name__ == "__main__":
    main()
