"""BOFT layers under the patch in models whose weights accelerate keeps elsewhere, beside the same model in memory.

The execution device is the CPU, so that it shows without a GPU: the weights are then on the meta device between calls.
"""

import copy
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from accelerate import cpu_offload, dispatch_model, disk_offload  # noqa: E402
from peft import BOFTConfig, PeftModel, get_peft_model  # noqa: E402
from peft_oracle import random_config  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

import boft_ext  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def patched():
    yield boft_ext.patch_peft(strict=True)
    boft_ext.unpatch_peft()


class Model(nn.Module):
    """Every kind of layer that is adapted, each with its bias."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 16)
        self.conv1d = nn.Conv1d(16, 8, 2)
        self.linear = nn.Linear(8, 16)
        self.transposed = Conv1D(8, 16)
        self.conv2d = nn.Conv2d(4, 8, 2, padding=1, padding_mode="reflect")
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, ids):
        x = self.conv1d(self.embedding(ids).mT).mT
        x = self.transposed(torch.relu(self.linear(x)))
        return self.conv2d(x.reshape(len(x), 4, -1, 2))


LAYERS = ["embedding", "conv1d", "linear", "transposed", "conv2d"]
IDS = torch.arange(10).view(2, 5) % 9


def config():
    return random_config(4, 2, target_modules=LAYERS)


def is_offloaded(model):
    return all(p.is_meta for name, p in model.named_parameters() if "boft" not in name)


def to_cpu(model, folder):
    cpu_offload(model, execution_device="cpu")


def to_disk(model, folder):
    disk_offload(model, folder, execution_device="cpu")


def base_layers_to_cpu(model, folder):
    for module in list(model.modules()):
        if hasattr(module, "base_layer"):
            cpu_offload(module.base_layer, execution_device="cpu")


def dispatched(model, folder):
    device_map = {f"base_model.model.{name}": "disk" for name in LAYERS[1:]} | {"base_model.model.embedding": "cpu"}
    dispatch_model(model, device_map, main_device="cpu", offload_dir=folder)


@pytest.mark.parametrize("offload", [to_cpu, to_disk, base_layers_to_cpu, dispatched])
def test_an_offloaded_model_computes_the_same(offload, tmp_path):
    model = get_peft_model(Model(), config()).eval()
    model.add_adapter("other", random_config(2, 1, target_modules=LAYERS))
    model.base_model.set_adapter(["default", "other"])
    expected = model(IDS)
    offload(model, tmp_path)
    assert any(p.is_meta for p in model.parameters())
    for _ in range(2):
        assert torch.equal(model(IDS), expected)


def test_an_offloaded_model_merges_and_unmerges():
    model = get_peft_model(Model(), config()).eval()
    with model.disable_adapter():
        plain = model(IDS)
    expected = model(IDS)
    cpu_offload(model, execution_device="cpu")
    for _ in range(2):
        model.merge_adapter()
        assert is_offloaded(model)
        torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        torch.testing.assert_close(model(IDS), expected, rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(model(IDS), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_loads_onto_an_offloaded_model(low_cpu_mem_usage, tmp_path):
    base = Model()
    model = get_peft_model(copy.deepcopy(base), config()).eval()
    model.save_pretrained(tmp_path)
    cpu_offload(base, execution_device="cpu")
    loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert is_offloaded(loaded)
    assert torch.equal(loaded(IDS), model(IDS))


def test_an_adapter_trains_on_an_offloaded_model_as_in_memory():
    in_memory = get_peft_model(Model(), config())
    base = copy.deepcopy(in_memory).unload()
    cpu_offload(base, execution_device="cpu")
    offloaded = get_peft_model(base, config())
    offloaded.load_state_dict({n: t for n, t in in_memory.state_dict().items() if "boft_" in n}, strict=False)
    for model in (in_memory, offloaded):
        model(IDS).sin().sum().backward()
    assert is_offloaded(offloaded)
    gradients = {name: p.grad for name, p in offloaded.named_parameters() if p.requires_grad}
    assert len(gradients) == 2 * len(LAYERS)
    for name, p in in_memory.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(gradients[name], p.grad)


@pytest.mark.filterwarnings("ignore:.*meta parameter in the current model, which is a no-op")
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_transformers_model_with_a_device_map(low_cpu_mem_usage, tmp_path, monkeypatch):
    """Two blocks on disk, as for a model that does not fit: the path of `device_map` in both libraries."""
    monkeypatch.chdir(tmp_path)  # PEFT writes a file to the working directory
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, attention_bias=True, **sizes))
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, random_config(4, 2, target_modules=["q_proj", "down_proj"])).eval()
    model.save_pretrained(tmp_path / "adapter")
    blocks = {"model.layers.0": "disk", "model.layers.1": "disk"}
    rest = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    device_map = {**rest, **blocks}
    kwargs = {"device_map": device_map, "offload_folder": tmp_path / "disk"}
    offloaded = LlamaForCausalLM.from_pretrained(tmp_path / "base", **kwargs)
    kwargs = {
        "device_map": {f"base_model.model.{name}": device for name, device in device_map.items()},
        "offload_folder": tmp_path / "disk of the adapter",
    }
    loaded = PeftModel.from_pretrained(offloaded, tmp_path / "adapter", low_cpu_mem_usage=low_cpu_mem_usage, **kwargs)
    assert all(p.is_meta for name, p in loaded.named_parameters() if "layers" in name)
    ids = torch.arange(8)[None]
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)


def test_an_adapter_without_values_is_refused_clearly():
    with torch.device("meta"):
        model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), BOFTConfig(target_modules=["0"], boft_block_size=4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="'default' is on the meta device"):
            model(torch.randn(2, 8))
