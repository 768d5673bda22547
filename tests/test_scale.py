"""functional.scale and boft::scale: z s + bias (1 - s)."""

import pytest
import torch
from torch import library
from conftest import use_form
from tolerance import assert_as_exact_as_torch, assert_exact, relative_error

from boft_ext import _C, functional, reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def leaves(rows, n, dtype, with_bias):
    real = reference.accumulate_dtype(dtype)
    z = torch.randn(rows, n).to(dtype).requires_grad_()
    s = (1 + 0.3 * torch.randn(n, dtype=real)).requires_grad_()
    bias = torch.randn(n, dtype=real).requires_grad_() if with_bias else None
    return z, s, bias


@pytest.mark.parametrize("bias_is", ["absent", "in z", "detached"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows, n", [(1, 1), (3, 5), (7, 16), (600, 77), (64, 768)])
def test_output_and_gradients(form, rows, n, dtype, bias_is):
    z, s, bias = leaves(rows, n, dtype, bias_is != "absent")
    detached = bias_is == "detached"
    inputs = [t for t in (z, s, bias) if t is not None]
    dy = torch.randn(rows, n).to(dtype)
    out = functional.scale(z, s, bias, bias_detached=detached)
    assert out.dtype == dtype
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    exact = reference.scale(*exact_inputs, bias_detached=detached)
    results = [out, *torch.autograd.grad(out, inputs, dy)]
    exacts = [exact, *torch.autograd.grad(exact, exact_inputs, dy.double())]
    for what, ours, wanted in zip(["out", "dz", "ds", "dbias"], results, exacts, strict=False):
        wanted = wanted.detach()
        if ours.dtype in (torch.float32, torch.float64):
            assert_exact(what, ours.detach(), wanted)
        else:
            assert_as_exact_as_torch(what, ours.detach(), wanted.to(ours.dtype), wanted)


def test_is_better_than_subtracting_the_bias_first():
    z, s, bias = leaves(64, 32, torch.bfloat16, True)
    bias = -10 * bias.detach().abs()
    z = (z.abs() - 0.5 * bias).to(torch.bfloat16).detach()  # a difference larger than both, so that rounding it costs
    exact = reference.scale(z.double(), s.double(), bias.double())
    theirs = (z - bias.to(z.dtype)) * s.to(z.dtype) + bias.to(z.dtype)
    assert relative_error(functional.scale(z, s, bias), exact) < 0.7 * relative_error(theirs, exact)


def test_a_scale_of_one_changes_nothing(form):
    for dtype in DTYPES:
        z = torch.randn(5, 33).to(dtype)
        assert torch.equal(functional.scale(z, torch.ones(33), torch.randn(33)), z)


def test_gradcheck(form):
    z, s, bias = leaves(4, 5, torch.float64, True)
    assert torch.autograd.gradcheck(functional.scale, (z, s, bias))
    assert torch.autograd.gradcheck(functional.scale, (z, s))

    assert torch.autograd.gradcheck(lambda s, b: functional.scale(z.detach(), s, b), (s, bias))


def test_detached_bias_gets_the_whole_gradient(form):
    x, s, bias = leaves(4, 5, torch.float64, True)
    dy = torch.randn_like(x)
    whole = functional.scale(x + bias, s, bias)
    detached = functional.scale(x + bias.detach(), s, bias, bias_detached=True)
    assert torch.equal(whole, detached)
    for ours, wanted in zip(*(torch.autograd.grad(out, [x, s, bias], dy) for out in (detached, whole)), strict=True):
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", [True, False])
def test_opcheck(dtype, kernels):
    with use_form(_C.cpu_variant() if kernels else "composite"):
        check_operators(dtype)


def check_operators(dtype):
    z, s, bias = leaves(4, 5, dtype, True)
    library.opcheck(torch.ops.boft.scale.default, (z, s, bias, True))
    library.opcheck(torch.ops.boft.scale.default, (z, s, None, False))
    z, s, bias = z.detach(), s.detach(), bias.detach()
    backward = torch.ops.boft.scale_backward.default
    library.opcheck(backward, (torch.randn_like(z), z, s, bias, True, True, True, True))
    library.opcheck(backward, (torch.randn_like(z), z, s, None, False, False, True, False))
    library.opcheck(backward, (torch.randn_like(z), None, s, bias, False, True, False, True))


@pytest.mark.parametrize("shape", [(5, 1), (1, 5), (5,)])
def test_peft_shapes_of_the_scale(form, shape):
    z, s = torch.randn(2, 3, 5), torch.randn(shape, requires_grad=True)
    out = functional.scale(z, s)
    torch.testing.assert_close(out, z * s.flatten())
    out.sum().backward()
    assert s.grad.shape == shape


def test_sixteen_bit_scale_and_bias(form):
    z = torch.randn(6, 8).bfloat16()
    s, bias = (torch.rand(8) + 0.5).bfloat16().requires_grad_(), torch.randn(8).bfloat16().requires_grad_()
    out = functional.scale(z, s, bias)
    out.float().sum().backward()
    assert out.dtype == s.grad.dtype == bias.grad.dtype == torch.bfloat16


def test_strides_offsets_and_no_rows(form):
    z, s, bias = leaves(6, 8, torch.float32, True)
    expected = functional.scale(z, s, bias)
    assert torch.equal(functional.scale(z.detach().T.contiguous().T, s, bias), expected)
    wide = torch.cat([z.detach(), z.detach()], 1)
    assert torch.equal(functional.scale(wide[:, 8:], s, bias), expected)
    assert torch.equal(functional.scale(z[:1].expand(6, 8), s, bias), expected[:1].expand(6, 8))
    empty = torch.zeros(0, 8, requires_grad=True)
    functional.scale(empty, s, bias).sum().backward()
    assert empty.grad.shape == (0, 8)
    assert torch.equal(s.grad, torch.zeros(8)) and torch.equal(bias.grad, torch.zeros(8))


def test_frozen_scale_saves_no_activation():
    z, s, _ = leaves(64, 8, torch.float32, False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        functional.scale(z, s.detach())
    assert torch.Size([64, 8]) not in saved


def test_compile():
    z, s, bias = leaves(6, 8, torch.float32, True)

    def loss(z, s, bias):
        return functional.scale(z.sin(), s, bias).square().sum()

    expected = torch.autograd.grad(loss(z, s, bias), [z, s, bias])
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    for ours, wanted in zip(torch.autograd.grad(compiled(z, s, bias), [z, s, bias]), expected, strict=True):
        torch.testing.assert_close(ours, wanted)


def test_gradients_are_the_same_bits_for_any_number_of_threads():
    z, s, bias = leaves(2000, 96, torch.float32, True)
    dy = torch.randn(2000, 96)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 2):
            torch.set_num_threads(count)
            results.append(torch.autograd.grad(functional.scale(z, s, bias), [z, s, bias], dy))
        assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_bad_input_names_the_numbers(form):
    with pytest.raises(ValueError, match="5 outputs need 5 values of boft_s, got .4"):
        functional.scale(torch.zeros(2, 5), torch.ones(4))
    with pytest.raises(ValueError, match="5 outputs need 5 values of bias, got .6"):
        functional.scale(torch.zeros(2, 5), torch.ones(5), torch.zeros(6))
    with pytest.raises(TypeError, match="z: .*(?i:int)"):
        functional.scale(torch.zeros(2, 5, dtype=torch.int32), torch.ones(5))
