"""boft::blocks and functional.cayley: parameters to orthogonal, collapsed blocks."""

import pytest
import torch
from torch import library
from conftest import use_form
from shapes import DENSE, PAPER, SMALL
from tolerance import assert_exact, relative_error

from boft_ext import _C, functional, reference


def random_parameters(d, b, m, dtype=torch.float32):
    return torch.randn(m, d // b, b, b, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d, b, m", [*SMALL, *PAPER[:3], (256, 16, 5), (160, 160, 1)])
def test_blocks_and_gradient_match_the_reference(form, d, b, m, dtype):
    boft_R = random_parameters(d, b, m, dtype).requires_grad_()
    keep = torch.rand(m, d // b) > 0.2
    blocks = torch.ops.boft.blocks(boft_R, keep)[0]
    exact_R = boft_R.detach().double().requires_grad_()
    exact = reference.collapse(reference.cayley(exact_R, keep), _C.levels(d, b, m))
    dblocks = torch.randn_like(exact)
    (grad,) = torch.autograd.grad(blocks, boft_R, dblocks.to(dtype))
    (exact_grad,) = torch.autograd.grad(exact, exact_R, dblocks)
    assert_exact("blocks", blocks, exact)
    assert_exact("gradient", grad, exact_grad)


@pytest.mark.parametrize("d, b, m", [(d, b, m) for d, b, m in [*SMALL, *PAPER] if b <= 16 and m <= 4])
def test_small_rotations_are_orthogonal_to_1e_6(form, d, b, m):
    rotation = functional.rotation_matrix(random_parameters(d, b, m)).double()
    assert (rotation @ rotation.T - torch.eye(d)).abs().max() <= 1e-6


@pytest.mark.parametrize("d, b, m", [*PAPER, *DENSE])
def test_large_rotations_are_as_orthogonal_as_lapacks(d, b, m):
    boft_R = random_parameters(d, b, m)
    eye = torch.eye(b)
    solved = [torch.linalg.solve(eye + s, eye - s, left=False) for s in reference.skew(boft_R).reshape(-1, b, b)]
    lapack = reference.rotate_factors(torch.eye(d), torch.stack(solved).view_as(boft_R)).double()
    ours = functional.rotation_matrix(boft_R).double()
    residual, allowed = ((r @ r.T - torch.eye(d)).abs().max() for r in (ours, lapack))
    assert residual <= max(2 * allowed, 1e-6)


@pytest.mark.parametrize("size", [0.0, 1e-20, 1.0, 1e2, 1e4])
@pytest.mark.parametrize("b", [1, 2, 5, 8, 20])
def test_float32_parameters_of_any_size_lose_one_rounding_only(form, b, size):
    a = size * torch.randn(6, b, b)
    assert relative_error(functional.cayley(a), reference.cayley(a.double())) <= 1e-7


@pytest.mark.parametrize("dtype, size", [(torch.float32, 1e18), (torch.float32, 3e38), (torch.float64, 1e300)])
@pytest.mark.parametrize("b", [2, 5, 8, 64])
def test_extreme_parameters_stay_finite(b, size, dtype):
    a = (size * (2 * torch.rand(3, b, b, dtype=torch.float64) - 1)).to(dtype)
    assert torch.isfinite(functional.cayley(a)).all()


def test_nan_stays_in_its_block(form):
    boft_R = random_parameters(32, 4, 1)
    boft_R[0, 3, 0, 1] = float("nan")
    finite = torch.isfinite(torch.ops.boft.blocks(boft_R, None)[0].view(8, 16)).all(1)
    assert finite.tolist() == [n != 3 for n in range(8)]


def test_gradcheck(form):
    boft_R = random_parameters(16, 4, 2, torch.float64).requires_grad_()
    keep = torch.tensor([[True, True, False, True], [True] * 4])
    assert torch.autograd.gradcheck(lambda a: torch.ops.boft.blocks(a, None)[0], boft_R)
    assert torch.autograd.gradcheck(lambda a: torch.ops.boft.blocks(a, keep)[0], boft_R)
    single = random_parameters(15, 5, 1, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda a: torch.ops.boft.blocks(a, None)[0], single)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("m", [1, 3])
def test_opcheck(m, kernels):
    with use_form(_C.cpu_variant() if kernels else "composite"):
        check_operators(m)


def check_operators(m):
    boft_R = random_parameters(32, 4, m).requires_grad_()
    blocks, q = torch.ops.boft.blocks(boft_R.detach(), None)
    q = blocks.view(boft_R.shape).clone() if m == 1 else q
    keep = torch.rand(m, 8) > 0.3
    for mask in (None, keep):
        library.opcheck(torch.ops.boft.blocks.default, (boft_R, mask))
        library.opcheck(torch.ops.boft.blocks_backward.default, (torch.randn_like(blocks), q, mask))


def test_any_layout_and_none_at_all(form):
    boft_R = random_parameters(24, 4, 2)
    expected = torch.ops.boft.blocks(boft_R, None)[0]
    strided = boft_R.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not strided.is_contiguous()
    assert torch.equal(torch.ops.boft.blocks(strided, None)[0], expected)
    offset = torch.cat([torch.zeros(7), boft_R.flatten()])[7:].view(boft_R.shape)
    assert torch.equal(torch.ops.boft.blocks(offset, None)[0], expected)
    expanded = boft_R[:, :1].expand(2, 6, 4, 4)
    assert torch.equal(torch.ops.boft.blocks(expanded, None)[0], torch.ops.boft.blocks(expanded.contiguous(), None)[0])


def test_cayley_of_any_batch(form):
    a = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(functional.cayley(a), reference.cayley(a))
    assert functional.cayley(torch.randn(4, 4)).shape == (4, 4)
    assert functional.cayley(torch.randn(3, 2, 2).bfloat16()).dtype == torch.float32
    assert functional.cayley(torch.randn(0, 2, 2)).shape == (0, 2, 2)


def test_second_derivatives_are_refused():
    boft_R = random_parameters(8, 4, 2).requires_grad_()
    (grad,) = torch.autograd.grad(torch.ops.boft.blocks(boft_R, None)[0].square().sum(), boft_R, create_graph=True)
    with pytest.raises(RuntimeError, match="blocks_backward"):
        grad.sum().backward()


@pytest.mark.parametrize(
    "shape, words",
    [
        ((2, 5, 4, 4), ["20", "8", "b = 4", "m = 2"]),
        ((2, 4, 3, 3), ["odd|even", "b = 3", "m = 2"]),
        ((4, 4, 2, 2), ["8 channels", "16", "m = 4"]),
        ((0, 4, 4, 4), ["m = 0"]),
    ],
)
def test_bad_shapes_name_the_numbers(form, shape, words):
    for word in words:
        with pytest.raises(ValueError, match=word):
            functional.rotate(torch.zeros(1, shape[1] * shape[2]), torch.zeros(shape))


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"\(m, d / b, b, b\), got \(4, 4\)"):
        functional.blocks(torch.zeros(4, 4), torch.float32)
    with pytest.raises(ValueError, match=r"\(..., b, b\), got \(3, 4\)"):
        functional.cayley(torch.zeros(3, 4))
    with pytest.raises(TypeError, match="boft_R"):
        torch.ops.boft.blocks(torch.zeros(1, 2, 2, 2, dtype=torch.int32), None)
    with pytest.raises(TypeError, match="keep: expected bool"):
        torch.ops.boft.blocks(torch.zeros(1, 2, 2, 2), torch.ones(1, 2))
    with pytest.raises(ValueError, match="2 blocks"):
        torch.ops.boft.blocks(torch.zeros(1, 2, 2, 2), torch.ones(1, 3, dtype=torch.bool))
