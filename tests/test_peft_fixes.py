"""What is wrong in PEFT's BOFT layers (PEFT 0.21.2) and right under the patch: an index, one or a few short tests each.

Every test shows a defect as a user meets it and fails where `patch_peft` does nothing. The list of defects has no D7,
D25 and D26; D27 has no test: it is an assertion in PEFT's own tests that is always true, which no program can meet.
m is 1 wherever m is not the point, so that a test fails for its own reason and not for D1's.
"""

import copy
import json
import os
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.boft import layer as peft_layer
from peft.utils.quantization_utils import ForwardOnlyQuantizationBackend
from peft_oracle import adapter_state, make_layer, random_config
from safetensors.torch import save_file
from tolerance import assert_exact, relative_error
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

import boft_ext
from boft_ext import functional, ops


@pytest.fixture(autouse=True)
def patched():
    boft_ext.patch_peft(strict=True)
    yield
    boft_ext.unpatch_peft()


class Operators(TorchDispatchMode):
    """Within the block: how many operators are called, and the tensors that they return."""

    def __init__(self):
        super().__init__()
        self.calls, self.results = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls += 1
        self.results += [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return result


def profiled(function):
    """The profiler's events while `function` runs, from inside operators too, and what it returns."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = function()
    return seen.profiler.kineto_results.events(), result


def largest_allocation(function):
    """Bytes of the largest piece of memory that torch takes while `function` runs, and what that returns."""
    events, result = profiled(function)
    return max(event.nbytes() for event in events if event.name() == "[memory]"), result


def operators(function, part):
    """The names with `part` in them among those of all operators that run in `function`, also inside of others."""
    events, _ = profiled(function)
    names = [event.name() for event in events]
    assert any(name.startswith("aten::") for name in names)
    return [name for name in names if part in name]


BASES = pytest.mark.parametrize("base", [nn.Linear(16, 8), nn.Conv2d(4, 8, 2)], ids=["linear", "conv"])


def batch_for(base):
    return torch.randn(3, 16) if isinstance(base, nn.Linear) else torch.randn(3, 4, 5, 5)


def adapted(base, b=4, m=1, **kwargs):
    """A layer of PEFT around a copy of `base` with one adapter, away from the identity."""
    return make_layer(base, {"default": random_config(b, m, **kwargs)})


def model_of(*layers, b=4, m=1, **kwargs):
    """A model of these layers, of which the first is adapted."""
    return get_peft_model(nn.Sequential(*layers), random_config(b, m, target_modules=["0"], **kwargs))


def dense_weight(layer):
    """``diag(s) W R^T``, each group of a convolution with its own diagonal part of R."""
    base, rotation = layer.base_layer, functional.rotation_matrix(layer.boft_R["default"])
    groups = base.weight.flatten(1).chunk(getattr(base, "groups", 1))
    size = groups[0].shape[1]
    parts = [rotation[n * size : (n + 1) * size, n * size : (n + 1) * size] for n in range(len(groups))]
    rows = torch.cat([group @ part.T for group, part in zip(groups, parts, strict=True)])
    return (layer.boft_s["default"].reshape(-1, 1) * rows).reshape(base.weight.shape).detach()


def test_d01_adapters_have_the_configured_number_of_factors():
    model = model_of(nn.Linear(16, 8), m=3)
    assert model.base_model.model[0].boft_R["default"].shape == (3, 4, 4, 4)


def test_d01_files_whose_configuration_says_another_m_load(tmp_path):
    """Such files were written wherever PEFT had no kernel."""
    model, x = model_of(nn.Linear(16, 8)).eval(), torch.randn(3, 16)
    base = copy.deepcopy(model).unload()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "boft_n_butterfly_factor": 2}))
    with pytest.warns(UserWarning, match="boft_n_butterfly_factor = 2.* m = 1"):
        loaded = PeftModel.from_pretrained(base, tmp_path)
    assert loaded.peft_config["default"].boft_n_butterfly_factor == 1
    assert relative_error(loaded(x), model(x)) < 1e-6


@BASES
def test_d02_adapters_of_different_shapes_do_not_disturb_each_other(base):
    configs, x = {"wide": random_config(8, 2), "deep": random_config(2, 3)}, batch_for(base)
    both = make_layer(base, configs)
    for name, config in configs.items():
        both.set_adapter([name])
        alone = make_layer(base, {name: config})
        alone.load_state_dict(adapter_state(both), strict=False)
        assert both.boft_R[name].shape[0] == config.boft_n_butterfly_factor
        assert torch.equal(both(x), alone(x))


CONVOLUTIONS = {
    "non-square": ((4, 6, (3, 1)), {}),
    "stride": ((4, 6, 3), {"stride": (1, 2)}),
    "padding": ((4, 6, 3), {"padding": (0, 2)}),
    "same": ((4, 6, 3), {"padding": "same"}),
    "dilation": ((4, 6, 3), {"dilation": (1, 2)}),
    "padding_mode": ((4, 6, 3), {"padding": 1, "padding_mode": "circular"}),
    "groups": ((8, 6, 3), {"groups": 2}),
}


@pytest.mark.parametrize("option", CONVOLUTIONS)
def test_d03_convolutions_of_every_kind(option):
    sizes, options = CONVOLUTIONS[option]
    layer = adapted(nn.Conv2d(*sizes, **options).double())
    x = torch.randn(2, sizes[0], 7, 8, dtype=torch.float64)
    exact = nn.Conv2d(*sizes, **options).double()
    exact.load_state_dict({"weight": dense_weight(layer), "bias": layer.base_layer.bias})
    assert_exact("unmerged", layer(x).detach(), exact(x).detach())
    layer.merge()
    assert_exact("merged", layer(x).detach(), exact(x).detach())


def test_d04_a_safe_merge_of_a_convolution_refuses_nan():
    layer = adapted(nn.Conv2d(4, 8, 2))
    before = layer.base_layer.weight.clone()
    layer.boft_s["default"].data[0, 3] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged


@BASES
def test_d05_the_strength_of_an_adapter_can_be_set(base):
    layer, x = adapted(base), batch_for(base)
    full = layer(x)
    layer.set_scale("default", 0.0)
    assert relative_error(layer(x), base(x)) < 1e-6
    layer.set_scale("unknown", 0.5)
    layer.unscale_layer()
    assert torch.equal(layer(x), full) and not torch.equal(full, base(x))


def test_d06_rows_of_a_mixed_batch_have_their_own_adapters():
    model = model_of(nn.Linear(16, 8)).eval()
    model.add_adapter("other", random_config(2, 1, target_modules=["0"]))
    x = torch.randn(3, 16)
    out = model(x, adapter_names=["default", "other", "__base__"])
    for row, name in enumerate(("default", "other")):
        model.set_adapter(name)
        assert relative_error(out[row], model(x)[row]) < 1e-6
    with model.disable_adapter():
        assert relative_error(out[2], model(x)[2]) < 1e-6


def test_d08_the_compilers_of_the_environment_stay(failing_build, monkeypatch):
    monkeypatch.setenv("CC", "my-cc")
    monkeypatch.delenv("CXX", raising=False)
    model_of(nn.Linear(16, 8))
    assert os.environ["CC"] == "my-cc" and "CXX" not in os.environ


def test_d09_an_unmerged_weight_can_be_saved(tmp_path):
    layer = adapted(nn.Linear(16, 8))
    layer.merge()
    layer.unmerge()
    assert layer.base_layer.weight.is_contiguous()
    save_file(layer.base_layer.state_dict(), tmp_path / "base.safetensors")


@BASES
def test_d09_a_scale_of_zero_that_would_destroy_the_weight_is_refused(base):
    layer = adapted(base)
    layer.boft_s["default"].data.flatten()[2] = 0
    with pytest.raises(ValueError, match="'default' is 0 for output 2"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, base.weight) and not layer.merged


@BASES
def test_d09_a_sixteen_bit_weight_survives_merging(base):
    layer = adapted(copy.deepcopy(base).bfloat16())
    before = layer.base_layer.weight.clone()
    for _ in range(3):
        layer.merge()
        layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)


def test_d10_a_new_adapter_changes_nothing_in_bfloat16():
    """Subtracting the bias and adding it again loses what is small beside it."""
    base = nn.Linear(16, 8).bfloat16()
    base.bias.data.fill_(10)
    layer, x = adapted(base), 10 * torch.randn(50, 16).bfloat16()
    layer.reset_boft_parameters("default", True)
    assert torch.equal(layer(x), base(x))


def test_d10_the_bias_may_be_there_only_while_the_base_layer_runs():
    """As under ZeRO-3, which takes it away again after the base layer's forward."""
    layer, x = adapted(nn.Linear(16, 8)), torch.randn(3, 16)
    exact, base = layer(x).detach(), layer.base_layer
    bias, nothing = base.bias.data, torch.empty(0)

    def bring(module, args):
        module.bias.data = bias

    def take(module, args, out):
        module.bias.data = nothing

    base.register_forward_pre_hook(bring)
    base.register_forward_hook(take)
    base.bias.data = nothing
    assert relative_error(layer(x), exact) < 1e-6


def test_d11_a_convolution_runs_its_base_layer():
    layer, x, seen = adapted(nn.Conv2d(4, 8, 2)), torch.randn(3, 4, 5, 5), []
    layer.base_layer.register_forward_hook(lambda module, args, out: seen.append(out) or 2 * out)
    out = layer(x)
    assert len(seen) == 1 and torch.equal(out, 2 * seen[0])


def test_d12_a_quantised_convolution_is_recognised(monkeypatch):
    def resolve(base_layer, get_apply_tensor_subclass=None):
        return ForwardOnlyQuantizationBackend("int8") if get_apply_tensor_subclass else None

    monkeypatch.setattr(peft_layer, "resolve_quantization_backend", resolve)
    base, how = nn.Conv2d(4, 8, 2), object()
    layer = peft_layer.Conv2d(base, "default", config=random_config(4, 1), get_apply_tensor_subclass=how)
    assert "int8" in repr(layer)


def test_d13_nothing_is_as_large_as_the_square_of_the_channels():
    """In a layer, in making it, in its forward and in its backward."""
    d = 1024
    x, square = torch.randn(4, d, requires_grad=True), d * d * 4
    made, layer = largest_allocation(lambda: adapted(nn.Linear(d, 8)))
    used, _ = largest_allocation(lambda: layer(x).sum().backward())
    kept = sum(tensor.nbytes for tensor in [*layer.parameters(), *layer.buffers()])
    assert max(made, used, kept) < square / 8


@BASES
def test_d14_every_tensor_of_a_layer_lies_with_its_base_layer(base):
    """The meta device stands for any device that the model was on before it got adapters."""
    layer = adapted(copy.deepcopy(base).to("meta"))
    assert {tensor.device.type for tensor in [*layer.parameters(), *layer.buffers()]} == {"meta"}


@BASES
def test_d15_training_solves_no_linear_systems(base):
    layer, x = adapted(base), batch_for(base)
    assert operators(lambda: layer(x).sum().backward(), "linalg_solve") == []


@BASES
def test_d15_evaluation_computes_a_rotation_once(base):
    """Seen where there is no kernel, so that making a rotation solves systems."""
    layer, x = adapted(base).eval(), batch_for(base)
    with ops.without_kernels(), torch.no_grad():
        assert operators(lambda: layer(x), "linalg_solve")
        assert operators(lambda: layer(x), "linalg_solve") == []


@BASES
def test_d16_dropout_reads_no_value_back(base):
    """On a device, reading one makes the processor wait."""
    layer, x = adapted(base, boft_dropout=0.5), batch_for(base)
    assert operators(lambda: layer(x).sum().backward(), "_local_scalar_dense") == []


def dropped(layer):
    """For each block of four channels, whether a training step leaves it unrotated."""
    return (layer(torch.eye(16)[::4]) == torch.eye(16)[::4]).all(dim=1)


def identity_layer(**kwargs):
    base = nn.Linear(16, 16, bias=False)
    base.weight.data = torch.eye(16)
    layer = adapted(base, **kwargs)
    layer.boft_s["default"].data.fill_(1)
    return layer


def test_d17_a_small_share_of_few_blocks_is_dropped_now_and_then():
    boft_ext.patch_peft(dropout=(1.0, 0.1))
    layer = identity_layer(boft_dropout=0.1)
    shares = torch.stack([dropped(layer) for _ in range(300)]).float().mean(dim=0)
    assert shares.min() > 0 and shares.max() < 0.25


def test_d17_blocks_of_all_factors_are_dropped():
    boft_ext.patch_peft(dropout="paper")
    layer = identity_layer(m=2, boft_dropout=1.0)
    assert layer.boft_R["default"].shape[0] == 2 and dropped(layer).all()


@BASES
def test_d18_a_sixteen_bit_model_with_float32_adapters_computes_in_sixteen_bits(base):
    layer, x = adapted(copy.deepcopy(base).bfloat16()), batch_for(base).bfloat16()
    layer.boft_R.float(), layer.boft_s.float()
    with Operators() as seen:
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert {tensor.dtype for tensor in seen.results if tensor.shape == out.shape} == {torch.bfloat16}


@BASES
def test_d18_autocast_decides_about_the_output(base):
    layer, x = adapted(base), batch_for(base)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == layer.base_layer(x).dtype == torch.bfloat16


def test_d18_a_rotation_in_bfloat16_errs_no_more_than_rounding_its_result():
    base = nn.Linear(64, 64, bias=False).bfloat16()
    base.weight.data = torch.eye(64).bfloat16()
    layer, x = adapted(base, b=8), torch.randn(500, 64).bfloat16()
    layer.boft_R.float(), layer.boft_s.float()
    layer.boft_s["default"].data.fill_(1)
    exact = x.double() @ functional.rotation_matrix(layer.boft_R["default"].detach().double())
    rounded = exact.bfloat16()
    assert relative_error(layer(x), exact) < 1.05 * relative_error(rounded, exact)


def test_d19_layers_build_nothing_and_warn_of_nothing(failing_build):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        get_peft_model(two, random_config(4, 1, target_modules=["0", "1"]))
    assert failing_build == []


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_d20_wide_layers_take_no_more_steps_to_make(kind):
    def steps(d):
        base = nn.Linear(d, 8) if kind == "linear" else nn.Conv2d(d, 8, 1)
        with Operators() as seen:
            adapted(base)
        return seen.calls

    assert steps(256) == steps(32)


def test_d21_messages_name_m_and_the_largest_one_that_fits():
    base = nn.Linear(24, 8)
    with pytest.raises(ValueError, match=r"butterfly_factor = 3 .* 24 channels in 6 blocks of 4.* at most m = 2"):
        make_layer(base, {"default": random_config(0, 3, boft_block_num=6)})
    assert make_layer(base, {"default": random_config(0, 2, boft_block_num=6)}).boft_R["default"].shape[0] == 2


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_d22_layers_that_store_their_weight_transposed(fan_in_fan_out):
    base, x = Conv1D(8, 16), torch.randn(3, 16)
    nn.init.normal_(base.bias)
    layer = model_of(base, fan_in_fan_out=fan_in_fan_out).base_model.model[0]
    rotation, scale = functional.rotation_matrix(layer.boft_R["default"]), layer.boft_s["default"].T
    exact = (x @ rotation @ base.weight) * scale + base.bias
    assert relative_error(layer(x), exact) < 1e-6
    layer.merge()
    assert relative_error(layer(x), exact) < 1e-6


def test_d23_effective_parameters_are_counted_beside_stored_ones():
    model = model_of(nn.Linear(16, 6), m=2)
    total = boft_ext.parameter_report(model).totals["default"]
    assert total.stored == model.get_nb_trainable_parameters()[0] == 2 * 16 * 4 + 6
    assert total.effective == 2 * 16 * 3 // 2 + 6


def test_d24_adapters_are_combined_by_weight_and_converted_to_lora(tmp_path):
    model, x = model_of(nn.Linear(16, 8)).eval(), torch.randn(3, 16)
    base = copy.deepcopy(model).unload()
    model.add_adapter("other", random_config(8, 1, target_modules=["0"]))
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model[0]
    layer.set_scale("default", 0.3)
    layer.set_scale("other", 0.6)
    first, second = (functional.rotation_matrix(w * layer.boft_R[n]) for n, w in (("default", 0.3), ("other", 0.6)))
    scale = (1 + 0.3 * (layer.boft_s["default"] - 1)) * (1 + 0.6 * (layer.boft_s["other"] - 1))
    exact = (x @ second @ first) @ base[0].weight.T * scale.T + base[0].bias
    assert relative_error(model(x), exact) < 1e-6
    boft_ext.export_lora(model, tmp_path, rank=8, progress=False)
    assert relative_error(PeftModel.from_pretrained(base, tmp_path)(x), exact) < 1e-5
