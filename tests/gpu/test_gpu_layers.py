"""BOFTLinear, BOFTConv2d, wrapped models and PEFT's BOFT layers on the GPU against the same in float64 on the CPU."""

import copy

import pytest
import torch
from tolerance import EXACT, FLOORS, relative_error
from torch import nn

import boft_ext
from boft_ext import BOFTConfig, BOFTConv2d, BOFTLinear

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def true_float32():
    """cuDNN rounds the inputs of float32 convolutions to TF32 unless told not to."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def patched():
    boft_ext.patch_peft(strict=True)
    yield
    boft_ext.unpatch_peft()


def config(b=4, m=2, **kwargs):
    return BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, init_weights=False, **kwargs)


LAYERS = {
    "linear": (lambda: nn.Linear(64, 48), config(8, 2), (33, 64)),
    "no bias, odd b": (lambda: nn.Linear(15, 7, bias=False), config(5, 1), (2, 3, 15)),
    "wide groups": (lambda: nn.Linear(320, 64), config(20, 3), (130, 320)),
    "training bias": (lambda: nn.Linear(64, 48), config(8, 2, bias="boft_only"), (33, 64)),
    "conv": (lambda: nn.Conv2d(8, 6, 3, padding=1), config(4, 2), (2, 8, 9, 7)),
    "strided conv": (lambda: nn.Conv2d(4, 6, (3, 1), stride=2, bias=False), config(2, 2), (2, 4, 9, 7)),
    "grouped conv": (lambda: nn.Conv2d(8, 8, (3, 2), groups=2, padding=1), config(4, 2), (2, 8, 6, 5)),
}


def make(name):
    layer, adapter, shape = LAYERS[name]
    layer = layer()
    adapt = BOFTConv2d.from_conv if isinstance(layer, nn.Conv2d) else BOFTLinear.from_linear
    return adapt(layer, adapter), torch.randn(shape)


def observed(layer, x, dy):
    """Output, all gradients, merged and unmerged weight, on the CPU."""
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    out = layer(x)
    assert out.device == x.device
    out.backward(dy)
    seen = {"out": out, "dx": x.grad}
    seen |= {f"d{name}": p.grad for name, p in layer.named_parameters() if p.grad is not None}
    base = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer.base_layer
    layer.merge()
    seen["merged"] = base.weight.clone()
    seen["merged out"] = layer(x)
    layer.unmerge()
    seen["unmerged"] = base.weight
    return {what: tensor.detach().cpu() for what, tensor in seen.items()}


def assert_same(seen, exact, dtype):
    """16 bits: rounding of the base layer's input, of its output and of the merged weight add up."""
    limit = 30 * FLOORS[dtype] if dtype.itemsize == 2 else 2 * EXACT[dtype]
    assert seen.keys() == exact.keys()
    for what, tensor in seen.items():
        error = relative_error(tensor, exact[what])
        assert error <= limit, f"{what}: relative error {error:.3g}, allowed {limit:.3g}"


def compare(layer, x, device, dtype):
    """A layer whose base is of a dtype on the device, its adapter as it is, beside all of it in float64 on the CPU."""
    adapters = {name: p.detach().clone() for name, p in layer.named_parameters() if "boft_" in name}
    layer, x = layer.to(dtype), x.to(dtype)
    exact_layer = copy.deepcopy(layer).double()
    ours = layer.to(device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for target in (ours, exact_layer):
        for name, parameter in target.named_parameters():
            if "boft_" in name:
                parameter.data = adapters[name].to(parameter.device, wide if target is ours else torch.float64)
    dy = torch.randn_like(exact_layer(x.double())).to(dtype)
    exact = observed(exact_layer, x.double(), dy.double())
    seen = observed(ours, x.to(device), dy.to(device))
    assert seen["out"].dtype == dtype
    if dtype.itemsize == 2:
        assert torch.equal(seen["unmerged"], exact["unmerged"].to(dtype))
    assert_same(seen, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name, dtype, device):
    compare(*make(name), device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["linear", "conv", "two adapters"])
def test_peft_layers(kind, dtype, device, patched):
    pytest.importorskip("peft")
    from peft_oracle import make_layer, random_config

    base = nn.Conv2d(8, 16, 3) if kind == "conv" else nn.Linear(64, 48)
    configs = {"default": random_config(4, 2)}
    if kind == "two adapters":
        configs["other"] = random_config(8, 3)
    layer = make_layer(base.requires_grad_(False), configs)
    compare(layer, torch.randn((2, 8, 9, 7) if kind == "conv" else (21, 64)), device, dtype)


def test_peft_adapters_are_made_where_the_layer_is(device, patched):
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).to(device)
    peft_config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=["0", "2"])
    model = peft.get_peft_model(model, peft_config)
    assert {parameter.device.type for parameter in model.parameters()} == {device.type}
    x = torch.randn(6, 32, device=device)
    before = model(x).detach()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(10):
        loss = model(x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and not torch.allclose(model(x), before)


def test_each_row_of_a_mixed_batch_has_its_adapter(device, patched):
    peft = pytest.importorskip("peft")
    from peft_oracle import random_config

    model = peft.get_peft_model(nn.Sequential(nn.Linear(32, 16)).to(device), random_config(4, 2, target_modules=["0"]))
    model.add_adapter("other", random_config(8, 1, target_modules=["0"]))
    model.eval()
    x, names = torch.randn(4, 3, 32, device=device), ["default", "other", "__base__", "other"]
    out = model(x, adapter_names=names)
    for row, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                alone = model(x[row])
        else:
            model.set_adapter(name)
            alone = model(x[row])
        torch.testing.assert_close(out[row], alone)


def test_dropout_draws_the_same_blocks_as_on_the_cpu(device, seed):
    layer = BOFTLinear.from_linear(nn.Linear(32, 6), config(4, 2, boft_dropout=0.5)).train()
    ours, x = copy.deepcopy(layer).to(device), torch.randn(3, 32)
    for draw in range(4):
        torch.manual_seed(seed + draw)
        theirs = layer(x)
        torch.manual_seed(seed + draw)
        torch.testing.assert_close(ours(x.to(device)).cpu(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_blocks_kept_for_inference_are_never_stale(mode, device):
    layer, x = make("linear")
    layer, x = layer.to(device).eval(), x.to(device)
    other = torch.randn_like(layer.boft_R)
    with mode():
        layer(x), layer(x)
    layer.boft_R.data.copy_(other)
    with mode():
        changed = layer(x).clone()
    fresh = copy.deepcopy(layer)
    torch.testing.assert_close(changed, fresh(x).detach())


@pytest.mark.parametrize("mode", ["exact", "compact", "recompute"])
def test_saved_activations(mode, device):
    layer, x = make("wide groups")
    dy = torch.randn(130, 64)
    exact = observed(copy.deepcopy(layer).double(), x.double(), dy.double())
    boft_ext.set_saved_activations(mode)
    try:
        seen = observed(layer.to(device), x.to(device), dy.to(device))
    finally:
        boft_ext.set_saved_activations("exact")
    for what in seen:
        limit = {"dboft_R": 0.02, "dboft_s": 0.15}.get(what, 2e-5) if mode != "exact" else 2e-5
        assert relative_error(seen[what], exact[what]) <= limit, what


def test_autocast(device):
    layer, x = make("linear")
    layer, x = layer.to(device), x.to(device).requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert x.grad.dtype == layer.boft_R.grad.dtype == layer.boft_s.grad.dtype == torch.float32
    assert relative_error(out.detach().cpu(), layer(x).detach().cpu()) < 0.02


def test_a_wrapped_model_saves_and_loads(device, tmp_path):
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).to(device)
    plain, x = copy.deepcopy(model), torch.randn(5, 32, device=device)
    boft_ext.wrap(model, config(4, 2, target_modules=["0", "2"]))
    out = model(x).detach()
    boft_ext.save_adapter(model, tmp_path)
    boft_ext.load_adapter(plain, tmp_path)
    torch.testing.assert_close(plain(x).detach(), out)


def test_a_language_model_trains_as_on_the_cpu(device, patched):
    pytest.importorskip("peft"), pytest.importorskip("transformers")
    from peft import BOFTConfig as PeftConfig
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = PeftConfig(boft_block_size=8, boft_n_butterfly_factor=2, target_modules=targets, init_weights=False)
    theirs = get_peft_model(base, adapter).double()
    ours = copy.deepcopy(theirs).float().to(device)
    ids = torch.randint(0, 50, (2, 17))
    losses = [model(input_ids=x, labels=x).loss for model, x in ((theirs, ids), (ours, ids.to(device)))]
    for loss in losses:
        loss.backward()
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=1e-5)
    for (name, parameter), wide in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if parameter.requires_grad:
            assert relative_error(parameter.grad.cpu(), wide.grad) <= 1e-3, name
