"""Times of several steps that share a process, taken in turns."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch

from examples.step_cost import gpu_seconds, samples_in_turns, seconds

Step = Callable[[], object]


class Times(NamedTuple):
    """Seconds of one call: median, 20th and 80th percentile over `rounds` calls."""

    median: float
    p20: float
    p80: float
    rounds: int


def times_of(samples: list[float]) -> Times:
    """The `Times` of at least one measured call."""
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Times(statistics.median(ordered), ordered[round(0.2 * last)], ordered[round(0.8 * last)], len(ordered))


def clock_of(device: torch.device) -> Callable[[Step], float]:
    """What times a call whose work is done on `device`."""
    return gpu_seconds if device.type == "cuda" else seconds


def in_turns(
    steps: Mapping[str, Step],
    budget_s: float,
    min_rounds: int = 7,
    before: Mapping[str, Step] | None = None,
    device: torch.device = torch.device("cpu"),
) -> dict[str, Times]:
    """`Times` of each step, which run in turns for `budget_s` seconds and at least `min_rounds` rounds.

    ``before[name]()`` runs right before a step, outside its time. Python's garbage collector is off meanwhile.
    """
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        samples = samples_in_turns(steps, min_rounds, budget_s, before, clock_of(device))
    finally:
        if collects:
            gc.enable()
    return {name: times_of(values) for name, values in samples.items()}


def timing_columns(times: Times, base: Times | None = None, calls: int = 1) -> dict[str, object]:
    """The columns of a table that hold times, those of one of the `calls` calls of a step; `ratio` is to `base`."""
    return {
        "median_ms": 1e3 * times.median / calls,
        "p20_ms": 1e3 * times.p20 / calls,
        "p80_ms": 1e3 * times.p80 / calls,
        "rounds": times.rounds,
        "ratio": times.median / base.median if base else None,
    }
