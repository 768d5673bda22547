"""Compare BOFT, LoRA, OFT and full fine-tuning on texts: which standard-library module is a docstring from?

The task is that of `make demo` (examples/finetune_text.py), with the first two layers of its encoder and shorter texts.
No downloads; below 15 minutes on one core.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from comparison import Task  # noqa: E402
from comparison_command import parse_options, run  # noqa: E402
from text_data import MODULES, Example, load_corpus  # noqa: E402
from text_model import Classifier, load_encoder, tokenize  # noqa: E402
from training import Batch  # noqa: E402

LAYERS, MAX_TOKENS, PER_MODULE = 2, 32, 60


def make_task() -> Task:
    """The task, with the corpus of the demo's first seed."""
    corpus = load_corpus(PER_MODULE, seed=0)
    title = f"Which of {len(MODULES)} modules is a docstring from? {LAYERS} layers of MiniLM"
    train, test = _batch(corpus.train), _batch(corpus.test)
    return Task("text", title, train, test, lambda: Classifier(load_encoder(LAYERS), len(MODULES)))


def _batch(examples: list[Example]) -> Batch:
    ids, mask = tokenize([example.text for example in examples], MAX_TOKENS)
    return Batch(ids, mask, torch.tensor([example.label for example in examples]))


if __name__ == "__main__":
    run(parse_options(__doc__, rates=(3e-4, 1e-3, 3e-3, 1e-2), epochs=3, batch_size=16), make_task)
