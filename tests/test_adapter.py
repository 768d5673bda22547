"""wrap, save_adapter, load_adapter: PEFT's choice of layers, PEFT's files, all or nothing, with and without PEFT."""

import copy
import json
import pickle
import subprocess
import sys
import textwrap

import pytest
import safetensors.torch
import torch
from torch import nn

from boft_ext.adapter import load_adapter, save_adapter, wrap
from boft_ext.config import BOFTConfig
from boft_ext.nn import BOFTConv2d, BOFTLinear

PREFIX = "base_model.model."


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(16, 16)
        self.value = nn.Linear(16, 16, bias=False)
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        return self.norm(x + torch.relu(self.query(x)) + self.value(x))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.query = nn.Linear(16, 16)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.query(x)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(4, 16, 2, padding=1)
        self.encoder = Encoder()
        self.norm = nn.BatchNorm1d(16)
        self.classifier = nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x).mean((-1, -2))
        return self.classifier(self.norm(self.encoder(x)))


def make_model():
    """The same plain model at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Model().eval()


def config_with(**kwargs):
    return BOFTConfig(**{"target_modules": ["query", "value", "stem"], "init_weights": False, **kwargs})


def image():
    return torch.randn(5, 4, 6, 6, generator=torch.Generator().manual_seed(0))


def train_randomly(model):
    """Move every trainable parameter, as training would."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def adapted(model):
    return [name for name, module in model.named_modules() if isinstance(module, (BOFTLinear, BOFTConv2d))]


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def snapshot(model):
    """All that a refused call must leave alone."""
    modules = [(name, id(module), module.training) for name, module in model.named_modules()]
    flags = [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()]
    config = copy.deepcopy(getattr(model, "boft_config", None))
    return modules, flags, config, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(before, after):
    assert before[:3] == after[:3]
    assert before[3].keys() == after[3].keys()
    for name, tensor in before[3].items():
        assert torch.equal(tensor, after[3][name]), name


def edit_tensors(directory, edit):
    path = directory / "adapter_model.safetensors"
    tensors = edit(safetensors.torch.load_file(path))
    safetensors.torch.save_file(tensors, path)


def edit_config(directory, **values):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


LAYERS = [f"encoder.layers.{i}.{name}" for i in range(3) for name in ("query", "value")]
CHOICES = [
    (
        {"target_modules": ["query"]},
        ["encoder.layers.0.query", "encoder.layers.1.query", "encoder.layers.2.query", "encoder.query"],
    ),
    ({"target_modules": ["encoder.query", "stem"]}, ["stem", "encoder.query"]),
    ({"target_modules": ["layers.1.query", "1.value"]}, ["encoder.layers.1.query", "encoder.layers.1.value"]),
    ({"target_modules": r".*\.layers\.\d+\.(query|value)"}, LAYERS),
    ({"target_modules": r"encoder\.query"}, ["encoder.query"]),
    ({"target_modules": "all-linear"}, [*LAYERS, "encoder.query", "classifier"]),
    (
        {"target_modules": "ALL-LINEAR", "exclude_modules": ["value", "classifier"]},
        [*LAYERS[::2], "encoder.query"],
    ),
    ({"target_modules": ["query", "value"], "exclude_modules": r".*\.[12]\..*"}, [*LAYERS[:2], "encoder.query"]),
    ({"target_modules": ["query", "value"], "layers_to_transform": 1}, LAYERS[2:4]),
    ({"target_modules": ["query", "value"], "layers_to_transform": [0, 2]}, LAYERS[:2] + LAYERS[4:]),
    ({"target_modules": ["query"], "layers_to_transform": [2], "layers_pattern": "layers"}, LAYERS[4:5]),
    ({"target_modules": ["query"], "layers_to_transform": [2], "layers_pattern": ["h", "layers"]}, LAYERS[4:5]),
    ({"target_modules": ["query", "encoder.query"], "layers_to_transform": 0}, [LAYERS[0], "encoder.query"]),
    ({"target_modules": ["query", "value"], "layers_to_transform": []}, [*LAYERS, "encoder.query"]),
    ({"target_modules": "all-linear", "modules_to_save": ["classifier"]}, [*LAYERS, "encoder.query"]),
    (
        {"target_modules": ["query"], "modules_to_save": ["layers.0", "classifier"]},
        [LAYERS[2], LAYERS[4], "encoder.query"],
    ),
    ({"target_modules": "all-linear", "task_type": "SEQ_CLS"}, [*LAYERS, "encoder.query"]),
]


@pytest.mark.parametrize("settings, expected", CHOICES, ids=range(len(CHOICES)))
def test_choice_of_layers(settings, expected):
    model = make_model()
    assert wrap(model, BOFTConfig(**settings)) is model
    assert adapted(model) == expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("settings, expected", CHOICES, ids=range(len(CHOICES)))
def test_choice_of_layers_and_trainable_parameters_are_pefts(settings, expected):
    peft = pytest.importorskip("peft")
    for bias in ("none", "all", "boft_only"):
        ours = wrap(make_model(), BOFTConfig(bias=bias, **copy.deepcopy(settings)))
        theirs = peft.get_peft_model(make_model(), peft.BOFTConfig(bias=bias, **copy.deepcopy(settings)))
        assert theirs.base_model.targeted_module_names == expected
        names = {
            n.removeprefix(PREFIX).replace(".default", "").replace(".modules_to_save", "") for n in trainable(theirs)
        }
        assert trainable(ours) == names


def test_wrapping_changes_nothing_until_training():
    model = make_model()
    y = model(image())
    wrap(model, BOFTConfig(target_modules=["query", "stem"], boft_n_butterfly_factor=2))
    assert torch.equal(model(image()), y)


def test_everything_else_is_frozen():
    model = wrap(make_model(), config_with(target_modules=["encoder.query"], modules_to_save=["classifier"]))
    assert trainable(model) == {f"encoder.query.boft_{x}" for x in "Rs"} | {"classifier.weight", "classifier.bias"}
    model = wrap(make_model(), config_with(inference_mode=True, modules_to_save=["classifier"], bias="all"))
    assert trainable(model) == set()


def test_the_callers_configuration_is_not_changed():
    config = BOFTConfig(target_modules="all-linear", task_type="SEQ_CLS")
    before = copy.deepcopy(config)
    model = wrap(make_model(), config)
    assert config == before
    assert model.boft_config.modules_to_save == ["classifier", "score"]
    assert "encoder.query" in model.boft_config.target_modules


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"target_modules": ["missing"]}, "missing"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": []}, "name the layers"),
        ({"target_modules": ["query"], "exclude_modules": ["query"]}, "exclude_modules"),
        ({"target_modules": ["query"], "layers_to_transform": 7}, "layers_to_transform = 7"),
        ({"target_modules": "(query"}, "regular expression"),
        ({"target_modules": ["query", "norm"]}, "layer encoder.layers.0.norm: .*LayerNorm"),
        ({"target_modules": ["layers"]}, "ModuleList"),
        ({"target_modules": ["query", "stem"], "boft_block_size": 5}, "layer stem: 16 channels.* 5"),
        ({"target_modules": ["query"], "boft_n_butterfly_factor": 9}, "at most m = 3"),
        ({"target_modules": ["query"], "boft_block_size": 0, "boft_block_num": 3}, "boft_block_num = 3"),
        ({"target_modules": ["query"], "modules_to_save": ["ery"]}, "both target_modules and modules_to_save"),
    ],
)
def test_wrapping_is_all_or_nothing(settings, text):
    model = make_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=text):
        wrap(model, BOFTConfig(**settings))
    assert_same(before, snapshot(model))


def test_wrapping_twice_is_refused():
    model = wrap(make_model(), config_with())
    before = snapshot(model)
    with pytest.raises(ValueError, match="already"):
        wrap(model, config_with(target_modules=["classifier"]))
    assert_same(before, snapshot(model))


def test_what_may_surprise_is_warned_about():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(8, 16), nn.Linear(16, 8, bias=False)
            self.head.weight = self.embedding.weight

    with pytest.warns(UserWarning, match="head and embedding.weight share one weight"):
        wrap(Tied(), BOFTConfig(target_modules=["head"]))
    with pytest.warns(UserWarning, match="out_proj"):
        wrap(nn.TransformerEncoderLayer(16, 2), BOFTConfig(target_modules="all-linear"))
    with pytest.warns(UserWarning, match="exclude_modules"):
        wrap(make_model(), config_with(exclude_modules=["missing"]))
    with pytest.warns(UserWarning, match="modules_to_save"):
        wrap(make_model(), config_with(modules_to_save=["missing"]))


VARIANTS = {
    "plain": {},
    "m = 2": {"boft_n_butterfly_factor": 2},
    "m = 3, b = 2": {"boft_n_butterfly_factor": 3, "boft_block_size": 2},
    "block number": {"boft_block_size": 0, "boft_block_num": 8},
    "all biases": {"bias": "all"},
    "own biases": {"bias": "boft_only"},
    "classifier": {"task_type": "SEQ_CLS"},
    "saved module": {"modules_to_save": ["classifier", "encoder.layers.0.norm"]},
    "saved buffers and biases": {"modules_to_save": ["classifier", "norm"], "bias": "all"},
}
ONE_FACTOR = [name for name, settings in VARIANTS.items() if "boft_n_butterfly_factor" not in settings]


@pytest.mark.parametrize("name", VARIANTS)
def test_save_and_load(name, tmp_path):
    model = train_randomly(wrap(make_model(), config_with(**VARIANTS[name])))
    y = model(image())
    save_adapter(model, tmp_path / "a" / "b")
    for other in (make_model(), train_randomly(wrap(make_model(), config_with(**VARIANTS[name])))):
        assert not torch.allclose(other(image()), y)
        assert load_adapter(other, tmp_path / "a" / "b") is other
        assert torch.equal(other(image()), y)
        save_adapter(other, tmp_path / "again")
        files = [
            {
                key: value.tolist()
                for key, value in safetensors.torch.load_file(d / "adapter_model.safetensors").items()
            }
            for d in (tmp_path / "a" / "b", tmp_path / "again")
        ]
        assert files[0] == files[1]
        configs = [(d / "adapter_config.json").read_text() for d in (tmp_path / "a" / "b", tmp_path / "again")]
        assert configs[0] == configs[1]


def test_a_loaded_adapter_is_frozen_unless_it_is_to_train_on(tmp_path):
    model = wrap(make_model(), config_with(bias="boft_only", modules_to_save=["classifier"]))
    save_adapter(model, tmp_path)
    assert trainable(load_adapter(make_model(), tmp_path)) == set()
    assert trainable(load_adapter(make_model(), tmp_path, is_trainable=True)) == trainable(model)
    assert trainable(load_adapter(copy.deepcopy(model), tmp_path)) == trainable(model)


def test_file_contents(tmp_path):
    model = make_model()
    model.name_or_path = "some/model"
    wrap(model, config_with(target_modules=["encoder.query"], bias="all", modules_to_save=["classifier"]))
    save_adapter(model, tmp_path)
    keys = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").keys()
    biases = {
        f"{PREFIX}{n}" for n, _ in make_model().named_parameters() if n.endswith(".bias") and n != "encoder.query.bias"
    }
    assert keys == biases | {
        f"{PREFIX}{name}"
        for name in (
            "encoder.query.boft_R",
            "encoder.query.boft_s",
            "encoder.query.base_layer.bias",
            "classifier.weight",
        )
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "BOFT" and config["inference_mode"] is True
    assert config["base_model_name_or_path"] == "some/model" and config["target_modules"] == ["encoder.query"]
    assert config["auto_mapping"] == {"base_model_class": "Model", "parent_library": __name__}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ONE_FACTOR)
def test_peft_loads_our_files(name, tmp_path):
    peft = pytest.importorskip("peft")
    model = train_randomly(wrap(make_model(), config_with(**VARIANTS[name])))
    save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make_model(), str(tmp_path))
    torch.testing.assert_close(theirs.base_model.model(image()), model(image()))
    ours = {key.removeprefix(PREFIX) for key in peft.get_peft_model_state_dict(theirs)}
    ignored = {key for key in ours if ".original_module." in key or ".modules_to_save." in key}
    written = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").keys()
    assert ours - ignored == {key.removeprefix(PREFIX) for key in written}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ONE_FACTOR)
def test_pefts_files_load_here(name, tmp_path):
    peft = pytest.importorskip("peft")
    settings = {"target_modules": ["query", "value", "stem"], "init_weights": False, **copy.deepcopy(VARIANTS[name])}
    theirs = train_randomly(peft.get_peft_model(make_model(), peft.BOFTConfig(**settings)))
    theirs.save_pretrained(str(tmp_path))
    for model in (make_model(), wrap(make_model(), config_with(**VARIANTS[name]))):
        load_adapter(model, tmp_path)
        torch.testing.assert_close(model(image()), theirs.base_model.model(image()))
        save_adapter(model, tmp_path / "again")
        ours, original = (json.loads((d / "adapter_config.json").read_text()) for d in (tmp_path / "again", tmp_path))
        for config in (ours, original):
            config["target_modules"] = sorted(config["target_modules"])
            config.pop("peft_version")
        assert ours == original


def test_keys_without_the_prefix(tmp_path):
    model = train_randomly(wrap(make_model(), config_with(modules_to_save=["classifier"])))
    save_adapter(model, tmp_path)
    edit_tensors(tmp_path, lambda tensors: {key.removeprefix(PREFIX): value for key, value in tensors.items()})
    for other in (make_model(), wrap(make_model(), config_with(modules_to_save=["classifier"]))):
        assert torch.equal(load_adapter(other, tmp_path)(image()), model(image()))


def test_a_model_whose_names_begin_like_the_prefix(tmp_path):
    def nested():
        outer = nn.Module()
        outer.base_model = nn.Module()
        outer.base_model.model = make_model()
        return outer

    model = train_randomly(wrap(nested(), config_with()))
    save_adapter(model, tmp_path)
    for _ in range(2):
        other = load_adapter(nested(), tmp_path)
        assert torch.equal(other.base_model.model(image()), model.base_model.model(image()))
        edit_tensors(tmp_path, lambda tensors: {key.removeprefix(PREFIX): value for key, value in tensors.items()})


def test_old_files_with_permutations(tmp_path):
    model = train_randomly(wrap(make_model(), config_with()))
    save_adapter(model, tmp_path)
    extra = {f"{PREFIX}{name}.boft_P": torch.eye(16)[None] for name in adapted(model)}
    edit_tensors(tmp_path, lambda tensors: {**tensors, **extra})
    assert torch.equal(load_adapter(make_model(), tmp_path)(image()), model(image()))


def test_files_of_old_peft_without_the_biases_they_name(tmp_path):
    model = train_randomly(wrap(make_model(), config_with(bias="boft_only")))
    save_adapter(model, tmp_path)
    edit_tensors(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(".bias")})
    with pytest.warns(UserWarning, match="lacks .*base_layer.bias"):
        other = load_adapter(make_model(), tmp_path)
    assert torch.equal(other.stem.bias, make_model().stem.bias)
    assert torch.equal(other.stem.boft_R, model.stem.boft_R)


@pytest.mark.parametrize("claimed, stored", [(2, 1), (1, 2), (7, 1), (1, 3)])
def test_m_comes_from_the_tensors(claimed, stored, tmp_path):
    model = train_randomly(wrap(make_model(), config_with(boft_n_butterfly_factor=stored)))
    save_adapter(model, tmp_path)
    edit_config(tmp_path, boft_n_butterfly_factor=claimed)
    with pytest.warns(UserWarning, match=f"boft_n_butterfly_factor = {claimed}.*m = {stored}"):
        other = load_adapter(make_model(), tmp_path)
    assert torch.equal(other(image()), model(image()))
    assert other.boft_config.boft_n_butterfly_factor == stored


def test_m_of_a_wrapped_model_follows_the_file_and_optimisers_keep_the_parameter(tmp_path):
    model = train_randomly(wrap(make_model(), config_with(boft_n_butterfly_factor=3)))
    save_adapter(model, tmp_path)
    other = wrap(make_model(), config_with(boft_n_butterfly_factor=1))
    other(image()).sum().backward()
    parameters = [p for p in other.parameters() if p.requires_grad]
    with pytest.warns(UserWarning, match="m = 1 becomes 3"):
        load_adapter(other, tmp_path)
    assert other.boft_config.boft_n_butterfly_factor == 3
    assert torch.equal(other(image()), model(image()))
    optimiser = torch.optim.SGD(parameters, lr=0.1)
    assert all(p.grad is None or p.grad.shape == p.shape for p in parameters)
    path = tmp_path / "adapter_model.safetensors"
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert torch.equal(other(image()), model(image()))
    optimiser.zero_grad()
    other(image()).square().sum().backward()
    optimiser.step()
    assert not torch.equal(other(image()), model(image()))
    save_adapter(other, tmp_path / "again")
    assert torch.equal(load_adapter(make_model(), tmp_path / "again")(image()), other(image()))


@pytest.mark.parametrize("m", [0, -1, 1.5, "2", None])
def test_a_meaningless_m_is_refused(m, tmp_path):
    save_adapter(wrap(make_model(), config_with()), tmp_path)
    edit_config(tmp_path, boft_n_butterfly_factor=m)
    model = make_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match="boft_n_butterfly_factor"):
        load_adapter(model, tmp_path)
    assert_same(before, snapshot(model))


def rename(old, new):
    return lambda tensors: {key.replace(old, new): value for key, value in tensors.items()}


def change(ending, change_tensor):
    def edit(tensors):
        return {k: change_tensor(v).contiguous() if k.endswith(ending) else v for k, v in tensors.items()}

    return edit


TENSOR_FAULTS = {
    "no tensors": (lambda tensors: {}, "no boft_R"),
    "another method": (rename("boft_R", "lora_A"), "no boft_R"),
    "another model": (rename("encoder", "decoder"), "decoder"),
    "all of another model": (
        lambda t: {"decoder.x.boft_R": torch.zeros(1, 4, 4, 4), "y": torch.ones(1)},
        "nothing in the file matches",
    ),
    "one layer missing": (
        lambda t: {k: v for k, v in t.items() if "layers.1.query" not in k},
        "lacks .*layers.1.query.boft_R",
    ),
    "one scale missing": (lambda t: {k: v for k, v in t.items() if "stem.boft_s" not in k}, "lacks stem.boft_s"),
    "saved module missing": (
        lambda t: {k: v for k, v in t.items() if "classifier" not in k},
        "lacks classifier.weight",
    ),
    "saved bias missing": (
        lambda t: {k: v for k, v in t.items() if "classifier.bias" not in k},
        "lacks classifier.bias",
    ),
    "one tensor more": (lambda t: {**t, PREFIX + "encoder.other": torch.ones(1)}, "encoder.other"),
    "a base weight": (
        lambda t: {**t, PREFIX + "encoder.query.base_layer.weight": torch.ones(16, 16)},
        "base_layer.weight",
    ),
    "twice": (lambda t: {**t, **{k.removeprefix(PREFIX): v.clone() for k, v in t.items()}}, "twice"),
    "other block size": (
        change("value.boft_R", lambda v: v.view(1, 2, 8, 4).repeat(1, 1, 1, 2)),
        r"\(1, 2, 8, 8\).*\(1, 4, 4, 4\)",
    ),
    "other number of factors in one layer": (change("stem.boft_R", lambda v: v.repeat(2, 1, 1, 1)), "one m"),
    "too many factors": (change("boft_R", lambda v: v.repeat(4, 1, 1, 1)), "m = 4|boft_n_butterfly_factor = 4"),
    "no factor": (change("boft_R", lambda v: v[:0]), "one m"),
    "flat": (change("boft_R", lambda v: v[0]), "must be"),
    "other scale": (change("query.boft_s", lambda v: v[:8]), r"boft_s is \(8, 1\).*\(16, 1\)"),
    "transposed scale": (change("stem.boft_s", lambda v: v.T), r"\(16, 1\).*\(1, 16\)"),
    "integers": (change("boft_R", lambda v: v.to(torch.int32)), "int32"),
    "other head": (change("classifier.weight", lambda v: v[:2]), r"classifier.weight is \(2, 16\).*\(3, 16\)"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("start", ["plain", "wrapped"])
@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_wrong_tensors_are_refused(fault, start, tmp_path):
    settings = {"modules_to_save": ["classifier"]}
    save_adapter(train_randomly(wrap(make_model(), config_with(**settings))), tmp_path)
    edit, text = TENSOR_FAULTS[fault]
    edit_tensors(tmp_path, edit)
    refused(make_model() if start == "plain" else wrap(make_model(), config_with(**settings)), tmp_path, text)


def refused(model, directory, text):
    before = snapshot(model)
    with pytest.raises(ValueError, match=text):
        load_adapter(model, directory)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize("start", ["plain", "wrapped"])
def test_truncated_files_are_refused(start, tmp_path):
    save_adapter(wrap(make_model(), config_with()), tmp_path)
    model = make_model() if start == "plain" else wrap(make_model(), config_with())
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        path = tmp_path / name
        content = path.read_bytes()
        for length in (0, 1, 7, 8, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            refused(model, tmp_path, name)
        path.unlink()
        refused(model, tmp_path, f"holds no {name}")
        path.write_bytes(content)
    refused(model, tmp_path / "nowhere", "holds no")


def test_configuration_that_does_not_fit_the_model_is_refused(tmp_path):
    save_adapter(wrap(make_model(), config_with()), tmp_path)
    edit_config(tmp_path, boft_block_size=8)
    refused(make_model(), tmp_path, r"\(1, 4, 4, 4\).*\(1, 2, 8, 8\)")
    edit_config(tmp_path, boft_block_size=5)
    refused(make_model(), tmp_path, "16 channels.* 5")
    edit_config(tmp_path, boft_block_size=4, target_modules=["missing"])
    refused(make_model(), tmp_path, "missing")
    edit_config(tmp_path, target_modules=["query"])
    refused(make_model(), tmp_path, "value.boft_R")
    edit_config(tmp_path, peft_type="LORA")
    refused(make_model(), tmp_path, "LORA")


def test_biases_that_the_wrapped_model_does_not_train_are_refused(tmp_path):
    save_adapter(wrap(make_model(), config_with(bias="boft_only")), tmp_path)
    refused(wrap(make_model(), config_with()), tmp_path, "base_layer.bias")


def test_merged_layers_are_saved_but_not_loaded_into(tmp_path):
    model = train_randomly(wrap(make_model(), config_with(bias="boft_only")))
    y = model(image())
    for name in adapted(model):
        model.get_submodule(name).merge()
    torch.testing.assert_close(model(image()), y, rtol=1e-5, atol=1e-5)
    save_adapter(model, tmp_path)
    assert torch.equal(load_adapter(make_model(), tmp_path)(image()), y)
    refused(model, tmp_path, "merged layers.*stem")


@pytest.mark.parametrize("padded", [False, True])
def test_torch_transformers_use_the_adapter_in_evaluation_too(padded):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    wrap(encoder, config_with(target_modules=["linear1", "linear2"]))
    x = torch.randn(2, 4, 16)
    mask = torch.tensor([[False, False, False, True], [False] * 4]) if padded else None
    y = encoder(x, src_key_padding_mask=mask)
    for twin in (encoder, copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        twin.eval()
        with torch.no_grad():
            evaluated = twin(x, src_key_padding_mask=mask)
        seen = torch.ones(2, 4, dtype=torch.bool) if mask is None else ~mask
        torch.testing.assert_close(evaluated[seen], y[seen])


def test_saving_needs_an_adapter_and_a_directory(tmp_path):
    with pytest.raises(ValueError, match="Model has no adapter"):
        save_adapter(make_model(), tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="taken is a file"):
        save_adapter(wrap(make_model(), config_with()), tmp_path / "taken")
    with torch.device("meta"):
        model = Model()
    with pytest.raises(ValueError, match="meta"):
        save_adapter(wrap(model, config_with()), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_values_cannot_be_loaded_onto_the_meta_device(tmp_path):
    save_adapter(wrap(make_model(), config_with()), tmp_path)
    with torch.device("meta"):
        model = Model()
    with pytest.raises(ValueError, match="meta"):
        load_adapter(model, tmp_path)
    assert adapted(model) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models(dtype, tmp_path):
    model = train_randomly(wrap(make_model().to(dtype), config_with(boft_n_butterfly_factor=2)))
    assert model.stem.boft_R.dtype == torch.float32
    save_adapter(model, tmp_path)
    other = load_adapter(make_model().to(dtype), tmp_path)
    assert other(image().to(dtype)).dtype == dtype
    assert torch.equal(other(image().to(dtype)), model(image().to(dtype)))


def test_copies_of_a_wrapped_model_can_be_saved(tmp_path):
    model = train_randomly(wrap(make_model(), config_with(bias="all")))
    for i, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        save_adapter(twin, tmp_path / str(i))
        assert torch.equal(load_adapter(make_model(), tmp_path / str(i))(image()), model(image()))


def test_compiled_models(tmp_path):
    model = train_randomly(wrap(make_model(), config_with(modules_to_save=["classifier"], bias="all")))
    compiled = torch.compile(model, backend="eager")
    save_adapter(compiled, tmp_path)
    keys = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors").keys()
    assert not any("_orig_mod" in key for key in keys)
    other = make_model()
    other.encoder.layers[1] = torch.compile(other.encoder.layers[1], backend="eager")
    load_adapter(other, tmp_path)
    torch.testing.assert_close(other(image()), model(image()))
    torch.testing.assert_close(
        load_adapter(torch.compile(make_model(), backend="eager"), tmp_path)(image()), model(image())
    )


@pytest.mark.filterwarnings("ignore")
def test_language_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    plain = transformers.LlamaForCausalLM(settings).eval()
    config = BOFTConfig(
        boft_block_size=4,
        boft_n_butterfly_factor=3,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        init_weights=False,
    )
    model = wrap(copy.deepcopy(plain), config)
    assert len(adapted(model)) == 14 and "lm_head" not in adapted(model)
    tokens = torch.arange(10)[None]
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
    save_adapter(model, tmp_path)
    other = load_adapter(plain, tmp_path)
    assert torch.equal(other(tokens).logits, model(tokens).logits)
    assert torch.equal(
        other.generate(tokens, max_new_tokens=5, do_sample=False),
        model.generate(tokens, max_new_tokens=5, do_sample=False),
    )


@pytest.mark.filterwarnings("ignore")
def test_layers_of_transformers_that_store_the_weight_transposed_are_refused():
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2))
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer transformer\.h\.0\.attn\.c_attn: .*Conv1D"):
        wrap(model, BOFTConfig(target_modules="all-linear"))
    assert_same(before, snapshot(model))


def test_a_model_with_pefts_adapters_is_refused():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make_model(), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="PEFT"):
        wrap(model, config_with())


def test_everything_works_without_peft(tmp_path):
    script = """
        import sys

        class Blocker:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("peft", "transformers", "accelerate"):
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, Blocker())
        import torch
        from torch import nn
        import boft_ext
        from boft_ext import functional
        from boft_ext.adapter import load_adapter, save_adapter, wrap
        from boft_ext.config import BOFTConfig
        from boft_ext.info import build_info

        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 16, 2), nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 2))
        plain = nn.Sequential(*[type(m)(*a) for m, a in zip(model, [(4, 16, 2), (), (16, 16), (16, 2)])])
        plain.load_state_dict(model.state_dict())
        x = torch.randn(3, 4, 2, 2)
        config = BOFTConfig(boft_n_butterfly_factor=2, target_modules=["0", "2"], modules_to_save=["3"])
        wrap(model, config)
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        for _ in range(3):
            optimiser.zero_grad()
            model(x).square().sum().backward()
            optimiser.step()
        save_adapter(model, sys.argv[1])
        load_adapter(plain, sys.argv[1])
        assert torch.equal(plain(x), model(x)) and model[2].boft_R.any()
        plain[2].merge()
        torch.testing.assert_close(plain(x), model(x))
        functional.rotate(torch.randn(2, 16), model[2].boft_R)
        assert not [name for name in sys.modules if name.partition(".")[0] in ("peft", "transformers")]
        print("done")
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and result.stdout.strip() == "done", result.stderr
