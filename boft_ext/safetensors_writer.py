"""Writing safetensors files one tensor at a time.

``safetensors.torch.save_file`` wants all tensors of a file in memory at once. The format does not: eight bytes with the
length of a JSON header, which says where every tensor lies, and then their bytes
(https://github.com/huggingface/safetensors, "Format").
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


@dataclass(frozen=True)
class Source:
    """A tensor to write: its dtype and shape, known beforehand, and how to get its values when their turn comes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def check_writable(name: str, dtype: torch.dtype) -> None:
    """Raise ValueError naming `name` if safetensors files cannot hold `dtype`."""
    if dtype not in _NAMES:
        raise ValueError(f"{name} has dtype {dtype}, which a safetensors file cannot hold")


def write(
    path: Path,
    sources: Mapping[str, Source],
    metadata: Mapping[str, str],
    written: Callable[[], object] = lambda: None,
) -> None:
    """Write one file that ``safetensors`` reads; holds the values of one tensor at a time.

    Args:
        path: replaced if it exists. sources: by name. metadata: texts for the header.
        written: called after every tensor.

    Raises: RuntimeError if values are not of the dtype and shape that was announced; what the file system raises. The
        file is then incomplete.
    """
    # Wide types first, so that every tensor is aligned to its own size, which readers rely on.
    order = sorted(sources, key=lambda name: -sources[name].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        source = sources[name]
        start, end = end, end + source.nbytes
        header[name] = {"dtype": _NAMES[source.dtype], "shape": list(source.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            file.write(_bytes(name, sources[name]))
            written()


def _bytes(name: str, source: Source) -> memoryview:
    tensor = source.values().detach()
    if (tensor.dtype, tuple(tensor.shape)) != (source.dtype, tuple(source.shape)):
        raise RuntimeError(
            f"{name} became {tensor.dtype} {tuple(tensor.shape)}, expected {source.dtype} {tuple(source.shape)}"
        )
    tensor = tensor.cpu().contiguous()
    buffer = (ctypes.c_char * source.nbytes).from_address(tensor.data_ptr() or ctypes.addressof(ctypes.c_char()))
    buffer.owner = tensor  # keeps the memory alive for as long as the view
    return memoryview(buffer)
