"""The recipe examples/llm at its smallest size: what a run leaves, what is learned, resuming, and what goes wrong."""

import json
import shutil

import pytest
import torch
from recipe_outputs import adapter_config, metrics_of, same_weights, stored
from recipe_runs import call_main, recipe_modules, refused, run, run_code

import boft_ext

SCRIPT = "llm/finetune_causal_lm.py"
STEPS, EVERY = 30, 8
modules = recipe_modules("llm")

# Without boft_ext and PEFT: what a server would do.
STOCK_LOGITS = """
import sys
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert not {"boft_ext", "peft"} & set(sys.modules)
with torch.no_grad():
    torch.save(model(torch.arange(3, 43).view(2, 20)).logits, sys.argv[2])
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a tiny Llama and its instructions."""
    folder = tmp_path_factory.mktemp("tiny")
    run("llm/make_tiny_model.py", folder, "--steps", 40)
    return folder


def command(tiny, output, *arguments):
    """Arguments of a small run. 28 records in batches of 4, gathered in pairs: 4 steps an epoch, the last one short."""
    return [
        *("--model", tiny / "model", "--train-file", tiny / "few.jsonl", "--eval-file", tiny / "test.jsonl"),
        *("--output-dir", output, "--train-batch-size", 4, "--gradient-accumulation-steps", 2, "--eval-batch-size", 60),
        *("--max-train-steps", STEPS, "--checkpointing-steps", EVERY, "--learning-rate", 1e-2, "--lr-warmup", 0.1),
        *("--boft-dropout", 0.5, "--answers", 6, "--max-new-tokens", 4, *arguments),
    ]


@pytest.fixture(scope="module")
def tuned(tiny, tmp_path_factory):
    """The output folder of a run, and what it printed."""
    records = (tiny / "train.jsonl").read_text(encoding="utf-8").splitlines()[:28]
    (tiny / "few.jsonl").write_text("\n".join(records), encoding="utf-8")
    output = tmp_path_factory.mktemp("tuned")
    arguments = command(tiny, output, "--checkpoints-total-limit", 2, "--merged-dir", output / "merged")
    return output, run(SCRIPT, *arguments).stdout


@pytest.fixture
def tokenizer(tiny):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny / "model")


def test_a_run_improves_and_leaves_its_files(tuned):
    output, printed = tuned
    assert printed.startswith("boft_ext") and "BOFT m=2 b=8 on 14 layers" in printed.splitlines()[0]
    metrics = metrics_of(output)
    assert metrics["after"]["loss"] < metrics["before"]["loss"] - 0.5
    assert set(metrics["after"]) == {"loss", "right_answers"}
    assert metrics["steps"] == STEPS
    answers = json.loads((output / "answers.json").read_text(encoding="utf-8"))
    assert len(answers) == 6 and set(answers[0]) == {"prompt", "expected", "before", "after"}
    assert any(answer["before"] != answer["after"] for answer in answers)
    assert list((output / "logs").glob("events.*"))
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-24", "checkpoint-30"]
    config, tensors = adapter_config(output), stored(output)
    assert config["peft_type"] == "BOFT" and config["boft_n_butterfly_factor"] == 2
    assert {tensor.shape for name, tensor in tensors.items() if "boft_R" in name} == {(2, 8, 8, 8), (2, 20, 8, 8)}


def test_a_resumed_run_ends_with_the_same_weights(tiny, tuned, tmp_path):
    shutil.copytree(tuned[0] / "checkpoint-24", tmp_path / "checkpoint-24")
    run(SCRIPT, *command(tiny, tmp_path, "--resume-from-checkpoint", "latest"))
    assert same_weights(tuned[0], tmp_path)
    first, resumed = metrics_of(tuned[0]), metrics_of(tmp_path)
    assert resumed["steps_here"] == STEPS - 24
    assert resumed["before"] == first["before"] and resumed["after"] == first["after"]


def test_merged_model_loads_without_peft_and_gives_the_same(tiny, tuned, modules, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM

    run_code(STOCK_LOGITS, "llm", tuned[0] / "merged", tmp_path / "logits.pt")
    boft_ext.patch_peft()
    base = AutoModelForCausalLM.from_pretrained(tiny / "model")
    model = peft.PeftModel.from_pretrained(base, tuned[0] / "adapter").eval()
    with torch.no_grad():
        expected = model(torch.arange(3, 43).view(2, 20)).logits
        with model.disable_adapter():
            frozen = model(torch.arange(3, 43).view(2, 20)).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-4, atol=1e-4)
    assert (expected - frozen).abs().max() > 0.1


def test_loss_is_that_of_the_answers_alone(tiny, tuned, tokenizer, modules, monkeypatch, tmp_path):
    """The loss before training, computed here from the base model, one answer at a time."""
    from transformers import AutoModelForCausalLM

    records = [{"instruction": "Say it.", "input": "f(x)", "output": "1"}, {"query": "A?", "response": "no, 2 of 3"}]
    (tmp_path / "eval.json").write_text(json.dumps(records), encoding="utf-8")
    prompts = [
        "### Instruction:\nSay it.\n\n### Input:\nf(x)\n\n### Response:\n",
        "### Instruction:\nA?\n\n### Response:\n",
    ]
    model = AutoModelForCausalLM.from_pretrained(tiny / "model").eval()
    losses = []
    for prompt, answer in zip(prompts, ["1", "no, 2 of 3"], strict=True):
        prefix = tokenizer(prompt)["input_ids"]
        ids = torch.tensor(tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id])
        with torch.no_grad():
            scores = model(ids[None]).logits[0].log_softmax(-1)
        losses += [-scores[at - 1, ids[at]].item() for at in range(len(prefix), len(ids))]
    arguments = command(tiny, tmp_path, "--eval-file", tmp_path / "eval.json", "--max-train-steps", 1, "--answers", 0)
    call_main(monkeypatch, SCRIPT, *arguments)
    assert metrics_of(tmp_path)["before"]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_messages_learn_every_answer_and_nothing_else(tokenizer, modules):
    from instruction_data import IGNORED, Padding, encode, write_out

    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Two, then?"},
        {"role": "assistant", "content": "No."},
    ]
    text = write_out({"messages": messages}, tokenizer, chat=False)
    assert text.answer == "No." and text.prompt.endswith("Two, then?\n[assistant] ")
    row = encode(text, tokenizer, 512)
    assert tokenizer.decode(row.ids[row.learned]) == "Yes.</s>\nNo.</s>\n"
    assert row.ids.tolist().count(tokenizer.bos_token_id) == 1

    short = encode(write_out({"question": "A", "answer": "B"}, tokenizer, chat=False), tokenizer, 512)
    batch = Padding(tokenizer.pad_token_id)([row, short])
    assert batch["labels"].shape[1] % 8 == 0
    assert batch["labels"][batch["labels"] != IGNORED].tolist() == [*row.ids[row.learned], *short.ids[short.learned]]
    assert batch["attention_mask"].sum(1).tolist() == [len(row.ids), len(short.ids)]


def test_answers_beyond_the_longest_row_are_left_out(tokenizer, modules):
    from instruction_data import encode, write_out

    text = write_out({"instruction": "word " * 40, "output": "answer " * 40}, tokenizer, chat=False)
    assert encode(text, tokenizer, 16) is None
    whole = encode(text, tokenizer, 512)
    cut = encode(text, tokenizer, len(whole.ids) - 5)
    assert len(cut.ids) == len(whole.ids) - 5 and cut.learned.sum() == whole.learned.sum() - 5


def test_results_of_answers(modules):
    from instruction_data import result

    assert result("It is 3 + 4. The answer is: 7") == result("3 + 4 = 7\n#### 7") == result(" 7.") == "7"


def test_data_of_the_hub(modules, monkeypatch):
    import datasets
    from instruction_data import hub_records

    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: asked.append((args, kwargs)) or [{"a": 1}])
    assert hub_records("some/data") == [{"a": 1}] and asked == [(("some/data",), {"split": "train"})]

    def offline(*args, **kwargs):
        raise ConnectionError("no network\nand more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ValueError, match=r"^the data set some/data cannot be loaded: no network$"):
        hub_records("some/data")


@pytest.mark.parametrize(("size", "factors", "percent"), [(8, 2, 0.12), (16, 1, 0.13)])
def test_parameters_of_llama_2_7b_are_the_papers(modules, size, factors, percent):
    """The paper's tables of language models count rotations alone; from the configuration, without weights."""
    import peft
    from transformers import LlamaConfig, LlamaForCausalLM

    boft_ext.patch_peft()
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # its defaults are Llama-2-7B
        config = peft.BOFTConfig(
            boft_block_size=size, boft_n_butterfly_factor=factors, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = peft.get_peft_model(model, config)
    report = boft_ext.parameter_report(model)
    (total,) = report.totals.values()
    assert total.layers == 32 * 7
    assert round(100 * total.rotation / report.base_parameters, 2) == percent


def test_less_memory_settings_train_too(tiny, tuned, monkeypatch, tmp_path):
    options = ["--mixed-precision", "bf16", "--gradient-checkpointing", "--prompt", "chat", "--max-train-steps", 10]
    call_main(monkeypatch, SCRIPT, *command(tiny, tmp_path, *options))
    metrics = metrics_of(tmp_path)
    assert metrics["after"]["loss"] < metrics["before"]["loss"]
    assert {tensor.dtype for tensor in stored(tmp_path).values()} == {torch.float32}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--model"),
        (["--model", "m", "--task", "mmlu"], "mmlu"),
        (["--model", "m", "--train-file", "no/such.json"], "no/such.json"),
        (["--model", "m", "--eval-file", "no/such.json"], "no/such.json"),
        (["--model", "m", "--max-length", "4"], "4"),
        (["--model", "m", "--boft-factors", "0"], "0"),
        (["--model", "m", "--boft-block-size", "4", "--boft-block-num", "4"], "--boft-block-num"),
        (["--model", "m", "--learning-rate", "2"], "2"),
        (["--model", "m", "--resume-from-checkpoint", "nowhere"], "nowhere"),
    ],
)
def test_bad_arguments_are_one_line(monkeypatch, tmp_path, capsys, arguments, named):
    refused(monkeypatch, capsys, SCRIPT, [*arguments, "--output-dir", tmp_path], named)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--boft-block-size", 7], ["7", "64"]),
        (["--boft-factors", 9], ["9", "64"]),
        (["--max-length", 8], ["--max-length 8"]),
        (["--model", "no/such/model"], ["no/such/model"]),
    ],
)
def test_settings_that_do_not_fit_are_one_line(tiny, tuned, monkeypatch, capsys, tmp_path, options, named):
    refused(monkeypatch, capsys, SCRIPT, command(tiny, tmp_path, *options), *named)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"instruction": "a", "output": "b"}\n{"instruction"', "line 2"),
        ('{"instruction": "a"}', "instruction"),
        ('[1, 2]', "record 1"),
        ("", "no records"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "'user'"),
    ],
)
def test_data_that_cannot_be_used_is_one_line(tiny, monkeypatch, capsys, tmp_path, content, named):
    file = tmp_path / ("data.json" if content.startswith("[") else "data.jsonl")
    file.write_text(content, encoding="utf-8")
    refused(monkeypatch, capsys, SCRIPT, command(tiny, tmp_path / "out", "--train-file", file), named)


def test_one_record_is_not_held_out_of_itself(tiny, monkeypatch, capsys, tmp_path):
    (tmp_path / "one.jsonl").write_text('{"instruction": "a", "output": "b"}', encoding="utf-8")
    arguments = ["--model", tiny / "model", "--train-file", tmp_path / "one.jsonl", "--output-dir", tmp_path / "out"]
    refused(monkeypatch, capsys, SCRIPT, arguments, "--eval-file")


def test_messages_without_a_chat_template_are_one_line(tiny, monkeypatch, capsys, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    arguments = command(tiny, tmp_path / "out", "--model", tmp_path / "model", "--train-file", tiny / "test.jsonl")
    refused(monkeypatch, capsys, SCRIPT, [*arguments, "--prompt", "chat"], "chat template")
