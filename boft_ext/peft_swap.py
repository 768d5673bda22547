"""Running the BOFT layers of Hugging Face PEFT on this package's kernels.

`patch_peft` replaces methods of PEFT's own classes, so constructors, parameter names, pickles and checkpoints stay
PEFT's; `unpatch_peft` puts the classes back exactly. PEFT is imported by `patch_peft` only.
"""

from __future__ import annotations

import importlib
import threading
import warnings
from dataclasses import dataclass
from typing import Any

from . import log, peft_versions

_MISSING = object()
_lock = threading.Lock()
_status: PatchStatus | None = None
_replaced: list[tuple[type, str, Any]] = []


@dataclass(frozen=True)
class PatchStatus:
    """What `patch_peft` did; true in a condition if PEFT's BOFT layers now run on boft_ext.

    Attributes: `patched`; `peft_version`; the options `dropout` and `keep_merged`; `reason`, why PEFT was left as it
    is, or an empty string.
    """

    patched: bool
    peft_version: str
    dropout: str | tuple[float, float]
    keep_merged: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.patched

    def __repr__(self) -> str:
        if not self.patched:
            return f"<boft_ext: PEFT {self.peft_version} is not patched: {self.reason}>"
        return (
            f"<boft_ext: the BOFT layers of PEFT {self.peft_version} run on boft_ext "
            f"(dropout={self.dropout!r}, keep_merged={self.keep_merged})>"
        )


def patch_peft(
    strict: bool = False, dropout: str | tuple[float, float] = "peft", keep_merged: bool = True
) -> PatchStatus:
    """Make the BOFT layers of PEFT run on this package's kernels, in this process, from now on.

    Layers then have the configured number of butterfly factors on every device, and no dense tables. Layers that PEFT
    made before keep the number they were built with (one warning where that is not their configuration's), and their
    tables are freed; they too need the patch from then on. Calling it again only changes the options.

    Args:
        strict: raise where this PEFT has a layout that is not known, instead of warning and leaving it as it is.
        dropout: which blocks an adapter with ``boft_dropout = p > 0`` replaces by the identity in a training step.
            "peft": ``int(p D)`` of the D blocks of one factor, with PEFT's own random draws
            (`functional.dropout_keep`). ``(p1, p2)``: the paper's rule, a share p1 of the factors and a share p2 of
            the blocks of each, whatever p is; shares that are no whole number are rounded at random, right on average
            (`functional.dropout_keep_paper`). "paper": the same with ``p1 = p2 = p``. With p = 0 nothing is dropped.
        keep_merged: while adapters are merged into a 16-bit weight, keep the original in memory, so that `unmerge`
            restores it bit for bit. Otherwise, and always for wider weights, `unmerge` computes it back.

    Returns: a `PatchStatus`.
    Raises: ValueError or TypeError for a bad argument; ImportError without PEFT; RuntimeError for an unknown layout if
        `strict`. PEFT is then as it was. Thread-safe, but not while PEFT's layers run in other threads.
    """
    global _status
    dropout = checked_dropout(dropout)
    for name, value in (("strict", strict), ("keep_merged", keep_merged)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
    # Before taking the lock: another thread may hold PEFT's import lock and patch at the end of that import.
    version, package, reason = _import_peft()
    with _lock:
        layout = None
        if package is not None and not _replaced:
            layout, reason = peft_versions.find_layout(package)
        if reason:
            message = f"PEFT {version} is left as it is: boft_ext does not know the layout of its BOFT layers: {reason}"
            if strict:
                raise RuntimeError(message)
            warnings.warn(message, stacklevel=2)
            return PatchStatus(False, version, dropout, keep_merged, reason)
        from . import peft_creation, peft_layers

        peft_layers.configure(peft_layers.Options(dropout, keep_merged))
        if layout is not None:
            _replace(package, layout)
            peft_creation.adopt_all()
        _status = PatchStatus(True, version, dropout, keep_merged)
        if layout is not None:
            log.announce(_status)
        return _status


def unpatch_peft() -> None:
    """Put PEFT's classes back exactly as `patch_peft` found them; nothing happens if they are not patched.

    A model that was made or used while patched raises an error naming `patch_peft` when it is used afterwards, and
    works again after the next `patch_peft`. Thread-safe, but not while PEFT's layers run in other threads.
    """
    global _status
    with _lock:
        while _replaced:
            owner, name, original = _replaced.pop()
            if original is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        _status = None


def peft_is_patched() -> bool:
    """Whether PEFT's BOFT layers run on this package's kernels. Does not import PEFT; thread-safe."""
    return _status is not None


def checked_dropout(dropout: Any) -> str | tuple[float, float]:
    """The option `dropout` of `patch_peft` in its own form; ValueError naming it if it is none. Pure, thread-safe."""
    if isinstance(dropout, str) and dropout in ("peft", "paper"):
        return dropout
    if isinstance(dropout, (tuple, list)) and len(dropout) == 2:
        numbers = all(isinstance(p, (int, float)) and not isinstance(p, bool) for p in dropout)
        if numbers and all(0 <= p <= 1 for p in dropout):
            return float(dropout[0]), float(dropout[1])
    raise ValueError(
        f"dropout must be 'peft', 'paper' or two shares (p1, p2) of factors and blocks in 0 ... 1, got {dropout!r}"
    )


def _import_peft() -> tuple[str, Any, str]:
    """PEFT's version and its package of BOFT layers; if there is none, None and why not."""
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise ImportError(f"patch_peft needs Hugging Face PEFT (pip install peft): {error}") from error
    version = getattr(peft, "__version__", "of unknown version")
    try:
        return version, importlib.import_module(peft_versions.PACKAGE), ""
    except ImportError as error:
        return version, None, str(error)


def _replace(package: Any, layout: peft_versions.Layout) -> None:
    """Replace the methods, noting what each class had of its own."""
    from . import peft_creation as creation
    from . import peft_layer_types as types
    from . import peft_layers as methods
    from . import peft_mixed as mixed
    from . import peft_offload as offload
    from . import peft_strength as strength

    layer = package.layer
    shared = {
        "merge": methods.merge,
        "unmerge": methods.unmerge,
        "get_delta_weight": methods.get_delta_weight,
        "_load_from_state_dict": creation.load_from_state_dict,
    }
    new = {
        layer.BOFTLayer: {
            "boft_ext_guard": layout.guard,
            # By adapter like the others, so that deleting an adapter deletes its entries.
            "other_param_names": (*layer.BOFTLayer.other_param_names, "boft_ext_configs", "scaling"),
            "boft_ext_configs": {},
            "scaling": {},
            "set_scale": strength.set_scale,
            "scale_layer": strength.scale_layer,
            "unscale_layer": strength.unscale_layer,
            "boft_ext_weight_is_shared": False,
            "boft_ext_weight_is_read": False,
            "weight": property(types.effective_weight),
            "_move_adapter_to_device_of_base_layer": offload.move_adapter,
        },
        layer.Linear: {"forward": methods.linear_forward, **shared},
        layer.Conv2d: {"forward": methods.conv_forward, **shared},
        package.BOFTModel: {
            "inject_adapter": creation.inject_adapter,
            "_enable_peft_forward_hooks": mixed.enable_forward_hooks,
            "_replace_module": offload.replace_module,
        },
        package.BOFTConfig: {"from_pretrained": classmethod(creation.from_pretrained)},
    }
    if layout.by_config:
        new[layer.Conv2d]["__init__"] = types.init_convolution
        create = types.creating(package.BOFTModel._create_new_module)
        new[package.BOFTModel]["_create_new_module"] = staticmethod(create)
    for owner, attributes in layout.adapt(package, creation.update_layer).items():
        new[owner].update(attributes)
    for owner, attributes in new.items():
        for name, value in attributes.items():
            _replaced.append((owner, name, vars(owner).get(name, _MISSING)))
            setattr(owner, name, value)
