"""build_info and `python -m boft_ext info`."""

import importlib.metadata
import json
import platform
import subprocess
import sys

import pytest
import torch

from boft_ext import ops
from boft_ext.__main__ import main
from boft_ext.info import build_info


def test_what_is_reported():
    info = build_info()
    assert info["torch"] == str(torch.__version__) and info["python"] == platform.python_version()
    assert info["torch_built_for"].split(".")[:2] == info["torch"].split(".")[:2]
    assert info["cpu_kernels"] in info["cpu_kernels_available"]
    installed = {
        distribution.metadata["Name"]: distribution.version for distribution in importlib.metadata.distributions()
    }
    assert info["peft"] == installed.get("peft")
    assert isinstance(info["cuda_architectures"], list)
    # The running torch may have no CUDA although the kernels are built.
    assert info["cuda_streams"] == bool(info["cuda_architectures"] and torch.version.cuda)
    assert {"blocks", "rotate", "merge", "scale"} <= set(info["device_independent_ops"])
    assert json.loads(json.dumps(info)) == info


def test_the_variant_in_use_is_reported():
    for variant in build_info()["cpu_kernels_available"]:
        with ops.cpu_variant(variant):
            assert build_info()["cpu_kernels"] == variant
    with ops.without_kernels():
        assert build_info()["cpu_kernels"] == "none"
        for key in ("CPU", "CUDA"):
            assert not torch._C._dispatch_has_kernel_for_dispatch_key("boft::rotate", key)


def test_missing_peft_is_reported(monkeypatch, capsys):
    version = importlib.metadata.version

    def without_peft(name):
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_peft)
    assert build_info()["peft"] is None
    assert main(["info"]) == 0
    assert "peft                    not installed" in capsys.readouterr().out


def test_readable_output_names_every_value(capsys):
    assert main(["info"]) == 0
    lines = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    info = build_info()
    assert lines.keys() == info.keys()
    assert lines["torch"] == info["torch"]
    assert lines["cpu_kernels_available"] == ", ".join(info["cpu_kernels_available"])


def test_module_on_the_command_line():
    result = subprocess.run(
        [sys.executable, "-m", "boft_ext", "info", "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout) == build_info()


@pytest.mark.parametrize("arguments", [[], ["unknown"], ["info", "--unknown"]])
def test_wrong_arguments_show_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: python -m boft_ext" in capsys.readouterr().err
