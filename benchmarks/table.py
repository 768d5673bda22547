"""Rows of measurements in CSV files, each with the machine and the versions that it was measured on."""

from __future__ import annotations

import csv
import datetime
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

import boft_ext

MACHINE_COLUMNS = ("date", "device", "cuda", "cpu", "isa", "threads", "torch", "peft", "boft_ext", "commit")


def cpu_name() -> str:
    """The processor's model, as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The name of a CUDA device, "cpu" for the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def commit() -> str:
    """The short commit of the working tree, with a plus if tracked files differ from it; empty outside git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return ""


class Table:
    """A CSV file, started anew, that holds every row as soon as it is added.

    Args: path: of the file; its folder is made, and for a CUDA device "-cuda" comes after its stem. columns: those of
        the measurement; MACHINE_COLUMNS come after them. device: that the rows were measured on.
    """

    def __init__(self, path: Path, columns: Sequence[str], device: torch.device = torch.device("cpu")):
        path = path.with_stem(f"{path.stem}-cuda") if device.type == "cuda" else path
        self.path = path
        self._columns = (*columns, *MACHINE_COLUMNS)
        built = boft_ext.build_info()
        self._machine = {
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "device": device_name(device),
            "cuda": torch.version.cuda,
            "cpu": cpu_name(),
            **{name: built[name] for name in ("torch", "peft", "boft_ext")},
            "commit": commit(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            csv.writer(file).writerow(self._columns)

    def add(self, **row: object) -> None:
        """Append a row; columns that are not given stay empty. ValueError for a column that the table does not have."""
        unknown = sorted(set(row) - set(self._columns))
        if unknown:
            raise ValueError(f"{self.path.name} has no column {', '.join(unknown)}")
        row = {**self._machine, "isa": boft_ext.build_info()["cpu_kernels"], "threads": torch.get_num_threads(), **row}
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow([_text(row.get(column, "")) for column in self._columns])


def _text(value: object) -> object:
    return f"{value:.6g}" if isinstance(value, float) else value
