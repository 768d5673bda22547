"""Adapters that a diffusion model's own `add_adapter` made, in and out of PEFT's two files."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import safetensors.torch
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import nn

from .arguments import fail

# A diffusion model's own state dict lacks this, and PEFT loads nothing from a file without it, with only a warning.
_PREFIX = "base_model.model."


def save_adapter(model: nn.Module, folder: Path, base: str) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` of the adapter "default" of `model`, in float32.

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
