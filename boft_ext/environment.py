"""Patching PEFT without a line in the program: for every Python of an environment, or for a notebook."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Any

import boft_ext_hook

from . import log, peft_swap

# Python executes a line of such a file when it starts if the line begins with "import ". The package may be gone then.
_LINE = (
    'import sys; exec("try:\\n import boft_ext_hook\\nexcept ImportError:\\n pass\\nelse:\\n boft_ext_hook.start()")\n'
)


def startup_file() -> Path:
    """The file in the environment's ``site-packages`` by which `enable` works; it need not exist."""
    return Path(sysconfig.get_path("purelib"), "boft_ext_enable.pth")


def enable() -> Path:
    """Have every Python of this environment that starts from now on patch PEFT when it imports PEFT.

    With ``BOFT_EXT=0`` in its environment a process does not. The file stays without effect if this package is removed.

    Returns: the file written. Raises: OSError naming the file where it cannot be written.
    """
    path = startup_file()
    path.write_text(_LINE)
    return path


def disable() -> Path | None:
    """Undo `enable`. Returns the file removed, or None if there was none; OSError where it cannot be removed."""
    path = startup_file()
    try:
        path.unlink()
    except FileNotFoundError:
        return None
    return path


def describe() -> str:
    """One or two lines: whether this environment is enabled, by which file, and whether BOFT_EXT switches it off."""
    path = startup_file()
    if not path.is_file():
        return f"not enabled: {path} does not exist"
    off = os.environ.get("BOFT_EXT") == "0"
    return f"enabled by {path}" + ("\nbut switched off where BOFT_EXT=0, as here" if off else "")


def load_ipython_extension(ipython: Any) -> None:
    """``%load_ext boft_ext``: patch PEFT now if it has been imported, otherwise when it is. `ipython` is not used."""
    log.show()
    boft_ext_hook.install()


def unload_ipython_extension(ipython: Any) -> None:
    """``%unload_ext boft_ext``: undo `load_ipython_extension` and `boft_ext.unpatch_peft`. `ipython` is not used."""
    boft_ext_hook.uninstall()
    peft_swap.unpatch_peft()
