"""Adapters: their configuration from the command line, and those of diffusion models in and out of PEFT's files."""

from __future__ import annotations

import argparse
import copy
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import BOFTConfig, PeftModel, get_peft_model_state_dict
from torch import nn

from .arguments import fail

# A diffusion model's own state dict lacks this, and PEFT loads nothing from a file without it, with only a warning.
_PREFIX = "base_model.model."


def boft_config(options: argparse.Namespace, targets: Iterable[str] | str, **more: Any) -> BOFTConfig:
    """The configuration that the options of `arguments.add_boft_options` describe, for the layers `targets`.

    `more` goes to it as it is.
    """
    size, count = options.boft_blocks
    return BOFTConfig(
        boft_block_size=size,
        boft_block_num=count,
        boft_n_butterfly_factor=options.boft_factors,
        boft_dropout=options.boft_dropout,
        bias=options.boft_bias,
        target_modules=targets if isinstance(targets, str) else list(targets),
        **more,
    )


def save_adapter(model: nn.Module, folder: Path, base: str) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` of the adapter "default" of `model`, in float32.

    PEFT's own writer needs a PeftModel, which a diffusion model with an adapter is not.

    Args:
        model: adapted by `add_adapter` of diffusers or transformers.
        base: name or folder of the base model, for the configuration.
    """
    config = copy.copy(model.peft_config["default"])
    config.inference_mode = True
    config.base_model_name_or_path = base
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {
        _PREFIX + name: value.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)
        for name, value in state.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)


def load_adapter(model: nn.Module, folder: Path, merge: bool) -> nn.Module:
    """`model`, whose layers then have the adapter in `folder`, or with `merge` its own layers with the adapter in their
    weights. One line and status 2 where the files are missing or do not belong to this model."""
    with warnings.catch_warnings():
        # PEFT's only sign that a file does not have what the model needs.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        try:
            adapted = PeftModel.from_pretrained(model, str(folder))
        except (ValueError, OSError, RuntimeError, UserWarning) as error:
            fail(f"the adapter in {folder} cannot be loaded: {' '.join(str(error).split())[:300]}")
    return adapted.merge_and_unload() if merge else adapted.get_base_model()
