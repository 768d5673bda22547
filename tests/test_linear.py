"""A linear layer in training, which is one function of the compiled module: the same bits as its parts one by one."""

import copy
import functools
import gc
import math
import weakref

import pytest
import torch
from linear_layers import (
    DTYPES,
    SHAPES,
    assert_as_in_parts,
    assert_near,
    assert_same,
    in_parts,
    make_layer,
    random_problem,
    run,
    run_with_threads,
)
from tolerance import assert_as_exact_as_torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import boft_ext

# More outputs than rows, so that the layer rotates its input (fewer: test_linear_merged.py).
MANY = 1004

# The gradient of boft_s is computed from the output where every scale is near 1, else from that before the scale.
near_one = pytest.mark.parametrize("near_one", [False, True], ids=["any scale", "scale near 1"])


@pytest.mark.parametrize("rows", [(7,), (2, 40), (0,), (1, 300)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@near_one
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_same_bits_as_its_parts(shape, dtype, near_one, bias, rows, seed):
    layer, x, dy = random_problem(shape, bias, dtype, rows, seed, near_one)
    ours = run(layer, x, dy)
    assert all(tensor is not None for tensor in ours)
    in_parts(layer)
    assert_as_in_parts(ours, run(layer, x, dy), near_one, dtype)


@pytest.mark.parametrize("rows", [(80,), (1100,)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_a_scale_near_one(dtype, bias, rows, seed):
    layer, x, dy = random_problem((64, 48, 8, 2), bias, dtype, rows, seed, near_one=True)
    layer.boft_dropout = 0.0
    exact = run(copy.deepcopy(layer).double(), x.double(), dy.double())[-1]
    ours = run(layer, x, dy)[-1]
    in_parts(layer)
    assert_as_exact_as_torch("ds", ours, run(layer, x, dy)[-1], exact)


@pytest.mark.parametrize("rows", [20, 600])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpoint"])
@pytest.mark.parametrize(
    "change",
    [nn.ReLU(inplace=True), lambda y: y.add_(1), lambda y: y.view(-1, 4)[:3].zero_(), lambda y: y.detach().mul_(2)],
    ids=["relu", "add", "view", "detached"],
)
def test_an_output_may_be_changed_in_place(change, checkpointed, rows, seed):
    layer, x, dy = random_problem((64, MANY, 8, 2), True, torch.float32, (rows,), seed, near_one=True)
    layer.boft_dropout = 0.0
    inputs = (x, layer.boft_R, layer.boft_s)

    def output():
        y = layer(x)
        change(y)
        return y

    y = checkpoint(output, use_reentrant=False) if checkpointed else output()
    ours = torch.autograd.grad(y, inputs, dy, retain_graph=not checkpointed)
    # Many rows are multiplied in parts, whose sums may be in another order.
    assert_equal = assert_same if rows < 512 else assert_near
    if not checkpointed:
        assert_equal(ours, torch.autograd.grad(y, inputs, dy, create_graph=True))
    in_parts(layer)
    assert_near(ours, torch.autograd.grad(output(), inputs, dy))


def test_an_output_that_the_next_operation_saves_is_saved_once():
    layer = make_layer((64, 96, 8, 2), near_one=True)
    storages = set()

    def pack(tensor):
        if tensor.shape[0] == 300:
            storages.add(tensor.data_ptr())
        return tensor

    x = torch.randn(300, 64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
        torch.nn.functional.silu(y)
    assert storages == {x.data_ptr(), y.data_ptr()}


# Enough rows for threads to take parts of them through the layer: two, four, and parts of different sizes. Still
# fewer than outputs, so that the layer is not merged for them (test_linear_merged.py).
@pytest.mark.parametrize("rows", [(512,), (1, 1037), (3, 700)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@near_one
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_many_rows(shape, dtype, near_one, bias, rows, seed):
    d, _, b, m = shape
    layer, x, dy = random_problem((d, math.prod(rows) + 8, b, m), bias, dtype, rows, seed, near_one)
    ours = run_with_threads(layer, x, dy)
    in_parts(layer)
    # A product of fewer rows may be summed in another order.
    near = functools.partial(assert_near, dtype=dtype)
    assert_as_in_parts(ours, run(layer, x, dy), near_one, dtype, near)
    with torch.no_grad():
        layer.eval()
        separate = layer(x)
        layer.base_layer._forward_pre_hooks.clear()
        near([layer(x)], [separate])


@pytest.mark.parametrize("need_x", [False, True])
@pytest.mark.parametrize("need_R", [False, True])
@pytest.mark.parametrize("need_s", [False, True])
@pytest.mark.parametrize("rows", [9, 600])
@near_one
def test_only_what_is_needed(near_one, rows, need_x, need_R, need_s):
    layer = make_layer((32, MANY, 4, 2), near_one=near_one)
    layer.boft_R.requires_grad_(need_R)
    layer.boft_s.requires_grad_(need_s)
    x, dy = torch.randn(rows, 32, requires_grad=need_x), torch.randn(rows, MANY)
    ours = run(layer, x, dy)
    assert [tensor is not None for tensor in ours] == [True, need_x, need_R, need_s]
    in_parts(layer)
    assert_as_in_parts(ours, run(layer, x, dy), near_one, x.dtype)


@pytest.mark.parametrize("rows", [9, 200])
def test_strides_do_not_matter(rows):
    layer = make_layer((32, MANY, 4, 2))
    x = torch.randn(32, 5, rows).permute(2, 1, 0).requires_grad_()
    shape = (rows, 5, MANY)
    for dy in (torch.randn(1, MANY).expand(shape), torch.randn(MANY, 5, rows).permute(2, 1, 0), torch.ones(()).expand(shape)):
        ours = run(layer, x, dy)
        handle = in_parts(layer)
        assert_same(ours, run(layer, x, dy))
        handle.remove()


@near_one
def test_gradients_by_finite_differences(near_one):
    layer = make_layer(dtype=torch.float64, near_one=near_one)
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *parameters: layer(x), (x, layer.boft_R, layer.boft_s))


@near_one
def test_a_graph_used_twice_gives_the_same_gradients(near_one):
    layer, x, dy = make_layer(near_one=near_one), torch.randn(9, 32, requires_grad=True), torch.randn(9, 24)
    wanted = dy.clone()
    inputs = (x, layer.boft_R, layer.boft_s)
    y = layer(x)
    first = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    assert torch.equal(dy, wanted)
    assert_same(first, torch.autograd.grad(y, inputs, dy))


def test_gradients_that_others_hold_stay_as_they_are():
    layer, following = make_layer(), nn.Linear(24, 24)
    x = torch.randn(9, 32, requires_grad=True)
    seen = []
    y = layer(x)
    y.register_hook(lambda gradient: seen.append((gradient, gradient.clone())))
    following(y).square().sum().backward()
    assert len(seen) == 1 and torch.equal(*seen[0])


@near_one
def test_a_second_derivative_is_refused(near_one):
    layer, x = make_layer(near_one=near_one), torch.randn(9, 32, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="derivative for boft::"):
        dx.sum().backward()


@pytest.mark.parametrize("changed", ["x", "boft_R", "boft_s", "weight"])
def test_a_change_before_backward_is_noticed(changed):
    layer, x = make_layer(), torch.randn(9, 32)
    y = layer(x)
    with torch.no_grad():
        {"x": x, "weight": layer.weight, **dict(layer.named_parameters())}[changed].add_(1)
    if changed == "boft_R":  # its blocks are kept, as by the operators one by one
        y.sum().backward()
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@near_one
def test_kernels_withdrawn_between_forward_and_backward(near_one):
    layer, x, dy = make_layer(near_one=near_one), torch.randn(9, 32, requires_grad=True), torch.randn(9, 24)
    wanted = run(layer, x, dy)[1:]
    y = layer(x)
    with boft_ext.ops.without_kernels():
        gradients = torch.autograd.grad(y, (x, layer.boft_R, layer.boft_s), dy)
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("reentrant", [False, True])
@near_one
def test_checkpointing(near_one, reentrant):
    layer, x, dy = make_layer(dropout=0.5, near_one=near_one), torch.randn(9, 32, requires_grad=True), torch.randn(9, 24)
    wanted = run(layer, x, dy)[1:]
    torch.manual_seed(0)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    layer.boft_R.grad = layer.boft_s.grad = None
    y.backward(dy)
    assert_same([x.grad, layer.boft_R.grad, layer.boft_s.grad], wanted)


@near_one
def test_saved_tensors_go_through_hooks(near_one):
    layer, x, dy = make_layer(near_one=near_one), torch.randn(9, 32, requires_grad=True), torch.randn(9, 24)
    wanted = run(layer, x, dy)[1:]
    kept = []

    def pack(tensor):
        kept.append(tensor.clone())
        return len(kept) - 1

    with torch.autograd.graph.saved_tensors_hooks(pack, kept.__getitem__):
        y = layer(x)
    assert any(torch.equal(tensor, x) for tensor in kept if tensor.shape == x.shape)
    assert_same(torch.autograd.grad(y, (x, layer.boft_R, layer.boft_s), dy), wanted)


@pytest.mark.parametrize("frozen", ["boft_R", "boft_s"])
@near_one
def test_nothing_large_is_saved_for_a_frozen_parameter(near_one, frozen):
    layer = make_layer((64, 64, 8, 2), near_one=near_one)
    getattr(layer, frozen).requires_grad_(False)
    large = []

    def pack(tensor):
        large.extend([tuple(tensor.shape)] if tensor.shape[0] == 300 else [])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(torch.randn(300, 64, requires_grad=True))
    assert large == [(300, 64)]


@near_one
def test_the_graph_dies_with_its_output(near_one):
    layer, x = make_layer(near_one=near_one), torch.randn(9, 32)
    alive = weakref.ref(x)
    y = layer(x)
    del x
    assert alive() is not None
    y.sum().backward()
    del y
    gc.collect()
    assert alive() is None


def test_autocast_and_inference_inputs():
    layer, x = make_layer(), torch.randn(9, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32
    with torch.inference_mode():
        made = torch.randn(9, 32)
    with pytest.raises(RuntimeError, match="[Ii]nference tensors cannot be saved"):
        layer(made)


def test_errors_are_those_of_the_parts():
    layer = make_layer()
    wrong_inputs = (torch.randn(5, 31), torch.randn(5, 32).long(), torch.randn(5, 32, dtype=torch.float64))
    raised = []
    for _ in range(2):
        for wrong in wrong_inputs:
            with pytest.raises((ValueError, TypeError, RuntimeError)) as error:
                layer(wrong)
            raised.append((error.type, str(error.value)))
        in_parts(layer)
    assert raised[:3] == raised[3:]
