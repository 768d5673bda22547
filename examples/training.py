"""One classifier in training: its optimiser, its schedule, and what was seen of its loss and time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

WARMUP = 0.1


class Batch(NamedTuple):
    """Token ids and mask ``(batch, tokens)``, labels ``(batch)``."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    def rows(self, index: Tensor | slice) -> Batch:
        """Some of the examples."""
        return Batch(self.ids[index], self.mask[index], self.labels[index])


def count_steps(examples: int, batch_size: int, epochs: int) -> int:
    """Optimiser steps of a training; the examples that fill no batch are left out, so that all steps cost alike."""
    return examples // batch_size * epochs


def _shuffled(data: Batch, batch_size: int, epochs: int, seed: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(seed)
    examples = len(data.labels)
    for _ in range(epochs):
        order = torch.randperm(examples, generator=generator)
        for start in range(0, examples - batch_size + 1, batch_size):
            yield data.rows(order[start : start + batch_size])


class Training:
    """AdamW on the trainable parameters of `model`: warm-up, then linear decay to zero over `steps` steps.

    Attributes: `losses` and `times` (seconds), one entry a step of `fit`.

    Args:
        head_rate, adapter_rate: learning rates of the classifier and of everything else that trains.
    """

    def __init__(self, model: nn.Module, head_rate: float, adapter_rate: float, steps: int) -> None:
        self.model = model
        self.losses: list[float] = []
        self.times: list[float] = []
        trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        head = [parameter for name, parameter in trainable.items() if "head." in name]
        adapter = [parameter for name, parameter in trainable.items() if "head." not in name]
        groups = [{"params": head, "lr": head_rate}, {"params": adapter, "lr": adapter_rate}]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: max(0.0, min((step + 1) / (WARMUP * steps), 1 - step / steps))
        )

    @property
    def trainable_parameters(self) -> int:
        """How many numbers the optimiser changes."""
        return sum(parameter.numel() for group in self.optimizer.param_groups for parameter in group["params"])

    def step(self, batch: Batch) -> float:
        """One optimiser step. Returns the loss; leaves no gradients behind."""
        self.model.train()
        loss = F.cross_entropy(self.model(batch.ids, batch.mask), batch.labels)
        loss.backward()
        self.optimizer.step()
        self._schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def fit(self, name: str, data: Batch, batch_size: int, epochs: int, seed: int) -> None:
        """Train under a progress bar. Equal seeds give every model the same batches in the same order."""
        torch.manual_seed(seed)
        steps = count_steps(len(data.labels), batch_size, epochs)
        with tqdm(_shuffled(data, batch_size, epochs, seed), desc=name, total=steps, unit="step") as bar:
            for batch in bar:
                start = time.perf_counter()
                self.losses.append(self.step(batch))
                self.times.append(time.perf_counter() - start)
                bar.set_postfix(loss=f"{self.losses[-1]:.3f}")

    def tensors(self) -> list[Tensor]:
        """What stays alive between steps: parameters, buffers and the optimiser's state."""
        state = [value for entry in self.optimizer.state.values() for value in entry.values()]
        return [*self.model.parameters(), *self.model.buffers(), *(v for v in state if isinstance(v, Tensor))]


@torch.no_grad()
def logits(model: nn.Module, data: Batch, batch_size: int = 64) -> Tensor:
    """``(examples, classes)`` in evaluation mode, which the model keeps."""
    model.eval()
    starts = range(0, len(data.labels), batch_size)
    parts = (data.rows(slice(start, start + batch_size)) for start in starts)
    return torch.cat([model(part.ids, part.mask) for part in parts])


def accuracy(scores: Tensor, labels: Tensor) -> float:
    """The share of rows whose largest score is at the label."""
    return (scores.argmax(dim=1) == labels).float().mean().item()
