"""BOFT layers under the patch around quantised base layers: a stand-in whose weight cannot be read shows what holds for
every kind of quantisation. For a real one see torchao_layers.py.
"""

import copy
import types

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import get_peft_model  # noqa: E402
from peft.tuners.boft import layer as peft_layer  # noqa: E402
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend, QuantizationBackend  # noqa: E402
from peft_oracle import random_config  # noqa: E402
from tolerance import assert_exact, relative_error  # noqa: E402
from torch.func import functional_call  # noqa: E402

import boft_ext  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def patched():
    yield boft_ext.patch_peft(strict=True)
    boft_ext.unpatch_peft()


class SealedLinear(nn.Linear):
    """A linear layer of 8-bit codes. Reading its `weight` raises, once `sealed`: PEFT reads it to make an adapter."""

    def __init__(self, plain):
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.bias = plain.bias
        self.sealed = False
        self.quantise(plain.weight.detach())

    def quantise(self, weight):
        self.step = weight.abs().amax(dim=1, keepdim=True) / 127
        self.codes = (weight / self.step).round().to(torch.int8)

    def dequantise(self):
        return self.codes * self.step

    @property
    def weight(self):
        assert not self.sealed, "the quantised weight was touched"
        return self.dequantise()

    def forward(self, x):
        return nn.functional.linear(x, self.dequantise().to(x.dtype), self.bias)


class SealedBackend(QuantizationBackend):
    supports_merge, backend_name, layer_type = True, "sealed", "linear"

    def get_base_weight(self, base_layer):
        return base_layer.dequantise()

    def set_base_weight(self, peft_layer, weight_data):
        peft_layer.get_base_layer().quantise(weight_data)


def sealed_layer(config, backend=None, **more):
    """A model whose only layer is a sealed one with adapters, that layer, and a plain twin of its base; in float64."""
    plain = nn.Linear(16, 12).double()
    model = get_peft_model(nn.Sequential(SealedLinear(plain)), config)
    for name, other in more.items():
        model.add_adapter(name, other)
    layer = model.base_model.model[0]
    layer.set_adapter(["default", *more])
    layer.quantization_backend = backend
    layer.base_layer.sealed = True
    twin = nn.Linear(16, 12).double()
    twin.load_state_dict({"weight": layer.base_layer.dequantise(), "bias": plain.bias})
    return model, layer, twin


def config(b=4, m=2, **kwargs):
    return random_config(b, m, target_modules=["0"], **kwargs)


def dense(layer, x, weight, bias):
    for name in layer.active_adapters:
        rotation, scale = layer.get_delta_weight(name)
        weight = scale * (weight.flatten(1) @ rotation.mT).view(weight.shape)
    return nn.functional.linear(x, weight, bias)


def gradients(out, leaves):
    return torch.autograd.grad(out.sin().sum(), leaves)


@pytest.mark.parametrize("bias", ["none", "boft_only"])
def test_forward_and_training_never_touch_a_quantised_weight(bias):
    model, layer, twin = sealed_layer(config(bias=bias), other=config(2, 3))
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.boft_R.values(), *layer.boft_s.values()]
    if bias == "boft_only":
        assert layer.base_layer.bias.requires_grad
        leaves.append(layer.base_layer.bias)
    out, exact = layer(x), dense(layer, x, twin.weight.detach(), layer.base_layer.bias)
    assert_exact("output", out.detach(), exact.detach())
    for ours, theirs in zip(gradients(out, leaves), gradients(exact, leaves), strict=True):
        assert_exact("gradient", ours, theirs)
    assert torch.equal(copy.deepcopy(layer).eval()(x), out)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(layer(x), twin(x))


def test_a_quantised_weight_is_merged_through_the_hooks_of_peft():
    _, layer, twin = sealed_layer(config(), SealedBackend(), other=config(2, 1))
    x = torch.randn(50, 16, dtype=torch.float64)
    out, codes = layer(x).detach(), layer.base_layer.codes
    layer.merge(safe_merge=True)
    assert layer.merged_adapters == ["default", "other"] and not torch.equal(layer.base_layer.codes, codes)
    assert 0 < relative_error(layer(x), out) < 0.02
    layer.unmerge()
    assert relative_error(layer.base_layer.dequantise(), twin.weight) < 0.02


def test_a_quantised_weight_that_peft_cannot_merge_is_left_alone():
    _, layer, _ = sealed_layer(config(), ForwardOnlyQuantizationBackend("gptq"))
    x = torch.randn(3, 16, dtype=torch.float64)
    out = layer(x)
    with pytest.raises(TypeError, match="gptq.*not available"):
        layer.merge()
    assert not layer.merged and torch.equal(layer(x), out)
    assert "quantization_backend='gptq'" in repr(layer)
