"""What the recipes leave in their output folders, as their tests look at it."""

import json

import safetensors.torch


def metrics_of(output):
    """What the run with this output folder has measured."""
    return json.loads((output / "metrics.json").read_text(encoding="utf-8"))


def adapter_config(output, component="adapter"):
    """The configuration of the adapter, of one component of a diffusion model, that a run has left."""
    return json.loads((output / component / "adapter_config.json").read_text(encoding="utf-8"))


def stored(output, component="adapter"):
    """The tensors of such an adapter by name."""
    return safetensors.torch.load_file(output / component / "adapter_model.safetensors")


def same_weights(*outputs, component="adapter"):
    """Whether the files of such adapters are the same, byte by byte."""
    return len({(output / component / "adapter_model.safetensors").read_bytes() for output in outputs}) == 1
