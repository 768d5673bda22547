"""Seeds, kernel choice and what several test files need of PEFT."""

import contextlib
import os
import zlib

import pytest
import torch

from boft_ext import _C, ops

FORMS = [*_C.cpu_variants(), "composite"]

# What tests/gpu runs on, which is only collected where there is a GPU. BOFT_TEST_DEVICE=cpu tries the tests themselves.
DEVICE = os.environ.get("BOFT_TEST_DEVICE") or ("cuda" if torch.cuda.is_available() else "")
collect_ignore = [] if DEVICE else ["gpu"]


@pytest.fixture
def device():
    """The device that tests/gpu is to check."""
    assert DEVICE, "there is no GPU: BOFT_TEST_DEVICE=cpu runs these tests on the CPU"
    return torch.device(DEVICE)


@pytest.fixture
def cuda(device):
    """The same, for what only CUDA devices have."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device")
    return device


@pytest.fixture(autouse=True)
def seed(request):
    """Seeds torch differently for each test; BOFT_SEED=n gives another series. Printed, so shown with any failure."""
    value = zlib.crc32(f"{os.environ.get('BOFT_SEED', 0)} {request.node.nodeid}".encode())
    print(f"seed {value}")
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def compiles_anew():
    """torch.compile gives up on a function that was compiled too often in one process, by whichever tests."""
    yield
    torch.compiler.reset()


@contextlib.contextmanager
def use_form(name):
    """Run operators with one variant of the CPU kernels, or with none of them ("composite")."""
    with ops.without_kernels() if name == "composite" else ops.cpu_variant(name):
        yield


@pytest.fixture(params=FORMS)
def form(request):
    """Each way the operators can run on this machine."""
    with use_form(request.param):
        yield request.param


@pytest.fixture
def failing_build(monkeypatch):
    """Every attempt of PEFT to build its kernel fails. A list of the attempts, one entry each."""
    from torch.utils import cpp_extension

    attempts = []

    def load(*args, **kwargs):
        attempts.append(kwargs)
        raise RuntimeError("no CUDA compiler")

    monkeypatch.setattr(cpp_extension, "load", load)
    return attempts
