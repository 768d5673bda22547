"""The work of finetune_sam_decoder.py: data, model, adapter and Trainer from its options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import peft
import torch
from mask_data import Pair, Prepared, find_pairs, load_mask, prepare
from mask_grid import save_mask_grid
from mask_loss import mask_loss
from mask_metrics import boundary_iou, iou, mean
from recipe_tools import trainer as shared
from recipe_tools.adapters import boft_config
from recipe_tools.arguments import fail
from recipe_tools.models import or_fail
from recipe_tools.quiet import quiet
from recipe_tools.report import adapt, patch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, SamConfig, SamModel, Trainer, set_seed

DECODER = "mask_decoder"


class Encoder:
    """A SAM's image encoder: ``(n, 3, s, s)`` pixels to ``(n, channels, e, e)`` embeddings, without gradients.

    Args:
        bfloat16: compute in it. The prompts and the decoder never do: the corners of a box on 1024 pixels would be
            rounded to whole multiples of four.
    """

    def __init__(self, model: SamModel, bfloat16: bool) -> None:
        self._model, self._bfloat16 = model, bfloat16

    def __call__(self, pixels: Tensor) -> Tensor:
        device = self._model.device
        with torch.autocast(device.type, torch.bfloat16, enabled=self._bfloat16):
            return self._model.get_image_embeddings(pixels.to(device)).float()


class Masks(Dataset):
    """Rows of pixels or, after `encode`, their embeddings, with the box and the mask of the object."""

    def __init__(self, pairs: list[Pair], processor: Any) -> None:
        self.pairs, self._processor = pairs, processor
        self._embeddings: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.pairs)

    def prepared(self, index: int) -> Prepared:
        return prepare(self.pairs[index], self._processor)

    def encode(self, encoder: Encoder, name: str) -> None:
        """Keep the embedding of every picture, in main memory."""
        bar = tqdm(range(len(self)), desc=f"encoding {name} pictures")
        self._embeddings = [encoder(self.prepared(index).pixels[None])[0].cpu() for index in bar]

    def row(self, index: int, prepared: Prepared) -> dict[str, Tensor]:
        """What the loss needs of a pair that is prepared."""
        image = {"embeddings": self._embeddings[index]} if self._embeddings else {"pixels": prepared.pixels}
        return {**image, "boxes": prepared.box, "targets": prepared.target, "valid": prepared.valid}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.row(index, self.prepared(index))


class DecoderTrainer(Trainer):
    """Trainer with the loss of masks."""

    encoder: Encoder

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **more: Any) -> Tensor:
        """The loss of one batch of rows of `Masks`."""
        logits = mask_logits(model, inputs, self.encoder)
        return mask_loss(logits, inputs["targets"], inputs["valid"])


def mask_logits(model: nn.Module, rows: dict[str, Tensor], encoder: Encoder) -> Tensor:
    """``(n, t, t)``: SAM's single mask for the box of each row."""
    embeddings = rows["embeddings"] if "embeddings" in rows else encoder(rows["pixels"])
    return model(image_embeddings=embeddings, input_boxes=rows["boxes"], multimask_output=False).pred_masks[:, 0, 0]


def tune(options: argparse.Namespace) -> dict[str, Any]:
    """Tune as the options of finetune_sam_decoder.py say. Returns what ``metrics.json`` holds.

    One line and status 2 for a model or data that cannot be read, and for blocks that do not fit.
    """
    quiet()
    patch()
    named = f"--model {options.model}"
    config = or_fail(named, AutoConfig.from_pretrained, options.model)
    if not isinstance(config, SamConfig):
        fail(f"{named}: a model of type {config.model_type}, not a SAM")
    processor = or_fail(named, AutoImageProcessor.from_pretrained, options.model)
    train, test = (Masks(or_fail("--data-dir", _pairs, options, split), processor) for split in ("train", "test"))
    model = or_fail(named, SamModel.from_pretrained, options.model)
    set_seed(options.seed)
    adapted = _adapted(model, options)
    arguments = shared.training_arguments(
        options,
        # Only the encoder computes in bfloat16.
        bf16=False,
        # The decoder's heads for three masks and for their quality have no part in the single mask.
        ddp_find_unused_parameters=True,
    )
    trainer = DecoderTrainer(
        adapted, arguments, data_collator=_batch, train_dataset=train, processing_class=processor
    )
    trainer.encoder = Encoder(model, options.mixed_precision == "bf16")
    line = shared.start(trainer, f"{len(train)} training and {len(test)} test pictures")
    or_fail("--data-dir", _encode_all, options, trainer.encoder, train=train, test=test)

    predictions: list[list[Tensor]] = []

    def measure() -> dict[str, float]:
        predictions.append([_predict(trainer, test, index) for index in range(len(test))])
        truths = [load_mask(pair) for pair in test.pairs]
        both = list(zip(predictions[-1], truths))
        return {"miou": mean([iou(*pair) for pair in both]), "boundary_iou": mean([boundary_iou(*p) for p in both])}

    metrics = shared.run(trainer, options, line, measure)
    if trainer.is_world_process_zero():
        save_mask_grid(options.output_dir / "masks.png", test.pairs[: options.grid_rows], *predictions)
    return metrics


def _pairs(options: argparse.Namespace, split: str) -> list[Pair]:
    folder: Path = options.data_dir / split
    return find_pairs(folder / options.image_folder, folder / options.mask_folder)


def _adapted(model: SamModel, options: argparse.Namespace) -> nn.Module:
    named = model.named_modules()
    targets = [name for name, m in named if isinstance(m, nn.Linear) and name.startswith(f"{DECODER}.")]
    return adapt(lambda: peft.get_peft_model(model, boft_config(options, targets)))


def _encode_all(options: argparse.Namespace, encoder: Encoder, **splits: Masks) -> None:
    """Keep all embeddings if they fit into ``options.embeddings_memory``; otherwise say that they do not.

    Either way every mask is looked at now, not when a step of the training first needs it.
    """
    first = encoder(next(iter(splits.values())).prepared(0).pixels[None])
    needed = first.nbytes * sum(map(len, splits.values())) / 2**30
    fits = needed <= options.embeddings_memory
    if not fits:
        print(
            f"the embeddings need {needed:.3g} GiB, --embeddings-memory allows {options.embeddings_memory:g}: "
            "pictures are encoded again in each step"
        )
    for name, split in splits.items():
        if fits:
            split.encode(encoder, name)
        else:
            for pair in tqdm(split.pairs, desc=f"checking {name} masks"):
                load_mask(pair)


def _batch(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@torch.no_grad()
def _predict(trainer: DecoderTrainer, data: Masks, index: int) -> Tensor:
    """The ``(height, width)`` bool mask for one picture, in its own size."""
    model = trainer.model.eval()
    prepared = data.prepared(index)
    row = {name: value[None].to(trainer.args.device) for name, value in data.row(index, prepared).items()}
    logits = mask_logits(model, row, trainer.encoder)[:, None].cpu()
    sizes = [prepared.original], [prepared.resized]
    return trainer.processing_class.post_process_masks(logits[None], *sizes)[0][0, 0]
