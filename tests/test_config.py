"""BOFTConfig: PEFT's fields and file, the rule for b, D and m, and what is refused."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boft_ext.config import BOFTConfig, as_config, resolve_shape


def shape_settings(size=0, num=0, m=1):
    return SimpleNamespace(boft_block_size=size, boft_block_num=num, boft_n_butterfly_factor=m)


@pytest.mark.parametrize(
    "channels, settings, expected",
    [
        (12, shape_settings(size=4), (4, 3, 1)),
        (15, shape_settings(size=5), (5, 3, 1)),
        (16, shape_settings(size=4, m=2), (4, 4, 2)),
        (16, shape_settings(size=4, m=3), (4, 4, 3)),
        (48, shape_settings(size=2, m=4), (2, 24, 4)),
        (16, shape_settings(num=4, m=3), (4, 4, 3)),
        (7, shape_settings(num=1), (7, 1, 1)),
        (1, shape_settings(size=1), (1, 1, 1)),
    ],
)
def test_shape_of_valid_settings(channels, settings, expected):
    assert resolve_shape(channels, settings) == expected


@given(channels=st.integers(1, 400), b=st.integers(1, 40), m=st.integers(1, 12))
def test_shape_exists_exactly_by_the_rule(channels, b, m):
    valid = channels % b == 0 if m == 1 else b % 2 == 0 and channels % (b * 2 ** (m - 1)) == 0
    if valid:
        assert resolve_shape(channels, shape_settings(size=b, m=m)) == (b, channels // b, m)
    else:
        with pytest.raises(ValueError, match=str(channels)):
            resolve_shape(channels, shape_settings(size=b, m=m))


@pytest.mark.parametrize(
    "channels, settings, numbers",
    [
        (10, shape_settings(size=4), ("10", "4")),
        (10, shape_settings(num=3), ("10", "3")),
        (15, shape_settings(size=5, m=2), ("15", "5", "2")),
        (24, shape_settings(size=4, m=3), ("24", "4", "m = 2", "3")),
        (16, shape_settings(num=3, m=2), ("16", "3")),
        (16, shape_settings(size=4, m=10**9), ("16", "1000000000", "m = 3")),
        (0, shape_settings(size=4), ("0",)),
        (16, shape_settings(), ("boft_block_size = 0", "boft_block_num = 0")),
        (16, shape_settings(size=4, num=4), ("boft_block_size = 4", "boft_block_num = 4")),
        (16, shape_settings(size=-4), ("-4",)),
        (16, shape_settings(size=4, m=0), ("boft_n_butterfly_factor", "0")),
        (16, shape_settings(size=4, m=-1), ("boft_n_butterfly_factor", "-1")),
        (16, shape_settings(size=4, m=2.0), ("boft_n_butterfly_factor", "2.0")),
        (16, shape_settings(size=True), ("boft_block_size", "True")),
        (16, shape_settings(size="4"), ("boft_block_size", "'4'")),
    ],
)
def test_bad_shape_names_the_numbers(channels, settings, numbers):
    with pytest.raises(ValueError) as error:
        resolve_shape(channels, settings)
    for number in numbers:
        assert number in str(error.value)


@pytest.mark.parametrize(
    "values, error, text",
    [
        ({"boft_block_num": 4}, ValueError, "boft_block_num = 4"),
        ({"boft_block_size": 0}, ValueError, "boft_block_size = 0"),
        ({"boft_n_butterfly_factor": 0}, ValueError, "got 0"),
        ({"boft_n_butterfly_factor": 1.5}, ValueError, "1.5"),
        ({"boft_dropout": -0.1}, ValueError, "-0.1"),
        ({"boft_dropout": 1.5}, ValueError, "1.5"),
        ({"boft_dropout": float("nan")}, ValueError, "nan"),
        ({"boft_dropout": "0.1"}, TypeError, "'0.1'"),
        ({"bias": "lora_only"}, ValueError, "lora_only"),
        ({"bias": None}, ValueError, "None"),
        ({"layers_pattern": "layers"}, ValueError, "layers_to_transform"),
        ({"layers_to_transform": "1"}, TypeError, "'1'"),
        ({"target_modules": 3}, TypeError, "3"),
        ({"target_modules": ["q", 3]}, TypeError, "3"),
        ({"modules_to_save": "head"}, TypeError, "head"),
        ({"init_weights": "normal"}, TypeError, "normal"),
        ({"peft_type": "LORA"}, ValueError, "LORA"),
        ({"task_type": "TRANSLATION"}, ValueError, "TRANSLATION"),
    ],
)
def test_bad_values_are_refused(values, error, text):
    with pytest.raises(error, match=text):
        BOFTConfig(**values)


def test_file_round_trip(tmp_path):
    config = BOFTConfig(
        boft_block_size=0,
        boft_block_num=8,
        boft_n_butterfly_factor=3,
        target_modules=["q", "v"],
        exclude_modules="decoder.*",
        boft_dropout=0.25,
        bias="boft_only",
        modules_to_save=["head"],
        layers_to_transform=[1, 2],
        layers_pattern="layers",
        task_type="CAUSAL_LM",
        base_model_name_or_path="model",
    )
    config.save_pretrained(tmp_path / "new" / "adapter")
    assert BOFTConfig.from_pretrained(tmp_path / "new" / "adapter") == config


def test_unknown_keys_are_ignored_with_a_warning(tmp_path):
    values = {"peft_type": "BOFT", "boft_block_size": 8, "added_later": 1, "another": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.warns(UserWarning, match="added_later, another"):
        assert BOFTConfig.from_pretrained(tmp_path).boft_block_size == 8


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "holds no adapter_config.json"),
        ('{"peft_type": "BOFT", "boft_b', "not a JSON file"),
        ("", "not a JSON file"),
        (b"\xff\xfe\x00", "not a JSON file"),
        ('["BOFT"]', "does not describe a BOFT adapter"),
        ('{"peft_type": "LORA", "r": 8}', "LORA"),
        ('{"boft_block_size": 4}', "peft_type is None"),
        ('{"peft_type": "BOFT", "boft_block_size": 4, "boft_block_num": 4}', "boft_block_num = 4"),
        ('{"peft_type": "BOFT", "boft_n_butterfly_factor": 2.5}', "2.5"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        BOFTConfig.from_pretrained(tmp_path)


def test_save_refuses_a_file_as_directory(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="taken"):
        BOFTConfig().save_pretrained(tmp_path / "taken")


def test_as_config_copies():
    config = BOFTConfig(target_modules=["q"], modules_to_save=["head"], auto_mapping={"parent_library": "a"})
    copy = as_config(config)
    copy.modules_to_save.append("other")
    copy.target_modules.add("other")
    copy.auto_mapping["parent_library"] = "b"
    assert config == BOFTConfig(target_modules=["q"], modules_to_save=["head"], auto_mapping={"parent_library": "a"})
    config.boft_n_butterfly_factor = 0
    with pytest.raises(ValueError, match="got 0"):
        as_config(config)


@pytest.mark.parametrize("other", [None, {"boft_block_size": 4}, SimpleNamespace(r=8)])
def test_as_config_refuses_other_objects(other):
    with pytest.raises(TypeError, match=type(other).__name__):
        as_config(other)


def test_fields_and_defaults_are_pefts():
    peft = pytest.importorskip("peft")
    assert {f.name for f in dataclasses.fields(BOFTConfig)} == {f.name for f in dataclasses.fields(peft.BOFTConfig)}
    ours, theirs = BOFTConfig().to_dict(), peft.BOFTConfig().to_dict()
    assert ours == {**theirs, "peft_version": None}


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"target_modules": ["q", "v"], "boft_block_size": 8, "boft_n_butterfly_factor": 2, "task_type": "SEQ_CLS"},
        {"target_modules": "all-linear", "exclude_modules": ["head"], "boft_block_size": 0, "boft_block_num": 4},
        {"layers_to_transform": 3, "layers_pattern": ["h"], "modules_to_save": ["a", "b"], "bias": "all"},
    ],
)
def test_files_go_both_ways_with_peft(tmp_path, values):
    peft = pytest.importorskip("peft")
    theirs = peft.BOFTConfig(**values)
    theirs.save_pretrained(str(tmp_path / "peft"))
    ours = BOFTConfig.from_pretrained(tmp_path / "peft")
    assert ours == as_config(theirs)
    ours.save_pretrained(tmp_path / "ours")
    written = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("peft", "ours")]
    for config in written:
        for key in ("target_modules", "exclude_modules"):
            config[key] = sorted(config[key]) if isinstance(config[key], list) else config[key]
    assert written[0] == written[1]
    assert peft.BOFTConfig.from_pretrained(str(tmp_path / "ours")) == theirs


def test_other_peft_methods_are_refused(tmp_path):
    peft = pytest.importorskip("peft")
    with pytest.raises(TypeError, match="LoraConfig"):
        as_config(peft.LoraConfig())
    peft.LoraConfig().save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="LORA"):
        BOFTConfig.from_pretrained(tmp_path)
