"""The recipe examples/interpolate on tiny models: both ends, what lies between them, and what goes wrong."""

import json

import pytest
import safetensors.torch
import torch
from PIL import Image
from recipe_runs import EXAMPLES, call_main, recipe_modules, refused, run

import boft_ext

SCRIPT = "interpolate/interpolate.py"
M = 3


modules = recipe_modules("interpolate")


def randomise(model, amount):
    """Give the adapter's parameters, and the biases that train with it, other values."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                centre = 1.0 if "boft_s" in name else parameter.clone()
                parameter.copy_(centre + amount * torch.randn_like(parameter))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny pipeline with an adapter of its UNet, and a tiny classifier with one that has biases and a head."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        from peft import BOFTConfig, get_peft_model
        from recipe_tools.adapters import save_adapter
        from recipe_tools.tiny_diffusion import tiny_pipeline
        from transformers import BertConfig, BertForSequenceClassification

        boft_ext.patch_peft()
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("saved")
        pipeline = tiny_pipeline("sd")
        pipeline.save_pretrained(folder / "pipeline")
        settings = {"boft_block_num": 8, "boft_block_size": 0, "boft_n_butterfly_factor": M, "bias": "boft_only"}
        pipeline.unet.add_adapter(BOFTConfig(target_modules=["to_q", "to_k", "to_v", "to_out.0"], **settings))
        randomise(pipeline.unet, 0.3)
        save_adapter(pipeline.unet, folder / "unet", "tiny")

        config = BertConfig(
            vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
        model = BertForSequenceClassification(config)
        model.save_pretrained(folder / "bert")
        tuned = BOFTConfig(target_modules=["query", "dense"], modules_to_save=["classifier"], **settings)
        peft_model = get_peft_model(model, tuned)
        randomise(peft_model, 0.3)
        peft_model.save_pretrained(folder / "bert-adapter")
        inputs = {"input_ids": torch.arange(2, 18).view(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.int64)}
        safetensors.torch.save_file(inputs, folder / "inputs.safetensors")
        boft_ext.unpatch_peft()
    return folder


def pipeline_command(saved, output, *arguments):
    return [
        *("--pretrained-model-name-or-path", saved / "pipeline", "--adapter", saved / "unet", "--output-dir", output),
        *("--prompt", "a red circle", "a blue square", "--resolution", 64, "--inference-steps", 2, *arguments),
    ]


def result_of(output):
    return json.loads((output / "interpolation.json").read_text(encoding="utf-8"))


def test_pipeline_goes_from_one_model_to_the_other(saved, tmp_path):
    printed = run(SCRIPT, *pipeline_command(saved, tmp_path)).stdout
    assert printed.splitlines()[0].startswith("boft_ext ") and f"m={M}" in printed.splitlines()[0]
    result = result_of(tmp_path)
    assert [row["components"] for row in result["rows"]] == [3, 2, 1, 0]
    assert result["largest_differences"]["fine-tuned"] == 0 and result["largest_differences"]["base"] <= 1e-4
    assert result["rows"][0]["from_base"] > 1e-3 and result["rows"][-1]["from_tuned"] > 1e-3
    between = result["rows"][1:-1]
    assert all(row["from_tuned"] > 1e-4 and row["from_base"] > 1e-4 for row in between)
    strip = Image.open(tmp_path / "strip.png")
    assert strip.width > 4 * 64 and strip.height > 2 * 64


def test_transformer_with_biases_and_head_reaches_its_base(saved, tmp_path, modules, monkeypatch, capsys):
    inputs = ("--inputs", saved / "inputs.safetensors", "--adapter", saved / "bert-adapter")
    call_main(
        monkeypatch, SCRIPT, "--pretrained-model-name-or-path", saved / "bert", *inputs, "--output-dir", tmp_path
    )
    result = result_of(tmp_path)
    assert result["m"] == M and max(result["largest_differences"].values()) <= 1e-5
    assert result["rows"][0]["from_base"] > 0.01
    assert "the base end" in capsys.readouterr().out and not (tmp_path / "strip.png").exists()


def test_an_end_that_is_another_model_has_status_1(saved, tmp_path, modules, monkeypatch, capsys):
    import components

    # Without the base model's biases the last state keeps trained ones.
    monkeypatch.setattr(components, "base_biases", lambda model: {})
    inputs = ("--inputs", saved / "inputs.safetensors", "--adapter", saved / "bert-adapter")
    with pytest.raises(SystemExit) as stopped:
        call_main(
            monkeypatch, SCRIPT, "--pretrained-model-name-or-path", saved / "bert", *inputs, "--output-dir", tmp_path
        )
    message = str(stopped.value.code)  # a string: status 1, and the line on stderr
    assert "not the base model" in message and "largest difference" in message
    assert (tmp_path / "interpolation.json").is_file()


def test_components_leave_from_the_left(saved, modules):
    from components import Components

    boft_ext.patch_peft()
    from peft import BOFTConfig, get_peft_model

    plain = torch.nn.Sequential(torch.nn.Linear(32, 8))
    model = get_peft_model(plain, BOFTConfig(target_modules=["0"], boft_block_size=4, boft_n_butterfly_factor=M))
    randomise(model, 0.5)
    layer = model.base_model.model[0]
    parts = []
    for factor in range(M):
        alone = torch.zeros_like(layer.boft_R["default"].detach())
        alone[factor] = layer.boft_R["default"].detach()[factor]
        parts.append(boft_ext.functional.rotation_matrix(alone))
    components = Components(model, {})
    assert components.m == M
    expected = torch.eye(32)
    for count in range(M + 1):
        components.keep(count)
        torch.testing.assert_close(boft_ext.functional.rotation_matrix(layer.boft_R["default"].detach()), expected)
        if count < M:
            expected = parts[count] @ expected  # B̃_count+1 stands to the left of those before
    assert layer.boft_s["default"].std() > 0.1
    components.keep(0)
    assert (layer.boft_s["default"] == 1).all()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--control-dir", EXAMPLES], ["--adapter", "--control-dir"]),
        (["--text", "two"], ["--text", "--prompt"]),
        (["--adapter", "nowhere"], ["adapter_config.json", "nowhere"]),
        (["--tolerance", "2"], ["2"]),
        (["--output-dir", __file__], [__file__]),
    ],
)
def test_wrong_options_are_one_line(saved, tmp_path, monkeypatch, capsys, arguments, named):
    refused(monkeypatch, capsys, SCRIPT, pipeline_command(saved, tmp_path / "out", *arguments), *named)


def test_adapter_of_another_model_is_one_line(saved, tmp_path, monkeypatch, capsys):
    arguments = pipeline_command(saved, tmp_path, "--adapter", saved / "bert-adapter")
    refused(monkeypatch, capsys, SCRIPT, arguments, saved / "bert-adapter")
