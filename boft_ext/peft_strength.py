"""The strength of an adapter: how much of its rotation and scale acts (PEFT's `scaling`, diffusers' adapter weights).

An adapter at strength alpha is the rotation of ``alpha S`` and the scale ``1 + alpha (s - 1)``: 1 is the adapter
itself, 0 the base layer, and the rotation is orthogonal at any strength. The Cayley transform sees boft_R only through
its skew part S, which is linear in it, so this is the rotation of ``alpha boft_R``.

``layer.scaling`` holds a float for each adapter of a PEFT layer, 1.0 at the start. It is copied and pickled with the
layer, never saved in a state dict, and goes with its adapter. `set_scale`, `scale_layer` and `unscale_layer` become
methods of ``peft.tuners.boft.layer.BOFTLayer``; like merging, they need the caller's lock.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from . import layers
from .reference import accumulate_dtype

# One tensor for each parameter, so that the blocks cached for ``alpha boft_R``, which are found by the tensor and
# checked by its bytes, serve from call to call.
_scaled: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def add(layer: nn.Module, names: Iterable[str]) -> None:
    """Give adapters of `layer` that have no strength yet the strength 1."""
    # A new dict each time: the one that layers start with belongs to their class.
    layer.scaling = {**dict.fromkeys(names, 1.0), **layer.scaling}


def adapter(layer: nn.Module, name: str) -> layers.Adapter:
    """The adapter `name` of a PEFT layer at its strength, without dropout; differentiable in its parameters."""
    full = layers.Adapter(layer.boft_R[name], layer.boft_s[name])
    # Layers that PEFT made while it was not patched have no strengths.
    strength = getattr(layer, "scaling", {}).get(name, 1.0)
    return full if strength == 1.0 else at_strength(full, strength)


def at_strength(full: layers.Adapter, strength: float) -> layers.Adapter:
    """`full` at `strength`, in float32 where its parameters are 16-bit; differentiable in them. Thread-safe.

    The tensors are for use at once: where no gradient is needed, the next call for the same parameter may overwrite
    the rotation's.
    """
    boft_s = full.boft_s.to(accumulate_dtype(full.boft_s.dtype))
    return layers.Adapter(_times(full.boft_R, strength), 1 + strength * (boft_s - 1), full.keep)


def _times(boft_R: Tensor, strength: float) -> Tensor:
    wide = boft_R.to(accumulate_dtype(boft_R.dtype))
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and boft_R.requires_grad):
        return wide * strength
    # An inference tensor could not be written to later, outside inference mode.
    with torch.inference_mode(False), torch.no_grad():
        kept = _scaled.get(boft_R)
        if kept is None or (kept.shape, kept.dtype, kept.device) != (wide.shape, wide.dtype, wide.device):
            kept = _scaled[boft_R] = torch.empty_like(wide, memory_format=torch.contiguous_format)
        return torch.mul(wide.detach(), strength, out=kept)


def set_scale(self, adapter: str, scale: float) -> None:
    """Set the strength of `adapter` in this layer; nothing happens if the layer does not have it.

    Raises: TypeError or ValueError if `scale` is not a finite number; ValueError if the strength would change while
        the adapter is merged. Nothing is changed then.
    """
    if adapter in self.boft_R:
        _change(self, {adapter: _number(scale)})


def scale_layer(self, scale: float) -> None:
    """Multiply the strengths of the active adapters by `scale`, of all or of none. Raises what `set_scale` does."""
    factor = _number(scale)
    _change(self, {name: strength * factor for name, strength in _active(self).items()})


def unscale_layer(self, scale: float | None = None) -> None:
    """Divide the strengths of the active adapters by `scale`, or set them to 1 if it is None; of all or of none.

    Raises: what `set_scale` does; ValueError for ``scale = 0``.
    """
    active = _active(self)
    if scale is None:
        _change(self, dict.fromkeys(active, 1.0))
        return
    divisor = _number(scale)
    if divisor == 0:
        raise ValueError("the strength of an adapter cannot be divided by 0; unscale_layer() resets it")
    _change(self, {name: strength / divisor for name, strength in active.items()})


def _active(layer: nn.Module) -> dict[str, float]:
    return {name: layer.scaling.get(name, 1.0) for name in layer.active_adapters if name in layer.boft_R}


def _number(value: Any) -> float:
    if not isinstance(value, (numbers.Real, Tensor)) or isinstance(value, bool):
        raise TypeError(f"the strength of an adapter must be a number, got {value!r}")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"the strength of an adapter must be finite, got {value!r}")
    return number


def _change(layer: nn.Module, strengths: Mapping[str, float]) -> None:
    for name, strength in strengths.items():
        before = layer.scaling.get(name, 1.0)
        if not math.isfinite(strength):
            raise ValueError(f"the strength of adapter {name!r} would change from {before} to {strength}")
        if strength != before and name in layer.merged_adapters:
            raise ValueError(
                f"the strength of adapter {name!r} cannot change from {before} to {strength} while it is merged into "
                "the weight: unmerge (unfuse) it first"
            )
    add(layer, layer.boft_R)
    layer.scaling.update(strengths)
