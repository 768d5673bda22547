"""How the layout of PEFT's BOFT layers is recognised, and the layout of its pull request 3540.

tests/run_peft_versions.py runs the other tests of the patch with each released version.
"""

import copy
import pickle
import types

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft.tuners import boft  # noqa: E402
from peft.tuners.boft import layer as peft_layer  # noqa: E402
from peft_oracle import assert_needs_the_patch, make_layer, random_config  # noqa: E402
from tolerance import assert_exact, relative_error  # noqa: E402

import boft_ext  # noqa: E402
from boft_ext import peft_versions  # noqa: E402
from boft_ext.functional import rotation_matrix  # noqa: E402

# A stand-in, written for these tests, for how the pull request differs: no kernel, no dense tables, every m honoured


def update_layer(self, adapter_name, config, **kwargs):
    b, m = config.boft_block_size, config.boft_n_butterfly_factor
    channels = self.get_base_layer().weight[0].numel()
    tables = [self.block_butterfly_perm(channels, channels // b >> i, b // 2, m - 1) for i in range(m)]
    self.register_buffer("boft_P", torch.stack(tables), persistent=False)
    self.register_buffer("boft_P_inv", self.boft_P.argsort(dim=-1), persistent=False)
    self.boft_dropout[adapter_name] = nn.Identity()
    self.boft_R[adapter_name] = nn.Parameter(torch.zeros(m, channels // b, b, b))
    shape = (1, self.out_features) if isinstance(self, peft_layer.Conv2d) else (self.out_features, 1)
    self.boft_s[adapter_name] = nn.Parameter(torch.ones(shape))
    self.reset_boft_parameters(adapter_name, config.init_weights)
    self.set_adapter(self.active_adapters)


def get_delta_weight(self, adapter):
    product = None
    for blocks, order in zip(self.boft_R[adapter], self.boft_P.to("cpu"), strict=True):
        factor = torch.block_diag(*self.cayley_batch(blocks))[order][:, order]
        product = factor if product is None else factor @ product
    return product, self.boft_s[adapter].reshape(-1, 1)


def forward(self, x, *args, **kwargs):
    assert not self.merged
    rotation, scale = self.get_delta_weight(*self.active_adapters)
    base = self.get_base_layer()
    weight = ((base.weight.flatten(1) @ rotation.T) * scale).view_as(base.weight)
    return torch.func.functional_call(base, {"weight": weight}, x)


@pytest.fixture
def pull_request(monkeypatch):
    """The installed PEFT in that layout."""
    monkeypatch.delattr(peft_layer, "get_fbd_cuda")
    monkeypatch.delattr(peft_layer, "FastBlockDiag")
    monkeypatch.delattr(peft_layer.BOFTLayer, "perm2mat")
    for cls in (peft_layer.BOFTLayer, peft_layer.Conv2d):
        monkeypatch.setattr(cls, "update_layer", update_layer)
    for cls in (peft_layer.Linear, peft_layer.Conv2d):
        monkeypatch.setattr(cls, "forward", forward)
        monkeypatch.setattr(cls, "get_delta_weight", get_delta_weight)
    yield
    boft_ext.unpatch_peft()


BASES = [(nn.Linear(16, 8), (3, 16)), (nn.Conv2d(4, 8, 2), (3, 4, 5, 5))]


@pytest.mark.parametrize(("base", "shape"), BASES, ids=["linear", "conv"])
def test_layers_of_the_pull_request_are_taken_over_with_their_factors(base, shape, pull_request):
    x = torch.randn(shape)
    layer = make_layer(base, {"default": random_config(4, 3)})
    stored = pickle.dumps(layer)
    expected = layer(x).detach()
    assert boft_ext.patch_peft(strict=True)
    for taken in (layer, pickle.loads(stored)):
        assert relative_error(taken(x), expected) < 1e-5
        assert not list(taken.buffers()) and taken.boft_R["default"].shape[0] == 3
        taken.merge()
        assert relative_error(taken(x), expected) < 1e-5


@pytest.mark.parametrize(("base", "shape"), BASES, ids=["linear", "conv"])
def test_layers_made_on_the_pull_request_need_the_patch(base, shape, pull_request):
    x = torch.randn(shape)
    own = dict(vars(peft_layer.Linear)), dict(vars(peft_layer.Conv2d)), dict(vars(peft_layer.BOFTLayer))
    boft_ext.patch_peft(strict=True)
    layer = make_layer(base, {"default": random_config(4, 2)})
    assert_exact("rotation", layer.get_delta_weight("default")[0], rotation_matrix(layer.boft_R["default"].double()))
    expected = layer(x)
    boft_ext.unpatch_peft()
    assert own == (dict(vars(peft_layer.Linear)), dict(vars(peft_layer.Conv2d)), dict(vars(peft_layer.BOFTLayer)))
    assert_needs_the_patch(layer, x)
    boft_ext.patch_peft(strict=True)
    assert torch.equal(layer(x), expected)


# Recognising layouts


def package_like(layout, **changes):
    """A package whose functions have the signatures of `layout`, but for `changes` (by last name; None: leave out)."""
    root = {}
    for name, parameters in layout.signatures.items():
        *owners, last = name.split(".")
        parameters = changes.get(last, parameters)
        if parameters is None:
            continue
        namespace = root
        for owner in owners:
            namespace = namespace.setdefault(owner, {})
        function = {}
        exec(f"def f({', '.join(parameters)}): pass", function)
        namespace[last] = function["f"]

    def as_object(value):
        if not isinstance(value, dict):
            return value
        return types.SimpleNamespace(**{name: as_object(inner) for name, inner in value.items()})

    package = as_object(root)
    for name in ("adapter_layer_names", "other_param_names"):
        setattr(package.layer.BOFTLayer, name, getattr(peft_layer.BOFTLayer, name))
    package.BOFTConfig = boft.BOFTConfig
    return package


@pytest.mark.parametrize("layout", peft_versions.LAYOUTS, ids=lambda layout: layout.versions)
def test_each_layout_is_recognised_and_none_other(layout):
    assert peft_versions.find_layout(package_like(layout)) == (layout, "")
    found, reason = peft_versions.find_layout(package_like(layout, merge=("self", "safely")))
    assert found is None and "layer.Linear.merge takes (self, safely), expected (self, safe_merge, adapter" in reason
    found, reason = peft_versions.find_layout(package_like(layout, check_adapters_to_merge=None))
    assert found is None and "check_adapters_to_merge does not exist" in reason
    package = package_like(layout)
    package.layer.BOFTLayer.other_param_names = ("boft_block_size",)
    assert "other_param_names is ('boft_block_size',)" in peft_versions.find_layout(package)[1]
    package = package_like(layout)
    package.BOFTConfig = types.SimpleNamespace(__dataclass_fields__={"boft_block_size": 0})
    assert "no field boft_block_num, boft_n" in peft_versions.find_layout(package)[1]
    assert layout.versions in peft_versions.find_layout(package)[1]


def test_a_package_of_another_kind_is_none_of_the_layouts():
    found, reason = peft_versions.find_layout(types.SimpleNamespace())
    assert found is None and "does not exist" in reason
