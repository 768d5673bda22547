"""patch_peft: its life cycle, and PEFT's BOFT layers on these kernels against PEFT's own mathematics."""

import contextlib
import copy
import gc
import json
import os
import pickle
import subprocess
import sys
import warnings
import weakref

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from peft import BOFTConfig, PeftModel, get_peft_model, inject_adapter_in_model  # noqa: E402
from peft.tuners.boft import BOFTModel  # noqa: E402
from peft.tuners.boft import layer as peft_layer  # noqa: E402
from peft_oracle import (  # noqa: E402
    adapter_state,
    assert_needs_the_patch,
    make_layer,
    observe,
    peft_mathematics,
    random_config,
)
from tolerance import EXACT, FLOORS, assert_exact, relative_error  # noqa: E402

import boft_ext  # noqa: E402

PATCHED_CLASSES = (peft_layer.BOFTLayer, peft_layer.Linear, peft_layer.Conv2d, BOFTModel, BOFTConfig)


@contextlib.contextmanager
def patch():
    yield boft_ext.patch_peft(strict=True)
    boft_ext.unpatch_peft()


@pytest.fixture
def patched():
    """PEFT patched for one test, with the default options; the test may call `patch_peft` for others."""
    with patch() as status:
        yield status


@pytest.fixture
def no_kernel(monkeypatch):
    """PEFT finds no kernel, as on any machine without a CUDA compiler, and does not try to build one; its pull request
    3540 has none to look for."""
    if hasattr(peft_layer, "get_fbd_cuda"):
        monkeypatch.setattr(peft_layer, "get_fbd_cuda", lambda: None)


@pytest.fixture
def unpatch_after():
    yield
    boft_ext.unpatch_peft()


def class_attributes():
    return {cls: dict(vars(cls)) for cls in PATCHED_CLASSES}


def mlp(d=16, out=12):
    return nn.Sequential(nn.Linear(d, out), nn.Tanh(), nn.Linear(out, 3))


def adapted(base, b=4, m=2, **kwargs):
    return get_peft_model(base, random_config(b, m, target_modules=["0"], **kwargs))


def assert_same(seen, exact):
    assert seen.keys() == exact.keys()
    for what, tensor in seen.items():
        assert_exact(what, tensor, exact[what])


def compare_with_peft(base, x, configs, dtype):
    """One layer with PEFT's mathematics in float64 and the same one patched, in `dtype`."""
    base.weight.requires_grad_(False)
    with peft_mathematics():
        theirs = make_layer(base.double(), configs).double()
        exact = observe(theirs, x.double())
    boft_ext.patch_peft(strict=True)
    ours = make_layer(base.to(dtype), configs)
    ours.load_state_dict(adapter_state(theirs), strict=False)
    assert_same(observe(ours, x.to(dtype)), exact)


# Forward, gradients, merge and unmerge against PEFT's mathematics

LINEAR = [(24, 10, 4, 1), (15, 7, 5, 1), (24, 16, 4, 2), (60, 9, 10, 2), (64, 12, 4, 3)]
CONV = [((5, 4, 3), {}, 5, 1), ((4, 6, 3), {"stride": 2, "padding": 1}, 6, 2), ((8, 5, 2), {"padding": 1}, 4, 3)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("d", "out", "b", "m"), LINEAR)
def test_linear_matches_peft(d, out, b, m, bias, dtype, unpatch_after):
    base = nn.Linear(d, out, bias=bias)
    compare_with_peft(base, torch.randn(2, 5, d), {"default": random_config(b, m)}, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("sizes", "options", "b", "m"), CONV)
def test_conv_matches_peft(sizes, options, b, m, bias, dtype, unpatch_after):
    base = nn.Conv2d(*sizes, bias=bias, **options)
    compare_with_peft(base, torch.randn(2, sizes[0], 7, 6), {"default": random_config(b, m)}, dtype)


@pytest.mark.parametrize("base", [nn.Linear(24, 10), nn.Conv2d(4, 6, 3)], ids=["linear", "conv"])
def test_several_adapters_match_peft(base, unpatch_after):
    x = torch.randn(3, 24) if isinstance(base, nn.Linear) else torch.randn(2, 4, 6, 6)
    configs = {name: random_config(2, 3 if x.dim() == 2 else 2) for name in ("first", "second", "third")}
    compare_with_peft(copy.deepcopy(base), x, configs, torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("base", [nn.Linear(64, 48), nn.Conv2d(8, 16, 4)], ids=["linear", "conv"])
def test_sixteen_bit_layers_err_no_more_than_peft(base, dtype, unpatch_after):
    """At most twice the error of PEFT's mathematics at the same dtype, with adapters in float32 as PEFT keeps them."""
    base, configs = copy.deepcopy(base).requires_grad_(False).to(dtype), {"default": random_config(8, 2)}
    x = torch.randn(9, 64) if isinstance(base, nn.Linear) else torch.randn(2, 8, 9, 9)
    x = x.to(dtype)

    def layer_with(state):
        layer = make_layer(base, configs)
        layer.boft_R.float(), layer.boft_s.float()
        layer.load_state_dict(state, strict=False)
        return layer

    with peft_mathematics():
        wide = make_layer(copy.deepcopy(base).double(), configs).double()
        state = {name: tensor.float() for name, tensor in adapter_state(wide).items()}
        wide.load_state_dict(state, strict=False)
        exact = observe(wide, x.double())
        theirs = observe(layer_with(state), x)
    boft_ext.patch_peft(strict=True)
    ours = observe(layer_with(state), x)
    assert ours["out"].dtype == dtype
    assert torch.equal(ours.pop("unmerged weight"), base.weight)
    for what, tensor in ours.items():
        limit = 2 * relative_error(theirs[what], exact[what]) + FLOORS[dtype]
        assert relative_error(tensor, exact[what]) <= limit, what


def test_dropout_drops_the_blocks_that_peft_drops(unpatch_after):
    configs = {"default": random_config(4, 3, boft_dropout=0.4)}
    base, x = nn.Linear(32, 6).double(), torch.randn(5, 32, dtype=torch.float64)
    with peft_mathematics():
        theirs = make_layer(base, configs)
        torch.manual_seed(7)
        exact = [theirs(x).detach() for _ in range(6)]
    boft_ext.patch_peft(strict=True)
    ours = make_layer(base, configs)
    ours.load_state_dict(adapter_state(theirs), strict=False)
    torch.manual_seed(7)
    for step in exact:
        assert_exact("output", ours(x).detach(), step)
    assert not torch.equal(exact[0], exact[1])


# What PEFT cannot do and what must hold besides


def test_making_layers_leaves_the_compilers_of_the_environment(failing_build, monkeypatch, patched):
    """PEFT leaves CC and CXX changed where its build fails."""
    monkeypatch.setenv("CC", "my-cc")
    monkeypatch.delenv("CXX", raising=False)
    before = dict(os.environ)
    get_peft_model(nn.Sequential(nn.Linear(16, 8)), random_config(4, 2, target_modules=["0"]))
    assert dict(os.environ) == before


def test_making_layers_builds_nothing_and_warns_of_nothing(failing_build, patched):
    """PEFT tries to build its kernel, and warns that it cannot, once more for every layer."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        base = nn.Sequential(*[nn.Linear(16, 16) for _ in range(3)])
        model = get_peft_model(base, random_config(4, 2, target_modules=["0", "2"]))
        model(torch.randn(2, 16)).sum().backward()
    assert failing_build == [] and [str(warning.message) for warning in caught] == []
    assert model.base_model.model[2].boft_R["default"].shape[0] == 2


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((4, 6, (3, 1)), {"stride": (2, 1), "padding": (1, 0)}),
        ((8, 6, 3), {"dilation": (1, 2), "padding": "same"}),
        ((8, 6, (1, 3)), {"padding": (0, 2), "padding_mode": "circular"}),
        ((16, 6, 3), {"groups": 2}),
    ],
)
def test_conv_options_are_honoured(sizes, options, patched):
    """Unmerged equals merged, and merged is the rotation that `get_delta_weight` shows, group by group."""
    base = nn.Conv2d(*sizes, **options).double()
    layer = make_layer(base, {"default": random_config(2, 2)})
    x = torch.randn(2, sizes[0], 9, 8, dtype=torch.float64)
    out = layer(x)
    rotation, scale = layer.get_delta_weight("default")
    layer.merge()
    assert_exact("output", out.detach(), layer(x).detach())
    size = base.weight[0].numel()
    for row, merged in enumerate(layer.base_layer.weight.detach()):
        start = row // (base.out_channels // base.groups) * size
        part = rotation[start : start + size, start : start + size]
        assert_exact("weight", merged.flatten(), (scale[row] * (base.weight[row].flatten() @ part.T)).detach())


def test_adapters_of_different_shapes_compose(patched):
    """x meets the last adapter first; scales multiply."""
    base, x = nn.Linear(24, 5).double(), torch.randn(3, 24, dtype=torch.float64)
    layer = make_layer(base, {"wide": random_config(12, 1), "deep": random_config(2, 3)})
    (wide, wide_scale), (deep, deep_scale) = (layer.get_delta_weight(name) for name in ("wide", "deep"))
    expected = (x @ deep @ wide) @ base.weight.T * (wide_scale * deep_scale).T + base.bias
    assert_exact("output", layer(x).detach(), expected.detach())
    at_once = copy.deepcopy(layer)
    at_once.merge()
    layer.merge(adapter_names=["wide"])
    with pytest.warns(UserWarning, match="additionally merging deep"):
        layer.merge(adapter_names=["deep"])
    assert torch.equal(layer.base_layer.weight, at_once.base_layer.weight)
    with pytest.warns(UserWarning, match="already merged, nothing to do"):
        layer.merge()
    layer.unmerge()
    assert_exact("weight", layer.base_layer.weight.detach(), base.weight.detach())


@pytest.mark.parametrize("base", [nn.Linear(16, 8), nn.Conv2d(4, 8, 2)], ids=["linear", "conv"])
def test_dtypes(base, patched):
    x = torch.randn(3, 16) if isinstance(base, nn.Linear) else torch.randn(3, 4, 5, 5)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        layer = make_layer(base.to(dtype), {"default": random_config(4, 2)})
        assert layer.boft_R["default"].dtype == dtype
        assert layer(x.to(dtype)).dtype == dtype
        layer.merge()
        assert layer(x.to(dtype)).dtype == dtype
    layer = make_layer(base.to(torch.float32), {"default": random_config(4, 2)})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        assert out.dtype == layer.base_layer(x).dtype == torch.bfloat16
        layer.merge()
        assert layer(x).dtype == torch.bfloat16
    assert layer.boft_R["default"].dtype == torch.float32
    assert relative_error(out, layer(x)) < 0.02


def test_convolution_runs_the_hooks_of_its_base_layer(patched):
    from accelerate import cpu_offload

    layer = make_layer(nn.Conv2d(4, 6, 3), {"default": random_config(4, 1)})
    x = torch.randn(2, 4, 6, 6)
    expected = layer(x).detach()
    seen = []
    handle = layer.base_layer.register_forward_hook(lambda module, args, out: seen.append(out.detach()))
    assert torch.equal(layer(x), expected) and torch.equal(seen[0], expected)
    handle.remove()
    cpu_offload(layer.base_layer, execution_device="cpu")
    assert layer.base_layer.weight.is_meta
    assert torch.equal(layer(x), expected)


def test_a_layer_compiles_in_one_graph(patched):
    for base, x in ((nn.Linear(16, 8), torch.randn(3, 16)), (nn.Conv2d(4, 8, 2), torch.randn(3, 4, 5, 5))):
        layer = make_layer(base, {"default": random_config(4, 2, boft_dropout=0.5)})
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        compiled(x).sum().backward()
        assert layer.boft_R["default"].grad.abs().max() > 0
        layer.eval()
        assert_exact("output", compiled(x).detach(), layer.double()(x.double()).detach())


# Creation


def test_layers_have_the_configured_factors_and_no_tables(patched):
    config = BOFTConfig(boft_block_num=1024, boft_block_size=0, boft_n_butterfly_factor=11)
    layer = make_layer(nn.Linear(4096, 8), {"default": config})
    assert layer.boft_R["default"].shape == (11, 1024, 4, 4)
    assert layer.boft_s["default"].shape == (8, 1)
    assert list(layer.buffers()) == []
    x = torch.randn(2, 4096)
    assert torch.equal(layer(x), layer.base_layer(x))
    conv = make_layer(nn.Conv2d(3, 8, (3, 1)), {"default": BOFTConfig(boft_block_size=3)})
    assert conv.boft_R["default"].shape == (1, 3, 3, 3) and conv.boft_s["default"].shape == (1, 8)
    assert conv.boft_block_size == {"default": 3} and conv.boft_block_num == {"default": 3}


@pytest.mark.parametrize(
    ("options", "numbers"),
    [
        ({"boft_block_size": 5}, ["24", "5"]),
        ({"boft_block_size": 0, "boft_block_num": 7}, ["24", "7"]),
        ({"boft_block_size": 3, "boft_n_butterfly_factor": 2}, ["factor = 2", "even block size, got 3"]),
        ({"boft_block_size": 4, "boft_n_butterfly_factor": 3}, ["3", "4", "24", "m = 2"]),
        ({"boft_block_size": 4, "boft_n_butterfly_factor": 0}, ["boft_n_butterfly_factor", "0"]),
        ({"boft_block_size": 4, "boft_n_butterfly_factor": 2.0}, ["boft_n_butterfly_factor", "2.0"]),
        ({"boft_block_size": 4, "boft_dropout": 1.5}, ["boft_dropout", "1.5"]),
        ({"boft_block_size": 4, "init_weights": "gaussian"}, ["init_weights", "gaussian"]),
    ],
)
def test_bad_configurations_change_nothing(options, numbers, patched):
    """The first layer accepts what the second refuses, or both refuse it."""
    model = nn.Sequential(nn.Linear(1680, 24), nn.Linear(24, 2), nn.Conv2d(24, 2, 1))
    before = list(model)
    config = BOFTConfig(target_modules=["0", "1", "2"], **options)
    with pytest.raises(ValueError) as error:
        get_peft_model(model, config)
    assert all(number in str(error.value) for number in numbers)
    assert all(now is then for now, then in zip(model, before, strict=True))

    model = get_peft_model(model, BOFTConfig(target_modules=["0", "1", "2"], boft_block_size=4))
    keys, layer = list(model.state_dict()), model.base_model.model[0]
    with pytest.raises(ValueError):
        model.add_adapter("other", config)
    assert list(model.state_dict()) == keys and list(model.peft_config) == ["default"]
    assert layer.boft_dropout.keys() == layer.boft_block_size.keys() == {"default"}


def test_grouped_convolution_that_does_not_fit_is_refused(patched):
    with pytest.raises(ValueError, match="groups = 2 of 12.* = 8 "):
        make_layer(nn.Conv2d(8, 4, (3, 1), groups=2), {"default": random_config(4, 2)})


def test_deleting_an_adapter_leaves_nothing_of_it(patched):
    model = adapted(mlp())
    model.add_adapter("other", random_config(2, 1, target_modules=["0"]))
    layer = model.base_model.model[0]
    containers = [getattr(layer, name) for name in layer.adapter_layer_names + layer.other_param_names]
    assert all(set(container.keys()) == {"default", "other"} for container in containers)
    model.delete_adapter("other")
    assert all("other" not in getattr(layer, name) for name in layer.adapter_layer_names + layer.other_param_names)
    assert "other" not in layer.boft_ext_configs


# Files


def edit_config(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("said", [1, 2, 9])
def test_m_comes_from_the_file(said, low_cpu_mem_usage, tmp_path, patched):
    """A wrong m in the configuration, even one that no layer could have, is corrected with a warning."""
    base, x = nn.Sequential(nn.Linear(24, 24), nn.Conv2d(6, 4, 2), nn.Linear(24, 2)), torch.randn(4, 24)
    true = 1 if said == 2 else 2
    model = get_peft_model(copy.deepcopy(base), random_config(4, true, target_modules=["0", "1"])).eval()
    model.save_pretrained(tmp_path)
    edit_config(tmp_path, boft_n_butterfly_factor=said)
    with pytest.warns(UserWarning, match=f"boft_n_butterfly_factor = {said}.* m = {true}") as caught:
        loaded = PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert sum("corrected" in str(warning.message) for warning in caught) == 1
    assert loaded.peft_config["default"].boft_n_butterfly_factor == true
    for name in "01":
        theirs, ours = model.base_model.model[int(name)], loaded.base_model.model[int(name)]
        assert torch.equal(theirs.boft_R["default"], ours.boft_R["default"])
        assert ours.boft_R["default"].device.type == "cpu"
    assert torch.equal(loaded.base_model.model[0](x), model.base_model.model[0](x))
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PeftModel.from_pretrained(mlp(24, 24)[:1].append(nn.Conv2d(6, 4, 2)), again)


def test_an_optimiser_keeps_a_parameter_that_loading_resizes(patched):
    source, target = adapted(mlp(), m=2), adapted(mlp(), m=1)
    layer = target.base_model.model[0]
    parameter = layer.boft_R["default"]
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    with pytest.warns(UserWarning, match="m = 2"):
        target.load_state_dict(source.state_dict())
    assert layer.boft_R["default"] is parameter and parameter.shape[0] == 2
    before = parameter.detach().clone()
    target(torch.randn(3, 16)).sum().backward()
    optimizer.step()
    assert not torch.equal(parameter[1], before[1])


def test_tensors_that_do_not_fit_are_refused(patched):
    target = adapted(mlp(), m=2)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    key = "base_model.model.0.boft_R.default"
    for shape in ((4, 4, 4, 4), (2, 2, 8, 8), (0, 4, 4, 4)):
        with pytest.raises(RuntimeError, match="size mismatch"):
            target.load_state_dict({**before, key: torch.zeros(shape)})
        assert torch.equal(target.state_dict()[key], before[key])


def test_old_files_with_permutation_tables_load(tmp_path, patched):
    from safetensors.torch import load_file, save_file

    model = adapted(mlp()).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    assert sorted(tensors) == ["base_model.model.0.boft_R", "base_model.model.0.boft_s"]
    save_file({**tensors, "base_model.model.0.boft_P": torch.zeros(2, 16, 16)}, path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model.unload()), tmp_path)
    assert torch.equal(loaded.state_dict()["base_model.model.0.boft_R.default"], tensors["base_model.model.0.boft_R"])


# Merging


@pytest.mark.parametrize("base", [nn.Linear(16, 8), nn.Conv2d(4, 8, 2)], ids=["linear", "conv"])
def test_safe_merge_of_a_broken_adapter_changes_nothing(base, patched):
    layer = make_layer(base, {"default": random_config(4, 2), "broken": random_config(4, 1)})
    with torch.no_grad():
        layer.boft_s["broken"][:] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter broken seems to be broken"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, base.weight) and not layer.merged


def test_zero_scale_is_refused_before_merging(patched):
    layer = make_layer(nn.Linear(8, 4), {"default": random_config(4, 1)})
    weight = layer.base_layer.weight.clone()
    with torch.no_grad():
        layer.boft_s["default"][2] = 0
    with pytest.raises(ValueError, match="'default' is 0 for output 2"):
        layer.merge()
    assert torch.equal(layer.base_layer.weight, weight) and not layer.merged


@pytest.mark.parametrize("base", [nn.Linear(16, 8), nn.Conv2d(4, 8, 2)], ids=["linear", "conv"])
def test_sixteen_bit_originals_are_kept(base, patched):
    base = copy.deepcopy(base).to(torch.bfloat16)
    layer = make_layer(base, {"default": random_config(4, 2), "other": random_config(2, 1)})
    keys = list(layer.state_dict())
    with torch.no_grad():
        layer.boft_s["default"].flatten()[0] = 0
    for _ in range(3):
        layer.merge()
        assert layer.base_layer.weight.is_contiguous() and list(layer.state_dict()) == keys
        assert not torch.equal(layer.base_layer.weight, base.weight)
        layer.unmerge()
        assert torch.equal(layer.base_layer.weight, base.weight)
    layer.merge()
    for copied in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert copied.merged
        with pytest.raises(ValueError, match="is 0 for output 0"):
            copied.unmerge()
        assert copied.merged


def test_kept_originals_are_freed_with_the_layers(patched):
    model = adapted(mlp().to(torch.bfloat16))
    layer = model.base_model.model[0]
    original = weakref.ref(layer.base_layer.weight.data.untyped_storage())
    pointer = layer.base_layer.weight.data_ptr()
    layer.merge()
    assert original() is not None
    gone = weakref.ref(layer)
    with pytest.warns(UserWarning, match="already merged"):
        merged = model.merge_and_unload()
    del layer, model
    gc.collect()
    assert type(merged[0]) is nn.Linear and gone() is None and original() is None
    assert merged[0].weight.data_ptr() != pointer


def test_without_kept_originals_unmerge_computes(patched):
    boft_ext.patch_peft(keep_merged=False)
    base = nn.Linear(16, 8).to(torch.bfloat16)
    layer = make_layer(base, {"default": random_config(4, 2)})
    layer.merge()
    layer.unmerge()
    assert 0 < relative_error(layer.base_layer.weight, base.weight) < 0.02
    with torch.no_grad():
        layer.boft_s["default"][1] = 0
    with pytest.raises(ValueError, match="is 0 for output 1"):
        layer.merge()


def test_a_merged_adapter_that_was_deleted(patched):
    """A kept original still comes back; otherwise the user is told what stays in the weight."""
    for dtype in (torch.bfloat16, torch.float32):
        base = nn.Linear(16, 8).to(dtype)
        layer = make_layer(base, {"default": random_config(4, 1), "other": random_config(4, 1)})
        layer.merge(adapter_names=["other"])
        layer.delete_adapter("other")
        if dtype == torch.bfloat16:
            layer.unmerge()
        else:
            with pytest.warns(UserWarning, match="'other' was deleted while merged"):
                layer.unmerge()
        assert torch.equal(layer.base_layer.weight, base.weight) == (dtype == torch.bfloat16)
        assert not layer.merged


def test_disabled_adapters_unmerge_even_in_inference_mode(patched):
    model, x = adapted(mlp()), torch.randn(2, 16)
    base = copy.deepcopy(model.base_model.model[0].base_layer.weight)
    model.merge_adapter()
    with torch.inference_mode(), model.disable_adapter():
        model(x)
    assert_exact("weight", model.base_model.model[0].base_layer.weight.detach(), base.detach())
    model(x).sum().backward()
    assert model.base_model.model[0].boft_R["default"].grad is not None


# Dropout rules


def dropped_share(layer, steps=300):
    """Mean share of blocks that a training step leaves unrotated, seen on one input channel per block."""
    rotation = layer.boft_R["default"]
    blocks, b = rotation.shape[1], rotation.shape[-1]
    x = torch.eye(blocks * b)[::b]
    return sum((layer(x) == x).all(dim=1).float().mean() for _ in range(steps)) / steps


def one_factor_layer(p):
    base = nn.Linear(16, 16, bias=False)
    base.weight.data = torch.eye(16)
    layer = make_layer(base, {"default": random_config(2, 1, boft_dropout=p)})
    layer.boft_s["default"].data.fill_(1)
    return layer


def test_dropout_rules(patched):
    assert dropped_share(one_factor_layer(0.1)) == 0
    assert dropped_share(one_factor_layer(0.5)) == 0.5
    boft_ext.patch_peft(dropout=(1.0, 0.1))
    assert abs(dropped_share(one_factor_layer(0.3)) - 0.1) < 0.03
    assert dropped_share(one_factor_layer(0.0)) == 0
    assert dropped_share(one_factor_layer(0.3).eval()) == 0
    boft_ext.patch_peft(dropout=(0.5, 1.0))
    assert abs(dropped_share(one_factor_layer(0.3)) - 0.5) < 0.15
    boft_ext.patch_peft(dropout="paper")
    assert abs(dropped_share(one_factor_layer(0.4)) - 0.16) < 0.08
    assert dropped_share(one_factor_layer(1.0)) == 1


@pytest.mark.parametrize("dropout", ["Paper", None, 0.1, (0.1,), (0.1, 2), (-1, 0.5), ("a", "b"), (True, 0.5)])
def test_bad_dropout_rules_are_refused(dropout):
    with pytest.raises(ValueError, match="p1, p2"):
        boft_ext.patch_peft(dropout=dropout)
    assert not boft_ext.peft_is_patched()


# Life cycle of the patch


def test_importing_the_package_does_not_import_peft():
    code = "import sys, boft_ext; boft_ext.peft_is_patched(); boft_ext.unpatch_peft(); sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_unpatching_restores_the_classes_exactly(unpatch_after):
    before = class_attributes()
    for _ in range(2):
        status = boft_ext.patch_peft()
        assert status and status.patched and boft_ext.peft_is_patched()
        assert boft_ext.patch_peft(keep_merged=False).keep_merged is False
        assert peft.__version__ in repr(status) and "dropout='peft'" in repr(status)
        assert class_attributes() != before
        boft_ext.unpatch_peft()
        assert not boft_ext.peft_is_patched()
        assert class_attributes() == before
    boft_ext.unpatch_peft()
    assert class_attributes() == before


@pytest.mark.parametrize("change", ["signature", "missing"])
def test_an_unknown_layout_is_left_alone(change, monkeypatch):
    if change == "signature":
        monkeypatch.setattr(peft_layer.Linear, "forward", lambda self, hidden: hidden)
    else:
        monkeypatch.delattr(peft_layer, "check_adapters_to_merge")
    before = class_attributes()
    with pytest.warns(UserWarning, match="left as it is"):
        status = boft_ext.patch_peft()
    assert not status and not boft_ext.peft_is_patched() and "not patched" in repr(status)
    with pytest.raises(RuntimeError, match="forward" if change == "signature" else "check_adapters"):
        boft_ext.patch_peft(strict=True)
    assert class_attributes() == before


def test_layers_made_before_keep_their_factors(no_kernel, unpatch_after):
    x = torch.randn(3, 16)
    model = nn.Sequential(mlp(), mlp())
    model = get_peft_model(model, random_config(4, 2, target_modules=["0.0", "1.0"])).eval()
    layers = [model.base_model.model[i][0] for i in (0, 1)]
    injected = inject_adapter_in_model(random_config(4, 1, target_modules=["0"]), mlp()).eval()
    expected, expected_injected = layers[0](x).detach(), injected[0](x).detach()
    with pytest.warns(UserWarning) as caught:
        boft_ext.patch_peft(strict=True)
        assert relative_error(layers[0](x), expected) < 1e-5
        layers[1](x), boft_ext.patch_peft()
        assert relative_error(injected[0](x), expected_injected) < 1e-5
    (message,) = [str(warning.message) for warning in caught]
    assert "2 BOFT layers" in message and "m = 1" in message and "configuration 2" in message
    assert model.peft_config["default"].boft_n_butterfly_factor == 2
    for layer in (*layers, injected[0]):
        assert layer.boft_R["default"].shape[0] == 1 and list(layer.buffers()) == []
    model.add_adapter("other", random_config(4, 2, target_modules=["0.0", "1.0"]))
    assert layers[0].boft_R["other"].shape[0] == 2


def test_a_pickle_made_before_works(no_kernel, unpatch_after):
    data = pickle.dumps(adapted(mlp()).eval())
    gc.collect()
    boft_ext.patch_peft(strict=True)
    model = pickle.loads(data)
    layer, x = model.base_model.model[0], torch.randn(3, 16)
    with pytest.warns(UserWarning, match="m = 1"):
        out = model(x)
    assert list(layer.buffers()) == []
    layer.merge()
    assert relative_error(model(x), out) < 1e-5


@pytest.mark.parametrize("base", [nn.Linear(16, 8), nn.Conv2d(4, 8, 2)], ids=["linear", "conv"])
def test_using_a_patched_layer_after_unpatching_names_the_remedy(base, unpatch_after):
    x = torch.randn(3, 16) if isinstance(base, nn.Linear) else torch.randn(3, 4, 5, 5)
    boft_ext.patch_peft(strict=True)
    layer = make_layer(base, {"default": random_config(4, 2)})
    expected = layer(x)
    boft_ext.unpatch_peft()
    assert_needs_the_patch(layer, x)
    boft_ext.patch_peft(strict=True)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("base", [nn.Linear(16, 8), nn.Conv2d(4, 8, 2)], ids=["linear", "conv"])
def test_unmerging_after_unpatching_changes_nothing(base, unpatch_after):
    boft_ext.patch_peft(strict=True)
    layer = make_layer(base, {"default": random_config(4, 2), "other": random_config(2, 1)})
    layer.merge()
    boft_ext.unpatch_peft()
    for broken in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        merged = broken.base_layer.weight.clone()
        with pytest.raises(RuntimeError, match=r"boft_ext\.patch_peft\(\)"):
            broken.unmerge()
        assert broken.merged_adapters == ["default", "other"] and torch.equal(broken.base_layer.weight, merged)
    boft_ext.patch_peft(strict=True)
    layer.unmerge()
    assert not layer.merged
    assert_exact("weight", layer.base_layer.weight.detach(), base.weight.detach())


@pytest.mark.parametrize("ours_first", [True, False], ids=["trained with the patch", "trained without"])
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("name", ["linear", "conv"])
def test_adapters_trained_on_either_side_load_on_the_other(name, m, ours_first, tmp_path, no_kernel, unpatch_after):
    """A few steps, saved, and read by PEFT as installed (one factor, since it finds no kernel) or with its kernel's
    mathematics (two)."""
    torch.manual_seed(4)
    if name == "linear":
        base, x = nn.Sequential(nn.Linear(32, 12), nn.Tanh(), nn.Linear(12, 3)), torch.randn(20, 32)
    else:
        base, x = nn.Sequential(nn.Conv2d(8, 6, 2), nn.Tanh()), torch.randn(6, 8, 4, 4)
    theirs = peft_mathematics if m > 1 else contextlib.nullcontext

    with patch() if ours_first else theirs():
        model = get_peft_model(copy.deepcopy(base), random_config(4, m, target_modules=["0"]))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        for _ in range(5):
            optimizer.zero_grad()
            model(x).sin().sum().backward()
            optimizer.step()
        expected = model.eval()(x).detach()
        model.save_pretrained(tmp_path)
    with theirs() if ours_first else patch():
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
        assert relative_error(loaded(x).detach(), expected) <= EXACT[torch.float32]
