"""Adapters of whole models, in PEFT's file format, without PEFT.

A directory holds ``adapter_config.json`` (see `BOFTConfig`) and ``adapter_model.safetensors`` with the keys
``base_model.model.<layer>.boft_R`` and ``.boft_s``, ``base_model.model.<layer>.base_layer.bias`` for trained biases
and ``base_model.model.<module>.<parameter>`` for `modules_to_save`, as ``PeftModel.save_pretrained`` of PEFT 0.21
writes them. None of these functions is thread-safe with respect to the model it is given.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from .config import BOFTConfig, as_config
from .nn import BOFTConv2d, BOFTLinear
from .targets import linear_names, modules_by_name, plain_name, saved_names, target_names, with_task_heads

WEIGHTS_NAME = "adapter_model.safetensors"

_PREFIX = "base_model.model."
# Entries that some PEFT versions write besides: a table computed from the shape, and second copies of saved biases.
_IGNORED = (".boft_P", ".original_module.bias", ".modules_to_save.bias")

_Layer = BOFTLinear | BOFTConv2d


def wrap(model: nn.Module, config: Any) -> nn.Module:
    """Adapt the layers that `config` targets, in place, and freeze everything else.

    Layers are chosen by PEFT's rules (see `boft_ext.targets`). Trainable afterwards are the adapters, all of
    `modules_to_save` (with the output layers that PEFT adds for classification and question answering tasks) and the
    biases that `config.bias` names; nothing if `config.inference_mode`.

    Args:
        model: any module; its targeted `nn.Linear` and `nn.Conv2d` are replaced by `BOFTLinear` and `BOFTConv2d`.
        config: `BOFTConfig` of this package or of PEFT. A copy is kept as ``model.boft_config``, in which "all-linear"
            is replaced by the names it stands for and `base_model_name_or_path` by the model's own name.

    Returns: `model`.
    Raises: ValueError if nothing matches, if a matching layer cannot be adapted or does not fit b and m, or if the
        model has adapters already; TypeError for another kind of configuration. The model is then unchanged.
    """
    config = as_config(config)
    name = _original(model).__dict__.get("name_or_path") or None
    if config.base_model_name_or_path not in (None, name):
        warnings.warn(
            f"base_model_name_or_path is {config.base_model_name_or_path!r} in the configuration and {name!r} in the "
            "model; the latter is kept",
            stacklevel=2,
        )
    config = dataclasses.replace(config, base_model_name_or_path=name, modules_to_save=with_task_heads(config))
    config, new = _build_layers(model, config)
    _attach(model, config, new)
    return model


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapter of a model made by `wrap` or `load_adapter` as PEFT's two files; PEFT loads them.

    Works while merged too. `inference_mode` is written as True and, without a task type, the class of the model as
    `auto_mapping`, as PEFT does.

    Args:
        directory: created if missing; existing files of those names are replaced.

    Raises: ValueError if the model has no adapter, its parameters are on the meta device, or `directory` is a file.
    """
    config = _live_config(model)
    layers = _adapted_layers(model)
    tensors = _slots(model, config, layers) | _bias_slots(model, config, layers)
    meta = [name for name, tensor in tensors.items() if tensor.is_meta]
    if meta:
        raise ValueError(f"{meta[0]} is on the meta device and has no values to save")
    base = _original(model)
    if config.task_type is None:
        mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
        config = dataclasses.replace(config, auto_mapping=mapping)
    dataclasses.replace(config, inference_mode=True).save_pretrained(directory)
    # Cloned because the format allows neither shared nor strided tensors.
    copies = {
        _PREFIX + name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    safetensors.torch.save_file(copies, Path(directory) / WEIGHTS_NAME, metadata={"format": "pt"})


def load_adapter(model: nn.Module, directory: str | os.PathLike[str], *, is_trainable: bool = False) -> nn.Module:
    """Load an adapter written by `save_adapter` or by PEFT, all of it or nothing.

    Args:
        model: a plain model, whose layers are then replaced as by `wrap`, or one with adapters, whose values are
            overwritten and which otherwise keeps its own settings. Parameters keep their dtype and device.
        directory: holds the two files. Keys may lack PEFT's prefix ``base_model.model.``. The number of factors m is
            that of the stored tensors; where a configuration says otherwise, it is corrected with a warning.
        is_trainable: for a plain model, whether the adapter trains on, as in ``PeftModel.from_pretrained``.

    Returns: `model`.
    Raises: ValueError if a file is missing, truncated or of another method, if its tensors are not exactly those of
        the model's adapter or of other shapes, or if an adapter of the model is merged. The model is then unchanged.
    """
    config = BOFTConfig.from_pretrained(directory)
    stored = _read_tensors(directory)
    m = _stored_factors(stored)
    if m != config.boft_n_butterfly_factor:
        warnings.warn(
            f"the configuration says boft_n_butterfly_factor = {config.boft_n_butterfly_factor}, but the tensors hold "
            f"m = {m}, which is used",
            stacklevel=2,
        )
    layers = _adapted_layers(model)
    new: dict[str, _Layer] = {}
    if layers:
        config = _live_config(model)
        merged = [name for name, layer in layers.items() if layer.merged]
        if merged:
            raise ValueError(f"cannot load into merged layers, unmerge first: {_some(merged)}")
    else:
        config = dataclasses.replace(config, boft_n_butterfly_factor=m, inference_mode=not is_trainable)
        config, new = _build_layers(model, config)
    required = _slots(model, config, layers or new)
    biases = {name: slot for name, slot in _bias_slots(model, config, layers or new).items() if name not in required}
    slots = required | biases
    values = _matched(slots, required, stored)
    _check_shapes(layers or new, slots, values, m)
    # PEFT up to 0.20 wrote none for "boft_only".
    absent = [name for name in biases if name not in values]
    if absent:
        warnings.warn(
            f"{directory} lacks {_some(absent)} (bias = {config.bias!r}); the model's are kept", stacklevel=2
        )

    with torch.no_grad():
        for name, value in values.items():
            _assign(slots[name], value)
    if new:
        _attach(model, config, new)
    elif config.boft_n_butterfly_factor != m:
        warnings.warn(f"the model's m = {config.boft_n_butterfly_factor} becomes {m}, as stored", stacklevel=2)
        model.boft_config.boft_n_butterfly_factor = m
    return model


def _original(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` was given."""
    return getattr(model, "_orig_mod", model)


def _adapted_layers(model: nn.Module) -> dict[str, _Layer]:
    return {name: module for name, module in modules_by_name(model).items() if isinstance(module, _Layer)}


def _live_config(model: nn.Module) -> BOFTConfig:
    config = getattr(model, "boft_config", None)
    if config is None:
        raise ValueError(f"{type(model).__name__} has no adapter: it was not made by boft_ext.wrap or load_adapter")
    return as_config(config)


def _build_layers(model: nn.Module, config: BOFTConfig) -> tuple[BOFTConfig, dict[str, _Layer]]:
    """The layers to put in, by name, and the configuration with its targets spelled out. The model is not touched."""
    if _adapted_layers(model):
        raise ValueError("the model has BOFT layers already")
    if getattr(model, "peft_config", None):
        raise ValueError("the model has adapters of PEFT; use boft_ext.patch_peft for those")
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        config = dataclasses.replace(config, target_modules=linear_names(model, config))
    modules = modules_by_name(model)
    saved = list(saved_names(modules, config))
    if config.modules_to_save and not saved:
        warnings.warn(f"modules_to_save = {config.modules_to_save} matches nothing", stacklevel=3)
    new: dict[str, _Layer] = {}
    for name in target_names(model, config):
        if any(name == other or name.startswith(f"{other}.") for other in saved):
            raise ValueError(
                f"layer {name} matches both target_modules and modules_to_save = {config.modules_to_save}"
            )
        parent = modules[name.rpartition(".")[0]]
        if isinstance(parent, nn.MultiheadAttention):
            warnings.warn(
                f"{name}: nn.MultiheadAttention only reads its weight, so the adapter acts once merged", stacklevel=3
            )
        try:
            new[name] = _adapted(modules[name], config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"layer {name}: {error}") from error
    _warn_of_shared_weights(model, new)
    return config, new


def _warn_of_shared_weights(model: nn.Module, new: Mapping[str, _Layer]) -> None:
    weights = {id(layer.weight): name for name, layer in new.items()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        layer = weights.get(id(parameter))
        if layer is not None and plain_name(name) != f"{layer}.weight":
            warnings.warn(f"{layer} and {name} share one weight, so merging changes both", stacklevel=4)


def _adapted(module: nn.Module, config: BOFTConfig) -> _Layer:
    if isinstance(module, nn.Linear):
        return BOFTLinear(module, config)
    if isinstance(module, nn.Conv2d):
        return BOFTConv2d(module, config)
    raise TypeError(f"only nn.Linear and nn.Conv2d can be adapted, not {type(module).__name__}")


def _attach(model: nn.Module, config: BOFTConfig, new: Mapping[str, _Layer]) -> None:
    """Put the layers in and set what trains."""
    modules = modules_by_name(model)
    for name, layer in new.items():
        parent, _, child = name.rpartition(".")
        setattr(modules[parent], child, layer)
        if isinstance(modules[parent], nn.TransformerEncoderLayer):
            _avoid_fused_kernel(layer, modules.values())
    trained = {id(p) for layer in new.values() for p in (layer.boft_R, layer.boft_s)}
    if not config.inference_mode:
        slots = _slots(model, config, new) | _bias_slots(model, config, new)
        trained |= {id(slot) for slot in slots.values() if isinstance(slot, nn.Parameter) and slot.is_floating_point()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained and not config.inference_mode)
    model.boft_config = config


def _avoid_fused_kernel(layer: _Layer, modules: Iterable[nn.Module]) -> None:
    """Make an `nn.TransformerEncoderLayer` call its linear `layer` in evaluation as it does in training.

    It would otherwise hand the bare weights to one fused kernel, which knows no adapter; layers with hooks are spared
    that. The nested tensors that an `nn.TransformerEncoder` makes of padded input are for that kernel alone.
    """
    layer.register_forward_pre_hook(_change_nothing)
    for module in modules:
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _change_nothing(module: nn.Module, arguments: tuple[Any, ...]) -> None:
    """A forward hook that is only there."""


def _slots(model: nn.Module, config: BOFTConfig, layers: Mapping[str, _Layer]) -> dict[str, Tensor]:
    """The model's own tensors that every adapter file holds, by key without prefix.

    `layers` may be part of the model or about to replace layers of the same names.
    """
    slots: dict[str, Tensor] = {}
    for name, layer in layers.items():
        slots[f"{name}.boft_R"] = layer.boft_R
        slots[f"{name}.boft_s"] = layer.boft_s
    outside = _outside(model, layers)
    names = {plain_name(name) for name, _ in model.named_modules(remove_duplicate=False)}
    saved = tuple(f"{name}." for name in saved_names(names, config))
    return slots | {key: tensor for key, tensor in outside.items() if key.startswith(saved)}


def _bias_slots(model: nn.Module, config: BOFTConfig, layers: Mapping[str, _Layer]) -> dict[str, Tensor]:
    """The biases that the configuration trains, by key without prefix."""
    if config.bias == "none":
        return {}
    biases = {f"{name}.base_layer.bias": layer.bias for name, layer in layers.items() if layer.bias is not None}
    if config.bias == "all":
        outside = _outside(model, layers)
        biases |= {key: tensor for key, tensor in outside.items() if key == "bias" or key.endswith(".bias")}
    return biases


def _outside(model: nn.Module, layers: Mapping[str, _Layer]) -> dict[str, Tensor]:
    """The tensors of `model` outside adapted layers, the live ones, by plain name."""
    inside = tuple(f"{name}." for name in layers)
    state = ((plain_name(key), tensor) for key, tensor in model.state_dict(keep_vars=True).items())
    return {key: tensor for key, tensor in state if isinstance(tensor, Tensor) and not key.startswith(inside)}


def _read_tensors(directory: str | os.PathLike[str]) -> dict[str, Tensor]:
    path = Path(directory) / WEIGHTS_NAME
    if not path.is_file():
        raise ValueError(f"{directory} holds no {WEIGHTS_NAME}")
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error


def _stored_factors(stored: Mapping[str, Tensor]) -> int:
    """m of a file: the first size of every `boft_R` in it."""
    sizes = {
        tensor.shape[0] if tensor.dim() == 4 else 0 for name, tensor in stored.items() if name.endswith(".boft_R")
    }
    if not sizes:
        raise ValueError(f"the file holds no boft_R, only {_some(stored)}")
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(f"every boft_R must be (m, d / b, b, b) with one m, got {_shapes(stored)}")
    return sizes.pop()


def _matched(
    slots: Mapping[str, Tensor], required: Mapping[str, Tensor], stored: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The stored tensors by key of `slots`, none left over and nothing that is required missing."""
    values = {key if key in slots else key.removeprefix(_PREFIX): tensor for key, tensor in stored.items()}
    if len(values) < len(stored):
        raise ValueError(f"the file holds some tensors twice, with and without the prefix {_PREFIX}: {_some(stored)}")
    extra = [key for key in values if key not in slots and not key.endswith(_IGNORED)]
    if len(extra) == len(values):
        raise ValueError(f"nothing in the file matches the model: it holds {_some(extra)}, expected {_some(slots)}")
    if extra:
        raise ValueError(
            f"the file holds {_some(extra)}, which the adapter of this model lacks (modules_to_save and bias in the "
            "configuration say what is stored besides boft_R and boft_s)"
        )
    missing = [key for key in required if key not in values]
    if missing:
        raise ValueError(f"the file lacks {_some(missing)}")
    return {key: tensor for key, tensor in values.items() if key in slots}


def _check_shapes(
    layers: Mapping[str, _Layer], slots: Mapping[str, Tensor], values: Mapping[str, Tensor], m: int
) -> None:
    """Every stored tensor has the shape of its slot, except that m may differ where the layer allows it."""
    expected = {name: tuple(slots[name].shape) for name in values}
    for name, layer in layers.items():
        _, blocks, b, _ = layer.boft_R.shape
        shape = BOFTConfig(boft_block_size=b, boft_n_butterfly_factor=m)
        try:
            layer.resolve(layer.base_layer, shape)
        except ValueError as error:
            raise ValueError(f"layer {name}: {error}") from error
        expected[f"{name}.boft_R"] = (m, blocks, b, b)
    for name, value in values.items():
        if tuple(value.shape) != expected[name]:
            raise ValueError(f"{name} is {tuple(value.shape)} in the file, expected {expected[name]}")
        if value.is_floating_point() != slots[name].is_floating_point():
            raise ValueError(f"{name} is {value.dtype} in the file and {slots[name].dtype} in the model")
        if slots[name].is_meta:
            raise ValueError(f"{name} of the model is on the meta device and cannot take values")


def _assign(slot: Tensor, value: Tensor) -> None:
    if slot.shape == value.shape:
        slot.copy_(value)
    else:
        # The parameter object stays, so an optimiser that holds it goes on training it.
        # A copy, because the tensors of a safetensors file may be views of the file itself.
        slot.data = value.to(slot.device, slot.dtype, copy=True)
        slot.grad = None


def _some(names: Any) -> str:
    """At most three names, for a message."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _shapes(stored: Mapping[str, Tensor]) -> str:
    return _some(f"{name} {tuple(tensor.shape)}" for name, tensor in stored.items() if name.endswith(".boft_R"))
