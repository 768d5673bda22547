"""Random linear layers, and steps of them to compare with the same steps of rotate, base layer and scale one by one."""

import torch
from thread_counts import results_with_threads
from tolerance import FLOORS, relative_error
from torch import nn

import boft_ext
from boft_ext import BOFTLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# (d, out, b, m): groups in lanes, of one vector, two vectors, several panels, with rests, several levels, odd b.
SHAPES = [(32, 24, 4, 2), (64, 48, 8, 2), (64, 40, 8, 3), (160, 24, 40, 3), (40, 24, 10, 2), (512, 16, 2, 9), (15, 8, 5, 1)]


def make_layer(shape=SHAPES[0], bias=True, dtype=torch.float32, dropout=0.0, near_one=False):
    d, out, b, m = shape
    config = boft_ext.BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, boft_dropout=dropout)
    layer = BOFTLinear.from_linear(nn.Linear(d, out, bias=bias).to(dtype), config)
    with torch.no_grad():
        layer.boft_R.normal_()
        layer.boft_s.normal_()
        if near_one:
            layer.boft_s.copy_(layer.boft_s.sign() * torch.empty_like(layer.boft_s).uniform_(0.51, 1.99))
        else:
            layer.boft_s[0] = 3
    return layer


def random_problem(shape, bias, dtype, rows, seed, near_one=False):
    """A layer with dropout, its input, which needs a gradient, and the gradient of its output."""
    torch.manual_seed(seed)
    layer = make_layer(shape, bias, dtype, 0.5, near_one)
    x = torch.randn(*rows, shape[0]).to(dtype).requires_grad_()
    return layer, x, torch.randn(*rows, shape[1]).to(dtype)


def in_parts(layer):
    """The layer computes rotate, base layer and scale one by one from now on: a hook must see the base layer's input."""
    return layer.base_layer.register_forward_pre_hook(lambda module, args: None)


def run(layer, x, dy, seed=0):
    """Output and gradients of x, boft_R and boft_s, None where there is none."""
    x = x.detach().requires_grad_(x.requires_grad)
    layer.boft_R.grad = layer.boft_s.grad = None
    torch.manual_seed(seed)
    y = layer(x)
    if y.requires_grad:
        y.backward(dy)
    return [y.detach(), x.grad, layer.boft_R.grad, layer.boft_s.grad]


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one.dtype == other.dtype and torch.equal(one, other))


def assert_near(ours, theirs, dtype=None):
    """Equal but for roundings to their own dtypes, and a fraction of those to `dtype` on the way."""
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert relative_error(one, other) < 4 * torch.finfo(one.dtype).eps + FLOORS[dtype or one.dtype]


def run_with_threads(layer, x, dy):
    """`run`, which must give the same bits with one thread and, each time, with two."""
    results = results_with_threads(lambda: run(layer, x, dy))
    for other in results[1:]:
        assert_same(results[0], other)
    return results[0]


def assert_as_in_parts(ours, theirs, near_one, dtype, assert_equal=assert_same):
    """Equal but for the gradient of a scale near 1, which differs by roundings of the output."""
    if near_one and ours[-1] is not None:
        assert relative_error(ours[-1], theirs[-1]) < 4 * torch.finfo(dtype).eps + FLOORS[dtype]
        ours, theirs = ours[:-1], theirs[:-1]
    assert_equal(ours, theirs)
