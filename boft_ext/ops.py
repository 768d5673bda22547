"""The registered operators ``torch.ops.boft.*``: loads the compiled module, adds fake kernels and the forms for devices
without kernels.

The schemas, the autograd formulas and the calls of kernels are in C++ (csrc/torch). A fake kernel gives shapes and dtypes
to `torch.compile` and to export.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, library

from . import _compat

_compat.check()

from . import _C, composite  # noqa: E402  (a module built for another torch must be refused before it is loaded)
from .reference import accumulate_dtype, level_sizes  # noqa: E402

_library = library.Library("boft", "IMPL", "CompositeExplicitAutograd")
for _form in composite.FORMS:
    _library.impl(_form.__name__, _form)

_C.select_cpu_variant(None)
_C.use_kernels(True)


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Within the block every operator runs its device-independent form. For tests; not while other threads compute."""
    _C.use_kernels(False)
    try:
        yield
    finally:
        _C.use_kernels(True)


@contextlib.contextmanager
def cpu_variant(name: str) -> Iterator[None]:
    """Within the block the CPU kernels are those of a variant: "amx", "avx512bf16", "avx512", "avx2", "portable" or
    "scalar".

    ValueError if this processor cannot run it. For tests and benchmarks; not while other threads compute.
    """
    before = _C.cpu_variant()
    _C.select_cpu_variant(name)
    try:
        yield
    finally:
        _C.select_cpu_variant(before)


def compiled_info() -> dict[str, object]:
    """What the compiled part is: its kernels in use and available, and what it was built with and for."""
    from . import _build

    return {
        "cpu_kernels": _C.cpu_variant() if _C.cpu_kernels_in_use() else "none",
        "cpu_kernels_available": _C.cpu_variants(),
        "float32_products": "boft_ext" if _C.core_products() else "torch",
        "torch_built_for": _build.TORCH,
        "compiler": _build.COMPILER,
        "cuda_architectures": list(_build.CUDA_ARCHITECTURES),
        "cuda_streams": _C.cuda_streams(),
    }


def _blocks_count(d: int, b: int, m: int) -> int:
    return sum(level_sizes(d, b, _C.levels(d, b, m)))


@library.register_fake("boft::blocks")
def _(boft_R: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    m, count, b, _ = map(int, boft_R.shape)
    q = boft_R.new_empty(boft_R.shape) if m > 1 else boft_R.new_empty(0)
    return boft_R.new_empty(_blocks_count(count * b, b, m)), q


@library.register_fake("boft::blocks_backward")
def _(dblocks: Tensor, q: Tensor, keep: Tensor | None) -> Tensor:
    return q.new_empty(q.shape)


@library.register_fake("boft::rotate")
def _(x: Tensor, blocks: Tensor, b: int, m: int, transpose: bool, compact: bool = False) -> Tensor:
    if blocks.dtype != accumulate_dtype(x.dtype):
        raise TypeError(f"rotate: {x.dtype} data needs {accumulate_dtype(x.dtype)} blocks, got {blocks.dtype}")
    return x.new_empty(x.shape)


@library.register_fake("boft::rotate_backward")
def _(
    dy: Tensor, x: Tensor, blocks: Tensor, b: int, m: int, transpose: bool, need_x: bool, need_blocks: bool
) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape if need_x else (0,)), blocks.new_empty(blocks.shape if need_blocks else (0,))


@library.register_fake("boft::pack")
def _(x: Tensor, bits: int) -> Tensor:
    n = x.shape[-1]
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    full, rest = n // 64, n % 64
    # A block of 64 values, or the rest of them, has a scale of two bytes.
    row_bytes = full * (2 + 8 * bits) + (rest * bits + 7) // 8 + 2 * ((rest + 63) // 64)
    return x.new_empty((rows, row_bytes), dtype=torch.uint8)


@library.register_fake("boft::rotate_backward_packed")
def _(
    dy: Tensor, packed: Tensor, blocks: Tensor, b: int, m: int, transpose: bool, need_x: bool
) -> tuple[Tensor, Tensor]:
    return dy.new_empty(dy.shape if need_x else (0,)), blocks.new_empty(blocks.shape)


@library.register_fake("boft::merge")
def _(weight: Tensor, blocks: Tensor, b: int, m: int, s: Tensor | None, transpose: bool) -> Tensor:
    return weight.new_empty(weight.shape)


@library.register_fake("boft::scale")
def _(z: Tensor, s: Tensor, bias: Tensor | None, bias_detached: bool, compact: bool = False) -> Tensor:
    return z.new_empty(z.shape)


@library.register_fake("boft::scale_backward")
def _(
    dy: Tensor,
    z: Tensor | None,
    s: Tensor,
    bias: Tensor | None,
    bias_detached: bool,
    need_z: bool,
    need_s: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    none = dy.new_empty((0, dy.shape[-1]), dtype=accumulate_dtype(dy.dtype))
    dz = dy.new_empty(dy.shape if need_z else (0,))
    return dz, s.new_empty(s.shape) if need_s else none, bias.new_empty(bias.shape) if need_bias else none


@library.register_fake("boft::scale_backward_packed")
def _(
    dy: Tensor, packed: Tensor, s: Tensor, bias: Tensor | None, bias_detached: bool, need_z: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    none = dy.new_empty((0, dy.shape[-1]), dtype=accumulate_dtype(dy.dtype))
    dz = dy.new_empty(dy.shape if need_z else (0,))
    return dz, s.new_empty(s.shape), bias.new_empty(bias.shape) if need_bias else none
