"""The multiply-add peak of the processor, for floors of flops."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
import time
from pathlib import Path

import setup
from benchmarks.workers import Workers

_ROUNDS = 1 << 21
_REPEATS = 60


def fma_peak(workers: Workers) -> float:
    """Float32 operations a second of all workers together; float64 has half of them.

    Times fma_peak.c, compiled here for this very processor, and takes the best of a few runs while the clock
    rises. A large `torch.mm` is no substitute: it reaches 86 % of this on two Zen 4 cores (202 of 234 GF/s).
    Needs a C compiler, as the build of the kernels does.
    """
    compiler = setup.find_compiler("CC", "C", ["cc", "gcc", "clang"])
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma_peak.so"
        source = Path(__file__).with_suffix(".c")
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run([*compiler, *flags, str(source), "-o", str(library)], check=True)
        rounds = ctypes.CDLL(str(library)).fma_rounds
    rounds.restype, rounds.argtypes = ctypes.c_long, (ctypes.c_long, ctypes.POINTER(ctypes.c_float))
    calls = [functools.partial(rounds, _ROUNDS, ctypes.c_float()) for _ in range(workers.count)]
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        workers.run(calls)
        best = min(best, time.perf_counter() - start)
    flops = rounds(0, ctypes.c_float())
    return workers.count * _ROUNDS * flops / best
