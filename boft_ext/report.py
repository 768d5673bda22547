"""How many parameters the BOFT adapters of a model have: stored, and effective.

Of a stored ``b x b`` block only the skew-symmetric part rotates, ``b (b - 1) / 2`` numbers, so that a layer of d
channels has ``(b - 1) d m / 2`` effective ones (Liu et al., ICLR 2024, section 4).
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from .adapted import AdaptedLayer, adapted_layers, base_model
from .layers import Adapter
from .table import percent, table


@dataclass(frozen=True)
class LayerParameters:
    """One adapter in one layer of d input channels (of a convolution: ``in kh kw``) and `out` outputs.

    `stored` counts the numbers in `boft_R` and `boft_s`, `rotation` the effective ones of the rotation,
    ``(b - 1) d m / 2``, `scale` those of `boft_s`, `effective` both.
    """

    adapter: str
    layer: str
    d: int
    out: int
    b: int
    m: int
    stored: int
    rotation: int
    scale: int

    @property
    def effective(self) -> int:
        return self.rotation + self.scale


@dataclass(frozen=True)
class AdapterParameters:
    """Sums over the layers of one adapter; `share` is `effective` over the parameters of the base model."""

    layers: int
    stored: int
    rotation: int
    scale: int
    share: float

    @property
    def effective(self) -> int:
        return self.rotation + self.scale

    @property
    def paper(self) -> int:
        """The paper's #Param column: the rotation and two numbers per output, for the scale and a bias.

        Its rows for language models count `rotation` alone.
        """
        return self.rotation + 2 * self.scale


@dataclass(frozen=True)
class ParameterReport:
    """What `parameter_report` found. ``str()`` gives tables in which layers of one kind share a row.

    Attributes: `rows`, one per adapter and layer; `totals` by adapter; `base_parameters`.
    """

    rows: tuple[LayerParameters, ...]
    totals: dict[str, AdapterParameters]
    base_parameters: int

    def to_dict(self) -> dict[str, Any]:
        """Everything in plain dicts and lists, ready for JSON."""
        adapters = {
            name: {
                **dataclasses.asdict(total),
                "effective": total.effective,
                "paper": total.paper,
                "rows": [
                    {**dataclasses.asdict(row), "effective": row.effective} for row in self.rows if row.adapter == name
                ],
            }
            for name, total in self.totals.items()
        }
        return {"base_parameters": self.base_parameters, "adapters": adapters}

    def __str__(self) -> str:
        kinds: dict[tuple[Any, ...], list[LayerParameters]] = {}
        for row in self.rows:
            name = re.sub(r"(?<![^.])\d+(?![^.])", "*", row.layer)
            kinds.setdefault((row.adapter, name, row.d, row.out, row.b, row.m), []).append(row)
        lines = [
            (*key[:2], len(rows), *key[2:], *(sum(getattr(row, name) for row in rows) for name in _COUNTS))
            for key, rows in kinds.items()
        ]
        lines += [
            (name, "all", total.layers, None, None, None, None, *(getattr(total, count) for count in _COUNTS))
            for name, total in self.totals.items()
        ]
        shares = [
            f"adapter {name}: {total.effective:,} effective parameters, {percent(total.share)} of the base model's "
            f"{self.base_parameters:,}"
            for name, total in self.totals.items()
        ]
        return "\n".join([table(("adapter", "layer", "layers", "d", "out", "b", "m", *_COUNTS), lines), *shares])


_COUNTS = ("stored", "rotation", "scale", "effective")


def parameter_report(model: nn.Module) -> ParameterReport:
    """Count the parameters of every BOFT adapter of `model`, also on the meta device.

    Trained biases and `modules_to_save` are not part of an adapter's counts; ``print_trainable_parameters`` of PEFT
    counts everything that trains, as stored.

    Args:
        model: a `PeftModel`, a model with injected BOFT layers, or one made by `boft_ext.wrap` or `load_adapter`.

    Raises: ValueError if it has no BOFT layers. Only looks at the model.
    """
    layers = adapted_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no BOFT layers")
    rows = tuple(
        _count(adapter, name, values) for name, layer in layers.items() for adapter, values in layer.adapters.items()
    )
    base = _base_parameters(model, layers)
    totals = {}
    for adapter in dict.fromkeys(row.adapter for row in rows):
        own = [row for row in rows if row.adapter == adapter]
        stored, rotation, scale = (sum(getattr(row, name) for row in own) for name in ("stored", "rotation", "scale"))
        totals[adapter] = AdapterParameters(len(own), stored, rotation, scale, (rotation + scale) / base)
    return ParameterReport(rows, totals, base)


def rotation_parameters(d: int, b: int, m: int) -> int:
    """``(b - 1) d m / 2``, the effective parameters of a rotation (paper section 4). Pure."""
    return (b - 1) * d * m // 2


def _count(adapter: str, layer: str, values: Adapter) -> LayerParameters:
    m, blocks, b, _ = values.boft_R.shape
    d, out = blocks * b, values.boft_s.numel()
    stored = values.boft_R.numel() + out
    return LayerParameters(adapter, layer, d, out, b, m, stored, rotation_parameters(d, b, m), out)


def _base_parameters(model: nn.Module, layers: dict[str, AdaptedLayer]) -> int:
    """Parameters of the base model, shared ones once: without adapters and PEFT's copies of `modules_to_save`."""
    added = {id(tensor) for layer in layers.values() for adapter in layer.adapters.values() for tensor in adapter[:2]}
    return sum(
        parameter.numel()
        for name, parameter in base_model(model).named_parameters()
        if id(parameter) not in added and ".modules_to_save." not in f".{name}"
    )
