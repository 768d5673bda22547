"""The layouts of PEFT's BOFT layers that `patch_peft` knows: how each is recognised, and what it needs besides the
methods that all of them share.

Read in PEFT 0.18.1, 0.19.1, 0.20.0, 0.21.2 and in its pull request 3540. PEFT is not imported here: functions get the
package ``peft.tuners.boft`` from their caller.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

PACKAGE = "peft.tuners.boft"

# By class, the attributes that a patch sets.
Attributes = dict[type, dict[str, Any]]


class Layout(NamedTuple):
    """One form of PEFT's BOFT layers.

    `versions` of PEFT that have it. `signatures`: parameter names of the functions that are replaced or relied upon, by
    name below the package; None for what must not exist. `guard`: the attribute of a layer that PEFT's own methods
    read before they compute anything. `adapt`: given the package and an ``update_layer(self, adapter_name, config,
    **kwargs)``, what this layout needs to have it called. `by_config`: layers are made with a configuration, and are
    open to other base layers than `nn.Linear` and `nn.Conv2d`.
    """

    versions: str
    signatures: Mapping[str, tuple[str, ...] | None]
    guard: str
    adapt: Callable[[Any, Callable[..., None]], Attributes]
    by_config: bool


_CONTAINERS = {
    "adapter_layer_names": ("boft_R", "boft_s"),
    "other_param_names": ("boft_block_size", "boft_block_num", "boft_dropout"),
}
_CONFIG_FIELDS = (
    "boft_block_size",
    "boft_block_num",
    "boft_n_butterfly_factor",
    "boft_dropout",
    "init_weights",
    "inference_mode",
)

_SHARED = {
    "layer.BOFTLayer.__init__": ("self", "base_layer", "kwargs"),
    "layer.BOFTLayer.reset_boft_parameters": ("self", "adapter_name", "init_weights"),
    "layer.BOFTLayer.set_scale": ("self", "adapter", "scale"),
    "layer.BOFTLayer.scale_layer": ("self", "scale"),
    "layer.BOFTLayer.unscale_layer": ("self", "scale"),
    "layer.BOFTLayer.get_base_layer": ("self",),
    "layer.BOFTLayer.set_adapter": ("self", "adapter_names", "inference_mode"),
    "layer.BOFTLayer._move_adapter_to_device_of_base_layer": ("self", "adapter_name", "device"),
    **{
        f"layer.{layer}.{name}": parameters
        for layer in ("Linear", "Conv2d")
        for name, parameters in {
            "forward": ("self", "x", "args", "kwargs"),
            "merge": ("self", "safe_merge", "adapter_names"),
            "unmerge": ("self",),
            "get_delta_weight": ("self", "adapter"),
        }.items()
    },
    "model.BOFTModel.inject_adapter": (
        "self",
        "model",
        "adapter_name",
        "autocast_adapter_dtype",
        "low_cpu_mem_usage",
        "state_dict",
    ),
    "model.BOFTModel._replace_module": ("self", "parent", "child_name", "new_module", "child"),
    "model.BOFTModel._create_new_module": ("boft_config", "adapter_name", "target", "kwargs"),
    "layer.MultiplicativeDropoutLayer.__init__": ("self", "p"),
    "layer.check_adapters_to_merge": ("module", "adapter_names"),
}

_UPDATE_BY_CONFIG = ("self", "adapter_name", "config", "kwargs")
_BY_CONFIG = {
    "layer.BOFTLayer.update_layer": _UPDATE_BY_CONFIG,
    "layer.BOFTLayer.get_base_weight": ("self",),
    "layer.BOFTLayer.set_base_weight": ("self", "weight_data"),
    "layer.Linear.__init__": ("self", "base_layer", "adapter_name", "config", "is_target_conv_1d_layer", "kwargs"),
    "layer.Conv2d.__init__": ("self", "base_layer", "adapter_name", "config", "kwargs"),
    "layer.Conv2d.update_layer": _UPDATE_BY_CONFIG,
}

_VALUES = ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "boft_dropout")
_UPDATE_BY_VALUES = ("self", "adapter_name", *_VALUES, "init_weights", "inference_mode", "kwargs")
_BY_VALUES = {
    "layer.BOFTLayer.update_layer": _UPDATE_BY_VALUES,
    "layer.BOFTLayer.get_base_weight": None,
    "layer.BOFTLayer.set_base_weight": None,
    "layer.Linear.__init__": (
        "self",
        "base_layer",
        "adapter_name",
        *_VALUES,
        "fan_in_fan_out",
        "init_weights",
        "is_target_conv_1d_layer",
        "kwargs",
    ),
    "layer.Conv2d.__init__": ("self", "base_layer", "adapter_name", *_VALUES, "init_weights", "kwargs"),
    "layer.Conv2d.update_layer": _UPDATE_BY_VALUES,
    "model.BOFTModel._create_and_replace": (
        "self",
        "boft_config",
        "adapter_name",
        "target",
        "target_name",
        "parent",
        "current_key",
        "optional_kwargs",
    ),
}

_DENSE_TABLES = {"layer.get_fbd_cuda": (), "layer.BOFTLayer.perm2mat": ("self", "indices")}
_INDEX_TABLES = dict.fromkeys(("layer.get_fbd_cuda", "layer.FastBlockDiag", "layer.BOFTLayer.perm2mat"))


def _adapt_by_config(package: Any, update_layer: Callable[..., None]) -> Attributes:
    layer = package.layer
    return {layer.BOFTLayer: {"update_layer": update_layer}, layer.Conv2d: {"update_layer": update_layer}}


# The configuration that `BOFTModel` is adding, where PEFT hands layers its values only.
_added: ContextVar[Any] = ContextVar("boft_ext_added", default=None)


def _get_base_weight(self: Any) -> Any:
    return self.get_base_layer().weight.data


def _set_base_weight(self: Any, weight_data: Any) -> None:
    self.get_base_layer().weight.data = weight_data


def _adapt_by_values(package: Any, update_layer: Callable[..., None]) -> Attributes:
    own_create = package.BOFTModel._create_and_replace

    def _create_and_replace(self: Any, boft_config: Any, *args: Any, **kwargs: Any) -> None:
        token = _added.set(boft_config)
        try:
            own_create(self, boft_config, *args, **kwargs)
        finally:
            _added.reset(token)

    def update_layer_by_values(
        self: Any,
        adapter_name: str,
        boft_block_size: int,
        boft_block_num: int,
        boft_n_butterfly_factor: int,
        boft_dropout: float,
        init_weights: bool,
        inference_mode: bool = False,
        **kwargs: Any,
    ) -> None:
        # The live configuration where there is one: its m is corrected if a file disagrees.
        config = _added.get() or package.BOFTConfig(
            boft_block_size=boft_block_size,
            boft_block_num=boft_block_num,
            boft_n_butterfly_factor=boft_n_butterfly_factor,
            boft_dropout=boft_dropout,
            init_weights=init_weights,
            inference_mode=inference_mode,
        )
        update_layer(self, adapter_name, config, **kwargs)

    return {
        package.layer.BOFTLayer: {
            "update_layer": update_layer_by_values,
            "get_base_weight": _get_base_weight,
            "set_base_weight": _set_base_weight,
            "quantization_backend": None,
        },
        package.layer.Conv2d: {"update_layer": update_layer_by_values},
        package.BOFTModel: {"_create_and_replace": _create_and_replace},
    }


LAYOUTS = (
    Layout("0.20 ... 0.21", {**_SHARED, **_BY_CONFIG, **_DENSE_TABLES}, "fbd_cuda_available", _adapt_by_config, True),
    Layout("0.18 ... 0.19", {**_SHARED, **_BY_VALUES, **_DENSE_TABLES}, "fbd_cuda_available", _adapt_by_values, False),
    Layout("of pull request 3540", {**_SHARED, **_BY_CONFIG, **_INDEX_TABLES}, "boft_P", _adapt_by_config, True),
)


def find_layout(package: Any) -> tuple[Layout | None, str]:
    """The layout of an unpatched `package`, ``peft.tuners.boft``, and an empty string; or None and how it differs
    from the known layout that is nearest. Changes nothing; thread-safe.
    """
    differences = [_differences(package, layout) for layout in LAYOUTS]
    found = min(differences, key=len)
    nearest = LAYOUTS[differences.index(found)]
    return (None, f"{found[0]} as in PEFT {nearest.versions}") if found else (nearest, "")


def _differences(package: Any, layout: Layout) -> list[str]:
    differences = (_difference(package, name, expected) for name, expected in layout.signatures.items())
    found = [difference for difference in differences if difference]
    base = getattr(getattr(package, "layer", None), "BOFTLayer", None)
    for name, expected in _CONTAINERS.items():
        names = getattr(base, name, None)
        if names != expected:
            found.append(f"{PACKAGE}.layer.BOFTLayer.{name} is {names!r}, expected {expected!r}")
    fields = getattr(getattr(package, "BOFTConfig", None), "__dataclass_fields__", ())
    missing = [name for name in _CONFIG_FIELDS if name not in fields]
    return [*found, f"{PACKAGE}.BOFTConfig has no field {', '.join(missing)}, expected one"] if missing else found


def _difference(package: Any, name: str, expected: tuple[str, ...] | None) -> str:
    """How one function differs from what is expected, or an empty string."""
    function = package
    for part in name.split("."):
        function = None if function is None else getattr(function, part, None)
    if expected is None:
        return "" if function is None else f"{PACKAGE}.{name} exists, expected none"
    if not callable(function):
        return f"{PACKAGE}.{name} does not exist, expected it to"
    found = tuple(inspect.signature(function).parameters)
    return "" if found == expected else f"{PACKAGE}.{name} takes ({', '.join(found)}), expected ({', '.join(expected)})"
