"""The recipe examples/dreambooth at its smallest size: what it leaves, resuming, drawing elsewhere, what goes wrong."""

import runpy
import shutil
import sys

import pytest
import safetensors.torch
import torch
from PIL import Image, ImageChops
from recipe_outputs import adapter_config, metrics_of, stored
from recipe_runs import EXAMPLES, call_main, refused, run, run_code

SCRIPT, DRAW = "dreambooth/train_dreambooth_boft.py", "dreambooth/infer_dreambooth_boft.py"
PROMPT = "a sks square"
STEPS, EVERY = 4, 2
DRAWING = ("--resolution", 64, "--inference-steps", 2, "--max-sequence-length", 16, "--seed", 3)
# A pipeline that knows nothing of these recipes, PEFT's own loading, and one picture of seed 3.
STOCK = """
import sys
import boft_ext, torch
from diffusers import DiffusionPipeline
from peft import PeftModel
boft_ext.patch_peft()
model, adapter, picture = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(model)
pipeline.unet = PeftModel.from_pretrained(pipeline.unet, adapter).get_base_model()
images = pipeline(
    "a sks square", num_images_per_prompt=2, num_inference_steps=2, guidance_scale=7.5, height=64,
    width=64, generator=[torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)],
).images
images[0].save(picture)
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folders sd, sdxl and flux, each with a tiny model and pictures of a subject."""
    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        for family in ("sd", "sdxl", "flux"):
            arguments = ["make_tiny_model.py", str(folder / family), "--family", family]
            patch.setattr(sys, "argv", arguments)
            patch.setattr(sys, "path", [str(EXAMPLES / "dreambooth"), *sys.path])
            runpy.run_path(str(EXAMPLES / "dreambooth/make_tiny_model.py"), run_name="__main__")
    return folder


def command(tiny, output, *arguments, family="sd"):
    """Arguments of a small run."""
    return [
        *("--pretrained-model-name-or-path", tiny / family / "model"),
        *("--instance-data-dir", tiny / family / "instance"),
        *("--instance-prompt", PROMPT, "--output-dir", output, *DRAWING, "--num-validation-images", 2),
        *("--boft-block-size", 4, "--learning-rate", 1e-2, "--train-batch-size", 2),
        *("--max-train-steps", STEPS, "--checkpointing-steps", EVERY, *arguments),
    ]


def with_class(folder, count):
    """Arguments for prior preservation."""
    return [
        *("--with-prior-preservation", "--class-prompt", "a square"),
        *("--class-data-dir", folder, "--num-class-images", count),
    ]


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """The output folder of a whole run, and what it printed."""
    output = tmp_path_factory.mktemp("trained")
    validation = ("--validation-prompt", PROMPT, "--validation-steps", 3)
    more = [*with_class(output / "class", 3), *validation, "--random-flip", "--checkpoints-total-limit", 2]
    return output, run(SCRIPT, *command(tiny, output, *more)).stdout


def test_first_line_files_and_metrics(trained):
    output, printed = trained
    first = printed.splitlines()[0]
    assert first.startswith("boft_ext ") and "BOFT m=2 b=4 on 42 layers" in first
    metrics = metrics_of(output)
    for loss in metrics["denoising_loss"].values():
        assert loss["after"] < loss["before"]
    assert set(metrics["denoising_loss"]) == {"instance", "class"}
    assert metrics["steps"] == STEPS and metrics["median_step_seconds"] > 0
    assert list((output / "logs").rglob("events.out.tfevents.*"))
    assert len(list((output / "class").glob("*.png"))) == 3
    for name in ("validation/before.png", "validation/step-3.png", "validation/after.png", "validation.png"):
        assert Image.open(output / name).size[0] > 64
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]


def test_adapter_has_the_names_of_peft(trained):
    names = set(stored(trained[0], "unet"))
    assert names and all(name.startswith("base_model.model.") for name in names)
    assert {name.rpartition(".")[2] for name in names} == {"boft_R", "boft_s"}
    config = adapter_config(trained[0], "unet")
    assert config["boft_n_butterfly_factor"] == 2 and config["bias"] == "boft_only" and config["boft_dropout"] == 0.1
    assert sorted(config["target_modules"]) == ["to_k", "to_q", "to_v"]


def test_resumed_run_ends_with_the_same_bits(tiny, trained, tmp_path):
    shutil.copytree(trained[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    shutil.copytree(trained[0] / "class", tmp_path / "class")
    more = [*with_class(tmp_path / "class", 3), "--random-flip", "--checkpoints-total-limit", 1]
    run(SCRIPT, *command(tiny, tmp_path, *more, "--resume-from-checkpoint", "latest"))
    whole, resumed = stored(trained[0], "unet"), stored(tmp_path, "unet")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert metrics_of(tmp_path)["denoising_loss"] == metrics_of(trained[0])["denoising_loss"]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]


def difference(first, second):
    """The largest difference of two picture files, in 0 ... 255."""
    pair = [Image.open(path).convert("RGB") for path in (first, second)]
    return max(high for _, high in ImageChops.difference(*pair).getextrema())


def test_pictures_are_the_same_merged_and_in_a_stock_pipeline(tiny, trained, monkeypatch, tmp_path):
    model = tiny / "sd" / "model"
    arguments = ["--pretrained-model-name-or-path", model, "--prompt", PROMPT, "--num-images", 2, *DRAWING]
    for name, more in (("in-place", []), ("merged", ["--merge"])):
        call_main(monkeypatch, DRAW, *arguments, "--adapter-dir", trained[0], "--output-dir", tmp_path / name, *more)
    run_code(STOCK, "dreambooth", model, trained[0] / "unet", tmp_path / "stock.png")
    assert difference(tmp_path / "in-place" / "00.png", tmp_path / "stock.png") == 0
    assert difference(tmp_path / "in-place" / "00.png", tmp_path / "merged" / "00.png") <= 1
    assert difference(tmp_path / "in-place" / "00.png", tmp_path / "in-place" / "01.png") > 1
    assert (tmp_path / "merged" / "grid.png").is_file()


def test_adapter_that_lacks_a_layer_is_refused(tiny, trained, monkeypatch, tmp_path, capsys):
    shutil.copytree(trained[0] / "unet", tmp_path / "unet")
    tensors = stored(tmp_path, "unet")
    tensors.popitem()
    safetensors.torch.save_file(tensors, tmp_path / "unet" / "adapter_model.safetensors")
    arguments = ["--pretrained-model-name-or-path", tiny / "sd" / "model", "--prompt", PROMPT, *DRAWING]
    arguments += ["--adapter-dir", tmp_path, "--output-dir", tmp_path / "pictures"]
    refused(monkeypatch, capsys, DRAW, arguments, f"the adapter in {tmp_path / 'unet'} cannot be loaded")


@pytest.mark.parametrize(
    ("family", "components", "more"),
    [
        ("sdxl", ["unet", "text_encoder", "text_encoder_2"], ["--gradient-checkpointing"]),
        ("flux", ["transformer", "text_encoder"], ["--mixed-precision", "bf16", "--gradient-accumulation-steps", 2]),
    ],
)
def test_other_families_with_their_text_encoders(tiny, monkeypatch, tmp_path, capsys, family, components, more):
    validation = ("--validation-prompt", PROMPT, "--max-train-steps", 3)
    call_main(monkeypatch, SCRIPT, *command(tiny, tmp_path, "--train-text-encoder", *validation, *more, family=family))
    assert capsys.readouterr().out.splitlines()[0].startswith("boft_ext ")
    loss = metrics_of(tmp_path)["denoising_loss"]["instance"]
    assert loss["after"] < loss["before"]
    for component in components:
        tensors = stored(tmp_path, component)
        trained = [name for name, value in tensors.items() if name.endswith("boft_R") and value.count_nonzero()]
        assert trained and all(value.isfinite().all() for value in tensors.values())
    arguments = ["--pretrained-model-name-or-path", tiny / family / "model", "--prompt", PROMPT, *DRAWING]
    arguments += ["--adapter-dir", tmp_path, "--num-images", 1, "--output-dir", tmp_path / "drawn"]
    call_main(monkeypatch, DRAW, *arguments)
    assert Image.open(tmp_path / "drawn" / "00.png").size == (64, 64)


def test_two_processes_end_with_one_adapter(tiny, tmp_path):
    memory = ("--mixed-precision", "bf16", "--gradient-checkpointing", "--max-train-steps", 2)
    done = run(SCRIPT, *command(tiny, tmp_path, *with_class(tmp_path / "class", 3), *memory), processes=2)
    assert done.stdout.count("boft_ext ") == 1
    metrics = metrics_of(tmp_path)
    first, second = metrics["trained_sums"]
    assert metrics["processes"] == 2 and first == second
    assert len(list((tmp_path / "class").glob("*.png"))) == 3
    assert len(list((tmp_path / "checkpoint-2").glob("random_states_*.pkl"))) == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--max-train-steps", "0"], "0"),
        (["--learning-rate", "2"], "2"),
        (["--resolution", "72"], "72"),
        (["--instance-data-dir", "nowhere"], "nowhere"),
        (["--output-dir", __file__], __file__),
        (["--with-prior-preservation"], "--class-data-dir"),
        (["--class-prompt", "a square"], "--class-prompt"),
        (["--boft-block-size", "4", "--boft-block-num", "8"], "--boft-block-num"),
        (["--rank", "8"], "--rank"),
    ],
)
def test_bad_arguments_are_one_line(monkeypatch, capsys, tmp_path, arguments, named):
    needed = ["--pretrained-model-name-or-path", "x", "--instance-prompt", PROMPT, "--instance-data-dir", tmp_path]
    refused(monkeypatch, capsys, SCRIPT, [*needed, "--output-dir", tmp_path / "out", *arguments], named)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--boft-block-size", "7"], "7"),
        (["--target-modules", "nothing"], "nothing"),
        (["--instance-data-dir", EXAMPLES], "has no pictures"),
        (["--pretrained-model-name-or-path", "no/such/folder"], "no/such/folder"),
        (["--resume-from-checkpoint", "checkpoint-9"], "checkpoint-9"),
    ],
)
def test_what_does_not_fit_the_model_is_one_line(tiny, monkeypatch, capsys, tmp_path, arguments, named):
    refused(monkeypatch, capsys, SCRIPT, command(tiny, tmp_path, *arguments), named)
    assert not (tmp_path / "metrics.json").exists()
