"""The recipe examples/segmentation at its smallest size: its numbers, what a run leaves, resuming, what goes wrong."""

import json
import shutil

import pytest
import torch
from PIL import Image
from recipe_outputs import metrics_of, same_weights, stored
from recipe_runs import assert_refused, recipe_modules, refused, run, run_code

SCRIPT = "segmentation/finetune_sam_decoder.py"
STEPS, HALF = 8, 4

RELOAD = """
import sys
from pathlib import Path
import boft_ext, peft, torch
from mask_data import find_pairs, prepare
from transformers import AutoImageProcessor, SamModel

base, data, output, merged = sys.argv[1:]
processor = AutoImageProcessor.from_pretrained(f"{output}/adapter")
row = prepare(find_pairs(Path(data, "test", "images"), Path(data, "test", "masks"))[0], processor)
boft_ext.patch_peft()
tuned = peft.PeftModel.from_pretrained(SamModel.from_pretrained(base), f"{output}/adapter").eval()
models = SamModel.from_pretrained(base).eval(), tuned, SamModel.from_pretrained(merged).eval()
inputs = {"pixel_values": row.pixels[None], "input_boxes": row.box[None], "multimask_output": False}
with torch.no_grad():
    before, after, plain = (model(**inputs).pred_masks for model in models)
print((after - before).abs().max().item(), (after - plain).abs().max().item())
"""


modules = recipe_modules("segmentation")


def test_boundary_is_as_wide_as_it_should_be(modules):
    from mask_metrics import boundary

    mask = torch.zeros(100, 100, dtype=torch.bool)
    mask[:, 20:80] = True
    # 2 % of the diagonal is 3 pixels; the mask touches the edge of the image above and below.
    interior = torch.zeros_like(mask)
    interior[3:97, 23:77] = True
    assert (boundary(mask) == mask & ~interior).all()


def test_boundary_iou_is_stricter_for_large_masks(modules):
    from mask_metrics import boundary_iou, iou

    truth, shifted = torch.zeros(2, 100, 100, dtype=torch.bool)
    truth[20:80, 20:80] = True
    shifted[20:80, 22:82] = True
    assert iou(truth, truth) == boundary_iou(truth, truth) == 1
    assert iou(truth, shifted) == pytest.approx(58 / 62)
    assert boundary_iou(truth, shifted) < 0.6
    assert iou(truth, ~truth) == 0


def test_loss_falls_with_the_overlap_and_does_not_see_padding(modules):
    from mask_loss import mask_loss

    target = torch.zeros(1, 8, 8)
    target[:, 2:6, 2:6] = 1
    valid = torch.ones(1, 8, 8)
    good, bad = 8 * (2 * target - 1), torch.zeros(1, 8, 8)
    assert mask_loss(good, target, valid) < 0.01 < mask_loss(bad, target, valid)
    valid[:, :, 4:] = 0
    changed = good.clone()
    changed[:, :, 4:] *= -1
    assert mask_loss(good, target, valid) == mask_loss(changed, target, valid)


def test_a_wide_picture_is_prepared_with_its_padding(modules, tmp_path):
    import numpy as np
    from mask_data import Pair, prepare
    from transformers import AutoImageProcessor

    folder = tmp_path / "processor"
    folder.mkdir()
    from make_tiny_sam import PROCESSOR

    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR), encoding="utf-8")
    mask = np.zeros((50, 100), np.uint8)
    mask[10:30, 40:80] = 255
    pair = Pair(tmp_path / "image.png", tmp_path / "mask.png")
    Image.new("RGB", (100, 50), "red").save(pair.image)
    Image.fromarray(mask).save(pair.mask)
    row = prepare(pair, AutoImageProcessor.from_pretrained(folder))
    assert row.original == (50, 100) and row.resized == (32, 64)
    assert row.pixels.shape == (3, 64, 64) and row.target.shape == (64, 64)
    assert row.box.tolist() == [pytest.approx([25.6, 6.4, 51.2, 19.2])]
    assert row.valid.sum() == 32 * 64 and (row.target <= row.valid).all()
    assert row.target.sum().item() == pytest.approx(25.6 * 12.8, rel=0.1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a tiny SAM and its data."""
    folder = tmp_path_factory.mktemp("tiny")
    run("segmentation/make_tiny_sam.py", folder, "--steps", 30, "--pictures", 16)
    return folder


def tune(tiny, output, *arguments, **how):
    options = ["--model", tiny / "model", "--data-dir", tiny / "data", "--output-dir", output]
    options += ["--max-train-steps", STEPS, "--checkpointing-steps", HALF, "--learning-rate", "1e-2"]
    return run(SCRIPT, *options, *arguments, **how)


@pytest.fixture(scope="module")
def tuned(tiny, tmp_path_factory):
    """The output folder of a run, and what it printed."""
    output = tmp_path_factory.mktemp("tuned")
    return output, tune(tiny, output, "--merged-dir", output / "merged", "--grid-rows", 2).stdout


def test_a_run_improves_and_leaves_its_files(tuned):
    output, printed = tuned
    assert printed.startswith("boft_ext") and "BOFT m=4 b=4 on 47 layers" in printed.splitlines()[0]
    metrics = metrics_of(output)
    for name in ("miou", "boundary_iou"):
        assert 0 <= metrics["before"][name] < metrics["after"][name] <= 1
    assert list((output / "logs").glob("events.*"))
    names = list(stored(output))
    assert all("mask_decoder" in name for name in names) and len(names) == 2 * 47
    with Image.open(output / "masks.png") as grid:
        assert grid.width > 4 * 128 and grid.height > 2 * 128


def test_adapter_and_merged_model_give_the_same_in_a_fresh_process(tiny, tuned):
    output, _ = tuned
    printed = run_code(RELOAD, "segmentation", tiny / "model", tiny / "data", output, output / "merged")
    change, difference = map(float, printed.split())
    assert difference < 1e-3 * change


def test_a_resumed_run_ends_with_the_same_weights(tiny, tuned, tmp_path):
    shutil.copytree(tuned[0] / f"checkpoint-{HALF}", tmp_path / f"checkpoint-{HALF}")
    tune(tiny, tmp_path, "--resume-from-checkpoint", "latest")
    assert same_weights(tuned[0], tmp_path)


def test_two_processes_tune_one_decoder(tiny, tmp_path):
    done = tune(tiny, tmp_path, "--max-train-steps", 2, "--train-batch-size", 4, processes=2)
    assert done.stdout.count("boft_ext ") == 1
    metrics = metrics_of(tmp_path)
    assert metrics["steps"] == 2 and metrics["after"]["miou"] != metrics["before"]["miou"]
    assert any(value.any() for name, value in stored(tmp_path).items() if "boft_R" in name)


def test_a_memory_limit_encodes_in_every_step(tiny, tuned, tmp_path):
    done = tune(tiny, tmp_path, "--embeddings-memory", 0)
    assert "encoded again in each step" in done.stdout
    after = [metrics_of(output)["after"]["miou"] for output in (tuned[0], tmp_path)]
    assert after[0] == pytest.approx(after[1], abs=0.02)


def test_blocks_that_do_not_divide_are_one_line(tiny, tmp_path):
    done = tune(tiny, tmp_path, "--boft-factors", 5, check=False)
    assert_refused(done.returncode, done.stdout, done.stderr, "boft_n_butterfly_factor = 5", 32)


def test_a_model_that_is_no_sam_is_one_line(monkeypatch, tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"model_type": "vit"}', encoding="utf-8")
    arguments = ["--model", tmp_path, "--data-dir", tmp_path, "--output-dir", tmp_path / "out"]
    refused(monkeypatch, capsys, SCRIPT, arguments, f"--model {tmp_path}", "vit", "not a SAM")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--model"),
        (["--model", "m"], "--data-dir"),
        (["--model", "m", "--data-dir", "no/such/folder"], "no/such/folder"),
        (["--model", "m", "--data-dir", ".", "--embeddings-memory", "-1"], "-1"),
        (["--model", "m", "--data-dir", ".", "--boft-dropout", "2"], "2"),
    ],
)
def test_bad_arguments_are_one_line(monkeypatch, tmp_path, capsys, arguments, named):
    refused(monkeypatch, capsys, SCRIPT, [*arguments, "--output-dir", tmp_path], named)


def test_missing_and_wrong_masks_are_named(modules, tmp_path):
    from mask_data import find_pairs, load_mask

    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    with pytest.raises(ValueError, match="images holds no pictures"):
        find_pairs(images, masks)
    Image.new("RGB", (10, 20)).save(images / "a.jpg")
    with pytest.raises(ValueError, match="masks has no mask for a.jpg"):
        find_pairs(images, masks)
    Image.new("L", (10, 20)).save(masks / "a.png")
    (pair,) = find_pairs(images, masks)
    with pytest.raises(ValueError, match="a.png is black"):
        load_mask(pair)
    Image.new("L", (20, 20), 255).save(masks / "a.png")
    with pytest.raises(ValueError, match=r"a.png has .*20, 20.* its picture .*20, 10"):
        load_mask(pair)
