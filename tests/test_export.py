"""export_merged and export_lora: what is written loads elsewhere and computes the same, and nothing else changes."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft_oracle import peft_mathematics, random_config
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from tolerance import relative_error
from torch import nn

import boft_ext
from boft_ext import lora


@pytest.fixture(autouse=True)
def patched():
    yield boft_ext.patch_peft(strict=True)
    boft_ext.unpatch_peft()


def network():
    """16 channels in 5 x 5 points -> 3."""
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(32, 16), nn.Linear(16, 3)
    ).eval()


def points():
    return torch.randn(2, 4, 4, 4)


SETTINGS = {"target_modules": ["0", "3"], "modules_to_save": ["4"], "bias": "all"}


def changed(model):
    """Every trainable parameter moved, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def peft_model(base):
    return changed(get_peft_model(base, random_config(2, 2, **SETTINGS)))


def injected(base):
    return changed(inject_adapter_in_model(random_config(2, 2, target_modules=["0", "3"]), base))


def wrapped(base):
    return changed(boft_ext.wrap(base, boft_ext.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, **SETTINGS)))


KINDS = pytest.mark.parametrize("make", [peft_model, injected, wrapped])


def snapshot(model):
    return {key: (id(tensor), tensor.clone()) for key, tensor in model.state_dict(keep_vars=True).items()}


def assert_unchanged(model, before):
    now = model.state_dict(keep_vars=True)
    assert list(now) == list(before)
    for key, (identity, values) in before.items():
        assert id(now[key]) == identity and torch.equal(now[key], values), key


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# Merged weights


@KINDS
def test_a_plain_model_loads_the_merged_weights(make, tmp_path):
    model, x = make(network()), points()
    before = snapshot(model)
    boft_ext.export_merged(model, tmp_path / "new" / "folder", progress=False)
    assert_unchanged(model, before)
    plain = network()
    plain.load_state_dict(load_file(tmp_path / "new" / "folder" / "model.safetensors"), strict=True)
    assert relative_error(plain(x), model(x)) < 1e-6
    assert files(tmp_path / "new" / "folder") == ["model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_bits_are_those_of_a_merge(dtype, tmp_path):
    model = peft_model(network().to(dtype))
    boft_ext.export_merged(model, tmp_path, progress=False)
    merged = model.merge_and_unload().state_dict()
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == merged.keys()
    assert all(torch.equal(stored[key], merged[key]) and stored[key].dtype == merged[key].dtype for key in merged)


def test_several_active_adapters_compose_as_in_the_forward(tmp_path):
    model = get_peft_model(network(), random_config(2, 2, target_modules=["0", "3"]))
    model.add_adapter("second", random_config(2, 1, target_modules=["3"]))
    model.add_adapter("idle", random_config(2, 1, target_modules=["3"]))
    model.base_model.set_adapter(["default", "second"])
    model.eval()
    x, plain = points(), network()
    boft_ext.export_merged(model, tmp_path, progress=False)
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert relative_error(plain(x), model(x)) < 1e-6


def test_modules_to_save_are_those_of_the_active_adapter(tmp_path):
    model = peft_model(network())
    model.add_adapter("second", random_config(4, 1, target_modules=["3"], modules_to_save=["4"]))
    model.set_adapter("second")
    changed(model)
    for name in ("second", "default"):
        model.set_adapter(name)
        boft_ext.export_merged(model, tmp_path, progress=False)
        head = model.base_model.model[4].modules_to_save[name]
        assert torch.equal(load_file(tmp_path / "model.safetensors")["4.weight"], head.weight)


@KINDS
def test_merged_layers_are_written_as_they_are(make, tmp_path):
    model = make(network())
    for module in model.modules():
        if hasattr(module, "boft_R"):
            module.merge()
    boft_ext.export_merged(model, tmp_path, progress=False)
    stored = load_file(tmp_path / "model.safetensors")
    layer = boft_ext.adapted.base_model(model)[3]
    assert torch.equal(stored["3.weight"], layer.base_layer.weight)


def test_layers_that_unpatched_peft_made(tmp_path):
    boft_ext.unpatch_peft()
    base, x = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(2, 64)
    with peft_mathematics():
        model = get_peft_model(copy.deepcopy(base), random_config(4, 2, target_modules=["0"]))
        assert model.base_model.model[0].boft_P.shape == (2, 64, 64)
        expected = model(x)
        boft_ext.export_merged(model, tmp_path, progress=False)
    base.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert relative_error(base(x), expected) < 1e-5


def test_single_layers_and_compiled_models(tmp_path):
    config = random_config(2, 2)
    layer = changed(boft_ext.BOFTLinear.from_linear(nn.Linear(16, 3), config))
    boft_ext.export_merged(layer, tmp_path, progress=False)
    assert sorted(load_file(tmp_path / "model.safetensors")) == ["bias", "weight"]
    model = wrapped(network())
    boft_ext.export_merged(model, tmp_path, progress=False)
    expected = load_file(tmp_path / "model.safetensors")
    boft_ext.export_merged(torch.compile(model, backend="eager"), tmp_path / "compiled", progress=False)
    stored = load_file(tmp_path / "compiled" / "model.safetensors")
    assert stored.keys() == expected.keys() and all(torch.equal(stored[key], expected[key]) for key in stored)


def test_shards_with_an_index(tmp_path):
    model = wrapped(network())
    boft_ext.export_merged(model, tmp_path / "whole", progress=False)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    boft_ext.export_merged(model, tmp_path, max_shard_size="2KB", progress=False)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 2 and names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert files(tmp_path) == [*names, "model.safetensors.index.json", "whole"]
    found = {}
    for name in names:
        shard = load_file(tmp_path / name)
        assert sum(tensor.nbytes for tensor in shard.values()) <= 2000 or len(shard) == 1
        assert all(index["weight_map"][key] == name for key in shard)
        found |= shard
    assert found.keys() == whole.keys() and all(torch.equal(found[key], whole[key]) for key in whole)


def test_files_of_an_earlier_export_do_not_survive(tmp_path):
    """A loader would take them for part of the new one."""
    (tmp_path / "model-of-mine.safetensors").write_text("kept")
    model = wrapped(network())
    boft_ext.export_merged(model, tmp_path, max_shard_size=2000, progress=False)
    boft_ext.export_merged(model, tmp_path, progress=False)
    assert files(tmp_path) == ["model-of-mine.safetensors", "model.safetensors"]
    boft_ext.export_merged(model, tmp_path, max_shard_size=2000, progress=False)
    assert "model.safetensors" not in files(tmp_path) and "model.safetensors.index.json" in files(tmp_path)


def test_scalars_empty_and_odd_sized_tensors(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))
    model.register_buffer("mask", torch.tensor([True, False, True]))
    model.register_buffer("none", torch.empty(0, 4))
    model.register_buffer("strided", torch.arange(12, dtype=torch.float64).view(3, 4).T)
    boft_ext.wrap(model, boft_ext.BOFTConfig(target_modules=["1"]))
    boft_ext.export_merged(model, tmp_path, progress=False)
    stored = load_file(tmp_path / "model.safetensors")
    plain = model.state_dict()
    for name in ("mask", "none", "strided", "0.num_batches_tracked"):
        assert torch.equal(stored[name], plain[name]) and stored[name].dtype == plain[name].dtype


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(12, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.inner(self.embedding(x)))


def test_shared_weights_are_written_once_as_safetensors_does(tmp_path):
    model = changed(boft_ext.wrap(Tied(), boft_ext.BOFTConfig(target_modules=["inner"])))
    boft_ext.export_merged(model, tmp_path, progress=False)
    plain, x = Tied(), torch.arange(5)
    load_model(plain, tmp_path / "model.safetensors")
    assert relative_error(plain(x), model(x)) < 1e-6
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "head.weight": "embedding.weight"}
        assert sorted(file.keys()) == ["embedding.weight", "inner.bias", "inner.weight"]


def test_an_adapted_layer_does_not_change_the_weight_it_shares(tmp_path):
    with pytest.warns(UserWarning, match="share one weight"):
        model = boft_ext.wrap(Tied(), boft_ext.BOFTConfig(target_modules=["head"], boft_block_size=8))
    changed(model)
    boft_ext.export_merged(model, tmp_path, progress=False)
    stored, x = load_file(tmp_path / "model.safetensors"), torch.arange(5)
    assert torch.equal(stored["embedding.weight"], model.embedding.weight)
    plain = Tied()
    plain.head.weight = nn.Parameter(torch.empty(12, 8))
    plain.load_state_dict(stored, strict=True)
    assert relative_error(plain(x), model(x)) < 1e-6


# Models of transformers and diffusers


def llama(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, tie_word_embeddings=tied, pad_token_id=0, **sizes)).eval()


@pytest.mark.parametrize("make", ["peft", "wrap"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_language_model_loads_with_from_pretrained(make, tied, dtype, tmp_path):
    from transformers import AutoModelForCausalLM

    base = llama(tied).to(dtype)
    base.generation_config.max_new_tokens = 7
    base.generation_config.do_sample = True
    if make == "peft":
        config = random_config(2, 2, target_modules="all-linear", task_type="CAUSAL_LM")
        model = changed(get_peft_model(base, config))
    else:
        model = changed(boft_ext.wrap(base, boft_ext.BOFTConfig(target_modules="all-linear")))
    before = snapshot(model)
    boft_ext.export_merged(model, tmp_path, max_shard_size="20KB", progress=False)
    assert_unchanged(model, before)
    assert {"config.json", "generation_config.json", "model.safetensors.index.json"} < set(files(tmp_path))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.dtype == dtype and loaded.generation_config.max_new_tokens == 7
    assert loaded.config.architectures == ["LlamaForCausalLM"] and model.config.architectures is None
    assert loaded.config.tie_word_embeddings == tied
    tokens = torch.randint(1, 40, (2, 9))
    with torch.no_grad():
        limit = 1e-5 if dtype == torch.float32 else 0.03
        assert relative_error(loaded.eval()(tokens).logits, model(tokens).logits) < limit


@pytest.mark.parametrize("how", ["adapted", "saved"])
def test_an_output_layer_that_is_no_longer_tied(how, tmp_path):
    """Loading the file must not tie it to the embedding again."""
    from transformers import AutoModelForCausalLM

    settings = {"target_modules": ["lm_head", "q_proj"]}
    if how == "saved":
        settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    base = llama(True)
    embedding = base.get_input_embeddings().weight.clone()
    model = changed(get_peft_model(base, random_config(2, 2, **settings)))
    with pytest.warns(UserWarning, match="tie_word_embeddings = False in config.json"):
        boft_ext.export_merged(model, tmp_path, progress=False)
    assert model.config.tie_word_embeddings
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded.get_input_embeddings().weight, embedding)
    tokens = torch.randint(1, 40, (2, 9))
    with torch.no_grad():
        assert relative_error(loaded(tokens).logits, model(tokens).logits) < 1e-5


def test_a_diffusion_model_loads_with_from_pretrained(tmp_path):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    unet.add_adapter(random_config(4, 1, target_modules=["to_q", "to_k", "to_v"]))
    boft_ext.export_merged(changed(unet), tmp_path, max_shard_size="100KB", progress=False)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    inputs = torch.randn(1, 4, 8, 8), 3, torch.randn(1, 5, 12)
    with torch.no_grad():
        assert relative_error(loaded(*inputs).sample, unet(*inputs).sample) < 1e-5


# What is refused, and what an error leaves behind


def disabled(base):
    model = peft_model(base)
    model.base_model.disable_adapter_layers()
    return model


def other_method(base):
    return get_peft_model(base, LoraConfig(target_modules=["3"]))


def on_meta(base):
    return boft_ext.wrap(base.to("meta"), boft_ext.BOFTConfig(target_modules=["3"]))


def quantised(base):
    model = boft_ext.wrap(base, boft_ext.BOFTConfig(target_modules=["3"]))
    model[3].base_layer.weight = nn.Parameter(torch.zeros(16, 32, dtype=torch.int8), requires_grad=False)
    return model


def with_complex_buffer(base):
    model = wrapped(base)
    model.register_buffer("phase", torch.zeros(3, dtype=torch.complex64))
    return model


class Packed(torch.Tensor):
    """Stands for the weights of libraries that quantise."""


def with_packed_weight(base):
    base[4].weight = nn.Parameter(torch.zeros(3, 16).as_subclass(Packed))
    return boft_ext.wrap(base, boft_ext.BOFTConfig(target_modules=["3"]))


class WithState(nn.Identity):
    def get_extra_state(self):
        return {"step": 1}


REFUSED = [
    (with_packed_weight, "4.weight is a Packed, not a plain tensor"),
    (lambda base: wrapped(base.append(WithState())), "5._extra_state is a dict, not a plain tensor"),
    (disabled, "adapters of 0 are disabled"),
    (other_method, "3 is a Linear of PEFT, which is not of BOFT"),
    (on_meta, "0.weight is on the meta device"),
    (quantised, "weight of 3 is quantised"),
    (with_complex_buffer, "phase has dtype torch.complex64"),
    (lambda base: base, "Sequential has no BOFT layers"),
]


@pytest.mark.parametrize(("make", "text"), REFUSED)
@pytest.mark.parametrize("export", [boft_ext.export_merged, lambda *a, **k: boft_ext.export_lora(*a, rank=2, **k)])
def test_models_that_cannot_be_exported(make, text, export, tmp_path):
    model = make(network())
    with pytest.raises(ValueError, match=text):
        export(model, tmp_path / "new", progress=False)
    assert not files(tmp_path)


@pytest.mark.parametrize("size", [0, -1, True, 1.5, "5 apples", "GB", "0MB", None])
def test_bad_shard_sizes(size, tmp_path):
    with pytest.raises(ValueError, match="max_shard_size"):
        boft_ext.export_merged(wrapped(network()), tmp_path, max_shard_size=size)


@pytest.mark.parametrize("where", ["", "deeper/new"])
@pytest.mark.parametrize("export", [boft_ext.export_merged, lambda *a, **k: boft_ext.export_lora(*a, rank=2, **k)])
def test_an_error_half_way_changes_nothing(where, export, tmp_path, monkeypatch):
    export(wrapped(network()), tmp_path, progress=False)
    before = {name: (tmp_path / name).read_bytes() for name in files(tmp_path)}
    merge, calls = boft_ext.adapted.AdaptedLayer.merged_weight, []

    def fails_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise MemoryError("no more")
        return merge(*args)

    monkeypatch.setattr(boft_ext.adapted.AdaptedLayer, "merged_weight", fails_second)
    with pytest.raises(MemoryError):
        export(wrapped(network()), tmp_path / where, progress=False)
    assert len(calls) == 2
    assert {name: (tmp_path / name).read_bytes() for name in files(tmp_path)} == before


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for export in (boft_ext.export_merged, lambda *args: boft_ext.export_lora(*args, rank=2)):
        with pytest.raises(ValueError, match="file is a file, expected a directory"):
            export(wrapped(network()), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_the_progress_bar_can_be_switched_off(tmp_path, capsys):
    boft_ext.export_merged(wrapped(network()), tmp_path, progress=False)
    boft_ext.export_lora(wrapped(network()), tmp_path, rank=1, progress=False)
    assert capsys.readouterr().err == ""
    boft_ext.export_merged(wrapped(network()), tmp_path)
    assert "11/11" in capsys.readouterr().err
    boft_ext.export_lora(wrapped(network()), tmp_path, rank=1)
    assert "2/2" in capsys.readouterr().err


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_that_are_not_kept_are_the_same(dtype, groups):
    weight, rotation = torch.randn(6, 32 // groups).to(dtype), torch.randn(2, 8, 4, 4)
    with torch.no_grad():
        kept, fresh = (
            boft_ext.functional.rotate_weight(weight, rotation, groups=groups, reuse=reuse) for reuse in (True, False)
        )
    assert torch.equal(kept, fresh) and not torch.equal(kept, weight)
    with pytest.raises(ValueError, match="boft_R: expected"):
        boft_ext.functional.rotate_weight(weight, rotation[0], reuse=False)


MEMORY = """
import sys, torch, boft_ext
from torch import nn

def peak():
    # Not of getrusage, which passes the peak of the parent process on to its children.
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024

model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False, dtype=torch.{dtype}) for _ in range({layers})))
boft_ext.wrap(model, boft_ext.BOFTConfig(target_modules=[str(i) for i in range({layers})]))
small = nn.Sequential(nn.Linear(1024, 1024, dtype=torch.{dtype}))
boft_ext.wrap(small, boft_ext.BOFTConfig(target_modules=["0"]))
boft_ext.export_merged(small, sys.argv[1], progress=False)
before = peak()
boft_ext.export_merged(model, sys.argv[1], progress=False)
print(peak() - before)
"""


@pytest.mark.parametrize(("dtype", "layers"), [("float32", 32), ("bfloat16", 48)])
def test_memory_is_bounded_by_layers_and_not_by_the_model(dtype, layers, tmp_path):
    """All it needs beyond what the export of one layer left behind is far below a second copy."""
    code = MEMORY.format(dtype=dtype, layers=layers)
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    size = layers * 1024 * 1024 * getattr(torch, dtype).itemsize
    assert int(result.stdout) < size / 4


def test_exports_work_without_peft_and_transformers(tmp_path):
    code = f"""
import sys
sys.modules["peft"] = sys.modules["transformers"] = None
import torch, boft_ext
from torch import nn
model = boft_ext.wrap(nn.Sequential(nn.Linear(16, 16)), boft_ext.BOFTConfig(target_modules=["0"], init_weights=False))
boft_ext.export_merged(model, {str(tmp_path)!r})
report = boft_ext.export_lora(model, {str(tmp_path)!r}, rank=4)
print(report, boft_ext.parameter_report(model))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert files(tmp_path) == ["adapter_config.json", "adapter_model.safetensors", "model.safetensors"]


# LoRA


def flat_change(layer):
    merged = layer.merged_weight(torch.float64)
    return (merged - layer.base_layer.weight.double()).flatten(1).detach()


@KINDS
@pytest.mark.parametrize("rank", [1, 4, 40])
def test_lora_is_the_best_approximation_and_peft_loads_it(make, rank, tmp_path):
    base = network()
    model = make(copy.deepcopy(base))
    before = snapshot(model)
    report = boft_ext.export_lora(model, tmp_path, rank=rank, progress=False)
    assert_unchanged(model, before)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    layers = boft_ext.adapted.adapted_layers(model)
    assert [row.layer for row in report.rows] == list(layers) == ["0", "3"]
    missed = changed_by = 0.0
    for row, (name, layer) in zip(report.rows, layers.items(), strict=True):
        theirs = loaded.base_model.model[int(name)]
        change = flat_change(layer)
        values = torch.linalg.svdvals(change)
        best = (values[rank:].norm() / values.norm()).item()
        assert (row.out, row.d) == tuple(change.shape) and row.rank == min(rank, *change.shape)
        assert theirs.scaling == {"default": 1.0} and theirs.r == {"default": row.rank}
        assert row.relative_error == pytest.approx(best, rel=1e-6, abs=1e-9)
        approximated = theirs.get_delta_weight("default").flatten(1)
        assert relative_error(approximated, change) == pytest.approx(best, rel=1e-4, abs=1e-5)
        missed += values[rank:].norm() ** 2
        changed_by += values.norm() ** 2
    assert report.relative_error == pytest.approx((missed / changed_by).sqrt().item(), rel=1e-6, abs=1e-9)
    text = str(report)
    assert "relative error" in text and f"{report.rows[0].relative_error:.4g}" in text
    if rank == 40:
        x = points()
        assert relative_error(loaded(x), model(x)) < 1e-5


@pytest.mark.parametrize("bias", ["all", "boft_only", "none"])
def test_lora_files_carry_biases_and_saved_modules(bias, tmp_path):
    base = network()
    for make in (get_peft_model, boft_ext.wrap):
        config = random_config(2, 2, target_modules=["0", "3"], modules_to_save=["4"], bias=bias)
        model = changed(make(copy.deepcopy(base), config))
        boft_ext.export_lora(model, tmp_path, rank=40, progress=False)
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        x = points()
        assert relative_error(loaded(x), model(x)) < 1e-5
        written = json.loads((tmp_path / "adapter_config.json").read_text())
        assert written["bias"] == {"all": "all", "boft_only": "lora_only", "none": "none"}[bias]
        assert written["modules_to_save"] == ["4"] and written["target_modules"] == ["0", "3"]


def test_saved_modules_of_lora_are_not_sought_inside_adapted_layers(tmp_path):
    """Names are compared by their ends, and every adapted layer holds a `base_layer`."""
    base = nn.ModuleDict({"first": nn.Linear(8, 8), "last_layer": nn.Linear(8, 2)})
    config = boft_ext.BOFTConfig(target_modules=["first"], modules_to_save=["layer"])
    boft_ext.export_lora(boft_ext.wrap(base, config), tmp_path, rank=1, progress=False)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["last_layer"]


def test_lora_adapts_exactly_the_layers_that_boft_did(tmp_path):
    """Names that others end like, and characters that mean something in an expression."""
    base = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)))
    model = changed(boft_ext.wrap(copy.deepcopy(base), boft_ext.BOFTConfig(target_modules=r"0|1\.1")))
    boft_ext.export_lora(model, tmp_path, rank=5, progress=False)
    loaded = PeftModel.from_pretrained(base, tmp_path)
    found = {name for name, module in loaded.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert found == {"0", "1.1"}
    assert loaded.base_model.model[0].r == {"default": 5} and loaded.base_model.model[1][1].r == {"default": 2}


def test_lora_of_a_sixteen_bit_model_sees_rotations_that_its_weight_cannot_hold(tmp_path):
    base = nn.Sequential(nn.Linear(32, 32)).bfloat16()
    model = boft_ext.wrap(copy.deepcopy(base), boft_ext.BOFTConfig(target_modules=["0"], boft_block_size=32))
    with torch.no_grad():
        model[0].boft_R += 1e-5 * torch.randn_like(model[0].boft_R)
    report = boft_ext.export_lora(model, tmp_path, rank=32, progress=False)
    assert report.relative_error < 1e-6
    change = flat_change(boft_ext.adapted.adapted_layers(model)["0"])
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    product = tensors["base_model.model.0.lora_B.weight"] @ tensors["base_model.model.0.lora_A.weight"]
    assert 0 < change.norm() < 1e-2 and relative_error(product, change) < 1e-5


def test_lora_of_an_untouched_adapter_changes_nothing(tmp_path):
    base, x = network(), points()
    model = boft_ext.wrap(copy.deepcopy(base), boft_ext.BOFTConfig(target_modules=["3"]))
    report = boft_ext.export_lora(model, tmp_path, rank=3, progress=False)
    assert report.relative_error == report.rows[0].relative_error == 0
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()(x), base(x))


def test_lora_of_several_adapters(tmp_path):
    base = network()
    model = get_peft_model(copy.deepcopy(base), random_config(2, 2, target_modules=["3"]))
    model.add_adapter("second", random_config(2, 1, target_modules=["3"]))
    model.base_model.set_adapter(["default", "second"])
    boft_ext.export_lora(model.eval(), tmp_path, rank=16, progress=False)
    x = points()
    assert relative_error(PeftModel.from_pretrained(base, tmp_path).eval()(x), model(x)) < 1e-5


def test_a_language_model_as_lora(tmp_path):
    base = llama(True)
    config = random_config(2, 2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = changed(get_peft_model(copy.deepcopy(base), config))
    boft_ext.export_lora(model, tmp_path, rank=48, progress=False)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert type(loaded).__name__ == "PeftModelForCausalLM"
    tokens = torch.randint(1, 40, (2, 9))
    with torch.no_grad():
        assert relative_error(loaded(tokens).logits, model(tokens).logits) < 1e-5


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"groups": 2}, "layer 0 has groups = 2"),
        ({"dilation": 2}, r"layer 0 has dilation = \(2, 2\)"),
        ({"padding": 1, "padding_mode": "circular"}, "layer 0 has padding_mode = circular"),
    ],
)
def test_convolutions_that_lora_does_not_have(options, text, tmp_path):
    model = boft_ext.wrap(nn.Sequential(nn.Conv2d(8, 4, 3, **options)), boft_ext.BOFTConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=text):
        boft_ext.export_lora(model, tmp_path, rank=2)
    boft_ext.export_merged(model, tmp_path, progress=False)


def test_lora_needs_unmerged_layers_and_a_rank(tmp_path):
    model = wrapped(network())
    model[3].merge()
    with pytest.raises(ValueError, match="layer 3 is merged"):
        boft_ext.export_lora(model, tmp_path, rank=2)
    model[3].unmerge()
    for rank, error in ((0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError), (None, TypeError)):
        with pytest.raises(error, match=f"rank must be .* got {rank}"):
            boft_ext.export_lora(model, tmp_path, rank=rank)
    assert not files(tmp_path)


@pytest.mark.parametrize("spectrum", ["flat", "falling"])
def test_large_layers_use_a_randomised_decomposition(spectrum, monkeypatch):
    """Within 1 % of the best, the same every time, and torch's own generator is left alone."""
    values = torch.ones(96) if spectrum == "flat" else 0.9 ** torch.arange(96)
    u, v = (torch.linalg.qr(torch.randn(n, 96, dtype=torch.float64))[0] for n in (120, 140))
    noise = torch.randn(120, 140, dtype=torch.float64) / 50
    matrix = u * values @ v.mH + noise
    exact = torch.linalg.svdvals(matrix)
    monkeypatch.setattr(lora, "EXACT_SIZE", 100)
    state = torch.get_rng_state()
    for rank in (1, 8, 40):
        left, right = lora.low_rank(matrix, rank)
        error = torch.linalg.matrix_norm(matrix - left @ right)
        assert exact[rank:].norm() * (1 - 1e-9) <= error <= 1.01 * exact[rank:].norm()
        again = lora.low_rank(matrix, rank)
        assert torch.equal(left, again[0]) and torch.equal(right, again[1])
    assert torch.equal(torch.get_rng_state(), state)
