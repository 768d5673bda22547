"""A linear layer with more rows than outputs, which goes through its merged weight: as exact as torch."""

import copy

import pytest
import torch
from linear_layers import DTYPES, assert_near, in_parts, make_layer, random_problem, run, run_with_threads
from tolerance import assert_as_exact_as_torch, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import boft_ext
from boft_ext import reference

# (d, out, b, m): groups in lanes, of one vector, two vectors, more, with rests, one factor, odd b; sizes that
# the core multiplies, in one slice and in several, of groups that do not divide a slice; and several levels, which go on
# rotating the input.
SHAPES = [
    *[(32, 24, 4, 2), (64, 48, 8, 2), (64, 40, 8, 3), (80, 17, 20, 3), (40, 24, 10, 2), (30, 8, 5, 1), (96, 33, 2, 4)],
    *[(64, 96, 8, 2), (320, 160, 40, 2), (256, 800, 8, 2)],
    (512, 16, 2, 9),
]


def rotated(layer, x):
    """`layer` in plain torch by its rotated input (paper equation 5), rounded after every operation."""
    z = nn.functional.linear(reference.rotate(x, layer.boft_R), layer.weight, layer.bias)
    return reference.scale(z, layer.boft_s.flatten(), layer.bias)


def merged(layer, x):
    """`layer` in plain torch by its merged weight (PEFT `Linear.forward`), rounded to the dtype as there."""
    rotation = reference.rotate(torch.eye(x.shape[-1], dtype=layer.boft_R.dtype), layer.boft_R)
    weight = layer.boft_s * (layer.weight.to(rotation.dtype) @ rotation.T)
    return nn.functional.linear(x, weight.to(x.dtype), layer.bias)


def step(form, layer, x, dy):
    """Output and gradients of x, boft_R and boft_s."""
    x = x.detach().requires_grad_()
    y = form(layer, x)
    return [y.detach(), *torch.autograd.grad(y, (x, layer.boft_R, layer.boft_s), dy)]


def check(layer, x, dy, ours):
    """`ours`, made without dropout, is as exact as torch is in that dtype in the less exact of two forms."""
    forms = [step(form, layer, x, dy) for form in (rotated, merged)]
    exact = step(merged, copy.deepcopy(layer).double(), x.double(), dy.double())
    for name, own, *theirs, wanted in zip(("y", "dx", "dR", "ds"), ours, *forms, exact, strict=True):
        assert own.dtype == theirs[0].dtype
        assert_as_exact_as_torch(name, own, max(theirs, key=lambda one: relative_error(one, wanted)), wanted)


def problem(shape, bias, dtype, rows, seed, near_one=True):
    layer, x, dy = random_problem(shape, bias, dtype, rows, seed, near_one)
    layer.boft_dropout = 0.0
    return layer, x, dy


@pytest.mark.parametrize("rows", [(512,), (3, 700)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("near_one", [False, True], ids=["any scale", "scale near 1"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_torch(shape, dtype, near_one, bias, rows, seed):
    layer, x, dy = problem(shape, bias, dtype, rows, seed, near_one)
    check(layer, x, dy, run_with_threads(layer, x, dy))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("variant", boft_ext._C.cpu_variants())
@pytest.mark.parametrize("shape", [(64, 48, 8, 2), (64, 96, 8, 2)], ids=str)
def test_variants(shape, variant, dtype, seed):
    layer, x, dy = problem(shape, True, dtype, (600,), seed)
    with boft_ext.ops.cpu_variant(variant):
        ours = run(layer, x, dy)
    check(layer, x, dy, ours)


@pytest.fixture(params=[True, False], ids=["oneDNN", "torch's product"])
def onednn(request):
    """Whether oneDNN and the core multiply float32, which without the fixture depends on the processor."""
    before, core = boft_ext._C.onednn_products(), boft_ext._C.core_products()
    chosen = boft_ext._C.onednn_products(request.param)
    # oneDNN multiplies float32 for torch where it can multiply bfloat16.
    assert chosen == (request.param and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    assert boft_ext._C.core_products(request.param) == request.param
    yield chosen
    boft_ext._C.onednn_products(before)
    boft_ext._C.core_products(core)


# The third has more outputs than rows: these products gain enough for it to be merged too. The fourth is one that the
# core multiplies. The last ones are so deep that they are packed in more than two slices, of channels or of outputs.
@pytest.mark.parametrize(
    ("shape", "rows"),
    [
        *[((64, 48, 8, 2), 600), ((80, 17, 20, 3), 600), ((256, 700, 8, 2), 600), ((256, 800, 8, 2), 1001)],
        *[((2304, 24, 8, 2), 600), ((8, 2300, 8, 1), 2300)],
    ],
    ids=str,
)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_both_products(onednn, shape, rows, bias, seed):
    layer, x, dy = problem(shape, bias, torch.float32, (rows,), seed)
    check(layer, x, dy, run_with_threads(layer, x, dy))


def test_torch_may_be_told_not_to_use_onednn(onednn):
    with torch.backends.mkldnn.flags(enabled=False):
        assert not boft_ext._C.onednn_products()
        assert not boft_ext._C.core_products()
        assert boft_ext.build_info()["float32_products"] == "torch"


@pytest.mark.parametrize("shape", [(8, 6, 2, 2), (16, 4, 8, 2), (12, 5, 3, 1)], ids=str)
def test_gradients_by_finite_differences(shape, seed):
    torch.manual_seed(seed)
    layer = make_layer(shape, dtype=torch.float64, near_one=True)
    x = torch.randn(512, shape[0], dtype=torch.float64) / 512**0.5
    assert torch.autograd.gradcheck(lambda *parameters: layer(x), (layer.boft_R, layer.boft_s), fast_mode=True)
    direction = torch.randn_like(x)

    def along(step):
        return layer(x + step * direction)

    assert torch.autograd.gradcheck(along, torch.zeros((), dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_strides_and_threads(threads, seed):
    torch.manual_seed(seed)
    layer = make_layer(near_one=True)
    x = torch.randn(32, 3, 400).permute(2, 1, 0).requires_grad_()
    shape = (400, 3, 24)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dy in (torch.randn(1, 24).expand(shape), torch.randn(24, 3, 400).permute(2, 1, 0)):
            ours = run(layer, x, dy)
            handle = in_parts(layer)
            assert_near(ours, run(layer, x, dy))
            handle.remove()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("near_one", [False, True], ids=["any scale", "scale near 1"])
def test_dropout(near_one, seed):
    layer, x, dy = random_problem((64, 48, 8, 2), True, torch.float64, (600,), seed, near_one)
    ours = run(layer, x, dy)
    in_parts(layer)
    assert_near(ours, run(layer, x, dy))


def test_a_scale_of_zero(seed):
    layer, x, dy = random_problem((64, 48, 8, 2), True, torch.float32, (600,), seed)
    with torch.no_grad():
        layer.boft_s[5] = 0
    ours = run(layer, x, dy)
    in_parts(layer)
    assert_near(ours, run(layer, x, dy))


@pytest.mark.parametrize("need_x", [False, True])
@pytest.mark.parametrize("need_R", [False, True])
@pytest.mark.parametrize("need_s", [False, True])
@pytest.mark.parametrize("near_one", [False, True], ids=["any scale", "scale near 1"])
def test_only_what_is_needed(near_one, need_s, need_R, need_x, seed):
    layer, x, dy = problem((64, 48, 8, 2), True, torch.float32, (600,), seed, near_one)
    layer.boft_R.requires_grad_(need_R)
    layer.boft_s.requires_grad_(need_s)
    ours = run(layer, x.detach().requires_grad_(need_x), dy)
    assert [tensor is not None for tensor in ours] == [True, need_x, need_R, need_s]
    in_parts(layer)
    assert_near(ours, run(layer, x.detach().requires_grad_(need_x), dy))


@pytest.mark.parametrize("change", [nn.ReLU(inplace=True), lambda y: y.add_(1), lambda y: y.detach().mul_(2)])
def test_an_output_may_be_changed_in_place(change, seed):
    layer, x, dy = problem((64, 48, 8, 2), True, torch.float32, (600,), seed)
    inputs = (x, layer.boft_R, layer.boft_s)
    gradients = []
    for recorded in (False, True):
        y = layer(x)
        change(y)
        gradients.append(torch.autograd.grad(y, inputs, dy, create_graph=recorded))
    in_parts(layer)
    y = layer(x)
    change(y)
    wanted = torch.autograd.grad(y, inputs, dy)
    for ours in gradients:
        assert_near(ours, wanted)


def test_training_and_evaluation_agree_bit_for_bit(seed):
    layer, x, _ = problem((64, 48, 8, 2), True, torch.bfloat16, (600,), seed)
    trained = layer(x)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), trained)


def test_what_is_saved_is_the_input_and_the_output(seed):
    layer, x, _ = problem((64, 48, 8, 2), True, torch.float32, (600,), seed)
    large = []

    def pack(tensor):
        large.extend([tuple(tensor.shape)] if tensor.numel() > 64 * 48 else [])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert sorted(large) == [(600, 48), (600, 64)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant, seed):
    layer, x, dy = random_problem((64, 48, 8, 2), True, torch.float32, (600,), seed, near_one=True)
    wanted = run(layer, x, dy)[1:]
    torch.manual_seed(0)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    layer.boft_R.grad = layer.boft_s.grad = None
    y.backward(dy)
    for ours, theirs in zip((x.grad, layer.boft_R.grad, layer.boft_s.grad), wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_it_trains_what_the_merged_layer_then_computes(seed):
    layer, x, _ = problem((64, 48, 8, 2), True, torch.float32, (600,), seed)
    wanted = copy.deepcopy(layer)
    wanted.merge()
    assert_near([layer(x).detach()], [wanted(x).detach()])
