"""Counting what a step of a full-size model needs, with torch's fake tensors, which hold no numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode


def on_fake_cpu(module: nn.Module) -> nn.Module:
    """`module`, made on the meta device, with parameters and buffers that say they are on the CPU, because adapters on
    the meta device cannot run. Called under `FakeTensorMode`."""
    for part in module.modules():
        for values in (part._parameters, part._buffers):
            for name, value in values.items():
                if value is not None:
                    empty = torch.empty_like(value, device="cpu")
                    parameter = isinstance(value, nn.Parameter)
                    values[name] = nn.Parameter(empty, value.requires_grad) if parameter else empty
    return module


def saved_and_flop(module: nn.Module, forward: Callable[[], Tensor]) -> tuple[int, int]:
    """Bytes that `forward` saves for the backward pass, without the parameters of `module`, and the flop of both
    passes, without the rotations. Called under `FakeTensorMode`."""
    parameters = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            saved[storage._cdata] = storage
        return tensor

    with FlopCounterMode(display=False) as counter:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            output = forward()
        output.float().square().mean().backward()
    return sum(storage.nbytes() for storage in saved.values()), counter.get_total_flops()
