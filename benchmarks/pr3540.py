"""The algorithm of pull request 3540 of Hugging Face PEFT, written anew to measure against.

Layers have PEFT's parameters: ``boft_R`` ``(m, D, b, b)`` and ``boft_s``, ``(out, 1)`` or, for a convolution,
``(1, out)``. The Cayley transform is a batched solve in the dtype of `boft_R`. Activations (of a convolution: the
weight) are rotated factor by factor in their own dtype: gather channels by an index table, multiply the D blocks by an
einsum, gather back. A merge multiplies dense ``(d, d)`` matrices. Scaling is PEFT's: minus bias, times s, plus bias.

Not for use beyond comparison: no dropout, one adapter, b below 150 (torch 2.13's batched solve fails above on the CPU).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from boft_ext.reference import accumulate_dtype, group_view


def index_tables(d: int, b: int, m: int) -> tuple[Tensor, Tensor]:
    """Which channel each position of the blocks takes, and back: two int64 tables ``(m, d)``, inverse to each other."""
    channels = torch.arange(d).unsqueeze(0)
    tables = torch.stack([group_view(channels, (i, 1), b).flatten() for i in range(m)])
    return tables, tables.argsort(dim=1)


class _Layer(nn.Module):
    """A frozen layer with one adapter over `d` channels of its weight, flattened to ``(out, d)``. Not thread-safe."""

    def __init__(self, base_layer: nn.Module, d: int, scale_shape: tuple[int, int], b: int, m: int) -> None:
        super().__init__()
        weight = base_layer.weight
        options = {"dtype": accumulate_dtype(weight.dtype), "device": weight.device}
        self.base_layer = base_layer.requires_grad_(False)
        self.merged = False
        self.boft_R = nn.Parameter(torch.zeros(m, d // b, b, b, **options))
        self.boft_s = nn.Parameter(torch.ones(scale_shape, **options))
        gather, put_back = index_tables(d, b, m)
        self.register_buffer("gather", gather.to(weight.device), persistent=False)
        self.register_buffer("put_back", put_back.to(weight.device), persistent=False)

    def _blocks(self) -> Tensor:
        """The orthogonal blocks ``(m, D, b, b)``."""
        m, count, b, _ = self.boft_R.shape
        flat = self.boft_R.reshape(m * count, b, b)
        skew = 0.5 * (flat - flat.mT)
        eye = torch.eye(b, dtype=flat.dtype, device=flat.device)
        return torch.linalg.solve(eye + skew, eye - skew, left=False).reshape(m, count, b, b)

    def _dense(self) -> Tensor:
        """R as a ``(d, d)`` matrix."""
        product = None
        for blocks, order in zip(self._blocks(), self.put_back, strict=True):
            factor = torch.block_diag(*blocks)[order][:, order]
            product = factor if product is None else factor @ product
        return product

    @torch.no_grad()
    def merge(self) -> None:
        """Write ``diag(s) W R^T`` into the weight. Forward calls are wrong until `unmerge`."""
        self._rewrite(self._dense(), self.boft_s)
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        """Undo `merge`, up to rounding."""
        self._rewrite(self._dense().T, 1 / self.boft_s)
        self.merged = False

    def _rewrite(self, rotation: Tensor, scale: Tensor) -> None:
        """``diag(scale) W rotation^T`` in place of W."""
        weight = self.base_layer.weight
        columns = rotation @ weight.flatten(1).T.to(rotation.dtype)
        weight.copy_((columns.T * scale.reshape(-1, 1)).reshape(weight.shape))


class GatherLinear(_Layer):
    """``(..., in)`` -> ``(..., out)`` of the dtype of the input."""

    def __init__(self, base_layer: nn.Linear, b: int, m: int) -> None:
        super().__init__(base_layer, base_layer.in_features, (base_layer.out_features, 1), b, m)

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        m, count, b, _ = self.boft_R.shape
        blocks = self._blocks().to(dtype)
        for i in reversed(range(m)):
            grouped = x[..., self.gather[i]].unflatten(-1, (count, b))
            x = torch.einsum("...nb,nbc->...nc", grouped, blocks[i]).flatten(-2)[..., self.put_back[i]]
        out, bias = self.base_layer(x), self.base_layer.bias
        if bias is not None:
            out = out - bias
        out = out * self.boft_s.squeeze(-1)
        if bias is not None:
            out = out + bias
        return out.to(dtype)


class GatherConv2d(_Layer):
    """``(N, in, h, w)`` -> what the ungrouped convolution returns for its rotated and scaled weight."""

    def __init__(self, base_layer: nn.Conv2d, b: int, m: int) -> None:
        d = base_layer.weight[0].numel()
        super().__init__(base_layer, d, (1, base_layer.out_channels), b, m)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.base_layer.weight
        m, count, b, _ = self.boft_R.shape
        blocks = self._blocks().to(weight.dtype)
        columns = weight.flatten(1).T
        for i in range(m):
            grouped = columns[self.gather[i]].unflatten(0, (count, b))
            columns = torch.einsum("nbc,nco->nbo", blocks[i], grouped).flatten(0, 1)[self.put_back[i]]
        rotated = (columns * self.boft_s).T.to(weight.dtype).reshape(weight.shape)
        return self.base_layer._conv_forward(x, rotated, self.base_layer.bias)


def adapt(model: nn.Module, targets: Sequence[str], b: int, m: int) -> nn.Module:
    """Replace the linear layers and convolutions whose names are or end in one of `targets`, in place; freeze the rest.

    Returns `model`. Its channels must fit b and m as in `boft_ext.functional.rotate`.
    """
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if not any(f".{name}".endswith(f".{target}") for target in targets):
            continue
        layer = (GatherConv2d if isinstance(module, nn.Conv2d) else GatherLinear)(module, b, m)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    return model
