"""Rows of pictures, conditions and texts as tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from control_rows import Row
from PIL import Image
from recipe_tools.checkpoints import generator_of
from recipe_tools.images import fit, load_image, to_tensor
from torch import Tensor
from torch.utils.data import Dataset


def condition_tensor(image: Image.Image) -> Tensor:
    """``(3, height, width)`` in 0 ... 1: conditions are not centred."""
    return to_tensor(image) / 2 + 0.5


def fitted(row: Row, resolution: int) -> tuple[Image.Image, Image.Image]:
    """The picture and the condition of `row`, cut to the middle and to one size.

    Raises: OSError naming a file that is no picture; ValueError if the two differ in shape.
    """
    image, condition = load_image(row.image), load_image(row.condition)
    if image.width * condition.height != image.height * condition.width:
        raise ValueError(f"{row.image} is {image.size} and {row.condition} {condition.size}: they do not match")
    return fit([image], resolution)[0][0], fit([condition], resolution)[0][0]


class Pairs(Dataset):
    """Training samples, indexed by pairs ``(row, draw)`` as of `recipe_tools.checkpoints.micro_batches`.

    A sample has ``pixels`` (3, size, size) in -1 ... 1, ``condition`` of that shape in 0 ... 1, and ``tokens``.
    """

    def __init__(self, rows: Sequence[Row], resolution: int, tokens: Tensor, empty: Tensor, share: float, seed: int):
        """`tokens`: ``(rows, length)`` of the texts. `empty`: ``(length,)``, which a `share` of the draws gets."""
        self._rows, self._resolution = rows, resolution
        self._tokens, self._empty, self._share, self._seed = tokens, empty, share, seed

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        index, draw = key
        image, condition = fitted(self._rows[index], self._resolution)
        dropped = torch.rand((), generator=generator_of(self._seed, draw)) < self._share
        return {
            "pixels": to_tensor(image),
            "condition": condition_tensor(condition),
            "tokens": self._empty if dropped else self._tokens[index],
        }
