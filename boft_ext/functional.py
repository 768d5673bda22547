"""The butterfly rotation, the scale and the merge as functions.

Every function is differentiable in its tensor arguments unless it says otherwise, never writes to them, allocates its
result and may be called from several threads. Bad shapes raise ValueError, bad dtypes TypeError, naming the values.

Shapes use the paper's names: ``d`` channels, block size ``b``, ``D = d / b`` blocks, ``m`` butterfly factors.
A rotation exists for ``m == 1`` (any b) or for even b with ``d`` divisible by ``b 2^(m-1)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _C
from . import ops  # noqa: F401  (registers torch.ops.boft)
from .blocks_cache import cached_blocks
from .reference import accumulate_dtype
from .saved import saved_activations

__all__ = [
    "blocks",
    "cayley",
    "dropout_keep",
    "dropout_keep_paper",
    "rotate",
    "rotate_weight",
    "rotation_matrix",
    "scale",
    "unrotate_weight",
]


def cayley(a: Tensor, keep: Tensor | None = None) -> Tensor:
    """Orthogonal matrices ``(I - S)(I + S)^-1`` with ``S = (A - A^T) / 2`` (paper section 3, PEFT `cayley_batch`).

    Args:
        a: ``(..., b, b)``, any floating dtype; 16-bit input is computed in float32.
        keep: optional ``(...)`` bool; where it is False the result is the identity and the gradient zero.

    Returns: ``(..., b, b)``; float32 for 16-bit input, otherwise the dtype of `a`.
    """
    if a.dim() < 2 or a.shape[-1] != a.shape[-2]:
        raise ValueError(f"cayley: expected (..., b, b), got {tuple(a.shape)}")
    b = a.shape[-1]
    if a.numel() == 0:
        return a.to(accumulate_dtype(a.dtype)).clone()
    flat = a.to(accumulate_dtype(a.dtype)).reshape(1, -1, b, b)
    flat_keep = None if keep is None else keep.expand(a.shape[:-2]).reshape(1, -1)
    return torch.ops.boft.blocks(flat, flat_keep)[0].view(a.shape)


def blocks(boft_R: Tensor, dtype: torch.dtype, keep: Tensor | None = None) -> Tensor:
    """The collapsed blocks that rotate data of `dtype`: Cayley, dropout and the product of the factors.

    Independent of the data: compute once and pass to `rotate` several times. With gradients off the result is reused
    for as long as the bytes of `boft_R` stay the same; treat it as read-only.

    Args:
        boft_R: ``(m, D, b, b)``, any floating dtype. dtype: of the data to rotate. keep: optional ``(m, D)`` bool.

    Returns: a vector for `rotate`, float64 when `dtype` is, otherwise float32.
    """
    _check_boft_R(boft_R)
    if keep is None and not (torch.is_grad_enabled() and boft_R.requires_grad) and not torch.compiler.is_compiling():
        return cached_blocks(boft_R, accumulate_dtype(dtype))
    return _fresh_blocks(boft_R, dtype, keep)


def _check_boft_R(boft_R: Tensor) -> None:
    if boft_R.dim() != 4 or boft_R.shape[-1] != boft_R.shape[-2]:
        raise ValueError(f"boft_R: expected (m, d / b, b, b), got {tuple(boft_R.shape)}")


def _fresh_blocks(boft_R: Tensor, dtype: torch.dtype, keep: Tensor | None) -> Tensor:
    """`blocks`, computed now and kept by the caller alone."""
    _check_boft_R(boft_R)
    return torch.ops.boft.blocks(boft_R.to(accumulate_dtype(dtype)), keep)[0]


def rotate(
    x: Tensor,
    boft_R: Tensor,
    *,
    keep: Tensor | None = None,
    transpose: bool = False,
) -> Tensor:
    """``x R``, the butterfly rotation of the last axis (paper equation 5; PEFT `Linear.forward`).

    16-bit data is computed in float32 and rounded once. Under autocast `x` is rotated in the autocast dtype.

    Args:
        x: ``(..., d)``, float32, float64, bfloat16 or float16; any strides, any number of rows including none.
        boft_R: ``(m, D, b, b)``, any floating dtype, unconstrained.
        keep: optional ``(m, D)`` bool; blocks where it is False are the identity and get no gradient.
        transpose: rotate by ``R^T``, the inverse, instead.

    Returns: a new tensor of the shape and dtype of `x` (under autocast: the autocast dtype).
    """
    if keep is None and not torch.compiler.is_compiling() and not torch.is_grad_enabled() and type(x) is Tensor:
        y = _C.rotate_now(x, boft_R, transpose)
        if y is not None:
            return y
    m, _, b, _ = boft_R.shape if boft_R.dim() == 4 else (0, 0, 0, 0)
    dtype = x.dtype
    return torch.ops.boft.rotate(x, blocks(boft_R, dtype, keep), b, m, transpose, saved_activations() != "exact")


def scale(z: Tensor, boft_s: Tensor, bias: Tensor | None = None, *, bias_detached: bool = False) -> Tensor:
    """``z s + bias (1 - s)``: the scale of a layer whose output `z` already holds its bias (PEFT `Linear.forward`).

    Args:
        z: ``(..., n)``. boft_s: n values of any shape, so PEFT's ``(n, 1)`` and ``(1, n)`` fit. bias: ``(n)`` or None.
        bias_detached: `z` holds the bias without its gradient, which is then all given here: the sum of dy.

    Returns: a new tensor of the shape and dtype of `z`. Saves `z` for backward only when `boft_s` needs a gradient.
    """
    if not torch.compiler.is_compiling() and not torch.is_grad_enabled() and type(z) is Tensor:
        out = _C.scale_now(z, boft_s, bias)
        if out is not None:
            return out
    return torch.ops.boft.scale(z, boft_s, bias, bias_detached, saved_activations() != "exact")


def _group_rows(weight: Tensor, groups: int) -> Tensor:
    """``(out, d / groups)`` -> ``(out / groups, d)``: row r of every group side by side."""
    out, columns = weight.shape
    return weight.view(groups, out // groups, columns).transpose(0, 1).reshape(out // groups, groups * columns)


def _rotate_rows(weight: Tensor, made: Tensor, b: int, m: int, groups: int, transpose: bool) -> Tensor:
    """Rotate the rows of a flattened weight ``(out, d / groups)`` by ``R^T`` (`transpose`) or ``R``, whose blocks are
    `made`."""

    def rotated(rows: Tensor) -> Tensor:
        return torch.ops.boft.rotate(rows, made, b, m, transpose, saved_activations() != "exact")

    out, columns = weight.shape
    if groups == 1:
        return rotated(weight)
    if columns % (b * 2 ** (m - 1)) != 0:
        raise ValueError(
            f"a group of {columns} unfolded channels (groups = {groups}) cannot be rotated by itself: it must be "
            f"divisible by b 2^(m-1) = {b * 2 ** (m - 1)} (b = {b}, m = {m})"
        )
    rows = rotated(_group_rows(weight, groups))
    return rows.view(out // groups, groups, columns).transpose(0, 1).reshape(out, columns)


def _scaled_rotation(
    weight: Tensor, made: Tensor, boft_R: Tensor, s: Tensor | None, groups: int, transpose: bool
) -> Tensor:
    """``diag(s) W R^T`` (`transpose`) or ``diag(s) W R`` with blocks `made` of `boft_R`, in the dtype of `weight`."""
    m, _, b, _ = boft_R.shape
    flat = weight.flatten(1)
    if groups == 1 and not torch.is_grad_enabled():
        return torch.ops.boft.merge(flat, made, b, m, s, transpose).view(weight.shape)
    rotated = _rotate_rows(flat.to(accumulate_dtype(flat.dtype)), made, b, m, groups, transpose)
    scaled = rotated if s is None else rotated * s.reshape(-1, 1).to(rotated.dtype)
    return scaled.to(weight.dtype).view(weight.shape)


def rotate_weight(
    weight: Tensor,
    boft_R: Tensor,
    boft_s: Tensor | None = None,
    *,
    groups: int = 1,
    keep: Tensor | None = None,
    reuse: bool = True,
) -> Tensor:
    """The merged weight ``diag(s) W R^T`` (PEFT `Linear.merge`, `Conv2d.merge`). Ignores autocast.

    Args:
        weight: ``(out, in)`` or a convolution's ``(out, in / groups, *kernel)``, whose rows are flattened.
        boft_R: ``(m, D, b, b)`` over all unfolded channels, ``in`` times the elements of the kernel.
        boft_s: out values of any shape, or None for ones.
        groups: of the convolution; every group uses its own diagonal part of R, so the length of a flattened row must
            be divisible by ``b 2^(m-1)`` (ValueError otherwise).
        keep: see `rotate`.
        reuse: with gradients off, keep the blocks for the next call with the same `boft_R`, as `rotate` does. False
            where there will be none: what is kept lies between the weights in memory, and its pieces add up.

    Returns: a new contiguous tensor of the shape and dtype of `weight`, rounded once. With gradients off and no groups
        in one pass over `weight` (``torch.ops.boft.merge``).
    """
    with torch.autocast(weight.device.type, enabled=False):
        made = (blocks if reuse else _fresh_blocks)(boft_R, weight.dtype, keep)
        return _scaled_rotation(weight, made, boft_R, boft_s, groups, transpose=True)


def unrotate_weight(weight: Tensor, boft_R: Tensor, boft_s: Tensor | None = None, *, groups: int = 1) -> Tensor:
    """Undo `rotate_weight`: ``diag(1 / s) W' R`` (PEFT `Linear.unmerge`). Arguments and result as there.

    Raises: ValueError naming the first row whose scale is zero, since such a row cannot be recovered.
    """
    with torch.autocast(weight.device.type, enabled=False):
        inverse = None
        if boft_s is not None:
            s = boft_s.flatten().to(accumulate_dtype(weight.dtype))
            zero = (s == 0).nonzero()
            if zero.numel():
                raise ValueError(f"boft_s is 0 for output {int(zero[0])}: a merge with it cannot be undone")
            inverse = 1 / s
        made = blocks(boft_R, weight.dtype)
        return _scaled_rotation(weight, made, boft_R, inverse, groups, transpose=False)


def rotation_matrix(boft_R: Tensor) -> Tensor:
    """The dense ``(d, d)`` matrix R, for looking at; nothing in this package uses it. float32 for 16-bit input."""
    dtype = accumulate_dtype(boft_R.dtype)
    d = boft_R.shape[1] * boft_R.shape[-1]
    return rotate(torch.eye(d, dtype=dtype, device=boft_R.device), boft_R)


def dropout_keep(m: int, blocks: int, p: float, device: torch.device | str = "cpu") -> Tensor:
    """Which blocks a training step keeps, by PEFT's rule (`MultiplicativeDropoutLayer.forward`).

    One factor is drawn and ``int(p D)`` of its D blocks are dropped. Draws from the CPU generator exactly as PEFT does
    (one `randint`, one `randperm`), so equal seeds give equal masks, whatever the device.

    Args:
        m, blocks: factors and blocks D of the layer. p: the fraction, 0 <= p <= 1. device: of the result.

    Returns: ``(m, blocks)`` bool, False where a block is replaced by the identity. No gradient.
    """
    factor = torch.randint(0, m, (1,))
    keep = (torch.arange(m) != factor).unsqueeze(1) | (torch.randperm(blocks) >= int(p * blocks))
    return _moved(keep, device)


def _moved(keep: Tensor, device: torch.device | str) -> Tensor:
    """A mask drawn on the CPU, without waiting for a CUDA device, as a copy from memory that is not pinned would."""
    cuda = torch.device(device).type == "cuda"
    return (keep.pin_memory() if cuda else keep).to(device, non_blocking=cuda)


def dropout_keep_paper(m: int, blocks: int, p1: float, p2: float, device: torch.device | str = "cpu") -> Tensor:
    """Which blocks a training step keeps, by the paper's rule (section 4, multiplicative dropout).

    A share p1 of the m factors is drawn, and in each of them a share p2 of the D blocks is dropped. A share that is no
    whole number is rounded up or down at random with its own probability, so ``p1 p2`` of all blocks are dropped on
    average even where ``p1 m`` or ``p2 D`` is below one. Draws from the CPU generator.

    Args:
        m, blocks: factors and blocks D of the layer. p1, p2: the shares, 0 <= p <= 1. device: of the result.

    Returns: ``(m, blocks)`` bool, False where a block is replaced by the identity. No gradient.
    """
    # In float64, so that the rounding of the sum does not shift the probabilities.
    factors = torch.floor(p1 * m + torch.rand(1, dtype=torch.float64))
    dropped = torch.floor(p2 * blocks + torch.rand(m, 1, dtype=torch.float64))
    drawn = torch.randperm(m) < factors
    ranks = torch.rand(m, blocks).argsort(dim=1).argsort(dim=1)
    return _moved(~drawn.unsqueeze(1) | (ranks >= dropped), device)
