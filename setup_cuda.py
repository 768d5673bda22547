"""The CUDA part of the build: which nvcc to use, for which architectures, and what to link. setup.py compiles with it.

nvcc is called directly and the CUDA runtime is linked statically, so that one module runs under torch with and without
CUDA and needs neither torch's CUDA headers nor a library of the toolkit.
"""
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

ARCHITECTURES = (80, 90, 100)
PLACES = (Path("/usr/local/cuda/bin"),)


class Unavailable(Exception):
    """Why this machine builds no CUDA part."""


class Toolkit(NamedTuple):
    nvcc: str
    version: tuple[int, int]
    architectures: list[str]  # sm_NN: machine code; compute_NN: PTX, which drivers compile for newer devices
    runtime: str  # libcudart_static.a


def find(mode, torch_cuda, cxx):
    """The toolkit for BOFT_CUDA=`mode`; None to build without CUDA. `torch_cuda`: torch.version.cuda."""
    if mode not in ("auto", "0", "1"):
        raise SystemExit(f"boft_ext: BOFT_CUDA={mode}: expected auto, 0 or 1")
    if mode == "0":
        return None
    try:
        if mode == "auto" and not torch_cuda:
            raise Unavailable("this torch is built without CUDA")
        toolkit = inspect(find_nvcc(), cxx)
        if mode == "auto" and toolkit.version[0] > int(torch_cuda.split(".")[0]):
            # Its programs may need a newer driver than torch's.
            raise Unavailable(f"{toolkit.nvcc} is of CUDA {toolkit.version[0]}, torch of CUDA {torch_cuda}")
        return toolkit
    except Unavailable as reason:
        if mode == "1":
            raise SystemExit(f"boft_ext: BOFT_CUDA=1: {reason}") from None
        print(f"boft_ext: building without CUDA kernels: {reason}", flush=True)
        return None


def find_nvcc():
    """The nvcc of CUDA_HOME; else the first on PATH, in /usr/local/cuda, in NVIDIA's Python packages."""
    home = os.environ.get("CUDA_HOME")
    if home:
        places, tried = [Path(home, "bin")], f"CUDA_HOME={home}"
    else:
        spec = importlib.util.find_spec("nvidia")
        packages = [Path(folder) for folder in spec.submodule_search_locations or []] if spec else []
        places = [*map(Path, os.environ.get("PATH", os.defpath).split(os.pathsep)), *PLACES,
                  *sorted(path for folder in packages for path in folder.glob("c*/bin"))]
        tried = "PATH, /usr/local/cuda, the package nvidia-cuda-nvcc"
    for place in places:
        found = shutil.which("nvcc", path=place)
        if found:
            return found
    raise Unavailable(f"no nvcc found (tried {tried}). Install the CUDA toolkit or name its folder in CUDA_HOME")


def inspect(nvcc, cxx):
    version = re.search(r"release (\d+)\.(\d+)", output_of([nvcc, "--version"]))
    if not version:
        raise Unavailable(f"{nvcc} --version names no release")
    known = {int(number) for number in re.findall(r"compute_(\d+)\b", output_of([nvcc, "--list-gpu-arch"]))}
    built = [number for number in ARCHITECTURES if number in known]
    if not built:
        raise Unavailable(f"{nvcc} knows none of the architectures {', '.join(f'sm_{n}' for n in ARCHITECTURES)}")
    return Toolkit(nvcc, (int(version[1]), int(version[2])),
                   [*(f"sm_{number}" for number in built), f"compute_{built[-1]}"], find_runtime(nvcc, cxx))


def find_runtime(nvcc, cxx):
    name = "libcudart_static.a"
    # nvcc on PATH may be a script that calls the one in the toolkit.
    top = re.search(r"TOP=(.+)", output_of([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]))
    root = Path(top[1]) if top else Path(nvcc).parent.parent
    for folder in root / "lib64", root / "lib", root / "targets" / f"{platform.machine()}-linux" / "lib":
        if (folder / name).is_file():
            return str(folder.resolve() / name)
    # Distributions keep it among the linker's own folders.
    found = output_of([*cxx, f"-print-file-name={name}"]).strip()
    if os.path.isabs(found):
        return found
    raise Unavailable(f"{nvcc} has no {name} beside it: install the CUDA runtime's development files")


def output_of(command):
    try:
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
    except OSError as error:
        raise Unavailable(f"{command[0]} does not run: {error.strerror}") from None


def compile_command(toolkit, cxx, werror):
    """The command that compiles one file, less its name and its output."""
    command = [toolkit.nvcc, "-std=c++17", "-O3", "-cudart", "static",
               "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra"]
    for name in toolkit.architectures:
        command.append(f"-gencode=arch=compute_{name.partition('_')[2]},code={name}")
    command += ["-Werror=all-warnings", "-Xcompiler=-Werror"] * werror
    # A compiler of several words is a wrapper, which nvcc does not take.
    return command + ["-ccbin", cxx[0]] * (len(cxx) == 1)


def link_arguments(toolkit):
    return [toolkit.runtime, "-Wl,--exclude-libs,libcudart_static.a", "-ldl", "-lrt", "-lpthread"]
