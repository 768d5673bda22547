"""The ways of fine-tuning that are compared: of about the same number of parameters, except the first and the last."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import peft
from torch import nn

import boft_ext

# The name of the new classifier in the models of both tasks; it trains fully in all methods.
HEAD = "head"


class Method(NamedTuple):
    """`config`: the adapter for linear layers of these names; None for the methods without one.

    `encoder`: whether anything in the encoder trains.
    """

    name: str
    config: Callable[[list[str]], peft.PeftConfig] | None = None
    encoder: bool = True


def _boft(m: int, b: int) -> Callable[[list[str]], peft.PeftConfig]:
    return lambda names: peft.BOFTConfig(
        boft_block_size=b, boft_n_butterfly_factor=m, target_modules=names, modules_to_save=[HEAD]
    )


def _lora(names: list[str]) -> peft.PeftConfig:
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=names, modules_to_save=[HEAD])


def _oft(names: list[str]) -> peft.PeftConfig:
    # Exact Cayley transforms, as BOFT's are; PEFT's default is a truncated series.
    return peft.OFTConfig(
        oft_block_size=16, use_cayley_neumann=False, target_modules=names, modules_to_save=[HEAD]
    )


METHODS = (
    Method("probe", encoder=False),
    Method("LoRA r4", _lora),
    Method("OFT b16", _oft),
    Method("BOFT m2 b8", _boft(2, 8)),
    Method("BOFT m4 b4", _boft(4, 4)),
    Method("full"),
)


def apply(method: Method, model: nn.Module) -> nn.Module:
    """`model` as `method` trains it: with an adapter on every linear layer below ``encoder``, frozen, or as it is.

    Call `boft_ext.patch_peft` first. The adapter begins with torch's random state.
    """
    model.encoder.requires_grad_(method.encoder)
    if method.config is None:
        return model
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.startswith("encoder.")]
    return peft.get_peft_model(model, method.config(names))


def encoder_parameters(model: nn.Module) -> int:
    """How many numbers of the encoder a method can change independently.

    For BOFT the effective ones, ``½(b−1)·d·m`` a layer and the scales: whole blocks are stored, but only their
    skew-symmetric part acts. PEFT's OFT stores just that part.
    """
    if isinstance(model, peft.PeftModel) and model.active_peft_config.peft_type == peft.PeftType.BOFT:
        return sum(total.effective for total in boft_ext.parameter_report(model).totals.values())
    named = model.named_parameters()
    return sum(value.numel() for name, value in named if value.requires_grad and f"{HEAD}." not in name)
