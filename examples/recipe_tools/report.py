"""PEFT on boft_ext's kernels, and what a recipe says about it in its first log line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

import boft_ext

from .arguments import fail

# The paper's rule drops a share of the blocks in each factor; PEFT's rounds `0.1` of 8 blocks down to none.
PAPER_DROPOUT = "paper"


def patch(dropout: str = PAPER_DROPOUT) -> None:
    """Run PEFT's BOFT layers on boft_ext; one line and status 2 where this PEFT has a layout that it does not know."""
    try:
        boft_ext.patch_peft(strict=True, dropout=dropout)
    except Exception as error:  # whatever it is, the recipe would go on without the kernels that it is about
        fail(f"PEFT cannot run on boft_ext: {error}")


def adapt(add: Callable[[], Any]) -> Any:
    """What `add` returns, which puts a BOFT adapter into a model. One line and status 2 for a configuration that does
    not fit: a block size that does not divide, too many factors, or no layer of the names asked for."""
    try:
        return add()
    except (ValueError, TypeError) as error:
        fail(" ".join(str(error).split()))


def first_line(model: nn.Module) -> str:
    """``boft_ext 0.1 on cpu (kernels: avx512): BOFT m=2 b=8 on 24 layers, 1,000 trainable parameters, 600 effective``.

    Args:
        model: with a BOFT adapter, by whatever way. Trainable parameters count everything that trains, as stored;
            effective ones what rotates and scales (paper, section 4).
    """
    report = boft_ext.parameter_report(model)
    info = boft_ext.build_info()
    first = next(model.parameters())
    kernels = info["cpu_kernels"]
    if first.device.type != "cpu":
        kernels = ", ".join(info["cuda_architectures"]) if first.device.type == "cuda" else ""
    factors = "/".join(map(str, sorted({row.m for row in report.rows})))
    sizes = "/".join(map(str, sorted({row.b for row in report.rows})))
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    effective = sum(total.effective for total in report.totals.values())
    return (
        f"boft_ext {info['boft_ext']} on {first.device.type} (kernels: {kernels or 'plain torch'}): "
        f"BOFT m={factors} b={sizes} on {len({row.layer for row in report.rows})} layers, "
        f"{trainable:,} trainable parameters, {effective:,} effective"
    )
