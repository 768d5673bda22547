"""What PEFT's BOFT layers do while `patch_peft` is in force: forward, merge, unmerge and the dense rotation.

The functions here become methods of ``peft.tuners.boft.layer.Linear`` and ``Conv2d``, so ``self`` is
always such a layer. Their arguments and results are those of the methods they stand in for. A layer is safe under
threads while it only computes without gradients and without `adapter_names`; merging, loading, training and changing
strengths need the caller's lock, as in PEFT.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from . import functional, layers, peft_mixed, peft_offload, peft_strength, peft_weights
from .peft_creation import MergedNames, adopt_all


class Options(NamedTuple):
    """What the caller of `patch_peft` chose."""

    dropout: str | tuple[float, float] = "peft"
    keep_merged: bool = True


_options = Options()

# Base weights as they were before the first merge. Keyed weakly by the layer, so that they are never saved or copied
# with it and go when it goes.
_originals: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()


def configure(options: Options) -> None:
    """Set the options for all patched layers. Affects later calls only."""
    global _options
    _options = options


def _keep(boft_R: Tensor, dropout: nn.Module) -> Tensor | None:
    """The dropout mask of one training step for one adapter, or None."""
    if not dropout.training or isinstance(dropout, nn.Identity):
        return None
    m, blocks = boft_R.shape[:2]
    rule = _options.dropout
    if rule == "peft":
        return functional.dropout_keep(m, blocks, dropout.p, boft_R.device)
    p1, p2 = (dropout.p, dropout.p) if rule == "paper" else rule
    return functional.dropout_keep_paper(m, blocks, p1, p2, boft_R.device)


def to_apply(self) -> list[layers.Adapter]:
    """The adapters that act in a forward call, first to last: the active ones, none while disabled or merged."""
    if self._disable_adapters or self.merged_adapters:
        return []
    if "boft_P" in self._buffers:
        adopt_all(self)
    # Straight from the module's own dictionaries: this runs in every forward of every layer.
    modules, names = self._modules, self._active_adapter
    rotations, scales, dropouts = modules["boft_R"], modules["boft_s"], modules["boft_dropout"]._modules
    strengths = self.scaling
    adapters = []
    for name in (names,) if isinstance(names, str) else names:
        if name in rotations:
            boft_R, boft_s = layers.parameter_of(rotations, name), layers.parameter_of(scales, name)
            if boft_R.is_meta:
                boft_R, boft_s = peft_offload.fetch(rotations, name), peft_offload.fetch(scales, name)
            adapter = layers.Adapter(boft_R, boft_s, _keep(boft_R, dropouts[name]))
            strength = strengths[name]
            adapters.append(adapter if strength == 1.0 else peft_strength.at_strength(adapter, strength))
    return adapters


def _as_input(result: Tensor, x: Tensor) -> Tensor:
    """Outside autocast PEFT's layers return the dtype of their input; under autocast the base layer decides."""
    if result.dtype == x.dtype or torch.is_autocast_enabled(x.device.type):
        return result
    return result.to(x.dtype)


def _as_weight(x: Tensor, weight: Tensor) -> Tensor:
    """PEFT's convolution, unlike its linear layer, takes an input of another dtype than its weight."""
    same = x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)
    return x if same else x.to(weight.dtype)


def leave_the_weight_if_disabled(self) -> None:
    """Disabled adapters must not act through a merged weight either."""
    if self._disable_adapters and self.merged_adapters:
        self.unmerge()


def _base_forward(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The base layer alone, with or without the adapters in its weight."""
    leave_the_weight_if_disabled(self)
    return _as_input(self.base_layer(x, *args, **kwargs), x)


def row_names(self, kwargs: dict[str, Any]) -> list[str] | None:
    """Take `adapter_names` out of `kwargs`; None where all rows have the active adapters, or none has one."""
    names = kwargs.pop("adapter_names")
    return None if self._disable_adapters else names


def linear_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """``base_layer(x R)`` scaled per output; dtype of `x`, or the base layer's under autocast.

    With `adapter_names` each row of `x` has an adapter of its own (see `peft_mixed`).
    """
    if "adapter_names" in kwargs and (names := row_names(self, kwargs)) is not None:
        return _as_input(peft_mixed.linear_forward(self, x, names, *args, **kwargs), x)
    adapters = to_apply(self)
    if not adapters:
        return _base_forward(self, x, args, kwargs)
    if x.is_nested:
        # nn.TransformerEncoder makes these of padded input; only torch's own operators know them.
        return nn.functional.linear(x, layers.merged_weight(self.base_layer.weight, adapters), self.base_layer.bias)
    return _as_input(layers.linear_forward(self._modules["base_layer"], x, adapters, *args, **kwargs), x)


def conv_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The base convolution with its weight rotated and scaled; dtype of `x`, or the base layer's under autocast.

    With `adapter_names` each row of `x` has an adapter of its own (see `peft_mixed`); the base layer is then called
    once for each adapter, since each has its own weight.
    """
    names = row_names(self, kwargs) if "adapter_names" in kwargs else None
    adapters = to_apply(self) if names is None else []
    if names is None and not adapters:
        return _base_forward(self, x, args, kwargs)
    # A quantised weight cannot be rotated as it is stored.
    dequantised = None if self.quantization_backend is None else self.get_base_weight()
    data = _as_weight(x, self.base_layer.weight if dequantised is None else dequantised)

    def convolve(adapters: list[layers.Adapter], rows: Tensor) -> Tensor:
        if not adapters:
            return self.base_layer(rows, *args, **kwargs)
        return layers.conv_forward(self.base_layer, rows, adapters, *args, weight=dequantised, **kwargs)

    if names is None:
        return _as_input(convolve(adapters, data), x)
    axes = 2 + len(self.base_layer.kernel_size)
    return _as_input(peft_mixed.by_adapter(self, data, names, axes, convolve), x)


def _groups(self) -> int:
    return getattr(self.get_base_layer(), "groups", 1)


def _keeps_original(self, weight: Tensor) -> bool:
    """Whether merging into `weight` keeps it: a 16-bit one, since a rounded merge cannot be computed back exactly."""
    narrow = weight.dtype.itemsize < torch.float32.itemsize
    return narrow and _options.keep_merged and self.quantization_backend is None


def _refuse_zero_scale(name: str, boft_s: Tensor) -> None:
    zero = (boft_s == 0).flatten().nonzero()
    if zero.numel():
        raise ValueError(
            f"the scale of adapter {name!r} is 0 for output {int(zero[0])}: a merge into a weight whose original is "
            "not kept could not be undone"
        )


def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    """Write ``diag(s) W R^T`` of the adapters into the base weight, of all of them or of none.

    The original of a 16-bit weight stays in memory until `unmerge` (option `keep_merged`). Modules that share the
    weight, as tied embeddings do, keep it unmerged, and `unmerge` ties them again.

    Args:
        safe_merge: refuse a weight that is not finite.
        adapter_names: the adapters to merge, first to last; None for the active ones. Merged ones are left out.

    Raises: ValueError for such a weight, and for a zero in `boft_s` that `unmerge` could not undo; whatever PEFT
        raises for a quantised base that cannot be merged. The layer is then as it was.
    """
    names = [name for name in check_adapters_to_merge(self, adapter_names) or () if name in self.boft_R]
    if not names:
        return
    # An inference tensor as a weight could never be trained through again.
    with torch.inference_mode(False), torch.no_grad():
        original = weight = peft_weights.read(self)
        first = not self.merged_adapters
        shared = peft_weights.shared(self) if first else None
        keeps = (shared is not None or _keeps_original(self, original)) if first else self in _originals
        for name in names:
            adapter = peft_strength.adapter(self, name)
            if not keeps:
                _refuse_zero_scale(name, adapter.boft_s)
            weight = layers.merged_weight(weight, [adapter], _groups(self), reuse=False)
            if safe_merge and not bool(torch.isfinite(weight).all()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        if shared is not None:
            peft_weights.part_from(self, shared)
        peft_weights.write(self, weight)
        if first:
            _originals.pop(self, None)
            if keeps:
                _originals[self] = original if shared is None else shared
        self.merged_adapters = MergedNames([*self.merged_adapters, *names])


def unmerge(self) -> None:
    """Undo all merges: from the kept original, or by rotating and scaling back, last adapter first.

    Raises: ValueError if `boft_s` holds a zero and no original was kept. The layer is then as it was.
    """
    if not self.merged_adapters:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        return
    with torch.inference_mode(False), torch.no_grad():
        weight = peft_weights.read(self)
        original = _originals.get(self)
        if isinstance(original, nn.Parameter):
            peft_weights.rejoin(self, original)
            weight = peft_weights.read(self)
        elif original is not None:
            weight = original.to(weight.device, weight.dtype)
        else:
            for name in reversed(self.merged_adapters):
                if name not in self.boft_R:
                    message = f"adapter {name!r} was deleted while merged: its rotation stays in the weight"
                    warnings.warn(message, stacklevel=2)
                    continue
                adapter = peft_strength.adapter(self, name)
                weight = functional.unrotate_weight(weight, adapter.boft_R, adapter.boft_s, groups=_groups(self))
        peft_weights.write(self, weight)
        _originals.pop(self, None)
        self.merged_adapters = []


def get_delta_weight(self, adapter: str) -> tuple[Tensor, Tensor]:
    """The pair ``(R, s)`` of PEFT's BOFT layers, not a difference of weights: the merged weight is ``diag(s) W R^T``.

    `weight + delta` means nothing for a rotation, so what PEFT builds on such sums does not apply to BOFT: weighted
    combinations of adapters (activate several with `set_scale` instead, they compose) and the conversion to LoRA.

    Returns: the dense ``(d, d)`` rotation and the scale as ``(out, 1)``, at the adapter's strength, in the dtypes of
        `boft_R` and `boft_s`, both differentiable. KeyError for an unknown adapter.
    """
    at_strength = peft_strength.adapter(self, adapter)
    rotation = functional.rotation_matrix(at_strength.boft_R).to(self.boft_R[adapter].dtype)
    return rotation, at_strength.boft_s.reshape(-1, 1).to(self.boft_s[adapter].dtype)
