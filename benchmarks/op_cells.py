"""What is measured side by side at the op level: the steps of one shape, and the bytes and flops that each needs.

Two providers, each with the copy that bounds it:

* `boft_ext`: the operators ``torch.ops.boft.*`` and the merge, which allocate their results, beside `clone`,
  ``x.clone()``. They run on torch's threads.
* `boft_ext-c`: the entry points of the C interface on warm buffers, beside `copy`, ``y.copy_(x)``, both on the same
  parts of the work in the same threads (`benchmarks.workers`). A step repeats each part of a call in its thread and
  waits once at the end, so these rows hold what the kernels take; what it costs to hand work to threads is in the rows
  of `boft_ext`. Python's call of a C function, about 1 us, is in both and is most of a call on one row.

On a CUDA device there are no C entry points of a range of rows; instead

* `boft_ext-graph`: the same operators as `boft_ext`, captured into a CUDA graph that is replayed, beside `clone-graph`.
  What they take of the device alone: without a graph, calls of less than about 10 us wait for Python to make them.

A call on warm buffers is everything the operator does: for `rotate backward` the transposed blocks, the pass over x
and dy, and the sum of the gradients of the row splits; for `blocks` Cayley and collapse. Between such phases all
threads wait for each other, once a step.

Shapes below `LARGE` elements of data, or `LARGE_FLOPS` for `blocks`, run in one worker. A tensor above a quarter of the
last-level cache counts as one in memory: steps then go through as many sets of buffers as leave nothing in cache. On a
CUDA device all do, up to MOST_SETS: a layer's input was written long before, too.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import boft_ext
from benchmarks import c_interface
from benchmarks.c_interface import Call, Task, split
from benchmarks.measure import clock_of
from benchmarks.workers import Workers
from examples.step_cost import gpu_seconds

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
REFERENCE = {"boft_ext": "clone", "boft_ext-c": "copy", "boft_ext-graph": "clone-graph"}
MOST_SETS = 32

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
            go round the sets. workers: where they run, or None for this thread. device: where their work is done.
    """

    def __init__(
        self,
        phases: Sequence[Sequence[Sequence[Call]]],
        workers: Workers | None = None,
        device: torch.device = torch.device("cpu"),
    ):
        self.calls = 1
        self._phases, self._workers, self._done, self._clock = phases, workers, 0, clock_of(device)

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
        if self._clock(self) > SLOW_S:
            return False
        while (taken := self._clock(self)) < 0.7 * target:
            self.calls *= max(2, min(8, round(target / taken)))
        return True


class GraphSample:
    """A step: several calls of an operation as one CUDA graph, one or more rounds of its sets of buffers."""

    def __init__(self, calls: Sequence[Call]):
        self.calls = 0
        self._sets, self._graph = calls, None

    def __call__(self) -> None:
        self._graph.replay()

    def calibrate(self) -> bool:
        """Choose the number of calls and capture them; False if one takes more than SLOW_S."""
        self._capture(1)
        taken = min(gpu_seconds(self) for _ in range(2))
        if taken > SLOW_S * self.calls:
            return False
        self._capture(math.ceil(STEP_S / taken))
        return True

    def _capture(self, rounds: int) -> None:
        for call in self._sets:
            call()
        torch.cuda.synchronize()
        self._graph, self.calls = torch.cuda.CUDAGraph(), rounds * len(self._sets)
        with torch.cuda.graph(self._graph):
            for call in [*self._sets] * rounds:
                call()


def _go_round(sets: Sequence[Call], start: int, count: int) -> None:
    for i in range(start, start + count):
        sets[i % len(sets)]()


class Entry(NamedTuple):
    """A step of a cell with what it needs."""

    cost: Cost
    sample: Sample | GraphSample


Entries = dict[tuple[str, str], Entry]
"""By case and provider. A cell has the references of REFERENCE, under their own names as cases."""


class Place(NamedTuple):
    """Where a cell is measured: a device, and for the CPU the workers for the C interface, few of them first."""

    device: torch.device
    pools: Sequence[Workers] = ()

    def workers(self, large: bool) -> Workers | None:
        """The workers of the C interface for a large or small shape; None where there is no such interface."""
        return (self.pools[-1] if large else self.pools[0]) if self.pools else None


def entries(cell: Cell, place: Place) -> tuple[Entries, Workers | None]:
    """The steps of a cell and the workers that run those of the C interface."""
    torch.manual_seed(0)
    return KINDS[cell.kind].build(cell, place)


@functools.cache
def cache_bytes(device: torch.device) -> int:
    """Bytes of the last-level cache; 32 MiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    text = path.read_text().strip() if path.exists() else "32M"
    return int(text[:-1]) << {"K": 10, "M": 20}[text[-1]]


def _sets(tensor_bytes: int, device: torch.device) -> int:
    """How many sets of buffers leave nothing in cache; on the CPU one for tensors that are to be in cache."""
    cache = cache_bytes(device)
    if device.type == "cpu":
        return 1 if tensor_bytes <= cache // 4 else math.ceil(2 * cache / tensor_bytes)
    return min(MOST_SETS, math.ceil(2 * cache / tensor_bytes))


def _on_workers(workers: Workers, sets: Sequence[Sequence[Task]]) -> Sample:
    """A step of the tasks of each set of buffers."""
    phases = [
        [list(calls) for calls in zip(*(split(task, workers.count) for task in phase))] for phase in zip(*sets)
    ]
    return Sample(phases, workers)


def _operators(case: str, cost: Cost, calls: Sequence[Call], place: Place, name: str = "boft_ext") -> Entries:
    """The steps of calls of torch operators, one for each set of buffers, by the providers that start with `name`."""
    steps: Entries = {(case, name): Entry(cost, Sample([[calls]], device=place.device))}
    if place.device.type == "cuda" and case != "merge":  # which runs once, so that its whole call counts
        graph = f"{name}-graph"
        steps[graph if case == name else case, graph] = Entry(cost, GraphSample(calls))
    return steps


def _copy(x: Tensor, y: Tensor) -> Task:
    """y = x by torch, split by the first axis."""
    return Task(x.shape[0], 0, lambda begin, end, _: functools.partial(y[begin:end].copy_, x[begin:end]), ())


def _references(place: Place, workers: Workers | None, pairs: Sequence[tuple[Tensor, Tensor]]) -> Entries:
    """The copies, for each set a source and a buffer like it."""
    cost = Cost(2 * pairs[0][0].nbytes)
    steps = _operators("clone", cost, [x.clone for x, _ in pairs], place, "clone")
    if workers is not None:
        steps["copy", "copy"] = Entry(cost, _on_workers(workers, [[_copy(x, y)] for x, y in pairs]))
    return steps


def _group_flops(plan: c_interface.Plan, elements: int) -> float:
    """Two flops for each row of the blocks, in every level."""
    return 2.0 * elements * sum(level.group for level in c_interface.plan_levels(plan))


def _boft_R(cell: Cell, place: Place) -> Tensor:
    return 0.1 * torch.randn(cell.m, cell.d // cell.b, cell.b, cell.b, device=place.device)


def _buffers(cell: Cell, count: int, place: Place) -> list[list[Tensor]]:
    """For each set, `count` tensors of the cell's data, of which the first two are random."""
    x, dy = (torch.randn(cell.tokens, cell.d, dtype=DTYPES[cell.dtype], device=place.device) for _ in range(2))
    first = [x, dy, *(torch.zeros_like(x) for _ in range(count - 2))]
    return [first, *([tensor.clone() for tensor in first] for _ in range(_sets(x.nbytes, place.device) - 1))]


def _rotate(cell: Cell, place: Place) -> tuple[Entries, Workers | None]:
    d, b, m = cell.d, cell.b, cell.m
    plan = c_interface.make_plan(d, b, m)
    workers = place.workers(cell.tokens * d >= LARGE)
    blocks, _ = torch.ops.boft.blocks(_boft_R(cell, place), None)
    sets = _buffers(cell, 4, place)
    rotate, rotate_backward = torch.ops.boft.rotate, torch.ops.boft.rotate_backward
    bytes_of, flops = sets[0][0].nbytes, _group_flops(plan, sets[0][0].numel())
    once, twice = Cost(2 * bytes_of, flops), Cost(3 * bytes_of, 2 * flops)
    calls = [functools.partial(rotate, x, blocks, b, m, False) for x, *_ in sets]
    calls_back = [functools.partial(rotate_backward, dy, x, blocks, b, m, False, True, True) for x, dy, *_ in sets]
    steps = {
        **_references(place, workers, [(x, y) for x, _, y, _ in sets]),
        **_operators("rotate", once, calls, place),
        **_operators("rotate backward", twice, calls_back, place),
    }
    if workers is None:
        return steps, None
    splits = c_interface.rotate_backward_splits(plan, cell.tokens)
    backward = []
    for x, dy, y, dx in sets:
        back, dblocks = torch.empty_like(blocks), torch.empty_like(blocks)
        parts = blocks.new_empty(splits, plan.count) if splits > 1 else dblocks.view(1, -1)
        tasks = [c_interface.transpose(plan, level, blocks, back) for level in range(plan.levels)]
        tasks.append(c_interface.rotate_backward(plan, dy, x, blocks, back, dx, parts))
        if splits > 1:
            tasks.append(c_interface.sum_splits(parts, dblocks))
        backward.append(tasks)
    forward = [[c_interface.rotate(plan, x, blocks, y)] for x, _, y, _ in sets]
    steps["rotate", "boft_ext-c"] = Entry(once, _on_workers(workers, forward))
    steps["rotate backward", "boft_ext-c"] = Entry(twice, _on_workers(workers, backward))
    return steps, workers


def _scale(cell: Cell, place: Place) -> tuple[Entries, Workers | None]:
    workers = place.workers(cell.tokens * cell.d >= LARGE)
    s, bias = (1 + 0.1 * torch.randn(cell.d)).to(place.device), torch.randn(cell.d).to(place.device)
    sets = _buffers(cell, 4, place)
    scale, scale_backward = torch.ops.boft.scale, torch.ops.boft.scale_backward
    bytes_of, elements = sets[0][0].nbytes, sets[0][0].numel()
    once, twice = Cost(2 * bytes_of, 2.0 * elements), Cost(3 * bytes_of, 3.0 * elements)
    calls = [functools.partial(scale, z, s, bias, False) for z, *_ in sets]
    calls_back = [functools.partial(scale_backward, dy, z, s, bias, False, True, True, False) for z, dy, *_ in sets]
    steps = {
        **_references(place, workers, [(z, out) for z, _, out, _ in sets]),
        **_operators("scale", once, calls, place),
        **_operators("scale backward", twice, calls_back, place),
    }
    if workers is None:
        return steps, None
    splits = c_interface.scale_backward_splits(cell.tokens)
    backward = []
    for z, dy, _, dz in sets:
        ds = torch.empty_like(s)
        parts = s.new_empty(splits, cell.d) if splits > 1 else ds.view(1, -1)
        tasks = [c_interface.scale_backward(dy, z, s, bias, dz, parts)]
        if splits > 1:
            tasks.append(c_interface.sum_splits(parts, ds))
        backward.append(tasks)
    forward = [[c_interface.scale(z, s, bias, out)] for z, _, out, _ in sets]
    steps["scale", "boft_ext-c"] = Entry(once, _on_workers(workers, forward))
    steps["scale backward", "boft_ext-c"] = Entry(twice, _on_workers(workers, backward))
    return steps, workers


def _blocks(cell: Cell, place: Place) -> tuple[Entries, Workers | None]:
    plan = c_interface.make_plan(cell.d, cell.b, cell.m)
    levels = c_interface.plan_levels(plan)
    boft_R = _boft_R(cell, place)
    # Float32 parameters are eliminated in float64.
    cayley = 2.0 * cell.b**2 * cell.m * cell.d
    collapse = sum(2.0 * cell.d * level.group * cell.b * (level.factors - 1) for level in levels)
    workers = place.workers(cayley + collapse >= LARGE_FLOPS)
    count = boft_R.new_empty(plan.count)
    once = Cost(boft_R.nbytes + count.nbytes, collapse, cayley)
    twice = Cost(2 * boft_R.nbytes + count.nbytes, 2 * (collapse + cayley))
    forward, backward, copies, calls, calls_back = [], [], [], [], []
    for _ in range(_sets(boft_R.nbytes, place.device)):
        a = boft_R.clone()
        blocks, q = torch.ops.boft.blocks(a, None)
        if cell.m == 1:
            q = blocks.view(a.shape)
        dblocks = torch.randn_like(blocks)
        copies.append((a.view(-1, cell.b), torch.empty_like(a).view(-1, cell.b)))
        calls.append(functools.partial(torch.ops.boft.blocks, a, None))
        calls_back.append(functools.partial(torch.ops.boft.blocks_backward, dblocks, q, None))
        if workers is None:
            continue
        tasks = [c_interface.cayley(a, q)]
        if cell.m > 1:
            tasks += [c_interface.collapse(plan, level, q, blocks) for level in range(plan.levels)]
        forward.append(tasks)
        dq, da = torch.empty_like(a), torch.empty_like(a)
        tasks = [c_interface.collapse_backward(plan, level, dblocks, q, dq) for level in range(plan.levels)]
        backward.append([*tasks, c_interface.cayley_backward(dq, q, da)])
    steps = {
        **_references(place, workers, copies),
        **_operators("blocks", once, calls, place),
        **_operators("blocks backward", twice, calls_back, place),
    }
    if workers is not None:
        steps["blocks", "boft_ext-c"] = Entry(once, _on_workers(workers, forward))
        steps["blocks backward", "boft_ext-c"] = Entry(twice, _on_workers(workers, backward))
    return steps, workers


def _merge(cell: Cell, place: Place) -> tuple[Entries, Workers | None]:
    plan = c_interface.make_plan(cell.d, cell.b, cell.m)
    workers = place.workers(cell.tokens * cell.d >= LARGE)
    sets = _buffers(cell, 2, place)
    s = 1 + 0.1 * torch.randn(cell.tokens, 1, device=place.device)
    # A parameter that trains: without a gradient, blocks that an earlier call left would be used again.
    boft_R = _boft_R(cell, place).requires_grad_()
    calls = [functools.partial(boft_ext.functional.rotate_weight, weight, boft_R, s) for weight, _ in sets]
    cost = Cost(2 * sets[0][0].nbytes, _group_flops(plan, sets[0][0].numel()))
    return {**_references(place, workers, sets), **_operators("merge", cost, calls, place)}, workers


class Kind(NamedTuple):
    """The cases of a kind of cell and what makes their steps."""

    cases: tuple[str, ...]
    build: Callable[[Cell, Place], tuple[Entries, Workers | None]]


KINDS: Mapping[str, Kind] = {
    "rotate": Kind(("rotate", "rotate backward"), _rotate),
    "scale": Kind(("scale", "scale backward"), _scale),
    "blocks": Kind(("blocks", "blocks backward"), _blocks),
    "merge": Kind(("merge",), _merge),
}
