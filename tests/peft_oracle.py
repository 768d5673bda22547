"""PEFT's own BOFT mathematics with every butterfly factor, to compare with.

Without its kernel PEFT silently uses one factor. Here `torch.block_diag` stands in for that kernel, so that PEFT's
classes, which must not be patched, honour m on any device.
"""

import contextlib
import copy

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
    own = peft_layer.FastBlockDiag, peft_layer.get_fbd_cuda
    peft_layer.FastBlockDiag, peft_layer.get_fbd_cuda = _BlockDiag, lambda: True
    try:
        yield
    finally:
        peft_layer.FastBlockDiag, peft_layer.get_fbd_cuda = own


def random_config(b, m, **kwargs):
    """A configuration whose adapters start away from the identity."""
    return BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m, init_weights=False, **kwargs)


def make_layer(base, configs):
    """A layer of PEFT around a copy of `base`, with the adapters `configs` (by name), all of them active."""
    cls = peft_layer.Conv2d if isinstance(base, nn.Conv2d) else peft_layer.Linear
    (first, config), *others = configs.items()
    layer = cls(copy.deepcopy(base), first, config=config)
    for name, config in others:
        layer.update_layer(name, config=config)
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
