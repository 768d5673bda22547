"""Pictures in and out with PIL and torch: files, resizing and cropping, tensors, and grids with captions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def image_files(folder: Path) -> list[Path]:
    """The pictures directly in `folder`, sorted by name; none if it does not exist."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def load_image(path: Path) -> Image.Image:
    """The picture as RGB, turned as its camera says.

    Raises: OSError naming the file if it is no picture.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except OSError as error:
        raise OSError(f"{path} cannot be read as a picture: {error}") from error


def fit(
    images: Sequence[Image.Image], size: int, generator: torch.Generator | None = None, flip: bool = False
) -> tuple[list[Image.Image], tuple[int, int]]:
    """Resize and crop pictures of one size to `size` x `size` pixels, all of them alike (an image and its condition).

    Args:
        generator: draws where to crop, and whether to mirror if `flip`; the middle is kept without one.
    Returns: the pictures, and the ``(top, left)`` corner of the crop in the resized picture.
    """
    width, height = images[0].size
    scale = size / min(width, height)
    width, height = max(size, round(width * scale)), max(size, round(height * scale))
    if generator is None:
        top, left, mirror = (height - size) // 2, (width - size) // 2, False
    else:
        top = int(torch.randint(height - size + 1, (), generator=generator))
        left = int(torch.randint(width - size + 1, (), generator=generator))
        mirror = flip and bool(torch.rand((), generator=generator) < 0.5)
    fitted = []
    for image in images:
        image = image.resize((width, height), Image.Resampling.LANCZOS).crop((left, top, left + size, top + size))
        fitted.append(ImageOps.mirror(image) if mirror else image)
    return fitted, (top, left)


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(3, height, width) in -1 ... 1, float32, from an RGB picture."""
    return torch.from_numpy(numpy.array(image)).permute(2, 0, 1).float() / 127.5 - 1


def to_batch(images: Sequence[Image.Image]) -> torch.Tensor:
    """(count, 3, height, width) in -1 ... 1 from RGB pictures of one size."""
    return torch.stack([to_tensor(image) for image in images])


def save_grid(path: Path, rows: Sequence[tuple[str, Sequence[Image.Image]]], headings: Sequence[str] = ()) -> None:
    """Write a PNG with one row of pictures, all of one size, below each row's caption; `headings` name the columns."""
    width, height = rows[0][1][0].size
    cell = max(width, 64)  # narrower columns would cut every heading off
    columns = max(len(images) for _, images in rows)
    gap, line = 4, 14
    heading = line if headings else 0
    sheet = Image.new(
        "RGB", (columns * (cell + gap) + gap, heading + len(rows) * (height + line + gap) + gap), "white"
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for column, text in enumerate(headings):
        pen.text((gap + column * (cell + gap), 1), text, fill="black", font=font)
    for row, (caption, images) in enumerate(rows):
        top = heading + row * (height + line + gap)
        pen.text((gap, top), caption, fill="black", font=font)
        for column, image in enumerate(images):
            sheet.paste(image, (gap + column * (cell + gap), top + line))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
