"""Layers beside Linear and Conv2d that BOFT adapts under the patch, tied weights, and modules that only read a weight.

Expected values are the dense mathematics: the plain layer with the weight ``diag(s) W R^T``, in float64.
"""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import PeftModel, get_peft_model  # noqa: E402
from peft.tuners.boft import layer as peft_layer  # noqa: E402
from peft_oracle import peft_mathematics, random_config  # noqa: E402
from tolerance import FLOORS, assert_exact, relative_error  # noqa: E402
from torch.func import functional_call  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM  # noqa: E402
from transformers.pytorch_utils import Conv1D  # noqa: E402

import boft_ext  # noqa: E402
from boft_ext import peft_layer_types  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def patched():
    yield boft_ext.patch_peft(strict=True)
    boft_ext.unpatch_peft()


def with_bias(layer):
    nn.init.normal_(layer.bias)
    return layer


# Name -> a layer that b = 4, m = 2 fits, and an input.
KINDS = {
    "Conv1D": lambda: (with_bias(Conv1D(12, 16)), torch.randn(2, 5, 16)),
    "conv1d": lambda: (nn.Conv1d(8, 6, 3, stride=2, padding=1), torch.randn(2, 8, 9)),
    "grouped conv1d": lambda: (nn.Conv1d(16, 6, 3, groups=2, dilation=2, padding="same"), torch.randn(2, 16, 9)),
    "conv3d": lambda: (
        nn.Conv3d(4, 5, (1, 2, 3), padding=1, padding_mode="circular", bias=False),
        torch.randn(2, 4, 3, 4, 5),
    ),
    "unbatched conv3d": lambda: (nn.Conv3d(8, 5, (1, 2, 1), dilation=(1, 2, 1)), torch.randn(8, 2, 4, 3)),
    "embedding": lambda: (nn.Embedding(10, 16, padding_idx=3), torch.randint(10, (2, 5))),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def adapted(base, config=None, **more):
    """A PeftModel around `base`, its only layer, and that layer, with all adapters active."""
    model = get_peft_model(nn.Sequential(copy.deepcopy(base)), targeted(config or random_config(4, 2)))
    for name, config in more.items():
        model.add_adapter(name, targeted(config))
    layer = model.base_model.model[0]
    layer.set_adapter(["default", *more])
    return model, layer


def targeted(config):
    config.target_modules = ["0"]
    return config


def dense_weight(base, layer):
    """``diag(s) W R^T`` of all active adapters with dense matrices, group by group, in the layout of the weight."""
    transposed = isinstance(base, Conv1D)
    weight = base.weight.detach().double()
    rows = (weight.T if transposed else weight).flatten(1)
    groups = getattr(base, "groups", 1)
    for name in layer.active_adapters:
        rotation, scale = layer.get_delta_weight(name)
        rotation, scale = rotation.double(), scale.double()
        size, per_group = rows.shape[1], rows.shape[0] // groups
        parts = [rotation[i * size : (i + 1) * size, i * size : (i + 1) * size] for i in range(groups)]
        rows = scale * torch.cat([rows[i * per_group : (i + 1) * per_group] @ p.T for i, p in enumerate(parts)])
    return rows.T if transposed else rows.view(weight.shape)


def run(call, x, parameters):
    """Output and gradients of sum(sin(output)) for the parameters and, where it is not made of indices, x."""
    x = x.detach()
    leaves = [*parameters, x.requires_grad_()] if x.is_floating_point() else list(parameters)
    out = call(x)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), leaves)]


def as_dtype(x, dtype):
    return x.to(dtype) if x.is_floating_point() else x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@every_kind
def test_layers_compute_the_dense_mathematics(kind, dtype):
    base, x = KINDS[kind]()
    base, x = base.to(dtype), as_dtype(x, dtype)
    _, layer = adapted(base, other=random_config(2, 3))
    parameters = [*layer.boft_R.values(), *layer.boft_s.values()]
    seen = run(layer, x, parameters)
    wide = copy.deepcopy(layer).double()
    exact = run(
        lambda x: functional_call(base.double(), {"weight": dense_weight(base, wide)}, (x,)),
        as_dtype(x, torch.float64),
        [*wide.boft_R.values(), *wide.boft_s.values()],
    )
    assert len(seen) == len(exact) >= 5
    for ours, theirs in zip(seen, exact, strict=True):
        assert_exact("output or gradient", ours, theirs)
    assert seen[0].dtype == dtype


@every_kind
def test_merging_writes_the_dense_mathematics_and_unmerging_undoes_it(kind):
    base, x = KINDS[kind]()
    _, layer = adapted(base, other=random_config(2, 1))
    expected, out = dense_weight(base, layer).detach(), layer(x).detach()
    layer.merge(safe_merge=True)
    assert_exact("weight", layer.base_layer.weight.detach(), expected)
    assert layer.base_layer.weight.is_contiguous()
    torch.testing.assert_close(layer(x).detach(), out, rtol=1e-5, atol=1e-6)
    layer.unmerge()
    assert_exact("weight", layer.base_layer.weight.detach(), base.weight.detach().double())
    layer.merge(adapter_names=["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        layer.merge(adapter_names=["other"])
    assert_exact("weight", layer.base_layer.weight.detach(), expected)
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x).detach(), base(x).detach(), rtol=1e-5, atol=1e-6)
    assert not layer.merged


@every_kind
def test_safe_merge_of_a_broken_adapter_changes_nothing(kind):
    base, _ = KINDS[kind]()
    _, layer = adapted(base)
    with torch.no_grad():
        layer.boft_s["default"].flatten()[1] = torch.inf
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, base.weight) and not layer.merged


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_kind
def test_sixteen_bit_layers_round_once_and_unmerge_bit_for_bit(kind, dtype):
    """Not further from the exact output than twice the plain layer with the exact weight rounded to 16 bits."""
    base, x = KINDS[kind]()
    base, x = base.to(dtype), as_dtype(x, dtype)
    _, layer = adapted(base)
    assert layer.boft_R["default"].dtype == layer.boft_s["default"].dtype == torch.float32
    out = layer(x)
    assert out.dtype == dtype
    weight = dense_weight(base, layer).detach()
    exact = functional_call(copy.deepcopy(base).double(), {"weight": weight}, (as_dtype(x, torch.float64),))
    rounded = functional_call(base, {"weight": weight.to(dtype)}, (x,))
    assert relative_error(out, exact) <= 2 * relative_error(rounded, exact) + FLOORS[dtype]
    layer.merge()
    assert relative_error(layer.base_layer.weight, weight) <= relative_error(weight.to(dtype), weight) + FLOORS[dtype]
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, base.weight)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@every_kind
def test_saved_adapters_load(kind, low_cpu_mem_usage, tmp_path):
    base, x = KINDS[kind]()
    model, _ = adapted(base)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = PeftModel.from_pretrained(nn.Sequential(base), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert all(p.device.type == "cpu" for p in loaded.parameters())
    assert torch.equal(loaded.base_model.model[0](x), model.base_model.model[0](x))
    loaded.delete_adapter("default")
    assert len(loaded.base_model.model[0].boft_R) == 0


@every_kind
def test_merge_and_unload_returns_the_plain_layer(kind):
    base, x = KINDS[kind]()
    model, layer = adapted(base)
    out = layer(x)
    merged = model.merge_and_unload()[0]
    assert type(merged) is type(base)
    torch.testing.assert_close(merged(x), out, rtol=1e-5, atol=1e-6)


@every_kind
def test_layers_can_be_copied_pickled_and_compiled(kind):
    base, x = KINDS[kind]()
    _, layer = adapted(base)
    out = layer(x).detach()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), out)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    assert layer.boft_R["default"].grad.abs().max() > 0
    torch.testing.assert_close(compiled(x).detach(), out)


@every_kind
def test_using_a_layer_after_unpatching_names_the_remedy(kind):
    base, x = KINDS[kind]()
    _, layer = adapted(base)
    out = layer(x).detach()
    boft_ext.unpatch_peft()
    uses = [lambda: layer(x), layer.merge, lambda: layer.get_delta_weight("default")]
    if kind != "Conv1D":
        uses.append(lambda: layer.update_layer("other", config=random_config(4, 2)))
    for use in uses:
        with pytest.raises(RuntimeError, match=r"boft_ext\.patch_peft\(\)"):
            use()
    assert not layer.merged and torch.equal(layer.base_layer.weight, base.weight)
    boft_ext.patch_peft(strict=True)
    assert torch.equal(layer(x), out)


@every_kind
def test_only_the_adapter_trains_and_moves(kind):
    base, x = KINDS[kind]()
    model, layer = adapted(base)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"boft_R", "boft_s"}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == ("base_layer" in name), name


def test_dropout_acts_in_training_only():
    base, x = KINDS["embedding"]()
    _, layer = adapted(base, random_config(4, 2, boft_dropout=0.5))
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    exact = nn.functional.embedding(x, dense_weight(base, layer))
    assert_exact("output", layer(x).detach(), exact.detach())


def test_layers_that_do_not_fit_name_the_numbers():
    refused = [(Conv1D(8, 10), ["10", "4"]), (nn.Conv3d(5, 2, 3), ["135", "4"]), (nn.Embedding(8, 10), ["10"])]
    for base, numbers in refused:
        model = nn.Sequential(base)
        with pytest.raises(ValueError) as error:
            get_peft_model(model, targeted(random_config(4, 1)))
        assert all(number in str(error.value) for number in numbers) and model[0] is base
    with pytest.raises(TypeError, match="LayerNorm"):
        get_peft_model(nn.Sequential(nn.LayerNorm(8)), targeted(random_config(4, 1)))


@pytest.mark.parametrize("layer", [nn.Embedding(8, 16), nn.Conv1d(4, 4, 2), Conv1D(8, 16)])
def test_wrap_names_the_layers_that_it_cannot_adapt(layer):
    with pytest.raises(ValueError, match=f"layer 0: only nn.Linear and nn.Conv2d .*{type(layer).__name__}"):
        boft_ext.wrap(nn.Sequential(layer), boft_ext.BOFTConfig(target_modules=["0"], boft_block_size=4))


# Embeddings


def test_embeddings_keep_the_angles_between_vectors_and_scale_each():
    base = nn.Embedding(7, 16)
    _, layer = adapted(base)
    vectors, original = layer(torch.arange(7)), base.weight
    angles = nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
    torch.testing.assert_close(angles, nn.functional.cosine_similarity(original[:, None], original[None], dim=-1))
    lengths = vectors.norm(dim=1) / original.norm(dim=1)
    torch.testing.assert_close(lengths, layer.boft_s["default"].flatten().abs())
    assert layer.boft_R["default"].shape == (2, 4, 4, 4) and layer.boft_s["default"].shape == (7, 1)


def test_one_adapter_means_the_same_on_an_embedding_and_on_an_output_layer_that_shares_its_weight():
    embedding, head = nn.Embedding(7, 16), nn.Linear(16, 7, bias=False)
    head.weight = embedding.weight
    (_, on_embedding), (_, on_head) = adapted(embedding), adapted(head)
    on_head.load_state_dict(on_embedding.state_dict())
    torch.testing.assert_close(on_head(torch.eye(16)).T, on_embedding(torch.arange(7)))


def test_scaled_and_renormalised_embeddings():
    """A subclass that multiplies its result, as Gemma's, and `max_norm`, which bounds what is looked up."""

    class Scaled(nn.Embedding):
        def forward(self, x):
            return super().forward(x) * 4

    x = torch.randint(10, (6,))
    for base in (Scaled(10, 16), nn.Embedding(10, 16, max_norm=0.5)):
        _, layer = adapted(base)
        rotation, scale = layer.get_delta_weight("default")
        torch.testing.assert_close(layer(x), scale[x] * (base(x) @ rotation.T))


def test_embeddings_return_the_dtype_of_the_base_layer_under_autocast():
    base, x = KINDS["embedding"]()
    _, layer = adapted(base)
    out = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), out)


# Whole models


def gpt2(**kwargs):
    config = {"vocab_size": 40, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**config, eos_token_id=0, **kwargs)).eval()


def llama(**kwargs):
    config = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**config, num_attention_heads=2, num_key_value_heads=2, **kwargs)).eval()


IDS = torch.arange(1, 13).view(2, 6)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
@pytest.mark.parametrize("target", ["all-linear", ["c_attn", "c_proj", "wte", "wpe"]])
def test_gpt2(target, fan_in_fan_out, tmp_path):
    """The layout of a weight comes from the class of the layer, whatever fan_in_fan_out says."""
    base = gpt2()
    config = random_config(4, 2, target_modules=target, fan_in_fan_out=fan_in_fan_out, task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fan_in_fan_out")
        model = get_peft_model(copy.deepcopy(base), config)
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert type(layer) is peft_layer.Linear and layer.boft_s["default"].shape == (96, 1)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    model.eval()
    logits = model(IDS).logits
    model.save_pretrained(tmp_path)
    assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(IDS).logits, logits)
    boft_ext.export_merged(model, tmp_path / "merged", progress=False)
    exported = GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(IDS).logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(exported(IDS).logits, merged(IDS).logits)
    assert relative_error(base(IDS).logits, logits) > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_merging_one_of_two_tied_layers_leaves_the_other(target, dtype):
    base = llama(tie_word_embeddings=True).to(dtype)
    model = get_peft_model(copy.deepcopy(base), random_config(4, 2, target_modules=[target])).eval()
    inner = model.base_model.model
    layer = inner.model.embed_tokens if target == "embed_tokens" else inner.lm_head
    other = inner.lm_head if target == "embed_tokens" else inner.model.embed_tokens
    logits = model(IDS).logits
    for _ in range(2):
        model.merge_adapter()
        assert torch.equal(other.weight, base.lm_head.weight)
        assert not torch.equal(layer.base_layer.weight, base.lm_head.weight)
        assert not layer.base_layer.weight.requires_grad
        assert relative_error(model(IDS).logits, logits) < (1e-5 if dtype == torch.float32 else 0.02)
        model.unmerge_adapter()
        assert layer.base_layer.weight is other.weight and torch.equal(other.weight, base.lm_head.weight)
    assert torch.equal(model(IDS).logits, logits)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_a_tied_model_that_was_merged_can_be_saved_and_read_back(tmp_path):
    model = get_peft_model(llama(tie_word_embeddings=True), random_config(4, 2, target_modules=["embed_tokens"]))
    model.eval()
    logits = model(IDS).logits
    merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(LlamaForCausalLM.from_pretrained(tmp_path)(IDS).logits, logits, rtol=1e-4, atol=1e-5)


def test_a_copy_made_while_a_tied_layer_is_merged_unmerges_without_touching_the_other():
    model = nn.Sequential(nn.Embedding(8, 16), nn.Linear(16, 8, bias=False))
    model[1].weight = model[0].weight
    model = get_peft_model(model, targeted(random_config(4, 2)))
    weight = model.base_model.model[1].weight.detach().clone()
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    embedding, head = twin.base_model.model
    assert torch.equal(head.weight, weight)
    assert_exact("weight", embedding.base_layer.weight.detach(), weight.double())


# Modules that read the weights of their linear layers


def encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def dense_twin(model, plain):
    """`plain` with the dense merged weight in place of every adapted layer's."""
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, peft_layer.BOFTLayer):
            base = plain.get_submodule(name)
            base.weight.data = dense_weight(base, layer).detach().to(base.weight.dtype)
    return plain


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    "target", [["linear1", "linear2", "out_proj"], ["layers.1.linear1"], ["layers.0.linear2"], ["out_proj"]]
)
def test_adapters_act_in_the_fused_kernels_of_torch_transformers(target, padded):
    plain = encoder().double()
    model = get_peft_model(copy.deepcopy(plain), random_config(4, 2, target_modules=target))
    base_output = plain.eval()(x := torch.randn(2, 5, 16, dtype=torch.float64))
    expected = dense_twin(model, copy.deepcopy(plain))
    mask = torch.tensor([[False] * 5, [False, False, False, True, True]]) if padded else None
    real = torch.ones(2, 5, dtype=torch.bool) if mask is None else ~mask
    assert relative_error(expected(x), base_output) > 1e-3
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for training in (True, False):
            twin.train(training)
            for grad in (True, False):
                with torch.set_grad_enabled(grad):
                    out = twin(x, src_key_padding_mask=mask)
                    exact = expected.train(training)(x, src_key_padding_mask=mask)
                assert_exact("output", out[real].detach(), exact[real].detach())
    with torch.no_grad(), model.disable_adapter():
        assert_exact("output", model(x), base_output.detach())
    model.merge_adapter()
    with torch.no_grad():
        assert_exact("output", model(x), expected(x))
        with model.disable_adapter():
            assert_exact("output", model(x), base_output.detach())
    assert type(model.merge_and_unload().layers[1].linear1) is nn.Linear


def test_the_output_projection_of_attention_trains():
    """`nn.MultiheadAttention` never calls it, so unpatched PEFT gives its adapter no gradient."""
    model = get_peft_model(encoder(), random_config(4, 2, target_modules=["out_proj"]))
    x = torch.randn(2, 5, 16)
    model(x).sin().sum().backward()
    layer = model.base_model.model.layers[0].self_attn.out_proj
    direction = {p: torch.randn_like(p) for p in (layer.boft_R["default"], layer.boft_s["default"])}
    slope = sum((p.grad * d).sum() for p, d in direction.items())
    model.double()
    values = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            for p, d in direction.items():
                p.add_(d.double(), alpha=step)
            values.append(model(x.double()).sin().sum())
            for p, d in direction.items():
                p.sub_(d.double(), alpha=step)
    assert abs((values[0] - values[1]) / 2e-5 - slope) < 1e-3 * abs(slope) + 1e-4


def test_layers_made_before_the_patch_act_in_fused_kernels_too():
    boft_ext.unpatch_peft()
    with peft_mathematics():
        model = get_peft_model(encoder(), random_config(4, 2, target_modules=["linear1", "out_proj"])).eval()
    boft_ext.patch_peft(strict=True)
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        fused = model(x)
        model.merge_adapter()
        torch.testing.assert_close(fused, model(x), rtol=1e-5, atol=1e-5)


def test_linear_layers_elsewhere_show_their_base_weight():
    """Reading a weight costs nothing where no module computes with it."""
    model, layer = adapted(nn.Linear(16, 8))
    assert layer.weight is layer.base_layer.weight


def test_new_layers_are_part_of_the_package():
    for kind, name in (("conv1d", "Conv1d"), ("conv3d", "Conv3d"), ("embedding", "Embedding")):
        _, layer = adapted(KINDS[kind]()[0])
        assert type(layer) is getattr(peft_layer_types, name) and isinstance(layer, peft_layer.BOFTLayer)
        assert repr(layer).startswith(f"boft.{name}(")
