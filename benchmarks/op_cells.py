"""What is measured side by side at the op level: the steps of one shape, and the bytes and flops that each needs.

Two providers, each with the copy that bounds it:

* `boft_ext`: the operators ``torch.ops.boft.*`` and the merge, which allocate their results, beside `clone`,
  ``x.clone()``. They run on torch's threads.
* `boft_ext-c`: the entry points of the C interface on warm buffers, beside `copy`, ``y.copy_(x)``, both on the same
  parts of the work in the same threads (`benchmarks.workers`). A step repeats each part of a call in its thread and
  waits once at the end, so these rows hold what the kernels take; what it costs to hand work to threads is in the rows
  of `boft_ext`. Python's call of a C function, about 1 us, is in both and is most of a call on one row.

A call on warm buffers is everything the operator does: for `rotate backward` the transposed blocks, the pass over x
and dy, and the sum of the gradients of the row splits; for `blocks` Cayley and collapse. Between such phases all
threads wait for each other, once a step.

Shapes below `LARGE` elements of data, or `LARGE_FLOPS` for `blocks`, run in one worker. A tensor above a quarter of the
last-level cache counts as one in memory: steps then go through as many sets of buffers as leave nothing in cache.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import boft_ext
from benchmarks import c_interface
from benchmarks.c_interface import Call, Task, split
from benchmarks.workers import Workers

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
REFERENCE = {"boft_ext": "clone", "boft_ext-c": "copy"}

# Half of a part of such work takes at least 20 us, many times what two threads lose on Python's lock for it.
LARGE, LARGE_FLOPS = 1 << 17, 1 << 22
# Calls slower than this leave their step out.
SLOW_S = 2.0
# A step of workers is this long for each phase, so that handing it over (20 to 90 us on two Zen 4 cores) stays under 2 %.
PHASE_S = 5e-3
STEP_S = 2e-3


class Cell(NamedTuple):
    """A shape: data (`tokens`, `d`) of a dtype, and the rotation's b and m where it has one.

    `kind` names its entry in KINDS. For `blocks`, `tokens` is None.
    """

    kind: str
    d: int
    tokens: int | None = None
    b: int | None = None
    m: int | None = None
    dtype: str = "f32"

    def name(self, case: str) -> str:
        """The name of one of its cases: "rotate d768 t512 b8 m2 f32"."""
        sizes = {"d": self.d, "t": self.tokens, "b": self.b, "m": self.m}
        return " ".join([case, *(f"{key}{size}" for key, size in sizes.items() if size is not None), self.dtype])

    def tensor_bytes(self) -> int:
        """Bytes of its largest input."""
        if self.tokens is None:
            return self.m * self.d * self.b * DTYPES[self.dtype].itemsize
        return self.tokens * self.d * DTYPES[self.dtype].itemsize


class Cost(NamedTuple):
    """What an operation needs at least: bytes moved, and flops in float32 and in float64."""

    bytes: float
    flops: float = 0
    flops64: float = 0

    def flop_seconds(self, peak: float) -> float:
        """Seconds of the flops at `peak` float32 operations a second and half of that in float64."""
        return (self.flops + 2 * self.flops64) / peak


class Sample:
    """A step: several calls of an operation, at first one.

    Args:
        phases: for each phase of the operation and each thread, one call for each set of buffers; the calls of a step
            go round the sets. workers: where they run, or None for this thread.
    """

    def __init__(self, phases: Sequence[Sequence[Sequence[Call]]], workers: Workers | None = None):
        self.calls = 1
        self._phases, self._workers, self._done = phases, workers, 0

    def __call__(self) -> None:
        for phase in self._phases:
            parts = [functools.partial(_go_round, sets, self._done, self.calls) for sets in phase]
            if self._workers is None:
                parts[0]()
            else:
                self._workers.run(parts)
        self._done += self.calls

    def calibrate(self) -> bool:
        """Choose the number of calls; False if one takes more than SLOW_S."""
        target = PHASE_S * len(self._phases) if self._workers else STEP_S
        if self._seconds() > SLOW_S:
            return False
        while (taken := self._seconds()) < 0.7 * target:
            self.calls *= max(2, min(8, round(target / taken)))
        return True

    def _seconds(self) -> float:
        start = time.perf_counter()
        self()
        return time.perf_counter() - start


def _go_round(sets: Sequence[Call], start: int, count: int) -> None:
    for i in range(start, start + count):
        sets[i % len(sets)]()


class Entry(NamedTuple):
    """A step of a cell with what it needs."""

    cost: Cost
    sample: Sample


Entries = dict[tuple[str, str], Entry]
"""By case and provider. A cell has the references "copy" and "clone", under their own names as cases."""


def entries(cell: Cell, pools: Sequence[Workers]) -> tuple[Entries, Workers]:
    """The steps of a cell and the workers that run those of the C interface: the last of `pools`, or the first."""
    torch.manual_seed(0)
    return KINDS[cell.kind].build(cell, pools)


@functools.cache
def cache_bytes() -> int:
    """Bytes of the last-level cache; 32 MiB where the system does not say."""
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    text = path.read_text().strip() if path.exists() else "32M"
    return int(text[:-1]) << {"K": 10, "M": 20}[text[-1]]


def _sets(tensor_bytes: int) -> int:
    """How many sets of buffers leave nothing in cache; one for tensors that are to be in cache."""
    return 1 if tensor_bytes <= cache_bytes() // 4 else math.ceil(2 * cache_bytes() / tensor_bytes)


def _workers(pools: Sequence[Workers], large: bool) -> Workers:
    return pools[-1] if large else pools[0]


def _on_workers(workers: Workers, sets: Sequence[Sequence[Task]]) -> Sample:
    """A step of the tasks of each set of buffers."""
    phases = [
        [list(calls) for calls in zip(*(split(task, workers.count) for task in phase))] for phase in zip(*sets)
    ]
    return Sample(phases, workers)


def _here(calls: Sequence[Call]) -> Sample:
    """A step of calls of torch operators, one for each set of buffers."""
    return Sample([[calls]])


def _copy(x: Tensor, y: Tensor) -> Task:
    """y = x by torch, split by the first axis."""
    return Task(x.shape[0], 0, lambda begin, end, _: functools.partial(y[begin:end].copy_, x[begin:end]), ())


def _references(workers: Workers, pairs: Sequence[tuple[Tensor, Tensor]]) -> Entries:
    """The two copies, for each set a source and a buffer like it."""
    cost = Cost(2 * pairs[0][0].nbytes)
    return {
        ("copy", "copy"): Entry(cost, _on_workers(workers, [[_copy(x, y)] for x, y in pairs])),
        ("clone", "clone"): Entry(cost, _here([x.clone for x, _ in pairs])),
    }


def _group_flops(plan: c_interface.Plan, elements: int) -> float:
    """Two flops for each row of the blocks, in every level."""
    return 2.0 * elements * sum(level.group for level in c_interface.plan_levels(plan))


def _boft_R(cell: Cell) -> Tensor:
    return 0.1 * torch.randn(cell.m, cell.d // cell.b, cell.b, cell.b)


def _buffers(cell: Cell, count: int) -> list[list[Tensor]]:
    """For each set, `count` tensors of the cell's data, of which the first two are random."""
    x, dy = (torch.randn(cell.tokens, cell.d, dtype=DTYPES[cell.dtype]) for _ in range(2))
    first = [x, dy, *(torch.zeros_like(x) for _ in range(count - 2))]
    return [first, *([tensor.clone() for tensor in first] for _ in range(_sets(x.nbytes) - 1))]


def _rotate(cell: Cell, pools: Sequence[Workers]) -> tuple[Entries, Workers]:
    d, b, m = cell.d, cell.b, cell.m
    plan = c_interface.make_plan(d, b, m)
    workers = _workers(pools, cell.tokens * d >= LARGE)
    blocks, _ = torch.ops.boft.blocks(_boft_R(cell), None)
    splits = c_interface.rotate_backward_splits(plan, cell.tokens)
    sets = _buffers(cell, 4)
    backward = []
    for x, dy, y, dx in sets:
        back, dblocks = torch.empty_like(blocks), torch.empty_like(blocks)
        parts = blocks.new_empty(splits, plan.count) if splits > 1 else dblocks.view(1, -1)
        tasks = [c_interface.transpose(plan, level, blocks, back) for level in range(plan.levels)]
        tasks.append(c_interface.rotate_backward(plan, dy, x, blocks, back, dx, parts))
        if splits > 1:
            tasks.append(c_interface.sum_splits(parts, dblocks))
        backward.append(tasks)
    rotate, rotate_backward = torch.ops.boft.rotate, torch.ops.boft.rotate_backward
    bytes_of, flops = sets[0][0].nbytes, _group_flops(plan, sets[0][0].numel())
    once, twice = Cost(2 * bytes_of, flops), Cost(3 * bytes_of, 2 * flops)
    forward = [[c_interface.rotate(plan, x, blocks, y)] for x, _, y, _ in sets]
    calls = [functools.partial(rotate, x, blocks, b, m, False) for x, *_ in sets]
    calls_back = [functools.partial(rotate_backward, dy, x, blocks, b, m, False, True, True) for x, dy, *_ in sets]
    return {
        **_references(workers, [(x, y) for x, _, y, _ in sets]),
        ("rotate", "boft_ext-c"): Entry(once, _on_workers(workers, forward)),
        ("rotate", "boft_ext"): Entry(once, _here(calls)),
        ("rotate backward", "boft_ext-c"): Entry(twice, _on_workers(workers, backward)),
        ("rotate backward", "boft_ext"): Entry(twice, _here(calls_back)),
    }, workers


def _scale(cell: Cell, pools: Sequence[Workers]) -> tuple[Entries, Workers]:
    workers = _workers(pools, cell.tokens * cell.d >= LARGE)
    s, bias = 1 + 0.1 * torch.randn(cell.d), torch.randn(cell.d)
    splits = c_interface.scale_backward_splits(cell.tokens)
    sets = _buffers(cell, 4)
    backward = []
    for z, dy, _, dz in sets:
        ds = torch.empty_like(s)
        parts = s.new_empty(splits, cell.d) if splits > 1 else ds.view(1, -1)
        tasks = [c_interface.scale_backward(dy, z, s, bias, dz, parts)]
        if splits > 1:
            tasks.append(c_interface.sum_splits(parts, ds))
        backward.append(tasks)
    scale, scale_backward = torch.ops.boft.scale, torch.ops.boft.scale_backward
    bytes_of, elements = sets[0][0].nbytes, sets[0][0].numel()
    once, twice = Cost(2 * bytes_of, 2.0 * elements), Cost(3 * bytes_of, 3.0 * elements)
    forward = [[c_interface.scale(z, s, bias, out)] for z, _, out, _ in sets]
    calls = [functools.partial(scale, z, s, bias, False) for z, *_ in sets]
    calls_back = [functools.partial(scale_backward, dy, z, s, bias, False, True, True, False) for z, dy, *_ in sets]
    return {
        **_references(workers, [(z, out) for z, _, out, _ in sets]),
        ("scale", "boft_ext-c"): Entry(once, _on_workers(workers, forward)),
        ("scale", "boft_ext"): Entry(once, _here(calls)),
        ("scale backward", "boft_ext-c"): Entry(twice, _on_workers(workers, backward)),
        ("scale backward", "boft_ext"): Entry(twice, _here(calls_back)),
    }, workers


def _blocks(cell: Cell, pools: Sequence[Workers]) -> tuple[Entries, Workers]:
    plan = c_interface.make_plan(cell.d, cell.b, cell.m)
    levels = c_interface.plan_levels(plan)
    boft_R = _boft_R(cell)
    # Float32 parameters are eliminated in float64.
    cayley = 2.0 * cell.b**2 * cell.m * cell.d
    collapse = sum(2.0 * cell.d * level.group * cell.b * (level.factors - 1) for level in levels)
    workers = _workers(pools, cayley + collapse >= LARGE_FLOPS)
    count = boft_R.new_empty(plan.count)
    once = Cost(boft_R.nbytes + count.nbytes, collapse, cayley)
    twice = Cost(2 * boft_R.nbytes + count.nbytes, 2 * (collapse + cayley))
    forward, backward, copies, calls, calls_back = [], [], [], [], []
    for _ in range(_sets(boft_R.nbytes)):
        a = boft_R.clone()
        blocks, q = torch.ops.boft.blocks(a, None)
        if cell.m == 1:
            q = blocks.view(a.shape)
        tasks = [c_interface.cayley(a, q)]
        if cell.m > 1:
            tasks += [c_interface.collapse(plan, level, q, blocks) for level in range(plan.levels)]
        forward.append(tasks)
        dblocks, dq, da = torch.randn_like(blocks), torch.empty_like(a), torch.empty_like(a)
        tasks = [c_interface.collapse_backward(plan, level, dblocks, q, dq) for level in range(plan.levels)]
        backward.append([*tasks, c_interface.cayley_backward(dq, q, da)])
        copies.append((a.view(-1, cell.b), torch.empty_like(a).view(-1, cell.b)))
        calls.append(functools.partial(torch.ops.boft.blocks, a, None))
        calls_back.append(functools.partial(torch.ops.boft.blocks_backward, dblocks, q, None))
    return {
        **_references(workers, copies),
        ("blocks", "boft_ext-c"): Entry(once, _on_workers(workers, forward)),
        ("blocks", "boft_ext"): Entry(once, _here(calls)),
        ("blocks backward", "boft_ext-c"): Entry(twice, _on_workers(workers, backward)),
        ("blocks backward", "boft_ext"): Entry(twice, _here(calls_back)),
    }, workers


def _merge(cell: Cell, pools: Sequence[Workers]) -> tuple[Entries, Workers]:
    plan = c_interface.make_plan(cell.d, cell.b, cell.m)
    workers = _workers(pools, cell.tokens * cell.d >= LARGE)
    sets = _buffers(cell, 2)
    s = 1 + 0.1 * torch.randn(cell.tokens, 1)
    # A parameter that trains: without a gradient, blocks that an earlier call left would be used again.
    boft_R = _boft_R(cell).requires_grad_()
    calls = [functools.partial(boft_ext.functional.rotate_weight, weight, boft_R, s) for weight, _ in sets]
    cost = Cost(2 * sets[0][0].nbytes, _group_flops(plan, sets[0][0].numel()))
    return {**_references(workers, sets), ("merge", "boft_ext"): Entry(cost, _here(calls))}, workers


class Kind(NamedTuple):
    """The cases of a kind of cell and what makes their steps."""

    cases: tuple[str, ...]
    build: Callable[[Cell, Sequence[Workers]], tuple[Entries, Workers]]


KINDS: Mapping[str, Kind] = {
    "rotate": Kind(("rotate", "rotate backward"), _rotate),
    "scale": Kind(("scale", "scale backward"), _scale),
    "blocks": Kind(("blocks", "blocks backward"), _blocks),
    "merge": Kind(("merge",), _merge),
}
