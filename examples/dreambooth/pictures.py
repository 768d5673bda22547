"""Pictures of the subject and of its class, as the training loop takes them."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from recipe_tools.arguments import fail
from recipe_tools.checkpoints import generator_of
from recipe_tools.images import fit, image_files, load_image, to_tensor
from torch import Tensor
from torch.utils.data import Dataset

Sample = dict[str, Tensor]


class Pictures(Dataset):
    """Pictures of the subject, each with one of the class if there are any.

    An item's key is a pair ``(index, draw)`` of `recipe_tools.checkpoints.micro_batches`: what is random about it
    depends on the seed and the draw alone. Items have ``pixels`` (kinds, 3, size, size) in -1 ... 1 and ``sizes``
    (kinds, 6) as `families.Family.losses` takes them: first the subject, then the class.
    """

    def __init__(self, instance: list[Image.Image], classes: list[Path], options: argparse.Namespace) -> None:
        self.instance = instance
        self.classes = classes
        self.size = options.resolution
        self.center, self.flip, self.seed = options.center_crop, options.random_flip, options.seed

    def __len__(self) -> int:
        return len(self.instance)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index, draw = key
        images = [self.instance[index]]
        if self.classes:
            images.append(load_image(self.classes[draw % len(self.classes)]))
        generator = None if self.center else generator_of(self.seed + 1, draw)
        return stack([sample(image, self.size, generator, self.flip) for image in images])


def sample(image: Image.Image, size: int, generator: torch.Generator | None = None, flip: bool = False) -> Sample:
    """``pixels`` (3, size, size) and ``sizes`` (6,) of one picture, cropped as `recipe_tools.images.fit` does."""
    (cropped,), corner = fit([image], size, generator, flip)
    return {
        "pixels": to_tensor(cropped),
        "sizes": torch.tensor([image.height, image.width, *corner, size, size], dtype=torch.float32),
    }


def stack(samples: list[Sample]) -> Sample:
    """The same with a first dimension for the samples."""
    return {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}


def load_pictures(folder: Path, option: str) -> list[Image.Image]:
    """All pictures of `folder`. One line and status 2 naming `option` if it has none, or one that cannot be read."""
    files = image_files(folder)
    if not files:
        fail(f"{option} {folder} has no pictures")
    try:
        return [load_image(file) for file in files]
    except OSError as error:
        fail(f"{option}: {error}")
