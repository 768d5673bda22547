"""``make gpu PART=tests|ops|layers|model|all``: build for this Python's torch, then test or measure on its GPU.

Every part takes less than ten minutes, the build included, and needs no network:

* ``tests``: tests/gpu, then compute-sanitizer over a small program. A sanitizer that refuses the device, or is missing,
  is reported and does not fail the part.
* ``ops``, ``layers``: single operators and layers. ``model``: the quick subset of the models level, then the training
  loop of PEFT's MetaMathQA benchmark on a random Llama-3.2-3B for as long as there is time. See benchmarks/README.md.

Results are written to benchmarks/results and copied to $OUT if that is set. Exit status 1 if anything fails.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
REPORT = RESULTS / "tests-cuda.txt"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}

# A part, a build of two minutes before it, and the copying of results fit in ten minutes.
PART_S, SANITIZER_S, MODELS_S = 450, 100, 90
# Minutes after which metamath starts no case, which leaves 90 seconds to make its model before and to finish after.
METAMATH_MINUTES = 4.5
REFUSALS = ("Device not supported", "not supported", "failed to initialize", "LibraryNotLoaded")


def run(command: Sequence[str], limit_s: float | None = None, **more: str) -> tuple[int, str]:
    """Run in the repository, showing what it says; exit status and all output. 124 if it took longer than `limit_s`."""
    print("+", *command, flush=True)
    limited = [] if limit_s is None else ["timeout", "--kill-after=10", str(limit_s)]
    process = subprocess.Popen(
        [*limited, *command],
        cwd=ROOT,
        env={**ENVIRONMENT, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines)


def device_line() -> str:
    """The GPU and versions, in a line; SystemExit with a line if there is no GPU to use."""
    try:
        import torch
    except ImportError as error:
        raise SystemExit(f"make gpu: {sys.executable} has no torch ({error}); PYTHON=... names another") from None
    if not torch.cuda.is_available():
        raise SystemExit(f"make gpu: torch {torch.__version__} of {sys.executable} finds no CUDA device")
    name, capability = torch.cuda.get_device_name(), ".".join(map(str, torch.cuda.get_device_capability()))
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    return (
        f"{name} (sm {capability}), torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"Python {platform.python_version()}, boft_ext {commit.strip()}"
    )


def build() -> None:
    """Build the extension in place, through pip where that works."""
    options = {"BOFT_CUDA": "1"}
    status, _ = run([sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."], **options)
    if status:
        status, _ = run([sys.executable, "setup.py", "build_ext", "--inplace"], **options)
    if status:
        raise SystemExit("make gpu: the build failed")


def tests(device: str) -> bool:
    """Run the tests and the sanitizers; write a summary. Whether all passed."""
    pytest = [sys.executable, "-m", "pytest", "-q", "--maxfail=40", "tests/gpu"]
    status, output = run(pytest, PART_S - 2 * SANITIZER_S, BOFT_TEST_DEVICE="cuda")
    said = [device, f"pytest tests/gpu: exit status {status}", *output.splitlines()[-25 if status else -1 :]]
    passed = status == 0
    for tool in ("memcheck", "racecheck"):
        verdict, failed = sanitize(tool)
        said.append(f"compute-sanitizer {tool}: {verdict}")
        passed = passed and not failed
    REPORT.write_text("\n".join(said) + "\n")
    print("\n".join(["", *said]))
    return passed


def sanitize(tool: str) -> tuple[str, bool]:
    """What a tool of compute-sanitizer finds in tests/gpu/small_program.py, and whether that is a failure."""
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        return "not run, there is none", False
    command = [sanitizer, "--tool", tool, "--error-exitcode", "77", "--print-limit", "10", sys.executable]
    # Without torch's cache every tensor is an allocation of its own, whose ends the tool can watch.
    status, output = run([*command, "tests/gpu/small_program.py"], SANITIZER_S, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    if status == 0 and "done" in output:
        return "no errors", False
    if status == 124:
        return f"not finished in {SANITIZER_S} s", False
    if status != 77 and any(words in output for words in REFUSALS):
        return f"refuses this device (exit status {status})", False
    return f"exit status {status}\n{output[-3000:]}", True


def benchmark(level: str, *arguments: str, limit_s: float = PART_S) -> bool:
    """Run a level; whether it finished in `limit_s`."""
    status, _ = run([sys.executable, "-m", "benchmarks", level, "--device", "cuda", *arguments], limit_s)
    return status == 0


def models() -> bool:
    """Run both levels of whole models, the second one also if the first fails."""
    quick = benchmark("models", "--quick", limit_s=MODELS_S)
    return benchmark("metamath", "--minutes", str(METAMATH_MINUTES), limit_s=PART_S - MODELS_S) and quick


def copy_results(since: float) -> None:
    """Copy the results written after `since` to $OUT."""
    if folder := os.environ.get("OUT"):
        for path in RESULTS.iterdir():
            if path.stat().st_mtime >= since:
                shutil.copy(path, folder)


PARTS = {
    "tests": tests,
    "ops": lambda device: benchmark("ops"),
    "layers": lambda device: benchmark("layers"),
    "model": lambda device: models(),
}


def main() -> int:
    chosen = sys.argv[1:] or ["all"]
    unknown = set(chosen) - {"all", *PARTS}
    if unknown:
        raise SystemExit(f"make gpu: there is no PART={', '.join(unknown)}; parts are {', '.join(PARTS)}, all")
    start = time.time()
    device = device_line()
    print(device, flush=True)
    build()
    failed = []
    for name in PARTS if "all" in chosen else chosen:
        # What was measured until the time was up is kept, too.
        if not PARTS[name](device):
            failed.append(name)
        copy_results(start)
    if failed:
        print(f"make gpu: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
