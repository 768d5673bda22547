"""The mathematics of BOFT in plain torch: one definition, readable, differentiable, on any device.

Everything fast in this package is tested against this file, and this file against PEFT and finite differences. It is
also what runs on devices without kernels (`composite.py`).

Symbols (Liu et al., ICLR 2024; sign and layout conventions of PEFT's BOFT): ``d`` channels, ``b`` block size,
``D = d / b`` blocks, ``m`` butterfly factors, ``c = b / 2`` chunk. `boft_R` has shape ``(m, D, b, b)``.

* Cayley: ``S = (A - A^T) / 2``, ``Q = (I - S)(I + S)^-1 = 2 (I + S)^-1 - I`` (PEFT `cayley_batch`).
* Factor ``i`` pairs chunk ``t`` with chunk ``t XOR 2^i`` (PEFT `block_butterfly_perm`). Block ``n`` of factor ``i``
  acts on chunks ``(n >> i) * 2^(i+1) + (n & (2^i - 1))`` and that plus ``2^i``.
* ``R = F_{m-1} ... F_0``; a row vector is rotated as ``x R``, so it meets factor ``m - 1`` first.

A *level* ``(first, factors)`` is a run of consecutive factors multiplied together. In a level starting at factor
``first``, channels are viewed as ``(d / (G inner), G / chunk, inner, chunk)`` with ``inner = 2^first``: group
``(outer, lane)`` holds ``G = b 2^(factors-1)`` channels and is multiplied by one dense ``G x G`` block.

All functions are pure, allocate their results and may be called from any thread.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Level = tuple[int, int]
"""``(first, factors)``: the factors ``first ... first + factors - 1`` multiplied into one block per group."""

# torch 2.13's batched CPU solve is wrong or hangs from 150 columns on with two threads, so larger blocks go one by one.
_LARGEST_BATCHED_SOLVE = 128


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic on data of `dtype`: float64 for float64, float32 for everything shorter."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def skew(a: Tensor) -> Tensor:
    """``(A - A^T) / 2`` of the last two axes, computed so that no finite input overflows. Shape and dtype of `a`."""
    return a / 2 - a.mT / 2


def cayley(a: Tensor, keep: Tensor | None = None) -> Tensor:
    """Orthogonal matrices from unconstrained ones (paper section 3; PEFT `BOFTLayer.cayley_batch`).

    Args:
        a: ``(..., b, b)``, float32 or float64. float32 is solved in float64 where the device has it, which keeps
            the error at one rounding for entries of any size.
        keep: optional ``(...)`` bool; where it is False the result is the identity and the gradient zero
            (the paper's multiplicative dropout).

    Returns: ``(..., b, b)`` of the dtype of `a`, differentiable.
    """
    b = a.shape[-1]
    s = skew(a if a.device.type == "mps" else a.double())
    if keep is not None:
        s = torch.where(keep[..., None, None], s, 0)
    eye = torch.eye(b, dtype=s.dtype, device=s.device)
    if b <= _LARGEST_BATCHED_SOLVE:
        q = torch.linalg.solve(eye + s, eye - s, left=False)
    else:
        q = torch.stack([torch.linalg.solve(eye + one, eye - one, left=False) for one in s.reshape(-1, b, b)])
    return q.reshape(a.shape).to(a.dtype)


def cayley_backward(dq: Tensor, q: Tensor, keep: Tensor | None = None) -> Tensor:
    """Gradient of `cayley` without a solve: ``dS = -1/2 (I + Q)^T dQ (I + Q)^T``, ``dA = (dS - dS^T) / 2``.

    Args and result: ``(..., b, b)``, one dtype; `keep` as in `cayley`.
    """
    j = (q + torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)).mT
    da = skew(-0.5 * (j @ dq @ j))
    return da if keep is None else torch.where(keep[..., None, None], da, 0)


def group_view(x: Tensor, level: Level, b: int) -> Tensor:
    """Channels gathered by the groups of a level: ``(T, d)`` -> ``(groups, T, G)``.

    `level` is ``(first, factors)`` and ``G = b 2^(factors-1)``. The inverse is `ungroup_view`.
    """
    first, factors = level
    rows, d = x.shape
    if first == 0:
        group = b * 2 ** (factors - 1)
        return x.reshape(rows, d // group, group).transpose(0, 1)
    runs, inner, chunk = 2**factors, 2**first, b // 2
    outer = d // (runs * inner * chunk)
    x = x.reshape(rows, outer, runs, inner, chunk).permute(1, 3, 0, 2, 4)
    return x.reshape(outer * inner, rows, runs * chunk)


def ungroup_view(y: Tensor, level: Level, b: int) -> Tensor:
    """Undo `group_view`: ``(groups, T, G)`` -> ``(T, d)``."""
    first, factors = level
    groups, rows, group = y.shape
    if first == 0:
        return y.transpose(0, 1).reshape(rows, groups * group)
    runs, inner, chunk = 2**factors, 2**first, b // 2
    y = y.reshape(groups // inner, inner, rows, runs, chunk).permute(2, 0, 3, 1, 4)
    return y.reshape(rows, groups * group)


def rotate_factors(x: Tensor, q: Tensor) -> Tensor:
    """``x R`` factor by factor, ``R`` given by its orthogonal blocks.

    Args:
        x: ``(T, d)``, float32 or float64. q: ``(m, D, b, b)`` of the same dtype.

    Returns: ``(T, d)``, differentiable in both. This is the definition that `collapse` and `rotate_blocks` speed up.
    """
    m, _, b, _ = q.shape
    for i in reversed(range(m)):
        level = (i, 1)
        x = ungroup_view(group_view(x, level, b) @ q[i], level, b)
    return x


def rotate(x: Tensor, boft_R: Tensor, keep: Tensor | None = None) -> Tensor:
    """``x R`` for data of any floating dtype, rounded once (paper equation 5; PEFT `Linear.forward`).

    Args:
        x: ``(..., d)``. boft_R: ``(m, D, b, b)``. keep: optional ``(m, D)`` bool, see `cayley`.

    Returns: ``(..., d)`` of the dtype of `x`, differentiable in `x` and `boft_R`.
    """
    dtype = accumulate_dtype(x.dtype)
    q = cayley(boft_R.to(dtype), keep)
    y = rotate_factors(x.reshape(-1, x.shape[-1]).to(dtype), q)
    return y.reshape(x.shape).to(x.dtype)


def scale(z: Tensor, s: Tensor, bias: Tensor | None = None, bias_detached: bool = False) -> Tensor:
    """``z s + bias (1 - s)``, which is ``(z - bias) s + bias`` without its cancellation (PEFT `Linear.forward`).

    Args:
        z: ``(..., n)``. s: ``(n)``. bias: ``(n)`` or None.
        bias_detached: `z` holds the bias without its gradient, which is then all given here: the sum of dy.

    Returns: ``(..., n)`` of the dtype of `z`, computed in `accumulate_dtype`, differentiable in all three.
    """
    dtype = accumulate_dtype(z.dtype)
    s = s.to(dtype)
    out = z.to(dtype) * s
    if bias is not None:
        bias = bias.to(dtype)
        out = out + (bias - bias.detach() * s if bias_detached else bias * (1 - s))
    return out.to(z.dtype)


def level_sizes(d: int, b: int, levels: Sequence[Level]) -> list[int]:
    """Elements of the collapsed blocks of each level: ``d G`` for ``G = b 2^(factors-1)``."""
    return [d * b * 2 ** (factors - 1) for _, factors in levels]


def _level_factor(q: Tensor, level: Level, f: int) -> Tensor:
    """Blocks of factor ``first + f`` ordered by the groups of the level: ``(groups, high, low, b, b)``."""
    first, factors = level
    b = q.shape[-1]
    inner, low, high = 2**first, 2**f, 2 ** (factors - 1 - f)
    blocks = q[first + f].reshape(-1, high, low, inner, b, b).permute(0, 3, 1, 2, 4, 5)
    return blocks.reshape(-1, high, low, b, b)


def _unlevel_factor(blocks: Tensor, level: Level) -> Tensor:
    """Undo `_level_factor`: ``(groups, high, low, b, b)`` -> ``(D, b, b)``."""
    inner = 2 ** level[0]
    groups, high, low, b, _ = blocks.shape
    blocks = blocks.reshape(groups // inner, inner, high, low, b, b).permute(0, 2, 3, 1, 4, 5)
    return blocks.reshape(-1, b, b)


def _pairs(mat: Tensor, high: int, low: int) -> Tensor:
    """Columns of ``(groups, G, G)`` matrices paired as a factor pairs chunks: ``(groups, high, low, G, b)``."""
    groups, rows, cols = mat.shape
    chunk = cols // (2 * high * low)
    mat = mat.reshape(groups, rows, high, 2, low, chunk).permute(0, 2, 4, 1, 3, 5)
    return mat.reshape(groups, high, low, rows, 2 * chunk)


def _unpairs(pairs: Tensor) -> Tensor:
    """Undo `_pairs`."""
    groups, high, low, rows, b = pairs.shape
    mat = pairs.reshape(groups, high, low, rows, 2, b // 2).permute(0, 3, 1, 4, 2, 5)
    return mat.reshape(groups, rows, high * low * b)


def _collapse_steps(q: Tensor, level: Level) -> list[Tensor]:
    """Partial products of a level from the top factor down, starting with the identity; the last is the block."""
    first, factors = level
    m, d_blocks, b, _ = q.shape
    group = b * 2 ** (factors - 1)
    groups = d_blocks * b // group
    steps = [torch.eye(group, dtype=q.dtype, device=q.device).expand(groups, group, group)]
    for f in reversed(range(factors)):
        factor = _level_factor(q, level, f)
        steps.append(_unpairs(_pairs(steps[-1], factor.shape[1], factor.shape[2]) @ factor))
    return steps


def collapse(q: Tensor, levels: Sequence[Level]) -> Tensor:
    """Multiply the factors of each level together.

    Args:
        q: ``(m, D, b, b)`` orthogonal blocks. levels: runs of factors, any order, together ``0 ... m - 1``.

    Returns: the blocks of all levels in one vector, level after level, each ``(d / G, G, G)`` row-major, so that a
    group is rotated as ``x_g @ block``; for one level of one factor that is `q` itself. Differentiable.
    """
    return torch.cat([(q[level[0]] if level[1] == 1 else _collapse_steps(q, level)[-1]).flatten() for level in levels])


def collapse_backward(dblocks: Tensor, q: Tensor, levels: Sequence[Level]) -> Tensor:
    """Gradient of `collapse` with respect to `q`: ``dQ = M^T dM'`` for each factor ``M' = M F``. Shape of `q`."""
    m, d_blocks, b, _ = q.shape
    dq = torch.empty_like(q)
    for level, grad in zip(levels, dblocks.split(level_sizes(d_blocks * b, b, levels)), strict=True):
        first, factors = level
        if factors == 1:
            dq[first] = grad.reshape(d_blocks, b, b)
            continue
        group = b * 2 ** (factors - 1)
        grad = grad.reshape(-1, group, group)
        for f, step in enumerate(reversed(_collapse_steps(q, level)[:-1])):
            factor = _level_factor(q, level, f)
            high, low = factor.shape[1:3]
            pairs = _pairs(grad, high, low)
            dq[first + f] = _unlevel_factor(_pairs(step, high, low).mT @ pairs, level)
            grad = _unpairs(pairs @ factor.mT)
    return dq


def _level_blocks(blocks: Tensor, d: int, b: int, levels: Sequence[Level], transpose: bool) -> list[Tensor]:
    """The ``(groups, G, G)`` matrices of each level, transposed if asked."""
    parts = blocks.split(level_sizes(d, b, levels))
    parts = [p.reshape(-1, b * 2 ** (k - 1), b * 2 ** (k - 1)) for p, (_, k) in zip(parts, levels, strict=True)]
    return [p.mT if transpose else p for p in parts]


def rotate_blocks(x: Tensor, blocks: Tensor, b: int, levels: Sequence[Level], transpose: bool = False) -> Tensor:
    """``x R`` (or ``x R^T``) with collapsed blocks, one multiplication per level.

    Args:
        x: ``(T, d)``. blocks: as `collapse` returns them, of the dtype of `x`. levels: in the order of `blocks`,
            lowest factors first. transpose: rotate by ``R^T``.

    Returns: ``(T, d)``, differentiable in both.
    """
    mats = _level_blocks(blocks, x.shape[1], b, levels, transpose)
    order = range(len(levels)) if transpose else reversed(range(len(levels)))
    for i in order:
        x = ungroup_view(group_view(x, levels[i], b) @ mats[i], levels[i], b)
    return x


def rotate_blocks_backward(
    dy: Tensor, x: Tensor, blocks: Tensor, b: int, levels: Sequence[Level], transpose: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of `rotate_blocks` with respect to `x` and `blocks`; inputs between levels are computed again."""
    mats = _level_blocks(blocks, x.shape[1], b, levels, transpose)
    order = list(range(len(levels)) if transpose else reversed(range(len(levels))))
    inputs = []
    for i in order:
        inputs.append(group_view(x, levels[i], b))
        if i != order[-1]:
            x = ungroup_view(inputs[-1] @ mats[i], levels[i], b)
    grads: list[Tensor] = [blocks] * len(levels)
    for i, grouped in zip(reversed(order), reversed(inputs), strict=True):
        dy = group_view(dy, levels[i], b)
        grad = grouped.mT @ dy
        grads[i] = (grad.mT if transpose else grad).flatten()
        dy = ungroup_view(dy @ mats[i].mT, levels[i], b)
    return dy, torch.cat(grads)
