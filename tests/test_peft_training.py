"""Training PEFT models on these kernels as users do, at m = 2: Trainer, accelerate, 16-bit adapters, EMA, resuming."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import ddp_train  # noqa: E402
from peft import BOFTConfig, PeftModel, get_peft_model  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed  # noqa: E402

import boft_ext  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 32


@pytest.fixture(autouse=True)
def patched():
    yield boft_ext.patch_peft(strict=True)
    boft_ext.unpatch_peft()


def language_model():
    set_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 16}
    # Weights large enough for rotations to matter in an untrained model.
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, num_attention_heads=2, initializer_range=0.3, **sizes))


def adapted(model, dropout=0.0, **kwargs):
    config = BOFTConfig(
        boft_block_size=4, boft_n_butterfly_factor=2, boft_dropout=dropout, target_modules="all-linear", bias="none"
    )
    return get_peft_model(model, config, **kwargs)


def sequences():
    """Sixteen sequences that count upwards from different starts: easy to learn."""
    tokens = (torch.arange(16)[:, None] + torch.arange(12)) % VOCABULARY
    return [{"input_ids": row, "labels": row} for row in tokens]


def batch():
    rows = sequences()
    return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}


def adapter(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if "boft_" in name}


def largest_change(before, after):
    assert before.keys() == after.keys()
    return {name: (after[name] - before[name]).abs().max().item() for name in before}


def trainer(model, folder, steps, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy=options.pop("save_strategy", "no"),
        report_to=[],
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=sequences())


def losses(run):
    return torch.tensor([entry["loss"] for entry in run.state.log_history if "loss" in entry])


def test_trainer_in_bf16_with_gradient_checkpointing_and_dropout(tmp_path):
    """Both kinds of checkpointing give the losses of no checkpointing, so the recomputation drops the same blocks."""
    curves = {}
    for kind, options in {
        "none": {},
        "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "not reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    }.items():
        model = adapted(language_model(), dropout=0.25)
        model.enable_input_require_grads()
        before = adapter(model)
        run = trainer(model, tmp_path, 12, bf16=True, **options)
        run.train()
        curves[kind] = losses(run)
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules()) == bool(options)
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in adapter(model).values())
        assert min(largest_change(before, adapter(model)).values()) > 0
    assert curves["none"][-3:].mean() < 0.9 * curves["none"][:3].mean()
    torch.testing.assert_close(curves["reentrant"], curves["none"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(curves["not reentrant"], curves["none"], rtol=1e-3, atol=1e-3)


def test_bf16_adapter_parameters():
    model = adapted(language_model().to(torch.bfloat16), dropout=0.25, autocast_adapter_dtype=False)
    before = adapter(model)
    assert all(p.dtype == torch.bfloat16 for p in before.values())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    seen = []
    for _ in range(10):
        loss = model(**batch()).loss
        loss.backward()
        assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    assert seen[-1] < 0.9 * seen[0]
    assert min(largest_change(before, adapter(model)).values()) > 0
    model.eval()
    with torch.no_grad():
        unmerged = model(**batch()).logits
        merged = model.merge_and_unload()(**batch()).logits
    assert merged.dtype == unmerged.dtype == torch.bfloat16
    assert (merged - unmerged).norm() < 0.02 * unmerged.norm()


def test_deepcopy_after_an_evaluation_forward():
    """The copy computes the same and lives on its own, trained or not."""
    model = adapted(language_model()).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "boft_R" in name:
                p.normal_()
        before = model(**batch()).logits
        twin = copy.deepcopy(model)
        assert torch.equal(twin(**batch()).logits, before)
    twin.train()
    twin(**batch()).loss.backward()
    torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=1.0).step()
    twin.eval()
    with torch.no_grad():
        assert not torch.equal(twin(**batch()).logits, before)
        assert torch.equal(model(**batch()).logits, before)


def test_save_reload_and_resume(tmp_path):
    """A resumed run ends where an uninterrupted one does, and its files give the same logits."""
    whole = trainer(adapted(language_model(), dropout=0.25), tmp_path / "whole", 6)
    whole.train()
    first = trainer(adapted(language_model(), dropout=0.25), tmp_path / "run", 3, save_strategy="steps", save_steps=3)
    first.train()
    resumed = trainer(adapted(language_model(), dropout=0.25), tmp_path / "run", 6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    torch.testing.assert_close(adapter(resumed.model), adapter(whole.model), rtol=1e-5, atol=1e-6)
    assert max(largest_change(adapter(first.model), adapter(resumed.model)).values()) > 1e-3

    resumed.model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(language_model(), tmp_path / "adapter", is_trainable=True)
    assert all(p.requires_grad and p.shape[0] == 2 for name, p in loaded.named_parameters() if "boft_R" in name)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch()).logits, resumed.model.eval()(**batch()).logits)


def test_ema_swap_between_evaluations():
    """Writing through .data leaves no version behind; evaluation must see the new values all the same."""
    model = adapted(language_model()).eval()
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        trained = [torch.randn_like(p) for p in parameters]
        averaged = [torch.randn_like(p) for p in parameters]

        def evaluate(values):
            for p, value in zip(parameters, values, strict=True):
                p.data.copy_(value)
            return model(**batch()).logits

        first = evaluate(trained)
        swapped = evaluate(averaged)
        assert not torch.equal(first, swapped)
        assert torch.equal(evaluate(trained), first)
        fresh = adapted(language_model()).eval()
        for p, value in zip((p for p in fresh.parameters() if p.requires_grad), averaged, strict=True):
            p.copy_(value)
        assert torch.equal(fresh(**batch()).logits, swapped)


def test_two_processes_train_as_one(tmp_path):
    """DDP on gloo through accelerate: replicas agree with each other and with one process that sees all data."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--local-addr=127.0.0.1"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *launch, ddp_train.__file__, str(tmp_path)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    one = ddp_train.train()
    assert sum("boft_R" in name for name in one) == 2
    assert all(one[name].shape[0] == 2 and one[name].abs().max() > 0 for name in one if "boft_R" in name)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first, one, rtol=1e-5, atol=1e-6)
