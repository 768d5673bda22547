"""PEFT's own BOFT mathematics with every butterfly factor, to compare with.

Without its kernel PEFT silently uses one factor. Here `torch.block_diag` stands in for that kernel, so that PEFT's
classes, which must not be patched, honour m on any device.
"""

import contextlib
import copy
import inspect
import pickle

import pytest
import torch
from peft import BOFTConfig
from peft.tuners.boft import layer as peft_layer
from torch import nn

import boft_ext


class _BlockDiag:
    """`FastBlockDiag` of PEFT: ``(m, D, b, b)`` -> ``(m, D b, D b)``."""

    @staticmethod
    def apply(blocks):
        return torch.stack([torch.block_diag(*factor) for factor in blocks])


@contextlib.contextmanager
def peft_mathematics():
    """Within the block PEFT's unpatched BOFT layers can be made and used, with the configured m."""
    assert not boft_ext.peft_is_patched()
    # PEFT without a kernel (its pull request 3540) needs nothing to honour m.
    stand_ins = {"FastBlockDiag": _BlockDiag, "get_fbd_cuda": lambda: True}
    own = {name: vars(peft_layer)[name] for name in stand_ins if hasattr(peft_layer, name)}
    vars(peft_layer).update({name: stand_ins[name] for name in own})
    try:
        yield
    finally:
        vars(peft_layer).update(own)


def random_config(b, m, **kwargs):
    """A configuration whose adapters start away from the identity."""
    return BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, init_weights=False, **kwargs)


def as_arguments(function, config):
    """`config` as PEFT's `function` takes it: whole, or value by value (PEFT before 0.20)."""
    names = inspect.signature(function).parameters
    values = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return {"config": config} if "config" in names else values


def make_layer(base, configs):
    """A layer of PEFT around a copy of `base`, with the adapters `configs` (by name), all of them active."""
    cls = peft_layer.Conv2d if isinstance(base, nn.Conv2d) else peft_layer.Linear
    (first, config), *others = configs.items()
    layer = cls(copy.deepcopy(base), first, **as_arguments(cls, config))
    for name, config in others:
        layer.update_layer(name, **as_arguments(layer.update_layer, config))
    layer.set_adapter(list(configs))
    return layer


def adapter_state(layer):
    """The adapters of a layer, without the base layer's part."""
    return {name: tensor.detach().clone() for name, tensor in layer.state_dict().items() if name.startswith("boft_")}


def observe(layer, x):
    """What a user sees of a layer: output, all gradients for the loss sum(sin(out)), merged and unmerged weight."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    out = layer(x)
    out.sin().sum().backward()
    seen = {"out": out.detach(), "dx": x.grad}
    for name, parameter in layer.named_parameters():
        if parameter.grad is not None:
            seen[f"d{name}"] = parameter.grad.clone()
    layer.merge()
    seen["merged weight"] = layer.get_base_layer().weight.detach().clone()
    layer.unmerge()
    seen["unmerged weight"] = layer.get_base_layer().weight.detach().clone()
    return seen


def assert_needs_the_patch(layer, x):
    """Without the patch every use of `layer`, which was made under it, and of its copies names the remedy."""
    weight = layer.base_layer.weight.clone()
    for broken in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        for use in (lambda: broken(x), broken.merge, lambda: broken.get_delta_weight("default")):
            with pytest.raises(RuntimeError, match=r"boft_ext\.patch_peft\(\)"):
                use()
        assert not broken.merged and torch.equal(broken.base_layer.weight, weight)
