"""Load, tune, answer, export: what finetune_causal_lm.py does once its arguments are known to be good."""

from __future__ import annotations

import argparse
import json
from typing import Any

import peft
import torch
from instruction_data import Padding, Row, Text, encode, hub_records, read_records, result, write_out
from recipe_tools import report, trainer
from recipe_tools.adapters import boft_config
from recipe_tools.arguments import fail
from recipe_tools.models import or_fail
from recipe_tools.quiet import quiet
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, set_seed


def tune(options: argparse.Namespace) -> None:
    """Tune as the options of finetune_causal_lm.py say, and leave everything in ``options.output_dir``.

    One line and status 2 for a model or data that cannot be read, and for blocks that do not fit.
    """
    quiet()
    report.patch()
    set_seed(options.seed)
    named = f"--model {options.model}"
    tokenizer = or_fail(named, AutoTokenizer.from_pretrained, options.model)
    if not getattr(tokenizer, "is_fast", False) or tokenizer.eos_token is None:
        fail(f"{named}: needs a fast tokenizer with an end-of-sequence token")
    if tokenizer.pad_token is None:
        # What it fills is masked everywhere.
        tokenizer.pad_token = tokenizer.eos_token
    try:
        train_texts, eval_texts = _texts(options, tokenizer)
    except (ValueError, OSError) as error:
        fail(str(error))
    train_rows, eval_rows = (_rows(texts, tokenizer, options.max_length) for texts in (train_texts, eval_texts))
    for option, rows in (("training", train_rows), ("evaluation", eval_rows)):
        if not rows:
            fail(f"every {option} prompt is longer than --max-length {options.max_length}: there is nothing to learn")

    dtype = torch.bfloat16 if options.mixed_precision == "bf16" else torch.float32
    model = or_fail(named, AutoModelForCausalLM.from_pretrained, options.model, dtype=dtype)
    config = boft_config(options, "all-linear", task_type="CAUSAL_LM")
    model = report.adapt(lambda: peft.get_peft_model(model, config))
    hf_trainer = Trainer(
        model=model,
        args=trainer.training_arguments(options),
        train_dataset=train_rows,
        eval_dataset=eval_rows,
        data_collator=Padding(tokenizer.pad_token_id),
        processing_class=tokenizer,
    )
    line = trainer.start(
        hf_trainer,
        f"{len(train_rows):,} of {len(train_texts):,} training and {len(eval_rows):,} of {len(eval_texts):,} "
        f"evaluation records have an answer within {options.max_length} tokens",
    )
    asked = eval_texts[: options.answers]
    rounds: list[list[str]] = []

    def measure() -> dict[str, float]:
        results = {"loss": trainer.evaluation(hf_trainer)["loss"]}
        if asked:
            rounds.append(_answers(hf_trainer, tokenizer, asked, options))
            right = [result(given) == result(text.answer) for given, text in zip(rounds[-1], asked, strict=True)]
            results["right_answers"] = sum(right) / len(right)
        return results

    trainer.run(hf_trainer, options, line, measure)
    if asked and hf_trainer.is_world_process_zero():
        _write_answers(options, asked, *rounds)


def _texts(options: argparse.Namespace, tokenizer: Any) -> tuple[list[Text], list[Text]]:
    """Training and evaluation texts; the latter are the last records of the former where no file is given."""
    records = read_records(options.train_file) if options.train_file else hub_records(options.dataset)
    if options.eval_file:
        held_out = read_records(options.eval_file)
    elif len(records) < 2:
        raise ValueError("one record cannot be both learned and measured: give more, or an --eval-file")
    else:
        order = torch.randperm(len(records), generator=torch.Generator().manual_seed(options.seed)).tolist()
        count = min(options.eval_records, len(records) // 2)
        held_out, records = [records[i] for i in order[:count]], [records[i] for i in order[count:]]
    # All in one form, so that prompts can be answered in one batch.
    chat = options.prompt == "chat" or any("messages" in record for record in records + held_out)
    train, test = ([write_out(record, tokenizer, chat) for record in part] for part in (records, held_out))
    return train, test


def _rows(texts: list[Text], tokenizer: Any, max_length: int) -> list[Row]:
    rows = (encode(text, tokenizer, max_length) for text in texts)
    return [row for row in rows if row is not None]


@torch.inference_mode()
def _answers(hf_trainer: Trainer, tokenizer: Any, texts: list[Text], options: argparse.Namespace) -> list[str]:
    """The model's most likely answers to the prompts of `texts`."""
    model: nn.Module = hf_trainer.accelerator.unwrap_model(hf_trainer.model).eval()
    found = []
    for first in range(0, len(texts), options.eval_batch_size):
        some = texts[first : first + options.eval_batch_size]
        prompts = tokenizer(
            [text.prompt for text in some],
            add_special_tokens=not some[0].chat,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            return_token_type_ids=False,
        ).to(model.device)
        with hf_trainer.autocast_smart_context_manager():
            tokens = model.generate(
                **prompts,
                max_new_tokens=options.max_new_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        new = tokens[:, prompts["input_ids"].shape[1] :]
        found += [answer.strip() for answer in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return found


def _write_answers(options: argparse.Namespace, texts: list[Text], before: list[str], after: list[str]) -> None:
    answers = [
        {"prompt": text.prompt, "expected": text.answer, "before": first, "after": last}
        for text, first, last in zip(texts, before, after, strict=True)
    ]
    (options.output_dir / "answers.json").write_text(
        json.dumps(answers, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    for answer in answers[:2]:
        print("\n".join(f"{name}: {text!r}" for name, text in answer.items()))
