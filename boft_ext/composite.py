"""The device-independent form of each operator: slower, never different.

Runs on devices without kernels of this package, and on the CPU inside ``ops.without_kernels()``. Built from
`reference.py` alone; shapes, dtypes and rounding are those of the kernels.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from . import _C
from . import reference as ref

# A merge widens this many elements of a weight at a time, so that it needs little memory beside its result.
_MERGE_ELEMENTS = 1 << 24

_log = logging.getLogger("boft_ext")
_announced: set[str] = set()


def _form(function: Callable) -> Callable:
    """An operator's form: says once per device that it is in use, and keeps autocast away from its arithmetic."""

    @functools.wraps(function)
    def form(first: Tensor, *args: object) -> object:
        device = str(first.device)
        if device not in _announced:
            _announced.add(device)
            _log.info("boft_ext: no kernels in use for device %s; its operators run in plain torch", device)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args)

    return form


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    d = x.shape[-1]
    return x.reshape(x.numel() // d if d else 0, d).to(dtype).contiguous()


def _check_data(what: str, data: Tensor) -> None:
    if data.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"{what}: expected float32, float64, bfloat16 or float16, got {data.dtype}")
    if data.dim() == 0:
        raise ValueError(f"{what} needs at least one axis")


def _check_blocks(x: Tensor, blocks: Tensor, b: int, levels: list[ref.Level], op: str = "rotate") -> None:
    d = x.shape[-1]
    expected = sum(ref.level_sizes(d, b, levels))
    if blocks.numel() != expected:
        raise ValueError(f"{op}: {blocks.numel()} elements of blocks do not fit {d} channels, which have {expected}")
    if blocks.dtype != ref.accumulate_dtype(x.dtype):
        raise TypeError(f"{op}: {x.dtype} data needs {ref.accumulate_dtype(x.dtype)} blocks, got {blocks.dtype}")


def _check_outputs(op: str, n: int, what: str, values: Tensor | None) -> None:
    if values is not None and values.numel() != n:
        raise ValueError(f"{op}: {n} outputs need {n} values of {what}, got {list(values.shape)}")


@_form
def blocks(boft_R: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """`boft::blocks` for any device."""
    m, count, b, _ = boft_R.shape
    levels = _C.levels(count * b, b, m)
    q = ref.cayley(boft_R, None if keep is None else keep.view(m, count))
    return ref.collapse(q, levels), q if m > 1 else q.new_empty(0)


@_form
def blocks_backward(dblocks: Tensor, q: Tensor, keep: Tensor | None) -> Tensor:
    """`boft::blocks_backward` for any device."""
    m, count, b, _ = q.shape
    dq = ref.collapse_backward(dblocks, q, _C.levels(count * b, b, m))
    return ref.cayley_backward(dq, q, None if keep is None else keep.view(m, count))


@_form
def rotate(x: Tensor, blocks: Tensor, b: int, m: int, transpose: bool, compact: bool = False) -> Tensor:
    """`boft::rotate` for any device. `compact` concerns the autograd formula alone."""
    _check_data("rotate: x", x)
    levels = _C.levels(x.shape[-1], b, m)
    _check_blocks(x, blocks, b, levels)
    y = ref.rotate_blocks(_rows(x, blocks.dtype), blocks, b, levels, transpose)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(y.view(x.shape))


@_form
def rotate_backward(
    dy: Tensor, x: Tensor, blocks: Tensor, b: int, m: int, transpose: bool, need_x: bool, need_blocks: bool
) -> tuple[Tensor, Tensor]:
    """`boft::rotate_backward` for any device."""
    levels = _C.levels(dy.shape[-1], b, m)
    _check_blocks(dy, blocks, b, levels)
    rows = _rows(dy, blocks.dtype)
    if need_blocks:
        dx, dblocks = ref.rotate_blocks_backward(rows, _rows(x, blocks.dtype), blocks, b, levels, transpose)
    else:
        dx, dblocks = ref.rotate_blocks(rows, blocks, b, levels, not transpose), blocks.new_empty(0)
    if not need_x:
        return dy.new_empty(0), dblocks
    return torch.empty(dy.shape, dtype=dy.dtype, device=dy.device).copy_(dx.view(dy.shape)), dblocks


@_form
def merge(weight: Tensor, blocks: Tensor, b: int, m: int, s: Tensor | None, transpose: bool) -> Tensor:
    """`boft::merge` for any device."""
    _check_data("merge: weight", weight)
    if weight.dim() != 2:
        raise ValueError(f"merge: expected a weight (rows, d), got {list(weight.shape)}")
    rows, d = weight.shape
    levels = _C.levels(d, b, m)
    _check_blocks(weight, blocks, b, levels, "merge")
    _check_outputs("merge", rows, "boft_s", s)
    factors = None if s is None else s.reshape(-1, 1).to(blocks.dtype)
    out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    step = max(1, _MERGE_ELEMENTS // d)
    for part in (slice(first, first + step) for first in range(0, rows, step)):
        rotated = ref.rotate_blocks(_rows(weight[part], blocks.dtype), blocks, b, levels, transpose)
        out[part] = rotated if factors is None else rotated * factors[part]
    return out


@_form
def scale(z: Tensor, s: Tensor, bias: Tensor | None, bias_detached: bool, compact: bool = False) -> Tensor:
    """`boft::scale` for any device. `compact` concerns the autograd formula alone."""
    _check_scale(z, s, bias)
    return ref.scale(z, s.flatten(), bias).contiguous()


def _check_scale(z: Tensor, s: Tensor, bias: Tensor | None) -> None:
    _check_data("scale: z", z)
    n = z.shape[-1]
    _check_outputs("scale", n, "boft_s", s)
    _check_outputs("scale", n, "bias", bias)


@_form
def scale_backward(
    dy: Tensor,
    z: Tensor | None,
    s: Tensor,
    bias: Tensor | None,
    bias_detached: bool,
    need_z: bool,
    need_s: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`boft::scale_backward` for any device."""
    dtype = ref.accumulate_dtype(dy.dtype)
    grad, factors = _rows(dy, dtype), s.flatten().to(dtype)
    shift = 0 if bias is None else bias.to(dtype)
    none = grad.new_empty(0, grad.shape[1])
    dz = torch.empty(dy.shape, dtype=dy.dtype, device=dy.device).copy_((grad * factors).view(dy.shape)) if need_z else None
    ds = (grad * (_rows(z, dtype) - shift)).sum(0).to(s.dtype).view(s.shape) if need_s else none
    dbias = (grad.sum(0) * (1 if bias_detached else 1 - factors)).to(bias.dtype).view(bias.shape) if need_bias else none
    return dy.new_empty(0) if dz is None else dz, ds, dbias


FORMS = (blocks, blocks_backward, rotate, rotate_backward, merge, scale, scale_backward)
