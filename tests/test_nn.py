"""BOFTLinear and BOFTConv2d against dense mathematics: forward, gradients, merging, copies, bad input."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from boft_ext import reference
from boft_ext.config import BOFTConfig
from boft_ext.nn import BOFTConv2d, BOFTLinear


def random_config(b, m, **kwargs):
    return BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, init_weights=False, **kwargs)


def dense_rotation(boft_R):
    """R from its definition: orthogonal blocks placed in d x d matrices by index, multiplied from factor 0 up."""
    m, blocks, b, _ = boft_R.shape
    d = blocks * b
    eye = torch.eye(b, dtype=boft_R.dtype)
    s = (boft_R - boft_R.mT) / 2
    q = (eye - s) @ torch.linalg.inv(eye + s)
    rotation = torch.eye(d, dtype=boft_R.dtype)
    for i in range(m):
        factor = torch.zeros(d, d, dtype=boft_R.dtype)
        for n in range(blocks):
            channels = torch.arange(n * b, n * b + b)
            if i > 0:
                first = (n >> i) * 2 ** (i + 1) + (n & (2**i - 1))
                channels = torch.cat([torch.arange(b // 2) + chunk * (b // 2) for chunk in (first, first + 2**i)])
            factor = factor.index_put((channels[:, None], channels[None, :]), q[i, n])
        rotation = factor @ rotation
    return rotation


def dense_weight(layer):
    """diag(s) W R^T in float64; the rows of a group of a convolution meet that group's part of R."""
    weight = layer.base_layer.weight.detach().double()
    rotation = dense_rotation(layer.boft_R.double())
    groups = getattr(layer.base_layer, "groups", 1)
    parts = weight.flatten(1).chunk(groups)
    size = parts[0].shape[1]
    rotated = [w @ rotation[i * size : (i + 1) * size, i * size : (i + 1) * size].T for i, w in enumerate(parts)]
    return (torch.cat(rotated) * layer.boft_s.double().reshape(-1, 1)).view(weight.shape)


def dense_linear(layer, x):
    bias = layer.bias
    return F.linear(x.double(), dense_weight(layer), None if bias is None else bias.double())


def dense_conv(layer, x):
    conv = copy.deepcopy(layer.base_layer).double()
    return torch.func.functional_call(conv, {"weight": dense_weight(layer)}, (x.double(),))


def relative_error(a, b):
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


LINEARS = [(16, 8, 4, 1, True), (15, 6, 5, 1, False), (24, 5, 4, 2, True), (32, 7, 4, 4, True), (48, 9, 6, 3, False)]
CONVS = {
    "square": dict(kernel_size=3, padding=1),
    "non-square": dict(kernel_size=(2, 3), stride=(1, 2), padding=(0, 1)),
    "same": dict(kernel_size=(3, 2), padding="same", dilation=2),
    "reflect": dict(kernel_size=3, padding=2, padding_mode="reflect"),
    "circular": dict(kernel_size=(1, 3), padding=(0, 1), padding_mode="circular", bias=False),
    "strided": dict(kernel_size=2, stride=2, dilation=(1, 2)),
    "groups": dict(kernel_size=(3, 2), groups=2, padding=1),
    "wide": dict(kernel_size=(4, 2), groups=2, padding=(2, 1)),
    "depthwise": dict(kernel_size=(2, 4), groups=8),
}
PRECISIONS = [(torch.float64, 1e-10), (torch.float32, 1e-5)]


def make_linear(d, out, b, m, bias=True, dtype=torch.float32, **kwargs):
    return BOFTLinear.from_linear(nn.Linear(d, out, bias=bias, dtype=dtype), random_config(b, m, **kwargs))


def make_conv(options, m=2, dtype=torch.float32, **kwargs):
    return BOFTConv2d.from_conv(nn.Conv2d(8, 8, dtype=dtype, **options), random_config(4, m, **kwargs))


@pytest.mark.parametrize("dtype, limit", PRECISIONS)
@pytest.mark.parametrize("d, out, b, m, bias", LINEARS)
def test_linear_matches_dense_mathematics(d, out, b, m, bias, dtype, limit):
    layer = make_linear(d, out, b, m, bias, dtype)
    assert layer.boft_R.shape == (m, d // b, b, b) and layer.boft_s.shape == (out, 1)
    x = torch.randn(2, 5, d, dtype=dtype, requires_grad=True)
    inputs = (x, layer.boft_R, layer.boft_s)
    y, exact = layer(x), dense_linear(layer, x)
    assert y.dtype == dtype and y.shape == (2, 5, out)
    assert relative_error(y, exact) < limit
    dy = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(exact, inputs, dy.double())):
        assert relative_error(ours, theirs) < limit


@pytest.mark.parametrize("dtype, limit", PRECISIONS)
@pytest.mark.parametrize("name", CONVS)
def test_conv_matches_dense_mathematics(name, dtype, limit):
    layer = make_conv(CONVS[name], m=3 if name == "wide" else 2, dtype=dtype)
    kh, kw = layer.base_layer.kernel_size
    assert layer.boft_R.shape[1] * 4 == 8 * kh * kw and layer.boft_s.shape == (1, 8)
    x = torch.randn(3, 8, 9, 11, dtype=dtype, requires_grad=True)
    inputs = (x, layer.boft_R, layer.boft_s)
    y, exact = layer(x), dense_conv(layer, x)
    assert y.dtype == dtype and y.shape == layer.base_layer(x).shape
    assert relative_error(y, exact) < limit
    dy = torch.randn_like(y)
    for ours, theirs in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(exact, inputs, dy.double())):
        assert relative_error(ours, theirs) < limit


def test_conv_takes_unbatched_input():
    layer = make_conv(CONVS["non-square"])
    x = torch.randn(8, 9, 11)
    torch.testing.assert_close(layer(x), layer(x[None])[0])


def test_linear_matches_reference():
    layer = make_linear(32, 6, 4, 3, dtype=torch.float64)
    x = torch.randn(7, 32, dtype=torch.float64)
    rotated = reference.rotate(x, layer.boft_R)
    expected = reference.scale(layer.base_layer(rotated), layer.boft_s.flatten(), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_gradients_by_finite_differences(kind):
    if kind == "linear":
        layer, shape = make_linear(8, 3, 2, 2, dtype=torch.float64), (2, 8)
    else:
        layer, shape = make_conv(CONVS["groups"], dtype=torch.float64), (1, 8, 3, 3)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    parameters = {name: getattr(layer, name).detach().clone().requires_grad_() for name in ("boft_R", "boft_s")}

    def call(x, *values):
        return torch.func.functional_call(layer, dict(zip(parameters, values)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters.values()))


def test_training_bias_gets_its_gradient():
    layer = make_linear(16, 5, 4, 2, dtype=torch.float64, bias=True)
    layer.bias.requires_grad_(True)
    x, dy = torch.randn(6, 16, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    layer(x).backward(dy)
    torch.testing.assert_close(layer.bias.grad, dy.sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_new_adapter_changes_nothing(dtype):
    linear, conv = nn.Linear(16, 6, dtype=dtype), nn.Conv2d(8, 6, 3, dtype=dtype)
    config = BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2)
    x, image = torch.randn(3, 16, dtype=dtype), torch.randn(2, 8, 5, 5, dtype=dtype)
    before = linear(x), conv(image)
    layers = BOFTLinear.from_linear(linear, config), BOFTConv2d.from_conv(conv, config)
    for layer, base, value, expected in zip(layers, (linear, conv), (x, image), before):
        assert layer.base_layer is base
        assert torch.equal(layer(value), expected)
        assert not layer.boft_R.any() and bool((layer.boft_s == 1).all())
        assert layer.boft_R.dtype == layer.boft_s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_only_the_adapter_trains():
    for bias, trained in [("none", set()), ("boft_only", {"base_layer.bias"}), ("all", {"base_layer.bias"})]:
        layer = BOFTLinear.from_linear(nn.Linear(16, 6), random_config(4, 1, bias=bias))
        names = {name for name, p in layer.named_parameters() if p.requires_grad}
        assert names == {"boft_R", "boft_s"} | trained
    frozen = BOFTLinear.from_linear(nn.Linear(16, 6), random_config(4, 1, bias="all", inference_mode=True))
    assert not any(p.requires_grad for p in frozen.parameters())


def test_optimiser_steps_lower_the_loss():
    target, x = torch.randn(64, 4), torch.randn(64, 16)
    layer = BOFTLinear.from_linear(nn.Linear(16, 4), BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2))
    weight = layer.weight.clone()
    optimiser = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(40):
        loss = F.mse_loss(layer(x), target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert torch.equal(layer.weight, weight)


def test_attributes_that_model_code_reads():
    linear, conv = nn.Linear(16, 6), nn.Conv2d(8, 4, 3)
    config = random_config(4, 2)
    ours, convolution = BOFTLinear.from_linear(linear, config), BOFTConv2d.from_conv(conv, config)
    assert ours.weight is linear.weight and ours.bias is linear.bias
    assert convolution.weight is conv.weight and convolution.bias is conv.bias
    assert (ours.in_features, ours.out_features) == (16, 6)
    assert (convolution.in_features, convolution.out_features) == (8, 4)
    assert BOFTLinear.from_linear(nn.Linear(16, 6, bias=False), config).bias is None
    assert "block_size=4, block_num=4, n_butterfly_factor=2" in repr(ours)
    ours.merge()
    assert "merged" in repr(ours)


def test_pefts_configuration_is_accepted():
    peft = pytest.importorskip("peft")
    theirs = peft.BOFTConfig(boft_block_size=0, boft_block_num=4, boft_n_butterfly_factor=2, boft_dropout=0.25)
    layer = BOFTLinear.from_linear(nn.Linear(16, 6), theirs)
    assert layer.boft_R.shape == (2, 4, 4, 4)


@pytest.mark.filterwarnings("ignore")
def test_random_start_is_pefts(seed):
    peft = pytest.importorskip("peft")
    config = peft.BOFTConfig(boft_block_size=4, init_weights=False, target_modules=["0"])
    torch.manual_seed(seed)
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(16, 6)), config).base_model.model[0]
    torch.manual_seed(seed)
    ours = BOFTLinear.from_linear(nn.Sequential(nn.Linear(16, 6))[0], config)
    assert torch.equal(ours.boft_R, theirs.boft_R["default"])
    assert torch.equal(ours.boft_s, theirs.boft_s["default"])


@pytest.mark.parametrize("p", [0.25, 0.5, 1.0])
def test_dropout_replaces_blocks_by_the_identity(p):
    layer = make_linear(32, 32, 4, 1, bias=False, dtype=torch.float64, boft_dropout=p)
    nn.init.eye_(layer.base_layer.weight)
    nn.init.ones_(layer.boft_s)
    x = torch.randn(5, 32, dtype=torch.float64)
    layer.train()
    y = layer(x)
    untouched = (y == x).view(5, 8, 4).all(-1).all(0)
    assert int(untouched.sum()) == int(p * 8)
    (grad,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), layer.boft_R)
    assert torch.equal(grad[0].flatten(1).any(1), ~untouched)
    layer.eval()
    torch.testing.assert_close(layer(x), dense_linear(layer, x))
    assert not (layer(x) == x).view(5, 8, 4).all(-1).any()


@pytest.mark.filterwarnings("ignore")
def test_dropout_draws_as_peft_does(seed):
    peft = pytest.importorskip("peft")
    config = peft.BOFTConfig(boft_block_size=4, init_weights=False, boft_dropout=0.5, target_modules=["0"])
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(32, 6)), config).base_model.model[0].train()
    ours = BOFTLinear.from_linear(copy.deepcopy(theirs.base_layer), config).train()
    ours.load_state_dict({"boft_R": theirs.boft_R["default"], "boft_s": theirs.boft_s["default"]}, strict=False)
    x = torch.randn(3, 32)
    for draw in range(5):
        results = []
        for layer in (ours, theirs):
            torch.manual_seed(seed + draw)
            results.append(layer(x))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", CONVS)
def test_merged_conv_equals_unmerged(name):
    layer = make_conv(CONVS[name]).eval()
    x = torch.randn(2, 8, 9, 11)
    check_merge(layer, x)


@pytest.mark.parametrize("d, out, b, m, bias", LINEARS)
def test_merged_linear_equals_unmerged(d, out, b, m, bias):
    check_merge(make_linear(d, out, b, m, bias).eval(), torch.randn(4, d))


def check_merge(layer, x):
    original = layer.weight.clone()
    y = layer(x)
    for safe in (False, True):
        layer.merge(safe_merge=safe)
        assert layer.merged and layer.weight.is_contiguous() and not torch.equal(layer.weight, original)
        torch.testing.assert_close(layer(x), y, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer.base_layer(x), y, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            layer.weight.double(), dense_weight_of_unmerged(layer, original), rtol=1e-6, atol=1e-6
        )
        layer.unmerge()
        assert not layer.merged
        torch.testing.assert_close(layer.weight, original, rtol=1e-6, atol=1e-6)


def dense_weight_of_unmerged(layer, original):
    plain = copy.deepcopy(layer)
    plain.base_layer.weight.data.copy_(original)
    return dense_weight(plain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_16_bit_unmerge_restores_bit_for_bit(kind, dtype):
    layer = make_linear(32, 16, 4, 3, dtype=dtype) if kind == "linear" else make_conv(CONVS["groups"], dtype=dtype)
    layer.boft_s.data.view(-1)[1] = 0
    original = layer.weight.clone()
    for _ in range(3):
        layer.merge()
        exact = dense_weight_of_unmerged(layer, original)
        torch.testing.assert_close(layer.weight, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
        layer.unmerge()
        assert torch.equal(layer.weight, original)


def test_the_kept_original_is_not_copied_or_saved():
    layer = make_linear(64, 64, 4, 2, dtype=torch.bfloat16)

    def pickled(module):
        buffer = io.BytesIO()
        torch.save(module, buffer)
        return buffer.getbuffer().nbytes

    keys, size = layer.state_dict().keys(), pickled(layer)
    layer.merge()
    assert layer.state_dict().keys() == keys
    assert pickled(layer) < size + 1024
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.merged and torch.equal(twin.weight, layer.weight)
        twin.unmerge()
    original = twin.weight
    layer.unmerge()
    torch.testing.assert_close(original, layer.weight, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_scale_is_refused_before_a_merge_that_could_not_be_undone(dtype):
    layer = make_linear(16, 6, 4, 2, dtype=dtype)
    layer.boft_s.data[4] = 0
    original = layer.weight.clone()
    with pytest.raises(ValueError, match="output 4"):
        layer.merge()
    assert not layer.merged and torch.equal(layer.weight, original)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parameter", ["boft_R", "boft_s"])
def test_safe_merge_refuses_nan(parameter, dtype):
    layer = make_linear(16, 6, 4, 2, dtype=dtype)
    getattr(layer, parameter).data.view(-1)[1] = float("nan")
    original = layer.weight.clone()
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=True)
    assert not layer.merged and torch.equal(layer.weight, original)


def test_merging_twice_only_warns():
    layer = make_linear(16, 6, 4, 2)
    with pytest.warns(UserWarning, match="not merged"):
        layer.unmerge()
    layer.merge()
    merged = layer.weight.clone()
    with pytest.warns(UserWarning, match="merged already"):
        layer.merge()
    assert torch.equal(layer.weight, merged)


class PackedLinear(nn.Linear):
    """Like a quantised layer: integers in `weight`, its own forward."""

    def __init__(self, d, out):
        super().__init__(d, out, bias=False)
        packed = (self.weight.detach() * 64).round().clamp(-127, 127).to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) / 64)


def test_quantised_layers_work_unmerged():
    layer = BOFTLinear.from_linear(PackedLinear(16, 6), random_config(4, 2))
    x = torch.randn(3, 16)
    y = layer(x)
    y.sum().backward()
    assert bool(layer.boft_R.grad.any())
    expected = F.linear(x @ dense_rotation(layer.boft_R), layer.weight / 64) * layer.boft_s.flatten()
    torch.testing.assert_close(y, expected)
    packed = layer.weight.clone()
    with pytest.raises(ValueError, match="int8"):
        layer.merge()
    assert not layer.merged and torch.equal(layer.weight, packed)


def test_extra_arguments_reach_the_base_layer():
    class Doubling(nn.Linear):
        def forward(self, x, factor=1):
            return super().forward(x) * factor

    layer = BOFTLinear.from_linear(Doubling(16, 6, bias=False), random_config(4, 2))
    x = torch.randn(3, 16)
    torch.testing.assert_close(layer(x, factor=2), 2 * layer(x))


BAD = [
    (nn.Linear(10, 4), {"boft_block_size": 4}, ValueError, "10 channels.*4"),
    (nn.Linear(15, 4), {"boft_block_size": 5, "boft_n_butterfly_factor": 2}, ValueError, "even block size, got 5"),
    (nn.Linear(24, 4), {"boft_block_size": 4, "boft_n_butterfly_factor": 3}, ValueError, "at most m = 2"),
    (nn.Conv2d(3, 4, 3), {"boft_block_size": 4}, ValueError, "27 channels.*4"),
    (nn.Conv2d(4, 4, 3, groups=2), {"boft_block_size": 4}, ValueError, "36 .*groups = 2 of 18.* = 4"),
    (
        nn.Conv2d(8, 8, 1, groups=2),
        {"boft_block_size": 2, "boft_n_butterfly_factor": 3},
        ValueError,
        "groups = 2 of 4",
    ),
    (nn.Embedding(8, 8), {}, TypeError, "Embedding"),
    (nn.ConvTranspose2d(4, 4, 2), {}, TypeError, "ConvTranspose2d"),
    (nn.LazyLinear(4), {}, ValueError, "0 channels"),
]


@pytest.mark.filterwarnings("ignore:Lazy modules")
@pytest.mark.parametrize(
    "base, settings, error, text", BAD, ids=[f"{type(case[0]).__name__}-{i}" for i, case in enumerate(BAD)]
)
def test_unsuitable_layers_are_refused_and_unchanged(base, settings, error, text):
    make = BOFTConv2d.from_conv if "Conv" in type(base).__name__ else BOFTLinear.from_linear
    with pytest.raises(error, match=text):
        make(base, BOFTConfig(**settings))
    assert all(p.requires_grad for p in base.parameters())


def test_configurations_of_other_kinds_are_refused():
    for config in (None, {"boft_block_size": 4}):
        with pytest.raises((TypeError, ValueError)):
            BOFTLinear.from_linear(nn.Linear(8, 8), config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_layer_and_adapter(dtype):
    layer = make_linear(32, 16, 4, 2)
    x = torch.randn(4, 32)
    exact = dense_linear(layer, x)
    layer.to(dtype)
    assert layer.boft_R.dtype == dtype
    y = layer(x.to(dtype))
    assert y.dtype == dtype and relative_error(y, exact) < 20 * torch.finfo(dtype).eps
    y.sum().backward()
    assert layer.boft_R.grad.dtype == dtype


def test_autocast():
    layer = make_linear(32, 16, 4, 2)
    x = torch.randn(4, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16 and layer.boft_R.dtype == torch.float32
    assert relative_error(y, dense_linear(layer, x)) < 0.02
    y.float().sum().backward()
    assert layer.boft_R.grad.dtype == torch.float32


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_evaluation_follows_every_change_of_the_parameter(kind):
    layer = make_linear(16, 6, 4, 2) if kind == "linear" else make_conv(CONVS["square"])
    dense = dense_linear if kind == "linear" else dense_conv
    x = torch.randn(3, 16) if kind == "linear" else torch.randn(2, 8, 5, 5)
    layer.eval()
    with torch.no_grad():
        for _ in range(3):
            assert relative_error(layer(x), dense(layer, x)) < 1e-5
            assert relative_error(layer(x), dense(layer, x)) < 1e-5
            layer.boft_R.data.copy_(torch.randn_like(layer.boft_R))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_copies_and_state_dict(kind):
    layer = make_linear(16, 6, 4, 2) if kind == "linear" else make_conv(CONVS["same"])
    x = torch.randn(3, 16) if kind == "linear" else torch.randn(2, 8, 5, 5)
    with torch.no_grad():
        y = layer(x)
    assert set(layer.state_dict()) == {"boft_R", "boft_s", "base_layer.weight", "base_layer.bias"}
    fresh = make_linear(16, 6, 4, 2) if kind == "linear" else make_conv(CONVS["same"])
    fresh.load_state_dict(layer.state_dict())
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        with torch.no_grad():
            assert torch.equal(twin(x), y)
            twin.boft_R.zero_()
            assert not torch.equal(twin(x), y)
            assert torch.equal(layer(x), y)


def test_meta_layer_gets_its_values_later():
    with torch.device("meta"):
        linear = nn.Linear(16, 6)
    layer = BOFTLinear.from_linear(linear, random_config(4, 2))
    assert layer.boft_R.is_meta and layer.boft_R.shape == (2, 4, 4, 4)


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("backend, dropout", [("inductor", 0.0), ("aot_eager", 0.5)])
def test_compile_traces_forward_and_backward(kind, backend, dropout, seed):
    if kind == "linear":
        layer, x = make_linear(16, 6, 4, 2, boft_dropout=dropout), torch.randn(3, 16)
    else:
        layer, x = make_conv(CONVS["reflect"], boft_dropout=dropout), torch.randn(2, 8, 5, 5)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    results = []
    for call in (layer, compiled):
        torch.manual_seed(seed)
        layer.zero_grad()
        y = call(x)
        y.square().sum().backward()
        results.append((y.detach(), layer.boft_R.grad.clone(), layer.boft_s.grad.clone()))
    for eager, traced in zip(*results):
        torch.testing.assert_close(traced, eager, rtol=1e-4, atol=1e-5)


def test_gradient_checkpointing_with_dropout(seed):
    layer = make_linear(32, 6, 4, 2, boft_dropout=0.5).train()
    x = torch.randn(3, 32, requires_grad=True)
    grads = []
    for use in (None, False, True):
        torch.manual_seed(seed)
        layer.zero_grad()
        y = layer(x) if use is None else torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=use)
        y.square().sum().backward()
        grads.append(layer.boft_R.grad.clone())
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])


def test_merge_and_forward_raise_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = make_conv(CONVS["groups"])
        layer(torch.randn(1, 8, 4, 4)).sum().backward()
        layer.merge()
        layer.unmerge()
