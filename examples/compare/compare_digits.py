"""Compare BOFT, LoRA, OFT and full fine-tuning on images: a ViT that knows the digits 0 to 4 learns 5 to 9.

The model and the images are those of examples/vision. No downloads; below 8 minutes on one core.
"""

from __future__ import annotations

import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "vision")]

from comparison import Task  # noqa: E402
from comparison_command import parse_options, run  # noqa: E402
from digits import Digits, load_digits  # noqa: E402
from make_small_vit import PRETRAINED_ON, TUNED_ON, pretrain  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from training import Batch  # noqa: E402
from transformers import ViTModel  # noqa: E402

PRETRAINING_EPOCHS = 30


class Classifier(nn.Module):
    """``logits = head(the encoder's output at the class token)``, for ``(n, 3, 8, 8)`` images."""

    def __init__(self, pretrained: nn.Module) -> None:
        super().__init__()
        self.encoder = ViTModel(pretrained.config, add_pooling_layer=False)
        self.encoder.load_state_dict(pretrained.vit.state_dict())
        self.head = nn.Linear(pretrained.config.hidden_size, len(TUNED_ON))

    def forward(self, images: Tensor, mask: Tensor) -> Tensor:
        """``(n, classes)`` logits; `mask` is there because texts have one."""
        return self.head(self.encoder(pixel_values=images).last_hidden_state[:, 0])


def make_task() -> Task:
    """The task, with a model that is pretrained now."""
    pretrained = pretrain(load_digits(PRETRAINED_ON)[0], PRETRAINING_EPOCHS, seed=0)
    train, test = map(_batch, load_digits(TUNED_ON))
    title = "A ViT that knows the digits 0 to 4 learns 5 to 9"
    return Task("digits", title, train, test, lambda: Classifier(pretrained))


def _batch(digits: Digits) -> Batch:
    return Batch(digits.images, digits.labels, digits.labels)


if __name__ == "__main__":
    run(parse_options(__doc__, rates=(3e-4, 1e-3, 3e-3, 1e-2, 3e-2), epochs=20, batch_size=32), make_task)
