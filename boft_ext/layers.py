"""What a layer with BOFT adapters computes, shared by this package's modules and by the PEFT swap.

An adapter is ``(boft_R, boft_s, keep)``. Several adapters compose as ``R = R_k ... R_1``: the input meets the last one
first, and their scales multiply (PEFT `Linear.forward`, `Conv2d.forward`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import functional


class Adapter(NamedTuple):
    """One adapter of one layer: ``(m, D, b, b)`` parameter, scale of out values, optional ``(m, D)`` dropout mask."""

    boft_R: Tensor
    boft_s: Tensor
    keep: Tensor | None = None


def _scales(adapters: Sequence[Adapter]) -> Tensor:
    product = adapters[0].boft_s
    for adapter in adapters[1:]:
        product = product * adapter.boft_s
    return product


def _bias(base_layer: nn.Module, like: Tensor) -> Tensor | None:
    """The bias of a linear layer, also where hooks bring it in only while the layer runs."""
    bias = getattr(base_layer, "bias", None)
    if bias is not None and (bias.is_meta or bias.numel() == 0):
        with torch.no_grad():
            bias = base_layer(like.new_zeros(like.shape[-1]))
    return bias


def linear_forward(base_layer: nn.Module, x: Tensor, adapters: Sequence[Adapter], *args: Any, **kwargs: Any) -> Tensor:
    """``base_layer(x R)`` scaled per output (design: z = base_layer(x R), out = z s + bias (1 - s)).

    Args:
        base_layer: any module that maps ``(..., in)`` to ``(..., out)``; only called, its weight is never touched.
        x: ``(..., in)``. adapters: at least one. args, kwargs: passed on to `base_layer`.

    Returns: ``(..., out)`` of the dtype that `base_layer` returns.
    """
    for adapter in reversed(adapters):
        x = functional.rotate(x, adapter.boft_R, keep=adapter.keep)
    z = base_layer(x, *args, **kwargs)
    return functional.scale(z, _scales(adapters), _bias(base_layer, x))


def merged_weight(weight: Tensor, adapters: Sequence[Adapter], groups: int = 1) -> Tensor:
    """``diag(s) W R^T`` for all adapters, first to last, in the dtype of `weight`, differentiable in the adapters.

    `weight` is ``(out, in)`` or ``(out, in / groups, kh, kw)``; it is not changed.
    """
    for adapter in adapters:
        weight = functional.rotate_weight(weight, adapter.boft_R, adapter.boft_s, groups=groups, keep=adapter.keep)
    return weight


def conv_forward(base_layer: nn.Module, x: Tensor, adapters: Sequence[Adapter], *args: Any, **kwargs: Any) -> Tensor:
    """A convolution with the merged weight, through the base layer itself so that its options and hooks apply.

    Args:
        base_layer: an `nn.Conv2d` (any stride, padding, dilation, padding mode and groups).
        x: ``(N, in, h, w)`` or ``(in, h, w)``. adapters: at least one.

    Returns: what `base_layer` returns for its weight replaced by `merged_weight`.
    """
    weight = merged_weight(base_layer.weight, adapters, base_layer.groups)
    return torch.func.functional_call(base_layer, {"weight": weight}, (x, *args), kwargs)
