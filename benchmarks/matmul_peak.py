"""The multiply-add peak of a CUDA device, for floors of flops."""

from __future__ import annotations

import torch

from examples.step_cost import gpu_seconds

_SIZE, _REPEATS = 8192, 5


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of the fastest of a few products of large random matrices: tensor cores for 16-bit dtypes,
    multiply-adds for float32 (torch rounds its inputs to TF32 only when told to)."""
    a, b = (torch.randn(_SIZE, _SIZE, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2.0 * _SIZE**3 / min(gpu_seconds(lambda: torch.mm(a, b, out=out)) for _ in range(1 + _REPEATS))
