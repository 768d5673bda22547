"""The BOFT layers of a model, whoever made them: this package's modules, or PEFT's, with `patch_peft` in force or not.

PEFT is never imported here: a model can hold PEFT's layers only where somebody else has imported it. The functions only
look at the model; they are as thread-safe as reading it is.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import layers, peft_strength
from .nn import BOFTConv2d, BOFTLinear
from .targets import is_conv1d, modules_by_name

SINGLE = "default"
"""The name that the adapter of this package's own layers goes by."""


@dataclass(frozen=True)
class AdaptedLayer:
    """One layer with its adapters.

    Attributes: `base_layer`, the layer underneath; `adapters`, all of them by name, without dropout; `active`, the
    names of those that act in a forward call, first to last; `merged`, whether the base weight holds adapters now, in
    which case a forward call is the base layer's; `disabled`, whether the adapters are switched off.
    """

    base_layer: nn.Module
    adapters: Mapping[str, layers.Adapter]
    active: tuple[str, ...]
    merged: bool
    disabled: bool

    def merged_weight(self, dtype: torch.dtype | None = None) -> Tensor:
        """The base weight with the active adapters in it, ``diag(s) W R^T`` (see `layers.merged_weight`).

        Args:
            dtype: of the result and of the weight it is computed from; None for the base weight's, which gives the
                same bits as merging the layer.

        Returns: a new tensor of the base weight's shape, without gradient.
        """
        with torch.inference_mode(False), torch.no_grad():
            weight = self.base_layer.weight.to(dtype or self.base_layer.weight.dtype)
            adapters = [self.adapters[name] for name in self.active]
            if is_conv1d(self.base_layer):
                return layers.merged_weight(weight.T, adapters, reuse=False).T
            return layers.merged_weight(weight, adapters, getattr(self.base_layer, "groups", 1), reuse=False)


def from_peft(module: str, name: str) -> Any:
    """Class `name` of PEFT's `module` for `isinstance`; where PEFT is not loaded, one without instances."""
    return getattr(sys.modules.get(f"peft.{module}"), name, ())


def base_model(model: nn.Module) -> nn.Module:
    """The model that holds the layers under its own names, without PEFT's and `torch.compile`'s shells."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, from_peft("peft_model", "PeftModel")):
        model = model.get_base_model()
    elif isinstance(model, from_peft("tuners.tuners_utils", "BaseTuner")):
        model = model.model
    return getattr(model, "_orig_mod", model)


def adapted_layer(module: nn.Module) -> AdaptedLayer | None:
    """`module` as a layer with adapters, or None if it is none."""
    if isinstance(module, (BOFTLinear, BOFTConv2d)):
        return AdaptedLayer(module.base_layer, {SINGLE: module.adapter_to_merge()}, (SINGLE,), module.merged, False)
    if not isinstance(module, from_peft("tuners.boft.layer", "BOFTLayer")):
        return None
    adapters = {name: peft_strength.adapter(module, name) for name in module.boft_R}
    active = tuple(name for name in module.active_adapters if name in adapters)
    return AdaptedLayer(
        module.get_base_layer(), adapters, active, bool(module.merged_adapters), module.disable_adapters
    )


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """All layers of `model` with adapters, each once, by their names in the base model, in its order."""
    found = {name: adapted_layer(module) for name, module in modules_by_name(base_model(model)).items()}
    return {name: layer for name, layer in found.items() if layer is not None}


def configurations(model: nn.Module) -> dict[str, Any]:
    """The configurations of the adapters by name, of this package or of PEFT; empty where the model has none."""
    root = base_model(model)
    if getattr(root, "boft_config", None) is not None:
        return {SINGLE: root.boft_config}
    for owner in (getattr(model, "_orig_mod", model), root):
        configs = getattr(owner, "peft_config", None)
        if isinstance(configs, Mapping):
            return dict(configs)
    return {}
