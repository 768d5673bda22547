"""``python -m boft_ext run``: an unmodified program, with PEFT's BOFT layers on this package's kernels."""

from __future__ import annotations

import builtins
import importlib.util
import io
import os
import sys
import types
from collections.abc import Sequence
from importlib.machinery import SourceFileLoader
from typing import Any

import boft_ext_hook

from . import log


def run(program: str, arguments: Sequence[str], as_module: bool = False, **options: Any) -> None:
    """Run `program` as Python itself would, as the main module of this process, and patch PEFT when it imports it.

    `sys.argv`, `sys.path[0]`, ``__main__``, the exit status and the traceback of an error are those of ``python program
    arguments`` or ``python -m program arguments``. Processes that multiprocessing spawns patch PEFT too.

    Args:
        program: path of a script, or the name of a module or package if `as_module`.
        arguments: what the program finds in ``sys.argv[1:]``.
        options: those of `boft_ext.patch_peft`.

    Returns when the program has ended by itself. Raises: what the program raises, SystemExit included; SystemExit where
    there is no such program. Call it once, from the main thread, as the last thing a process does.
    """
    log.show()
    boft_ext_hook.install_with_children(**options)
    # Python put one entry there for the command that started this process, unless it was told not to.
    if not getattr(sys.flags, "safe_path", sys.flags.isolated):
        sys.path[0] = os.getcwd() if as_module else os.path.dirname(os.path.realpath(program))
    sys.argv[:] = ["-m" if as_module else program, *arguments]
    prepare = _prepare_module if as_module else _prepare_script
    try:
        code = prepare(program)
        exec(code, vars(sys.modules["__main__"]))
    except SystemExit:
        raise
    except BaseException:
        _show_without_own_frames()
        raise


def _replace_main(**attributes: Any) -> None:
    main = types.ModuleType("__main__")
    if sys.version_info < (3, 14):
        main.__annotations__ = {}
    vars(main).update(__builtins__=builtins, **attributes)
    sys.modules["__main__"] = main


def _prepare_script(path: str) -> types.CodeType:
    absolute = os.path.abspath(path)
    try:
        with io.open_code(absolute) as file:
            source = file.read()
    except OSError as error:
        reason = f"[Errno {error.errno}] {error.strerror}"
        print(f"{sys.executable}: can't open file {absolute!r}: {reason}", file=sys.stderr)
        raise SystemExit(2) from None
    _replace_main(__file__=absolute, __cached__=None, __loader__=SourceFileLoader("__main__", absolute))
    return compile(source, absolute, "exec", dont_inherit=True)


def _prepare_module(name: str) -> types.CodeType:
    spec = _find(name)
    if spec is not None and spec.submodule_search_locations is not None:
        package, name = name, f"{name}.__main__"
        spec = _find(name)
        if spec is None:
            _refuse(f"No module named {name}; {package!r} is a package and cannot be directly executed")
    code = spec.loader.get_code(name) if spec is not None and hasattr(spec.loader, "get_code") else None
    if code is None:
        _refuse(f"No module named {name}" if spec is None else f"No code object available for {name}")
    _replace_main(
        __file__=spec.origin,
        __cached__=spec.cached,
        __loader__=spec.loader,
        __package__=spec.parent,
        __spec__=spec,
    )
    sys.argv[0] = spec.origin
    return code


def _find(name: str) -> Any:
    """The spec of a module or None. Imports the packages that it lies in."""
    try:
        return importlib.util.find_spec(name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        _refuse(f"Error while finding module specification for {name!r} ({type(error).__name__}: {error})")


def _refuse(message: str) -> None:
    raise SystemExit(f"{sys.executable}: {message}")


def _show_without_own_frames() -> None:
    """Have Python leave out the frames up to this file's when it prints the error that is about to end the process.

    Python prints it, rather than this package, so that exit status, interrupts and interactive mode stay Python's.
    """
    show = sys.excepthook

    def excepthook(kind: type[BaseException], error: BaseException, traceback: types.TracebackType | None) -> None:
        frames = []
        while traceback is not None:
            frames.append(traceback)
            traceback = traceback.tb_next
        own = [i for i, frame in enumerate(frames) if frame.tb_frame.f_code.co_filename == __file__]
        rest = frames[own[-1]].tb_next if own else None
        show(kind, error.with_traceback(rest), rest)

    sys.excepthook = excepthook
