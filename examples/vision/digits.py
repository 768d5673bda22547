"""scikit-learn's handwritten digits as a vision model takes them, split for good into training and test images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import sklearn.datasets
import sklearn.model_selection
import torch
from torch import Tensor

SIZE = 8
# Shades from 0 to 1 minus this, divided by this: -1 to 1. As an image processor's mean and deviation.
MEAN = 0.5
_SHADES = 16


class Digits(NamedTuple):
    """Images ``(n, 3, 8, 8)`` from -1 to 1, and their labels ``(n)``: indices into the digits asked for."""

    images: Tensor
    labels: Tensor

    def rows(self, index: Tensor) -> Digits:
        """Some of the images."""
        return Digits(self.images[index], self.labels[index])


def load_digits(chosen: Sequence[int]) -> tuple[Digits, Digits]:
    """All training and all test images of the digits in `chosen`, one half each. Always the same split."""
    data = sklearn.datasets.load_digits()
    halves = sklearn.model_selection.train_test_split(
        np.arange(len(data.target)), test_size=0.5, stratify=data.target, random_state=0
    )
    return tuple(_digits(data, rows[np.isin(data.target[rows], chosen)], list(chosen)) for rows in halves)


def _digits(data, rows: np.ndarray, chosen: list[int]) -> Digits:
    # Through the shades of an 8-bit image, so that a model sees the same numbers as from a file.
    shades = np.round(data.images[rows] * (255 / _SHADES)) / 255
    images = torch.from_numpy((shades - MEAN) / MEAN).to(torch.float32)
    labels = torch.tensor([chosen.index(label) for label in data.target[rows]])
    return Digits(images[:, None].expand(-1, 3, -1, -1).contiguous(), labels)
