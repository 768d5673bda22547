"""suggest_config: everything listed is valid, everything valid is listed, and the budget holds."""

import pytest
import torch
from torch import nn

import boft_ext
from boft_ext.config import resolve_shape


def model():
    return nn.Sequential(nn.Linear(24, 5), nn.Conv2d(8, 6, 3), nn.Conv2d(8, 4, 3, groups=2), nn.Linear(40, 24))


def sizes(suggestion):
    return {(s.block_size, s.block_num, s.factors): s.parameters for s in suggestion.settings}


@pytest.mark.parametrize("d", [2, 7, 24, 60, 64, 96])
def test_listed_settings_are_exactly_those_that_a_layer_accepts(d):
    suggestion = boft_ext.suggest_config(nn.Sequential(nn.Linear(d, 3)), 10**9, target_modules=["0"])
    valid = {}
    for b in range(2, d + 1):
        for m in range(1, 10):
            try:
                resolve_shape(d, boft_ext.BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m))
            except ValueError:
                continue
            valid[b, m] = (b - 1) * d * m // 2 + 3
    assert suggestion.layers["0"].settings == valid
    assert sizes(suggestion) == {(b, 0, m): count for (b, m), count in valid.items()}


def test_settings_of_grouped_convolutions_are_those_that_fit_a_group():
    layers = boft_ext.suggest_config(model(), 10**9, target_modules=["1", "2"]).layers
    assert (4, 2) not in layers["2"].settings and (4, 2) in layers["1"].settings
    for name, layer in layers.items():
        for b in range(2, 73):
            for m in range(1, 6):
                config = boft_ext.BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, target_modules=[name])
                try:
                    boft_ext.wrap(model(), config)
                except ValueError:
                    assert (b, m) not in layer.settings
                else:
                    assert (b, m) in layer.settings


@pytest.mark.parametrize("budget", [210, 260, 500, 1000, 10**6])
@pytest.mark.parametrize("targets", [["0"], ["0", "3"], ["0", "1", "2", "3"]])
def test_the_suggestion_is_the_largest_within_the_budget_and_can_be_used(targets, budget):
    suggestion = boft_ext.suggest_config(model(), budget, target_modules=targets)
    total = boft_ext.parameter_report(boft_ext.wrap(model(), suggestion.config)).totals["default"]
    assert total.effective == suggestion.setting.parameters <= budget
    assert total.layers == len(targets) == len(suggestion.layers)
    assert not any(suggestion.setting.parameters < count <= budget for count in sizes(suggestion).values())


def test_every_common_setting_is_valid_and_counted():
    suggestion = boft_ext.suggest_config(model(), 10**9, target_modules=["0", "1", "3"])
    assert {bool(block) for block, _, _ in sizes(suggestion)} == {True, False}
    for (b, blocks, m), count in sizes(suggestion).items():
        config = boft_ext.BOFTConfig(
            boft_block_size=b, boft_block_num=blocks, boft_n_butterfly_factor=m, target_modules=["0", "1", "3"]
        )
        report = boft_ext.parameter_report(boft_ext.wrap(model(), config))
        assert report.totals["default"].effective == count


def test_of_equal_counts_the_one_with_more_factors_is_taken():
    suggestion = boft_ext.suggest_config(nn.Sequential(nn.Linear(64, 4)), 490, target_modules=["0"])
    assert sizes(suggestion)[16, 0, 1] == sizes(suggestion)[4, 0, 5] == 484
    assert (suggestion.config.boft_block_size, suggestion.config.boft_n_butterfly_factor) == (4, 5)


def test_a_share_of_the_model_on_the_meta_device():
    with torch.device("meta"):
        big = nn.ModuleDict({f"l{i}": nn.Linear(4096, 4096, bias=False) for i in range(3)})
    suggestion = boft_ext.suggest_config(big, 0.005)
    assert suggestion.budget == int(0.005 * 3 * 4096**2)
    assert suggestion.model_parameters == 3 * 4096**2 and len(suggestion.layers) == 3
    assert 0.9 * suggestion.budget < suggestion.setting.parameters <= suggestion.budget
    assert suggestion.config.target_modules == {"l0", "l1", "l2"}


def test_other_fields_are_kept():
    config = boft_ext.suggest_config(
        model(), 1000, target_modules=r"[03]", bias="boft_only", boft_dropout=0.1, modules_to_save=["1"]
    ).config
    assert (config.bias, config.boft_dropout, config.modules_to_save) == ("boft_only", 0.1, ["1"])
    assert config.target_modules == "[03]"


def test_what_is_printed():
    text = str(boft_ext.suggest_config(model(), 300, target_modules=["0", "3"]))
    lines = [line.split() for line in text.splitlines()]
    assert text.startswith("boft_block_num = 4, boft_n_butterfly_factor = 1: 269 effective parameters in 2 layers")
    assert "the budget is 300" in text
    assert "0: d = 24, out = 5, per layer" in text and "3: d = 40, out = 24, per layer" in text
    assert ["b", "in", "all", "layers", "m", "=", "1", "m", "=", "2", "m", "=", "3"] in lines
    assert ["4", "125", "221"] in lines
    assert ["4", "41", "77"] in lines and ["4", "84", "144"] in lines


def test_nothing_within_the_budget_names_the_smallest_setting():
    with pytest.raises(ValueError) as error:
        boft_ext.suggest_config(model(), 60, target_modules=["0", "3"])
    assert "within 60 " in str(error.value) and "2 target layers" in str(error.value)
    assert "boft_block_size = 2, boft_n_butterfly_factor = 1 with 61" in str(error.value)


def test_layers_that_share_no_small_block_are_named():
    odd = nn.Sequential(nn.Linear(9, 2), nn.Linear(64, 2))
    with pytest.raises(ValueError, match=r"boft_block_num = 1, .* with 2,056 \(layers have d = 9, 64; .* 45"):
        boft_ext.suggest_config(odd, 100, target_modules=["0", "1"])
    assert boft_ext.suggest_config(odd, 100, target_modules=["1"]).setting.parameters == 98
    with pytest.raises(ValueError, match="no setting fits all layers"):
        boft_ext.suggest_config(nn.Sequential(nn.Linear(1, 2), nn.Linear(64, 2)), 100, target_modules=["0", "1"])


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"budget": 0}, ValueError, "budget .* got 0"),
        ({"budget": 1.5}, ValueError, "budget .* got 1.5"),
        ({"budget": -3}, ValueError, "budget .* got -3"),
        ({"budget": True}, TypeError, "budget .* got True"),
        ({"budget": "1%"}, TypeError, "budget .* got '1%'"),
        ({"budget": 100, "target_modules": ["q"]}, ValueError, "matches no layer"),
        ({"budget": 100, "target_modules": ["4"]}, ValueError, "layer 4: .* not Conv1d"),
        ({"budget": 100, "boft_block_size": 8}, TypeError, "boft_block_size cannot be given"),
    ],
)
def test_bad_arguments(arguments, error, text):
    plain = nn.Sequential(*model(), nn.Conv1d(4, 4, 3))
    with pytest.raises(error, match=text):
        boft_ext.suggest_config(plain, **arguments)


def test_a_model_with_adapters_is_refused():
    wrapped = boft_ext.wrap(model(), boft_ext.BOFTConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="has BOFT layers already"):
        boft_ext.suggest_config(wrapped, 100)
