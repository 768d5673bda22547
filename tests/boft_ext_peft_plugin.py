"""A pytest plugin (``-p boft_ext_peft_plugin``) that runs a test session with `boft_ext.patch_peft` in force."""

import pytest
import torch
from peft import BOFTConfig
from peft_oracle import make_layer

import boft_ext

STATUS = boft_ext.patch_peft(strict=True)


def pytest_report_header(config):
    return repr(STATUS)


@pytest.fixture(autouse=True)
def every_factor_is_built():
    """Fail a test that ran on layers without the configured number of factors."""
    yield
    layer = make_layer(torch.nn.Linear(8, 8), {"default": BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=3)})
    assert boft_ext.peft_is_patched() and layer.boft_R["default"].shape == (3, 4, 2, 2)
