"""functional.rotate_weight, unrotate_weight and boft::merge: diag(s) W R^T for every dtype, layout and way to run."""

import pytest
import torch
from conftest import use_form
from shapes import PAPER, SMALL, layouts
from thread_counts import results_with_threads
from tolerance import FLOORS, assert_as_exact_as_torch, assert_exact, relative_error
from torch import library

from boft_ext import _C, functional, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SEVERAL_LEVELS = (256, 8, 6)


def make(rows, d, b, m, dtype):
    """A weight, parameters and a scale with both signs."""
    real = reference.accumulate_dtype(dtype)
    weight, s = torch.randn(rows, d).to(dtype), 0.5 + torch.randn(rows, 1, dtype=real)
    return weight, torch.randn(m, d // b, b, b, dtype=real), s


def exact_merge(weight, boft_R, s, transpose=True):
    """In float64 with the dense matrix."""
    eye = torch.eye(weight.shape[1], dtype=torch.float64)
    rotation = reference.rotate_factors(eye, reference.cayley(boft_R.double()))
    rotated = weight.double() @ (rotation.T if transpose else rotation)
    return rotated if s is None else s.double().reshape(-1, 1) * rotated


def assert_right(ours, exact):
    if ours.dtype in (torch.float32, torch.float64):
        assert_exact("merged", ours, exact)
    else:
        assert_as_exact_as_torch("merged", ours, exact.to(ours.dtype), exact)


def merge(weight, boft_R, s, transpose=True):
    """The operator."""
    m, _, b, _ = boft_R.shape
    return torch.ops.boft.merge(weight, functional.blocks(boft_R, weight.dtype), b, m, s, transpose)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 67])
@pytest.mark.parametrize("d, b, m", [*SMALL, *PAPER[:2], SEVERAL_LEVELS])
def test_operator(form, d, b, m, rows, dtype):
    if form == "scalar" and d > 400 and rows > 5:
        rows = 5  # the scalar reference is slow, and tests/c checks it at every size
    weight, boft_R, s = make(rows, d, b, m, dtype)
    for factors in (s, None):
        for transpose in (True, False):
            merged = merge(weight, boft_R, factors, transpose)
            assert merged.dtype == dtype and merged.is_contiguous()
            assert_right(merged, exact_merge(weight, boft_R, factors, transpose))


@torch.no_grad()
def test_sixteen_bits_are_rounded_once(form):
    for dtype in (torch.bfloat16, torch.float16):
        weight, boft_R, s = make(40, 96, 8, 2, dtype)
        exact = exact_merge(weight, boft_R, s)
        once = relative_error(exact.to(dtype), exact)
        assert relative_error(functional.rotate_weight(weight, boft_R, s), exact) <= 1.1 * once


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("d, b, m", [(24, 4, 2), SEVERAL_LEVELS])
def test_any_layout_gives_the_same_result(form, d, b, m, dtype):
    weight, boft_R, s = make(11, d, b, m, dtype)
    expected = merge(weight, boft_R, s)
    for name, other in layouts(weight):
        if form == "composite":  # torch's own products depend on the alignment of their operands
            torch.testing.assert_close(merge(other, boft_R, s), expected, msg=name)
        else:
            assert torch.equal(merge(other, boft_R, s), expected), name
    rows = weight[:1].expand(11, d)
    assert torch.equal(merge(rows, boft_R, s), merge(rows.contiguous(), boft_R, s))


@pytest.mark.parametrize("shape", [(11, 1), (1, 11), (11,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_any_shape_and_dtype_of_the_scale(form, shape, dtype):
    weight, boft_R, s = make(11, 24, 4, 2, torch.float32)
    s = s.to(dtype)
    assert torch.equal(merge(weight, boft_R, s.reshape(shape)), merge(weight, boft_R, s.float()))


@torch.no_grad()
def test_no_rows(form):
    weight, boft_R, s = make(0, 24, 4, 2, torch.bfloat16)
    for ours in (merge(weight, boft_R, s), merge(weight, boft_R, None), functional.rotate_weight(weight, boft_R, s)):
        assert ours.shape == (0, 24) and ours.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape, groups", [((50, 96), 1), ((6, 8, 3, 4), 1), ((6, 8, 3, 4), 2)])
def test_functional_is_the_same_with_and_without_gradients(form, shape, groups, dtype):
    real = reference.accumulate_dtype(dtype)
    weight, boft_R = torch.randn(shape).to(dtype), torch.randn(2, 24 * groups, 4, 4, dtype=real)
    boft_s = (1 + 0.1 * torch.randn(shape[0], 1, dtype=real)).requires_grad_()
    differentiable = functional.rotate_weight(weight, boft_R, boft_s, groups=groups)
    assert differentiable.requires_grad
    with torch.no_grad():
        merged = functional.rotate_weight(weight, boft_R, boft_s, groups=groups)
        back = functional.unrotate_weight(merged, boft_R, boft_s, groups=groups)
    assert merged.shape == weight.shape and merged.dtype == dtype and not merged.requires_grad
    assert relative_error(merged, differentiable.detach().double()) <= 10 * FLOORS[dtype]
    assert relative_error(back, weight.double()) <= 10 * FLOORS[dtype]
    if groups == 1:
        assert_right(merged.flatten(1), exact_merge(weight.flatten(1), boft_R, boft_s.detach()))


@torch.no_grad()
def test_inputs_are_not_written(form):
    weight, boft_R, s = make(11, 24, 4, 2, torch.float32)
    before = [tensor.clone() for tensor in (weight, boft_R, s)]
    functional.rotate_weight(weight, boft_R, s)
    assert all(torch.equal(*pair) for pair in zip(before, (weight, boft_R, s), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_for_any_number_of_threads(dtype):
    weight, boft_R, s = make(1000, 768, 8, 2, dtype)
    results = results_with_threads(lambda: merge(weight, boft_R, s))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("d, b, m", [(15, 5, 1), SEVERAL_LEVELS])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", [True, False])
def test_opcheck(d, b, m, dtype, kernels):
    with use_form(_C.cpu_variant() if kernels else "composite"):
        weight, boft_R, s = make(3, d, b, m, dtype)
        blocks = functional.blocks(boft_R, dtype)
        for factors, transpose in ((s, True), (None, True), (s, False)):
            library.opcheck(torch.ops.boft.merge.default, (weight, blocks, b, m, factors, transpose))


def test_compile():
    weight, boft_R, s = make(5, 24, 4, 2, torch.float32)
    compiled = torch.compile(functional.rotate_weight, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(weight, boft_R, s), functional.rotate_weight(weight, boft_R, s))


def test_the_operator_refuses_gradients():
    weight, boft_R, s = make(5, 24, 4, 2, torch.float32)
    with pytest.raises(RuntimeError, match="merge"):
        merge(weight, boft_R, s.requires_grad_()).sum().backward()


@torch.no_grad()
def test_autocast_is_ignored(form):
    weight, boft_R, s = make(5, 24, 4, 2, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = functional.rotate_weight(weight, boft_R, s)
    assert torch.equal(merged, functional.rotate_weight(weight, boft_R, s))


@torch.no_grad()
def test_bad_input_names_the_numbers(form):
    weight, boft_R, s = make(5, 24, 4, 2, torch.float32)
    with pytest.raises(ValueError, match="merge: 5 outputs need 5 values of boft_s, got .4"):
        functional.rotate_weight(weight, boft_R, s[:4])
    with pytest.raises(ValueError, match="merge: 192 elements of blocks do not fit 32 channels"):
        functional.rotate_weight(torch.zeros(3, 32), boft_R)
    with pytest.raises(ValueError, match="merge: expected a weight .rows, d., got .2, 5, 24"):
        merge(weight.expand(2, 5, 24), boft_R, None)
    with pytest.raises(TypeError, match="merge: weight: .*(?i:int|long)"):
        torch.ops.boft.merge(weight.long(), functional.blocks(boft_R, torch.float32), 4, 2, None, True)
    with pytest.raises(TypeError, match="merge: .*(?i:double|float64)"):
        torch.ops.boft.merge(weight.double(), functional.blocks(boft_R, torch.float32), 4, 2, s, True)
    with pytest.raises(ValueError, match="boft_s is 0 for output 2"):
        functional.unrotate_weight(weight, boft_R, torch.tensor([1.0, 2, 0, 3, 4]))
