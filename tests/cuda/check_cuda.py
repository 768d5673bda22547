"""``make cuda-check``: compile csrc/cuda for all architectures with a bare nvcc and check what came out; needs no GPU.

For sm_80, sm_90 and sm_100, every kernel against the plan (plan.py): registers, static shared memory, no stack and no
spills (from ptxas), and in its machine code 16-byte accesses, tensor core instructions, prefetched loads and no local
memory (from cuobjdump, which needs nvdisasm). And that the sources compile to PTX and for the host. Ends with a table;
exit status 1 if anything fails, also if a tool is missing beside nvcc. Without nvcc: one line and exit status 0.

Environment: NVCC, CUOBJDUMP: the tools, otherwise from PATH, CUDA_HOME, beside nvcc, or PyPI's nvidia-cuda-cuobjdump in
this Python or in .venv, with nvidia-cuda-nvdisasm. MAX_JOBS: compilers at once, otherwise one per processor.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

import plan  # noqa: E402
import setup  # noqa: E402
import setup_cuda  # noqa: E402
from sass import (  # noqa: E402
    Instruction,
    Resources,
    calls_routine,
    hot_loop,
    parse_ptxas,
    parse_sass,
    prefetch_distances,
)

ARCHITECTURES = tuple(f"sm_{number}" for number in setup_cuda.ARCHITECTURES)
PTX = f"compute_{setup_cuda.ARCHITECTURES[-1]}"


class Kernel(NamedTuple):
    """A kernel as compiled for one architecture."""

    name: str
    architecture: str
    resources: Resources
    body: list[Instruction]


def find_cuobjdump(nvcc: str) -> str | None:
    """The path of cuobjdump; None if there is none."""
    if given := os.environ.get("CUOBJDUMP"):
        return shutil.which(given)
    sites = [Path(sysconfig.get_path("purelib")), ROOT / ".venv" / "cuobjdump"]
    wheels = [folder for site in sites for folder in sorted(site.glob("nvidia/*/bin"))]
    places = [os.environ.get("PATH", os.defpath), Path(nvcc).resolve().parent, *wheels]
    return shutil.which("cuobjdump", path=os.pathsep.join(map(str, places)))


def compiler(nvcc: str, architecture: str) -> list[str]:
    """The command of the build for one architecture, less what it compiles and where to; warnings are errors."""
    cxx = setup.find_compiler("CXX", "C++", ["c++", "g++", "clang++"])
    toolkit = setup_cuda.Toolkit(nvcc, (0, 0), [architecture], "")
    return [*setup_cuda.compile_command(toolkit, cxx, werror=True), f"-I{ROOT / 'csrc' / 'include'}"]


def compile_one(nvcc: str, cuobjdump: str, source: Path, architecture: str, folder: Path) -> list[Kernel] | str:
    """The kernels of a source for an architecture, or what the compiler said where it failed."""
    target = folder / f"{source.stem}.{architecture}.cubin"
    done = subprocess.run(
        [*compiler(nvcc, architecture), "-Xptxas=-v", "-cubin", "-o", str(target), str(source)],
        capture_output=True,
        text=True,
    )
    said = done.stdout + done.stderr
    if done.returncode:
        return said
    # cuobjdump starts nvdisasm, which the wheels put beside it.
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), str(Path(cuobjdump).parent)])
    listed = subprocess.run(
        [cuobjdump, "-sass", str(target)], capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    bodies = parse_sass(listed.stdout)
    resources = parse_ptxas(said)
    if listed.returncode or set(bodies) != set(resources):
        return f"cuobjdump shows {len(bodies)} kernels, ptxas compiled {len(resources)}: {listed.stderr}"
    return [Kernel(name, architecture, resources[name], body) for name, body in bodies.items()]


def compile_host(nvcc: str, source: Path, folder: Path) -> str:
    """Compiles to PTX and for the host; what the compiler said, if it failed."""
    command = [*compiler(nvcc, PTX), "-c", "-o", str(folder / f"{source.stem}.o"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout + done.stderr if done.returncode else ""


def demangled(names: Sequence[str]) -> dict[str, str]:
    """Each name as written in the source, without return type, arguments and spaces: "rotate_tile<4,true>"."""
    if not names:
        return {}
    shown = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return {name: short_name(text) for name, text in zip(names, shown, strict=True)}


def short_name(text: str) -> str:
    """A demangled declaration without return type, namespaces, arguments, casts in template arguments and spaces."""
    text = re.sub(r"\([\w ]+\)(?=-?\d)", "", text)
    depth, start, end = 0, 0, len(text)
    for at, char in enumerate(text):
        if char == "<":
            depth += 1
        elif char == ">":
            depth -= 1
        elif depth == 0 and char == "(" and not text.startswith("(anonymous namespace)", at):
            end = at
            break
        elif depth == 0 and char == " " and not text.startswith("(anonymous namespace)", at - 10):
            start = at + 1
    name = text[start:end].replace("(anonymous namespace)::", "")
    return name.replace(" ", "")


def problems(kernel: Kernel, family: plan.Family) -> Iterator[str]:
    """What is wrong with a kernel, one line each."""
    resources = kernel.resources
    if resources.registers > family.registers:
        yield f"{resources.registers} registers, planned {family.registers}"
    if resources.shared > family.shared:
        yield f"{resources.shared} bytes of static shared memory, planned {family.shared}"
    if resources.stack or resources.spills:
        yield f"{resources.stack} bytes of stack, {resources.spills} bytes of spills"
    names = [item.name for item in kernel.body]
    if local := sorted({name for name in names if name.startswith(("LDL", "STL"))}):
        yield f"local memory: {', '.join(local)}"
    if family.wide:
        for opcode in ("LDG", "STG"):
            asynchronous = opcode == "LDG" and any(item.is_a("LDGSTS") and item.is_wide() for item in kernel.body)
            if not asynchronous and not any(item.is_a(opcode) and item.is_wide() for item in kernel.body):
                yield f"no {opcode}.E.128"
    if family.hmma and not any(item.is_a("HMMA") for item in kernel.body):
        yield "no HMMA"
    if family.prefetch:
        yield from prefetch_problems(kernel.body)


def prefetch_problems(body: list[Instruction]) -> Iterator[str]:
    """A hot loop that calls a routine (64-bit division is one), or whose loads of the next tile do not have at least
    half of the loop's products to arrive behind."""
    loop = hot_loop(body)
    if loop is None:
        yield "no loop with both LDG.E.128 and HMMA"
        return
    products = sum(item.is_a("HMMA") for item in loop)
    if calls_routine(loop):
        yield "the hot loop calls a routine"
    late = [distance for distance in prefetch_distances(loop) if 2 * distance < products]
    if late:
        yield f"loads sunk below the products: {min(late)} of {products} HMMA between a load and its first use"


def check(kernels: Sequence[Kernel], names: dict[str, str]) -> tuple[list[str], list[list[str]]]:
    """All failures, and the rows of the table: one for each family, its largest kernels per architecture."""
    failures = []
    members: dict[plan.Family, list[Kernel]] = {family: [] for family in plan.FAMILIES}
    for kernel in kernels:
        name = names[kernel.name]
        family = next((family for family in plan.FAMILIES if re.fullmatch(family.pattern, name)), None)
        if family is None:
            failures.append(f"{name} {kernel.architecture}: not in the plan (tests/cuda/plan.py)")
            continue
        members[family].append(kernel)
        failures += [f"{name} {kernel.architecture}: {problem}" for problem in problems(kernel, family)]
    rows = []
    for family, found in members.items():
        if not found:
            failures.append(f"{family.pattern}: in the plan, but there is no such kernel")
            continue
        registers = [
            str(max((k.resources.registers for k in found if k.architecture == name), default="-"))
            for name in ARCHITECTURES
        ]
        shared = max(kernel.resources.shared for kernel in found)
        rules = [rule for rule in ("wide", "hmma", "prefetch") if getattr(family, rule)]
        count = len({kernel.name for kernel in found})
        rows.append([family.pattern, str(count), *registers, str(family.registers), f"{shared}", " ".join(rules)])
    return failures, rows


def print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:-1], widths[1:-1])), row[-1]]
        print("  ".join(cells).rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[2].partition(".")[0].strip())
    parser.add_argument("sources", nargs="*", type=Path, help="files; all of csrc/cuda if none is named")
    parser.add_argument("--arch", choices=ARCHITECTURES, help="one architecture alone")
    options = parser.parse_args()
    sources = options.sources or sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    try:
        nvcc = setup_cuda.find_nvcc()
    except setup_cuda.Unavailable as reason:
        print(f"cuda-check: skipped: {reason}")
        return 0
    cuobjdump = find_cuobjdump(nvcc)
    if cuobjdump is None:
        print("cuda-check: nvcc is there, but no cuobjdump: pip install nvidia-cuda-cuobjdump", file=sys.stderr)
        return 1
    architectures = [options.arch] if options.arch else ARCHITECTURES
    jobs = [(source, architecture) for source in sources for architecture in architectures]
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(jobs_at_once()) as pool:
        folder = Path(name)
        compiled = [pool.submit(compile_one, nvcc, cuobjdump, *job, folder) for job in jobs]
        hosts = [pool.submit(compile_host, nvcc, source, folder) for source in sources]
        results = [future.result() for future in compiled]
        broken = [text for text in (*results, *(future.result() for future in hosts)) if isinstance(text, str) and text]
    if broken:
        print("\n".join(broken), file=sys.stderr)
        return 1
    kernels = [kernel for result in results for kernel in result]
    failures, rows = check(kernels, demangled(sorted({kernel.name for kernel in kernels})))
    if options.sources:
        failures = [failure for failure in failures if "there is no such kernel" not in failure]
    print_table([["kernels", "count", *ARCHITECTURES, "planned", "shared", "rules"], *rows])
    print("\n".join(["", *failures, f"cuda-check: {len(failures)} failures in {len(kernels)} kernels"]))
    return 1 if failures else 0


def jobs_at_once() -> int:
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))


if __name__ == "__main__":
    sys.exit(main())
