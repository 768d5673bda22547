"""The ways of adapting a model that are measured side by side, by the names the tables give them.

`base` is frozen and only passes gradients on to its input; `base-trainable` trains the weights of the target layers.
`lora` has r = 32 and `oft` block size 32, whatever b and m are. `peft` is PEFT's BOFT as installed, which without its
CUDA kernel silently builds m = 1; `peft-m` is the same with `torch.block_diag` in place of the kernel, so that m is
honoured. `pr3540` is `benchmarks.pr3540`, `boft_ext` PEFT's BOFT under `boft_ext.patch_peft`, `boft_ext-wrap`
`boft_ext.wrap`. `boft_ext-compact` and `boft_ext-recompute` are `boft_ext` with these modes of
`boft_ext.set_saved_activations`.

A process has PEFT patched or not, so each provider says what must be in force while it is built and used. PEFT's own
layers keep dense ``(m, d, d)`` tables and take up to a hundred times as long as the others; `patch_peft` takes over all
of them that are alive. So they are measured in turns of their own (`DENSE`), with another `base` beside them, for a few
rounds, up to `DENSE_CHANNELS` channels; everything else shares one series of turns (`FAST`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from peft import BOFTConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model
from peft.tuners.boft import layer as peft_layer
from torch import Tensor, nn

import boft_ext
from benchmarks import pr3540
from benchmarks.measure import Times, in_turns
from tests.peft_oracle import peft_mathematics

DENSE_CHANNELS = 2048
DENSE_ROUNDS = 3


class Provider(NamedTuple):
    """How to adapt a model.

    Attributes:
        adapt: ``(model, target names, b, m)``, changes the model in place and returns it with its adapters trainable.
        prepare: brings PEFT into the state in which the provider is built and used; cheap where it is in it already.
    """

    adapt: Callable[[nn.Module, Sequence[str], int, int], nn.Module]
    prepare: Callable[[], None]


class Adapted(NamedTuple):
    """An adapted model and what it was made with."""

    provider: Provider
    model: nn.Module
    b: int
    m: int


_mathematics = contextlib.ExitStack()


def _any_peft() -> None:
    """For what does not touch PEFT's BOFT classes."""


def try_peft_kernel_once() -> None:
    """PEFT's own kernel, which it tries to compile for every layer anew, is tried once in this process."""
    peft_layer.get_fbd_cuda = functools.cache(peft_layer.get_fbd_cuda)


def plain_peft() -> None:
    """PEFT as installed, and boft_ext saving activations as they are."""
    _mathematics.close()
    boft_ext.unpatch_peft()
    boft_ext.set_saved_activations("exact")


def _peft_mathematics() -> None:
    plain_peft()
    _mathematics.enter_context(peft_mathematics())


def _patched_peft(saved: str = "exact") -> None:
    _mathematics.close()
    boft_ext.patch_peft(strict=True)
    boft_ext.set_saved_activations(saved)


def _freeze(model: nn.Module, targets: Sequence[str], b: int, m: int) -> nn.Module:
    return model.requires_grad_(False)


def _train_weights(model: nn.Module, targets: Sequence[str], b: int, m: int) -> nn.Module:
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if any(f".{name}".endswith(f".{target}") for target in targets):
            module.weight.requires_grad_()
    return model


def _lora(model: nn.Module, targets: Sequence[str], b: int, m: int) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=32, lora_alpha=32, target_modules=list(targets)))


def _oft(model: nn.Module, targets: Sequence[str], b: int, m: int) -> nn.Module:
    return get_peft_model(model, OFTConfig(oft_block_size=32, target_modules=list(targets)))


def _boft(model: nn.Module, targets: Sequence[str], b: int, m: int) -> nn.Module:
    config = BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, target_modules=list(targets))
    return get_peft_model(model, config)


def _wrap(model: nn.Module, targets: Sequence[str], b: int, m: int) -> nn.Module:
    config = boft_ext.BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, target_modules=list(targets))
    return boft_ext.wrap(model, config)


BASE = Provider(_freeze, _any_peft)
FAST = {
    "base": BASE,
    "lora": Provider(_lora, _any_peft),
    "oft": Provider(_oft, _any_peft),
    "pr3540": Provider(pr3540.adapt, _any_peft),
    "boft_ext": Provider(_boft, _patched_peft),
    "boft_ext-compact": Provider(_boft, functools.partial(_patched_peft, "compact")),
}
DENSE = {
    "base": BASE,
    "peft": Provider(_boft, plain_peft),
    "peft-m": Provider(_boft, _peft_mathematics),
}
# Beside FAST for models only, whose memory it is for.
RECOMPUTE = {"boft_ext-recompute": Provider(_boft, functools.partial(_patched_peft, "recompute"))}
# Beside FAST for single layers only.
BASE_TRAINABLE = {"base-trainable": Provider(_train_weights, _any_peft)}
WRAP = {"boft_ext-wrap": Provider(_wrap, functools.partial(boft_ext.set_saved_activations, "exact"))}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of `model` that train."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def adapted(provider: Provider, model: nn.Module, targets: Sequence[str], b: int, m: int) -> Adapted:
    """`model`, adapted in place, with its adapter moved away from the identity by small seeded numbers."""
    provider.prepare()
    model = provider.adapt(model, targets, b, m)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable(model):
            noise = 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter += noise.to(parameter.device)
    return Adapted(provider, model, b, m)


def without_wrapper(model: nn.Module) -> nn.Module:
    """The model that was adapted, without PEFT's `PeftModel` around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def built_factors(model: nn.Module) -> int | None:
    """The number of butterfly factors that the layers of `model` have; None if it has no BOFT layers."""
    factors = {p.shape[0] for name, p in model.named_parameters() if "boft_R" in name}
    assert len(factors) < 2, f"layers differ in m: {factors}"
    return factors.pop() if factors else None


def tensors(model: nn.Module) -> list[Tensor]:
    """What `model` keeps alive: parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


def times_in_turns(
    providers: Mapping[str, Provider],
    steps: Mapping[str, Callable[[], object]],
    budget_s: float,
    min_rounds: int,
    before: Mapping[str, Callable[[], object]] | None = None,
    device: torch.device = torch.device("cpu"),
) -> dict[str, Times]:
    """`measure.in_turns`, with each provider's `prepare`, then its `before`, run untimed before its step."""

    def ready(name: str) -> None:
        providers[name].prepare()
        if before is not None:
            before[name]()

    hooks = {name: functools.partial(ready, name) for name in steps}
    return in_turns(steps, budget_s, min_rounds, hooks, device)
