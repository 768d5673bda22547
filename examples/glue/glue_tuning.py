"""The work of finetune_glue.py: data, model, adapter and Trainer from its options."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import peft
import torch
from glue_tasks import TASKS, Rows, evaluate, file_splits, hub_splits
from recipe_tools import trainer
from recipe_tools.adapters import boft_config
from recipe_tools.arguments import fail
from recipe_tools.models import block_linears, or_fail
from recipe_tools.quiet import quiet
from recipe_tools.report import adapt, patch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    set_seed,
)


class Texts(Dataset):
    """Rows as tokens, made when asked for."""

    def __init__(self, rows: Rows, tokenizer: Any, max_length: int) -> None:
        self._rows, self._tokenizer, self._max_length = rows, tokenizer, max_length

    def __len__(self) -> int:
        return len(self._rows.texts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = self._tokenizer(*self._rows.texts[index], truncation=True, max_length=self._max_length)
        return {**tokens, "labels": self._rows.labels[index]}


def tune(options: argparse.Namespace) -> dict[str, Any]:
    """Tune as the options of finetune_glue.py say. Returns what ``metrics.json`` holds.

    One line and status 2 for a model or data that cannot be read, and for blocks that do not fit.
    """
    quiet()
    patch()
    task = TASKS[options.task]
    classes: list[str] = []
    try:
        if options.train_file:
            train, validation, classes = file_splits(options.task, options.train_file, options.validation_file)
        else:
            train, validation = hub_splits(options.task)
    except (ValueError, OSError) as error:
        fail(str(error))
    number = 1 if task.regression else len(classes) or int(max(train.labels)) + 1
    tokenizer = or_fail(f"--model {options.model}", AutoTokenizer.from_pretrained, options.model)
    # The new layers and the adapter do not depend on what drew random numbers before.
    set_seed(options.seed)
    model = _adapted(options, number, classes)

    def sets(rows: Rows) -> Texts:
        return Texts(rows, tokenizer, options.max_length)

    held_out = {prefix: sets(rows) for prefix, rows in validation.items()}
    hf_trainer = Trainer(
        model,
        trainer.training_arguments(options),
        data_collator=DataCollatorWithPadding(tokenizer, pad_to_multiple_of=8),
        train_dataset=sets(train),
        eval_dataset=next(iter(held_out.values())),
        processing_class=tokenizer,
        compute_metrics=lambda prediction: evaluate(task, _scores(prediction), prediction.label_ids),
    )

    def measure() -> dict[str, float]:
        return {
            f"{prefix}{name}": value
            for prefix, rows in held_out.items()
            for name, value in trainer.evaluation(hf_trainer, eval_dataset=rows).items()
        }

    counts = f"{options.task}: {len(train.texts):,} training rows, " + ", ".join(
        f"{len(rows):,} {prefix.replace('_', ' ')}validation rows" for prefix, rows in held_out.items()
    )
    return trainer.run(hf_trainer, options, trainer.start(hf_trainer, counts), measure)


def _adapted(options: argparse.Namespace, number: int, classes: list[str]) -> nn.Module:
    """The model with BOFT on every linear of every block, and all that the pretrained weights lack training in full."""
    named = {"id2label": dict(enumerate(classes)), "label2id": {name: label for label, name in enumerate(classes)}}
    model, info = or_fail(
        f"--model {options.model}",
        AutoModelForSequenceClassification.from_pretrained,
        options.model,
        num_labels=number,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        dtype=torch.bfloat16 if options.mixed_precision == "bf16" else torch.float32,
        **(named if classes else {}),
    )
    # Their losses are means over their own batch, which Trainer would take for shares of one over all batches of a step,
    # those of other processes included, and multiply.
    model.accepts_loss_kwargs = False
    config = boft_config(
        options,
        block_linears(model),
        task_type="SEQ_CLS",  # with which PEFT trains the classifier, too
        modules_to_save=sorted({key.rpartition(".")[0] for key in info["missing_keys"]}),
    )
    return adapt(lambda: peft.get_peft_model(model, config))


def _scores(prediction: EvalPrediction) -> np.ndarray:
    found = prediction.predictions
    return found[0] if isinstance(found, tuple) else found
