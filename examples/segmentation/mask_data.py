"""Pictures with masks of one object each, as SAM takes them: prepared image, box around the object, small mask.

A split has a folder of pictures and one of masks with files of the same stem; what is not black belongs to the object.
The box around it is the prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from recipe_tools.images import image_files, load_image
from torch import Tensor


class Pair(NamedTuple):
    """The files of a picture and of its mask."""

    image: Path
    mask: Path


class Prepared(NamedTuple):
    """What SAM needs of a picture, and where its mask belongs.

    `pixels` ``(3, s, s)``; `box` ``(1, 4)``: left, top, right, bottom in the prepared picture; `target` ``(t, t)``:
    0 or 1, the object at the resolution of the decoder's masks, `valid` ``(t, t)``: 0 in the padding; `original` and
    `resized`: height and width before and after resizing.
    """

    pixels: Tensor
    box: Tensor
    target: Tensor
    valid: Tensor
    original: tuple[int, int]
    resized: tuple[int, int]


def find_pairs(images: Path, masks: Path) -> list[Pair]:
    """The pairs of the files in two folders, sorted by name.

    Raises: ValueError in one line if there are no pictures, or one without a mask.
    """
    pictures, by_stem = image_files(images), {path.stem: path for path in image_files(masks)}
    if not pictures:
        raise ValueError(f"{images} holds no pictures")
    missing = [path.name for path in pictures if path.stem not in by_stem]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{masks} has no mask for {', '.join(missing[:3])}{more}")
    return [Pair(path, by_stem[path.stem]) for path in pictures]


def box_around(mask: Tensor) -> Tensor:
    """``(4)``: left, top, right and bottom edge of what is set in a ``(height, width)`` bool mask, in pixels."""
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    return torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=torch.float32)


def load_mask(pair: Pair) -> Tensor:
    """``(height, width)`` bool.

    Raises: ValueError in one line for a mask without an object, or of another size than its picture.
    """
    with Image.open(pair.mask) as image:
        mask = torch.from_numpy(np.array(image.convert("L")) > 0)
    with Image.open(pair.image) as image:
        size = (image.height, image.width)
    if tuple(mask.shape) != size:
        raise ValueError(f"{pair.mask} has {tuple(mask.shape)} pixels, its picture {size}")
    if not mask.any():
        raise ValueError(f"{pair.mask} is black: there is no object to put a box around")
    return mask


def prepare(pair: Pair, processor: Any) -> Prepared:
    """A pair through SAM's image processor.

    Raises: ValueError as `load_mask`.
    """
    mask = load_mask(pair)
    # Two maps of one picture: where the object is, and where the picture is.
    maps = [Image.fromarray(np.uint8(values)) for values in (mask.numpy(), np.ones(mask.shape))]
    done = processor([load_image(pair.image)] * 2, segmentation_maps=maps, return_tensors="pt")
    original, resized = (tuple(done[name][0].tolist()) for name in ("original_sizes", "reshaped_input_sizes"))
    scale = torch.tensor([resized[1] / original[1], resized[0] / original[0]]).repeat(2)
    target, valid = done["labels"].float()
    return Prepared(done["pixel_values"][0], (box_around(mask) * scale)[None], target, valid, original, resized)
