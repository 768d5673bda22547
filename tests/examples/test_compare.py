"""The comparisons of examples/compare at their smallest size, and how they choose and count."""

import csv

import pytest
import torch
from PIL import Image
from recipe_runs import assert_refused, recipe_modules, run

QUICK = ["--seeds", 2, "--epochs", 1, "--rates", "1e-3", "1e-2"]


modules = recipe_modules("vision", "compare")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder with the results of a run, and what it printed."""
    output = tmp_path_factory.mktemp("compared")
    return output, run("compare/compare_digits.py", "--output-dir", output, *QUICK).stdout


def test_every_run_is_kept(compared):
    output, _ = compared
    with (output / "digits.csv").open(encoding="utf-8") as stream:
        runs = list(csv.DictReader(stream))
    methods = ["probe", "LoRA r4", "OFT b16", "BOFT m2 b8", "BOFT m4 b4", "full"]
    assert list(dict.fromkeys(run["method"] for run in runs)) == methods
    for method in methods:
        found = [run for run in runs if run["method"] == method and run["split"] == "validation"]
        tested = [run for run in runs if run["method"] == method and run["split"] == "test"]
        assert {float(run["rate"]) for run in found} == {1e-3, 1e-2}
        best = max(found, key=lambda run: (float(run["accuracy"]), -float(run["loss"])))
        assert {run["rate"] for run in tested} == {best["rate"]}
        assert {run["seed"] for run in tested} == {"0", "1"}
        assert all(0 <= float(run["accuracy"]) <= 1 for run in runs)


def test_adapters_have_about_the_same_number_of_parameters(compared):
    with (compared[0] / "digits.csv").open(encoding="utf-8") as stream:
        counts = {run["method"]: int(run["parameters"]) for run in csv.DictReader(stream)}
    # Of 4 blocks with 5 linears of 64 inputs and one of 256, and as many outputs.
    assert counts["LoRA r4"] == 4 * 4 * 2 * (5 * 64 + 256)
    assert counts["BOFT m2 b8"] == 4 * (5 * 64 + 256) * (7 + 1)
    assert counts["OFT b16"] == 4 * (5 * 64 + 256) * 15 / 2
    assert counts["probe"] == 0 < counts["full"]
    adapters = [counts[name] for name in ("LoRA r4", "OFT b16", "BOFT m2 b8", "BOFT m4 b4")]
    assert max(adapters) < 1.2 * min(adapters)


def test_table_and_plot(compared):
    output, printed = compared
    text = (output / "digits.md").read_text(encoding="utf-8")
    for row in ("| probe | 0 |", "| BOFT m2 b8 | 18,432 |"):
        assert row in text and row in printed
    with Image.open(output / "digits.png") as plot:
        assert plot.width > 500


def test_the_text_task_is_that_of_the_demo(tmp_path):
    quick = ["--seeds", 1, "--epochs", 1, "--rates", "3e-2", "--methods", "probe"]
    run("compare/compare_text.py", "--output-dir", tmp_path, *quick)
    with (tmp_path / "text.csv").open(encoding="utf-8") as stream:
        runs = list(csv.DictReader(stream))
    assert [run["split"] for run in runs] == ["validation", "test"]
    assert all(float(run["accuracy"]) > 2 / 16 for run in runs), "a pretrained encoder tells more than chance"


def test_a_run_that_diverges_is_not_chosen(modules):
    from comparison import Settings, Task, compare
    from training import Batch
    from tuning_methods import Method

    class Model(torch.nn.Module):
        """Gives no numbers once a weight is larger than any that it begins with."""

        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.Linear(2, 2)
            self.head = torch.nn.Linear(2, 2)

        def forward(self, ids, mask):
            near = self.encoder.weight.abs().max() < 1
            return self.head(self.encoder(ids)) * torch.where(near, 1.0, torch.nan)

    x = torch.randn(64, 2)
    batch = Batch(x, x, (x[:, 0] > 0).long())
    task = Task("task", "title", batch, batch, Model)
    settings = Settings(rates=(0.9, 1e-5), seeds=1, epochs=4, batch_size=8)
    diverged, kept, tested = compare(task, [Method("full")], settings)
    assert diverged.split == kept.split == "validation" and tested.split == "test"
    assert diverged.loss == float("inf") and diverged.accuracy == 0
    assert tested.rate == kept.rate == 1e-5


def test_unknown_methods_are_one_line(tmp_path):
    done = run("compare/compare_digits.py", "--output-dir", tmp_path, "--methods", "DoRA", check=False)
    assert_refused(done.returncode, done.stdout, done.stderr, "DoRA", "BOFT m2 b8")
