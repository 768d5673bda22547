"""Ways in without a line in the program: ``run``, ``enable`` and ``%load_ext``, and the log line they show."""

import json
import logging
import os
import subprocess
import sys
import textwrap
import venv
from pathlib import Path

import pytest
import torch

import boft_ext
import boft_ext_hook
from boft_ext import environment, log
from boft_ext.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
STOCK = Path(__file__).resolve().parent / "stock_train.py"


def surroundings(*first, **values):
    """Environment variables for a subprocess that finds this package, and before it what is in `first`."""
    paths = [*map(str, first), str(ROOT), os.environ.get("PYTHONPATH", "")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return {**os.environ, **own, **values}


def python(*arguments, executable=sys.executable, env=None, **kwargs):
    command = [str(executable), *map(str, arguments)]
    return subprocess.run(command, env=env or surroundings(), capture_output=True, text=True, **kwargs)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


# The program is what it would be without `run`

# Runs `python -m boft_ext` in one forked process per case, so that torch is imported once.
DRIVER = """
    import gc, json, os, sys
    from boft_ext.__main__ import main

    # Forked processes end quickly when they need not look at torch's objects.
    gc.collect()
    gc.freeze()
    results = []
    for arguments, cwd, out, err in json.loads(sys.argv[1]):
        pid = os.fork()
        if pid == 0:
            os.chdir(cwd)
            os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
            os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT), 2)
            os.dup2(os.open(__file__, os.O_RDONLY), 0)
            sys.exit(main(arguments))
        results.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    print(json.dumps(results))
"""

PROBE = """
    import json, sys
    hidden = ("__loader__", "__builtins__", "__spec__")
    seen = {name: str(value) for name, value in list(globals().items()) if name not in hidden}
    seen["spec"] = __spec__ and [__spec__.name, __spec__.origin, __spec__.parent]
    seen["loader"] = [type(__loader__).__name__, getattr(__loader__, "name", None), getattr(__loader__, "path", None)]
    seen["builtins"] = str(type(__builtins__))
    seen["main"] = vars(sys.modules["__main__"]) is globals()
    seen["system"] = [sys.argv, sys.path, sys.stdin.readline()]
    print(json.dumps(seen))
    def annotated(x: int) -> int: return x
    print(annotated.__annotations__, annotated.__module__)
"""

ENDING = """
    import sys

    def end(how):
        if how == "code":
            sys.exit(3)
        if how == "text":
            sys.exit("stopped because of this")
        if how == "error":
            try:
                [][1]
            except IndexError:
                raise ValueError("broken") from None
        if how == "interrupt":
            raise KeyboardInterrupt
        if how == "hook":
            sys.excepthook = lambda kind, error, traceback: print("own hook", traceback.tb_lineno)
            raise ValueError
        print("ended")

    end(sys.argv[1])
"""


def test_programs_see_and_end_what_python_gives_them(tmp_path):
    """Output, standard error and exit status of ``python ARGUMENTS`` and ``python -m boft_ext run ARGUMENTS``."""
    write(tmp_path / "scripts" / "probe.py", PROBE)
    (tmp_path / "link.py").symlink_to("scripts/probe.py")
    write(tmp_path / "package" / "__init__.py", "")
    write(tmp_path / "package" / "__main__.py", PROBE)
    write(tmp_path / "package" / "inner.py", PROBE)
    write(tmp_path / "ending.py", ENDING)
    write(tmp_path / "wrong.py", "x = 1\nif x print(x)\n")
    cases = [
        ["scripts/probe.py", "a", "--", "-m", "b", "--strict"],
        ["link.py"],
        ["-m", "package", "--", "x"],
        ["-m", "package.inner", "-m", "--dropout"],
        *[["ending.py", how] for how in ("text", "error", "interrupt", "hook", "none")],
        ["wrong.py"],
        ["missing.py"],
        ["-m", "package.missing"],
    ]
    driver = write(tmp_path / "driver" / "driver.py", DRIVER)
    files = [(tmp_path / f"{i}.out", tmp_path / f"{i}.err") for i in range(len(cases))]
    runs = [(["run", *case], str(tmp_path), *map(str, file)) for case, file in zip(cases, files, strict=True)]
    driven = python(driver, json.dumps(runs))
    assert driven.returncode == 0, driven.stderr
    for case, file, status in zip(cases, files, json.loads(driven.stdout), strict=True):
        with open(driver) as stdin:
            expected = python(*case, cwd=tmp_path, stdin=stdin)
        out, err = (part.read_text() for part in file)
        assert (case, status, out, err) == (case, expected.returncode, expected.stdout, expected.stderr)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "--strict"],
        ["run", "--unknown", "x"],
        ["run", "--dropout", "half", "x"],
        ["run", "--dropout=0,2", "x"],
    ],
)
def test_wrong_options_show_the_usage(arguments, capsys):
    before = list(sys.meta_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2 and "usage: python -m boft_ext" in capsys.readouterr().err
    assert sys.meta_path == before


def test_spawned_processes_find_the_program_and_patch_too(tmp_path):
    """A dataset of the script itself in a DataLoader's spawned worker, which also has the hook and its options."""
    script = """
        import pickle, sys
        from torch.utils.data import DataLoader, Dataset

        class Rows(Dataset):
            def __len__(self):
                return 2

            def __getitem__(self, i):
                import boft_ext_hook
                options = sys.meta_path[0].options if type(sys.meta_path[0]) is boft_ext_hook._Finder else None
                return str((i, __name__, options, "peft" in sys.modules))

        if __name__ == "__main__":
            assert type(pickle.loads(pickle.dumps(Rows()))) is Rows
            loader = DataLoader(Rows(), None, num_workers=1, multiprocessing_context="spawn")
            print(*loader, sep="\\n")
    """
    options = ["--dropout", "0.5,0.25", "--no-keep-merged"]
    done = python("-m", "boft_ext", "run", *options, write(tmp_path / "a.py", script))
    assert done.returncode == 0, done.stderr
    options = {"dropout": (0.5, 0.25), "keep_merged": False, "strict": False}
    assert done.stdout.splitlines() == [str((i, "__mp_main__", options, False)) for i in range(2)]


# A stock training script, in one process and several


def losses(path):
    return {int(m): (run["m"], torch.tensor(run["losses"])) for m, run in json.loads(path.read_text()).items()}


def reference(m):
    """What `stock_train` does with PEFT's own classes and every factor."""
    from peft_oracle import peft_mathematics
    from stock_train import train

    with peft_mathematics():
        run = train(m)
    assert run["m"] == m
    return torch.tensor(run["losses"])


def test_a_stock_script_trains_as_with_peft(tmp_path, monkeypatch):
    """At m = 1 as unpatched PEFT does by itself, at m = 2 as its mathematics say; PEFT's own answer would be m = 1."""
    from peft.tuners.boft import layer
    from stock_train import train

    done = python("-m", "boft_ext", "run", STOCK, tmp_path / "losses", 1, 2)
    assert done.returncode == 0, done.stderr
    seen = losses(tmp_path / "losses")
    assert [m for m, _ in seen.values()] == [1, 2]
    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: None, raising=False)
    own = torch.tensor(train(1)["losses"])
    assert own[-1] < 0.9 * own[0]
    torch.testing.assert_close(seen[1][1], own, rtol=0, atol=1e-4)
    torch.testing.assert_close(seen[2][1], reference(2), rtol=0, atol=1e-4)
    assert not torch.allclose(seen[1][1], seen[2][1], atol=1e-3)
    assert [line for line in done.stderr.splitlines() if line.startswith("boft_ext:")] == [log_line()]


def log_line():
    import peft

    info = boft_ext.build_info()
    return (
        f"boft_ext: the BOFT layers of PEFT {peft.__version__} run on boft_ext {info['boft_ext']}; CPU kernels: "
        f"{info['cpu_kernels']}; CUDA kernels: none in this build, so GPUs run plain torch; dropout='peft', "
        "keep_merged=True"
    )


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        (["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--local-addr=127.0.0.1"], 2),
        (["accelerate.commands.launch", "--cpu", "--num_processes=1", "--num_machines=1", "--mixed_precision=no"], 1),
    ],
    ids=["torchrun", "accelerate"],
)
def test_launchers(launcher, processes, tmp_path):
    """Every process is patched, the first one says so, and two processes train."""
    done = python("-m", *launcher, "-m", "boft_ext", "run", STOCK, tmp_path / "losses", 2)
    assert done.returncode == 0, done.stderr
    ((m, curve),) = losses(tmp_path / "losses").values()
    assert m == 2 and done.stderr.count("run on boft_ext") == 1
    if processes == 1:
        torch.testing.assert_close(curve, reference(2), rtol=0, atol=1e-4)
    else:
        assert curve[-1] < 0.9 * curve[0]


# The import hook

FAKE_PEFT = {"__init__.py": "from . import tuners\nDONE = True", "tuners.py": ""}
FAKE_PACKAGE = """
    patched = []

    def patch_peft(**options):
        import peft
        patched.append((peft.DONE, options))
"""


def fakes(folder, package=FAKE_PACKAGE, peft=None):
    """A folder with stand-ins for PEFT and for this package, which note when they are patched."""
    for name, text in (peft or FAKE_PEFT).items():
        write(folder / "peft" / name, text)
    write(folder / "boft_ext.py", package)
    return folder


@pytest.mark.parametrize(
    ("code", "patched"),
    [
        ("import peft", True),
        ("import peft.tuners; import peft", True),
        ("from peft import tuners", True),
        ("import importlib.util; assert importlib.util.find_spec('peft').loader.get_source('peft')", False),
        ("import json", False),
        ("hook.uninstall(); import peft", False),
        ("hook.uninstall(); import peft; hook.install(strict=True)", True),
        ("hook.install(dropout='peft'); hook.install(strict=True); import peft", True),
        ("from threading import Thread as T; a = [T(target=__import__, args=['peft']) for _ in 'abc'];"
         "[t.start() for t in a]; [t.join() for t in a]", True),
    ],
)  # fmt: skip
def test_peft_is_patched_once_when_its_import_has_ended(code, patched, tmp_path):
    show = "print(sys.modules['boft_ext'].patched if 'boft_ext' in sys.modules else [])"
    program = f"import sys, boft_ext_hook as hook; hook.install(strict=True); {code}; {show}"
    done = python("-S", "-c", program, env=surroundings(fakes(tmp_path)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([(True, {"strict": True})] * patched) and not done.stderr


def test_an_import_of_peft_that_fails_fails_as_before(tmp_path):
    folder = fakes(tmp_path, peft={"__init__.py": "raise OSError('no PEFT today')"})
    program = "import boft_ext_hook; boft_ext_hook.install(); import peft"
    done = python("-S", "-c", program, env=surroundings(folder), cwd=tmp_path)
    assert done.stderr.endswith("OSError: no PEFT today\n") and "boft_ext" not in done.stderr.split("Error", 1)[1]


def test_peft_stays_as_it_is_where_this_package_cannot_be_imported(tmp_path):
    folder = fakes(tmp_path, package="raise ImportError('built for another torch')")
    program = "import boft_ext_hook; boft_ext_hook.install(); import peft; print(peft.DONE)"
    done = python("-S", "-c", program, env=surroundings(folder), cwd=tmp_path)
    assert done.stdout == "True\n" and "PEFT is left as it is" in done.stderr and "another torch" in done.stderr


# The opt-in of an environment


@pytest.fixture
def other_environment(tmp_path, monkeypatch):
    """The Python of a new virtual environment, which `enable` and `disable` in this process write to."""
    venv.create(tmp_path / "env", symlinks=True)
    executable = tmp_path / "env" / "bin" / "python"
    found = python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", executable=executable)
    monkeypatch.setattr(environment.sysconfig, "get_path", lambda name: {"purelib": found.stdout.strip()}[name])
    monkeypatch.delenv("BOFT_EXT", raising=False)
    return executable


def test_an_enabled_environment_patches_peft(other_environment, tmp_path, capsys):
    def says(command):
        assert main([command]) == 0
        return capsys.readouterr().out

    def run(code, *first, **values):
        return python("-c", code, executable=other_environment, env=surroundings(*first, **values), cwd=tmp_path)

    path = environment.startup_file()
    modules = "import sys; print(*sorted(sys.modules))"
    program = "import peft, sys; print(sys.modules['boft_ext'].patched if 'boft_ext' in sys.modules else [])"
    before = run(modules).stdout.split()
    assert says("status") == f"not enabled: {path} does not exist\n"
    assert says("disable") == f"nothing to remove: {path} does not exist\n"
    assert says("enable") == says("enable") == f"wrote {path}\n"
    assert says("status") == f"enabled by {path}\n"

    # What every other process pays is one small module.
    assert set(run(modules).stdout.split()) - set(before) == {"boft_ext_hook"}
    assert run(program, fakes(tmp_path / "fakes")).stdout == "[(True, {})]\n"
    assert run(program, tmp_path / "fakes", BOFT_EXT="0").stdout == "[]\n"
    without = {**os.environ, "PYTHONPATH": ""}
    gone = python("-c", "print('fine')", executable=other_environment, env=without, cwd=tmp_path)
    assert (gone.returncode, gone.stdout, gone.stderr) == (0, "fine\n", "")

    assert says("disable") == f"removed {path}\n" and not path.exists()
    assert run(modules).stdout.split() == before


def test_an_environment_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(environment.sysconfig, "get_path", lambda name: str(tmp_path / "missing"))
    with pytest.raises(SystemExit, match="the environment is as it was: .*boft_ext_enable.pth"):
        main(["enable"])


def test_notebook_extension(monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.setattr(log, "_logger", logging.Logger("boft_ext"))
    boft_ext.load_ipython_extension(None)
    try:
        assert boft_ext.peft_is_patched()
    finally:
        boft_ext.unload_ipython_extension(None)
    assert not boft_ext.peft_is_patched()
    assert not any(type(finder).__module__ == boft_ext_hook.__name__ for finder in sys.meta_path)


# The log line


@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_patching_logs_one_line_in_the_first_process(rank, monkeypatch, caplog):
    pytest.importorskip("peft")
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    with caplog.at_level(logging.INFO, logger="boft_ext"):
        boft_ext.patch_peft()
        boft_ext.patch_peft()
        boft_ext.unpatch_peft()
    assert [f"{r.name}: {r.getMessage()}" for r in caplog.records] == ([] if rank == "1" else [log_line()])


def test_the_line_is_shown_once_where_the_program_has_its_own_log(capsys, monkeypatch):
    logger = logging.Logger("boft_ext")
    root = logging.getLogger()
    monkeypatch.setattr(log, "_logger", logger)
    monkeypatch.setattr(root, "handlers", [])
    logger.parent = root
    log.show()
    log.show()
    logger.info("first")
    assert capsys.readouterr().err == "boft_ext: first\n"
    root.addHandler(logging.StreamHandler(sys.stderr))
    logger.info("second")
    assert capsys.readouterr().err == "second\n"
