"""What a training step costs: median time, taken in turns, and the peak of live tensor memory."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Step = Callable[[], object]


def seconds(step: Step) -> float:
    """Wall-clock time of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def gpu_seconds(step: Step) -> float:
    """Time of one call by the clock of the current CUDA device, from an idle device until its work is done."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def samples_in_turns(
    steps: Mapping[str, Step],
    rounds: int,
    budget_s: float = 0.0,
    before: Mapping[str, Step] | None = None,
    clock: Callable[[Step], float] = seconds,
) -> dict[str, list[float]]:
    """Seconds by `clock` of each step over at least `rounds` rounds, and until `budget_s` have passed.

    In a round every step runs once.
    Taking turns spreads whatever else the machine does over all of them alike. Each round starts with another step, so
    that none always follows the same neighbour; one call before is not counted. ``before[name]()`` runs right before a
    step, outside its time.
    """
    names = list(steps)
    before = before or {}
    times: dict[str, list[float]] = {name: [] for name in names}

    def timed(name: str) -> float:
        if name in before:
            before[name]()
        return clock(steps[name])

    for name in names:
        timed(name)
    end, turn = time.perf_counter() + budget_s, 0
    while turn < rounds or time.perf_counter() < end:
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(timed(name))
        turn += 1
    return times


def medians_in_turns(steps: Mapping[str, Step], rounds: int) -> dict[str, float]:
    """Median seconds of each step over `rounds` rounds taken in turns."""
    return {name: statistics.median(values) for name, values in samples_in_turns(steps, rounds).items()}


def peak_bytes(step: Step, alive: Iterable[Tensor]) -> int:
    """Peak bytes of live tensors while `step` runs, those in `alive` included.

    On a CUDA device, where `alive` must then be: what torch's allocator counts. On the CPU torch's profiler reports
    every allocation and release of torch's CPU allocator, also of temporaries inside an operator, which Python's hooks
    on autograd and dispatch do not see; a resident-set size would add the interpreter, unused pages and whatever ran
    before. Releases of memory from before the profile are not reported, so `step` must not free any of `alive`: leave
    no gradients behind before the call.

    Args:
        step: runs on the CPU or on the current CUDA device. alive: tensors that exist before and after it: parameters,
            buffers, optimiser state.
    """
    alive = list(alive)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in alive}
    own = _peak_on_gpu(step) if any(tensor.is_cuda for tensor in alive) else _peak_on_cpu(step)
    return sum(storages.values()) + own


def _peak_on_gpu(step: Step) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(step: Step) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_bytes())["traceEvents"]
    current = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        current += event["args"]["Bytes"]
        peak = max(peak, current)
    return peak
