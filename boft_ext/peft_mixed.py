"""Batches whose rows have different adapters: `adapter_names=` of PEFT models (PEFT 0.21: `LoraModel` has the same).

``model(input_ids, adapter_names=["a", "__base__", "b"])`` and ``model.generate(..., adapter_names=...)`` give each row
of the batch, which is an entry of the first axis, the adapter of that name at its strength, or none. This serves
inference: rows are computed without dropout, and a model in training mode is refused. Only one thread may use a model
that is called so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import groupby
from typing import Any, NamedTuple

import torch
from peft.tuners.boft.layer import BOFTLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from . import _C, functional, layers, peft_strength
from .peft_creation import adopt_all

_BASE = "__base__"


class _Run(NamedTuple):
    """Rows one after the other with the same adapter."""

    name: str
    rows: slice


class _Split(NamedTuple):
    """A batch as runs. Where its rows have to be moved for that, `order` is the row for each place in the runs, and
    `places` the place for each row."""

    runs: list[_Run]
    order: Tensor | None = None
    places: Tensor | None = None

    def map(self, function: Callable[[str, Tensor], Tensor], x: Tensor) -> Tensor:
        """`function` of the adapter's name and its rows of `x`, for all runs; the results in the batch's order."""
        ordered = x if self.order is None else x.index_select(0, self.order)
        results = [function(run.name, ordered[run.rows]) for run in self.runs]
        together = results[0] if len(results) == 1 else torch.cat(results)
        return together if self.places is None else together.index_select(0, self.places)


# Kept, since all layers of a model split a batch alike.
@lru_cache(maxsize=32)
def _runs(names: tuple[str, ...]) -> list[_Run]:
    runs, start = [], 0
    for name, run in groupby(names):
        stop = start + sum(1 for _ in run)
        runs.append(_Run(name, slice(start, stop)))
        start = stop
    return runs


@lru_cache(maxsize=32)
def _by_adapter(names: tuple[str, ...], device: torch.device) -> _Split:
    """One run for each adapter, in the order in which they come up; the rows are not moved if they lie so already."""
    first = {name: place for place, name in enumerate(dict.fromkeys(names))}
    if len(_runs(names)) == len(first):
        return _Split(_runs(names))
    order = sorted(range(len(names)), key=lambda row: first[names[row]])
    # Inference tensors could not be used with gradients later.
    with torch.inference_mode(False):
        moved = torch.tensor(order)
        return _Split(_runs(tuple(names[row] for row in order)), moved.to(device), moved.argsort().to(device))


def _adapters(layer: BOFTLayer, x: Tensor, names: Sequence[str], axes: int) -> dict[str, layers.Adapter]:
    """The adapters of a batch that `layer` has, after checking that the batch can be computed.

    An adapter of the model that this layer does not have leaves it as it is.
    """
    if layer.merged_adapters:
        raise ValueError(
            f"adapter_names needs a weight without adapters, but {', '.join(map(repr, layer.merged_adapters))} is "
            "merged into it: call unmerge_adapter() first"
        )
    if x.dim() < axes or len(x) != len(names):
        raise ValueError(
            f"adapter_names must name one adapter for each row of the batch, got {len(names)} names for an input of "
            f"shape {tuple(x.shape)}"
        )
    if "boft_P" in layer._buffers:
        adopt_all(layer)
    return {name: peft_strength.adapter(layer, name) for name in set(names) - {_BASE} if name in layer.boft_R}


def _in_one_pass(x: Tensor) -> bool:
    """Whether the compiled functions that take all runs at once, whatever their order, may be tried."""
    return not torch.compiler.is_compiling() and not torch.is_grad_enabled() and type(x) is Tensor


# Kept like the runs: a batch of single rows has hundreds.
@lru_cache(maxsize=32)
def _runs_and_choice(names: tuple[str, ...], adapters: tuple[str, ...]) -> tuple[list[int], list[int]]:
    """For each run the row it ends before, and the place of its adapter in `adapters`, -1 for none."""
    runs, places = _runs(names), {name: place for place, name in enumerate(adapters)}
    return [run.rows.stop for run in runs], [places.get(run.name, -1) for run in runs]


def _rotate(x: Tensor, names: tuple[str, ...], adapters: dict[str, layers.Adapter]) -> Tensor:
    """`functional.rotate` of each row by its adapter."""
    if _in_one_pass(x):
        rotations = [adapter.boft_R for adapter in adapters.values()]
        y = _C.rotate_runs_now(x, *_runs_and_choice(names, tuple(adapters)), rotations)
        if y is not None:
            return y
    # What `functional.rotate` returns, which the rows without an adapter have to match.
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype

    def rotate(name: str, rows: Tensor) -> Tensor:
        return functional.rotate(rows, adapters[name].boft_R) if name in adapters else rows.to(dtype)

    return _by_adapter(names, x.device).map(rotate, x)


def _scale(z: Tensor, names: tuple[str, ...], adapters: dict[str, layers.Adapter], bias: Tensor | None) -> Tensor:
    """`functional.scale` of each row by its adapter."""
    if _in_one_pass(z):
        scales = [adapter.boft_s for adapter in adapters.values()]
        out = _C.scale_runs_now(z, *_runs_and_choice(names, tuple(adapters)), scales, bias)
        if out is not None:
            return out

    def scale(name: str, rows: Tensor) -> Tensor:
        return functional.scale(rows, adapters[name].boft_s, bias) if name in adapters else rows

    return _by_adapter(names, z.device).map(scale, z)


def linear_forward(layer: BOFTLayer, x: Tensor, names: Sequence[str], *args: Any, **kwargs: Any) -> Tensor:
    """`layers.linear_forward` with an adapter for each row: ``(rows, ..., in)`` to ``(rows, ..., out)``.

    The base layer is called once, for the whole batch. Result in the dtype that it returns.

    Raises: ValueError if the adapters are merged or `names` does not have one name for each row.
    """
    adapters = _adapters(layer, x, names, 2)
    if not adapters:
        return layer.base_layer(x, *args, **kwargs)
    rotated = _rotate(x, tuple(names), adapters)
    bias = layers.bias_of(layer.base_layer, rotated)
    return _scale(layer.base_layer(rotated, *args, **kwargs), tuple(names), adapters, bias)


def by_adapter(
    layer: BOFTLayer,
    x: Tensor,
    names: Sequence[str],
    axes: int,
    forward: Callable[[list[layers.Adapter], Tensor], Tensor],
) -> Tensor:
    """``forward(adapters, rows)`` for the rows of `x` of each adapter, or of none, in the order of the batch.

    For layers that must be called once for each adapter. `axes` is how many `x` has at least, with the batch's.
    Raises what `linear_forward` does.
    """
    adapters = _adapters(layer, x, names, axes)

    def run(name: str, rows: Tensor) -> Tensor:
        return forward([adapters[name]] if name in adapters else [], rows)

    return _by_adapter(tuple(names), x.device).map(run, x)


def _repeats(model: nn.Module, options: dict[str, Any]) -> int:
    """How often `generate` repeats each row: for beams, and for several samples of one prompt."""
    config = options.get("generation_config") or getattr(model, "generation_config", None)
    counts = [options.get(name) or getattr(config, name, None) or 1 for name in ("num_beams", "num_return_sequences")]
    return max(counts)


def _give_names(names: list[str], repeated: list[str], module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Forward pre-hook: pass the names on. An encoder gets the rows as they are even where its decoder repeats them."""
    x = next(iter((*args, *kwargs.values())), ())
    return args, {**kwargs, "adapter_names": repeated if len(x) == len(repeated) else names}


@contextlib.contextmanager
def enable_forward_hooks(self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any) -> Iterator[None]:
    """``_enable_peft_forward_hooks`` of `BOFTModel`: PEFT enters it around each forward and each generate.

    Within the block the model's BOFT layers and its copies of saved modules get `adapter_names`, where it is not None.

    Args:
        adapter_names: for each row the name of an adapter, or ``"__base__"`` for none. `generate` may repeat rows.
        args, kwargs: what the model is called with.

    Raises: ValueError in training mode or for a name that is no adapter of the model; TypeError if it is not a list.
        The layers raise ValueError if it has not the length of the batch or adapters are merged.
    """
    if adapter_names is None:
        yield
        return
    if not isinstance(adapter_names, (list, tuple)):
        raise TypeError(f"adapter_names must be a list of names, one for each row, got {adapter_names!r}")
    if self.training:
        raise ValueError("adapter_names is for inference, but the model is in training mode: call eval() first")
    unknown = sorted({repr(name) for name in adapter_names if name != _BASE and name not in self.peft_config})
    if unknown:
        raise ValueError(
            f"adapter_names holds {', '.join(unknown)}, but the model has {', '.join(map(repr, self.peft_config))} "
            f"({_BASE!r} stands for no adapter)"
        )
    names = list(adapter_names)
    times = _repeats(self.model, kwargs)
    repeated = [name for name in names for _ in range(times)]
    handles = []
    try:
        for module in self.modules():
            if isinstance(module, (BOFTLayer, AuxiliaryTrainingWrapper)):
                give = partial(_give_names, names, repeated)
                handles.append(module.register_forward_pre_hook(give, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
