"""Build boft_ext._C: the C core with the C compiler, the torch binding with torch's BuildExtension, one module of both.

The core is compiled here and handed over as objects because BuildExtension compiles .c files as C++, with one set of
flags for all files. Everything else about the package is in pyproject.toml.

Environment:
    CC, CXX          the compilers; otherwise the first of cc, gcc, clang and of c++, g++, clang++ that is on PATH
    MAX_JOBS         how many files to compile at once; otherwise one per processor
    BOFT_PORTABLE=1  leave out the kernels that need x86 headers
    BOFT_WERROR=1    a warning in the core is an error
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
    return torch.__version__


def compiler_version(compiler):
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]


def compile_core(cc, root):
    """Compile root/csrc/core/*.c where an object is older than its source or any header; return the objects' paths.

    The folder of the objects is named after the command and the compiler's version, so other flags never meet old objects.
    """
    command = [*cc, "-std=c11", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
    command += ["-Werror"] * (os.environ.get("BOFT_WERROR") == "1") + core_macros()
    key = hashlib.sha256(repr((command, compiler_version(cc))).encode()).hexdigest()[:12]
    objects = root / "build" / f"core-{key}"
    objects.mkdir(parents=True, exist_ok=True)
    headers = max(path.stat().st_mtime for path in (root / "csrc").rglob("*.h"))

    def compile_one(source):
        target = objects / f"{source.stem}.o"
        if not target.exists() or target.stat().st_mtime <= max(headers, source.stat().st_mtime):
            unfinished = target.with_suffix(".part")
            line = [*command, f"-I{root / 'csrc' / 'include'}", "-c", str(source), "-o", str(unfinished)]
            print(shlex.join(line), flush=True)
            if subprocess.run(line).returncode:
                stop(f"the C compiler failed on {source}")
            unfinished.replace(target)
        return str(target)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        return list(pool.map(compile_one, sorted((root / "csrc" / "core").glob("*.c"))))


def core_macros():
    return ["-DBOFT_PORTABLE"] if os.environ.get("BOFT_PORTABLE") == "1" else []


def main():
    cc, cxx = check_tools()
    torch_version = check_torch()
    # setuptools and torch take their compilers from the environment; ninja may be installed beside this Python only.
    os.environ.update(CC=shlex.join(cc), CXX=shlex.join(cxx))
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])

    from setuptools import setup
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    # GCC's OpenMP is the libgomp that torch loads. Clang's would be a second runtime, so there loops stay serial.
    openmp = [] if "clang" in compiler_version(cxx) else ["-fopenmp"]
    record = {"TORCH": torch_version, "PYTHON": sys.version.split()[0], "COMPILER": compiler_version(cc),
              "OPENMP": bool(openmp), "CUDA_ARCHITECTURES": []}

    class BuildBoft(BuildExtension):
        """Compiles the core first; afterwards writes _build.py, which _compat.py reads, beside the module."""

        def finalize_options(self):
            super().finalize_options()
            # One folder per Python and torch, the same for every way to install, so that rebuilds find their objects.
            self.build_temp = f"build/torch-{torch_version}-{sys.implementation.cache_tag}"
            self.force = True

        def build_extensions(self):
            for extension in self.extensions:
                extension.extra_objects = compile_core(cc, Path.cwd())
            super().build_extensions()

        def run(self):
            super().run()
            text = "# Written by setup.py: what _C was compiled for.\n"
            text += "".join(f"{name} = {value!r}\n" for name, value in record.items())
            for parent in [self.build_lib, "."] if self.inplace else [self.build_lib]:
                Path(parent, "boft_ext", "_build.py").write_text(text)

    binding = CppExtension(
        "boft_ext._C", sorted(str(path) for path in Path("csrc/torch").glob("*.cpp")),
        include_dirs=[str(Path.cwd() / "csrc" / "include")],
        extra_compile_args=["-O2", "-fvisibility=hidden", "-g0", *openmp, *core_macros()], extra_link_args=openmp)
    setup(ext_modules=[binding], cmdclass={"build_ext": BuildBoft})


if __name__ == "__main__":
    main()
