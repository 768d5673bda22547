"""Single operators beside a copy of the same bytes: `benchmarks.op_cells` says what is measured and how.

Columns of their own: `gb_per_s` and `gflop_per_s` count what the operation needs at least, not what an implementation
does. `floor_ms` is the larger of two floors, and `floor_ratio` the median over it:

* bytes: the time of the provider's copy (`clone` or `copy`, in turns with it), scaled from the two touches of every
  element that a copy makes. Rotate and scale touch twice, their backward three times (x, dy and dx); `blocks` moves
  the parameters and the blocks of all levels, backward those and the gradient of the parameters.
* flops at `fma_peak_gflops`, the float32 peak of the threads at work (`benchmarks.fma_peak`) or what a large matrix
  product in the cell's dtype reaches on a CUDA device (`benchmarks.matmul_peak`): 2 G for an element of
  rotate in each level, where G = b 2^(factors-1) channels form a group; 2 and 3 for scale and its backward; 2 b^3 for a
  block's Cayley, in float64 at half the peak, and 2 d G b (factors - 1) for a level's collapse, which counts its
  products as dense. Backward twice that, without float64.

`workers` are the threads at work in rows of `boft_ext-c` and `copy`; all other rows may use all `threads`. A CUDA
device has cells of its own, fewer and larger, and the table ``ops-cuda.csv``. Left out:
cells with a tensor above LARGEST bytes, steps whose one call takes more than `op_cells.SLOW_S`, and rotations of shapes
that do not exist. The other kernels that the processor can run, and a single thread, have the cells of SAMPLE alone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import boft_ext
from benchmarks.fma_peak import fma_peak
from benchmarks.measure import in_turns, timing_columns
from benchmarks.matmul_peak import matmul_peak
from benchmarks.op_cells import DTYPES as TORCH_DTYPES
from benchmarks.op_cells import KINDS, REFERENCE, Cell, Entry, Place, entries
from benchmarks.table import Table
from benchmarks.workers import Workers
from boft_ext.ops import cpu_variant

COLUMNS = [
    *("level", "case", "provider", "dtype", "d", "tokens", "b", "m", "group", "levels", "workers"),
    *("median_ms", "p20_ms", "p80_ms", "rounds", "ratio"),
    *("gb_per_s", "gflop_per_s", "floor_ms", "floor_ratio", "fma_peak_gflops"),
]
LARGEST = 256 << 20
MIN_ROUNDS = 7

CHANNELS = (320, 768, 1024, 3072, 4096, 14336)
TOKENS = (1, 8, 512, 2048, 8192)
DTYPES = ("f32", "bf16")
# (m, b) of the paper: language and vision models, and for Stable Diffusion (m, r) with b = d / r.
PAPER = ((2, 8), (4, 4), (6, 2), (1, 16), (1, 4), (2, 4))
DIFFUSION_CHANNELS = (320, 640, 1024, 1280)
DIFFUSION = ((2, 32), (6, 32), (5, 16), (4, 8))
# Shapes (d, b, m) that are in no paper.
OTHER = ((1280, 40, 3), (96, 2, 4), (11008, 8, 4))


def _exists(d: int, b: int, m: int) -> bool:
    try:
        boft_ext._C.levels(d, b, m)
    except ValueError:
        return False
    return True


def _shapes() -> list[tuple[int, int, int]]:
    """All (d, b, m)."""
    shapes = [(d, b, m) for d in CHANNELS for m, b in PAPER]
    shapes += [(d, d // r, m) for d in DIFFUSION_CHANNELS for m, r in DIFFUSION]
    return [shape for shape in (*shapes, *OTHER) if _exists(*shape)]


def _full() -> list[Cell]:
    shapes = _shapes()
    cells = [Cell("rotate", d, tokens, b, m, dtype) for d, b, m in shapes for tokens in TOKENS for dtype in DTYPES]
    cells += [Cell("scale", d, tokens, dtype=dtype) for d in CHANNELS for tokens in TOKENS for dtype in DTYPES]
    cells += [Cell("blocks", d, None, b, m) for d, b, m in shapes]
    return cells + [Cell("merge", d, d, b, m, dtype) for d, b, m in shapes for dtype in DTYPES]


def _quick() -> list[Cell]:
    cells = [
        Cell("rotate", d, tokens, b, m, dtype)
        for d in (768, 4096)
        for m, b in ((2, 8), (4, 4))
        for tokens in (1, 512, 2048)
        for dtype in DTYPES
    ]
    cells += [Cell("rotate", d, 512, b, m) for d, b, m in ((1024, 32, 6), *OTHER)]
    cells += [Cell("scale", d, tokens, dtype=dtype) for d in (768, 4096) for tokens in (512, 2048) for dtype in DTYPES]
    cells += [Cell("blocks", d, None, b, m) for d, b, m in ((768, 8, 2), (4096, 8, 2), (320, 10, 6), (1280, 160, 4))]
    return cells + [Cell("merge", d, d, 8, 2) for d in (768, 4096)]


GPU_SHAPES = ((2, 8), (4, 4), (1, 4), (3, 8), (4, 8), (2, 64), (8, 4))
GPU_SIZES = ((1024, 2048), (4096, 2048), (4096, 4096), (4096, 8192), (8192, 2048), (3072, 840), (8192, 840), (4096, 1))


def _on_gpu(quick: bool) -> list[Cell]:
    """Sizes from one row to 128 MiB, and those of a step of Llama-3.2-3B; groups of 4 to 512 channels."""
    shapes = GPU_SHAPES[:2] if quick else GPU_SHAPES
    sizes = GPU_SIZES[:3] if quick else GPU_SIZES
    cells = [Cell("rotate", d, tokens, b, m, dtype) for d, tokens in sizes for m, b in shapes for dtype in DTYPES]
    odd = ((320, 20, 2), (1280, 40, 2), (1280, 160, 1), (96, 2, 4))
    cells += [Cell("rotate", d, 2048, b, m, "bf16") for d, b, m in odd]
    cells += [Cell("scale", d, tokens, dtype=dtype) for d, tokens in sizes for dtype in DTYPES]
    cells += [Cell("blocks", d, None, b, m) for d in (1024, 4096, 8192) for m, b in shapes]
    return cells + [Cell("merge", d, d, 8, 2, dtype) for d in (1024, 4096) for dtype in DTYPES]


SAMPLE = [
    *(Cell("rotate", 768, 512, 8, 2, dtype) for dtype in DTYPES),
    Cell("rotate", 1024, 512, 32, 6),
    *(Cell("scale", 768, 512, dtype=dtype) for dtype in DTYPES),
    *(Cell("blocks", d, None, b, m) for d, b, m in ((768, 8, 2), (1280, 40, 3))),
    *(Cell("rotate", 4096, 2048, 8, 2, dtype) for dtype in DTYPES),
    *(Cell("scale", 4096, 2048, dtype=dtype) for dtype in DTYPES),
]
# The scalar kernels take a hundred times as long as the others.
SCALAR_SAMPLE = SAMPLE[:-4]
QUICK_SAMPLE = SAMPLE[:2]


class Setting(NamedTuple):
    """Kernels and threads, and the cells that are measured with them."""

    variant: str
    threads: int
    cells: Sequence[Cell]


def settings(quick: bool) -> list[Setting]:
    """All measurements: the kernels and threads in use first."""
    current, threads = boft_ext._C.cpu_variant(), torch.get_num_threads()
    sample = QUICK_SAMPLE if quick else SAMPLE
    chosen = [Setting(current, threads, _quick() if quick else _full())]
    if threads > 1:
        chosen.append(Setting(current, 1, sample))
    for variant in boft_ext._C.cpu_variants():
        if variant != current:
            cells = [cell for cell in sample if variant != "scalar" or cell in SCALAR_SAMPLE]
            chosen.append(Setting(variant, threads, cells))
    return chosen


CPU = torch.device("cpu")


def run(table_dir: Path, quick: bool, only: str | None, device: torch.device = CPU) -> None:
    """Measure all operators, or the cases whose name holds `only` (as in "rotate backward d768 t512 b8 m2 f32").

    Writes ``ops.csv`` or ``ops-cuda.csv`` into `table_dir`, unless no case has such a name: then one line on stderr
    says so.
    """

    def wanted(cell: Cell) -> list[str]:
        cases = KINDS[cell.kind].cases if cell.tensor_bytes() <= LARGEST else ()
        return [case for case in cases if only is None or only in cell.name(case)]

    chosen = settings(quick) if device.type == "cpu" else [Setting("", torch.get_num_threads(), _on_gpu(quick))]
    jobs = [(setting, cell) for setting in chosen for cell in setting.cells if wanted(cell)]
    if not jobs:
        print(f"ops: no case has {only!r} in its name", file=sys.stderr)
        return
    table = Table(table_dir / "ops.csv", COLUMNS, device)
    budget_s = 0.25 if quick else 0.5
    with tqdm(total=len(jobs), desc="ops", unit="case") as progress:
        for setting in chosen:
            with _in_force(setting, device) as place, torch.no_grad():
                peaks = _peaks(place)
                for cell in [cell for job, cell in jobs if job is setting]:
                    progress.set_postfix_str(f"{setting.variant} {cell.name(cell.kind)}")
                    _measure(cell, wanted(cell), place, peaks, budget_s, table)
                    progress.update()


@contextmanager
def _in_force(setting: Setting, device: torch.device) -> Iterator[Place]:
    """The setting's kernels and threads; on the CPU one worker and, if there are more threads, as many as those."""
    if device.type == "cuda":
        yield Place(device)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(setting.threads)
    pools = [Workers(count) for count in sorted({1, setting.threads})]
    try:
        with cpu_variant(setting.variant):
            yield Place(device, pools)
    finally:
        for pool in pools:
            pool.close()
        torch.set_num_threads(threads)


def _peaks(place: Place) -> dict[object, float]:
    """Flops a second: on the CPU by the number of workers, on a CUDA device by the dtype of a cell."""
    if place.pools:
        return {pool.count: fma_peak(pool) for pool in place.pools}
    return {name: matmul_peak(dtype, place.device) for name, dtype in TORCH_DTYPES.items()}


def _measure(
    cell: Cell, cases: Sequence[str], place: Place, peaks: dict[object, float], budget_s: float, table: Table
) -> None:
    """Measure the named cases of a cell with their copies and write a row for each of them and for each copy."""
    steps, workers = entries(cell, place)
    providers = {provider for case, provider in steps if case in cases}
    needed = [*cases, *(REFERENCE[provider] for provider in providers)]
    steps = {key: entry for key, entry in steps.items() if key[0] in needed and entry.sample.calibrate()}
    samples = {key: entry.sample for key, entry in steps.items()}
    times = in_turns(samples, budget_s, MIN_ROUNDS, device=place.device)
    seconds = {key: times[key].median / entry.sample.calls for key, entry in steps.items()}
    levels = boft_ext._C.levels(cell.d, cell.b, cell.m) if cell.b else []
    for (case, provider), entry in steps.items():
        copy = REFERENCE.get(provider, provider)
        in_workers = copy == "copy"
        peak = peaks[(workers if in_workers else place.pools[-1]).count if place.pools else cell.dtype]
        table.add(
            level="op",
            case=case,
            provider=provider,
            dtype=cell.dtype,
            d=cell.d,
            tokens=cell.tokens,
            b=cell.b,
            m=cell.m,
            group=max((cell.b << (factors - 1) for _, factors in levels), default=None),
            levels=len(levels) or None,
            workers=workers.count if in_workers else None,
            **timing_columns(times[case, provider], calls=entry.sample.calls)
            | _bounds(entry, seconds[case, provider], steps[copy, copy], seconds[copy, copy], peak),
        )


def _bounds(entry: Entry, seconds: float, copy: Entry, copy_seconds: float, peak: float) -> dict[str, float]:
    """The columns that compare a time with the copy's and with the floor."""
    cost = entry.cost
    floor = max(copy_seconds * cost.bytes / copy.cost.bytes, cost.flop_seconds(peak))
    return {
        "ratio": seconds / copy_seconds,
        "gb_per_s": cost.bytes / seconds / 1e9,
        "gflop_per_s": (cost.flops + cost.flops64) / seconds / 1e9,
        "floor_ms": 1e3 * floor,
        "floor_ratio": seconds / floor,
        "fma_peak_gflops": peak / 1e9,
    }
