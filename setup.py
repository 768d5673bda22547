"""Build boft_ext._C: the C core with the C compiler, the CUDA kernels with nvcc, the torch binding with torch's
BuildExtension; one module of all.

The core is compiled here and handed over as objects because BuildExtension compiles .c files as C++, with one set of
flags for all files, and .cu files against torch's CUDA headers. Everything else about the package is in pyproject.toml.

Environment:
    CC, CXX          the compilers; otherwise the first of cc, gcc, clang and of c++, g++, clang++ that is on PATH
    MAX_JOBS         how many files to compile at once; otherwise one per processor
    BOFT_PORTABLE=1  leave out the kernels that need x86 headers
    BOFT_WERROR=1    a warning in the core or in the CUDA kernels is an error
    BOFT_CUDA        auto: build the CUDA kernels if torch is a CUDA build and there is an nvcc of no newer major
                     version; 0: leave them out; 1: build them, whatever torch is
    CUDA_HOME        the CUDA toolkit; otherwise the nvcc on PATH, in /usr/local/cuda or in NVIDIA's Python packages
"""
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Builds in isolation do not look for modules beside this file.
sys.path.insert(0, str(Path(__file__).resolve().parent))
import setup_cuda  # noqa: E402

MIN_PYTHON, MIN_TORCH, MIN_SETUPTOOLS = (3, 10), (2, 11), (77,)
INSTALL = "pip install --no-build-isolation ."


def stop(message):
    raise SystemExit(f"boft_ext: {message}")


def version_tuple(text, length):
    return tuple(int(part) for part in text.split(".")[:length])


def find_compiler(variable, language, names):
    """The compiler as a list of words: the environment variable if set, else the first of `names` on PATH."""
    given = os.environ.get(variable)
    for command in [given] if given else names:
        words = shlex.split(command)
        if shutil.which(words[0]):
            return words
    tried = f"{variable}={given}" if given else ", ".join(names)
    stop(f"no {language} compiler found (tried {tried}). Install one (Debian, Ubuntu: apt-get install build-essential) "
         f"or name yours in {variable}")


def check_tools():
    """Python, its headers and both compilers, before anything slow happens. Returns the commands (cc, cxx)."""
    if sys.version_info < MIN_PYTHON:
        stop(f"Python {sys.version.split()[0]} is too old: use Python 3.10 or newer")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        stop(f"Python's headers are missing ({header} does not exist). Install them (Debian, Ubuntu: "
             f"apt-get install python3-dev) or use a Python that has them")
    return find_compiler("CC", "C", ["cc", "gcc", "clang"]), find_compiler("CXX", "C++", ["c++", "g++", "clang++"])


def check_torch():
    """The torch to build against. pip's isolated builds hide it, hence the remedy."""
    try:
        import torch
    except ImportError as error:
        stop(f"this build sees no torch ({error}). Install torch >= 2.11 first, then: {INSTALL}")
    if version_tuple(torch.__version__, 2) < MIN_TORCH:
        stop(f"torch {torch.__version__} is too old. Install torch >= 2.11 first, then: {INSTALL}")
    import setuptools
    if version_tuple(setuptools.__version__, 1) < MIN_SETUPTOOLS:
        stop(f"setuptools {setuptools.__version__} is too old: pip install 'setuptools>=77', then: {INSTALL}")
    return torch


def compiler_version(compiler):
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]


def compile_core(cc, root):
    """Compile root/csrc/core/*.c; return the objects' paths."""
    command = [*cc, "-std=c11", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    command += ["-Werror"] * werror() + core_macros()
    objects = object_folder(root, "core", command, compiler_version(cc))
    return compile_objects("C", command, root, "core/*.c", "*.h", objects)


def compile_cuda(toolkit, cxx, root):
    """Compile root/csrc/cuda/*.cu; return the objects' paths."""
    command = setup_cuda.compile_command(toolkit, cxx, werror())
    objects = object_folder(root, "cuda", command, toolkit.version)
    # Each file is compiled once for every architecture, side by side where the files leave processors idle.
    threads = max(1, jobs() // max(1, len(list((root / "csrc" / "cuda").glob("*.cu")))))
    return compile_objects("CUDA", [*command, f"--threads={threads}"], root, "cuda/*.cu", "*.*h", objects)


def object_folder(root, part, command, version):
    """The folder is named after the command and the compiler's version, so that other flags never meet old objects."""
    return root / "build" / f"{part}-{hashlib.sha256(repr((command, version)).encode()).hexdigest()[:12]}"


def compile_objects(language, command, root, sources, headers, objects):
    """Compile the `sources` in root/csrc whose object is older than they or than any of the `headers` there."""
    changed = max(path.stat().st_mtime for path in (root / "csrc").rglob(headers))
    objects.mkdir(parents=True, exist_ok=True)

    def compile_one(source):
        target = objects / f"{source.stem}.o"
        if not target.exists() or target.stat().st_mtime <= max(changed, source.stat().st_mtime):
            unfinished = target.with_suffix(".part")
            line = [*command, f"-I{root / 'csrc' / 'include'}", "-c", str(source), "-o", str(unfinished)]
            print(shlex.join(line), flush=True)
            if subprocess.run(line).returncode:
                stop(f"the {language} compiler failed on {source}")
            unfinished.replace(target)
        return str(target)

    with ThreadPoolExecutor(jobs()) as pool:
        return list(pool.map(compile_one, sorted((root / "csrc").glob(sources))))


def jobs():
    return int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)


def werror():
    return os.environ.get("BOFT_WERROR") == "1"


def core_macros():
    return ["-DBOFT_PORTABLE"] if os.environ.get("BOFT_PORTABLE") == "1" else []


def main():
    cc, cxx = check_tools()
    torch = check_torch()
    toolkit = setup_cuda.find(os.environ.get("BOFT_CUDA") or "auto", torch.version.cuda, cxx)
    # setuptools and torch take their compilers from the environment; ninja may be installed beside this Python only.
    os.environ.update(CC=shlex.join(cc), CXX=shlex.join(cxx))
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])

    from setuptools import setup
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    # GCC's OpenMP is the libgomp that torch loads. Clang's would be a second runtime, so there loops stay serial.
    openmp = [] if "clang" in compiler_version(cxx) else ["-fopenmp"]
    record = {"TORCH": torch.__version__, "PYTHON": sys.version.split()[0], "COMPILER": compiler_version(cc),
              "OPENMP": bool(openmp), "CUDA_ARCHITECTURES": toolkit.architectures if toolkit else []}

    class BuildBoft(BuildExtension):
        """Compiles the core first; afterwards writes _build.py, which _compat.py reads, beside the module."""

        def finalize_options(self):
            super().finalize_options()
            # One folder per Python and torch, the same for every way to install, so that rebuilds find their objects.
            self.build_temp = f"build/torch-{torch.__version__}-{sys.implementation.cache_tag}"
            self.force = True

        def build_extensions(self):
            for extension in self.extensions:
                extension.extra_objects = compile_core(cc, Path.cwd())
                if toolkit:
                    extension.extra_objects += compile_cuda(toolkit, cxx, Path.cwd())
            super().build_extensions()

        def run(self):
            super().run()
            text = "# Written by setup.py: what _C was compiled for.\n"
            text += "".join(f"{name} = {value!r}\n" for name, value in record.items())
            for parent in [self.build_lib, "."] if self.inplace else [self.build_lib]:
                Path(parent, "boft_ext", "_build.py").write_text(text)

    sources = [path for path in Path("csrc/torch").glob("*.cpp") if toolkit or not path.stem.endswith("cuda")]
    flags, link = ["-O2", "-fvisibility=hidden", "-g0", *openmp, *core_macros()], [*openmp]
    if toolkit:
        flags.append("-DBOFT_CUDA")
        link += setup_cuda.link_arguments(toolkit)
    binding = CppExtension(
        "boft_ext._C", sorted(map(str, sources)), include_dirs=[str(Path.cwd() / "csrc" / "include")],
        extra_compile_args=flags, extra_link_args=link)
    setup(ext_modules=[binding], cmdclass={"build_ext": BuildBoft})


if __name__ == "__main__":
    main()
