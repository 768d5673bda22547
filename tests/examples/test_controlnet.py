"""The recipe examples/controlnet at its smallest size: what a run leaves, resuming, drawing, and what goes wrong."""

import json
import runpy
import shutil
import sys

import pytest
import safetensors.torch
import torch
from PIL import Image
from recipe_outputs import adapter_config, metrics_of, same_weights, stored
from recipe_runs import EXAMPLES, call_main, refused, run

SCRIPT, DRAW = "controlnet/train_controlnet_boft.py", "controlnet/infer_controlnet_boft.py"
STEPS, EVERY, HELD_OUT = 6, 3, 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a tiny model, hardly trained, and of drawn shapes."""
    folder = tmp_path_factory.mktemp("tiny")
    steps = ("--pairs", "14", "--autoencoder-steps", "2", "--denoiser-steps", "2")
    with pytest.MonkeyPatch.context() as patch:
        # By path: other recipes have scripts of this name.
        patch.setattr(sys, "argv", ["make_tiny_model.py", str(folder), *steps])
        patch.syspath_prepend(str(EXAMPLES))
        runpy.run_path(str(EXAMPLES / "controlnet" / "make_tiny_model.py"), run_name="__main__")
    return folder


def command(tiny, output, *arguments):
    """Arguments of a small run."""
    return [
        *("--pretrained-model-name-or-path", tiny / "model", "--train-data-dir", tiny / "data"),
        *("--output-dir", output, "--resolution", 64, "--boft-block-num", 8, "--hint-channels", 4, 4, 8, 8),
        *("--held-out", HELD_OUT, "--control-metric", "shapes", "--inference-steps", 2, "--train-batch-size", 4),
        *("--max-train-steps", STEPS, "--checkpointing-steps", EVERY, "--learning-rate", 5e-3, *arguments),
    ]


@pytest.fixture(scope="module")
def light(tiny, tmp_path_factory):
    """The output folder of a run with the light control, and what it printed."""
    output = tmp_path_factory.mktemp("light")
    return output, run(SCRIPT, *command(tiny, output, "--proportion-empty-prompts", 0.3)).stdout


@pytest.fixture(scope="module")
def full(tiny, tmp_path_factory):
    """The output folder of two processes that trained diffusers' ControlNet, in the way that takes least memory."""
    output = tmp_path_factory.mktemp("full")
    memory = ("--mixed-precision", "bf16", "--gradient-checkpointing", "--train-batch-size", 2)
    run(SCRIPT, *command(tiny, output, "--control", "full", *memory, "--max-train-steps", 2), processes=2)
    return output


def test_first_line_files_and_metrics(light):
    output, printed = light
    assert printed.splitlines()[0].startswith("boft_ext ") and "BOFT m=2 b=4/8 on 42 layers" in printed.splitlines()[0]
    metrics = metrics_of(output)
    assert metrics["denoising_loss"]["after"] < metrics["denoising_loss"]["before"]
    assert set(metrics["control_error"]) == {"before", "after"} and metrics["steps"] == STEPS
    assert metrics["median_step_seconds"] > 0
    assert 0 < metrics["effective_boft_parameters"] < metrics["trainable_parameters"]
    assert list((output / "logs").rglob("events.out.tfevents.*"))
    for name in ("validation.png", "validation/step-0.png", f"validation/step-{STEPS}.png"):
        assert Image.open(output / name).height > 64 * HELD_OUT


def test_adapter_is_in_pefts_format(light):
    output, _ = light
    config, tensors = adapter_config(output, "unet"), stored(output, "unet")
    assert config["peft_type"] == "BOFT" and config["boft_n_butterfly_factor"] == 2 and config["boft_block_num"] == 8
    assert len(tensors) == 2 * 42 and all(name.startswith("base_model.model.") for name in tensors)
    assert {name.split(".")[-2] for name in tensors} == {"to_q", "to_k", "to_v"}
    assert all(value.abs().max() > 0 for name, value in tensors.items() if name.endswith("boft_R"))
    hint = safetensors.torch.load_file(output / "hint_encoder.safetensors")
    assert sum(value.dim() == 4 for value in hint.values()) == 8, "the paper's encoder has eight convolutions"
    assert hint["conv_out.weight"].abs().max() > 0


def test_resumed_run_ends_with_the_same_weights(light, tiny, tmp_path, monkeypatch):
    output, _ = light
    again = tmp_path / "again"
    shutil.copytree(output / f"checkpoint-{EVERY}", again / f"checkpoint-{EVERY}")
    options = ("--proportion-empty-prompts", 0.3, "--resume-from-checkpoint", "latest", "--checkpoints-total-limit", 1)
    call_main(monkeypatch, SCRIPT, *command(tiny, again, *options))
    assert same_weights(again, output, component="unet")
    assert (again / "hint_encoder.safetensors").read_bytes() == (output / "hint_encoder.safetensors").read_bytes()
    assert [path.name for path in again.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]


def test_checkpointed_activations_do_not_change_what_is_learned(light, tiny, tmp_path, monkeypatch):
    options = ("--proportion-empty-prompts", 0.3, "--gradient-checkpointing", "--max-train-steps", EVERY)
    call_main(monkeypatch, SCRIPT, *command(tiny, tmp_path, *options))
    trained = [folder / f"checkpoint-{EVERY}" / "trainable_0.safetensors" for folder in (light[0], tmp_path)]
    kept, computed_again = map(safetensors.torch.load_file, trained)
    for name, value in kept.items():
        torch.testing.assert_close(computed_again[name], value, rtol=1e-4, atol=1e-6)


def drawing(tiny, control, output, *arguments):
    """Arguments that draw the held-out conditions."""
    lines = (tiny / "data" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[-HELD_OUT:]]
    return [
        *("--pretrained-model-name-or-path", tiny / "model", "--control-dir", control, "--output-dir", output),
        *("--conditioning-image", *(tiny / "data" / row["conditioning_image"] for row in rows)),
        *("--prompt", *(row["text"] for row in rows), "--resolution", 64, "--inference-steps", 2, *arguments),
    ]


def images_in(folder):
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("image-*.png"))]


@pytest.fixture(scope="module")
def drawn(light, tiny, tmp_path_factory):
    """What a fresh process draws of the held-out conditions."""
    folder = tmp_path_factory.mktemp("drawn")
    run(DRAW, *drawing(tiny, light[0], folder))
    assert len(images_in(folder)) == HELD_OUT and (folder / "grid.png").is_file()
    return images_in(folder)


def test_fresh_process_draws_what_the_training_process_drew(light, drawn):
    grid = Image.open(light[0] / "validation" / f"step-{STEPS}.png").convert("RGB")
    corners = [(left, top) for left in range(grid.width - 63) for top in range(grid.height - 63)]
    for image in drawn:
        first = image.getpixel((0, 0))
        boxes = [(x, y, x + 64, y + 64) for x, y in corners if grid.getpixel((x, y)) == first]
        assert sum(grid.crop(box).tobytes() == image.tobytes() for box in boxes) == 1


def test_merged_adapter_draws_the_same(light, tiny, drawn, tmp_path, monkeypatch):
    call_main(monkeypatch, DRAW, *drawing(tiny, light[0], tmp_path, "--merge"))
    for plain, merged in zip(drawn, images_in(tmp_path), strict=True):
        values = [torch.tensor(list(image.tobytes())) for image in (plain, merged)]
        assert (values[0] - values[1]).abs().max() <= 1


def test_two_processes_train_one_full_control(full):
    metrics = metrics_of(full)
    assert metrics["processes"] == 2 and metrics["trained_sums"][0] == metrics["trained_sums"][1]
    assert metrics["denoising_loss"]["after"] != metrics["denoising_loss"]["before"]
    assert (full / "unet" / "adapter_model.safetensors").is_file()
    weights = safetensors.torch.load_file(full / "controlnet" / "diffusion_pytorch_model.safetensors")
    assert weights["controlnet_mid_block.weight"].abs().max() > 0, "it starts at zero"
    assert not [name for name in weights if "boft" in name]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--control", "heavy"], ["--control", "heavy"]),
        (["--boft-block-size", "8"], ["--boft-block-size", "--boft-block-num"]),
        (["--resolution", "60"], ["60", "multiple of 8"]),
        (["--held-out", "14"], ["--held-out 14", "14 rows"]),
        (["--learning-rate", "-1"], ["-1"]),
        (["--proportion-empty-prompts", "2"], ["2"]),
        (["--hint-channels", "8", "8"], ["--hint-channels"]),
        (["--caption-column", "words"], ["words", "'text'"]),
        (["--train-data-dir", "nowhere"], ["--train-data-dir", "nowhere"]),
        (["--train-data-dir", EXAMPLES], ["metadata.jsonl"]),
        (["--output-dir", __file__], [__file__]),
        (["--boft-block-num", "7"], ["7"]),
        (["--boft-factors", "6"], ["6"]),
        (["--pretrained-model-name-or-path", "."], ["model_index.json"]),
        (["--resume-from-checkpoint", "checkpoint-9"], ["checkpoint-9"]),
    ],
)
def test_wrong_options_are_one_line(tiny, tmp_path, monkeypatch, capsys, arguments, named):
    refused(monkeypatch, capsys, SCRIPT, command(tiny, tmp_path / "out", *arguments), *named)


def test_row_without_its_file_is_one_line(tiny, tmp_path, monkeypatch, capsys):
    lines = (tiny / "data" / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    arguments = command(tiny, tmp_path / "out", "--train-data-dir", tmp_path)
    refused(monkeypatch, capsys, SCRIPT, arguments, "line 1", "image-0000.png")


@pytest.fixture
def shapes(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from recipe_tools import drawn_shapes

    return drawn_shapes


def test_control_error_of_known_drawings(shapes):
    drawings = list(shapes.drawings(20, 64, 5))
    for drawing in drawings:
        assert shapes.control_error(drawing.image, drawing.condition) == 0
        covered = shapes.region_asked_for(drawing.condition).float().mean().item()
        empty = Image.new("RGB", (64, 64), shapes.BACKGROUND)
        assert shapes.control_error(empty, drawing.condition) == covered > 0.05
    assert shapes.control_error(drawings[0].image, drawings[1].condition) > 0.05
    assert len({drawing.text for drawing in drawings}) > 5
    with pytest.raises(ValueError, match="cannot be compared"):
        shapes.control_error(Image.new("RGB", (32, 32)), drawings[0].condition)
