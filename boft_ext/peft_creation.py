"""How PEFT's BOFT layers get their parameters while `patch_peft` is in force: from a configuration, from a file, or as
PEFT itself had made them before.

The functions here become methods of PEFT's classes (`peft_versions` says how): of ``peft.tuners.boft.layer.Linear`` and
``Conv2d`` unless they say otherwise, so ``self`` is such a layer. None is thread-safe with respect to its model.
"""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import BOFTConfig
from peft.tuners.boft import BOFTModel
from peft.tuners.boft.layer import BOFTLayer, Conv2d, MultiplicativeDropoutLayer
from torch import Tensor, nn

from . import peft_strength, peft_weights
from .config import resolve_shape
from .nn import resolve_convolution
from .peft_swap import peft_is_patched


class _NeedsPatch:
    """Stands in a layer where PEFT's own methods look for their kernel, so that they stop with an error."""

    def __bool__(self) -> bool:
        if peft_is_patched():
            return True
        raise RuntimeError(
            "this BOFT layer runs on boft_ext's kernels, but PEFT is not patched now: call boft_ext.patch_peft() first"
        )

    def to(self, *args: Any, **kwargs: Any) -> None:
        """What PEFT without its kernel (pull request 3540) asks of the table that it looks for."""
        bool(self)

    def __reduce__(self) -> str:
        return "NEEDS_PATCH"


NEEDS_PATCH = _NeedsPatch()


class MergedNames(list):
    """The names of adapters that were merged while patched. PEFT's own `unmerge` drops a name before anything else."""

    def pop(self, *args: Any) -> str:
        """`list.pop`; RuntimeError while PEFT is not patched, so that the layer stays as it is."""
        bool(NEEDS_PATCH)
        return super().pop(*args)


# The permutations of all layouts: dense, or indices and their inverse.
_TABLES = ("boft_P", "boft_P_inv")


def _guard(layer: BOFTLayer) -> None:
    """Free PEFT's tables and make PEFT's own methods stop where they look for them or for their kernel."""
    for table in _TABLES:
        if table in layer._buffers:
            delattr(layer, table)
    setattr(layer, layer.boft_ext_guard, NEEDS_PATCH)


def _resolve(layer: BOFTLayer, config: Any) -> tuple[int, int, int]:
    """``(b, D, m)`` that `config` gives `layer`; ValueError naming the numbers if there is none."""
    base_layer = layer.get_base_layer()
    if isinstance(layer, Conv2d):
        return resolve_convolution(base_layer, config)
    channels = base_layer.embedding_dim if isinstance(base_layer, nn.Embedding) else layer.in_features
    return resolve_shape(channels, config)


def _scale_shape(layer: BOFTLayer) -> tuple[int, int]:
    base_layer = layer.get_base_layer()
    if isinstance(layer, Conv2d):
        return 1, layer.out_features
    return base_layer.num_embeddings if isinstance(base_layer, nn.Embedding) else layer.out_features, 1


def _resolve_any_factors(layer: BOFTLayer, config: BOFTConfig) -> tuple[int, int, int]:
    """`_resolve`, but for a configuration from a file, whose m may be wrong, one factor with a warning."""
    try:
        return _resolve(layer, config)
    except ValueError as error:
        m = config.boft_n_butterfly_factor
        if not getattr(config, "_boft_ext_from_file", False) or not isinstance(m, int) or m <= 1:
            raise
        single = copy.copy(config)
        single.boft_n_butterfly_factor = 1
        shape = _resolve(layer, single)
        warnings.warn(
            f"{error}. The configuration comes from a file, so the layer is made with m = 1 and takes m from the "
            "file's tensors when they are loaded",
            stacklevel=4,
        )
        return shape


def update_layer(self, adapter_name: str, config: BOFTConfig, **kwargs: Any) -> None:
    """Give the layer an adapter: ``boft_R`` ``(m, D, b, b)`` and ``boft_s``, ``(out, 1)`` or, for a convolution,
    ``(1, out)``, on the device and in the dtype that PEFT gives them.

    An embedding layer counts as a linear one of `embedding_dim` inputs and `num_embeddings` outputs.

    Raises: ValueError, with the layer unchanged, if b and m do not fit its channels, or for `boft_dropout` outside
        0 ... 1 or an `init_weights` that is not True or False.
    """
    b, blocks, m = _resolve_any_factors(self, config)
    p = config.boft_dropout
    if not isinstance(p, (int, float)) or not 0 <= p <= 1:
        raise ValueError(f"boft_dropout must be a number between 0 and 1, got {p!r}")
    if not isinstance(config.init_weights, bool):
        raise ValueError(f"init_weights must be True or False, got {config.init_weights!r}")
    if "boft_P" in self._buffers:
        adopt_all(self)
    _guard(self)
    self.boft_dropout[adapter_name] = MultiplicativeDropoutLayer(p=p) if p > 0 else nn.Identity()
    self.boft_R[adapter_name] = nn.Parameter(torch.zeros(m, blocks, b, b))
    self.boft_s[adapter_name] = nn.Parameter(torch.ones(_scale_shape(self)))
    self.reset_boft_parameters(adapter_name, config.init_weights)
    self.boft_block_size[adapter_name] = b
    self.boft_block_num[adapter_name] = blocks
    _remember(self, {adapter_name: config})
    peft_strength.add(self, [adapter_name])
    self._move_adapter_to_device_of_base_layer(adapter_name)
    self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)


def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """`BOFTModel.inject_adapter`, all or nothing: where one layer refuses the adapter, the others do not keep it."""
    before = dict(model.named_modules())
    layers = {module for module in before.values() if isinstance(module, BOFTLayer)}
    had = {layer for layer in layers if adapter_name in layer.boft_R}
    try:
        super(BOFTModel, self).inject_adapter(model, adapter_name, *args, **kwargs)
    except Exception:
        for layer in layers - had:
            layer.delete_adapter(adapter_name)
        # Reading the names first: replaced layers hold modules that were there before under longer names.
        for name, module in list(model.named_modules()):
            if name in before and before[name] is not module:
                parent, _, child = name.rpartition(".")
                setattr(before[parent], child, before[name])
        raise
    peft_weights.mark(model)


def load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
    """`nn.Module._load_from_state_dict`, after giving each adapter the number of factors of its stored tensor.

    Where the configuration says another m, it is corrected with a warning. A stored m that the layer cannot have is
    left for the loader to refuse.
    """
    for name, boft_R in self.boft_R.items():
        stored = state_dict.get(f"{prefix}boft_R.{name}")
        if isinstance(stored, Tensor) and stored.dim() == 4 and stored.shape[1:] == boft_R.shape[1:]:
            _take_factors(self, name, boft_R, stored.shape[0])
    nn.Module._load_from_state_dict(self, state_dict, prefix, *args)


def _take_factors(layer: BOFTLayer, name: str, boft_R: nn.Parameter, m: int) -> None:
    config = layer.boft_ext_configs.get(name)
    if m != boft_R.shape[0]:
        wanted = BOFTConfig(boft_block_size=boft_R.shape[-1], boft_n_butterfly_factor=m)
        try:
            _resolve(layer, wanted)
        except ValueError:
            return
        # Through .data, so that optimisers and wrappers go on holding the parameter.
        boft_R.data = boft_R.data.new_zeros(m, *boft_R.shape[1:])
        boft_R.grad = None
    if config is not None and config.boft_n_butterfly_factor != m:
        warnings.warn(
            f"the configuration of adapter {name!r} says boft_n_butterfly_factor = {config.boft_n_butterfly_factor}, "
            f"but its tensors hold m = {m}, which is used; the configuration is corrected",
            stacklevel=2,
        )
        config.boft_n_butterfly_factor = m


def _remember(layer: BOFTLayer, configs: Mapping[str, BOFTConfig]) -> None:
    """Keep, by adapter name, the live configurations that `load_from_state_dict` may have to correct."""
    layer.boft_ext_configs = {**layer.boft_ext_configs, **configs}


def _adopt(layer: BOFTLayer, configs: Mapping[str, Any]) -> dict[str, int]:
    """Free the tables of a layer that PEFT made. Returns the m of adapters whose configuration says another."""
    _guard(layer)
    configs = {name: configs[name] for name in layer.boft_R if isinstance(configs.get(name), BOFTConfig)}
    _remember(layer, configs)
    peft_strength.add(layer, layer.boft_R)
    factors = {name: layer.boft_R[name].shape[0] for name in configs}
    return {name: m for name, m in factors.items() if m != configs[name].boft_n_butterfly_factor}


def adopt_all(layer: BOFTLayer | None = None) -> None:
    """Take over every living layer that PEFT made by itself, and `layer`: free its tables.

    Layers keep the m they were built with. One warning names the adapters whose configuration says another m, which
    happens where PEFT did not have its kernel.
    """
    told: dict[str, str] = {}
    count = 0
    # A layer does not know its configuration; the models that do cannot be reached from it.
    for owner in [o for o in gc.get_objects() if issubclass(type(o), nn.Module) and "peft_config" in o.__dict__]:
        configs = owner.__dict__["peft_config"]
        made_by_peft = [m for m in owner.modules() if isinstance(m, BOFTLayer) and "boft_P" in m._buffers]
        for module in made_by_peft:
            differing = _adopt(module, configs)
            count += bool(differing)
            for name, m in differing.items():
                told[name] = f"{name!r} has m = {m}, its configuration {configs[name].boft_n_butterfly_factor}"
        if made_by_peft:
            peft_weights.mark(owner)
    if layer is not None and "boft_P" in layer._buffers:
        _adopt(layer, {})
    if told:
        warnings.warn(
            f"{count} BOFT layers keep the number of factors m they were built with, which is not their "
            f"configuration's: adapter {'; '.join(told.values())}. Build the model after boft_ext.patch_peft() to get "
            "the configured m",
            stacklevel=3,
        )


def from_pretrained(cls, *args: Any, **kwargs: Any) -> BOFTConfig:
    """`BOFTConfig.from_pretrained`, remembering that the values come from a file (see `_resolve_any_factors`)."""
    config = super(BOFTConfig, cls).from_pretrained(*args, **kwargs)
    config._boft_ext_from_file = True
    return config
