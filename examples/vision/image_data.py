"""Labelled images as transformers' Trainer takes them: from folders, or from the library `datasets`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from recipe_tools.images import SUFFIXES, image_files, load_image
from torch.utils.data import Dataset

# A split by the names that folders and data sets give it.
TRAIN, TEST = ("train",), ("test", "validation", "val")


class Images(Dataset):
    """Rows ``{"pixel_values": (3, height, width), "labels": int}``; images are read when they are asked for.

    Args:
        read: the PIL image of a row, of any mode.
        labels: one index into `Splits.classes` a row.
        process: a PIL image in RGB to pixel values.
    """

    def __init__(
        self, read: Callable[[int], Image.Image], labels: Sequence[int], process: Callable[[Image.Image], Any]
    ) -> None:
        self._read, self.labels, self._process = read, labels, process

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self._process(self._read(index).convert("RGB")), "labels": self.labels[index]}


class Splits(NamedTuple):
    """`classes` in the order of their labels."""

    classes: list[str]
    train: Images
    test: Images


def from_folder(folder: Path, process: Callable[[Image.Image], Any]) -> Splits:
    """Images in ``folder/train/CLASS/*`` and ``folder/test/CLASS/*`` (or ``validation``, ``val``).

    Raises: ValueError in one line if a split is missing or empty, or the test images have a class of their own.
    """
    train = _split_folder(folder, TRAIN)
    classes = sorted(path.name for path in train.iterdir() if path.is_dir())
    return Splits(classes, *(_images(path, classes, process) for path in (train, _split_folder(folder, TEST))))


def _split_folder(folder: Path, names: Sequence[str]) -> Path:
    found = [folder / name for name in names if (folder / name).is_dir()]
    if not found:
        raise ValueError(f"{folder} has no folder {' or '.join(names)} with a folder of images per class")
    return found[0]


def _images(folder: Path, classes: list[str], process: Callable[[Image.Image], Any]) -> Images:
    unknown = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name not in classes)
    if unknown:
        raise ValueError(f"{folder} has classes without training images: {', '.join(unknown)}")
    files = [(path, label) for label, name in enumerate(classes) for path in image_files(folder / name)]
    if not files:
        raise ValueError(f"{folder} has no images ({', '.join(SUFFIXES)}) in folders of its classes")
    return Images(lambda index: load_image(files[index][0]), [label for _, label in files], process)


def from_dataset(
    name: str, config: str | None, image_column: str, label_column: str, process: Callable[[Image.Image], Any]
) -> Splits:
    """A data set of the hub, or a folder that `datasets` reads, with the splits named as for folders.

    Raises: ValueError in one line if a split, a column or the names of the classes are missing; what `datasets` raises
        if it cannot load it.
    """
    import datasets

    loaded = datasets.load_dataset(name, config)
    splits = []
    for names in (TRAIN, TEST):
        found = [split for split in names if split in loaded]
        if not found:
            raise ValueError(f"{name} has no split {' or '.join(names)}, only {', '.join(loaded)}")
        splits.append(loaded[found[0]])
    for column in (image_column, label_column):
        if column not in splits[0].column_names:
            raise ValueError(f"{name} has no column {column}, only {', '.join(splits[0].column_names)}")
    classes = getattr(splits[0].features[label_column], "names", None)
    if classes is None:
        raise ValueError(f"column {label_column} of {name} does not name its classes")
    images = (Images(_reader(split, image_column), list(split[label_column]), process) for split in splits)
    return Splits(list(classes), *images)


def _reader(split: Any, column: str) -> Callable[[int], Image.Image]:
    return lambda index: split[index][column]
