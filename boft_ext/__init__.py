"""Orthogonal Butterfly fine-tuning (BOFT, ICLR 2024) on C kernels: functions, layers, adapters, and PEFT's BOFT on them.

See README.md for examples; `python -m boft_ext info` says what this installation is made of.
"""

from . import functional
from .adapter import load_adapter, save_adapter, wrap
from .config import BOFTConfig
from .info import build_info
from .nn import BOFTConv2d, BOFTLinear
from .peft_swap import patch_peft, peft_is_patched, unpatch_peft
from .saved import saved_activations, set_saved_activations

__all__ = [
    "BOFTConfig",
    "BOFTConv2d",
    "BOFTLinear",
    "build_info",
    "functional",
    "load_adapter",
    "patch_peft",
    "peft_is_patched",
    "save_adapter",
    "saved_activations",
    "set_saved_activations",
    "unpatch_peft",
    "wrap",
]
