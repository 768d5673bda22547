"""The work of finetune_vit.py: data, model, adapter and Trainer from its options."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import peft
import torch
from image_data import Splits, from_dataset, from_folder
from PIL import Image
from recipe_tools import trainer as shared
from recipe_tools.adapters import boft_config
from recipe_tools.arguments import fail
from recipe_tools.models import block_linears, or_fail
from recipe_tools.quiet import quiet
from recipe_tools.report import adapt, patch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, EvalPrediction, Trainer, set_seed

# By whatever name a model calls the layer that gives the classes; it is new, so it trains fully.
HEAD = "classifier"


def tune(options: argparse.Namespace) -> dict[str, Any]:
    """Tune as the options of finetune_vit.py say. Returns what ``metrics.json`` holds.

    One line and status 2 for a model or data that cannot be read, and for blocks that do not fit.
    """
    quiet()
    patch()
    processor = or_fail(f"--model {options.model}", AutoImageProcessor.from_pretrained, options.model)
    splits = _load_data(options, processor)
    # The new classifier and the adapter do not depend on what drew random numbers before.
    set_seed(options.seed)
    model = _load_model(options, splits.classes)
    config = boft_config(options, block_linears(model), modules_to_save=[HEAD])
    model = adapt(lambda: peft.get_peft_model(model, config))
    trainer = Trainer(
        model,
        shared.training_arguments(options, dataloader_num_workers=options.dataloader_num_workers),
        data_collator=_batch,
        train_dataset=splits.train,
        eval_dataset=splits.test,
        processing_class=processor,
        compute_metrics=_accuracy,
    )
    counts = f"{len(splits.train)} training and {len(splits.test)} test images of {len(splits.classes)} classes"
    return shared.run(trainer, options, shared.start(trainer, counts))


def _load_data(options: argparse.Namespace, processor: Any) -> Splits:
    def process(image: Image.Image) -> Tensor:
        return processor(image, return_tensors="pt")["pixel_values"][0]

    if options.data_dir:
        return or_fail("--data-dir", from_folder, options.data_dir, process)
    columns = (options.image_column, options.label_column)
    return or_fail("--dataset", from_dataset, options.dataset, options.dataset_config, *columns, process)


def _load_model(options: argparse.Namespace, classes: list[str]) -> nn.Module:
    model = or_fail(
        f"--model {options.model}",
        AutoModelForImageClassification.from_pretrained,
        options.model,
        id2label=dict(enumerate(classes)),
        label2id={name: label for label, name in enumerate(classes)},
        ignore_mismatched_sizes=True,
        dtype=torch.bfloat16 if options.mixed_precision == "bf16" else torch.float32,
    )
    if not isinstance(getattr(model, HEAD, None), nn.Linear):
        fail(f"--model {options.model}: a {type(model).__name__} has no linear layer named {HEAD}")
    # Also where the pretrained model happens to have as many classes: they are others. What trains is in float32.
    getattr(model, HEAD).float().reset_parameters()
    return model


def _batch(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.stack([row["pixel_values"] for row in rows]),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}
