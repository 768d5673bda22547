"""How methods are compared: a learning rate for each from one grid by validation, then several seeds on test data."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tuning_methods import Method, apply, encoder_parameters
from torch import nn
from training import Batch, Training, accuracy, count_steps, logits

# Of the new classifier, in all methods but the probe, which trains nothing else: its rate is from the grid.
HEAD_RATE = 1e-2
# One example in this many of the training set is for validation while the rate is chosen.
VALIDATION = 4
SEARCH_SEED = 100


class Task(NamedTuple):
    """`model`: a new copy of the pretrained model with a new classifier, from torch's random state."""

    name: str
    title: str
    train: Batch
    test: Batch
    model: Callable[[], nn.Module]


class Run(NamedTuple):
    """One training. `split`: what it was measured on, "validation" or "test"."""

    split: str
    method: str
    parameters: int
    rate: float
    seed: int
    accuracy: float
    loss: float


class Settings(NamedTuple):
    """The same for all methods."""

    rates: Sequence[float]
    seeds: int
    epochs: int
    batch_size: int


def compare(task: Task, methods: Sequence[Method], settings: Settings) -> list[Run]:
    """All runs, those of the search first for each method; every method sees the same batches for the same seed.

    The rate of the highest validation accuracy is taken; of several, the one with the lowest loss. A run that ends in
    numbers that are not finite counts as the worst.
    """
    order = torch.randperm(len(task.train.labels), generator=torch.Generator().manual_seed(SEARCH_SEED))
    held_out = len(order) // VALIDATION
    validation, rest = task.train.rows(order[:held_out]), task.train.rows(order[held_out:])
    runs: list[Run] = []
    for method in methods:
        search = [
            _train(task, method, rate, SEARCH_SEED, settings, rest, validation, "validation") for rate in settings.rates
        ]
        best = max(search, key=lambda run: (run.accuracy, -run.loss)).rate
        seeds = range(settings.seeds)
        runs += search
        runs += [_train(task, method, best, seed, settings, task.train, task.test, "test") for seed in seeds]
    return runs


def _train(
    task: Task, method: Method, rate: float, seed: int, settings: Settings, train: Batch, held_out: Batch, split: str
) -> Run:
    torch.manual_seed(seed)
    model = apply(method, task.model())
    rates = (HEAD_RATE, rate) if method.encoder else (rate, 0.0)
    steps = count_steps(len(train.labels), settings.batch_size, settings.epochs)
    training = Training(model, *rates, steps)
    training.fit(f"{method.name}, {rate:g}, {split}", train, settings.batch_size, settings.epochs, seed)
    scores = logits(model, held_out)
    loss = F.cross_entropy(scores, held_out.labels).item()
    parameters = encoder_parameters(model)
    # PEFT's models are cycles, which would pile up over dozens of runs.
    del model, training
    gc.collect()
    right = accuracy(scores, held_out.labels) if math.isfinite(loss) else 0.0
    return Run(split, method.name, parameters, rate, seed, right, loss if math.isfinite(loss) else math.inf)
