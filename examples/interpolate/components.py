"""The trained parts of a model with a BOFT adapter, set back to the base model's one by one."""

from __future__ import annotations

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

ADAPTER = "default"


def base_biases(model: nn.Module) -> dict[str, Tensor]:
    """The biases of a model that has no adapter yet; adapters with ``bias="all"`` or "boft_only" overwrite them."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if name.endswith("bias")}


class Components:
    """The parameters of the adapter "default" of a model.

    ``boft_R`` has shape ``(m, blocks, b, b)``; its index ``i - 1`` is the component B̃_i of the paper's
    ``R = B̃_m … B̃_1``, and zeros there are the identity, because Cayley maps them to it exactly.

    Attributes:
        m: the number of components, the largest one if layers differ.
    """

    def __init__(self, model: nn.Module, biases: dict[str, Tensor]) -> None:
        """`biases`: `base_biases` of the model before it had the adapter. Raises: ValueError if there is no adapter."""
        named = dict(model.named_parameters())
        self._rotations = [value for name, value in named.items() if name.endswith(f"boft_R.{ADAPTER}")]
        if not self._rotations:
            raise ValueError("the model has no BOFT adapter")
        self.m = max(rotation.shape[0] for rotation in self._rotations)
        self._base: list[tuple[Tensor, Tensor]] = [
            (value, torch.ones_like(value)) for name, value in named.items() if name.endswith(f"boft_s.{ADAPTER}")
        ]
        plain = {_plain(name): value for name, value in named.items()}
        self._base += [(plain[name], base) for name, base in biases.items() if name in plain]
        for module in model.modules():
            if isinstance(module, ModulesToSaveWrapper):
                trained, original = module.modules_to_save[ADAPTER], module.original_module
                self._base += [
                    (value, base.detach().clone())
                    for value, base in zip(trained.parameters(), original.parameters(), strict=True)
                ]
        self._trained = [value.detach().clone() for value in (*self._rotations, *(value for value, _ in self._base))]

    @torch.no_grad()
    def keep(self, count: int) -> None:
        """Leave the first `count` components trained, B̃_1 … B̃_count, and make the others the identity.

        Everything else that the adapter trained, which belongs to no component (the scale, biases, whole modules),
        stays trained; with the last component, for ``count = 0``, it becomes the base model's (a scale of 1).
        """
        others = (value for value, _ in self._base)
        for value, trained in zip((*self._rotations, *others), self._trained, strict=True):
            value.copy_(trained)
        for rotation in self._rotations:
            rotation[count:] = 0
        if count == 0:
            for value, base in self._base:
                value.copy_(base)


def _plain(name: str) -> str:
    """The name that a parameter had before its layer was adapted."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
