"""Layers that carry one BOFT adapter: a frozen linear layer or convolution, a rotation and a scale.

Formulas: Liu et al., ICLR 2024, equations 4 and 5; parameter shapes and initial values are those of PEFT's BOFT layers
(`peft.tuners.boft.layer`), so tensors can be copied one to one.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from . import functional, layers
from .config import BOFTConfig, as_config, resolve_shape
from .reference import accumulate_dtype


def resolve_convolution(base_layer: nn.Module, config: Any) -> tuple[int, int, int]:
    """``(b, D, m)`` for a convolution of any dimension. ValueError, naming the numbers, if they do not fit."""
    channels = base_layer.in_channels * math.prod(base_layer.kernel_size)
    b, blocks, m = resolve_shape(channels, config)
    group = b * 2 ** (m - 1)
    if channels // base_layer.groups % group != 0:
        raise ValueError(
            f"{channels} unfolded channels in groups = {base_layer.groups} of {channels // base_layer.groups}: "
            f"each must be divisible by b 2^(m-1) = {group} (b = {b}, m = {m})"
        )
    return b, blocks, m


class _BOFTLayer(nn.Module):
    """What both layers share: the parameters, dropout, merging.

    Not thread-safe while it is merged, unmerged or trained; forward calls without gradients may run concurrently
    (of a convolution: if its base layer has no hooks).
    """

    boft_R: nn.Parameter
    boft_s: nn.Parameter

    def __init__(
        self, base_layer: nn.Module, config: BOFTConfig, shape: tuple[int, int, int], scale_shape: tuple[int, int]
    ):
        super().__init__()
        b, blocks, m = shape
        weight = base_layer.weight
        # Drawn on the CPU like PEFT's, so that one seed gives one adapter on any device.
        boft_R = torch.zeros(m, blocks, b, b, dtype=torch.float32, device="cpu")
        boft_s = torch.ones(scale_shape, dtype=torch.float32, device="cpu")
        if not config.init_weights:
            nn.init.normal_(boft_R, mean=0.0, std=0.1)
            nn.init.normal_(boft_s, mean=1.0, std=0.1)
        dtype = accumulate_dtype(weight.dtype)
        trains = not config.inference_mode
        self.base_layer = base_layer
        self.boft_R = nn.Parameter(boft_R.to(weight.device, dtype), requires_grad=trains)
        self.boft_s = nn.Parameter(boft_s.to(weight.device, dtype), requires_grad=trains)
        self.boft_dropout = float(config.boft_dropout)
        self._merged = False
        self._original: Tensor | None = None
        self.train(base_layer.training)

    def _freeze_base(self, config: Any) -> None:
        """Leave of the base layer only the bias trainable, if the configuration says so."""
        config = as_config(config)
        self.base_layer.requires_grad_(False)
        if config.bias != "none" and not config.inference_mode and self.bias is not None:
            self.bias.requires_grad_(True)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and copy: the unmerged original stays behind, since it is only a cache of this object."""
        return {**self.__dict__, "_original": None}

    @property
    def merged(self) -> bool:
        """Whether the base weight holds the rotation and the scale now."""
        return self._merged

    @property
    def weight(self) -> Tensor:
        """The base layer's weight: without the adapter, or with it while merged."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias

    @property
    def out_features(self) -> int:
        """Output features, or output channels of a convolution."""
        return self.boft_s.numel()

    @property
    def _groups(self) -> int:
        return 1

    def adapter_to_merge(self) -> layers.Adapter:
        """The adapter as a merge applies it: all of it, without dropout."""
        return layers.Adapter(self.boft_R, self.boft_s)

    def _adapter(self) -> layers.Adapter:
        boft_R, keep = layers.parameter_of(self, "boft_R"), None
        if self.training and self.boft_dropout > 0:
            m, blocks, _, _ = boft_R.shape
            keep = functional.dropout_keep(m, blocks, self.boft_dropout, boft_R.device)
        return layers.Adapter(boft_R, layers.parameter_of(self, "boft_s"), keep)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False) -> None:
        """Write ``diag(s) W R^T`` into the base weight, in place; the layer then runs as fast as the plain one.

        A 16-bit original is kept until `unmerge`, which then restores it bit for bit. It is never part of
        state_dict, copies or pickles. The adapter should not change while merged.

        Args:
            safe_merge: refuse a merged weight that is not finite.

        Raises: ValueError for such a weight, for a zero in `boft_s` that `unmerge` could not undo, and for a weight
            that is not stored as floating-point numbers of the layer's shape. The layer is then as it was.
        """
        if self._merged:
            warnings.warn("the adapter is merged already, nothing to do", stacklevel=3)
            return
        weight = self._plain_weight()
        keep = weight.dtype.itemsize < torch.float32.itemsize
        if not keep and bool((self.boft_s == 0).any()):
            zero = int((self.boft_s.flatten() == 0).nonzero()[0])
            raise ValueError(f"boft_s is 0 for output {zero}: this merge could not be undone")
        merged = layers.merged_weight(weight, [self.adapter_to_merge()], self._groups, reuse=False)
        if safe_merge and not bool(torch.isfinite(merged).all()):
            raise ValueError(f"the merged weight of {self} holds NaN or infinity, the layer stays unmerged")
        self._original = weight.detach().clone() if keep else None
        weight.copy_(merged)
        self._merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge` in place: from the kept original, or by rotating and scaling back.

        Raises: ValueError if `boft_s` holds a zero and no original was kept. The layer is then as it was.
        """
        if not self._merged:
            warnings.warn("the adapter is not merged, nothing to do", stacklevel=3)
            return
        original = self._original
        if original is None:
            original = functional.unrotate_weight(self.weight, self.boft_R, self.boft_s, groups=self._groups)
        self.weight.copy_(original)
        self._original = None
        self._merged = False

    def _plain_weight(self) -> Tensor:
        weight = self.weight
        columns = self.boft_R.shape[1] * self.boft_R.shape[2] // self._groups
        if weight.is_meta or not weight.is_floating_point() or weight.numel() != self.out_features * columns:
            raise ValueError(
                f"cannot merge into a weight of dtype {weight.dtype}, shape {tuple(weight.shape)} and device "
                f"{weight.device}: expected floating-point values for {self.out_features} outputs, {columns} inputs"
            )
        return weight

    def extra_repr(self) -> str:
        m, blocks, b, _ = self.boft_R.shape
        merged = ", merged" if self._merged else ""
        dropout = f", boft_dropout={self.boft_dropout}" if self.boft_dropout else ""
        return f"block_size={b}, block_num={blocks}, n_butterfly_factor={m}{dropout}{merged}"


class BOFTLinear(_BOFTLayer):
    """A linear layer with an adapter: ``base_layer(x R)``, each output scaled around its bias.

    Parameters: `boft_R` ``(m, D, b, b)``, zeros (no rotation), and `boft_s` ``(out, 1)``, ones; float32, or float64
    for a float64 layer, on the device of its weight.
    """

    def __init__(self, base_layer: nn.Linear, config: Any):
        config = as_config(config)
        super().__init__(base_layer, config, self.resolve(base_layer, config), (base_layer.out_features, 1))

    @staticmethod
    def resolve(base_layer: nn.Module, config: Any) -> tuple[int, int, int]:
        """``(b, D, m)`` for `base_layer`. TypeError for another kind of layer, ValueError if they do not fit."""
        if not isinstance(base_layer, nn.Linear):
            raise TypeError(f"expected a torch.nn.Linear, got {type(base_layer).__name__}")
        return resolve_shape(base_layer.in_features, config)

    @classmethod
    def from_linear(cls, linear: nn.Linear, config: Any) -> BOFTLinear:
        """Adapt `linear`, which becomes `base_layer` itself (no copy) and is frozen.

        Args:
            linear: any `torch.nn.Linear` or subclass; quantised ones work unmerged.
            config: `BOFTConfig` of this package or of PEFT. Its bias "all" or "boft_only" leaves the bias trainable.

        Raises: TypeError for another kind of layer or configuration; ValueError where b and m do not fit
            `in_features`, naming the numbers. `linear` is then unchanged.
        """
        layer = cls(linear, config)
        layer._freeze_base(config)
        return layer

    @property
    def in_features(self) -> int:
        return self.base_layer.in_features

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``(..., in)`` -> ``(..., out)`` of the base layer's dtype; extra arguments go to the base layer."""
        if self._merged:
            return self.base_layer(x, *args, **kwargs)
        return layers.linear_forward(self._modules["base_layer"], x, [self._adapter()], *args, **kwargs)


class BOFTConv2d(_BOFTLayer):
    """A 2-d convolution with an adapter: its weight, flattened to ``(out, in kh kw / groups)``, rotated and scaled.

    Any kernel, stride, padding, dilation, padding mode and groups. Parameters: `boft_R` ``(m, D, b, b)`` over all
    ``in kh kw`` unfolded channels, zeros, and `boft_s` ``(1, out)``, ones; dtype and device as in `BOFTLinear`.
    """

    def __init__(self, base_layer: nn.Conv2d, config: Any):
        config = as_config(config)
        super().__init__(base_layer, config, self.resolve(base_layer, config), (1, base_layer.out_channels))

    @staticmethod
    def resolve(base_layer: nn.Module, config: Any) -> tuple[int, int, int]:
        """``(b, D, m)`` for `base_layer`. TypeError for another kind of layer, ValueError if they do not fit."""
        if not isinstance(base_layer, nn.Conv2d):
            raise TypeError(f"expected a torch.nn.Conv2d, got {type(base_layer).__name__}")
        return resolve_convolution(base_layer, config)

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, config: Any) -> BOFTConv2d:
        """Adapt `conv`, which becomes `base_layer` itself (no copy) and is frozen.

        Args:
            conv: any `torch.nn.Conv2d` or subclass. config: as in `BOFTLinear.from_linear`.

        Raises: TypeError for another kind of layer or configuration; ValueError where b and m do not fit
            ``in kh kw`` or the part of one group, naming the numbers. `conv` is then unchanged.
        """
        layer = cls(conv, config)
        layer._freeze_base(config)
        return layer

    @property
    def in_features(self) -> int:
        return self.base_layer.in_channels

    @property
    def _groups(self) -> int:
        return self.base_layer.groups

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``(N, in, h, w)`` or ``(in, h, w)`` -> what the base layer returns for its rotated and scaled weight."""
        if self._merged:
            return self.base_layer(x, *args, **kwargs)
        return layers.conv_forward(self.base_layer, x, [self._adapter()], *args, **kwargs)
