"""What a layer with BOFT adapters computes, shared by this package's modules and by the PEFT swap.

An adapter is ``(boft_R, boft_s, keep)``. Several adapters compose as ``R = R_k ... R_1``: the input meets the last one
first, and their scales multiply (PEFT `Linear.forward`, `Conv2d.forward`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _C, functional
from .saved import saved_activations


class Adapter(NamedTuple):
    """One adapter of one layer: ``(m, D, b, b)`` parameter, scale of out values, optional ``(m, D)`` dropout mask."""

    boft_R: Tensor
    boft_s: Tensor
    keep: Tensor | None = None


def parameter_of(module: nn.Module, name: str) -> Tensor:
    """The attribute `name` of `module`, without the calls in Python that finding a parameter takes (1 us on a Zen 3
    core, as much as a row of 768 channels) unless something stands in for it."""
    parameters = module._parameters
    return parameters[name] if name in parameters and name not in module.__dict__ else getattr(module, name)


def _scales(adapters: Sequence[Adapter]) -> Tensor:
    product = adapters[0].boft_s
    for adapter in adapters[1:]:
        product = product * adapter.boft_s
    return product


def bias_of(base_layer: nn.Module, like: Tensor) -> Tensor | None:
    """The bias of a linear layer, also where hooks bring it in only while the layer runs."""
    bias = getattr(base_layer, "bias", None)
    if bias is not None and (bias.is_meta or bias.numel() == 0):
        with torch.no_grad():
            bias = base_layer(like.new_zeros(like.shape[-1]))
    return bias


def _adds_its_bias_only(base_layer: nn.Module) -> bool:
    """Whether calling `base_layer` is nothing but ``x W^T + bias``."""
    return type(base_layer) is nn.Linear and not _has_hooks(base_layer)


def _linear_at_once(base_layer: nn.Module, x: Tensor, adapter: Adapter) -> Tensor | None:
    """`linear_forward` as one call of the compiled module; None where that would leave something out.

    Without gradients, a token at a time through 42 layers of 768 channels, this saves 8 us a layer (two Zen 4 cores).
    """
    if torch.compiler.is_compiling() or not _adds_its_bias_only(base_layer):
        return None
    parameters = base_layer._parameters
    weight = parameters.get("weight")
    if weight is None:
        return None
    boft_R, boft_s, keep = adapter
    if torch.is_grad_enabled():
        mode = saved_activations()
        if mode == "compact":
            return None
        return _C.linear_train(x, weight, parameters["bias"], boft_R, boft_s, keep, mode == "recompute")
    return None if keep is not None else _C.linear_now(x, weight, parameters["bias"], boft_R, boft_s)


def linear_forward(base_layer: nn.Module, x: Tensor, adapters: Sequence[Adapter], *args: Any, **kwargs: Any) -> Tensor:
    """``base_layer(x R)`` scaled per output (design: z = base_layer(x R), out = z s + bias (1 - s)).

    Args:
        base_layer: any module that maps ``(..., in)`` to ``(..., out)``; only called, its weight is never touched.
        x: ``(..., in)``. adapters: at least one. args, kwargs: passed on to `base_layer`.

    Returns: ``(..., out)`` of the dtype that `base_layer` returns.
    """
    if len(adapters) == 1 and not args and not kwargs:
        out = _linear_at_once(base_layer, x, adapters[0])
        if out is not None:
            return out
    for adapter in reversed(adapters):
        x = functional.rotate(x, adapter.boft_R, keep=adapter.keep)
    bias = bias_of(base_layer, x)
    if bias is not None and bias.requires_grad and _adds_its_bias_only(base_layer):
        # The gradient of a training bias is then one sum, rounded once, instead of two parts of it, one through z.
        z = nn.functional.linear(x, base_layer.weight, bias.detach())
        return functional.scale(z, _scales(adapters), bias, bias_detached=True)
    z = base_layer(x, *args, **kwargs)
    return functional.scale(z, _scales(adapters), bias)


def merged_weight(weight: Tensor, adapters: Sequence[Adapter], groups: int = 1, reuse: bool = True) -> Tensor:
    """``diag(s) W R^T`` for all adapters, first to last, in the dtype of `weight`, differentiable in the adapters.

    `weight` is ``(out, in)`` or ``(out, in / groups, *kernel)``; it is not changed. `reuse`: see
    `functional.rotate_weight`; a merge, unlike a forward, has no next call.
    """
    for adapter in adapters:
        weight = functional.rotate_weight(
            weight, adapter.boft_R, adapter.boft_s, groups=groups, keep=adapter.keep, reuse=reuse
        )
    return weight


def _has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
        or nn.modules.module._has_any_global_hook()
    )


@contextlib.contextmanager
def _shadowed(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """``module.name`` is `value` for a while. An instance attribute is found before parameters and methods."""
    attributes = module.__dict__
    own = {name: attributes[name]} if name in attributes else {}
    attributes[name] = value
    try:
        yield
    finally:
        del attributes[name]
        attributes.update(own)


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def conv_forward(
    base_layer: nn.Module,
    x: Tensor,
    adapters: Sequence[Adapter],
    *args: Any,
    weight: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """A convolution with the merged weight, through the base layer itself so that its options and hooks apply.

    Safe under threads unless the base layer has hooks or a forward of its own.

    Args:
        base_layer: an `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d` (any stride, padding, dilation, padding mode and groups).
        x: ``(N, in, *sizes)`` or ``(in, *sizes)``. adapters: at least one.
        weight: to rotate instead of ``base_layer.weight``, which is then not touched.

    Returns: what `base_layer` returns for its weight replaced by `merged_weight`.
    """

    def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return type(base_layer)._conv_forward(base_layer, x, merged_weight(weight, adapters, base_layer.groups), bias)

    if weight is not None or not any(type(base_layer).forward is kind.forward for kind in _CONVOLUTIONS):
        # Not functional_call, whose replacement FSDP's own shadow of the weight hides.
        weight = base_layer.weight if weight is None else weight
        with _shadowed(base_layer, "weight", merged_weight(weight, adapters, base_layer.groups)):
            return base_layer(x, *args, **kwargs)
    if _has_hooks(base_layer):
        # Hooks may bring in the weight only now, so it is rotated inside.
        with _shadowed(base_layer, "_conv_forward", convolve):
            return base_layer(x, *args, **kwargs)
    return convolve(x, base_layer.weight, base_layer.bias)
