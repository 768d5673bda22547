"""Which block sizes b and numbers of butterfly factors m fit a model, and what they cost in parameters.

A layer of d channels takes b and m where b divides d and, for more than one factor, b is even and ``b 2^(m-1)`` divides
d (Liu et al., ICLR 2024, section 4); of a grouped convolution they have to divide the channels of one group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from .adapted import adapted_layers
from .config import BOFTConfig
from .report import rotation_parameters
from .table import percent, table
from .targets import linear_names, modules_by_name, target_names


@dataclass(frozen=True)
class LayerSettings:
    """What one layer can have: d input channels, `out` outputs, valid ``(b, m)`` with their effective parameters.

    `settings` maps ``(b, m)`` to ``(b - 1) d m / 2 + out``, b and then m ascending. b = 1 rotates nothing and is left
    out.
    """

    d: int
    out: int
    settings: dict[tuple[int, int], int]


@dataclass(frozen=True)
class Setting:
    """One choice for all layers: `block_size`, or `block_num` blocks per layer, the other 0; m `factors`.

    `parameters` is the number of effective parameters of all layers together, with their scales.
    """

    block_size: int
    block_num: int
    factors: int
    parameters: int

    def __str__(self) -> str:
        name, value = ("boft_block_size", self.block_size) if self.block_size else ("boft_block_num", self.block_num)
        return f"{name} = {value}, boft_n_butterfly_factor = {self.factors}"


@dataclass(frozen=True)
class Suggestion:
    """What `suggest_config` found. ``str()`` gives the choice and tables of everything that is valid.

    Attributes: `config`, to be passed to `boft_ext.wrap`; `setting`, its numbers; `budget`, in parameters;
    `model_parameters`; `settings`, all that fit every layer, fewest parameters first; `layers` by name.
    """

    config: BOFTConfig
    setting: Setting
    budget: int
    model_parameters: int
    settings: tuple[Setting, ...]
    layers: dict[str, LayerSettings]

    def __str__(self) -> str:
        share = percent(self.setting.parameters / self.model_parameters)
        parts = [
            f"{self.setting}: {self.setting.parameters:,} effective parameters in {len(self.layers)} layers, {share} "
            f"of the model's {self.model_parameters:,}; the budget is {self.budget:,}"
        ]
        for field, title in (("block_size", "b in all layers"), ("block_num", "blocks in all layers")):
            counts = {(getattr(s, field), s.factors): s.parameters for s in self.settings if getattr(s, field)}
            if counts:
                parts.append(_by_factors(title, counts))
        kinds: dict[tuple[Any, ...], tuple[LayerSettings, list[str]]] = {}
        for name, layer in self.layers.items():
            kinds.setdefault((layer.d, layer.out, *layer.settings), (layer, []))[1].append(name)
        for layer, names in kinds.values():
            others = f" and {len(names) - 1} more" if len(names) > 1 else ""
            parts.append(f"{names[0]}{others}: d = {layer.d}, out = {layer.out}, per layer")
            parts[-1] += "\n" + _by_factors("b", layer.settings)
        return "\n\n".join(parts)


def suggest_config(
    model: nn.Module,
    budget: int | float,
    target_modules: Iterable[str] | str = "all-linear",
    **options: Any,
) -> Suggestion:
    """The largest adapter within a budget, as one b, or one number of blocks, and one m that fit all its layers.

    Parameters are counted as effective ones, ``(b - 1) d m / 2 + out`` per layer: the rotation and the scale, not the
    stored ``b x b`` blocks, and neither biases nor `modules_to_save`. Of settings with equally many the one with the
    most factors is taken, which the paper finds to express more (its Figure 5).

    Args:
        model: a plain model, also on the meta device. It is only looked at.
        budget: how many effective parameters there may be at most: a whole number, or a share of the model's own
            parameters, above 0 and below 1.
        target_modules: the layers to adapt, as in `BOFTConfig`.
        options: further fields of `BOFTConfig`, except those that are to be found.

    Returns: a `Suggestion`. Raises: ValueError naming the smallest setting if none is within the budget, if no layer
        is targeted, or if a layer is neither `nn.Linear` nor `nn.Conv2d`; TypeError or ValueError for a bad argument.
    """
    sought = sorted(name for name in options if name.startswith(("boft_block_", "boft_n_butterfly_")))
    if sought:
        raise TypeError(f"{', '.join(sought)} cannot be given: suggest_config looks for it")
    if adapted_layers(model):
        raise ValueError("the model has BOFT layers already: suggestions are for the plain model")
    size = sum(parameter.numel() for parameter in model.parameters())
    limit = _limit(budget, size)
    config = BOFTConfig(target_modules=target_modules, **options)
    layers = _target_layers(model, config)
    settings = tuple(sorted(_common(list(layers.values())), key=lambda s: (s.parameters, s.factors, s.block_size)))
    within = [setting for setting in settings if setting.parameters <= limit]
    if not within:
        raise ValueError(_nothing_fits(limit, settings, layers))
    best = within[-1]
    config.boft_block_size, config.boft_block_num = best.block_size, best.block_num
    config.boft_n_butterfly_factor = best.factors
    return Suggestion(config, best, limit, size, settings, layers)


def _limit(budget: int | float, size: int) -> int:
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(f"budget must be a number of parameters or a share of them, got {budget!r}")
    if isinstance(budget, int) and budget >= 1:
        return budget
    if isinstance(budget, float) and 0 < budget < 1:
        return math.floor(budget * size)
    raise ValueError(f"budget must be a whole number of parameters >= 1 or a share between 0 and 1, got {budget!r}")


def _target_layers(model: nn.Module, config: BOFTConfig) -> dict[str, LayerSettings]:
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        config.target_modules = linear_names(model, config)
    modules = modules_by_name(model)
    return {name: _layer_settings(name, modules[name]) for name in target_names(model, config)}


def _layer_settings(name: str, module: nn.Module) -> LayerSettings:
    if isinstance(module, nn.Linear):
        d, group, out = module.in_features, module.in_features, module.out_features
    elif isinstance(module, nn.Conv2d):
        d, out = module.in_channels * math.prod(module.kernel_size), module.out_channels
        group = d // module.groups
    else:
        raise ValueError(f"layer {name}: only nn.Linear and nn.Conv2d can be adapted, not {type(module).__name__}")
    settings = {
        (b, m): rotation_parameters(d, b, m) + out for b in _divisors(group) if b > 1 for m in _factors(group, b)
    }
    return LayerSettings(d, out, settings)


def _divisors(n: int) -> list[int]:
    small = [i for i in range(1, math.isqrt(n) + 1) if n % i == 0]
    return sorted({*small, *(n // i for i in small)})


def _factors(channels: int, b: int) -> Iterator[int]:
    """Every m that blocks of b allow in that many channels."""
    yield 1
    m = 2
    while b % 2 == 0 and channels % (b << (m - 1)) == 0:
        yield m
        m += 1


def _common(layers: list[LayerSettings]) -> Iterator[Setting]:
    """The settings that fit all layers; those by block number only where they give layers different block sizes."""
    fewest = min(layers, key=lambda layer: len(layer.settings))
    for b, m in fewest.settings:
        if all((b, m) in layer.settings for layer in layers):
            yield Setting(b, 0, m, sum(layer.settings[b, m] for layer in layers))
    if len({layer.d for layer in layers}) == 1:
        return
    for blocks in _divisors(math.gcd(*(layer.d for layer in layers))):
        for _, m in (key for key in fewest.settings if key[0] * blocks == fewest.d):
            keys = [(layer.d // blocks, m) for layer in layers]
            if all(key in layer.settings for key, layer in zip(keys, layers, strict=True)):
                total = sum(layer.settings[key] for key, layer in zip(keys, layers, strict=True))
                yield Setting(0, blocks, m, total)


def _nothing_fits(limit: int, settings: tuple[Setting, ...], layers: dict[str, LayerSettings]) -> str:
    if settings:
        smallest = f"the smallest setting is {settings[0]} with {settings[0].parameters:,}"
    else:
        smallest = "no setting fits all layers"
    alone = sum(min(layer.settings.values(), default=0) for layer in layers.values())
    if all(layer.settings for layer in layers.values()) and (not settings or alone < settings[0].parameters):
        widths = ", ".join(str(d) for d in sorted({layer.d for layer in layers.values()}))
        smallest += (
            f" (layers have d = {widths}; chosen one by one they could do with {alone:,}: try fewer target_modules)"
        )
    return f"no block size within {limit:,} effective parameters fits the {len(layers)} target layers: {smallest}"


def _by_factors(title: str, counts: dict[tuple[int, int], int]) -> str:
    """A table with a row for every b and a column for every m."""
    largest = max((m for _, m in counts), default=0)
    rows = (
        (b, *(counts.get((b, m)) for m in range(1, largest + 1))) for b in dict.fromkeys(b for b, _ in sorted(counts))
    )
    return table((title, *(f"m = {m}" for m in range(1, largest + 1))), rows)
