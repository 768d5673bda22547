"""The C interface of the kernels (csrc/include/boft.h) on the memory of tensors, without torch's operators around it.

Every function here describes one call of an entry point as a `Task`, whose range can be split over threads; `serial`
and `benchmarks.workers` run tasks. Tensors must be contiguous and on the CPU; calls keep them alive. ValueError, with the
message of the core, for what the core refuses.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from boft_ext import _C

# The module is in the process already: the same code and the same choice of kernels as the operators have.
_library = ctypes.CDLL(_C.__file__)

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_MAX_LEVELS = 32

_int, _int64, _size, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_void_p


class Level(ctypes.Structure):
    """boft_level."""

    _fields_ = [(name, _int64) for name in ("first", "factors", "group", "runs", "chunk", "inner", "offset")]


class Plan(ctypes.Structure):
    """boft_plan: the shape (d, b, m) and its levels."""

    _fields_ = [(name, _int64) for name in ("d", "b", "m", "blocks", "super", "count", "levels")]
    _fields_ += [("level", Level * _MAX_LEVELS)]


class _RotateArgs(ctypes.Structure):
    _fields_ = [("plan", ctypes.POINTER(Plan)), ("dtype", _int), ("transpose", _int), ("rows", _int64)]
    _fields_ += [("x", _pointer), ("x_stride", _int64), ("blocks", _pointer), ("y", _pointer), ("y_stride", _int64)]


class _RotateBackwardArgs(ctypes.Structure):
    _fields_ = [("plan", ctypes.POINTER(Plan)), ("dtype", _int), ("transpose", _int), ("rows", _int64)]
    _fields_ += [("dy", _pointer), ("dy_stride", _int64), ("x", _pointer), ("x_stride", _int64)]
    _fields_ += [("blocks", _pointer), ("blocks_back", _pointer), ("dx", _pointer), ("dx_stride", _int64)]
    _fields_ += [("dblocks", _pointer)]


class _ScaleArgs(ctypes.Structure):
    _fields_ = [("dtype", _int), ("rows", _int64), ("n", _int64), ("z", _pointer), ("z_stride", _int64)]
    _fields_ += [("s", _pointer), ("bias", _pointer), ("out", _pointer), ("out_stride", _int64)]


class _ScaleBackwardArgs(ctypes.Structure):
    _fields_ = [("dtype", _int), ("rows", _int64), ("n", _int64), ("dy", _pointer), ("dy_stride", _int64)]
    _fields_ += [("z", _pointer), ("z_stride", _int64), ("s", _pointer), ("bias", _pointer)]
    _fields_ += [("dz", _pointer), ("dz_stride", _int64), ("ds", _pointer), ("dbias", _pointer)]
    _fields_ += [("bias_detached", _int)]


def _function(name: str, result: type, *arguments: type) -> Callable:
    function = getattr(_library, f"boft_{name}")
    function.restype, function.argtypes = result, arguments
    return function


_last_error = _function("last_error", ctypes.c_char_p)


def _raise_refusal(status: int, function: object, arguments: object) -> int:
    if status:
        raise ValueError(_last_error().decode())
    return status


def _checked(name: str, *arguments: type) -> Callable:
    function = _function(name, _int, *arguments)
    function.errcheck = _raise_refusal
    return function


_plan, _range = ctypes.POINTER(Plan), (_int64, _int64)
_plan_make = _checked("plan_make", _int64, _int64, _int64, _plan)
_cayley_workspace = _function("cayley_workspace", _size, _int64)
_cayley = _checked("cayley", _int, _int64, *_range, _pointer, _pointer, _pointer, _pointer)
_cayley_backward = _checked("cayley_backward", _int, _int64, *_range, *[_pointer] * 5)
_collapse_workspace = _function("collapse_workspace", _size, _plan, _int)
_collapse = _checked("collapse", _plan, _int, _int64, *_range, *[_pointer] * 3)
_collapse_backward = _checked("collapse_backward", _plan, _int, _int64, *_range, *[_pointer] * 4)
_transpose = _checked("transpose", _plan, _int, _int64, *_range, *[_pointer] * 2)
_rotate_workspace = _function("rotate_workspace", _size, _plan, _int)
_rotate = _checked("rotate", ctypes.POINTER(_RotateArgs), *_range, _pointer)
_rotate_backward_splits = _function("rotate_backward_splits", _int64, _plan, _int64)
_rotate_backward_tasks = _function("rotate_backward_tasks", _int64, _plan, _int64)
_rotate_backward_workspace = _function("rotate_backward_workspace", _size, _plan, _int)
_rotate_backward = _checked("rotate_backward", ctypes.POINTER(_RotateBackwardArgs), *_range, _pointer)
_sum_splits = _checked("sum_splits", _int, _int64, _int64, _pointer, _pointer, *_range)
_scale = _checked("scale", ctypes.POINTER(_ScaleArgs), *_range)
_scale_backward_splits = _function("scale_backward_splits", _int64, _int64)
_scale_backward = _checked("scale_backward", ctypes.POINTER(_ScaleBackwardArgs), *_range)

Call = Callable[[], object]


class Task(NamedTuple):
    """Work on the range [0, `count`), each part of it with a workspace of its own.

    Attributes: `bind` makes the call for a part, given (begin, end, address of the workspace). `tensors`: the memory
    that the call uses by address.
    """

    count: int
    workspace_bytes: int
    bind: Callable[[int, int, int], functools.partial]
    tensors: tuple[Tensor | None, ...]


def split(task: Task, parts: int) -> list[Call]:
    """Calls for `parts` contiguous parts of nearly equal size, each with its own workspace; some may be empty."""
    cuts = [task.count * part // parts for part in range(parts + 1)]
    calls = []
    for begin, end in zip(cuts, cuts[1:]):
        # torch aligns what it allocates to 64 bytes.
        workspace = torch.empty(max(1, task.workspace_bytes), dtype=torch.uint8)
        call = task.bind(begin, end, workspace.data_ptr())
        call.kept = (workspace, *task.tensors)
        calls.append(call)
    return calls


def serial(*tasks: Task) -> None:
    """Run tasks one after another in this thread."""
    for task in tasks:
        split(task, 1)[0]()


def make_plan(d: int, b: int, m: int) -> Plan:
    """The plan of a shape."""
    plan = Plan()
    _plan_make(d, b, m, plan)
    return plan


def plan_levels(plan: Plan) -> list[Level]:
    """The levels of a plan, lowest factors first."""
    return list(plan.level[: plan.levels])


def _at(tensor: Tensor | None) -> int | None:
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


def cayley(a: Tensor, q: Tensor) -> Task:
    """q = Cayley(a), both (..., b, b) float32 or float64. The range counts blocks."""
    b = a.shape[-1]

    def bind(begin: int, end: int, workspace: int) -> functools.partial:
        return functools.partial(_cayley, _DTYPES[a.dtype], b, begin, end, _at(a), None, _at(q), workspace)

    return Task(a.numel() // (b * b), _cayley_workspace(b), bind, (a, q))


def cayley_backward(dq: Tensor, q: Tensor, da: Tensor) -> Task:
    """da, the gradient of Cayley's argument; shapes and range as for `cayley`."""
    b = q.shape[-1]

    def bind(begin: int, end: int, workspace: int) -> functools.partial:
        pointers = (_at(dq), _at(q), None, _at(da), workspace)
        return functools.partial(_cayley_backward, _DTYPES[q.dtype], b, begin, end, *pointers)

    return Task(q.numel() // (b * b), _cayley_workspace(b), bind, (dq, q, da))


def collapse(plan: Plan, level: int, q: Tensor, blocks: Tensor) -> Task:
    """The blocks of one level in the vector `blocks`, from q (m, D, b, b). The range counts groups."""

    def bind(begin: int, end: int, workspace: int) -> functools.partial:
        return functools.partial(_collapse, plan, _DTYPES[q.dtype], level, begin, end, _at(q), _at(blocks), workspace)

    return Task(plan.d // plan.level[level].group, _collapse_workspace(plan, _DTYPES[q.dtype]), bind, (q, blocks))


def collapse_backward(plan: Plan, level: int, dblocks: Tensor, q: Tensor, dq: Tensor) -> Task:
    """dq of one level's factors from the gradient of its blocks. The range counts groups."""

    def bind(begin: int, end: int, workspace: int) -> functools.partial:
        pointers = (_at(dblocks), _at(q), _at(dq), workspace)
        return functools.partial(_collapse_backward, plan, _DTYPES[q.dtype], level, begin, end, *pointers)

    return Task(plan.d // plan.level[level].group, _collapse_workspace(plan, _DTYPES[q.dtype]), bind, (dblocks, q, dq))


def transpose(plan: Plan, level: int, blocks: Tensor, transposed: Tensor) -> Task:
    """Each block of one level transposed. The range counts groups."""

    def bind(begin: int, end: int, workspace: int) -> functools.partial:
        pointers = (_at(blocks), _at(transposed))
        return functools.partial(_transpose, plan, _DTYPES[blocks.dtype], level, begin, end, *pointers)

    return Task(plan.d // plan.level[level].group, 0, bind, (blocks, transposed))


def rotate(plan: Plan, x: Tensor, blocks: Tensor, y: Tensor) -> Task:
    """y = x R for x and y (T, d). The range counts rows."""
    args = _RotateArgs(
        plan=ctypes.pointer(plan), dtype=_DTYPES[x.dtype], transpose=0, rows=x.shape[0],
        x=_at(x), x_stride=plan.d, blocks=_at(blocks), y=_at(y), y_stride=plan.d,
    )  # fmt: skip

    def bind(begin: int, end: int, workspace: int) -> functools.partial:
        return functools.partial(_rotate, args, begin, end, workspace)

    return Task(x.shape[0], _rotate_workspace(plan, _DTYPES[x.dtype]), bind, (x, blocks, y))


def rotate_backward_splits(plan: Plan, rows: int) -> int:
    """How many gradients of the blocks `rotate_backward` makes, to be added by `sum_splits`."""
    return _rotate_backward_splits(plan, rows)


def rotate_backward(
    plan: Plan, dy: Tensor, x: Tensor, blocks: Tensor, blocks_back: Tensor, dx: Tensor, parts: Tensor
) -> Task:
    """dx and the gradients of the blocks of y = x R: parts (splits, plan.count); `blocks_back` are transposed."""
    args = _RotateBackwardArgs(
        plan=ctypes.pointer(plan), dtype=_DTYPES[x.dtype], transpose=0, rows=x.shape[0],
        dy=_at(dy), dy_stride=plan.d, x=_at(x), x_stride=plan.d, blocks=_at(blocks), blocks_back=_at(blocks_back),
        dx=_at(dx), dx_stride=plan.d, dblocks=_at(parts),
    )  # fmt: skip

    def bind(begin: int, end: int, workspace: int) -> functools.partial:
        return functools.partial(_rotate_backward, args, begin, end, workspace)

    count = _rotate_backward_tasks(plan, x.shape[0])
    tensors = (dy, x, blocks, blocks_back, dx, parts)
    return Task(count, _rotate_backward_workspace(plan, _DTYPES[x.dtype]), bind, tensors)


def sum_splits(parts: Tensor, out: Tensor) -> Task:
    """out = parts[0] + parts[1] + ..., for parts (splits, n). The range counts elements."""

    def bind(begin: int, end: int, workspace: int) -> functools.partial:
        sizes = (parts.shape[0], parts.shape[1])
        return functools.partial(_sum_splits, _DTYPES[parts.dtype], *sizes, _at(parts), _at(out), begin, end)

    return Task(parts.shape[1], 0, bind, (parts, out))


def scale(z: Tensor, s: Tensor, bias: Tensor | None, out: Tensor) -> Task:
    """out = z s + bias (1 - s) for z and out (T, n). The range counts rows."""
    rows, n = z.shape
    args = _ScaleArgs(
        dtype=_DTYPES[z.dtype], rows=rows, n=n, z=_at(z), z_stride=n, s=_at(s), bias=_at(bias), out=_at(out),
        out_stride=n,
    )  # fmt: skip

    def bind(begin: int, end: int, workspace: int) -> functools.partial:
        return functools.partial(_scale, args, begin, end)

    return Task(rows, 0, bind, (z, s, bias, out))


def scale_backward_splits(rows: int) -> int:
    """How many gradients of s `scale_backward` makes, to be added by `sum_splits`."""
    return _scale_backward_splits(rows)


def scale_backward(dy: Tensor, z: Tensor, s: Tensor, bias: Tensor | None, dz: Tensor, parts: Tensor) -> Task:
    """dz and the gradients of s: parts (splits, n). The range counts splits."""
    rows, n = dy.shape
    args = _ScaleBackwardArgs(
        dtype=_DTYPES[dy.dtype], rows=rows, n=n, dy=_at(dy), dy_stride=n, z=_at(z), z_stride=n, s=_at(s),
        bias=_at(bias), dz=_at(dz), dz_stride=n, ds=_at(parts), dbias=None, bias_detached=0,
    )  # fmt: skip

    def bind(begin: int, end: int, workspace: int) -> functools.partial:
        return functools.partial(_scale_backward, args, begin, end)

    return Task(_scale_backward_splits(rows), 0, bind, (dy, z, s, bias, dz, parts))
