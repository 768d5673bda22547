"""How the base weight of a PEFT layer is read and written, and what the modules around a layer do with it.

`self` and `layer` are ``peft.tuners.boft.layer.Linear`` or ``Conv2d`` or derived from them. Nothing here is thread-safe
with respect to its model.
"""

from __future__ import annotations

from collections import Counter

from peft.tuners.boft.layer import BOFTLayer
from torch import Tensor, nn

from .targets import is_conv1d

# Modules that in evaluation hand the weights of their linear layers to a fused kernel, or never call those layers.
_READERS = (nn.TransformerEncoderLayer, nn.MultiheadAttention)


def read(layer: BOFTLayer) -> Tensor:
    """The base weight, dequantised where PEFT can, as ``(out, in)`` or ``(out, in / groups, *kernel)``; may be a view.

    Raises: whatever PEFT raises for a quantised weight that cannot be read.
    """
    weight = layer.get_base_weight()
    return weight.T if is_conv1d(layer.get_base_layer()) else weight


def write(layer: BOFTLayer, weight: Tensor) -> None:
    """Make `weight`, laid out as `read` returns it, the base weight, quantised again where it was.

    The Parameter object stays, so every module that holds it sees the new values.
    """
    layer.set_base_weight(weight.T.contiguous() if is_conv1d(layer.get_base_layer()) else weight)


def mark(model: nn.Module) -> None:
    """Note on every BOFT layer of `model` what only the modules around it show: see `shared` and `effective`."""
    modules = list(model.modules())
    held = Counter(id(p) for module in modules for p in module._parameters.values() if p is not None)
    read_by_parent = {child for module in modules if isinstance(module, _READERS) for child in module.children()}
    for module in modules:
        if isinstance(module, BOFTLayer):
            weight = module.get_base_layer()._parameters.get("weight")
            module.boft_ext_weight_is_shared = weight is not None and held[id(weight)] > 1
            module.boft_ext_weight_is_read = module in read_by_parent


def shared(layer: BOFTLayer) -> nn.Parameter | None:
    """The weight Parameter of the base layer if other modules held it too when adapters were last added, or None."""
    if layer.boft_ext_weight_is_shared and layer.quantization_backend is None:
        return layer.get_base_layer().weight
    return None


def part_from(layer: BOFTLayer, parameter: nn.Parameter) -> None:
    """Give the base layer a Parameter of its own, so that a merge leaves `parameter` to the modules that share it."""
    layer.get_base_layer().weight = nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)


def rejoin(layer: BOFTLayer, parameter: nn.Parameter) -> None:
    """Undo `part_from`."""
    layer.get_base_layer().weight = parameter
