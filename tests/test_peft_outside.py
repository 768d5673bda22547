"""patch_peft changes PEFT's BOFT classes and nothing else."""

import sys
import types

import peft
import pytest
import torch
from peft import BOFTConfig, IA3Config, LoraConfig, OFTConfig, get_peft_model
from peft.tuners.boft import BOFTModel
from peft.tuners.boft.layer import BOFTLayer, Conv2d, Linear
from torch import nn

import boft_ext

BOFT_CLASSES = {BOFTLayer, Linear, Conv2d, BOFTModel, BOFTConfig}


@pytest.fixture(autouse=True)
def unpatch_after():
    yield
    boft_ext.unpatch_peft()


def owners():
    """Everything of PEFT, and torch's modules, that holds attributes: modules, their classes and their functions."""
    found = {}
    for name, module in list(sys.modules.items()):
        if not name.startswith(("peft.", "torch.nn.")) and name != "peft":
            continue
        found[id(module)] = module
        for value in list(vars(module).values()):
            inside = (getattr(value, "__module__", None) or "").startswith(("peft", "torch.nn"))
            if isinstance(value, (type, types.FunctionType)) and inside:
                found[id(value)] = value
    return list(found.values())


def attributes(owner):
    """What `owner` holds by name, and what a module's dictionaries hold, such as PEFT's tables of methods."""
    held = dict(vars(owner))
    if isinstance(owner, types.ModuleType):
        tables = {name: table for name, table in held.items() if isinstance(table, dict) and name[:2] != "__"}
        held |= {(name, key): value for name, table in tables.items() for key, value in table.items()}
    if isinstance(owner, types.FunctionType):
        held |= {name: getattr(owner, name) for name in ("__code__", "__defaults__", "__kwdefaults__", "__closure__")}
    return held


def test_only_the_classes_of_boft_change():
    before = [(owner, attributes(owner)) for owner in owners()]
    assert len(before) > 1000
    boft_ext.patch_peft(strict=True)
    changed = set()
    for owner, held in before:
        now = attributes(owner)
        if now.keys() != held.keys() or any(now[name] is not value for name, value in held.items()):
            changed.add(owner)
    assert changed == BOFT_CLASSES


OTHERS = {
    "lora": lambda: LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False),
    "dora": lambda: LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False, use_dora=True),
    "oft": lambda: OFTConfig(r=0, oft_block_size=4, target_modules=["0", "2"], init_weights=False),
    "ia3": lambda: IA3Config(target_modules=["0", "2"], feedforward_modules=["2"], init_ia3_weights=False),
}


def observe(method):
    """Output, gradients, saved tensors and merged output of a small model with another method's adapters."""
    torch.manual_seed(3)
    model = get_peft_model(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(72, 6)), OTHERS[method]())
    out = model(torch.randn(2, 4, 5, 5))
    out.sin().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    saved = peft.get_peft_model_state_dict(model)
    merged = model.merge_and_unload()(torch.randn(2, 4, 5, 5))
    return [out, *gradients, *saved.values(), merged]


@pytest.mark.parametrize("method", OTHERS)
def test_other_methods_compute_the_same_bits(method):
    before = observe(method)
    boft_ext.patch_peft(strict=True)
    now = observe(method)
    assert len(now) == len(before) > 4
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(now, before, strict=True))
