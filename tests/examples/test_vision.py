"""The recipe examples/vision at its smallest size: what a run leaves, resuming, and what goes wrong."""

import shutil

import pytest
from recipe_outputs import adapter_config, metrics_of, same_weights, stored
from recipe_runs import assert_refused, call_main, recipe_modules, refused, run, run_code

SCRIPT = "vision/finetune_vit.py"
STEPS, HALF = 24, 12
modules = recipe_modules("vision")

RELOAD = """
import sys
from pathlib import Path
import boft_ext, peft, torch
from image_data import from_folder
from transformers import AutoImageProcessor, AutoModelForImageClassification

base, data, output, merged = sys.argv[1:]
process = AutoImageProcessor.from_pretrained(f"{output}/adapter")
test = from_folder(Path(data), lambda image: process(image, return_tensors="pt")["pixel_values"][0]).test
pixels = torch.stack([test[index]["pixel_values"] for index in range(len(test))])
labels = torch.tensor(test.labels)
boft_ext.patch_peft()
model = AutoModelForImageClassification.from_pretrained(base, num_labels=5, ignore_mismatched_sizes=True)
model = peft.PeftModel.from_pretrained(model, f"{output}/adapter").eval()
plain = AutoModelForImageClassification.from_pretrained(merged).eval()
with torch.no_grad():
    logits, others = model(pixels).logits, plain(pixels).logits
print((logits.argmax(1) == labels).float().mean().item(), (logits - others).abs().max().item(), plain.config.id2label)
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a small ViT and its data."""
    folder = tmp_path_factory.mktemp("small")
    run("vision/make_small_vit.py", folder, "--epochs", 5)
    return folder


def tune(small, output, *arguments, **how):
    options = ["--model", small / "model", "--data-dir", small / "data", "--output-dir", output]
    options += ["--max-train-steps", STEPS, "--checkpointing-steps", HALF, "--learning-rate", "1e-2"]
    return run(SCRIPT, *options, *arguments, **how)


@pytest.fixture(scope="module")
def tuned(small, tmp_path_factory):
    """The output folder of a run, and what it printed."""
    output = tmp_path_factory.mktemp("tuned")
    return output, tune(small, output, "--merged-dir", output / "merged").stdout


def test_a_run_improves_and_leaves_its_files(tuned):
    output, printed = tuned
    assert printed.startswith("boft_ext") and "BOFT m=2 b=8 on 24 layers" in printed.splitlines()[0]
    metrics = metrics_of(output)
    assert metrics["after"]["accuracy"] > metrics["before"]["accuracy"] + 0.2
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    assert list((output / "logs").glob("events.*"))
    config, tensors = adapter_config(output), stored(output)
    assert config["peft_type"] == "BOFT" and config["boft_n_butterfly_factor"] == 2
    assert {tensor.shape for name, tensor in tensors.items() if "boft_R" in name} == {(2, 8, 8, 8), (2, 32, 8, 8)}
    assert any("classifier" in name for name in tensors)


def test_adapter_and_merged_model_give_the_same_in_a_fresh_process(small, tuned):
    output, _ = tuned
    printed = run_code(RELOAD, "vision", small / "model", small / "data", output, output / "merged")
    accuracy, difference, labels = printed.split(maxsplit=2)
    metrics = metrics_of(output)
    assert float(accuracy) == pytest.approx(metrics["after"]["accuracy"], abs=1e-6)
    assert float(difference) < 1e-4
    assert labels.strip() == str(dict(enumerate("56789")))


def test_a_resumed_run_ends_with_the_same_weights(small, tuned, tmp_path):
    shutil.copytree(tuned[0] / f"checkpoint-{HALF}", tmp_path / f"checkpoint-{HALF}")
    tune(small, tmp_path, "--resume-from-checkpoint", "latest")
    assert same_weights(tuned[0], tmp_path)
    assert metrics_of(tmp_path)["steps_here"] == STEPS - HALF


def test_two_processes_do_what_one_does_with_their_batches(small, monkeypatch, tmp_path):
    options = ["--model", small / "model", "--data-dir", small / "data", "--max-train-steps", 2, "--boft-dropout", 0]
    done = run(SCRIPT, *options, "--train-batch-size", 32, "--output-dir", tmp_path / "two", processes=2)
    assert done.stdout.count("boft_ext ") == 1
    call_main(monkeypatch, SCRIPT, *options, "--train-batch-size", 64, "--output-dir", tmp_path / "one")
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    # Not the weights: where a gradient is nearly zero, AdamW makes a whole step of its rounding.
    assert two["before"]["loss"] == pytest.approx(one["before"]["loss"], rel=1e-5)
    assert two["after"]["loss"] == pytest.approx(one["after"]["loss"], rel=1e-4)
    assert two["after"]["loss"] != pytest.approx(two["before"]["loss"], rel=1e-3)


def test_in_bfloat16_what_trains_is_float32(small, tmp_path):
    tune(small, tmp_path, "--mixed-precision", "bf16")
    assert {str(tensor.dtype) for tensor in stored(tmp_path).values()} == {"torch.float32"}
    metrics = metrics_of(tmp_path)
    assert metrics["after"]["accuracy"] > metrics["before"]["accuracy"] + 0.2


def test_blocks_that_do_not_divide_are_one_line(small, tmp_path):
    done = tune(small, tmp_path, "--boft-block-size", 7, check=False)
    assert_refused(done.returncode, done.stdout, done.stderr, 7, 64)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--model"),
        (["--model", "m"], "--data-dir"),
        (["--model", "m", "--data-dir", "no/such/folder"], "no/such/folder"),
        (["--model", "m", "--data-dir", ".", "--dataset", "d"], "--dataset"),
        (["--model", "m", "--data-dir", ".", "--boft-factors", "0"], "0"),
        (["--model", "m", "--data-dir", ".", "--boft-block-size", "4", "--boft-block-num", "4"], "--boft-block-num"),
        (["--model", "m", "--data-dir", ".", "--learning-rate", "2"], "2"),
        (["--model", "m", "--data-dir", ".", "--resume-from-checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_are_one_line(monkeypatch, tmp_path, capsys, arguments, named):
    refused(monkeypatch, capsys, SCRIPT, [*arguments, "--output-dir", tmp_path], named)


@pytest.mark.parametrize(
    ("made", "named"),
    [
        ([], "train"),
        (["train/a/1.png"], "test"),
        (["train/a/1.png", "val/b/1.png"], "classes without training images: b"),
        (["train/a/1.png", "val/a/1.txt"], "no images"),
    ],
)
def test_missing_images_are_named(modules, tmp_path, made, named):
    from image_data import from_folder

    for name in made:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=named):
        from_folder(tmp_path, lambda image: image)


@pytest.mark.parametrize(("size", "factors", "millions"), [(4, 4, 1.77), (2, 6, 1.11), (8, 2, 1.99)])
def test_parameters_of_dinov2_large_are_the_papers(modules, size, factors, millions):
    """The paper's VTAB-1K table, from the configuration of the model and the layers that the recipe chooses."""
    import torch
    from transformers import Dinov2Config, Dinov2ForImageClassification
    from vit_training import block_linears

    import boft_ext

    config = Dinov2Config(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
    with torch.device("meta"):
        model = Dinov2ForImageClassification(config)
        boft = boft_ext.BOFTConfig(
            boft_block_size=size, boft_n_butterfly_factor=factors, target_modules=block_linears(model)
        )
        boft_ext.wrap(model, boft)
    (total,) = boft_ext.parameter_report(model).totals.values()
    assert total.layers == 24 * 6
    assert round(total.paper / 1e6, 2) == millions
