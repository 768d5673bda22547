"""Single layers: what each provider adds to a linear layer or a convolution.

Measures, one row each for every provider (`benchmarks.providers`):

* ``forward``: training mode, input with gradient. ``forward+backward``: the same and the gradients of the input and of
  everything that trains, cleared again; with the peak of live tensors (layer, input and output gradient included).
* ``decode``: one row, evaluation mode, no gradients. A step is many calls, the columns hold one; ``overhead_us`` is
  what a provider adds to `base`. Linear layers only.
* ``init``: adapting an existing layer (PEFT: `get_peft_model` on a model of one layer; float32 only).
* ``merge`` and ``unmerge`` of the weight.

`ratio` is to the frozen `base`. A convolution's adapter needs the gradient of the weight, so its rows also hold
`ratio_trainable`, to `base-trainable`: the same convolution with a trainable weight.

Left out: `init` of pr3540, whose tables this package builds in its own way; the dense providers above
`providers.DENSE_CHANNELS` channels (of a convolution: in * kh * kw).
"""

from __future__ import annotations

import copy
import functools
import gc
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.measure import Times, timing_columns
from benchmarks.providers import (
    BASE_TRAINABLE,
    DENSE,
    DENSE_CHANNELS,
    DENSE_ROUNDS,
    FAST,
    WRAP,
    Adapted,
    Provider,
    adapted,
    built_factors,
    plain_peft,
    tensors,
    times_in_turns,
    trainable,
    without_wrapper,
)
from benchmarks.table import Table
from examples.step_cost import peak_bytes

COLUMNS = [
    *("level", "case", "provider", "dtype", "kind", "measure", "channels", "outputs", "tokens", "b", "m"),
    *("median_ms", "p20_ms", "p80_ms", "rounds", "ratio", "ratio_trainable", "overhead_us"),
    *("peak_mib", "peak_ratio", "trainable"),
]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
DECODE_CALLS = 32
# Rounds of a layer whose step takes most of a second: 4096 x 4096 with 2048 rows.
LARGE_CHANNELS, LARGE_ROUNDS = 4096, 5


class Case(NamedTuple):
    """A layer to adapt.

    Attributes: `layer` makes it; `inputs`, the shapes of its inputs, one series of rows each; `b` and `m` of BOFT.
    """

    layer: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...]
    b: int
    m: int

    @property
    def name(self) -> str:
        layer = self.layer()
        if isinstance(layer, nn.Linear):
            return f"linear {layer.in_features}x{layer.out_features} b{self.b} m{self.m}"
        sizes = f"{layer.in_channels}x{layer.out_channels} {layer.kernel_size[0]}x{layer.kernel_size[1]}"
        return f"conv {sizes} stride {layer.stride[0]} b{self.b} m{self.m}"


def linear(inputs: int, outputs: int, b: int, m: int, tokens: tuple[int, ...] = (512, 2048)) -> Case:
    """A linear layer with bias, fed `tokens` rows."""
    return Case(functools.partial(nn.Linear, inputs, outputs), tuple((rows, inputs) for rows in tokens), b, m)


def conv(inputs: int, outputs: int, kernel: int, size: int, b: int, m: int, batch: int = 2, stride: int = 1) -> Case:
    """A convolution that keeps ``size x size`` (divided by `stride`)."""
    layer = functools.partial(nn.Conv2d, inputs, outputs, kernel, stride=stride, padding=kernel // 2)
    return Case(layer, ((batch, inputs, size, size),), b, m)


CASES = [
    linear(768, 768, 8, 2),
    linear(768, 3072, 8, 2),
    linear(3072, 768, 8, 2),
    linear(4096, 4096, 8, 2),
    linear(1280, 1280, 40, 3),
    linear(320, 320, 10, 2),
    linear(320, 320, 10, 6),
    conv(320, 320, 3, 32, 8, 2),
    conv(64, 128, 3, 64, 8, 2, stride=2),
    conv(640, 320, 1, 32, 8, 2),
]
QUICK_CASES = [linear(768, 768, 8, 2, (512,)), linear(768, 3072, 8, 2, (512,)), conv(64, 128, 3, 64, 8, 2, stride=2)]


class Effort(NamedTuple):
    """Seconds and least rounds of the turns of one measure."""

    budget_s: float
    min_rounds: int


CPU = torch.device("cpu")


def run(table_dir: Path, quick: bool, only: str | None, device: torch.device = CPU) -> None:
    """Measure all layers, or those whose name and dtype hold `only` (as in "linear 768x768 f32"), and write
    ``layers.csv``, or ``layers-cuda.csv``, into `table_dir`; nothing is written if there are none."""
    cases = [
        (case, dtype)
        for case in (QUICK_CASES if quick else CASES)
        for dtype in DTYPES
        if only is None or only in f"{case.name} {dtype}"
    ]
    if not cases:
        return
    table = Table(table_dir / "layers.csv", COLUMNS, device)
    effort = Effort(0.6, 5) if quick else Effort(1.0, 7)
    with tqdm(cases, desc="layers", unit="case") as progress:
        for case, dtype in progress:
            progress.set_postfix_str(f"{case.name} {dtype}")
            try:
                measure_case(case, dtype, effort, table, device)
            finally:
                plain_peft()


def measure_case(case: Case, dtype: str, effort: Effort, table: Table, device: torch.device = CPU) -> None:
    """Write all rows of one layer in one dtype."""
    torch.manual_seed(0)
    plain = case.layer().to(device, DTYPES[dtype])
    channels = plain.weight[0].numel()
    is_conv = isinstance(plain, nn.Conv2d)
    if channels >= LARGE_CHANNELS:
        effort = Effort(effort.budget_s, LARGE_ROUNDS)
    fast = {**FAST, **WRAP, **(BASE_TRAINABLE if is_conv else {})}
    _Series(case, dtype, plain, fast, DECODE_CALLS, effort, table).measure()
    # These layers must be gone before PEFT is unpatched and patched again.
    gc.collect()
    if channels <= DENSE_CHANNELS:
        _Series(case, dtype, plain, DENSE, 1, Effort(0, DENSE_ROUNDS), table).measure()
    gc.collect()


class _Series:
    """One layer, adapted by some providers, all measures in turns."""

    def __init__(
        self,
        case: Case,
        dtype: str,
        plain: nn.Module,
        providers: Mapping[str, Provider],
        decode_calls: int,
        effort: Effort,
        table: Table,
    ) -> None:
        self.case, self.plain, self.providers = case, plain, providers
        self.decode_calls, self.effort, self.table = decode_calls, effort, table
        self.device = plain.weight.device
        self.adapted = {
            name: adapted(provider, nn.Sequential(copy.deepcopy(plain)), ["0"], case.b, case.m)
            for name, provider in providers.items()
        }
        self.layers = {name: without_wrapper(entry.model)[0] for name, entry in self.adapted.items()}
        # Another series has written the rows of `base` already.
        self.silent = {"base"} if providers is DENSE else set()
        self.common = {
            "level": "layer",
            "case": case.name,
            "dtype": dtype,
            "kind": "conv" if isinstance(plain, nn.Conv2d) else "linear",
            "channels": plain.weight[0].numel(),
            "outputs": plain.weight.shape[0],
        }

    def measure(self) -> None:
        """Write all rows."""
        for shape in self.case.inputs:
            self._training(shape)
        if isinstance(self.plain, nn.Linear):
            self._decode()
        if self.plain.weight.dtype == torch.float32:
            self._init()
        self._merge()

    def _times(
        self, steps: Mapping[str, Callable[[], object]], before: Mapping[str, Callable[[], object]] | None = None
    ) -> dict[str, Times]:
        return times_in_turns(self.providers, steps, *self.effort, before, self.device)

    def _write(
        self,
        measure: str,
        times: Mapping[str, Times],
        tokens: int | None = None,
        calls: int = 1,
        more: Callable[[str], dict[str, float]] | None = None,
    ) -> None:
        base, base_trainable = times.get("base"), times.get("base-trainable")
        for name, time in times.items():
            if name in self.silent:
                continue
            entry: Adapted = self.adapted[name]
            m = built_factors(entry.model)
            self.table.add(
                **self.common,
                measure=measure,
                provider=name,
                tokens=tokens,
                b=entry.b if m else None,
                m=m,
                trainable=sum(parameter.numel() for parameter in trainable(entry.model)),
                ratio_trainable=time.median / base_trainable.median if base_trainable else None,
                **timing_columns(time, base, calls),
                **(more(name) if more else {}),
            )

    def _training(self, shape: tuple[int, ...]) -> None:
        dtype = self.plain.weight.dtype
        x = torch.randn(shape, dtype=dtype, device=self.device, requires_grad=True)
        dy = torch.randn_like(self.plain(x))
        tokens = x.shape[0] if x.dim() == 2 else dy[:, 0].numel()
        for layer in self.layers.values():
            layer.train()
        steps = {name: functools.partial(layer, x) for name, layer in self.layers.items()}
        self._write("forward", self._times(steps), tokens)

        steps = {name: functools.partial(_train, layer, x, dy) for name, layer in self.layers.items()}
        times = self._times(steps)
        peaks = {name: self._peak(name, steps[name], [x, dy]) for name in steps}

        def memory(name: str) -> dict[str, float]:
            return {"peak_mib": peaks[name] / 2**20, "peak_ratio": peaks[name] / peaks["base"]}

        self._write("forward+backward", times, tokens, more=memory)

    def _peak(self, name: str, step: Callable[[], None], others: list[Tensor]) -> int:
        alive = [*tensors(self.layers[name]), *others]
        assert all(tensor.grad is None for tensor in alive), "a gradient from before would be freed in the step"
        self.providers[name].prepare()
        return peak_bytes(step, alive)

    def _decode(self) -> None:
        x = torch.randn(1, self.plain.in_features, dtype=self.plain.weight.dtype, device=self.device)
        for layer in self.layers.values():
            layer.eval()
        calls = self.decode_calls
        times = self._times({name: functools.partial(_infer, layer, x, calls) for name, layer in self.layers.items()})

        def overhead(name: str) -> dict[str, float]:
            return {"overhead_us": 1e6 * (times[name].median - times["base"].median) / calls}

        self._write("decode", times, 1, calls, overhead)

    def _init(self) -> None:
        fresh: dict[str, nn.Module] = {}

        def make(name: str) -> None:
            fresh[name] = nn.Sequential(self.plain)

        def adapt(name: str) -> None:
            self.providers[name].adapt(fresh[name], ["0"], self.case.b, self.case.m)

        names = [name for name in self.providers if not name.startswith("base") and name != "pr3540"]
        steps = {name: functools.partial(adapt, name) for name in names}
        before = {name: functools.partial(make, name) for name in names}
        self._write("init", self._times(steps, before))

    def _merge(self) -> None:
        # Both in one series, so that most steps find the layer as the step before left it.
        measures, names = ("merge", "unmerge"), [name for name, layer in self.layers.items() if hasattr(layer, "merge")]
        providers, steps, before = {}, {}, {}
        for name in names:
            for measure in measures:
                key = f"{measure} {name}"
                providers[key] = self.providers[name]
                steps[key] = getattr(self.layers[name], measure)
                before[key] = functools.partial(_bring, self.layers[name], measure == "unmerge")
        times = times_in_turns(providers, steps, *self.effort, before, self.device)
        for measure in measures:
            self._write(measure, {name: times[f"{measure} {name}"] for name in names})


def _bring(layer: nn.Module, merged: bool) -> None:
    """Merge or unmerge `layer` if it is not so yet."""
    if bool(layer.merged) != merged:
        (layer.merge if merged else layer.unmerge)()


def _train(layer: nn.Module, x: Tensor, dy: Tensor) -> None:
    layer(x).backward(dy)
    x.grad = None
    for parameter in layer.parameters():
        parameter.grad = None


@torch.no_grad()
def _infer(layer: nn.Module, x: Tensor, calls: int) -> None:
    for _ in range(calls):
        layer(x)
