"""What a user sees when the build or the import cannot work, and that objects are rebuilt exactly when they must be."""
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import boft_ext

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))
import setup_cuda  # noqa: E402


@pytest.fixture
def build():
    """setup.py as a module: importing it builds nothing."""
    spec = importlib.util.spec_from_file_location("boft_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_python(*arguments, path, cwd):
    """Run Python with `path` as the only place of packages (-S): nothing that is installed is seen."""
    env = dict(os.environ, PYTHONPATH=str(path), PYTHONDONTWRITEBYTECODE="1")
    return subprocess.run([sys.executable, "-S", *arguments], cwd=cwd, env=env, capture_output=True, text=True)


def fake_module(folder, name, text):
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)


@pytest.mark.parametrize("missing, variable, language", [("c", "CC", "C"), ("cxx", "CXX", r"C\+\+")])
def test_no_compiler_on_path(build, monkeypatch, tmp_path, missing, variable, language):
    present = {"c": "c++", "cxx": "cc"}[missing]
    (tmp_path / present).write_text("#!/bin/sh\n")
    (tmp_path / present).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit, match=rf"no {language} compiler found .*install build-essential.*{variable}"):
        build.check_tools()


@pytest.mark.parametrize("variable", ["CC", "CXX"])
def test_compiler_that_the_environment_names_does_not_exist(build, monkeypatch, variable):
    monkeypatch.setenv(variable, "no-such-compiler -m64")
    with pytest.raises(SystemExit, match=f"tried {variable}=no-such-compiler -m64"):
        build.check_tools()


def test_compiler_with_arguments_is_kept_whole(build, monkeypatch, tmp_path):
    wrapper = tmp_path / "wrap cc"
    wrapper.write_text("#!/bin/sh\n")
    wrapper.chmod(0o755)
    monkeypatch.setenv("CC", f"'{wrapper}' gcc -m64")
    assert build.check_tools()[0] == [str(wrapper), "gcc", "-m64"]


def test_no_python_headers(build, monkeypatch, tmp_path):
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(SystemExit, match=r"headers are missing \(.*Python\.h does not exist\).*python3-dev"):
        build.check_tools()


def test_python_too_old(build, monkeypatch):
    monkeypatch.setattr(build.sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit, match="too old: use Python 3.10 or newer"):
        build.check_tools()


@pytest.mark.parametrize("version, message", [
    (None, "this build sees no torch (No module named 'torch'). Install torch >= 2.11 first"),
    ("2.10.1+cpu", "torch 2.10.1+cpu is too old. Install torch >= 2.11 first"),
    ("1.99.0", "torch 1.99.0 is too old. Install torch >= 2.11 first"),
])
def test_torch_missing_or_too_old(tmp_path, version, message):
    if version:
        fake_module(tmp_path, "torch", f"__version__ = {version!r}")
    result = run_python("setup.py", "--version", path=tmp_path, cwd=ROOT)
    assert result.returncode != 0
    assert result.stderr.splitlines() == [f"boft_ext: {message}, then: pip install --no-build-isolation ."]


def test_setuptools_too_old(tmp_path):
    fake_module(tmp_path, "torch", "__version__ = '2.11.0'")
    fake_module(tmp_path, "setuptools", "__version__ = '65.5.0'")
    result = run_python("setup.py", "--version", path=tmp_path, cwd=ROOT)
    assert result.returncode != 0
    assert "setuptools 65.5.0 is too old: pip install 'setuptools>=77'" in result.stderr


@pytest.fixture
def core(build, monkeypatch, tmp_path):
    """A core of two files that share a header, and a function that compiles it and returns the files compiled."""
    (tmp_path / "csrc" / "include").mkdir(parents=True)
    (tmp_path / "csrc" / "core").mkdir()
    (tmp_path / "csrc" / "include" / "shared.h").write_text("enum { ANSWER = 1 };\n")
    for name in "one", "two":
        (tmp_path / "csrc" / "core" / f"{name}.c").write_text(
            f'#include "shared.h"\nint boft_{name}(void);\nint boft_{name}(void) {{ return ANSWER; }}\n')
    for variable in "BOFT_PORTABLE", "BOFT_WERROR":
        monkeypatch.delenv(variable, raising=False)
    cc = build.check_tools()[0]

    def compile_it():
        long_ago = 1_000_000_000
        for path in (tmp_path / "build").rglob("*.o"):
            os.utime(path, (long_ago + 10, long_ago + 10))
        objects = [Path(path) for path in build.compile_core(cc, tmp_path)]
        assert [path.name for path in objects] == ["one.o", "two.o"]
        return {path.stem for path in objects if path.stat().st_mtime > long_ago + 10}

    for path in (tmp_path / "csrc").rglob("*.*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))
    compile_it.root = tmp_path / "csrc"
    return compile_it


def test_objects_are_kept_until_a_source_or_header_changes(core):
    assert core() == {"one", "two"}
    assert core() == set()
    (core.root / "core" / "two.c").touch()
    assert core() == {"two"}
    os.utime(core.root / "core" / "two.c", (1_000_000_000, 1_000_000_000))
    (core.root / "include" / "shared.h").touch()
    assert core() == {"one", "two"}


@pytest.mark.parametrize("variable", ["BOFT_PORTABLE", "BOFT_WERROR"])
def test_other_flags_get_other_objects(core, monkeypatch, variable):
    core()
    monkeypatch.setenv(variable, "1")
    assert core() == {"one", "two"}
    assert core() == set()
    monkeypatch.delenv(variable)
    assert core() == set()


def test_portable_build_defines_its_macro(core, monkeypatch):
    (core.root / "core" / "one.c").write_text("#ifndef BOFT_PORTABLE\n#error not portable\n#endif\nint boft_one = 1;\n")
    with pytest.raises(SystemExit, match="the C compiler failed on .*one.c"):
        core()
    monkeypatch.setenv("BOFT_PORTABLE", "1")
    assert core() == {"one", "two"}


def test_a_failed_compilation_leaves_no_object_behind(core):
    core()
    (core.root / "core" / "one.c").write_text("not C\n")
    for _ in range(2):
        with pytest.raises(SystemExit, match="the C compiler failed on .*one.c"):
            core()


def test_warnings_stop_the_build_only_when_asked(core, monkeypatch):
    (core.root / "core" / "one.c").write_text("int boft_one(int unused);\nint boft_one(int unused) { return 1; }\n")
    assert core() == {"one", "two"}
    monkeypatch.setenv("BOFT_WERROR", "1")
    with pytest.raises(SystemExit, match="the C compiler failed on .*one.c"):
        core()


@pytest.fixture
def toolkit(monkeypatch, tmp_path):
    """A function that makes a CUDA toolkit that compiles to empty objects, by default where CUDA_HOME is."""
    def make(version="13.0", architectures=(75, 80, 90, 100, 120), runtime=True, where="cuda"):
        for name in "bin", "lib64":
            (tmp_path / where / name).mkdir(parents=True)
        listed = "\\n".join(f"compute_{number}" for number in architectures)
        (tmp_path / where / "bin" / "nvcc").write_text(f'''#!/bin/sh
case "$*" in
--version) echo "Cuda compilation tools, release {version}, V{version}.88";;
--list-gpu-arch) printf "{listed}\\n";;
*--dryrun*) echo "TOP={tmp_path / where}" >&2;;
*) while [ "$1" != -o ]; do shift; done; : > "$2";;
esac
''')
        (tmp_path / where / "bin" / "nvcc").chmod(0o755)
        if runtime:
            (tmp_path / where / "lib64" / "libcudart_static.a").touch()
        return str(tmp_path / where)

    monkeypatch.setattr(setup_cuda, "PLACES", ())
    monkeypatch.setattr(setup_cuda.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    return make


CXX = ["/bin/false"]


@pytest.mark.parametrize("value", ["yes", "2", "on"])
def test_unknown_value_of_boft_cuda(value):
    with pytest.raises(SystemExit, match=f"BOFT_CUDA={value}: expected auto, 0 or 1"):
        setup_cuda.find(value, "13.0", CXX)


def test_without_cuda_no_nvcc_is_looked_for(monkeypatch):
    monkeypatch.setattr(setup_cuda, "find_nvcc", None)
    assert setup_cuda.find("0", "13.0", CXX) is None
    assert setup_cuda.find("auto", None, CXX) is None


@pytest.mark.parametrize("torch_cuda, built", [("13.0", True), ("14.1", True), ("12.8", False)])
def test_auto_takes_an_nvcc_that_is_not_newer_than_torch(toolkit, capsys, torch_cuda, built):
    toolkit("13.2")
    found = setup_cuda.find("auto", torch_cuda, CXX)
    assert (found is not None) == built
    assert ("of CUDA 13, torch of CUDA 12.8" in capsys.readouterr().out) == (not built)


def test_demanded_kernels_are_built_for_any_torch(toolkit):
    home = toolkit("13.2")
    assert setup_cuda.find("1", "12.8", CXX) == setup_cuda.find("1", None, CXX)
    assert setup_cuda.find("1", None, CXX).nvcc == f"{home}/bin/nvcc"


@pytest.mark.parametrize("make, reason", [
    (None, "no nvcc found .tried CUDA_HOME=.*cuda.. Install the CUDA toolkit or name its folder in CUDA_HOME"),
    ({"runtime": False}, "has no libcudart_static.a beside it"),
    ({"architectures": (50, 75)}, "knows none of the architectures sm_80, sm_90, sm_100"),
    ({"version": "?"}, "--version names no release"),
])
def test_unusable_toolkit_stops_the_build_only_when_demanded(toolkit, capsys, make, reason):
    if make is not None:
        toolkit(**make)
    assert setup_cuda.find("auto", "13.0", CXX) is None
    assert re.search(f"building without CUDA kernels: .*{reason}", capsys.readouterr().out)
    with pytest.raises(SystemExit, match=f"BOFT_CUDA=1: .*{reason}"):
        setup_cuda.find("1", "13.0", CXX)


@pytest.mark.parametrize("known, built", [((75, 80, 90, 100, 120), ["sm_80", "sm_90", "sm_100", "compute_100"]),
                                          ((75, 80, 86, 90), ["sm_80", "sm_90", "compute_90"])])
def test_architectures_are_those_that_nvcc_knows(toolkit, known, built):
    toolkit(architectures=known)
    found = setup_cuda.find("1", None, CXX)
    assert found.architectures == built
    command = setup_cuda.compile_command(found, CXX, False)
    assert [word for word in command if word.startswith("-gencode")] == [
        f"-gencode=arch=compute_{name.split('_')[1]},code={name}" for name in built]


def test_nvcc_on_path_and_in_a_python_package(toolkit, monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path))
    packaged = toolkit(where="site/nvidia/cu13")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "site" / "nvidia")])
    monkeypatch.setattr(setup_cuda.importlib.util, "find_spec", lambda name: spec if name == "nvidia" else None)
    assert setup_cuda.find("1", None, CXX).nvcc == f"{packaged}/bin/nvcc"
    home = toolkit(where="other")
    monkeypatch.setenv("PATH", f"{home}/bin")
    assert setup_cuda.find("1", None, CXX).nvcc == f"{home}/bin/nvcc"


def test_cuda_objects_are_kept_until_a_source_or_header_changes(build, core, toolkit, monkeypatch):
    toolkit()
    found, root = setup_cuda.find("1", None, CXX), core.root.parent
    (core.root / "cuda").mkdir()
    for name in "one.cu", "shared.cuh":
        (core.root / "cuda" / name).touch()
        os.utime(core.root / "cuda" / name, (1_000_000_000, 1_000_000_000))
    core()
    objects = build.compile_cuda(found, CXX, root)
    assert [Path(path).name for path in objects] == ["one.o"]

    def compiled(path, jobs="1"):
        os.utime(objects[0], (1_000_000_010, 1_000_000_010))
        path.touch()
        monkeypatch.setenv("MAX_JOBS", jobs)
        assert build.compile_cuda(found, CXX, root) == objects
        os.utime(path, (1_000_000_000, 1_000_000_000))
        return Path(objects[0]).stat().st_mtime > 1_000_000_010

    assert not compiled(core.root / "core" / "one.c", jobs="7")
    assert compiled(core.root / "cuda" / "shared.cuh")
    assert compiled(core.root / "cuda" / "one.cu")
    assert compiled(core.root / "include" / "shared.h")
    (core.root / "cuda" / "shared.cuh").touch()
    assert core() == set()


def import_error(tmp_path, build_py, running, with_module=True):
    """The message with which a package that holds only _compat.py refuses to be imported; None if it does not."""
    fake_module(tmp_path, "torch", f"__version__ = {running!r}")
    fake_module(tmp_path, "boft_ext", "from . import _compat\n_compat.check()\n")
    shutil.copy(ROOT / "boft_ext" / "_compat.py", tmp_path / "boft_ext")
    if build_py is not None:
        (tmp_path / "boft_ext" / "_build.py").write_text(build_py)
    if with_module:
        (tmp_path / "boft_ext" / "_C.py").touch()
    program = "try:\n    import boft_ext\nexcept ImportError as error:\n    print(error)"
    result = run_python("-c", program, path=tmp_path, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip() or None


REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


@pytest.mark.parametrize("built, running", [("2.13.0+cpu", "2.12.1"), ("2.1.0", "2.11.0"), ("2.13.0", "3.13.0")])
def test_built_for_another_torch(tmp_path, built, running):
    message = import_error(tmp_path, f"TORCH = {built!r}\nPYTHON = '3.11.7'\n", running)
    assert f"boft_ext was built for torch {built}, running torch is {running}: rebuild" in message
    assert REBUILD in message


@pytest.mark.parametrize("built, running", [("2.13.0+cpu", "2.13.0+cu130"), ("2.13.0", "2.13.1"),
                                            ("2.14.0a0+git1234567", "2.14.0")])
def test_another_patch_release_or_device_of_torch_is_accepted(tmp_path, built, running):
    assert import_error(tmp_path, f"TORCH = {built!r}\nPYTHON = '3.11.7'\n", running) is None


def test_never_built(tmp_path):
    message = import_error(tmp_path, None, "2.13.0")
    assert "is not built" in message and str(tmp_path / "boft_ext") in message and REBUILD in message


def test_built_for_another_python(tmp_path):
    message = import_error(tmp_path, "TORCH = '2.13.0'\nPYTHON = '3.10.1'\n", "2.13.0", with_module=False)
    assert "no compiled module for Python" in message and "Python 3.10.1" in message and REBUILD in message


def test_build_record_is_of_this_environment():
    from boft_ext import _build

    assert _build.TORCH.split(".")[:2] == torch.__version__.split(".")[:2]
    assert _build.PYTHON.split(".")[:2] == [str(part) for part in sys.version_info[:2]]
    assert _build.COMPILER
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    assert registered("boft::rotate", "CUDA") == bool(_build.CUDA_ARCHITECTURES)
    assert importlib.util.find_spec("boft_ext._C").origin.startswith(str(Path(boft_ext.__file__).parent))
