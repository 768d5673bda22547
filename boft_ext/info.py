"""What this installation is made of: for bug reports and for checking that the expected kernels run."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

from . import ops

_ANY_DEVICE_KEYS = ("CompositeExplicitAutograd", "CompositeImplicitAutograd")


def build_info() -> dict[str, Any]:
    """Versions and kernels of this installation, as plain values that JSON can hold.

    Keys: `boft_ext`, `torch`, `python`, `peft` (versions; None if not installed), `torch_built_for` and `compiler` (of
    the compiled part), `cpu_kernels` (the variant in use), `cpu_kernels_available` (those this processor can run),
    `float32_products` (what multiplies float32 in merged layers: "boft_ext", and for sizes that are no multiples of 32
    oneDNN or MKL, where they are faster than "torch"), `cuda_architectures` (built in: sm_NN machine code, compute_NN
    code that drivers compile for newer devices; empty without CUDA), `cuda_streams` (True if there are CUDA kernels and
    this torch says which stream they belong on, so that they can be used), `device_independent_ops` (operators that also
    run on any other device of torch).

    Thread-safe; initialises no device and imports neither PEFT nor anything else.
    """
    return {
        "boft_ext": _version("boft-ext"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "peft": _version("peft"),
        **ops.compiled_info(),
        "device_independent_ops": _device_independent_ops(),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device_independent_ops() -> list[str]:
    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("boft::"))
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return sorted(
        name.removeprefix("boft::") for name in names if any(has_kernel(name, key) for key in _ANY_DEVICE_KEYS)
    )
