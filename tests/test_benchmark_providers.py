"""What the benchmarks compare with: every provider adapts and trains, and the rival algorithm computes the same."""

import copy
import csv
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

for package in ("peft", "transformers", "tqdm"):
    pytest.importorskip(package)
sys.path.append(str(Path(__file__).parent.parent))

from peft.tuners.boft import layer as peft_layer  # noqa: E402
from tolerance import assert_exact  # noqa: E402

import boft_ext  # noqa: E402
from benchmarks import layers, metamath, models, pr3540, providers  # noqa: E402
from benchmarks.model_shapes import ModelShape  # noqa: E402
from benchmarks.table import Table  # noqa: E402

PROVIDERS = {
    **providers.FAST,
    **providers.RECOMPUTE,
    **providers.DENSE,
    **providers.BASE_TRAINABLE,
    **providers.WRAP,
}


@pytest.fixture(autouse=True)
def plain_peft(monkeypatch):
    """PEFT without a kernel and without the patch, before and after."""
    monkeypatch.setattr(peft_layer, "get_fbd_cuda", lambda: None)
    yield
    providers.plain_peft()


def observe(layer, x):
    """Output, gradients for the loss sum(sin(out)), merged and unmerged weight."""
    x = x.detach().requires_grad_()
    out = layer(x)
    out.sin().sum().backward()
    seen = {"out": out.detach(), "dx": x.grad, "dboft_R": layer.boft_R.grad, "dboft_s": layer.boft_s.grad}
    layer.merge()
    seen["merged weight"] = layer.base_layer.weight.clone()
    layer.unmerge()
    seen["unmerged weight"] = layer.base_layer.weight.clone()
    return seen


def compare(base, x, b, m, dtype):
    """The rival in `dtype` against boft_ext in float64, with the same adapter."""
    config = boft_ext.BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, init_weights=False)
    own = boft_ext.BOFTConv2d.from_conv if isinstance(base, nn.Conv2d) else boft_ext.BOFTLinear.from_linear
    exact = own(copy.deepcopy(base).double(), config)
    rival = pr3540.adapt(nn.Sequential(copy.deepcopy(base).to(dtype)), ["0"], b, m)[0]
    rival.load_state_dict(exact.state_dict())
    expected = observe(exact, x.double())
    for what, tensor in observe(rival, x.to(dtype)).items():
        assert tensor.dtype == dtype
        assert_exact(what, tensor, expected[what])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("d", "out", "b", "m"), [(24, 10, 4, 1), (15, 7, 5, 1), (60, 9, 10, 2), (64, 12, 4, 3), (96, 5, 2, 4)]
)
def test_linear_of_the_rival_computes_the_same(d, out, b, m, bias, dtype):
    compare(nn.Linear(d, out, bias=bias), torch.randn(2, 5, d), b, m, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("sizes", "options", "b", "m"), [((5, 4, 3), {}, 5, 1), ((8, 6, 3), {"stride": 2}, 6, 3)])
def test_convolution_of_the_rival_computes_the_same(sizes, options, b, m, dtype):
    compare(nn.Conv2d(*sizes, **options), torch.randn(2, sizes[0], 7, 6), b, m, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PROVIDERS)
def test_every_provider_trains_a_layer_away_from_the_identity(name, dtype):
    plain = nn.Sequential(nn.Linear(64, 48)).to(dtype)
    entry = providers.adapted(PROVIDERS[name], copy.deepcopy(plain), ["0"], 8, 2)
    x = torch.randn(3, 64, dtype=dtype, requires_grad=True)
    out = entry.model(x)
    out.float().square().sum().backward()

    assert out.shape == (3, 48) and out.dtype == dtype
    assert x.grad is not None
    parameters = providers.trainable(entry.model)
    assert bool(parameters) == (name != "base")
    assert all(parameter.grad.abs().max() > 0 for parameter in parameters)
    assert torch.equal(out, plain(x)) == (name == "base")
    factors = {"base": None, "base-trainable": None, "lora": None, "oft": None, "peft": 1}
    assert providers.built_factors(entry.model) == factors.get(name, 2)


def test_preparing_a_provider_is_idempotent_and_undone():
    compact, recompute = "boft_ext-compact", "boft_ext-recompute"
    for name in ("boft_ext", "peft-m", "peft-m", "peft", compact, compact, recompute, "boft_ext"):
        PROVIDERS[name].prepare()
        assert boft_ext.peft_is_patched() == name.startswith("boft_ext")
        assert boft_ext.saved_activations() == {compact: "compact", recompute: "recompute"}.get(name, "exact")
    PROVIDERS["peft-m"].prepare()
    assert peft_layer.get_fbd_cuda()
    providers.plain_peft()
    assert not boft_ext.peft_is_patched() and not peft_layer.get_fbd_cuda()


def tiny_model():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 50}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads))


TINY = ModelShape(
    name="tiny",
    build=tiny_model,
    inputs=lambda: {"inputs_embeds": torch.randn(1, 6, 64), "labels": torch.randint(0, 50, (1, 6))},
    loss=lambda output: output.loss,
    tokens=6,
    targets={"all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
    decode=lambda: {"input_ids": torch.tensor([[1]]), "use_cache": False},
)


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_model_gives_rows_of_all_providers_and_measures(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "FULL", models.Effort(1, 0.0, 0.0))
    monkeypatch.setattr(models, "DENSE_EFFORT", models.Effort(1, 0.0, 0.0))
    models.measure_case(TINY, "all", "f32", False, Table(tmp_path / "models.csv", models.COLUMNS))
    table = rows(tmp_path / "models.csv")

    assert set(models.COLUMNS) <= set(table[0])
    seen = {measure: [row["provider"] for row in table if row["measure"] == measure] for measure in ("step", "decode")}
    ours = ["boft_ext", "boft_ext-compact", "boft_ext-recompute", "boft_ext-m4b4"]
    everyone = ["base", "lora", "oft", "pr3540", *ours, "peft", "peft-m"]
    assert seen == {"step": everyone, "decode": everyone}
    for measure in ("init", "load"):
        names = [row["provider"] for row in table if row["measure"] == measure]
        assert names == ["lora", "oft", *ours, "peft", "peft-m"]
    steps = {row["provider"]: row for row in table if row["measure"] == "step"}
    assert {name: row["m"] for name, row in steps.items() if row["m"]} == {
        **{"pr3540": "2", **dict.fromkeys(ours, "2"), "boft_ext-m4b4": "4", "peft": "1", "peft-m": "2"}
    }
    assert float(steps["base"]["ratio"]) == 1 and float(steps["base"]["peak_ratio"]) == 1
    assert steps["base"]["trainable"] == "0" and steps["pr3540"]["trainable"] == steps["boft_ext"]["trainable"]
    for row in steps.values():
        assert float(row["tokens_per_s"]) == pytest.approx(6e3 / float(row["median_ms"]), rel=1e-3)
        assert float(row["peak_mib"]) > 0
    assert not boft_ext.peft_is_patched()


TINY_LAYERS = [layers.linear(64, 32, 8, 2, (4,)), layers.conv(16, 8, 3, 6, 6, 2)]


@pytest.mark.parametrize("case", TINY_LAYERS, ids=lambda case: case.name)
def test_a_layer_gives_rows_of_all_providers_and_measures(case, tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "DENSE_ROUNDS", 1)
    layers.measure_case(case, "f32", layers.Effort(0.0, 1), Table(tmp_path / "layers.csv", layers.COLUMNS))
    table = rows(tmp_path / "layers.csv")

    assert set(layers.COLUMNS) <= set(table[0])
    is_conv = table[0]["kind"] == "conv"
    rotating = ["pr3540", "boft_ext", "boft_ext-compact", "boft_ext-wrap"]
    fast = ["base", "lora", "oft", *rotating, *(["base-trainable"] if is_conv else [])]
    expected = {
        "forward": [*fast, "peft", "peft-m"],
        "forward+backward": [*fast, "peft", "peft-m"],
        "decode": [] if is_conv else [*fast, "peft", "peft-m"],
        "init": ["lora", "oft", *rotating[1:], "peft", "peft-m"],
        "merge": ["lora", "oft", *rotating, "peft", "peft-m"],
        "unmerge": ["lora", "oft", *rotating, "peft", "peft-m"],
    }
    found = {m: sorted(row["provider"] for row in table if row["measure"] == m) for m in expected}
    assert found == {measure: sorted(names) for measure, names in expected.items()}
    assert all(float(row["peak_mib"]) > 0 for row in table if row["measure"] == "forward+backward")
    assert all(row["overhead_us"] for row in table if row["measure"] == "decode")
    assert not boft_ext.peft_is_patched()


CPU = torch.device("cpu")


def test_metamath_has_the_lengths_of_pefts_benchmark():
    made = metamath.batches(metamath.LLAMA_3B, CPU)
    lengths = torch.cat([batch["attention_mask"].sum(1) for batch in made])
    assert len(made) == metamath.BUCKET_BATCHES and len(lengths) == 80
    assert 800 < 4 * lengths.double().mean() < 880
    assert lengths.min() >= 60 and lengths.max() <= 768
    assert sorted(lengths.tolist(), reverse=True) == lengths.tolist()
    for batch in made:
        counted = (batch["labels"] != -100).sum(1)
        padded = batch["input_ids"].shape[1]
        assert torch.equal(counted, (batch["attention_mask"].sum(1) + 1).clamp(max=padded))


def test_metamath_measures_what_only_names_beside_the_base(tmp_path, monkeypatch):
    monkeypatch.setattr(metamath, "STEPS", 2)
    metamath.run(tmp_path, True, "all boft_ext-m2b8", CPU)
    with (tmp_path / "metamath.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["targets"], row["provider"], row["measure"]) for row in rows] == [
        (targets, provider, measure)
        for targets, provider in (("qv", "base"), ("all", "base"), ("all", "boft_ext-m2b8"))
        for measure in ("step", "decode")
    ]
    assert all(float(row["median_ms"]) > 0 and float(row["ratio"]) > 0 for row in rows)
    assert rows[-1]["b"] == "8" and rows[-1]["m"] == "2" and int(rows[-1]["trainable"]) > 0


def test_metamath_leaves_the_model_as_it_was(tmp_path):
    table = Table(tmp_path / "t.csv", metamath.COLUMNS)
    loop = metamath._Loop(metamath.TINY, CPU, table)
    before = {name: type(module) for name, module in loop.model.named_modules()}
    weights = {name: tensor.clone() for name, tensor in loop.model.state_dict().items()}
    for job in metamath.jobs():
        if job.name in ("base", "lora", "oft", "boft_ext-m2b4", "pr3540-m2b4", "peft-m1b4", "peft-m-m2b4"):
            loop.measure("all", job._replace(steps=1))
            assert {name: type(module) for name, module in loop.model.named_modules()} == before, job.name
            for name, tensor in loop.model.state_dict().items():
                assert torch.equal(tensor, weights[name]), (job.name, name)


def test_metamath_says_what_it_had_no_time_for(tmp_path, capsys):
    metamath.run(tmp_path, True, "qv lora", CPU, budget_s=-1)
    assert "metamath: no time for qv base, qv lora, all base" in capsys.readouterr().err
