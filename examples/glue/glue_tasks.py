"""The GLUE tasks that the paper reports: their columns, metrics and the paper's learning rates."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

HUB = "nyu-mll/glue"
# Guesses and labels, ``(rows,)`` each, to a number.
Metric = Callable[[np.ndarray, np.ndarray], float]


def _accuracy(guesses: np.ndarray, labels: np.ndarray) -> float:
    return float(accuracy_score(labels, guesses))


def _f1(guesses: np.ndarray, labels: np.ndarray) -> float:
    return float(f1_score(labels, guesses))


def _matthews(guesses: np.ndarray, labels: np.ndarray) -> float:
    return float(matthews_corrcoef(labels, guesses))


def _pearson(guesses: np.ndarray, labels: np.ndarray) -> float:
    return float(pearsonr(labels, guesses).statistic)


def _spearman(guesses: np.ndarray, labels: np.ndarray) -> float:
    return float(spearmanr(labels, guesses).statistic)


class Task(NamedTuple):
    """A task: one or two text columns, metrics by name, the paper's learning rate, and how many epochs to train.

    The paper's table has no epochs that we know of; ours are few for the large tasks and more for the small ones.
    """

    columns: tuple[str, ...]
    metrics: dict[str, Metric]
    learning_rate: float
    epochs: int
    # By the name that their metrics begin with.
    validation: dict[str, str] = {"": "validation"}
    regression: bool = False


_PAIR = ("sentence1", "sentence2")
_ACCURACY: dict[str, Metric] = {"accuracy": _accuracy}
_ACCURACY_F1: dict[str, Metric] = {"accuracy": _accuracy, "f1": _f1}
_CORRELATION: dict[str, Metric] = {"pearson": _pearson, "spearman": _spearman}
_MATCHED = {"matched_": "validation_matched", "mismatched_": "validation_mismatched"}
TASKS = {
    "mnli": Task(("premise", "hypothesis"), _ACCURACY, 7e-5, 5, _MATCHED),
    "sst2": Task(("sentence",), _ACCURACY, 5e-5, 5),
    "mrpc": Task(_PAIR, _ACCURACY_F1, 8e-4, 20),
    "cola": Task(("sentence",), {"matthews": _matthews}, 5e-4, 20),
    "qnli": Task(("question", "sentence"), _ACCURACY, 2e-4, 5),
    "qqp": Task(("question1", "question2"), _ACCURACY_F1, 3e-4, 5),
    "rte": Task(_PAIR, _ACCURACY, 4e-4, 20),
    "stsb": Task(_PAIR, _CORRELATION, 7e-4, 20, regression=True),
}


class Rows(NamedTuple):
    """Texts, one or two a row, and labels: class numbers, or scores."""

    texts: list[tuple[str, ...]]
    labels: list[float]


def hub_splits(name: str) -> tuple[Rows, dict[str, Rows]]:
    """Training rows of a GLUE task from the model hub, and validation rows by what their metrics' names begin with.

    Raises: ValueError if they cannot be had.
    """
    import datasets  # not needed for files

    task = TASKS[name]
    try:
        splits = datasets.load_dataset(HUB, name)
    except Exception as error:  # of the network, the hub or the data set's format: whatever the library lets through
        raise ValueError(f"{HUB} {name} cannot be loaded: {str(error).splitlines()[0]}") from None

    def rows(split: str) -> Rows:
        columns = [splits[split][column] for column in task.columns]
        return Rows(list(zip(*columns, strict=True)), list(splits[split]["label"]))

    return rows("train"), {prefix: rows(split) for prefix, split in task.validation.items()}


def file_splits(name: str, train: Path, validation: Path) -> tuple[Rows, dict[str, Rows], list[str]]:
    """The same from two files with the task's columns and ``label``, and the names of the classes, none for scores.

    The ending of a file says what it is: .tsv (fields as they are), .csv, .json (a list) or .jsonl. Classes may be
    numbered from 0 or have names; those of the training file count.

    Raises: ValueError or OSError naming the file, and the column or the label.
    """
    task = TASKS[name]
    tables = {path: _read(path, (*task.columns, "label")) for path in (train, validation)}
    classes = [] if task.regression else _classes([record["label"] for record in tables[train]])
    parts = []
    for path, records in tables.items():
        try:
            labels = [_label(record["label"], classes) for record in records]
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        parts.append(Rows([tuple(str(record[column]) for column in task.columns) for record in records], labels))
    # A file may serve as both.
    return parts[0], {"": parts[-1]}, classes


def evaluate(task: Task, scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics of a task for what a model gave, ``(rows, classes)`` or, as scores, ``(rows, 1)``."""
    guesses = scores.reshape(len(scores)) if task.regression else scores.argmax(-1)
    return {name: metric(guesses, labels) for name, metric in task.metrics.items()}


def _read(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="") as file:
        try:
            if path.suffix == ".json":
                records = json.load(file)
            elif path.suffix == ".jsonl":
                records = [json.loads(line) for line in file if line.strip()]
            elif path.suffix == ".tsv":
                records = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
            elif path.suffix == ".csv":
                records = list(csv.DictReader(file))
            else:
                raise ValueError(f"{path} is none of .tsv, .csv, .json, .jsonl")
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None
    if not records:
        raise ValueError(f"{path} holds no rows")
    for number, record in enumerate(records, 1):
        missing = [column for column in columns if not isinstance(record, dict) or record.get(column) is None]
        if missing:
            raise ValueError(f"{path}, row {number}: nothing in column {', '.join(missing)}")
    return records


def _classes(labels: list[Any]) -> list[str]:
    """Names of the classes, by number: "0", "1", ... if they are numbers."""
    names = {str(label) for label in labels}
    if all(name.isdecimal() for name in names):
        return [str(number) for number in range(max(map(int, names)) + 1)]
    return sorted(names)


def _label(label: Any, classes: list[str]) -> float:
    if not classes:
        return float(label)
    if str(label) not in classes:
        raise ValueError(f"label {label!r} is none of the training file's: {', '.join(classes)}")
    return classes.index(str(label))
