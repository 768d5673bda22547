"""The check that the compiled module fits this Python and torch, made before it is loaded.

A mismatch would otherwise surface as an undefined symbol, or not at all until something crashes.
"""
import importlib.util
import os
import sys

import torch

_BUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def _minor(version):
    return version.split(".")[:2]


def check():
    """Raise ImportError, with the remedy, unless boft_ext._C exists and was built for the running Python and torch.

    Two torch versions fit when their major and minor numbers agree: within one minor version torch keeps its C++ ABI.
    Touches no state; safe from any thread.
    """
    try:
        from . import _build
    except ImportError:
        raise ImportError(f"boft_ext in {os.path.dirname(__file__)} is not built: it has no compiled module. In its "
                          f"source tree run `{_BUILD}` (for development: `make build`)") from None
    running = torch.__version__
    if _minor(_build.TORCH) != _minor(running):
        raise ImportError(f"boft_ext was built for torch {_build.TORCH}, running torch is {running}: rebuild it, in its "
                          f"source tree, with `{_BUILD}`")
    if importlib.util.find_spec(f"{__package__}._C") is None:
        raise ImportError(f"boft_ext has no compiled module for Python {sys.version.split()[0]} (the last build was for "
                          f"Python {_build.PYTHON}): rebuild it, in its source tree, with `{_BUILD}`")
