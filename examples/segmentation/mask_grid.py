"""Pictures beside their masks: the true one, and those before and after the tuning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mask_data import Pair, box_around, load_mask
from mask_metrics import boundary_iou, iou
from PIL import Image, ImageDraw, ImageOps
from recipe_tools.images import load_image, save_grid
from torch import Tensor

CELL = 128


def save_mask_grid(path: Path, pairs: Sequence[Pair], before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
    """A PNG with a row per pair: the picture with its box, its mask, and the predicted ``(height, width)`` masks."""
    rows = []
    for pair, *predicted in zip(pairs, before, after):
        truth = load_mask(pair)
        picture = load_image(pair.image)
        ImageDraw.Draw(picture).rectangle(box_around(truth).tolist(), outline="white")
        masks = [Image.fromarray(np.uint8(mask) * 255).convert("RGB") for mask in (truth, *predicted)]
        scores = ", ".join(f"{iou(mask, truth):.2f} / {boundary_iou(mask, truth):.2f}" for mask in predicted)
        cells = [ImageOps.pad(image, (CELL, CELL), Image.Resampling.NEAREST) for image in (picture, *masks)]
        rows.append((f"{pair.image.name}: IoU / boundary IoU {scores}", cells))
    save_grid(path, rows, ("picture, box", "mask", "before", "after"))
