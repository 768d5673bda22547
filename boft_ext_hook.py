"""Patches Hugging Face PEFT at the end of its import, whoever imports it, and imports nothing before.

Not a part of the package boft_ext, which imports torch: after ``boft-ext enable`` this runs at the start of every
Python process of the environment, so it uses only what Python itself has loaded by then.
"""

import os
import sys

_PEFT = "peft"
_finder = None


def install(**options):
    """Have `boft_ext.patch_peft` called with `options` as soon as PEFT has been imported, or now if it has been.

    Replaces the options of an earlier call. Where boft_ext cannot be imported by then, one warning says why and PEFT is
    left as it is. Thread-safe except against itself and `uninstall`.
    """
    global _finder
    uninstall()
    _finder = _Finder(options)
    sys.meta_path.insert(0, _finder)
    if _PEFT in sys.modules:
        _patch()


def uninstall():
    """Patch PEFT no more when it is imported. A patch that is in force stays; nothing happens if not installed."""
    global _finder
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    _finder = None


def install_with_children(**options):
    """`install`, also in the processes that multiprocessing spawns from here or from a spawned process.

    They learn of it before they run the program's main module again.
    """
    from multiprocessing import spawn

    install(**options)
    if isinstance(spawn.get_preparation_data, _PreparationData):
        spawn.get_preparation_data.options = options
    else:
        spawn.get_preparation_data = _PreparationData(spawn.get_preparation_data, options)


def start():
    """What Python calls when it starts in an environment with ``boft-ext enable``; nothing if BOFT_EXT is 0."""
    if os.environ.get("BOFT_EXT") != "0":
        install()


class _Finder:
    """First in `sys.meta_path`: lets the others find PEFT, and has its loader patch when it has run."""

    def __init__(self, options):
        self.options = options

    def find_spec(self, name, path=None, target=None):
        if name != _PEFT:
            return None
        for finder in [other for other in sys.meta_path if other is not self and hasattr(other, "find_spec")]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    _patch_after(spec.loader)
                return spec
        return None


def _patch_after(loader):
    # On the loader itself, so that it keeps its type and whatever else it can do.
    own = loader.exec_module

    def exec_module(module):
        own(module)
        if module.__name__ == _PEFT:
            _patch()

    loader.exec_module = exec_module


def _patch():
    finder = _finder
    if finder is None:
        return
    try:
        import boft_ext
    except ImportError as error:
        import warnings

        warnings.warn(f"PEFT is left as it is: boft_ext cannot be imported: {error}", stacklevel=2)
    else:
        boft_ext.patch_peft(**finder.options)


class _PreparationData:
    """Stands for the function of multiprocessing that collects what a spawned process is told first."""

    def __init__(self, own, options):
        self.own = own
        self.options = options

    def __call__(self, name):
        return {**self.own(name), "boft_ext_hook": _ForChildren(self.options)}


class _ForChildren:
    """Installs the hook where it is unpickled."""

    def __init__(self, options):
        self.options = options

    def __reduce__(self):
        # A spawned process sets up sys.path only after it has unpickled this.
        folder = os.path.dirname(os.path.abspath(__file__))
        source = f"import sys; sys.path.insert(0, {folder!r}); import boft_ext_hook; "
        return exec, (f"{source}boft_ext_hook.install_with_children(**{self.options!r})", {})
