"""BOFT layers of models whose weights accelerate keeps elsewhere, on the CPU or on disk.

The model's own tensors are then on the meta device, and hooks bring in the values of a module while it runs. A layer's
adapters are containers that never run, so the layer asks their hooks itself.

Hooks are read as accelerate 1.x sets them: ``module._hf_hook`` with ``offload``, ``execution_device`` and
``weights_map``, or several of them in ``module._hf_hook.hooks``. accelerate itself is not imported.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.boft import BOFTModel
from peft.tuners.boft.layer import BOFTLayer
from torch import Tensor, nn


def _offloading_hook(module: nn.Module) -> Any:
    hook = getattr(module, "_hf_hook", None)
    return next((h for h in getattr(hook, "hooks", (hook,)) if getattr(h, "offload", False)), None)


def execution_device(base_layer: nn.Module) -> torch.device | str | int | None:
    """Where `base_layer` runs if its weights are kept elsewhere, otherwise None."""
    hook = _offloading_hook(base_layer)
    return None if hook is None else hook.execution_device


def fetch(container: nn.ParameterDict, name: str) -> Tensor:
    """The value of the parameter `name`, which is on the meta device, on the device where its layer runs.

    `container` is not changed. The result is read-only and has no gradient.
    Raises: RuntimeError if no hook has the value.
    """
    hook = _offloading_hook(container)
    if hook is None:
        raise RuntimeError(f"adapter {name!r} is on the meta device and has no values: load it before use")
    return _stored(hook.weights_map, name).detach().to(hook.execution_device)


def _stored(weights_map: Any, name: str) -> Tensor:
    try:
        return weights_map[name]
    except KeyError:
        # PeftModel.load_adapter lists adapters that go to disk as layer.ADAPTER.boft_R, made for LoRA's longer names.
        layer, _, kind = weights_map.prefix.rstrip(".").rpartition(".")
        return weights_map.dataset[f"{layer}.{name}.{kind}"]


def move_adapter(self, adapter_name: str, device: torch.device | None = None) -> None:
    """`BOFTLayer._move_adapter_to_device_of_base_layer`: the device where an offloaded base layer runs, not meta."""
    if device is None:
        device = execution_device(self.get_base_layer())
    super(BOFTLayer, self)._move_adapter_to_device_of_base_layer(adapter_name, device)


def replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
    """`BOFTModel._replace_module`, which would move new adapters of an offloaded layer to the meta device."""
    if isinstance(new_module, BOFTLayer) and execution_device(new_module.get_base_layer()) is not None:
        setattr(parent, child_name, new_module)
    else:
        super(BOFTModel, self)._replace_module(parent, child_name, new_module, child)
