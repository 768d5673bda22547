"""BOFT layers under the patch around quantised base layers.

A stand-in whose weight cannot be read shows what holds for every kind of quantisation; torchao's int8 is the real one
that a CPU has.
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


# torchao

KINDS = {
    "linear": lambda: (nn.Linear(32, 24), torch.randn(5, 32)),
    "embedding": lambda: (nn.Embedding(10, 32), torch.randint(10, (2, 5))),
}


def int8(base):
    """`base` with its weight in torchao's int8, as the only layer of a model that names its quantisation."""
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(base)
    quantisation = types.SimpleNamespace(get_apply_tensor_subclass=torchao.Int8WeightOnlyConfig)
    model.hf_quantizer = types.SimpleNamespace(quantization_config=quantisation)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, name: module is base)
    assert type(base.weight).__name__ == "Int8Tensor"
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_int8_layers_of_torchao_run_train_and_merge(kind, dtype):
    check_int8(*KINDS[kind](), dtype)


def test_int8_convolutions_of_torchao_are_recognised():
    """PEFT's `Conv2d` drops the argument that tells how to quantise. torchao itself cannot run this layer on a CPU."""
    check_int8(nn.Conv2d(8, 6, 2, stride=2), torch.randn(2, 8, 5, 6), torch.float32)


def check_int8(base, x, dtype):
    """Forward, gradients, merge and unmerge against the dequantised layer with the dense merged weight."""
    plain = copy.deepcopy(base)
    base, x = base.to(dtype), x.to(dtype) if x.is_floating_point() else x
    model = get_peft_model(int8(base), config()).eval()
    layer = model.base_model.model[0]
    assert layer.quantization_backend.backend_name == "torchao"
    assert isinstance(layer, peft_layer.BOFTLayer) and layer.boft_R["default"].dtype == torch.float32
    rotation, scale = layer.get_delta_weight("default")
    dequantised = base.weight.dequantize()
    weight = (scale * (dequantised.float().flatten(1) @ rotation.mT)).view(dequantised.shape)
    state = {"weight": weight} if isinstance(base, nn.Embedding) else {"weight": weight, "bias": base.bias.float()}
    exact = functional_call(plain, state, (x.float() if x.is_floating_point() else x,))
    out = layer(x)
    limit = 1e-5 if dtype == torch.float32 else 0.01
    assert out.dtype == dtype and relative_error(out, exact) < limit
    leaves = [layer.boft_R["default"], layer.boft_s["default"]]
    for ours, theirs in zip(gradients(out.float(), leaves), gradients(exact, leaves), strict=True):
        assert relative_error(ours, theirs) < 5 * limit
    assert type(base.weight).__name__ == "Int8Tensor"
    layer.merge(safe_merge=True)
    assert relative_error(layer(x), exact) < 0.02
    layer.unmerge()
    assert relative_error(layer(x), exact) < 0.02
    assert relative_error(model.merge_and_unload()[0](x), exact) < 0.03


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_transformers_model_that_torchao_quantised_trains(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import LlamaConfig, LlamaForCausalLM, TorchAoConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, **sizes)).save_pretrained(tmp_path)
    quantised = LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(torchao.Int8WeightOnlyConfig()), dtype=torch.float32
    )
    model = get_peft_model(quantised, random_config(4, 2, target_modules=["q_proj", "down_proj"]))
    ids = torch.arange(12).view(2, 6)
    model(ids, labels=ids).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 4 and all(p.grad.abs().max() > 0 for p in trained)
    model.eval()
    logits = model(ids).logits
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].mlp.down_proj.weight).__name__ == "Int8Tensor"
    assert relative_error(merged(ids).logits, logits) < 0.05
