"""Orthogonal Butterfly fine-tuning (BOFT, ICLR 2024) on C kernels: functions, layers, adapters, and PEFT's BOFT layers.

See README.md for examples; `python -m boft_ext info` says what this installation is made of.
"""

from . import functional
from .adapter import load_adapter, save_adapter, wrap
from .config import BOFTConfig
from .environment import load_ipython_extension, unload_ipython_extension
from .export import export_merged
from .info import build_info
from .lora import export_lora
from .memory import release_memory
from .nn import BOFTConv2d, BOFTLinear
from .peft_swap import patch_peft, peft_is_patched, unpatch_peft
from .report import parameter_report
from .saved import saved_activations, set_saved_activations
from .suggest import suggest_config

__all__ = [
    "BOFTConfig",
    "BOFTConv2d",
    "BOFTLinear",
    "build_info",
    "export_lora",
    "export_merged",
    "functional",
    "load_adapter",
    "load_ipython_extension",
    "parameter_report",
    "patch_peft",
    "peft_is_patched",
    "release_memory",
    "save_adapter",
    "saved_activations",
    "set_saved_activations",
    "suggest_config",
    "unload_ipython_extension",
    "unpatch_peft",
    "wrap",
]
