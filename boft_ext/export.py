"""Models with the adapters merged, written to disk without changing the model and without a second copy of it.

Merged weights are ``diag(s) W R^T`` (see `functional.rotate_weight`), computed for one layer at a time while its file
is written.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapted import AdaptedLayer, adapted_layer, base_model, from_peft
from .progress import progress_bar
from .safetensors_writer import Source, check_writable, write
from .staging import staged
from .targets import plain_name

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def export_merged(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    progress: bool = True,
) -> None:
    """Write the model with its active adapters merged, as plain weights that load without PEFT and without boft_ext.

    The keys are the base model's; `modules_to_save` and trained biases are in their places, and several active
    adapters compose as in a forward call. The bits are those of merging the layers; layers that are merged already are
    written as they are. Weights that share their storage are written once, under their first name, and the metadata
    of the file says for which other names they stand, as ``safetensors.torch.save_model`` does.

    ``config.json`` and ``generation_config.json`` of a model of transformers are written beside the weights, and the
    configuration of one of diffusers, so that ``from_pretrained(directory)`` gives a model with the same outputs. Where
    an output layer no longer equals the embedding it was tied to, its configuration says so.

    Args:
        model: a `PeftModel`, a model with injected BOFT layers, or one made by `boft_ext.wrap` or `load_adapter`. It is
            not changed.
        directory: created if missing. ``model.safetensors`` or, above `max_shard_size`, ``model-00001-of-0000N...``
            with ``model.safetensors.index.json``; those of an earlier export are removed. All or nothing: after an
            error, nothing in it has changed.
        max_shard_size: of one file, in bytes or as "5GB", "200MiB"; a single larger tensor gets its own file.
        progress: show a bar, one step per tensor.

    Memory: one layer beside the model. Raises: ValueError if there are no BOFT layers, if adapters are disabled or of
        another method, or for a weight without values here (meta device, offloaded) or without plain numbers
        (quantised); ValueError or TypeError for a bad argument. Not thread-safe with respect to the model.
    """
    limit = _bytes_of(max_shard_size)
    root = base_model(model)
    tensors = merged_tensors(root)
    first = _first_names(tensors)
    untied = _is_untied(root, first)
    # What is no longer tied as the model's class has it must not be left to the class.
    kept = dict(tensors) if untied else {name: tensors[name] for name in dict.fromkeys(first.values())}
    metadata = {"format": "pt"} | {name: other for name, other in first.items() if name not in kept}
    sources = {name: _source(value) for name, value in kept.items()}
    stem = "diffusion_pytorch_model" if _is_diffusers(root) else "model"
    shards = _shards(sources, limit, stem)
    obsolete = (f"{stem}.safetensors", f"{stem}-?????-of-?????.safetensors", f"{stem}.safetensors.index.json")
    with staged(directory, obsolete) as work, progress_bar("export", len(sources), progress) as step:
        _save_configuration(root, work, untied)
        for file, names in shards.items():
            write(work / file, {name: sources[name] for name in names}, metadata, step)
        if len(shards) > 1:
            where = {name: file for file, names in shards.items() for name in names}
            size = sum(source.nbytes for source in sources.values())
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
            (work / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def merged_tensors(root: nn.Module) -> dict[str, Tensor | AdaptedLayer]:
    """The tensors of the base model `root` under its plain names, in its order; nothing is computed or copied.

    A weight that has to be merged is represented by its layer.

    Raises: ValueError as `export_merged`.
    """
    owners = _owners(root)
    tensors: dict[str, Tensor | AdaptedLayer] = {}
    for key, tensor in root.state_dict(keep_vars=True).items():
        parts = key.split(".")
        prefixes = (".".join(parts[:end]) for end in range(len(parts)))
        prefix = next((prefix for prefix in prefixes if prefix in owners), None)
        value: Tensor | AdaptedLayer = tensor
        if prefix is not None:
            inside = owners[prefix](key[len(prefix) :].lstrip("."))
            if inside is None:
                continue
            rest, layer = inside
            key = f"{prefix}.{rest}" if prefix else rest
            value = layer or tensor
        if type(tensor) not in (Tensor, nn.Parameter):
            raise ValueError(f"{plain_name(key)} is a {type(tensor).__name__}, not a plain tensor that can be written")
        if tensor.is_meta:
            raise ValueError(f"{plain_name(key)} is on the meta device or offloaded and has no values to write")
        check_writable(plain_name(key), tensor.dtype)
        tensors[plain_name(key)] = value
    return tensors


# What a wrapper makes of the rest of a key: None for what is no part of the merged model, otherwise the rest of the
# base model's key and the layer to merge, if it is not the tensor itself that is written.
_Owner = Callable[[str], "tuple[str, AdaptedLayer | None] | None"]


def _owners(root: nn.Module) -> dict[str, _Owner]:
    """Layers with adapters and PEFT's wrappers of `modules_to_save`, by their names in `root`'s state dict."""
    owners: dict[str, _Owner] = {}
    count = 0
    for name, module in root.named_modules(remove_duplicate=False):
        layer = adapted_layer(module)
        if layer is not None:
            count += 1
            owners[name] = functools.partial(_in_layer, _checked(plain_name(name), module, layer))
        elif isinstance(module, from_peft("utils.other", "ModulesToSaveWrapper")):
            owners[name] = functools.partial(_in_saved_module, module)
        elif isinstance(module, _other_methods()):
            raise ValueError(f"{plain_name(name)} is a {type(module).__name__} of PEFT, which is not of BOFT")
    if count == 0:
        raise ValueError(f"{type(root).__name__} has no BOFT layers")
    return owners


def _other_methods() -> tuple[Any, ...]:
    found = (
        from_peft("tuners.tuners_utils", "BaseTunerLayer"),
        from_peft("utils.other", "AuxiliaryTrainingWrapper"),
    )
    return tuple(cls for cls in found if cls)


def _checked(name: str, module: nn.Module, layer: AdaptedLayer) -> AdaptedLayer:
    if layer.disabled:
        raise ValueError(f"the adapters of {name} are disabled: enable them, or export the base model itself")
    weight = layer.base_layer.weight
    quantised = getattr(module, "quantization_backend", None)
    if quantised is not None or not weight.is_floating_point():
        raise ValueError(
            f"the weight of {name} is quantised ({quantised or weight.dtype}): load the base model without "
            "quantisation, load the adapter onto it and export that"
        )
    return layer


def _in_layer(layer: AdaptedLayer, rest: str) -> tuple[str, AdaptedLayer | None] | None:
    if not rest.startswith("base_layer."):
        return None
    rest = rest.removeprefix("base_layer.")
    merges = rest == "weight" and bool(layer.active) and not layer.merged
    return rest, layer if merges else None


def _in_saved_module(wrapper: Any, rest: str) -> tuple[str, None] | None:
    active = next((name for name in wrapper.active_adapters if name in wrapper.modules_to_save), None)
    used = "original_module." if active is None or wrapper.disable_adapters else f"modules_to_save.{active}."
    return (rest.removeprefix(used), None) if rest.startswith(used) else None


def _first_names(tensors: dict[str, Tensor | AdaptedLayer]) -> dict[str, str]:
    """For every name the first one of the same values."""
    seen: dict[Any, str] = {}
    return {name: seen.setdefault(_identity(name, value), name) for name, value in tensors.items()}


def _identity(name: str, value: Tensor | AdaptedLayer) -> Any:
    if isinstance(value, AdaptedLayer):
        return "merged", id(value.base_layer)
    if value.numel() == 0:
        return name
    return value.device, value.data_ptr(), value.dtype, value.shape, value.stride()


def _source(value: Tensor | AdaptedLayer) -> Source:
    if isinstance(value, AdaptedLayer):
        weight = value.base_layer.weight
        return Source(weight.dtype, tuple(weight.shape), value.merged_weight)
    return Source(value.dtype, tuple(value.shape), value.detach)


def _shards(sources: dict[str, Source], limit: int, stem: str) -> dict[str, list[str]]:
    """File names and what each holds, in order."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, source in sources.items():
        if groups[-1] and size + source.nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += source.nbytes
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    return {f"{stem}-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, 1)}


def _bytes_of(size: int | str) -> int:
    if isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    match = re.fullmatch(r"(\d+)\s*([KMGT]I?B)", size.upper()) if isinstance(size, str) else None
    if match is None or int(match[1]) == 0:
        raise ValueError(f"max_shard_size must be a number of bytes > 0 or a text like '5GB' or '200MiB', got {size!r}")
    return int(match[1]) * _UNITS[match[2]]


def _is_diffusers(root: nn.Module) -> bool:
    return callable(getattr(root, "save_config", None))


def _is_untied(root: nn.Module, first: dict[str, str]) -> bool:
    """Whether the model's class ties its output layer to its embedding, but the merged weights differ."""
    configs = _tying_configs(getattr(root, "config", None))
    if not any(getattr(config, "tie_word_embeddings", False) for config in configs):
        return False
    ends = [getattr(root, name)() for name in ("get_input_embeddings", "get_output_embeddings")]
    names = {id(module): plain_name(name) for name, module in root.named_modules()}
    keys = [first.get(f"{names[id(module)]}.weight") for module in ends if id(module) in names]
    return len(keys) == 2 and None not in keys and keys[0] != keys[1]


def _tying_configs(config: Any) -> Iterator[Any]:
    """The configurations of a model of transformers that may say that its embeddings are tied."""
    if callable(getattr(config, "save_pretrained", None)):
        yield config
        if callable(getattr(config, "get_text_config", None)):
            yield config.get_text_config()


def _save_configuration(root: nn.Module, directory: Path, untied: bool) -> None:
    if _is_diffusers(root):
        root.save_config(directory)
        return
    if not callable(getattr(getattr(root, "config", None), "save_pretrained", None)):
        return
    config = copy.deepcopy(root.config)
    config.architectures = [type(root).__name__]
    if isinstance(getattr(root, "dtype", None), torch.dtype):
        config.dtype = root.dtype
    if untied:
        warnings.warn(
            "the output layer no longer equals the embedding it is tied to: both are written, with "
            "tie_word_embeddings = False in config.json",
            stacklevel=3,
        )
        for tying in _tying_configs(config):
            tying.tie_word_embeddings = False
    config.save_pretrained(directory)
    if callable(getattr(root, "can_generate", None)) and root.can_generate():
        root.generation_config.save_pretrained(directory)
