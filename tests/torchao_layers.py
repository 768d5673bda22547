"""BOFT layers under the patch around torchao's int8 layers, the quantisation that a CPU has.

Not among the other tests: where torchao is installed, importing PEFT writes lines of torchao's to standard error. `make
test` puts it on PYTHONPATH for these alone.
"""

import copy
import types

import pytest
import torch
from peft import get_peft_model
from peft.tuners.boft import layer as peft_layer
from peft_oracle import random_config
from tolerance import relative_error
from torch import nn
from torch.func import functional_call
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import LlamaConfig, LlamaForCausalLM, TorchAoConfig

import boft_ext


@pytest.fixture(autouse=True, scope="module")
def patched():
    yield boft_ext.patch_peft(strict=True)
    boft_ext.unpatch_peft()


def config(b=4, m=2, **kwargs):
    return random_config(b, m, target_modules=["0"], **kwargs)


def gradients(out, leaves):
    return torch.autograd.grad(out.sin().sum(), leaves)


KINDS = {
    "linear": lambda: (nn.Linear(32, 24), torch.randn(5, 32)),
    "embedding": lambda: (nn.Embedding(10, 32), torch.randint(10, (2, 5))),
}


def int8(base):
    """`base` with its weight in torchao's int8, as the only layer of a model that names its quantisation."""
    model = nn.Sequential(base)
    quantisation = types.SimpleNamespace(get_apply_tensor_subclass=Int8WeightOnlyConfig)
    model.hf_quantizer = types.SimpleNamespace(quantization_config=quantisation)
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: module is base)
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
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, **sizes)).save_pretrained(tmp_path)
    quantised = LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
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
