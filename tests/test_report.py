"""parameter_report: counts by hand, PEFT's and this package's layers, and every #Param that the paper publishes."""

import json

import pytest
import torch
from peft import BOFTConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.boft import layer as peft_layer
from torch import nn

import boft_ext


@pytest.fixture
def patched():
    yield boft_ext.patch_peft(strict=True)
    boft_ext.unpatch_peft()


def model():
    return nn.Sequential(nn.Linear(16, 6), nn.Linear(6, 24), nn.Conv2d(4, 5, (3, 2)))


def config(b=4, m=2, targets=("0", "2"), **kwargs):
    return BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, target_modules=list(targets), **kwargs)


BASE = 16 * 6 + 6 + 6 * 24 + 24 + 4 * 5 * 6 + 5


def wrapped():
    return boft_ext.wrap(model(), config())


def injected():
    return inject_adapter_in_model(config(), model())


def peft_model():
    return get_peft_model(model(), config(modules_to_save=["1"], bias="all"))


@pytest.mark.parametrize("make", [wrapped, injected, peft_model])
def test_counts(make, patched):
    report = boft_ext.parameter_report(make())
    linear, conv = report.rows
    assert (linear.layer, linear.d, linear.out, linear.b, linear.m) == ("0", 16, 6, 4, 2)
    assert (linear.stored, linear.rotation, linear.scale, linear.effective) == (2 * 4 * 16 + 6, 3 * 16, 6, 54)
    assert (conv.layer, conv.d, conv.out, conv.b, conv.m) == ("2", 24, 5, 4, 2)
    assert (conv.stored, conv.rotation, conv.scale, conv.effective) == (2 * 6 * 16 + 5, 3 * 24, 5, 77)
    (total,) = report.totals.values()
    assert (total.layers, total.stored, total.effective) == (2, 134 + 197, 54 + 77)
    assert total.paper == 48 + 72 + 2 * (6 + 5)
    assert report.base_parameters == BASE and total.share == 131 / BASE


def test_stored_counts_are_what_peft_says_it_trains(patched):
    adapted = get_peft_model(model(), config())
    trainable, everything = adapted.get_nb_trainable_parameters()
    report = boft_ext.parameter_report(adapted)
    assert report.totals["default"].stored == trainable
    assert report.base_parameters == everything - trainable


def test_layers_of_unpatched_peft_are_counted_as_they_are(monkeypatch):
    """Its m is 1 where its kernel is missing, whatever was asked for."""
    monkeypatch.setattr(peft_layer, "get_fbd_cuda", lambda: None)
    assert not boft_ext.peft_is_patched()
    report = boft_ext.parameter_report(get_peft_model(model(), config(m=2, targets=["0"])))
    assert [row.m for row in report.rows] == [1] and report.totals["default"].rotation == 24


def test_several_adapters(patched):
    adapted = get_peft_model(model(), config())
    adapted.add_adapter("other", config(2, 3, ["0"]))
    report = boft_ext.parameter_report(adapted)
    assert [(row.adapter, row.layer) for row in report.rows] == [("default", "0"), ("other", "0"), ("default", "2")]
    assert report.totals["other"].rotation == 16 * 3 // 2 and report.totals["other"].layers == 1
    assert report.totals["default"].layers == 2 and report.base_parameters == BASE


def test_what_is_printed_and_given_as_a_dict(patched):
    blocks = nn.ModuleList([nn.ModuleDict({"q": nn.Linear(1600, 8), "k": nn.Linear(1600, 8)}) for _ in range(11)])
    report = boft_ext.parameter_report(boft_ext.wrap(blocks, config(16, 1, ["q", "k"])))
    text = str(report)
    lines = [line.split() for line in text.splitlines()]
    assert ["default", "*.q", "11", "1,600", "8", "16", "1", "281,688", "132,000", "88", "132,088"] in lines
    assert ["default", "all", "22", "563,376", "264,000", "176", "264,176"] in lines
    assert f"264,176 effective parameters, {100 * 264176 / report.base_parameters:.3g} %" in text
    values = json.loads(json.dumps(report.to_dict()))
    assert values["base_parameters"] == report.base_parameters == 22 * (1600 * 8 + 8)
    adapter = values["adapters"]["default"]
    assert adapter["effective"] == 264176 and len(adapter["rows"]) == 22
    assert adapter["rows"][3] == {
        **{"adapter": "default", "layer": "1.k", "d": 1600, "out": 8, "b": 16, "m": 1},
        **{"stored": 25608, "rotation": 12000, "scale": 8, "effective": 12008},
    }


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="Sequential has no BOFT layers"):
        boft_ext.parameter_report(model())


# The paper's #Param columns (Liu et al., ICLR 2024), in millions to two digits, from the models themselves


def on_meta(name):
    with torch.device("meta"):
        if name == "deberta-v3-base":
            from transformers import DebertaV2Config, DebertaV2Model

            sizes = {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}
            relative = {"relative_attention": True, "position_buckets": 256, "pos_att_type": "p2c|c2p"}
            return DebertaV2Model(DebertaV2Config(**sizes, **relative))
        if name == "dinov2-large":
            from transformers import Dinov2Config, Dinov2Model

            return Dinov2Model(Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16))
        if name == "llama-2-7b":
            from transformers import LlamaConfig, LlamaForCausalLM

            return LlamaForCausalLM(LlamaConfig(hidden_size=4096, intermediate_size=11008))
        from diffusers import UNet2DConditionModel

        widths = {"block_out_channels": (320, 640, 1280, 1280), "attention_head_dim": (5, 10, 20, 20)}
        return UNet2DConditionModel(cross_attention_dim=1024, use_linear_projection=True, **widths)


@pytest.fixture(scope="module")
def published():
    """The counts of a model for one configuration. Models are made once and unwrapped again."""
    models = {}

    def count(name, targets, **settings):
        if name not in models:
            models[name] = on_meta(name)
        counted = boft_ext.wrap(models[name], boft_ext.BOFTConfig(target_modules=targets, **settings))
        report = boft_ext.parameter_report(counted)
        for row in report.rows:
            parent, _, child = row.layer.rpartition(".")
            owner = counted.get_submodule(parent)
            setattr(owner, child, getattr(owner, child).base_layer)
        return report.totals["default"]

    return count


DEBERTA = ["query_proj", "key_proj", "value_proj", "dense"]


@pytest.mark.parametrize(("b", "m", "millions"), [(16, 1, 0.79), (8, 2, 0.75)])
def test_paper_glue(b, m, millions, published):
    total = published("deberta-v3-base", DEBERTA, boft_block_size=b, boft_n_butterfly_factor=m)
    assert total.layers == 12 * 6
    assert round(total.paper / 1e6, 2) == millions


@pytest.mark.parametrize(("b", "m", "millions"), [(16, 1, 2.10), (4, 4, 1.77), (2, 6, 1.11), (8, 2, 1.99)])
def test_paper_vtab(b, m, millions, published):
    total = published("dinov2-large", "all-linear", boft_block_size=b, boft_n_butterfly_factor=m)
    assert total.layers == 24 * 6
    assert round(total.paper / 1e6, 2) == millions


CONTROL = [(16, 1, 2.71), (4, 1, 10.50), (2, 1, 20.89), (32, 2, 2.66), (32, 6, 7.69), (16, 5, 12.93), (8, 4, 20.76)]


@pytest.mark.parametrize(("blocks", "m", "millions"), CONTROL)
def test_paper_controlnet(blocks, m, millions, published):
    total = published(
        "stable-diffusion-2.1",
        ["to_q", "to_k", "to_v"],
        boft_block_size=0,
        boft_block_num=blocks,
        boft_n_butterfly_factor=m,
    )
    assert total.layers == 96
    assert round(total.paper / 1e6, 2) == millions


@pytest.mark.parametrize(("b", "m", "percent"), [(16, 1, 0.13), (8, 2, 0.12)])
def test_paper_llama(b, m, percent, published):
    """Rotation alone, as a share of the model."""
    total = published("llama-2-7b", "all-linear", boft_block_size=b, boft_n_butterfly_factor=m)
    assert total.layers == 32 * 7
    assert round(100 * total.share * total.rotation / total.effective, 2) == percent
