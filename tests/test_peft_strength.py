"""The strength of PEFT's BOFT adapters (`scaling`): layers, merging, and diffusers' adapter weights on a UNet."""

import copy
import pickle

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft import get_peft_model  # noqa: E402
from peft.tuners.boft import layer as peft_layer  # noqa: E402
from peft_oracle import adapter_state, make_layer, random_config  # noqa: E402
from tolerance import FLOORS, assert_exact, relative_error  # noqa: E402

import boft_ext  # noqa: E402
from boft_ext.functional import rotation_matrix  # noqa: E402

STRENGTHS = [0.0, 0.3, 1.0, 2.5, -0.7]


@pytest.fixture(autouse=True)
def patched():
    yield boft_ext.patch_peft(strict=True)
    boft_ext.unpatch_peft()


def two_adapters(base):
    return make_layer(base, {"first": random_config(4, 2), "second": random_config(2, 1)})


def bases():
    return {"linear": nn.Linear(16, 6), "conv": nn.Conv2d(4, 6, 2)}


@pytest.fixture(params=["linear", "conv"])
def base(request):
    return bases()[request.param].double()


def batch_for(base, rows=3):
    shape = (rows, 16) if isinstance(base, nn.Linear) else (rows, 4, 5, 4)
    return torch.randn(shape, dtype=base.weight.dtype)


def dense_weight(base_layer, layer, strengths):
    """The merged weight by dense mathematics: the rotation of alpha boft_R and the scale 1 + alpha (s - 1)."""
    weight = base_layer.weight.detach()
    flat = weight.flatten(1)
    for name, strength in strengths.items():
        rotation = rotation_matrix(strength * layer.boft_R[name].detach().to(flat.dtype))
        scale = 1 + strength * (layer.boft_s[name].detach().to(flat.dtype).flatten() - 1)
        flat = scale.unsqueeze(1) * (flat @ rotation.T)
    return flat.view(weight.shape)


def dense_output(base_layer, layer, strengths, x):
    plain = copy.deepcopy(base_layer)
    plain.weight.data = dense_weight(base_layer, layer, strengths)
    return plain(x).detach()


@pytest.mark.parametrize("strength", STRENGTHS)
def test_forward_merge_and_unmerge_use_the_strength(base, strength):
    layer, x = two_adapters(base), batch_for(base)
    layer.set_scale("first", strength)
    strengths = {"first": strength, "second": 1.0}
    assert layer.scaling == strengths
    expected = dense_output(base, layer, strengths, x)
    assert_exact("output", layer(x).detach(), expected)
    with torch.no_grad():
        for _ in range(2):
            assert_exact("output", layer(x), expected)
    layer.merge()
    assert_exact("weight", layer.base_layer.weight.detach(), dense_weight(base, layer, strengths))
    assert_exact("output", layer(x).detach(), expected)
    layer.unmerge()
    assert_exact("weight", layer.base_layer.weight.detach(), base.weight.detach())
    assert_exact("output", layer(x).detach(), expected)


def test_gradients_at_a_strength(base):
    """Against autograd through the dense mathematics."""
    layer, x = make_layer(base, {"default": random_config(4, 2)}), batch_for(base)
    layer.set_scale("default", 0.4)
    layer(x).sin().sum().backward()
    boft_R, boft_s = (p["default"].detach().clone().requires_grad_() for p in (layer.boft_R, layer.boft_s))
    scale = 1 + 0.4 * (boft_s.reshape(-1, 1) - 1)
    weight = (scale * (base.weight.detach().flatten(1) @ rotation_matrix(0.4 * boft_R).T)).view(base.weight.shape)
    torch.func.functional_call(base, {"weight": weight}, x).sin().sum().backward()
    assert_exact("dboft_R", layer.boft_R["default"].grad, boft_R.grad)
    assert_exact("dboft_s", layer.boft_s["default"].grad, boft_s.grad)


def test_strength_one_changes_nothing_and_zero_is_the_base_layer(base):
    layer, x = two_adapters(base), batch_for(base)
    expected = layer(x)
    layer.scale_layer(0.5)
    assert not torch.equal(layer(x), expected)
    layer.unscale_layer(0.5)
    assert layer.scaling == {"first": 1.0, "second": 1.0}
    assert torch.equal(layer(x), expected)
    layer.scale_layer(0)
    assert_exact("output", layer(x).detach(), base(x).detach())
    layer.unscale_layer()
    assert torch.equal(layer(x), expected)


def test_set_scale_and_unscale(base):
    """Setting names an adapter, which may be inactive; the others act on the active adapters only."""
    layer = two_adapters(base)
    layer.set_scale("unknown", 0.5)
    assert layer.scaling == {"first": 1.0, "second": 1.0}
    layer.set_adapter(["second"])
    layer.set_scale("first", 0.25)
    layer.scale_layer(0.5), layer.scale_layer(0.5)
    assert layer.scaling == {"first": 0.25, "second": 0.25}
    layer.unscale_layer(0.5)
    assert layer.scaling == {"first": 0.25, "second": 0.5}
    layer.unscale_layer()
    assert layer.scaling == {"first": 0.25, "second": 1.0}
    layer.set_scale("first", torch.tensor(0.5))
    assert layer.scaling["first"] == 0.5 and type(layer.scaling["first"]) is float


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (lambda layer: layer.set_scale("first", "much"), TypeError, "'much'"),
        (lambda layer: layer.set_scale("first", None), TypeError, "None"),
        (lambda layer: layer.set_scale("first", float("nan")), ValueError, "nan"),
        (lambda layer: layer.scale_layer(float("inf")), ValueError, "inf"),
        (lambda layer: layer.scale_layer(1e200), ValueError, "'second' would change from 1e[+]200"),
        (lambda layer: layer.unscale_layer(0), ValueError, "divided by 0"),
    ],
)
def test_bad_strengths_change_nothing(change, error, named):
    layer = two_adapters(nn.Linear(16, 6))
    layer.set_scale("second", 1e200)
    with pytest.raises(error, match=named):
        change(layer)
    assert layer.scaling == {"first": 1.0, "second": 1e200}


def test_strength_of_a_merged_adapter_cannot_change(base):
    layer = two_adapters(base)
    layer.set_scale("first", 0.5)
    layer.merge(adapter_names=["first"])
    merged = layer.base_layer.weight.clone()
    for change in (lambda: layer.set_scale("first", 0.7), lambda: layer.scale_layer(2), layer.unscale_layer):
        with pytest.raises(ValueError, match="'first' cannot change from 0.5 to .* merged.* unmerge"):
            change()
    assert layer.scaling == {"first": 0.5, "second": 1.0} and torch.equal(layer.base_layer.weight, merged)
    layer.set_scale("first", 0.5), layer.scale_layer(1)
    layer.set_scale("second", 0.3)
    with pytest.warns(UserWarning, match="additionally merging second"):
        layer.merge()
    expected = dense_weight(base, layer, {"first": 0.5, "second": 0.3})
    assert_exact("weight", layer.base_layer.weight.detach(), expected)
    layer.unmerge()
    assert_exact("weight", layer.base_layer.weight.detach(), base.weight.detach())
    layer.unscale_layer()
    assert layer.scaling == {"first": 1.0, "second": 1.0}


def test_a_strength_that_makes_the_scale_zero_is_refused_before_merging(base):
    layer = two_adapters(base)
    with torch.no_grad():
        layer.boft_s["first"].flatten()[3] = 0.5
    layer.set_scale("first", 2.0)
    with pytest.raises(ValueError, match="'first' is 0 for output 3"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, base.weight) and not layer.merged


def test_inference_sees_changes_at_once(base):
    """Of the strength and of the parameters, also through .data; training goes on after inference mode."""
    layer, x = make_layer(base, {"default": random_config(4, 2)}), batch_for(base)
    for strength in (0.5, 0.25, 0.5):
        layer.set_scale("default", strength)
        for change in (0.0, 0.2):
            layer.boft_R["default"].data.add_(change * torch.randn_like(layer.boft_R["default"]))
            expected = dense_output(base, layer, {"default": strength}, x)
            with torch.inference_mode():
                assert_exact("output", layer(x), expected)
            with torch.no_grad():
                assert_exact("output", layer(x), expected)
    layer(x).sum().backward()
    assert layer.boft_R["default"].grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_adapters_lose_nothing_more(base, dtype):
    """A strength does not round the rotation to 16 bits: the output errs by roundings of data only."""
    base, x = copy.deepcopy(base).to(dtype), batch_for(base).to(dtype)
    layer = make_layer(base, {"default": random_config(4, 2)})
    layer.set_scale("default", 0.01)
    assert layer.boft_R["default"].dtype == dtype
    rotation = rotation_matrix(0.01 * layer.boft_R["default"].detach().double())
    pair = layer.get_delta_weight("default")
    assert [part.dtype for part in pair] == [dtype, dtype]
    layer.merge()
    flat = base.weight.detach().double().flatten(1)
    scale = 1 + 0.01 * (layer.boft_s["default"].detach().double().reshape(-1, 1) - 1)
    exact = scale * (flat @ rotation.T)
    error = relative_error(layer.base_layer.weight.detach().flatten(1), exact)
    assert error <= relative_error(exact.to(dtype), exact) + FLOORS[dtype] / 10
    layer.unmerge()
    with torch.no_grad():
        assert layer(x).dtype == dtype
        assert relative_error(layer(x), dense_output(base.double(), layer, {"default": 0.01}, x.double())) < 0.01


def test_get_delta_weight_stays_the_pair(base):
    """The rotation and the scale at the adapter's strength, differentiable; not a difference of weights."""
    layer = make_layer(base, {"default": random_config(4, 2)})
    layer.set_scale("default", 0.5)
    rotation, scale = layer.get_delta_weight("default")
    assert rotation.shape == (16, 16) and scale.shape == (6, 1)
    expected = rotation_matrix(0.5 * layer.boft_R["default"])
    assert_exact("rotation", rotation.detach(), expected.detach())
    assert_exact("scale", scale.detach(), (1 + 0.5 * (layer.boft_s["default"].reshape(-1, 1) - 1)).detach())
    layer.merge()
    merged = (scale * (base.weight.flatten(1) @ rotation.T)).detach()
    assert_exact("weight", layer.base_layer.weight.detach().flatten(1), merged)
    (rotation.sum() + scale.sum()).backward()
    assert layer.boft_R["default"].grad is not None and layer.boft_s["default"].grad is not None


def test_strengths_are_copied_and_pickled_but_not_saved(base):
    layer, x = two_adapters(base), batch_for(base)
    keys = list(layer.state_dict())
    layer.set_scale("first", 0.5)
    assert list(layer.state_dict()) == keys == ["base_layer.weight", "base_layer.bias", *adapter_state(layer)]
    expected = layer(x)
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.scaling == layer.scaling and torch.equal(copied(x), expected)
        copied.set_scale("first", 0.1)
        assert layer.scaling == {"first": 0.5, "second": 1.0}
    fresh = two_adapters(base)
    fresh.load_state_dict(layer.state_dict())
    assert fresh.scaling == {"first": 1.0, "second": 1.0}


def test_copies_of_merged_layers_unmerge(base):
    layer = two_adapters(base)
    layer.set_scale("second", 0.5)
    layer.merge()
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        copied.unmerge()
        assert_exact("weight", copied.base_layer.weight.detach(), base.weight.detach())


def test_deleting_an_adapter_deletes_its_strength():
    model = get_peft_model(nn.Sequential(nn.Linear(16, 6)), random_config(4, 2, target_modules=["0"]))
    config = random_config(4, 1, target_modules=["0"])
    model.add_adapter("other", config)
    layer = model.base_model.model[0]
    layer.set_scale("other", 0.5)
    model.delete_adapter("other")
    assert layer.scaling == {"default": 1.0}
    model.add_adapter("other", config)
    assert layer.scaling == {"default": 1.0, "other": 1.0}


def test_layers_that_peft_made_have_strengths(monkeypatch):
    boft_ext.unpatch_peft()
    monkeypatch.setattr(peft_layer, "get_fbd_cuda", lambda: None)
    base, x = nn.Linear(16, 6), torch.randn(3, 16)
    before, stored = (make_layer(base, {"default": random_config(4, 1)}) for _ in range(2))
    stored = pickle.dumps(stored)
    boft_ext.patch_peft(strict=True)
    for layer in (before, pickle.loads(stored)):
        layer.set_scale("default", 0.5)
        assert_exact("output", layer(x).detach(), dense_output(base, layer, {"default": 0.5}, x))
        assert layer.scaling == {"default": 0.5} and "boft_P" not in layer._buffers
    assert make_layer(base, {"default": random_config(4, 1)}).scaling == {"default": 1.0}


def test_a_layer_at_a_strength_compiles_in_one_graph(base):
    layer, x = make_layer(base.float(), {"default": random_config(4, 2)}), batch_for(base.float())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for strength in (0.5, 1.0, 2.0):
        layer.set_scale("default", strength)
        assert_exact("output", compiled(x).detach(), dense_output(base, layer, {"default": strength}, x))
    compiled(x).sum().backward()
    assert layer.boft_R["default"].grad.abs().max() > 0


# diffusers


TARGETS = ["to_q", "to_v", "conv1", "proj_in"]


@pytest.fixture
def unets():
    """A tiny UNet and the same one with BOFT adapters "style" and "subject" on attention layers and convolutions."""
    diffusers = pytest.importorskip("diffusers")
    plain = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).eval()
    unet = copy.deepcopy(plain)
    unet.add_adapter(random_config(4, 2, target_modules=TARGETS), "style")
    unet.add_adapter(random_config(2, 2, target_modules=TARGETS[:2]), "subject")
    return plain, unet


def denoise(unet, **kwargs):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    with torch.no_grad():
        return unet(sample, 7, torch.randn(2, 3, 16, generator=generator), **kwargs).sample


def dense_denoise(plain, unet, strengths):
    """What the UNet computes by dense mathematics with adapters at these strengths, first to last."""
    dense = copy.deepcopy(plain)
    modules = dict(unet.named_modules())
    for name, module in dense.named_modules():
        layer = modules.get(name)
        if isinstance(layer, peft_layer.BOFTLayer):
            own = {adapter: strength for adapter, strength in strengths.items() if adapter in layer.boft_R}
            module.weight.data = dense_weight(module, layer, own)
    return denoise(dense)


def boft_layers(unet):
    return [module for module in unet.modules() if isinstance(module, peft_layer.BOFTLayer)]


def assert_denoises(unet, expected, **kwargs):
    assert relative_error(denoise(unet, **kwargs), expected) < 1e-4


def test_set_adapters_with_weights(unets):
    plain, unet = unets
    kinds = {type(layer) for layer in boft_layers(unet)}
    assert kinds == {peft_layer.Linear, peft_layer.Conv2d}
    unet.set_adapters("style", 0.5)
    half = dense_denoise(plain, unet, {"style": 0.5})
    assert_denoises(unet, half)
    assert relative_error(half, dense_denoise(plain, unet, {"style": 1.0})) > 1e-2
    unet.set_adapters(["style", "subject"], [0.7, 1.6])
    both = dense_denoise(plain, unet, {"style": 0.7, "subject": 1.6})
    assert_denoises(unet, both)
    unet.set_adapters(["subject", "style"])
    assert_denoises(unet, dense_denoise(plain, unet, {"subject": 1.0, "style": 1.0}))
    unet.set_adapters(["style", "subject"], [0.0, 1.0])
    assert_denoises(unet, dense_denoise(plain, unet, {"subject": 1.0}))


def test_weights_by_block(unets):
    plain, unet = unets
    weights = {"down": 0.2, "mid": 0.4, "up": 0.6}
    unet.set_adapters("style", weights)
    dense, modules = copy.deepcopy(plain), dict(unet.named_modules())
    for name, module in dense.named_modules():
        if isinstance(layer := modules[name], peft_layer.BOFTLayer):
            # diffusers gives a block's weight to its attention layers, and to some of its other layers.
            assert layer.scaling["style"] == weights[name.partition("_")[0]] or "attentions" not in name
            module.weight.data = dense_weight(module, layer, {"style": layer.scaling["style"]})
    assert_denoises(unet, denoise(dense))


def test_scale_of_one_call(unets):
    """`cross_attention_kwargs={"scale": ...}`, which diffusers applies and takes back around the call."""
    plain, unet = unets
    unet.set_adapters("style", 0.8)
    before = denoise(unet)
    for scale in (0.5, 0.0):
        expected = dense_denoise(plain, unet, {"style": 0.8 * scale})
        assert_denoises(unet, expected, cross_attention_kwargs={"scale": scale})
        strengths = {layer.scaling["style"] for layer in boft_layers(unet)}
        # diffusers itself goes back to 1 after a call at 0.
        assert strengths == {0.8 if scale else 1.0}
        unet.set_adapters("style", 0.8)
    assert torch.equal(denoise(unet), before)


def test_fuse_and_unfuse(unets):
    plain, unet = unets
    unet.set_adapters(["style", "subject"], [0.5, 0.8])
    unfused = denoise(unet)
    unet.fuse_lora(lora_scale=0.5, safe_fusing=True)
    expected = dense_denoise(plain, unet, {"style": 0.25, "subject": 0.4})
    assert_denoises(unet, expected)
    with pytest.raises(ValueError, match="merged.*unfuse"):
        unet.set_adapters("style", 0.9)
    assert_denoises(unet, expected)
    unet.unfuse_lora()
    for name, module in plain.named_modules():
        layer = dict(unet.named_modules())[name]
        if isinstance(layer, peft_layer.BOFTLayer):
            assert_exact(name, layer.base_layer.weight.detach(), module.weight.detach())
    unet.set_adapters(["style", "subject"], [0.5, 0.8])
    assert relative_error(denoise(unet), unfused) < 1e-5
    unet.set_adapters("subject", 0.8)
    unet.fuse_lora(adapter_names=["subject"])
    assert_denoises(unet, dense_denoise(plain, unet, {"subject": 0.8}))


def test_disable_and_enable(unets):
    plain, unet = unets
    unet.set_adapters(["style", "subject"], [0.5, 0.8])
    with_adapters = denoise(unet)
    unet.disable_lora()
    assert torch.equal(denoise(unet), denoise(plain))
    unet.enable_lora()
    assert torch.equal(denoise(unet), with_adapters)
    unet.delete_adapters("style")
    assert all(layer.scaling == ({"subject": 0.8} if "subject" in layer.boft_R else {}) for layer in boft_layers(unet))
    assert_denoises(unet, dense_denoise(plain, unet, {"subject": 0.8}))
