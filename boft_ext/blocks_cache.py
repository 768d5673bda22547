"""Collapsed blocks reused between inference calls, never stale.

Version counters do not see ``p.data.copy_(ema)`` or a sharded optimiser swapping storage, so an entry is valid only
while the bytes of its parameter equal the copy, on the CPU the digest, kept beside it. Entries are keyed weakly by the
parameter object: they die with it and are never copied, pickled or saved with a module.

Where a device's own kernels build the blocks, nothing is kept: that is one small launch, and comparing would have the
process wait for the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import _C


class _Entry(NamedTuple):
    """Immutable, so that a thread that read it can go on using it while another replaces it."""

    parameter: Tensor
    blocks: Tensor


_entries: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def cached_blocks(boft_R: Tensor, dtype: torch.dtype) -> Tensor:
    """The collapsed blocks of `boft_R` in `dtype` (float32 or float64), without gradient.

    On the CPU the compiled module keeps them (csrc/torch/inference.cpp), for devices without kernels this one.

    Args:
        boft_R: ``(m, D, b, b)``, any floating dtype.

    Returns: the vector of ``torch.ops.boft.blocks``; read-only, shared between calls. Thread-safe: concurrent first
    calls may compute the same blocks twice.
    """
    compiled = _C.cached_blocks(boft_R, dtype == torch.float64)
    if compiled is not None:
        return compiled
    if boft_R.is_cuda and _C.has_kernels(boft_R):
        return torch.ops.boft.blocks(boft_R.detach().to(dtype), None)[0]
    entry = _entries.get(boft_R)
    if entry is None or entry.blocks.dtype != dtype or not _same_bytes(entry.parameter, boft_R):
        # A tensor made in inference mode could never be saved for a later backward.
        with torch.inference_mode(False), torch.no_grad():
            parameter = boft_R.detach().clone()
            entry = _Entry(parameter, torch.ops.boft.blocks(parameter.to(dtype), None)[0])
        _entries[boft_R] = entry
    return entry.blocks


def _same_bytes(kept: Tensor, now: Tensor) -> bool:
    """Whether two tensors hold the same values; NaN never matches, so broken parameters are computed anew."""
    return kept.device == now.device and kept.dtype == now.dtype and torch.equal(kept, now)
