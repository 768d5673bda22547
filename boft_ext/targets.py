"""Which modules of a model a configuration means, by PEFT's rules.

Read in PEFT 0.21 (`peft.tuners.tuners_utils.check_target_module_exists`, `_maybe_include_all_linear_layers`,
`peft.utils.other._set_trainable`), so that one configuration selects the same layers with and without PEFT. All
functions only look at the model.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator

from torch import nn

from .config import BOFTConfig

_CONV1D = ("transformers.pytorch_utils", "Conv1D")
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def plain_name(name: str) -> str:
    """A module or tensor name without the part that `torch.compile` inserts."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Every module once, under its first plain name; of a compiled module and its original, the original."""
    return {plain_name(name): module for name, module in model.named_modules()}


def with_task_heads(config: BOFTConfig) -> list[str] | None:
    """`modules_to_save` with the output layers that PEFT adds for the configuration's task."""
    heads = [
        head for head in _TASK_HEADS.get(config.task_type or "", ()) if head not in (config.modules_to_save or [])
    ]
    return [*(config.modules_to_save or []), *heads] if heads else config.modules_to_save


def linear_names(model: nn.Module, config: BOFTConfig) -> set[str]:
    """What "all-linear" stands for: every linear layer but a language model's or classifier's output layer."""
    outputs = []
    if callable(getattr(model, "get_output_embeddings", None)):
        outputs = [model.get_output_embeddings()]
        if outputs == [None] and config.task_type == "SEQ_CLS":
            heads = (getattr(model, name, None) for name in ("score", "classifier"))
            outputs = [head for head in heads if head is not None][:1]
    modules = modules_by_name(model)
    return {name for name, module in modules.items() if _is_linear(module) and not any(module is o for o in outputs)}


def target_names(model: nn.Module, config: BOFTConfig) -> list[str]:
    """Names of the layers to adapt, in the model's order.

    A name in a list matches a layer of that name or ending in ``.name``, and then also has to lie in one of
    `layers_to_transform`; a string matches as a regular expression for the whole name. `exclude_modules` and
    everything in `modules_to_save` are left out.

    Raises: ValueError if nothing matches, if `target_modules` is None, or for a broken regular expression.
    """
    if not config.target_modules:
        raise ValueError(f"target_modules is {config.target_modules!r}: name the layers to adapt, or use 'all-linear'")
    names = [name for name in modules_by_name(model) if name]
    try:
        excluded = {name for name in names if _is_excluded(name, config)}
        found = [name for name in names if name not in excluded and _is_target(name, config)]
    except re.error as error:
        raise ValueError(f"broken regular expression {error.pattern!r} in the configuration: {error}") from error
    if not found:
        raise ValueError(
            f"target_modules = {_shown(config.target_modules)} matches no layer of {type(model).__name__} "
            f"(exclude_modules = {_shown(config.exclude_modules)}, modules_to_save = {config.modules_to_save}, "
            f"layers_to_transform = {config.layers_to_transform}, layers_pattern = {config.layers_pattern})"
        )
    if config.exclude_modules and not excluded:
        warnings.warn(f"exclude_modules = {_shown(config.exclude_modules)} matches nothing", stacklevel=4)
    return found


def saved_names(names: Iterable[str], config: BOFTConfig) -> Iterator[str]:
    """Those of the module `names` that `modules_to_save` means: names ending in one of its entries."""
    endings = tuple(config.modules_to_save or ())
    return (name for name in names if name and name.endswith(endings))


def _shown(names: Iterable[str] | str | None) -> Iterable[str] | str | None:
    return sorted(names) if isinstance(names, set) else names


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' `Conv1D`, a linear layer with its weight ``(in, out)``. Imports nothing."""
    return (type(module).__module__, type(module).__name__) == _CONV1D


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or is_conv1d(module)


def _ends_with_any(name: str, endings: Iterable[str]) -> bool:
    return name in endings or any(name.endswith(f".{ending}") for ending in endings)


def _is_excluded(name: str, config: BOFTConfig) -> bool:
    exclude = config.exclude_modules
    if exclude and (re.fullmatch(exclude, name) if isinstance(exclude, str) else _ends_with_any(name, exclude)):
        return True
    return any(re.fullmatch(rf"(.*\.)?({saved})(\..*)?", name) for saved in config.modules_to_save or ())


def _is_target(name: str, config: BOFTConfig) -> bool:
    targets = config.target_modules
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True
    return _ends_with_any(name, targets) and _is_chosen_layer(name, config)


def _is_chosen_layer(name: str, config: BOFTConfig) -> bool:
    chosen = config.layers_to_transform
    if chosen is None or chosen == []:
        return True
    patterns = config.layers_pattern or r"[^.]*"
    # Without a pattern the list itself must not be the outermost name; with one it may be.
    start = r"(?:.*?\.)?" if config.layers_pattern else r".*?\."
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        match = re.match(rf"{start}(?:{pattern})\.(\d+)\.", name)
        if match:
            return int(match[1]) in ([chosen] if isinstance(chosen, int) else chosen)
    return False
