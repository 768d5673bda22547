"""The demo examples/finetune_text.py at its smallest size, and what it stands on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
ROWS = [
    "frozen, gradients passed",
    "probe (frozen encoder)",
    "LoRA r8",
    "PEFT BOFT, m = 1",
    "boft_ext BOFT, m = 2",
]


def run_demo(*arguments):
    command = [sys.executable, str(EXAMPLES / "finetune_text.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))


def test_quick_run_does_everything(tmp_path):
    output = tmp_path / "new" / "results"
    done = run_demo("--quick", "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr

    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == ROWS
    for name, row in rows.items():
        assert row["step_in_turns"] > 0
        assert row["peak_memory"] > 50 * 2**20, "the encoder's weights alone are larger"
        trained = "frozen," not in name and "PEFT" not in name
        assert (row["test_accuracy"] is not None) == trained
        assert (row["training_step"] is not None) == trained
    assert rows[ROWS[-1]]["trainable_parameters"] > rows[ROWS[3]]["trainable_parameters"]
    # PEFT's dense (m, d, d) tables: 12 MiB in each of two layers.
    assert rows[ROWS[3]]["peak_memory"] > rows[ROWS[4]]["peak_memory"] + 20 * 2**20

    markdown = (output / "results.md").read_text(encoding="utf-8")
    for name in ROWS:
        assert f"| {name} " in done.stdout and f"| {name} " in markdown
    assert (output / "loss.png").read_bytes().startswith(PNG_SIGNATURE)
    stored = safetensors.torch.load_file(output / "adapter" / "adapter_model.safetensors")
    shapes = {tensor.shape for name, tensor in stored.items() if name.endswith("boft_R")}
    assert shapes == {(2, 48, 8, 8), (2, 192, 8, 8)}
    for way in ("PeftModel.from_pretrained", "merge_and_unload", "boft_ext.load_adapter"):
        assert way in done.stdout
    assert "loss=" in done.stderr and "step/s" in done.stderr


def test_block_size_that_does_not_fit_is_one_line(tmp_path):
    done = run_demo("--quick", "--output", tmp_path, "--block-size", 7)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "7" in done.stderr and "384" in done.stderr
    assert "step/s" not in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--epochs", "0"], "0"),
        (["--epochs", "two"], "two"),
        (["--per-module", "4"], "4"),
        (["--boft-lr", "-1"], "-1"),
        (["--max-tokens", "513"], "513"),
        (["--factors", "2.5"], "2.5"),
        (["--output", __file__], __file__),
        (["--rank", "8"], "--rank"),
    ],
)
def test_bad_arguments_are_one_line(examples, capsys, arguments, named):
    from finetune_text import main

    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    output = capsys.readouterr()
    assert output.out == "" and len(output.err.splitlines()) == 1 and named in output.err


def test_corpus_shares_no_text_and_hides_the_names(examples, seed):
    from text_data import FEWEST_PER_MODULE, MASK, MODULES, load_corpus

    corpus = load_corpus(60, seed)
    assert load_corpus(60, seed) == corpus
    texts = [example.text.lower() for example in corpus.train + corpus.test]
    assert len(set(texts)) == len(texts) <= corpus.found
    assert not [text for text in texts for module in MODULES if module in text.replace(MASK.lower(), "")]
    for label in range(16):
        count = sum(example.label == label for example in corpus.train + corpus.test)
        assert FEWEST_PER_MODULE <= count <= 60
        assert {label} <= {example.label for example in corpus.test}


def test_corpus_says_what_is_missing(examples, tmp_path):
    from text_data import load_corpus

    with pytest.raises(ValueError, match="0 docstrings of asyncio found in .* 40 are needed"):
        load_corpus(60, 0, stdlib=tmp_path)
    with pytest.raises(ValueError, match="4 docstrings per module are too few"):
        load_corpus(4, 0)


def test_peak_memory_counts_temporaries_and_what_was_alive(examples):
    from step_cost import peak_bytes

    alive = torch.ones(1000, 1000)

    def step():
        doubled = alive * 2
        more = doubled + 1
        del doubled
        torch.cat([more, alive])

    assert peak_bytes(step, [alive, alive[0]]) == pytest.approx(4 * alive.nbytes, rel=1e-3)


def test_steps_take_turns(examples):
    from step_cost import medians_in_turns

    seen = []
    medians = medians_in_turns({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, rounds=3)
    assert "".join(seen) == "ab" + "ab" + "ba" + "ab"
    assert set(medians) == {"a", "b"}
