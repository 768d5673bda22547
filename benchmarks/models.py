"""Whole models: what a training step, a decoded token and the making of an adapter cost with each provider.

Measures, one row each for every provider (`benchmarks.providers`) and model (`benchmarks.model_shapes`):

* ``step``: forward and backward in training mode, gradients cleared again, no optimiser; with the peak of live tensors
  (weights, adapter, inputs included) and ``tokens_per_s``.
* ``decode``: one token, without a cache, evaluation mode, no gradients, the adapter not merged.
* ``init``: adapting the model (PEFT: `get_peft_model`). ``load``: adapting it from a folder with a saved adapter
  (`PeftModel.from_pretrained`, which is PEFT's `load_adapter` on a new adapter).

BOFT has b = 8 and m = 2; boft_ext also has other values, in rows named ``boft_ext-m4b4`` and so on. `ratio` is to the
frozen `base` of the same turns. Every provider has its own copy of the weights, and all inputs get gradients, so that
`base` runs its backward pass too.

Left out: `init` of pr3540, whose tables this package builds in its own way, and `load` of it, which has no files;
ratios of `init` and `load`, which `base` lacks; the dense providers in bfloat16 and on the smaller sets of targets, for
the time they take.
"""

from __future__ import annotations

import copy
import functools
import gc
import tempfile
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.measure import Times, timing_columns
from benchmarks.model_shapes import LLAMA, SHAPES, ModelShape
from benchmarks.providers import (
    DENSE,
    DENSE_ROUNDS,
    FAST,
    RECOMPUTE,
    Provider,
    adapted,
    built_factors,
    plain_peft,
    tensors,
    times_in_turns,
    trainable,
)
from benchmarks.table import Table
from examples.step_cost import peak_bytes

COLUMNS = [
    *("level", "case", "provider", "dtype", "model", "targets", "measure", "tokens", "b", "m"),
    *("median_ms", "p20_ms", "p80_ms", "rounds", "ratio", "tokens_per_s"),
    *("peak_mib", "peak_ratio", "trainable"),
]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
B, M = 8, 2


class Variant(NamedTuple):
    """A provider with the BOFT shape that it is given."""

    provider: Provider
    b: int = B
    m: int = M


class Effort(NamedTuple):
    """How long is measured.

    Attributes: `rounds`, of a step and the least of a decoded token; `decode_s`, seconds of the turns of decoding;
    `setup_s`, of those of `init` and of `load`.
    """

    rounds: int
    decode_s: float
    setup_s: float


QUICK = Effort(3, 2.0, 0.5)
FULL = Effort(9, 6.0, 1.0)
DENSE_EFFORT = Effort(DENSE_ROUNDS, 0.0, 0.0)


def fast_variants(shape: ModelShape, targets: str, quick: bool) -> dict[str, Variant]:
    """The providers that take turns on one model, by the names of their rows; boft_ext also with other b and m."""
    variants = {name: Variant(provider) for name, provider in {**FAST, **RECOMPUTE}.items()}
    others = [(1, 4), (2, 4), (4, 4)] if (shape, targets) == (LLAMA, "qv") else [(4, 4)] if targets != "qv" else []
    for m, b in [] if quick else others:
        variants[f"boft_ext-m{m}b{b}"] = Variant(FAST["boft_ext"], b, m)
    return variants


CPU = torch.device("cpu")


def run(table_dir: Path, quick: bool, only: str | None, device: torch.device = CPU) -> None:
    """Measure all models, or the cases whose name and dtype hold `only` (as in "llama all f32"), and write
    ``models.csv``, or ``models-cuda.csv``, into `table_dir`; nothing is written if there are none.

    A quick run has all linears of the Llama shape, few rounds, and no dense providers.
    """
    cases = [
        (shape, targets, dtype)
        for shape in ([LLAMA] if quick else SHAPES)
        for targets in (["all"] if quick else shape.targets)
        for dtype in DTYPES
        if only is None or only in f"{case_name(shape, targets)} {dtype}"
    ]
    if not cases:
        return
    table = Table(table_dir / "models.csv", COLUMNS, device)
    with tqdm(cases, desc="models", unit="case") as progress:
        for shape, targets, dtype in progress:
            progress.set_postfix_str(f"{case_name(shape, targets)} {dtype}")
            measure_case(shape, targets, dtype, quick, table, device)


def case_name(shape: ModelShape, targets: str) -> str:
    """The name of a case in the tables."""
    return f"{shape.name} {targets}"


def measure_case(
    shape: ModelShape, targets: str, dtype: str, quick: bool, table: Table, device: torch.device = CPU
) -> None:
    """Write all rows of one model with one set of targets in one dtype."""
    torch.manual_seed(0)
    plain = shape.build().to(device, DTYPES[dtype])
    try:
        series = _Series(shape, targets, dtype, plain, fast_variants(shape, targets, quick), table)
        series.measure(QUICK if quick else FULL)
        # These models must be gone before PEFT is unpatched and patched again.
        del series
        gc.collect()
        if dtype == "f32" and targets != "qv" and not quick:
            variants = {name: Variant(provider) for name, provider in DENSE.items()}
            _Series(shape, targets, dtype, plain, variants, table, silent={"base"}).measure(DENSE_EFFORT)
    finally:
        plain_peft()
        gc.collect()


class _Series:
    """One model, adapted by some providers, all measures in turns. No rows are written for those in `silent`."""

    def __init__(
        self,
        shape: ModelShape,
        targets: str,
        dtype: str,
        plain: nn.Module,
        variants: Mapping[str, Variant],
        table: Table,
        silent: Set[str] = frozenset(),
    ) -> None:
        self.shape, self.targets, self.plain, self.variants = shape, shape.targets[targets], plain, variants
        self.table, self.silent = table, silent
        self.device = next(plain.parameters()).device
        self.providers = {name: variant.provider for name, variant in variants.items()}
        self.models = {
            name: adapted(variant.provider, copy.deepcopy(plain), self.targets, variant.b, variant.m).model
            for name, variant in variants.items()
        }
        self.adapters = [name for name in variants if name != "base" and name != "pr3540"]
        self.common = {
            "level": "model",
            "case": case_name(shape, targets),
            "dtype": dtype,
            "model": shape.name,
            "targets": targets,
        }

    def measure(self, effort: Effort) -> None:
        """Write all rows."""
        self._step(effort.rounds)
        if self.shape.decode is not None:
            self._decode(effort)
        self._init(effort)
        self._load(effort)

    def _write(
        self,
        measure: str,
        times: Mapping[str, Times],
        tokens: int | None = None,
        peaks: Mapping[str, int] | None = None,
    ) -> None:
        base = times.get("base")
        for name, time in times.items():
            if name in self.silent:
                continue
            m = built_factors(self.models[name])
            memory = {}
            if peaks:
                memory = {"peak_mib": peaks[name] / 2**20, "peak_ratio": peaks[name] / peaks["base"]}
            self.table.add(
                **self.common,
                measure=measure,
                provider=name,
                tokens=tokens,
                b=self.variants[name].b if m else None,
                m=m,
                tokens_per_s=tokens / time.median if tokens else None,
                trainable=sum(parameter.numel() for parameter in trainable(self.models[name])),
                **timing_columns(time, base),
                **memory,
            )

    def _step(self, rounds: int) -> None:
        dtype = next(self.plain.parameters()).dtype
        inputs = {
            name: value.to(self.device, dtype).requires_grad_() if value.is_floating_point() else value.to(self.device)
            for name, value in self.shape.inputs().items()
        }
        steps = {}
        for name, model in self.models.items():
            model.train()
            steps[name] = functools.partial(_train, model, inputs, self.shape.loss)
        times = times_in_turns(self.providers, steps, 0.0, rounds, device=self.device)
        peaks = {name: self._peak(name, step, inputs) for name, step in steps.items()}
        self._write("step", times, self.shape.tokens, peaks)

    def _peak(self, name: str, step: Callable[[], None], inputs: Mapping[str, Tensor]) -> int:
        alive = [*tensors(self.models[name]), *inputs.values()]
        assert all(tensor.grad is None for tensor in alive), "a gradient from before would be freed in the step"
        self.providers[name].prepare()
        return peak_bytes(step, alive)

    def _decode(self, effort: Effort) -> None:
        decoded = self.shape.decode()
        inputs = {name: value.to(self.device) if torch.is_tensor(value) else value for name, value in decoded.items()}
        steps = {}
        for name, model in self.models.items():
            model.eval()
            steps[name] = functools.partial(_infer, model, inputs)
        times = times_in_turns(self.providers, steps, effort.decode_s, effort.rounds, device=self.device)
        self._write("decode", times, 1)

    def _fresh(self) -> tuple[dict[str, nn.Module], dict[str, Callable[[], None]]]:
        """Plain models to adapt, and what makes a new one for each adapter; they share the weights of `plain`."""
        models: dict[str, nn.Module] = {}

        def make(name: str) -> None:
            shared = {id(tensor): tensor for tensor in tensors(self.plain)}
            models[name] = copy.deepcopy(self.plain, shared)

        return models, {name: functools.partial(make, name) for name in self.adapters}

    def _init(self, effort: Effort) -> None:
        models, make = self._fresh()

        def adapt(name: str) -> None:
            variant = self.variants[name]
            variant.provider.adapt(models[name], self.targets, variant.b, variant.m)

        steps = {name: functools.partial(adapt, name) for name in self.adapters}
        self._write("init", times_in_turns(self.providers, steps, effort.setup_s, DENSE_ROUNDS, make, self.device))

    def _load(self, effort: Effort) -> None:
        models, make = self._fresh()
        with tempfile.TemporaryDirectory() as folder:

            def load(name: str) -> None:
                PeftModel.from_pretrained(models[name], Path(folder) / name)

            for name in self.adapters:
                self.providers[name].prepare()
                self.models[name].save_pretrained(Path(folder) / name, save_embedding_layers=False)
            steps = {name: functools.partial(load, name) for name in self.adapters}
            self._write("load", times_in_turns(self.providers, steps, effort.setup_s, DENSE_ROUNDS, make, self.device))


def _train(model: nn.Module, inputs: Mapping[str, Tensor], loss: Callable[[Any], Tensor]) -> None:
    loss(model(**inputs)).backward()
    for tensor in (*inputs.values(), *model.parameters()):
        tensor.grad = None


@torch.no_grad()
def _infer(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    model(**inputs)
