"""Layers without gradients, which take shorter ways: the same bits, or as exact ones, the same errors, and nothing left
out."""

import copy

import pytest
import torch
from thread_counts import results_with_threads
from tolerance import assert_as_exact_as_torch
from torch import nn

import boft_ext
from boft_ext import BOFTLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def make_layer(d=32, out=24, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    config = boft_ext.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2)
    layer = BOFTLinear.from_linear(nn.Linear(d, out, bias=bias).to(dtype), config).eval()
    with torch.no_grad():
        layer.boft_R.normal_()
        layer.boft_s.normal_()
    return layer


@pytest.mark.parametrize("rows", [(), (1, 1), (3, 40), (0,)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_as_with_gradients(dtype, bias, rows):
    layer, x = make_layer(bias=bias, dtype=dtype), torch.randn(*rows, 32).to(dtype)
    with_gradients = layer(x)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            for _ in range(2):
                out = layer(x)
                assert out.dtype == dtype and torch.equal(out, with_gradients)


# A weight that is large beside what a few rows cost, in the layouts that it may have.
LAYOUTS = {
    "rows": lambda weight: weight,
    "rows with gaps": lambda weight: torch.cat([weight, weight.new_full((len(weight), 3), torch.nan)], 1)[:, :-3],
    "columns": lambda weight: weight.T.contiguous().T,
}


@pytest.mark.parametrize("rows", [(1, 1), (2,), (3, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_of_a_large_weight(dtype, bias, layout, rows, seed):
    layer = make_layer(256, 300, bias, dtype)
    layer.weight.data = LAYOUTS[layout](layer.weight.detach())
    torch.manual_seed(seed)
    # A batch of every other value: not contiguous either.
    x = torch.randn(*rows, 512)[..., ::2].to(dtype)
    with torch.no_grad():
        ours, *others = results_with_threads(lambda: layer(x))
        # torch multiplies by columns, and on some processors adds up in another order with two threads.
        assert layout == "columns" or all(torch.equal(ours, other) for other in others)
        exact = copy.deepcopy(layer).double()(x.double())
        layer.base_layer.register_forward_pre_hook(lambda module, args: None)
        theirs = layer(x)
    assert ours.shape == (*rows, 300) and ours.dtype == dtype
    for y in (ours, *others):
        assert_as_exact_as_torch("y", y, theirs, exact)


def test_autocast_decides_the_dtype():
    layer, x = make_layer(), torch.randn(5, 32)
    with torch.autocast("cpu", torch.bfloat16):
        with_gradients = layer(x)
        with torch.no_grad():
            out = layer(x)
    assert out.dtype == torch.bfloat16 and torch.equal(out, with_gradients)


def test_new_values_are_seen_however_they_are_written():
    layer, x = make_layer(), torch.randn(5, 32)

    def outputs():
        with torch.no_grad():
            short = layer(x)
        assert torch.equal(short, layer(x))
        return short

    before = outputs()
    layer.boft_R.data.view(-1)[-2] += 1e-3
    after = outputs()
    assert not torch.equal(before, after)
    layer.boft_R.detach().numpy()[:] *= -1  # neither version counters nor plain sums see this
    assert not torch.equal(after, outputs())
    layer.boft_R = nn.Parameter(torch.zeros_like(layer.boft_R))
    layer.boft_s.data.fill_(1)
    torch.testing.assert_close(outputs(), layer.base_layer(x))


def doubled(module, args, out):
    return 2 * out


def halved(module, args):
    return (args[0] / 2,)


@pytest.mark.parametrize("kind", ["hook", "pre-hook", "global hook", "own forward", "parametrisation"])
def test_nothing_of_the_base_layer_is_left_out(kind):
    layer, x = make_layer(), torch.randn(5, 32)
    base, plain = layer.base_layer, layer(x)
    handle = None
    if kind == "hook":
        base.register_forward_hook(doubled)
    elif kind == "pre-hook":
        base.register_forward_pre_hook(halved)
    elif kind == "global hook":
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, out: 2 * out if module is base else None
        )
    elif kind == "own forward":
        base.forward = lambda x: 2 * nn.functional.linear(x, base.weight, base.bias)
    else:
        nn.utils.parametrizations.weight_norm(base).parametrizations.weight.original0.data.mul_(2)
    try:
        with_gradients = layer(x)
        with torch.no_grad():
            out = layer(x)
    finally:
        if handle:
            handle.remove()
    assert torch.equal(out, with_gradients) and not torch.equal(out, plain)


def test_errors_are_those_of_the_layer_with_gradients():
    layer = make_layer()
    for wrong in (torch.randn(5, 31), torch.randn(5, 32).long(), torch.randn(5, 32, dtype=torch.float64)):
        with pytest.raises((ValueError, TypeError, RuntimeError)) as with_gradients:
            layer(wrong)
        with torch.no_grad(), pytest.raises(with_gradients.type) as without:
            layer(wrong)
        assert str(without.value) == str(with_gradients.value)
