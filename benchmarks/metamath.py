"""A training loop of the shape of PEFT's MetaMathQA benchmark, on a random Llama-3.2-3B in bfloat16.

PEFT publishes times of all its methods for fine-tuning that model on MetaMathQA with batches of 4 (its
method_comparison/MetaMathQA). This loop does what a step there does, without the data: token ids are random, lengths
are drawn from a distribution with the same mean and limits, and batches are made in the same way, from buckets of 80
samples sorted by length, so that a step has about 840 tokens beside its padding. AdamW (lr 1e-4, weight decay 0.1,
cosine), gradients clipped at norm 1, adapters in float32.

Measures, one row each for every provider (`benchmarks.providers`):

* ``step``: one training step; `s_per_step` and `tokens_per_s` (without padding) are over all steps, `median_ms` and the
  percentiles over steps of different lengths; `ratio` compares `s_per_step` with `base` on the same batches. On a CUDA
  device the peaks of allocated and reserved memory of training, model included.
* ``decode``: a token with a cache of keys and values, batch 1, the adapter not merged.

Rows are named ``boft_ext-m2b8`` and so on. `base` is frozen and only passes gradients on to its embeddings. `peft` is
measured with m = 1, as it builds without its kernel, `peft-m` with m above 1. PEFT's dense providers take few steps on
the same batches as the others. A provider that runs out of memory has a row without numbers, with `note`. One model is
adapted and restored in turn, cheap providers first.
"""

from __future__ import annotations

import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.measure import Times, clock_of, times_of, timing_columns
from benchmarks.providers import DENSE, FAST, Provider, adapted, built_factors, plain_peft, trainable
from benchmarks.table import Table

COLUMNS = [
    *("level", "case", "provider", "dtype", "model", "targets", "measure", "tokens", "b", "m"),
    *("median_ms", "p20_ms", "p80_ms", "rounds", "ratio", "s_per_step", "tokens_per_s"),
    *("peak_mib", "peak_ratio", "reserved_mib", "reserved_ratio", "init_s", "trainable", "note"),
]
TARGETS = {
    "qv": ["q_proj", "v_proj"],
    "all": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
SHAPES = ((1, 4), (2, 4), (2, 8), (4, 4))  # (m, b)
BATCH, BUCKET_BATCHES = 4, 20
SHORTEST, LONGEST, MEDIAN_LENGTH, SPREAD = 60, 768, 190, 0.42
STEPS, WARM_UP, DENSE_STEPS = 20, 2, 3
PROMPT, NEW_TOKENS = 64, 24


class Size(NamedTuple):
    """A Llama: `name` in the tables, arguments of transformers' LlamaConfig, a factor for the lengths of samples."""

    name: str
    config: Mapping[str, object]
    length: float


LLAMA_3B = Size(
    "llama-3.2-3b",
    {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "tie_word_embeddings": True,
    },
    1.0,
)
TINY = Size(
    "llama-tiny",
    {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 500,
        "tie_word_embeddings": True,
    },
    0.1,
)


class Job(NamedTuple):
    """A provider with its BOFT shape, by the name of its rows; `steps` is how many batches it is given."""

    name: str
    provider: Provider
    b: int
    m: int
    steps: int


def jobs() -> list[Job]:
    """What is measured on one set of targets, the cheap ones first."""
    fast = [Job(name, FAST[name], 8, 2, STEPS) for name in ("base", "lora", "oft")]
    fast += [Job(f"boft_ext-m{m}b{b}", FAST["boft_ext"], b, m, STEPS) for m, b in SHAPES]
    fast += [Job(f"pr3540-m{m}b{b}", FAST["pr3540"], b, m, STEPS) for m, b in SHAPES]
    dense = [Job("peft-m1b4", DENSE["peft"], 4, 1, DENSE_STEPS)]
    return fast + dense + [Job(f"peft-m-m{m}b{b}", DENSE["peft-m"], b, m, DENSE_STEPS) for m, b in SHAPES if m > 1]


def run(table_dir: Path, tiny: bool, only: str | None, device: torch.device, budget_s: float = math.inf) -> None:
    """Measure all providers, or those whose case and name hold `only` (as in "llama-3.2-3b qv boft_ext-m2b8"), and
    `base`, which their ratios need; no case starts later than `budget_s` seconds after the first.

    Writes ``metamath.csv`` or ``metamath-cuda.csv`` into `table_dir`.
    """
    size = TINY if tiny else LLAMA_3B
    todo = [(targets, job) for targets in TARGETS for job in jobs()]
    todo.sort(key=lambda entry: entry[1].steps < STEPS)  # dense providers last, after all targets of the others
    if only is not None:
        todo = [entry for entry in todo if entry[1].name == "base" or only in f"{size.name} {entry[0]} {entry[1].name}"]
    table = Table(table_dir / "metamath.csv", COLUMNS, device)
    loop = _Loop(size, device, table)
    end = time.perf_counter() + budget_s
    left_out = []
    with tqdm(todo, desc="metamath", unit="case") as progress:
        for targets, job in progress:
            progress.set_postfix_str(f"{targets} {job.name}")
            if time.perf_counter() > end:
                left_out.append(f"{targets} {job.name}")
                continue
            loop.measure(targets, job)
    if left_out:
        print(f"metamath: no time for {', '.join(left_out)}", file=sys.stderr)


def lengths(count: int, factor: float, generator: torch.Generator) -> list[int]:
    """Tokens of `count` samples: log-normal, cut at the limits of PEFT's benchmark; 210 on average at a factor of 1."""
    drawn = MEDIAN_LENGTH * torch.exp(SPREAD * torch.randn(count, generator=generator))
    return (factor * drawn.clamp(SHORTEST, LONGEST)).round().int().tolist()


def batches(size: Size, device: torch.device) -> list[dict[str, Tensor]]:
    """The batches of one bucket, longest first as PEFT's iterator gives them, as keyword arguments of the model."""
    generator = torch.Generator().manual_seed(0)
    drawn = sorted(lengths(BATCH * BUCKET_BATCHES, size.length, generator), reverse=True)
    made = []
    for first in range(0, len(drawn), BATCH):
        rows = torch.tensor(drawn[first : first + BATCH])
        ids = torch.randint(0, size.config["vocab_size"], (BATCH, int(rows.max())), generator=generator)
        at = torch.arange(ids.shape[1])
        # As in PEFT's loop, the first token of the padding is the one that ends the text and counts.
        labels = ids.masked_fill(at > rows.unsqueeze(1), -100)
        batch = {"input_ids": ids, "attention_mask": (at < rows.unsqueeze(1)).long(), "labels": labels}
        made.append({name: tensor.to(device) for name, tensor in batch.items()})
    return made


class _Loop:
    """One model, adapted by one provider after another."""

    def __init__(self, size: Size, device: torch.device, table: Table) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.size, self.device, self.table = size, device, table
        torch.manual_seed(0)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with device:
                self.model = LlamaForCausalLM(LlamaConfig(**size.config))
        finally:
            torch.set_default_dtype(default)
        self.batches = batches(size, device)
        self.base: dict[str, dict[str, object]] = {}

    def measure(self, targets: str, job: Job) -> None:
        """Write the rows of one provider."""
        row = {
            "level": "metamath",
            "case": f"{self.size.name} {targets}",
            "provider": job.name,
            "dtype": "bf16",
            "model": self.size.name,
            "targets": targets,
        }
        try:
            with self._adapted(TARGETS[targets], job) as (model, init_s):
                m = built_factors(model)
                shape = {"b": job.b if m else None, "m": m}
                row |= shape | {"trainable": sum(p.numel() for p in trainable(model)), "init_s": init_s}
                base = self.base.setdefault(targets, {})
                self.table.add(**row, measure="step", **self._step(model, job, base))
                self.table.add(**row, measure="decode", tokens=1, **self._decode(model, job, base))
        except torch.OutOfMemoryError:
            self.table.add(**row, measure="step", note="out of memory")
        finally:
            plain_peft()
            self._free()

    @contextmanager
    def _adapted(self, targets: Sequence[str], job: Job) -> Iterator[tuple[nn.Module, float]]:
        """The model with adapters, and the seconds that took; afterwards it is as it was."""
        before = [
            (parent, name, child)
            for parent in self.model.modules()
            for name, child in parent.named_children()
            if name in targets
        ]
        hook = None
        start = time.perf_counter()
        try:
            made = adapted(job.provider, self.model, targets, job.b, job.m)
            if job.name == "base":
                embeddings = self.model.get_input_embeddings()
                hook = embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_())
            yield made.model, time.perf_counter() - start
        finally:
            if hook is not None:
                hook.remove()
            for parent, name, child in before:
                setattr(parent, name, child)
            vars(self.model).pop("peft_config", None)
            self.model.requires_grad_(False)
            for parameter in self.model.parameters():
                parameter.grad = None

    def _free(self) -> None:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _step(self, model: nn.Module, job: Job, base: dict[str, object]) -> dict[str, object]:
        """The columns of training; the times of `base` are left in `base`, by batch."""
        model.train()
        step = _training_step(model, job.name != "base")
        chosen = _spread(len(self.batches), job.steps)
        # The longest first, so that memory is allocated before anything is timed.
        for batch in self.batches[:WARM_UP]:
            step(batch)
        self._free()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        clock = clock_of(self.device)
        times = {i: clock(lambda: step(self.batches[i])) for i in chosen}
        if job.name == "base":
            base["steps"] = times
        tokens = sum(int(self.batches[i]["attention_mask"].sum()) for i in chosen)
        mean = statistics.mean(times.values())
        columns = timing_columns(times_of(list(times.values()))) | {
            "tokens": round(tokens / len(times)),
            "s_per_step": mean,
            "tokens_per_s": tokens / sum(times.values()),
            "ratio": mean / statistics.mean(base["steps"][i] for i in chosen) if "steps" in base else None,
        }
        if self.device.type != "cuda":
            return columns
        peaks = {"peak": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        if job.name == "base":
            base["peaks"] = peaks
        for name, value in peaks.items():
            columns[f"{name}_mib"] = value / 2**20
            columns[f"{name}_ratio"] = value / base["peaks"][name] if "peaks" in base else None
        return columns

    @torch.no_grad()
    def _decode(self, model: nn.Module, job: Job, base: dict[str, object]) -> dict[str, object]:
        """The columns of a decoded token."""
        model.eval()
        ids = self.batches[0]["input_ids"][:1, : min(PROMPT, self.batches[0]["input_ids"].shape[1])]
        cache = model(input_ids=ids, use_cache=True).past_key_values
        clock, samples = clock_of(self.device), []
        for _ in range(NEW_TOKENS if job.steps == STEPS else 4):
            samples.append(clock(lambda: model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)))
        times = times_of(samples[1:])
        if job.name == "base":
            base["decode"] = times
        reference: Times | None = base.get("decode")
        return timing_columns(times, reference) | {"tokens_per_s": 1 / times.median}


def _spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` places, evenly spread and symmetric, so that they have about the mean length."""
    return sorted({int((i + 0.5) * count / wanted) for i in range(min(wanted, count))})


def _training_step(model: nn.Module, trains: bool) -> Callable[[Mapping[str, Tensor]], None]:
    """A step of PEFT's loop for one batch, from clearing gradients to reading the loss."""
    parameters = trainable(model)
    optimiser = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.1) if trains else None
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 5000) if trains else None

    def step(batch: Mapping[str, Tensor]) -> None:
        if trains:
            optimiser.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        if trains:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
        assert math.isfinite(loss.item())

    return step
