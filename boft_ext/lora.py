"""BOFT adapters approximated by LoRA, for programs that serve nothing else.

``W' - W`` of a layer, with ``W' = diag(s) W R^T``, has full rank in general. Its best approximation of rank r is the
truncated singular value decomposition (Eckart and Young, 1936), which LoRA holds as ``B A``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapted import AdaptedLayer, adapted_layers, base_model, configurations, from_peft
from .adapter import WEIGHTS_NAME
from .config import CONFIG_NAME
from .export import merged_tensors
from .progress import progress_bar
from .safetensors_writer import Source, write
from .staging import staged
from .table import table
from .targets import modules_by_name, saved_names

_PREFIX = "base_model.model."
_BIASES = {"none": "none", "all": "all", "boft_only": "lora_only"}

# Up to this many rows or columns LAPACK decides all singular values; above, it takes minutes a layer.
EXACT_SIZE = 2048


@dataclass(frozen=True)
class LayerApproximation:
    """How well LoRA holds one layer: its `rank` and ``||B A - (W' - W)|| / ||W' - W||`` in the Frobenius norm.

    The error is 0 where the adapter changes nothing.
    """

    layer: str
    out: int
    d: int
    rank: int
    relative_error: float


@dataclass(frozen=True)
class LoraReport:
    """What `export_lora` wrote; ``str()`` gives a table. `rows` has one entry per layer.

    `relative_error` is that of all layers together: the root of the summed squared errors over that of the summed
    squared changes.
    """

    rows: tuple[LayerApproximation, ...]
    relative_error: float

    def __str__(self) -> str:
        lines = [(row.layer, row.out, row.d, row.rank, row.relative_error) for row in self.rows]
        return table(
            ("layer", "out", "d", "rank", "relative error"), [*lines, ("all", None, None, None, self.relative_error)]
        )


def export_lora(
    model: nn.Module, directory: str | os.PathLike[str], *, rank: int, progress: bool = True
) -> LoraReport:
    """Write the best approximation of the active adapters as a LoRA adapter that PEFT loads onto the base model.

    Per layer the truncated singular value decomposition of ``W' - W``, computed from the base weight in float64 so
    that small rotations survive, with ``lora_alpha = r`` so that the factors count as they are; layers with fewer than
    `rank` rows or columns get as many as they have, and are then exact. Where both sizes exceed 2048 the decomposition
    is a randomised one with a fixed seed (Halko, Martinsson and Tropp, 2011, four power iterations), whose error was
    within 1 % of the best in all tests. `modules_to_save` and trained biases are written too.

    Args:
        model: a `PeftModel`, a model with injected BOFT layers, or one made by `boft_ext.wrap` or `load_adapter`. It is
            not changed.
        directory: created if missing; ``adapter_config.json`` and ``adapter_model.safetensors`` in it are replaced,
            both or, after an error, neither.
        rank: r, at least 1.
        progress: show a bar, one step per layer.

    Returns: a `LoraReport` with the error of every layer.
    Raises: ValueError for what LoRA layers cannot hold (grouped or dilated convolutions, other padding than zeros,
        other layers than `nn.Linear` and `nn.Conv2d`), for merged layers, and as `export_merged`; TypeError or
        ValueError for a bad rank. Not thread-safe with respect to the model.
    """
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be an integer, got {rank!r}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    root = base_model(model)
    plain = merged_tensors(root)
    layers = {name: layer for name, layer in adapted_layers(root).items() if layer.active or layer.merged}
    for name, layer in layers.items():
        _refuse_what_lora_lacks(name, layer)
    if not layers:
        raise ValueError(f"{type(root).__name__} has no active adapter to export")
    config, others = _beside(model, root, plain, layers)
    ranks = {name: min(rank, *_flat_shape(layer)) for name, layer in layers.items()}

    rows, tensors = [], {f"{_PREFIX}{name}": tensor for name, tensor in others.items()}
    changed = missed = 0.0
    with staged(directory) as work, progress_bar("export", len(layers), progress) as step:
        for name, layer in layers.items():
            lora_A, lora_B, change, error = _approximate(layer, ranks[name])
            tensors[f"{_PREFIX}{name}.lora_A.weight"], tensors[f"{_PREFIX}{name}.lora_B.weight"] = lora_A, lora_B
            rows.append(LayerApproximation(name, *_flat_shape(layer), ranks[name], error / change if change else 0.0))
            changed, missed = changed + change**2, missed + error**2
            step()
        values = {**config, **_lora_fields(rank, ranks, modules_by_name(root))}
        (work / CONFIG_NAME).write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
        sources = {name: Source(tensor.dtype, tuple(tensor.shape), tensor.detach) for name, tensor in tensors.items()}
        write(work / WEIGHTS_NAME, sources, {"format": "pt"})
    return LoraReport(tuple(rows), (missed / changed) ** 0.5 if changed else 0.0)


def _refuse_what_lora_lacks(name: str, layer: AdaptedLayer) -> None:
    base = layer.base_layer
    if layer.merged:
        raise ValueError(f"layer {name} is merged, so its change is not known any more: unmerge first")
    if isinstance(base, nn.Linear):
        return
    if not isinstance(base, nn.Conv2d):
        raise ValueError(f"layer {name}: a {type(base).__name__} cannot be exported as LoRA")
    # PEFT's LoRA convolution takes over kernel, stride and padding alone.
    for what, plain in (("groups", 1), ("dilation", (1, 1)), ("padding_mode", "zeros")):
        if getattr(base, what) != plain:
            raise ValueError(
                f"layer {name} has {what} = {getattr(base, what)}, which the convolution of LoRA in PEFT does not "
                "take over: use export_merged"
            )


def _flat_shape(layer: AdaptedLayer) -> tuple[int, int]:
    weight = layer.base_layer.weight
    return weight.shape[0], weight.numel() // weight.shape[0]


def _approximate(layer: AdaptedLayer, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """A ``(r, in)`` or ``(r, in, kh, kw)``, B ``(out, r)`` or ``(out, r, 1, 1)``, the norms of change and error."""
    weight = layer.base_layer.weight.detach()
    # Subtracting weights that hardly differ costs digits; devices of Apple have nothing wider than float32.
    dtype = torch.float32 if weight.device.type == "mps" else torch.float64
    change = (layer.merged_weight(dtype) - weight.to(dtype)).reshape(weight.shape[0], -1)
    left, right = low_rank(change, rank)
    error = torch.linalg.matrix_norm(torch.addmm(change, left, right, alpha=-1))
    one = (1,) * (weight.dim() - 2)
    lora_A = right.float().cpu().reshape(rank, *weight.shape[1:])
    lora_B = left.float().cpu().reshape(weight.shape[0], rank, *one)
    return lora_A, lora_B, float(torch.linalg.matrix_norm(change)), float(error)


def low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``left (n, r)`` and ``right (r, k)`` whose product is the best rank-r approximation of ``matrix (n, k)``.

    The singular values are shared evenly between the two. Best in the Frobenius norm: exactly where the smaller size is
    at most `EXACT_SIZE`, otherwise by a randomised decomposition with a fixed seed. Leaves torch's generators alone.
    """
    if min(matrix.shape) <= EXACT_SIZE:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        devices = [matrix.device] if matrix.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, q=min(2 * rank + 16, *matrix.shape), niter=4)
        vh = v.mH
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root.unsqueeze(1) * vh[:rank]


def _beside(
    model: nn.Module, root: nn.Module, plain: dict[str, Any], layers: dict[str, AdaptedLayer]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What an adapter's file holds beside the layers' own tensors: fields of the configuration, tensors by key."""
    configs = configurations(model)
    active = next(name for layer in layers.values() for name in layer.active)
    config = configs.get(active)
    bias = getattr(config, "bias", "none")
    wrappers = from_peft("utils.other", "ModulesToSaveWrapper")
    modules = modules_by_name(root)
    saved = [name for name, module in modules.items() if isinstance(module, wrappers)]
    if not saved and config is not None:
        inside = tuple(f"{name}." for name in layers)
        saved = list(saved_names((name for name in modules if not f"{name}.".startswith(inside)), config))
    prefixes = tuple(f"{name}." for name in saved)
    tensors = {key: value for key, value in plain.items() if key.startswith(prefixes)} if prefixes else {}
    biases = [key for key in plain if bias == "all" and (key == "bias" or key.endswith(".bias"))]
    biases += [f"{name}.bias" for name in layers if bias == "boft_only" and f"{name}.bias" in plain]
    for key in biases:
        owner = key.removesuffix(".bias")
        tensors[f"{owner}.base_layer.bias" if owner in layers else key] = plain[key]
    task = getattr(config, "task_type", None)
    fields = {
        "base_model_name_or_path": getattr(config, "base_model_name_or_path", None)
        or root.__dict__.get("name_or_path"),
        "revision": getattr(config, "revision", None),
        "task_type": getattr(task, "value", task),
        "auto_mapping": {"base_model_class": type(root).__name__, "parent_library": type(root).__module__}
        if task is None
        else None,
        "bias": _BIASES[bias],
        "modules_to_save": saved or None,
    }
    return fields, {name: tensor.detach() for name, tensor in tensors.items()}


def _lora_fields(rank: int, ranks: dict[str, int], names: Iterable[str]) -> dict[str, Any]:
    """The part of PEFT's ``LoraConfig`` that describes the layers."""
    smaller = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": _exactly(sorted(ranks), names),
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }


def _exactly(targets: list[str], names: Iterable[str]) -> list[str] | str:
    """The layers as PEFT's `target_modules`: a list or, where other names end like one of them, an expression."""
    endings = tuple(f".{target}" for target in targets)
    if any(name.endswith(endings) and name not in targets for name in names):
        return "|".join(re.escape(target) for target in targets)
    return targets
