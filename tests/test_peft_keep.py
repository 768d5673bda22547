"""What PEFT's BOFT layers do today and must go on doing while patched: one test for each promise, by its number.

Linear layers and convolutions, one to three butterfly factors. Where a promise concerns numbers, `test_peft_swap.py`
compares them with PEFT's own mathematics.
"""

import copy
import io
import pickle
import warnings

import pytest
import torch
from peft import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners import boft
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_oracle import random_config
from safetensors.torch import load_file, save, save_file
from tolerance import relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import boft_ext

KEY = "base_model.model.0"


@pytest.fixture(autouse=True)
def patched():
    yield boft_ext.patch_peft(strict=True)
    boft_ext.unpatch_peft()


kinds = pytest.mark.parametrize("kind", ["linear", "conv"])
factors = pytest.mark.parametrize("m", [1, 2, 3])
narrow = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


def base_layer(kind):
    return nn.Linear(32, 12) if kind == "linear" else nn.Conv2d(8, 6, 2)


def base_model(kind):
    """The layer to adapt, named 0, and a head, named 2."""
    return nn.Sequential(base_layer(kind), nn.Flatten(), nn.Linear(12 if kind == "linear" else 54, 3))


def data(kind):
    return torch.randn(5, 32) if kind == "linear" else torch.randn(5, 8, 4, 4)


def config(m, **kwargs):
    return random_config(4, m, **{"target_modules": ["0"], **kwargs})


def layer_of(model):
    return model.base_model.model[0]


def assert_close(seen, expected, tolerance=1e-6):
    torch.testing.assert_close(seen, expected, atol=tolerance, rtol=tolerance)


def adapters(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if "boft_" in name}


@kinds
@factors
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keep_01_layers_are_made_by_their_constructors(kind, m, dtype):
    cls = boft.layer.Linear if kind == "linear" else boft.layer.Conv2d
    settings = boft.config.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=m, init_weights=False)
    base = base_layer(kind)
    layer = cls(base, "name", config=settings).to(dtype)
    x = data(kind).to(dtype)
    assert layer.base_layer is base and layer.active_adapters == ["name"]
    out = layer(x)
    assert out.dtype == layer.boft_R["name"].dtype == layer.boft_s["name"].dtype == dtype
    assert out.shape == base(x).shape and not torch.equal(out, base(x))
    assert relative_error(layer(x[0]), out[0]) < {torch.float32: 1e-6}.get(dtype, 1e-2)


@kinds
@factors
def test_keep_02_only_the_adapters_train_and_each_moves(kind, m):
    settings = boft.config.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=m, target_modules=["0"])
    model = get_peft_model(base_model(kind), settings)
    layer = layer_of(model)
    assert type(layer.boft_R) is type(layer.boft_s) is nn.ParameterDict and type(layer.boft_dropout) is nn.ModuleDict
    assert list(layer.boft_R) == list(layer.boft_s) == list(layer.boft_dropout) == ["default"]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(trained) == [f"{KEY}.boft_R.default", f"{KEY}.boft_s.default"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer, x = torch.optim.SGD(trained.values(), lr=0.5), data(kind)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == set(trained)
    rotation = layer.boft_R["default"]
    assert all((factor != 0).any() for factor in rotation)


@kinds
@factors
def test_keep_03_every_container_holds_every_adapter(kind, m):
    model = get_peft_model(base_model(kind), config(m, boft_dropout=0.3))
    model.add_adapter("other", random_config(2, 4 - m, target_modules=["0"]))
    layer = layer_of(model)
    names = layer.adapter_layer_names + layer.other_param_names
    assert {"boft_R", "boft_s", "boft_dropout", "boft_block_size", "boft_block_num"} <= set(names)
    assert all(set(getattr(layer, name)) == {"default", "other"} for name in names)
    model.delete_adapter("default")
    assert all(set(getattr(layer, name)) == {"other"} for name in names)
    model.set_adapter("other")
    assert layer.active_adapters == ["other"] and model(data(kind)).isfinite().all()
    assert not any("default" in name for name in model.state_dict())


@kinds
@factors
@pytest.mark.parametrize("old", [False, True], ids=["new file", "old file"])
def test_keep_04_checkpoints_hold_two_tensors_a_layer_and_old_ones_load(kind, m, old, tmp_path):
    model, x = get_peft_model(base_model(kind), config(m)).eval(), data(kind)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    scale = (12, 1) if kind == "linear" else (1, 6)
    shapes = {f"{KEY}.boft_R": (m, 8, 4, 4), f"{KEY}.boft_s": scale}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    if old:
        save_file({**tensors, f"{KEY}.boft_P": torch.zeros(m, 32, 32)}, path)
    out = model(x)
    loaded = get_peft_model(copy.deepcopy(model.unload()), config(m)).eval()
    assert loaded.load_adapter(tmp_path, "second").missing_keys == []
    loaded.set_adapter("second")
    assert torch.equal(loaded(x), out)


@kinds
@factors
def test_keep_05_merged_equals_unmerged(kind, m):
    model, x = get_peft_model(base_model(kind), config(m)).eval(), data(kind)
    layer = layer_of(model)
    weight, out = layer.base_layer.weight.detach().clone(), model(x)
    model.merge_adapter(safe_merge=True)
    assert_close(model(x), out)
    assert layer.base_layer.weight.is_contiguous()
    model.unmerge_adapter()
    assert_close(layer.base_layer.weight.detach(), weight)
    assert layer.base_layer.weight.is_contiguous()
    assert_close(model(x), out)
    for safe_merge in (False, True):
        plain = copy.deepcopy(model).merge_and_unload(safe_merge=safe_merge)
        assert type(plain[0]) is type(base_layer(kind))
        assert not any(isinstance(module, BaseTunerLayer) for module in plain.modules())
        assert_close(plain(x), out)
        assert save(plain.state_dict())


@kinds
@factors
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_keep_06_several_adapters_compose_in_order(kind, m, dtype):
    model = get_peft_model(base_model(kind).to(dtype), config(m))
    for number, name in enumerate(("second", "third")):
        model.add_adapter(name, random_config(2, 1 + number, target_modules=["0"]))
    x, layer = data(kind).to(dtype), layer_of(model.to(dtype))
    for rotation in layer.boft_R.values():
        rotation.data *= 10  # far enough from the identity for the order to matter
    original = layer.base_layer.weight.detach().clone()
    tolerance = {torch.float64: 1e-12, torch.float16: 5e-3, torch.bfloat16: 4e-2}[dtype]
    names, outputs, weights = ["second", "default", "third"], [], []
    for order in (names, names[::-1]):
        layer.set_adapter(order)
        outputs.append(layer(x).detach())
        layer.merge(adapter_names=order)
        weights.append(layer.base_layer.weight.detach().clone())
        assert relative_error(layer(x).detach(), outputs[-1]) < tolerance
        with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
            layer.merge(adapter_names=order)
        layer.unmerge()
        assert relative_error(layer.base_layer.weight.detach(), original) < 1e-12
        layer.base_layer.weight.data.copy_(original)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in order:
                layer.merge(adapter_names=[name])
        assert layer.merged_adapters == order
        assert torch.equal(layer.base_layer.weight, weights[-1])
        layer.unmerge()
        layer.base_layer.weight.data.copy_(original)
    assert relative_error(*outputs) > 5 * tolerance


@kinds
@factors
@pytest.mark.parametrize("broken", ["boft_R", "boft_s"])
def test_keep_07_a_safe_merge_refuses_nan(kind, m, broken):
    model = get_peft_model(base_model(kind), config(m))
    layer = layer_of(model)
    before = layer.base_layer.weight.detach().clone()
    getattr(layer, broken)["default"].data.flatten()[1] = torch.nan
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError) as error:
            merge(safe_merge=True)
        message = "NaNs detected in the merged weights. The adapter default seems to be broken"
        assert str(error.value) == message
        assert torch.equal(layer.base_layer.weight, before) and layer.merged_adapters == []


@kinds
@factors
@narrow
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_keep_08_sixteen_bit_models(kind, m, dtype, autocast_adapter_dtype):
    base = base_model(kind).to(dtype)
    model = get_peft_model(base, config(m), autocast_adapter_dtype=autocast_adapter_dtype)
    layer, x = layer_of(model), data(kind).to(dtype)
    weight = layer.base_layer.weight.detach().clone()
    assert layer.boft_R["default"].dtype == (torch.float32 if autocast_adapter_dtype else dtype)
    out = model(x)
    assert out.dtype == dtype
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    for safe_merge in (False, True):
        model.merge_adapter(safe_merge=safe_merge)
        assert model(x).dtype == dtype and relative_error(model(x), out) < 0.03
        model.unmerge_adapter()
        assert torch.equal(layer.base_layer.weight, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == base[2](out.new_zeros(1, base[2].in_features)).dtype
    merged = copy.deepcopy(model).merge_and_unload()
    assert merged[0].weight.dtype == dtype and relative_error(merged(x), out) < 0.03
    assert torch.equal(model.unload()[0].weight, weight)


@kinds
@factors
def test_keep_09_low_cpu_mem_usage_copies_and_pickles(kind, m):
    base, x = base_model(kind), data(kind)
    model = get_peft_model(copy.deepcopy(base), config(m)).eval()
    out, state = model(x), get_peft_model_state_dict(model)
    lazy = inject_adapter_in_model(config(m), base, low_cpu_mem_usage=True).eval()
    assert {p.device.type for name, p in lazy.named_parameters() if "boft_" in name} == {"meta"}
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    set_peft_model_state_dict(lazy, state, low_cpu_mem_usage=True)
    assert {p.device.type for p in lazy.parameters()} == {"cpu"}
    assert torch.equal(lazy(x), out)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), out)
        layer_of(twin).boft_s["default"].data += 1
        assert not torch.equal(twin(x), out) and torch.equal(model(x), out)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), out)


@kinds
@factors
def test_keep_10_devices_sizes_disabling_and_saved_modules(kind, m, tmp_path):
    base, x = base_model(kind).eval(), data(kind)
    plain = base(x)
    model = get_peft_model(copy.deepcopy(base), config(m, modules_to_save=["2"])).eval()
    layer = layer_of(model)
    assert (layer.in_features, layer.out_features) == ((32, 12) if kind == "linear" else (8, 6))
    assert not torch.equal(model(x), plain)
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    layer.boft_R["default"] = nn.Parameter(layer.boft_R["default"].detach().to("meta"))
    model.add_adapter("other", config(m))
    assert layer.boft_R["default"].is_meta and not layer.boft_R["other"].is_meta

    for bias in ("all", "boft_only"):
        folder = tmp_path / bias
        biased = get_peft_model(copy.deepcopy(base), config(m, modules_to_save=["2"], bias=bias)).eval()
        for parameter in biased.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter)
        biased.save_pretrained(folder)
        stored = load_file(folder / "adapter_model.safetensors")
        assert {f"{KEY}.base_layer.bias", "base_model.model.2.weight"} <= stored.keys()
        assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()(x), biased(x))
        keys, configs = list(biased.state_dict()), dict(biased.peft_config)
        with pytest.raises(ValueError, match="bias"):
            biased.add_adapter("second", config(m, bias="all"))
        assert list(biased.state_dict()) == keys and biased.peft_config == configs


@kinds
@factors
def test_keep_11_fsdp_state_dicts_go_both_ways(kind, m, tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        x = data(kind)
        base = base_model(kind)
        model = get_peft_model(copy.deepcopy(base), config(m))
        expected, before = model(x).detach(), adapters(model)
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        assert relative_error(sharded(x).detach(), expected) < 1e-6
        with FullyShardedDataParallel.state_dict_type(sharded, StateDictType.FULL_STATE_DICT):
            state = {name: tensor.clone() for name, tensor in sharded.state_dict().items()}
        assert all(torch.equal(state[name], tensor) for name, tensor in before.items())

        other = FullyShardedDataParallel(
            get_peft_model(copy.deepcopy(base), config(m)), use_orig_params=True, device_id=torch.device("cpu")
        )
        assert relative_error(other(x).detach(), expected) > 1e-3
        with FullyShardedDataParallel.state_dict_type(other, StateDictType.FULL_STATE_DICT):
            other.load_state_dict(state)
        assert relative_error(other(x).detach(), expected) < 1e-6
        other(x).sum().backward()
        torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.1).step()
        assert relative_error(other(x).detach(), expected) > 1e-4
    finally:
        dist.destroy_process_group()


class Guarded(nn.Linear):
    """Stands for a quantised base: it computes, but nobody may look at its weight."""

    def forward(self, x):
        object.__setattr__(self, "open", True)
        try:
            return super().forward(x)
        finally:
            object.__setattr__(self, "open", False)

    def __getattr__(self, name):
        if name == "weight" and not self.__dict__.get("open", True):
            raise AssertionError("the weight of a quantised layer was touched")
        return super().__getattr__(name)


@factors
def test_keep_12_quantised_bases_are_only_called(m):
    model = get_peft_model(nn.Sequential(Guarded(32, 12), nn.Tanh(), nn.Linear(12, 3)), config(m))
    layer, x = layer_of(model), data("linear")
    assert layer.quantization_backend is None and layer.extra_repr() == ""
    unguarded = copy.deepcopy(model)
    layer_of(unguarded).base_layer.__class__ = nn.Linear
    object.__setattr__(layer.base_layer, "open", False)
    results = []
    for each in (model, unguarded):
        out = each(x)
        out.sin().sum().backward()
        results.append((out.detach(), layer_of(each).boft_R["default"].grad, layer_of(each).boft_s["default"].grad))
    for seen, expected in zip(*results, strict=True):
        assert_close(seen, expected)
    with pytest.raises(AssertionError, match="was touched"):
        layer.merge()
    conv = get_peft_model(base_model("conv"), config(m)).base_model.model[0]
    assert conv.quantization_backend is None and conv.extra_repr() == ""


@kinds
@factors
def test_keep_13_compiling_checkpointing_and_configurations(kind, m, tmp_path):
    model, x = get_peft_model(base_model(kind), config(m)), data(kind)

    def gradients(run):
        model.zero_grad()
        run(x).sin().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}

    expected = gradients(model)
    seen = [gradients(torch.compile(model, backend="aot_eager"))]
    for use_reentrant in (True, False):

        def run(x, use_reentrant=use_reentrant):
            return checkpoint(model, x.clone().requires_grad_(), use_reentrant=use_reentrant)

        seen.append(gradients(run))
    for found in seen:
        assert found.keys() == expected.keys()
        assert all(relative_error(found[name], expected[name]) < 1e-5 for name in expected)

    settings = config(m, boft_dropout=0.1, bias="all", modules_to_save=["2"], task_type="SEQ_CLS")
    settings.save_pretrained(tmp_path)
    assert boft.config.BOFTConfig.from_pretrained(tmp_path).to_dict() == settings.to_dict()
