"""The recipe examples/glue at its smallest size: real and tiny encoders, metrics, resuming, and what goes wrong."""

import json
import shutil

import numpy as np
import pytest
import torch
from recipe_outputs import adapter_config, metrics_of, same_weights, stored
from recipe_runs import call_main, recipe_modules, refused, run, run_code

SCRIPT = "glue/finetune_glue.py"
STEPS, EVERY = 60, 42
modules = recipe_modules("glue")

RELOAD = """
import sys
import boft_ext, peft, torch
from glue_tasks import file_splits
from pathlib import Path
from transformers import AutoModelForSequenceClassification, AutoTokenizer

base, folder, output = sys.argv[1:]
_, validation, _ = file_splits("mrpc", Path(folder, "few.tsv"), Path(folder, "few.tsv"))
texts, labels = validation[""]
tokenizer = AutoTokenizer.from_pretrained(f"{output}/adapter")
tokens = tokenizer(*map(list, zip(*texts)), padding=True, truncation=True, max_length=32, return_tensors="pt")
boft_ext.patch_peft()
model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
model = peft.PeftModel.from_pretrained(model, f"{output}/adapter").eval()
with torch.no_grad():
    logits = model(**tokens).logits
    merged = model.merge_and_unload()(**tokens).logits
print((logits.argmax(1) == torch.tensor(labels)).float().mean().item(), (logits - merged).abs().max().item())
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The folder of a layer of MiniLM and its pairs of sentences; ``few.tsv`` holds 28 about one of two subjects."""
    folder = tmp_path_factory.mktemp("small")
    run("glue/make_small_task.py", folder, "--layers", 1, "--per-module", 80)
    subjects = ("river lake rain sea wave ice snow".split(), "bank price loan tax market wage coin".split())
    rows = [
        f"Nobody knew the {word}.\tThe {other} was a surprise.\t{label}"
        for label, words in enumerate(subjects)
        for word, other in zip(words + words, words[1:] + words[:1] + words[2:] + words[:2], strict=True)
    ]
    (folder / "few.tsv").write_text("\n".join(["sentence1\tsentence2\tlabel", *rows]), encoding="utf-8")
    return folder


def command(small, output, *arguments):
    """Arguments of a run over the few pairs, 4 steps an epoch; a checkpoint lies within an epoch."""
    return [
        *("--task", "mrpc", "--model", small / "model", "--train-file", small / "few.tsv"),
        *("--validation-file", small / "few.tsv", "--output-dir", output, "--max-length", 32),
        *("--train-batch-size", 4, "--gradient-accumulation-steps", 2, "--eval-batch-size", 64),
        *("--max-train-steps", STEPS, "--checkpointing-steps", EVERY),
        *("--learning-rate", 1e-2, "--boft-dropout", 0.3, *arguments),
    ]


@pytest.fixture(scope="module")
def tuned(small, tmp_path_factory):
    """The output folder of a run, and what it printed."""
    output = tmp_path_factory.mktemp("tuned")
    return output, run(SCRIPT, *command(small, output)).stdout


def test_a_run_improves_and_leaves_its_files(tuned):
    output, printed = tuned
    assert printed.startswith("boft_ext") and "BOFT m=2 b=8 on 6 layers" in printed.splitlines()[0]
    metrics = metrics_of(output)
    assert set(metrics["after"]) == {"loss", "accuracy", "f1"}
    assert metrics["after"]["loss"] < 0.5 * metrics["before"]["loss"]
    assert metrics["losses"][0][1] < 1, "a mean over the passes of a step: of two classes that are guessed 0.69"
    assert metrics["after"]["accuracy"] > metrics["before"]["accuracy"] + 0.2
    assert list((output / "logs").glob("events.*"))
    config, tensors = adapter_config(output), stored(output)
    assert config["peft_type"] == "BOFT" and config["boft_n_butterfly_factor"] == 2 and config["bias"] == "boft_only"
    assert {tensor.shape for name, tensor in tensors.items() if "boft_R" in name} == {(2, 48, 8, 8), (2, 192, 8, 8)}
    assert any("classifier" in name for name in tensors)
    assert sum(name.endswith("bias") and "layer.0" in name for name in tensors) == 6


def test_saved_adapter_gives_the_same_in_a_fresh_process(small, tuned):
    accuracy, difference = map(float, run_code(RELOAD, "glue", small / "model", small, tuned[0]).split())
    assert accuracy == pytest.approx(metrics_of(tuned[0])["after"]["accuracy"], abs=1e-6)
    assert difference < 1e-4


def test_a_resumed_run_ends_with_the_same_weights(small, tuned, tmp_path):
    shutil.copytree(tuned[0] / "checkpoint-42", tmp_path / "checkpoint-42")
    run(SCRIPT, *command(small, tmp_path, "--resume-from-checkpoint", "latest"))
    assert same_weights(tuned[0], tmp_path)
    assert metrics_of(tmp_path)["steps_here"] == STEPS - EVERY


def deberta_config(**more):
    """The settings of DeBERTaV3-base but for what `more` says."""
    from transformers import DebertaV2Config

    base = {
        "vocab_size": 128100,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "relative_attention": True,
        "position_buckets": 256,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
        "type_vocab_size": 0,
    }
    return DebertaV2Config(**(base | more))


def test_deberta_learns_scores(small, monkeypatch, tmp_path):
    """A regression task on a tiny DeBERTa: how long is the second sentence?"""
    from transformers import AutoTokenizer, DebertaV2ForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(small / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = deberta_config(vocab_size=len(tokenizer), num_labels=1, **sizes)
    torch.manual_seed(0)
    DebertaV2ForSequenceClassification(config).deberta.save_pretrained(tmp_path / "model")
    rows = [{"sentence1": "so", "sentence2": "word " * length, "label": length / 4} for length in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")

    arguments = command(small, tmp_path / "out", "--task", "stsb", "--model", tmp_path / "model")
    arguments += ["--train-file", tmp_path / "rows.jsonl", "--validation-file", tmp_path / "rows.jsonl"]
    call_main(monkeypatch, SCRIPT, *arguments, "--learning-rate", "2e-2", "--max-train-steps", 60)
    metrics = metrics_of(tmp_path / "out")
    assert "BOFT m=2 b=8 on 12 layers" in metrics["first_line"]
    assert metrics["after"]["pearson"] > 0.8 and metrics["after"]["spearman"] > 0.8
    assert metrics["after"]["loss"] < 0.5 * metrics["before"]["loss"]


@pytest.mark.parametrize(("size", "factors", "millions"), [(8, 2, 0.75), (16, 1, 0.79)])
def test_parameters_of_deberta_v3_base_are_the_papers(modules, size, factors, millions):
    """The paper's GLUE table, from the configuration of the model and the layers that the recipe chooses."""
    from recipe_tools.models import block_linears
    from transformers import DebertaV2ForSequenceClassification

    import boft_ext

    with torch.device("meta"):
        model = DebertaV2ForSequenceClassification(deberta_config())
        boft_ext.wrap(
            model,
            boft_ext.BOFTConfig(
                boft_block_size=size, boft_n_butterfly_factor=factors, target_modules=block_linears(model)
            ),
        )
    (total,) = boft_ext.parameter_report(model).totals.values()
    assert total.layers == 12 * 6
    assert round(total.paper / 1e6, 2) == millions


def test_metrics_of_the_tasks(modules):
    from glue_tasks import TASKS, evaluate

    labels = np.array([0, 1, 1, 1])
    scores = np.array([[0.1, 0.9], [0.1, 0.9], [0.2, 0.8], [0.7, 0.3]])  # guesses 1, 1, 1, 0
    assert evaluate(TASKS["mrpc"], scores, labels) == pytest.approx({"accuracy": 2 / 4, "f1": 2 / 3})
    # Of the four counts: no true negative, two true positives, a false one of each kind.
    assert evaluate(TASKS["cola"], scores, labels)["matthews"] == pytest.approx(-1 / 3)
    grades = np.array([0.0, 1.0, 2.0, 4.0])
    correlations = evaluate(TASKS["stsb"], grades[:, None] ** 3, grades)
    assert correlations["spearman"] == pytest.approx(1) and 0.9 < correlations["pearson"] < 0.99
    assert set(TASKS) == {"mnli", "sst2", "mrpc", "cola", "qnli", "qqp", "rte", "stsb"}
    assert TASKS["mnli"].learning_rate == 7e-5 and TASKS["mrpc"].learning_rate == 8e-4


def test_data_of_the_hub(modules, monkeypatch):
    import datasets
    from glue_tasks import hub_splits

    def rows(number):
        return {"premise": [f"p{number}"], "hypothesis": [f"h{number}"], "label": [number]}

    splits = {"train": rows(0), "validation_matched": rows(1), "validation_mismatched": rows(2)}
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: splits if names == ("nyu-mll/glue", "mnli") else None)
    train, validation = hub_splits("mnli")
    assert tuple(train) == ([("p0", "h0")], [0])
    assert {name: tuple(part) for name, part in validation.items()} == {
        "matched_": ([("p1", "h1")], [1]),
        "mismatched_": ([("p2", "h2")], [2]),
    }

    def offline(*names):
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"^nyu-mll/glue mnli cannot be loaded: no network$"):
        hub_splits("mnli")


def test_files_of_each_kind_give_the_same_rows(modules, tmp_path):
    from glue_tasks import file_splits

    rows = [("A cat sat.", 'It "ate", then', "no"), ("B", "C", "yes")]
    header = ("sentence1", "sentence2", "label")
    records = [dict(zip(header, row, strict=True)) for row in rows]
    (tmp_path / "a.tsv").write_text("\n".join("\t".join(row) for row in [header, *rows]), encoding="utf-8")
    quoted = ["sentence1,sentence2,label", 'A cat sat.,"It ""ate"", then",no', "B,C,yes"]
    (tmp_path / "a.csv").write_text("\n".join(quoted), encoding="utf-8")
    (tmp_path / "a.json").write_text(json.dumps(records), encoding="utf-8")
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    expected = ([("A cat sat.", 'It "ate", then'), ("B", "C")], [0, 1])
    for ending in ("tsv", "csv", "json", "jsonl"):
        train, validation, classes = file_splits("rte", tmp_path / f"a.{ending}", tmp_path / "a.tsv")
        assert tuple(train) == expected and tuple(validation[""]) == expected and classes == ["no", "yes"]


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("v.tsv", "sentence1\tlabel\nA\t1\n", "sentence2"),
        ("v.tsv", "sentence1\tsentence2\tlabel\nA\tB\t7\n", "'7'"),
        ("v.tsv", "sentence1\tsentence2\tlabel\n", "no rows"),
        ("v.json", "[{", "not JSON"),
        ("v.parquet", "", "v.parquet"),
    ],
)
def test_data_that_cannot_be_used_is_one_line(small, monkeypatch, capsys, tmp_path, name, content, named):
    (tmp_path / name).write_text(content, encoding="utf-8")
    arguments = command(small, tmp_path / "out", "--validation-file", tmp_path / name)
    refused(monkeypatch, capsys, SCRIPT, arguments, named, name)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--boft-block-size", 7], ["7", "384"]),
        (["--model", "no/such/model"], ["no/such/model"]),
    ],
)
def test_settings_that_do_not_fit_are_one_line(small, monkeypatch, capsys, tmp_path, options, named):
    refused(monkeypatch, capsys, SCRIPT, command(small, tmp_path, *options), *named)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--model", "m"], "--task"),
        (["--model", "m", "--task", "wnli"], "wnli"),
        (["--model", "m", "--task", "rte", "--train-file", "no/such.tsv"], "no/such.tsv"),
        (["--model", "m", "--task", "rte", "--train-file", __file__], "--validation-file"),
        (["--model", "m", "--task", "rte", "--boft-dropout", "1.5"], "1.5"),
        (["--model", "m", "--task", "rte", "--resume-from-checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_are_one_line(monkeypatch, tmp_path, capsys, arguments, named):
    refused(monkeypatch, capsys, SCRIPT, [*arguments, "--output-dir", tmp_path], named)
