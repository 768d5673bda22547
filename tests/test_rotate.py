"""functional.rotate and boft::rotate: x R for every dtype, layout and way to run."""

import pytest
import torch
from torch import library
from conftest import use_form
from shapes import DENSE, PAPER, SMALL, layouts
from tolerance import FLOORS, assert_as_exact_as_torch, assert_exact, relative_error

from boft_ext import _C, functional, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def parameters(d, b, m, dtype=torch.float32):
    return torch.randn(m, d // b, b, b, dtype=dtype)


def exact_rotation(x, boft_R, dy, keep=None, transpose=False):
    """y, dx and dboft_R in float64 with the dense matrix."""
    x, boft_R = x.detach().double().requires_grad_(), boft_R.detach().double().requires_grad_()
    rotation = reference.rotate_factors(torch.eye(x.shape[-1], dtype=torch.float64), reference.cayley(boft_R, keep))
    y = x @ (rotation.T if transpose else rotation)
    return y.detach(), *torch.autograd.grad(y, [x, boft_R], dy.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [2, 67])
@pytest.mark.parametrize("d, b, m", [*SMALL, *PAPER[:3], (256, 16, 5)])
def test_output_and_gradients(form, d, b, m, rows, dtype):
    if form == "scalar" and d > 400 and rows > 5:
        rows = 5  # the scalar reference is slow, and tests/c checks it at every size
    boft_R = parameters(d, b, m, torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    x, dy = torch.randn(rows, d).to(dtype).requires_grad_(), torch.randn(rows, d).to(dtype)
    for transpose in (False, True):
        keep = torch.rand(m, d // b) > 0.2 if transpose else None
        y = functional.rotate(x, boft_R, keep=keep, transpose=transpose)
        dx, dR = torch.autograd.grad(y, [x, boft_R], dy)
        assert y.dtype == dx.dtype == dtype and dR.dtype == boft_R.dtype
        exact_y, exact_dx, exact_dR = exact_rotation(x, boft_R, dy, keep, transpose)
        if dtype in (torch.float32, torch.float64):
            assert_exact("y", y, exact_y)
            assert_exact("dx", dx, exact_dx)
        else:
            assert_as_exact_as_torch("y", y, exact_y.to(dtype), exact_y)
            assert_as_exact_as_torch("dx", dx, exact_dx.to(dtype), exact_dx)
        assert_exact("dR", dR, exact_dR)


@pytest.mark.parametrize("d, b, m", [*PAPER[4:], *DENSE])
def test_large_and_dense_shapes(d, b, m):
    boft_R, x, dy = parameters(d, b, m).requires_grad_(), torch.randn(40, d, requires_grad=True), torch.randn(40, d)
    y = functional.rotate(x, boft_R)
    for what, ours, exact in zip(
        ("y", "dx", "dR"), (y, *torch.autograd.grad(y, [x, boft_R], dy)), exact_rotation(x, boft_R, dy), strict=True
    ):
        assert_exact(what, ours, exact)


@pytest.mark.parametrize("size", [1e-4, 1e-2, 2e-2, 3e-2, 1.0])
@pytest.mark.parametrize("d, b, m", [(768, 8, 2), (1024, 4, 4), (512, 2, 9), (320, 20, 2), (640, 40, 3)])
def test_sixteen_bits_are_rounded_once(form, d, b, m, size):
    boft_R, x = size * parameters(d, b, m), torch.randn(16, d)
    for dtype in (torch.bfloat16, torch.float16):
        exact = reference.rotate(x.to(dtype).double(), boft_R.double())
        once = relative_error(exact.to(dtype), exact)
        assert relative_error(functional.rotate(x.to(dtype), boft_R), exact) <= 1.1 * once


def test_a_large_rotation_beside_small_ones_is_rounded_once(form):
    boft_R, x = 1e-3 * parameters(640, 40, 3), torch.randn(16, 640).bfloat16().requires_grad_()
    boft_R[:, 2] *= 1000
    dy = torch.randn(16, 640).bfloat16()
    y = functional.rotate(x, boft_R)
    exact_y, exact_dx, _ = exact_rotation(x, boft_R, dy)
    for ours, exact in ((y, exact_y), (torch.autograd.grad(y, x, dy)[0], exact_dx)):
        # Column by column, as one that is wrong would hardly show in the whole.
        for j in range(640):
            once = relative_error(exact[:, j].bfloat16(), exact[:, j])
            assert relative_error(ours[:, j], exact[:, j]) <= 1.5 * max(once, 1e-3), j


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_changes_nothing(form, dtype):
    x = torch.randn(9, 48).to(dtype)
    assert torch.equal(functional.rotate(x, torch.zeros(2, 12, 4, 4)), x)


def test_inverse(form):
    boft_R, x = parameters(96, 2, 4), torch.randn(5, 96)
    back = functional.rotate(functional.rotate(x, boft_R), boft_R, transpose=True)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)


def test_gradcheck(form):
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    boft_R = parameters(16, 4, 2, torch.float64).requires_grad_()
    keep = torch.tensor([[True, True, False, True], [True, False, True, True]])
    assert torch.autograd.gradcheck(functional.rotate, (x, boft_R))
    assert torch.autograd.gradcheck(lambda x, a: functional.rotate(x, a, keep=keep, transpose=True), (x, boft_R))
    # Enough factors for two levels.
    x, boft_R = torch.randn(2, 256, dtype=torch.float64, requires_grad=True), parameters(256, 8, 6, torch.float64)
    assert len(_C.levels(256, 8, 6)) == 2
    assert torch.autograd.gradcheck(functional.rotate, (x, boft_R.requires_grad_()), fast_mode=True)


@pytest.mark.parametrize("d, b, m", [(15, 5, 1), (256, 8, 6)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", [True, False])
def test_opcheck(d, b, m, dtype, kernels):
    with use_form(_C.cpu_variant() if kernels else "composite"):
        check_operators(d, b, m, dtype)


def check_operators(d, b, m, dtype):
    real = reference.accumulate_dtype(dtype)
    blocks = torch.ops.boft.blocks(parameters(d, b, m, real), None)[0]
    x, dy = torch.randn(3, d).to(dtype), torch.randn(3, d).to(dtype)
    for transpose in (False, True):
        library.opcheck(
            torch.ops.boft.rotate.default,
            (x.clone().requires_grad_(), blocks.clone().requires_grad_(), b, m, transpose),
        )
        for need_x, need_blocks in ((True, True), (True, False), (False, True)):
            library.opcheck(
                torch.ops.boft.rotate_backward.default, (dy, x, blocks, b, m, transpose, need_x, need_blocks)
            )


def test_any_layout_gives_the_same_result(form):
    boft_R, x, dy = parameters(24, 4, 2), torch.randn(11, 24), torch.randn(11, 24)

    def run(x, dy):
        x, a = x.detach().requires_grad_(), boft_R.clone().requires_grad_()
        y = functional.rotate(x, a)
        return y, *torch.autograd.grad(y, [x, a], dy)

    expected = run(x, dy)
    for (name, other_x), (_, other_dy) in zip(layouts(x), layouts(dy), strict=True):
        for ours, wanted in zip(run(other_x, other_dy), expected, strict=True):
            if form == "composite":  # torch's own products depend on the alignment of their operands
                torch.testing.assert_close(ours, wanted, msg=name)
            else:
                assert torch.equal(ours, wanted), name


def test_expanded_rows_and_gradients(form):
    boft_R = parameters(24, 4, 2).requires_grad_()
    x = torch.randn(1, 24).expand(6, 24)
    y = functional.rotate(x, boft_R)
    assert torch.equal(y, functional.rotate(x.contiguous(), boft_R))
    (expanded,) = torch.autograd.grad(y.sum(), boft_R)  # the gradient of a sum is one expanded value
    (dense,) = torch.autograd.grad(functional.rotate(x, boft_R), boft_R, torch.ones(6, 24))
    torch.testing.assert_close(expanded, dense)


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24), (24,), (2, 3, 1, 24)])
def test_any_number_of_axes_and_rows(form, shape):
    x, boft_R = torch.randn(shape, requires_grad=True), parameters(24, 4, 2).requires_grad_()
    y = functional.rotate(x, boft_R)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
    if x.numel() == 0:
        assert torch.equal(boft_R.grad, torch.zeros_like(boft_R))
    else:
        torch.testing.assert_close(y, reference.rotate(x, boft_R))


def test_nothing_is_saved_that_no_gradient_needs():
    x, frozen = torch.randn(64, 24, requires_grad=True), parameters(24, 4, 2)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        functional.rotate(x, frozen)
    assert torch.Size([64, 24]) not in saved


def test_inputs_are_not_written(form):
    boft_R, x = parameters(24, 4, 2).requires_grad_(), torch.randn(5, 24, requires_grad=True)
    before = boft_R.detach().clone(), x.detach().clone()
    functional.rotate(x, boft_R).sum().backward()
    assert torch.equal(before[0], boft_R) and torch.equal(before[1], x)


def test_gradients_are_the_same_bits_for_any_number_of_threads():
    boft_R = parameters(768, 8, 2)
    x, dy = torch.randn(1000, 768), torch.randn(1000, 768)

    def gradients():
        a, leaf = boft_R.clone().requires_grad_(), x.clone().requires_grad_()
        return torch.autograd.grad(functional.rotate(leaf, a), [leaf, a], dy)

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gradients()
        torch.set_num_threads(2)
        for again in (gradients(), gradients()):
            assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast(form, enabled):
    x, boft_R = torch.randn(5, 24, requires_grad=True), parameters(24, 4, 2).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        y = functional.rotate(x, boft_R)
    assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
    y.float().square().sum().backward()
    assert x.grad.dtype == boft_R.grad.dtype == torch.float32
    exact = reference.rotate(x.detach().to(y.dtype).double(), boft_R.detach().double())
    assert relative_error(y, exact) <= 4 * FLOORS[y.dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_parameters(form, dtype):
    x, boft_R = torch.randn(5, 24).to(dtype), parameters(24, 4, 2).to(dtype).requires_grad_()
    y = functional.rotate(x, boft_R)
    y.float().square().sum().backward()
    assert boft_R.grad.dtype == dtype
    exact = reference.rotate(x.double(), boft_R.detach().double())
    assert relative_error(y, exact) <= 4 * FLOORS[dtype]


@pytest.mark.parametrize("form_name", ["kernels", "composite"])
def test_compile(form_name):
    x, boft_R = torch.randn(5, 24, requires_grad=True), parameters(24, 4, 2).requires_grad_()

    def loss(x, boft_R):
        return functional.rotate(x.sin(), boft_R).square().sum()

    with use_form(_C.cpu_variant() if form_name == "kernels" else "composite"):
        expected = torch.autograd.grad(loss(x, boft_R), [x, boft_R])
        compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
        for ours, wanted in zip(torch.autograd.grad(compiled(x, boft_R), [x, boft_R]), expected, strict=True):
            torch.testing.assert_close(ours, wanted)


def test_compile_with_inductor():
    x, boft_R = torch.randn(5, 24, requires_grad=True), parameters(24, 4, 2).requires_grad_()

    def loss(x, boft_R):
        return functional.rotate(x.sin(), boft_R).square().sum()

    expected = torch.autograd.grad(loss(x, boft_R), [x, boft_R])
    ours = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, boft_R), [x, boft_R])
    for actual, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_second_derivatives_are_refused():
    x, boft_R = torch.randn(2, 8, requires_grad=True), parameters(8, 4, 2).requires_grad_()
    (dx,) = torch.autograd.grad(functional.rotate(x, boft_R).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="rotate_backward"):
        dx.sum().backward()


def test_bad_input_names_the_numbers(form):
    boft_R = parameters(24, 4, 2)
    with pytest.raises(ValueError, match="32"):
        functional.rotate(torch.zeros(3, 32), boft_R)
    with pytest.raises(TypeError, match="x: .*(?i:int|long)"):
        functional.rotate(torch.zeros(3, 24, dtype=torch.int64), boft_R)
    with pytest.raises(TypeError, match="x: .*(?i:complex)"):
        functional.rotate(torch.zeros(3, 24, dtype=torch.complex64), boft_R)
    with pytest.raises(ValueError, match="axis"):
        functional.rotate(torch.zeros(()), boft_R)
