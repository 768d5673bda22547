"""The mathematics in plain torch: against its definition entry by entry, and against finite differences."""

import itertools

import pytest
import torch
from shapes import DENSE, PAPER, SMALL

from boft_ext import reference


def dense_rotation(q):
    """R = F_{m-1} ... F_0 written out: chunk t of factor i is paired with chunk t XOR 2^i."""
    m, blocks, b, _ = q.shape
    d = blocks * b
    rotation = torch.eye(d, dtype=q.dtype)
    for i in range(m):
        factor = torch.zeros(d, d, dtype=q.dtype)
        if m == 1:
            channels = [range(n * b, n * b + b) for n in range(blocks)]
        else:
            c = b // 2
            lows = [t for t in range(d // c) if not t & 2**i]
            channels = [[*range(t * c, t * c + c), *range((t ^ 2**i) * c, (t ^ 2**i) * c + c)] for t in lows]
        for n, of_block in enumerate(channels):
            factor[torch.tensor(of_block)[:, None], torch.tensor(of_block)] = q[i, n]
        rotation = factor @ rotation
    return rotation


@pytest.mark.parametrize("d, b, m", [*SMALL, (320, 10, 5), (256, 16, 5)])
def test_rotation_is_the_product_of_butterfly_factors(d, b, m):
    boft_R = torch.randn(m, d // b, b, b, dtype=torch.float64)
    x = torch.randn(5, d, dtype=torch.float64)
    expected = x @ dense_rotation(reference.cayley(boft_R))
    torch.testing.assert_close(reference.rotate(x, boft_R), expected)


def test_cayley_is_the_papers_formula():
    a = torch.randn(4, 6, 6, dtype=torch.float64)
    s = (a - a.mT) / 2
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(reference.cayley(a), (eye - s) @ torch.linalg.inv(eye + s))


def level_splits(m):
    """Every way to cut m factors into runs, for small m."""
    for cuts in itertools.product([False, True], repeat=m - 1):
        starts = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), m]
        yield [(first, past - first) for first, past in zip(starts, starts[1:])]


@pytest.mark.parametrize("d, b, m", SMALL)
def test_levels_do_not_change_the_rotation(d, b, m):
    q = reference.cayley(torch.randn(m, d // b, b, b, dtype=torch.float64))
    x = torch.randn(3, d, dtype=torch.float64)
    expected = reference.rotate_factors(x, q)
    for levels in level_splits(m):
        blocks = reference.collapse(q, levels)
        rotated = reference.rotate_blocks(x, blocks, b, levels)
        torch.testing.assert_close(rotated, expected)
        torch.testing.assert_close(reference.rotate_blocks(rotated, blocks, b, levels, transpose=True), x)


@pytest.mark.parametrize("d, b, m", SMALL)
@pytest.mark.parametrize("transpose", [False, True])
def test_backward_formulas_are_those_of_autograd(d, b, m, transpose):
    boft_R = torch.randn(m, d // b, b, b, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, d, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(3, d, dtype=torch.float64)
    keep = torch.rand(m, d // b) > 0.3
    for levels in level_splits(m):
        q = reference.cayley(boft_R, keep)
        blocks = reference.collapse(q, levels)
        y = reference.rotate_blocks(x, blocks, b, levels, transpose)
        expected = torch.autograd.grad(y, [x, blocks, q, boft_R], dy)
        dx, dblocks = reference.rotate_blocks_backward(dy, x.detach(), blocks.detach(), b, levels, transpose)
        dq = reference.collapse_backward(dblocks, q.detach(), levels)
        da = reference.cayley_backward(dq, q.detach(), keep)
        for actual, wanted in zip((dx, dblocks, dq, da), expected, strict=True):
            torch.testing.assert_close(actual, wanted)


def test_gradients_agree_with_finite_differences():
    boft_R = torch.randn(2, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reference.rotate, (x, boft_R))
    s, bias = torch.randn(2, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reference.scale, (x, s, bias))


@pytest.mark.parametrize("d, b, m", [*PAPER, *DENSE])
def test_rotation_is_orthogonal(d, b, m):
    boft_R = torch.randn(m, d // b, b, b)
    rotation = reference.rotate(torch.eye(d), boft_R).double()
    assert (rotation @ rotation.T - torch.eye(d)).abs().max() < 3e-6


def test_zero_parameters_and_dropped_blocks_are_the_identity():
    x = torch.randn(3, 24)
    assert torch.equal(reference.rotate(x, torch.zeros(2, 6, 4, 4)), x)
    keep = torch.zeros(2, 6, dtype=torch.bool)
    assert torch.equal(reference.rotate(x, torch.randn(2, 6, 4, 4), keep), x)
