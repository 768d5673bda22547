"""The kinds of layers, beside PEFT's own `Linear` and `Conv2d`, that BOFT adapts while `patch_peft` is in force.

All follow the rule of the merged weight ``W' = diag(s) W R^T`` (Liu et al., ICLR 2024, equations 4 and 5) with W laid
out as ``(out, in)``:

* transformers' `Conv1D` (GPT-2) is a linear layer that stores W transposed. PEFT's `Linear` takes it; the class of the
  base layer decides about the layout, not `fan_in_fan_out`.
* `nn.Conv1d` and `nn.Conv3d` are rotated like `nn.Conv2d`: W flattened to ``(out, in / groups * kernel elements)``.
* `nn.Embedding` is rotated on the side of its vectors: W is its weight as stored, ``(num_embeddings, embedding_dim)``,
  so R acts on the `embedding_dim` channels and s holds one number per embedding. The other reading, a linear layer of
  one-hot rows, would mix unrelated tokens and rotate as many channels as the vocabulary has entries. This one keeps
  every angle between two embeddings, and the same adapter tensors on an output layer that shares the weight mean the
  same. PEFT's OFT rotates the looked-up vectors too.

The classes derive from PEFT's, whose methods `patch_peft` replaces; they need the patch as those do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.boft.layer import BOFTLayer, Conv2d, Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import functional, layers, peft_mixed
from .peft_creation import NEEDS_PATCH
from .peft_layers import leave_the_weight_if_disabled, row_names, to_apply
from .reference import accumulate_dtype


class _NeedsPatchToGrow:
    """PEFT's own `update_layer` would give these layers parameters of the wrong shape."""

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """See `peft_creation.update_layer`. Raises: RuntimeError naming `patch_peft` while PEFT is not patched."""
        bool(NEEDS_PATCH)
        super().update_layer(*args, **kwargs)


class Conv1d(_NeedsPatchToGrow, Conv2d):
    """BOFT on an `nn.Conv1d`: ``(N, in, length)`` or ``(in, length)`` as input, parameters as in `Conv2d`."""


class Conv3d(_NeedsPatchToGrow, Conv2d):
    """BOFT on an `nn.Conv3d`: ``(N, in, d, h, w)`` or ``(in, d, h, w)`` as input, parameters as in `Conv2d`."""


class Embedding(_NeedsPatchToGrow, Linear):
    """BOFT on an `nn.Embedding`: ``boft_R`` over `embedding_dim` channels, ``boft_s`` ``(num_embeddings, 1)``.

    `in_features` and `out_features` are the number and the length of the vectors, as in PEFT's other embedding layers.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The vectors that the base layer looks up for the indices `x`, rotated by ``R^T`` and scaled by ``s[x]``.

        Args:
            x: integer indices of any shape. args, kwargs: passed on to the base layer, whose weight is never touched;
                `adapter_names` gives each row of `x` an adapter of its own (see `peft_mixed`).

        Returns: ``(*x.shape, embedding_dim)`` in the dtype that the base layer returns, under autocast too.
        """
        bool(NEEDS_PATCH)

        def look_up(adapters: list[layers.Adapter], indices: Tensor) -> Tensor:
            vectors = self.base_layer(indices, *args, **kwargs)
            return _rotate_vectors(vectors, indices, adapters) if adapters else vectors

        if "adapter_names" in kwargs and (names := row_names(self, kwargs)) is not None:
            return peft_mixed.by_adapter(self, x, names, 1, look_up)
        adapters = to_apply(self)
        if not adapters:
            leave_the_weight_if_disabled(self)
        return look_up(adapters, x)


def _rotate_vectors(vectors: Tensor, indices: Tensor, adapters: list[layers.Adapter]) -> Tensor:
    """Rows of ``diag(s) W R^T`` from the rows `vectors` of W, rounded once."""
    with torch.autocast(vectors.device.type, enabled=False):
        out = vectors.to(accumulate_dtype(vectors.dtype))
        for adapter in adapters:
            out = functional.rotate(out, adapter.boft_R, keep=adapter.keep, transpose=True)
            out = out * nn.functional.embedding(indices, adapter.boft_s).to(out.dtype)
        return out.to(vectors.dtype)


_CLASSES: dict[type[nn.Module], type[BOFTLayer]] = {
    Conv1D: Linear,
    nn.Conv1d: Conv1d,
    nn.Conv3d: Conv3d,
    nn.Embedding: Embedding,
}


def creating(create: Callable[..., BOFTLayer]) -> Callable[..., BOFTLayer]:
    """`BOFTModel._create_new_module` that also knows the layers of this file; `create` is PEFT's, for all others."""

    def create_new_module(boft_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> BOFTLayer:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        for base_class, layer_class in _CLASSES.items():
            if isinstance(base, base_class):
                return layer_class(target, adapter_name, config=boft_config, **kwargs)
        return create(boft_config, adapter_name, target, **kwargs)

    return create_new_module


def init_convolution(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
    """`Conv2d.__init__`, keeping the arguments by which PEFT recognises a quantised base layer."""
    nn.Module.__init__(self)
    BOFTLayer.__init__(self, base_layer, **kwargs)
    self._active_adapter = adapter_name
    self.update_layer(adapter_name, config=config)


def effective_weight(self) -> Tensor:
    """``layer.weight``: the base layer's, but with the adapters in it where the module around the layer reads it.

    `nn.MultiheadAttention` never calls its `out_proj`, and in evaluation `nn.TransformerEncoderLayer` gives the weights
    of its linear layers to one fused kernel. Such a weight is differentiable in the adapters and computed at each
    access.
    """
    weight = super(BOFTLayer, self).weight
    if not self.boft_ext_weight_is_read:
        return weight
    adapters = to_apply(self)
    if not adapters:
        leave_the_weight_if_disabled(self)
        return super(BOFTLayer, self).weight
    return layers.merged_weight(weight, adapters)
