"""Instruction data: read, written out as prompt and answer, and turned into tokens, only the answers' to be learned.

A record is one of
    {"instruction": ..., "input": ... (may be missing), "output": ...}      Alpaca
    {"query": ..., "response": ...}, {"question": ..., "answer": ...}       MetaMathQA, GSM8K
    {"messages": [{"role": "system" | "user" | "assistant", "content": ...}, ...]}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Answers that end in a result name it after one of these: MetaMathQA, GSM8K.
_RESULT_MARKS = ("The answer is:", "####")
_FORMS = (("instruction", "output"), ("query", "response"), ("question", "answer"))
IGNORED = -100


class Text(NamedTuple):
    """One example: the whole text, the character ranges of it that are learned, and the last prompt and answer.

    `whole` and `prompt` contain the special tokens of a chat template if `chat`; otherwise the tokenizer adds them.
    """

    whole: str
    learned: tuple[tuple[int, int], ...]
    prompt: str
    answer: str
    chat: bool


class Row(NamedTuple):
    """Token ids (int32) and which of them are learned (bool), both ``(tokens,)``."""

    ids: Tensor
    learned: Tensor


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a ``.json`` file with a list, or of a file with one record a line.

    Raises: ValueError or OSError with the path, and the line where there is one.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        lines = [(1, text)]
    else:
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    records: list[Any] = []
    for number, line in lines:
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number + error.lineno - 1}: not JSON: {error.msg}") from None
        records += value if path.suffix == ".json" and isinstance(value, list) else [value]
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict) or not _is_known(record):
            keys = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"{path}, record {number}: no instruction and output, and no messages, but {keys}")
    if not records:
        raise ValueError(f"{path} holds no records")
    return records


def hub_records(name: str) -> list[dict[str, Any]]:
    """The records of the training split of a data set on the model hub. Raises: ValueError if they cannot be had."""
    import datasets  # not needed for files

    try:
        return list(datasets.load_dataset(name, split="train"))
    except Exception as error:  # of the network, the hub or the data set's format: whatever the library lets through
        raise ValueError(f"the data set {name} cannot be loaded: {str(error).splitlines()[0]}") from None


def write_out(record: dict[str, Any], tokenizer: Any, chat: bool) -> Text:
    """Prompt and answer of a record: in the tokenizer's chat template, or below plain headings.

    Raises: ValueError for messages, or `chat`, without a chat template; for messages that end without an answer.
    """
    messages = record.get("messages")
    if messages is None and not chat:
        prompt, answer = _plain_prompt(record), _answer(record)
        whole = prompt + answer + tokenizer.eos_token
        return Text(whole, ((len(prompt), len(whole)),), prompt, answer, False)
    if messages is None:
        question = "\n\n".join(part for part in _question(record) if part)
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": _answer(record)}]
    if not tokenizer.chat_template:
        raise ValueError("messages and --prompt chat need a tokenizer with a chat template, and the model's has none")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message of a record has the role {messages[-1]['role']!r}, not 'assistant'")
    return _chat_text(messages, tokenizer)


def encode(text: Text, tokenizer: Any, max_length: int) -> Row | None:
    """The tokens of `text`, cut after `max_length`; None if nothing is left to learn.

    The text is split into tokens as a whole, as at inference, and a token is learned if it starts in an answer.
    """
    tokens = tokenizer(
        text.whole,
        add_special_tokens=not text.chat,
        truncation=True,
        max_length=max_length,
        return_offsets_mapping=True,
    )
    learned = [
        any(first <= start < last for first, last in text.learned) and start < end
        for start, end in tokens["offset_mapping"]
    ]
    if not any(learned):
        return None
    return Row(torch.tensor(tokens["input_ids"], dtype=torch.int32), torch.tensor(learned))


class Padding:
    """Puts `Row`s into one batch: padded on the right, labels of what is not learned are -100."""

    def __init__(self, pad_id: int, multiple: int = 8) -> None:
        self._pad_id, self._multiple = pad_id, multiple

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        longest = -(-max(len(row.ids) for row in rows) // self._multiple) * self._multiple
        ids = torch.full((len(rows), longest), self._pad_id)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, IGNORED)
        for index, (tokens, learned) in enumerate(rows):
            ids[index, : len(tokens)] = tokens
            mask[index, : len(tokens)] = 1
            labels[index, : len(tokens)] = torch.where(learned, tokens.long(), IGNORED)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def result(answer: str) -> str:
    """What counts of an answer: what follows the last mark of a result, or all of it."""
    for mark in _RESULT_MARKS:
        answer = answer.rpartition(mark)[2]
    return answer.strip().rstrip(".")


def _is_known(record: dict[str, Any]) -> bool:
    messages = record.get("messages")
    if isinstance(messages, list) and messages:
        return all(isinstance(message, dict) and {"role", "content"} <= set(message) for message in messages)
    return any(isinstance(record.get(a), str) and isinstance(record.get(b), str) for a, b in _FORMS)


def _question(record: dict[str, Any]) -> tuple[str, str]:
    key = next(first for first, last in _FORMS if first in record and last in record)
    return record[key].strip(), (record.get("input") or "").strip() if key == "instruction" else ""


def _answer(record: dict[str, Any]) -> str:
    return next(record[last] for first, last in _FORMS if first in record and last in record).strip()


def _plain_prompt(record: dict[str, Any]) -> str:
    instruction, more = _question(record)
    given = f"### Input:\n{more}\n\n" if more else ""
    return f"### Instruction:\n{instruction}\n\n{given}### Response:\n"


def _chat_text(messages: list[dict[str, str]], tokenizer: Any) -> Text:
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    learned, prompt = [], ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        last = index == len(messages) - 1
        end = whole if last else tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        if not (whole.startswith(prompt) and whole.startswith(end)):
            raise ValueError("the model's chat template writes earlier messages differently once others follow")
        learned.append((len(prompt), len(end)))
    return Text(whole, tuple(learned), prompt, messages[-1]["content"].strip(), True)
