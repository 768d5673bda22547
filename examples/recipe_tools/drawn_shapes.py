"""Pictures with a known answer: an outline says where a shape lies, and a text which colour fills it.

The folders have the layout of diffusers' ControlNet examples: ``metadata.jsonl`` with one object a line, whose columns
``image`` and ``conditioning_image`` name PNG files beside it and whose ``text`` is the prompt.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor

BACKGROUND = (16, 16, 16)
COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (60, 90, 240),
    "yellow": (240, 220, 50),
}
SHAPES = ("circle", "square", "triangle")
# Between the brightest channel of the background and the darkest "brightest channel" of a colour.
_FILLED_FROM = 108
_MARKED = (0, 0, 1)


class Drawing(NamedTuple):
    """`image`: the filled shape. `condition`: its white outline on black. `text`: its colour and kind."""

    image: Image.Image
    condition: Image.Image
    text: str


def draw(shape: str, colour: str, centre: tuple[float, float], radius: float, angle: float, resolution: int) -> Drawing:
    """One shape; `centre` and `radius` are shares of the `resolution` (pixels), `angle` in radians.

    Raises: KeyError for a colour, ValueError for a shape that is not among `COLOURS` and `SHAPES`.
    """
    corners = {"circle": 48, "square": 4, "triangle": 3}.get(shape)
    if corners is None:
        raise ValueError(f"expected one of {', '.join(SHAPES)}, got {shape!r}")
    turns = [angle + 2 * math.pi * corner / corners for corner in range(corners)]
    points = [
        (resolution * (centre[0] + radius * math.cos(turn)), resolution * (centre[1] + radius * math.sin(turn)))
        for turn in turns
    ]
    image = Image.new("RGB", (resolution, resolution), BACKGROUND)
    ImageDraw.Draw(image).polygon(points, fill=COLOURS[colour])
    condition = Image.new("RGB", (resolution, resolution), "black")
    ImageDraw.Draw(condition).polygon(points, outline="white", width=max(1, resolution // 32))
    return Drawing(image, condition, f"a {colour} {shape}")


def drawings(count: int, resolution: int, seed: int) -> Iterator[Drawing]:
    """`count` shapes of random kind, colour, place, size and angle, the same for the same `seed`."""
    source = random.Random(seed)
    for _ in range(count):
        radius = source.uniform(0.2, 0.32)
        centre = (source.uniform(radius + 0.05, 0.95 - radius), source.uniform(radius + 0.05, 0.95 - radius))
        angle = source.uniform(0, 2 * math.pi)
        yield draw(source.choice(SHAPES), source.choice(list(COLOURS)), centre, radius, angle, resolution)


def write_folder(folder: Path, count: int, resolution: int, seed: int) -> None:
    """Write `count` drawings and their ``metadata.jsonl`` into `folder`, which is made if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for index, drawing in enumerate(drawings(count, resolution, seed)):
        row = {"image": f"image-{index:04}.png", "conditioning_image": f"condition-{index:04}.png"}
        drawing.image.save(folder / row["image"])
        drawing.condition.save(folder / row["conditioning_image"])
        lines.append(json.dumps({**row, "text": drawing.text}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _as_tensor(image: Image.Image) -> Tensor:
    """``(3, height, width)`` uint8."""
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


def region_asked_for(condition: Image.Image) -> Tensor:
    """``(height, width)`` bool: what the outline of `condition` encloses, the outline itself included."""
    marked = condition.convert("RGB").point(lambda value: 255 if value > 127 else 0)
    for corner in ((0, 0), (marked.width - 1, 0), (0, marked.height - 1), (marked.width - 1, marked.height - 1)):
        ImageDraw.floodfill(marked, corner, _MARKED)
    outside = (_as_tensor(marked) == torch.tensor(_MARKED, dtype=torch.uint8)[:, None, None]).all(dim=0)
    return ~outside


def region_drawn(image: Image.Image) -> Tensor:
    """``(height, width)`` bool: where `image` is brighter than the background, in whatever colour."""
    return _as_tensor(image).amax(dim=0) > _FILLED_FROM


def control_error(image: Image.Image, condition: Image.Image) -> float:
    """Share of the pixels that are filled in `image` but lie outside the outline of `condition`, or the reverse.

    0 for the drawing that belongs to the condition; for an empty image the share that the shape covers.
    Raises: ValueError if the two differ in size.
    """
    if image.size != condition.size:
        raise ValueError(f"an image of {image.size} and a condition of {condition.size} pixels cannot be compared")
    return (region_asked_for(condition) ^ region_drawn(image)).float().mean().item()
