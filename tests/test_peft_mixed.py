"""`adapter_names=`: batches of PEFT models in which each row has its own BOFT adapter, or none."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import get_peft_model  # noqa: E402
from peft.tuners.boft.layer import BOFTLayer  # noqa: E402
from peft_oracle import make_layer, random_config  # noqa: E402
from tolerance import assert_exact, relative_error  # noqa: E402
from transformers import (  # noqa: E402
    BartConfig,
    BartForConditionalGeneration,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

import boft_ext  # noqa: E402

BASE = "__base__"
ORDERS = {
    "one": ["a"] * 5,
    "none": [BASE] * 5,
    "runs": ["d", "d", BASE, "a", "a"],
    "interleaved": ["a", BASE, "d", "a", "d", BASE, "a"],
}


@pytest.fixture(autouse=True)
def patched():
    yield boft_ext.patch_peft(strict=True)
    boft_ext.unpatch_peft()


@pytest.fixture(params=["linear", "conv"])
def layer(request):
    """A layer with adapters of different shapes and strengths, none of which is active in the tests."""
    base = nn.Linear(16, 6) if request.param == "linear" else nn.Conv2d(4, 6, 2, padding=1)
    configs = {"a": random_config(4, 2, boft_dropout=0.5), "d": random_config(2, 3), "c": random_config(8, 1)}
    made = make_layer(base.double(), configs).eval()
    made.set_adapter(["c"])
    made.set_scale("d", 0.4)
    return made


def batch_for(layer, rows):
    shape = (rows, 3, 16) if isinstance(layer.base_layer, nn.Linear) else (rows, 4, 5, 4)
    return torch.randn(shape, dtype=layer.base_layer.weight.dtype)


def alone(layer, row, name):
    """What a row becomes with one adapter active, or with the base layer."""
    if name == BASE:
        return layer.base_layer(row[None])[0]
    other = copy.deepcopy(layer)
    other.set_adapter([name])
    return other(row[None])[0]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("grad", [True, False])
def test_each_row_has_its_adapter(order, grad, layer, form):
    names = ORDERS[order]
    x = batch_for(layer, len(names))
    with torch.set_grad_enabled(grad):
        out = layer(x, adapter_names=names)
        expected = torch.stack([alone(layer, row, name) for row, name in zip(x, names, strict=True)])
    assert_exact("output", out.detach(), expected.detach())
    assert layer.active_adapters == ["c"]
    assert torch.equal(layer(x, adapter_names=None), layer(x))


def test_gradients_of_a_mixed_batch(layer):
    """In evaluation mode with gradients each adapter gets those of its rows."""
    names = ORDERS["interleaved"]
    x = batch_for(layer, len(names)).requires_grad_()
    layer.requires_grad_(True)
    with torch.no_grad():
        layer(x, adapter_names=names)
    layer(x, adapter_names=names).sin().sum().backward()
    apart, y = copy.deepcopy(layer), x.detach().requires_grad_()
    apart.zero_grad()
    for row, name in zip(y, names, strict=True):
        if name != BASE:
            apart.set_adapter([name])
        apart.enable_adapters(name != BASE)
        apart(row[None]).sin().sum().backward()
    assert_exact("dx", x.grad, y.grad)
    assert layer.boft_R["c"].grad is None
    for name in "ad":
        assert_exact("dboft_R", layer.boft_R[name].grad, apart.boft_R[name].grad)
        assert_exact("dboft_s", layer.boft_s[name].grad, apart.boft_s[name].grad)
    assert_exact("dbias", layer.base_layer.bias.grad, apart.base_layer.bias.grad)


@pytest.mark.parametrize("grad", [True, False])
def test_linear_calls_the_base_layer_once(grad):
    layer = make_layer(nn.Linear(16, 6), {"a": random_config(4, 1), "d": random_config(4, 2)}).eval()
    calls = []
    layer.base_layer.register_forward_hook(lambda module, args, out: calls.append(args[0]))
    x, names = batch_for(layer, 7), ORDERS["interleaved"]
    with torch.set_grad_enabled(grad):
        layer(x, adapter_names=names)
    assert len(calls) == 1 and calls[0].shape == x.shape
    assert all(torch.equal(calls[0][i], x[i]) == (name == BASE) for i, name in enumerate(names))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_any_shape_and_strides(dtype):
    """Inference takes rows as they lie; the same bits as for a contiguous batch, also split among threads."""
    layer = make_layer(nn.Linear(64, 48), {"a": random_config(4, 1), "d": random_config(4, 2)}).to(dtype).eval()
    names = ["d", "a", BASE, "d", "a"] * 8
    whole = torch.randn(40, 9, 2, 128, dtype=dtype)
    turned = whole.transpose(1, 2)
    with torch.no_grad():
        for x in (turned[..., ::2], turned[..., :64], whole[:, 0, 0, :64], whole[:, :0, 1, :64]):
            out = layer(x, adapter_names=names)
            assert out.shape == (*x.shape[:-1], 48)
            assert torch.equal(out, layer(x.contiguous(), adapter_names=names))
            rows = torch.stack([alone(layer, row, name) for row, name in zip(x, names, strict=True)])
            assert relative_error(out, rows) <= (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, 700])
def test_single_rows_of_many_adapters(rows, dtype):
    """Each of hundreds of rows alone between those of other adapters, in an order that repeats nowhere."""
    configs = {"a": random_config(8, 2), "c": random_config(4, 3), "d": random_config(1, 1)}
    layer = make_layer(nn.Linear(64, 48), configs).to(dtype).eval()
    draws = torch.Generator().manual_seed(rows)
    names = [[*configs, BASE][i] for i in torch.randint(4, (rows,), generator=draws)]
    x = torch.randn(rows, 128, dtype=dtype)[:, 64:]
    expected = torch.empty(rows, 48, dtype=dtype)
    with torch.no_grad():
        out = layer(x, adapter_names=names)
        for name in set(names):
            own = torch.tensor([other == name for other in names])
            layer.set_adapter([name] if name != BASE else [])
            expected[own] = layer(x[own])
    assert relative_error(out, expected) <= (1e-6 if dtype == torch.float32 else 4e-3)
    for row in range(0, rows, 50):
        assert relative_error(out[row], expected[row]) <= (1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_and_autocast(layer, dtype):
    names = ORDERS["runs"]
    x = batch_for(layer, len(names))
    exact = layer(x, adapter_names=names).detach()
    narrow = copy.deepcopy(layer).to(dtype)
    out = narrow(x.to(dtype), adapter_names=names)
    assert out.dtype == dtype and relative_error(out.detach(), exact) < 0.02
    layer.float()
    with torch.autocast("cpu", dtype=dtype):
        out = layer(x.float(), adapter_names=names)
    assert out.dtype == dtype and relative_error(out.detach(), exact) < 0.02


def test_a_layer_without_the_adapter_stays_the_base_layer():
    layer = make_layer(nn.Linear(16, 6), {"a": random_config(4, 1)}).eval()
    x = batch_for(layer, 3)
    out = layer(x, adapter_names=["elsewhere", "a", BASE])
    assert_exact("row", out[0].detach(), layer.base_layer(x[0]).detach())
    assert relative_error(out[1], layer.base_layer(x[1])) > 1e-2


def test_wrong_lengths_and_merged_weights_are_refused(layer):
    x, weight = batch_for(layer, 3), layer.base_layer.weight.clone()
    for names in (["a"], ["a"] * 4, []):
        with pytest.raises(ValueError, match=rf"{len(names)} names for an input of shape \(3, "):
            layer(x, adapter_names=names)
    single = x[0] if x.dim() == 4 else x[0, 0]
    with pytest.raises(ValueError, match="one adapter for each row"):
        layer(single, adapter_names=["a"] * len(single))
    layer.merge()
    with pytest.raises(ValueError, match="'c' is merged.*unmerge_adapter"):
        layer(x, adapter_names=["a", "d", "c"])
    layer.unmerge()
    assert_exact("weight", layer.base_layer.weight.detach(), weight.detach())


# Models

SIZES = {"vocab_size": 32, "max_position_embeddings": 32}


def llama():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **shape, initializer_range=0.3, eos_token_id=None)).eval()


def adapted(model, **kwargs):
    """A PEFT model with adapters a, d and c that differ in shape and, a and d, in the layers they have."""
    config = random_config(4, 2, target_modules=["q_proj", "v_proj", "fc1"], **kwargs)
    made = get_peft_model(model, config, adapter_name="a")
    made.add_adapter("d", random_config(8, 1, target_modules=["q_proj", "k_proj"], **kwargs))
    made.add_adapter("c", random_config(2, 3, target_modules=["v_proj"], **kwargs))
    made.set_adapter("c")
    return made.eval()


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def logits_alone(model, ids, name):
    if name == BASE:
        with model.disable_adapter():
            return logits(model, ids)
    before = model.active_adapter
    model.set_adapter(name)
    try:
        return logits(model, ids)
    finally:
        model.set_adapter(before)


def assert_each_row(out, model, ids, names):
    for row, (row_ids, name) in enumerate(zip(ids, names, strict=True)):
        assert relative_error(out[row], logits_alone(model, row_ids[None], name)[0]) < 1e-5, (row, name)


def test_a_model_gives_each_row_its_adapter():
    model = adapted(llama())
    for layer in model.modules():
        if isinstance(layer, BOFTLayer):
            layer.set_scale("d", 0.5)
    names = ["d", BASE, "a", "c", "d", "a"]
    ids = torch.randint(0, 32, (6, 5))
    active = logits(model, ids)
    assert_each_row(logits(model, ids, adapter_names=names), model, ids, names)
    assert_each_row(logits(model, ids, adapter_names=(BASE,) * 6), model, ids, [BASE] * 6)
    assert torch.equal(logits(model, ids), active) and torch.equal(logits(model, ids, adapter_names=None), active)
    with model.disable_adapter():
        assert torch.equal(logits(model, ids, adapter_names=names), logits(model, ids))


def test_saved_modules_follow_their_rows():
    model = adapted(llama(), modules_to_save=["lm_head"])
    head = model.base_model.model.lm_head
    for number, name in enumerate("adc"):
        head.modules_to_save[name].weight.data.mul_(number - 1.5)
    names = ["c", "a", BASE, "d"]
    ids = torch.randint(0, 32, (4, 5))
    assert_each_row(logits(model, ids, adapter_names=names), model, ids, names)


def generated(model, ids, **kwargs):
    return model.generate(input_ids=ids, max_new_tokens=4, pad_token_id=0, **kwargs)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_gives_each_row_its_adapter(options):
    model = adapted(llama())
    names = ["d", BASE, "a", "c"]
    ids = torch.randint(1, 32, (1, 5)).repeat(4, 1)
    out = generated(model, ids, do_sample=False, adapter_names=names, **options)
    rows = []
    for name in names:
        if name == BASE:
            with model.disable_adapter():
                rows.append(generated(model, ids[:1], do_sample=False, **options)[0])
        else:
            model.set_adapter(name)
            rows.append(generated(model, ids[:1], do_sample=False, **options)[0])
    assert torch.equal(out, torch.stack(rows))
    assert len({tuple(row.tolist()) for row in rows}) > 2


def test_generate_with_several_samples_of_each_prompt():
    """`generate` repeats rows for them as it does for beams, whether asked by arguments or by a configuration."""
    model = adapted(llama())
    ids = torch.randint(1, 32, (2, 5))
    config = GenerationConfig(do_sample=True, num_return_sequences=2)
    for options in ({"do_sample": True, "num_return_sequences": 2}, {"generation_config": config}):
        model.set_adapter("c")
        torch.manual_seed(0)
        mixed = generated(model, ids, adapter_names=["a", "a"], **options)
        model.set_adapter("a")
        torch.manual_seed(0)
        assert torch.equal(mixed, generated(model, ids, **options)) and len(mixed) == 4


def test_beams_of_an_encoder_and_decoder():
    """The encoder has one row for each name, the decoder as many as there are beams."""
    shape = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    model = BartForConditionalGeneration(BartConfig(**SIZES, **shape, **heads, **tokens, init_std=0.5))
    model.generation_config.forced_eos_token_id = None
    model = adapted(model)
    ids = torch.randint(3, 32, (3, 6))
    names = ["a", BASE, "d"]
    out = generated(model, ids, num_beams=2, do_sample=False, adapter_names=names)
    for row, name in enumerate(names):
        if name == BASE:
            with model.disable_adapter():
                (expected,) = generated(model, ids[row : row + 1], num_beams=2, do_sample=False)
        else:
            model.set_adapter(name)
            (expected,) = generated(model, ids[row : row + 1], num_beams=2, do_sample=False)
        assert torch.equal(out[row][: len(expected)], expected) and not out[row][len(expected) :].any()


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["a", "e", "typo", "a"], ValueError, "'e', 'typo', but the model has 'a', 'd', 'c'"),
        (["a", "d", None, "a"], ValueError, "holds None"),
        ("adca", TypeError, "'adca'"),
        (["a", "d"], ValueError, r"2 names for an input of shape \(4, 5, 32\)"),
        (["a"] * 8, ValueError, r"8 names for an input of shape \(4, 5, 32\)"),
    ],
)
def test_names_that_do_not_fit_are_refused(names, error, message):
    model, ids = adapted(llama()), torch.randint(0, 32, (4, 5))
    before = logits(model, ids)
    for call in (lambda: logits(model, ids, adapter_names=names), lambda: generated(model, ids, adapter_names=names)):
        with pytest.raises(error, match=message):
            call()
        assert torch.equal(logits(model, ids), before)


def test_training_and_merged_models_are_refused():
    model, ids = adapted(llama()), torch.randint(0, 32, (2, 5))
    before = logits(model, ids)
    model.train()
    with pytest.raises(ValueError, match=r"training mode.*eval\(\)"):
        logits(model, ids, adapter_names=["a", "d"])
    model.eval()
    model.merge_adapter(["a"])
    with pytest.raises(ValueError, match="'a' is merged"):
        logits(model, ids, adapter_names=["a", "d"])
    model.unmerge_adapter()
    assert_each_row(logits(model, ids, adapter_names=["a", "d"]), model, ids, ["a", "d"])
    assert relative_error(logits(model, ids), before) < 1e-5
