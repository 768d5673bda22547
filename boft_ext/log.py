"""The log lines of this package: logger ``boft_ext``, level INFO."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
from typing import Any

from .info import build_info

_logger = logging.getLogger("boft_ext")


class _Handler(logging.StreamHandler):
    """Writes to the standard error of the moment, and leaves it to the program's own handlers where it has any."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.getLogger().handlers:
            self.setStream(sys.stderr)
            super().emit(record)


def show() -> None:
    """Make this package's log lines visible on standard error. Once is enough; thread-safe."""
    if not any(isinstance(handler, _Handler) for handler in _logger.handlers):
        handler = _Handler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        _logger.addHandler(handler)
    if _logger.level == logging.NOTSET:
        _logger.setLevel(logging.INFO)


def announce(status: Any) -> None:
    """One line that says what the patch `status` (`peft_swap.PatchStatus`) made active, and what is not and why.

    In the first process of a distributed run only, and not in processes that multiprocessing started.
    """
    first = os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None
    if not first or not _logger.isEnabledFor(logging.INFO):
        return
    info = build_info()
    cuda = ", ".join(info["cuda_architectures"])
    _logger.info(
        "the BOFT layers of PEFT %s run on boft_ext %s; CPU kernels: %s; %s; dropout=%r, keep_merged=%s",
        status.peft_version,
        info["boft_ext"],
        info["cpu_kernels"],
        f"CUDA kernels: {cuda}" if cuda else "CUDA kernels: none in this build, so GPUs run plain torch",
        status.dropout,
        status.keep_merged,
    )
