"""What an adapter is made of: the settings, their file, and the shape they give a layer.

The fields, defaults and JSON are those of ``peft.BOFTConfig`` (PEFT 0.21), so files go both ways and either class can
be passed wherever this package takes a configuration. PEFT itself is not needed.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import warnings
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import Any

CONFIG_NAME = "adapter_config.json"

_BIASES = ("none", "all", "boft_only")
_TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


def resolve_shape(channels: int, config: Any) -> tuple[int, int, int]:
    """The shape of `boft_R` for a layer: block size b, number of blocks D and butterfly factors m.

    Rule: b D = channels; more than one factor needs an even b and channels divisible by ``b 2^(m-1)`` (Liu et al.,
    ICLR 2024, section 4; PEFT `BOFTLayer.update_layer`).

    Args:
        channels: input channels d of a linear layer, or in kh kw of a convolution.
        config: any object with `boft_block_size`, `boft_block_num` and `boft_n_butterfly_factor`.

    Returns: ``(b, D, m)``, so that `boft_R` is ``(m, D, b, b)``.
    Raises: ValueError naming the numbers. Pure, thread-safe.
    """
    size, num, m = _check_block(config)
    if channels < 1:
        raise ValueError(f"a layer of {channels} channels cannot be rotated")
    if size == 0 and channels % num != 0:
        raise ValueError(f"{channels} channels cannot be split into boft_block_num = {num} blocks of equal size")
    b = size or channels // num
    if channels % b != 0:
        raise ValueError(f"{channels} channels are not divisible by boft_block_size = {b}")
    blocks = channels // b
    if m > 1 and b % 2 != 0:
        raise ValueError(f"boft_n_butterfly_factor = {m} needs an even block size, got {b} ({channels} channels)")
    largest = (blocks & -blocks).bit_length()
    if m > largest:
        raise ValueError(
            f"boft_n_butterfly_factor = {m} is too large for {channels} channels in {blocks} blocks of {b}: channels "
            f"must be divisible by b 2^(m-1), which allows at most m = {largest}"
        )
    return b, blocks, m


def as_config(config: Any) -> BOFTConfig:
    """A validated copy of `config`, which may be a `BOFTConfig` of this package or of PEFT.

    Any object with `boft_block_size` will do; fields that it lacks take their defaults.

    Raises: TypeError if it is no BOFT configuration, ValueError for the values that `BOFTConfig` refuses.
    """
    if not hasattr(config, "boft_block_size"):
        raise TypeError(f"expected a BOFTConfig (of boft_ext or peft), got {type(config).__name__}")
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(BOFTConfig) if hasattr(config, f.name)}
    return BOFTConfig(**copy.deepcopy(values))


@dataclasses.dataclass
class BOFTConfig:
    """Settings of a BOFT adapter, with the names and meanings of ``peft.BOFTConfig``.

    Exactly one of block size and block number is non-zero; PEFT's default is size 4.

    Args:
        boft_block_size: channels b that one block of a factor rotates.
        boft_block_num: number of blocks D per layer instead; b is then channels / D.
        boft_n_butterfly_factor: factors m; each further one doubles the number of channels that mix.
        target_modules: layers to adapt: names (a layer matches by its whole name or by its last parts), a regular
            expression for the whole name, or "all-linear".
        exclude_modules: layers never to adapt, names or a regular expression likewise.
        boft_dropout: share of blocks of one factor that a training step replaces by the identity.
        fan_in_fan_out: kept for PEFT's file format; a layer's class decides how its weight is stored.
        bias: which biases train and are saved: "none", "all" of the model, or "boft_only" of the adapted layers.
        modules_to_save: names of further modules that train fully and are saved with the adapter.
        init_weights: True starts at the identity, False at random values.
        layers_to_transform: index or indices of the numbered layers to adapt, when targets are given by names.
        layers_pattern: name of the module list that those indices count, if it is not to be guessed.
        task_type, base_model_name_or_path, revision, auto_mapping, peft_version, inference_mode, peft_type: as in
            PEFT; `inference_mode` creates the parameters without gradients.

    Raises: ValueError or TypeError naming the field and its value.
    """

    task_type: str | None = None
    peft_type: str | None = "BOFT"
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    target_modules: Iterable[str] | str | None = None
    exclude_modules: Iterable[str] | str | None = None
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None

    def __post_init__(self) -> None:
        self.task_type = _plain(self.task_type)
        self.peft_type = _plain(self.peft_type)
        if self.peft_type != "BOFT":
            raise ValueError(f"peft_type is {self.peft_type!r}, expected 'BOFT'")
        if self.task_type is not None and self.task_type not in _TASK_TYPES:
            raise ValueError(f"task_type is {self.task_type!r}, expected None or one of {', '.join(_TASK_TYPES)}")
        _check_block(self)
        _check_number("boft_dropout", self.boft_dropout)
        if self.bias not in _BIASES:
            raise ValueError(f"bias is {self.bias!r}, expected one of {', '.join(_BIASES)}")
        for name in ("inference_mode", "fan_in_fan_out", "init_weights"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self.target_modules = _names("target_modules", self.target_modules, set)
        self.exclude_modules = _names("exclude_modules", self.exclude_modules, set)
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save must be a list of names, got {self.modules_to_save!r}")
        self.modules_to_save = _names("modules_to_save", self.modules_to_save, list)
        self.layers_pattern = _names("layers_pattern", self.layers_pattern, list)
        self.layers_to_transform = _indices(self.layers_to_transform)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(f"layers_pattern = {self.layers_pattern!r} needs layers_to_transform, which is None")

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, in new containers."""
        return dataclasses.asdict(self)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write ``adapter_config.json`` into `directory`, which is created. Sets are written as sorted lists."""
        directory = Path(directory)
        if directory.is_file():
            raise ValueError(f"{directory} is a file, expected a directory")
        directory.mkdir(parents=True, exist_ok=True)
        values = {name: sorted(v) if isinstance(v, set) else v for name, v in self.to_dict().items()}
        (directory / CONFIG_NAME).write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> BOFTConfig:
        """Read ``adapter_config.json`` of a local `directory`, written here or by PEFT.

        Keys that this version does not know are ignored with a warning.
        Raises: ValueError if the file is missing, is not JSON, or describes another method; ValueError or TypeError
            for the values that the constructor refuses.
        """
        path = Path(directory) / CONFIG_NAME
        if not path.is_file():
            raise ValueError(f"{directory} holds no {CONFIG_NAME}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not a JSON file: {error}") from error
        if not isinstance(values, dict) or values.get("peft_type") != "BOFT":
            found = values.get("peft_type") if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"{path} does not describe a BOFT adapter: peft_type is {found!r}")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - known)
        if unknown:
            warnings.warn(f"{path}: ignoring unknown keys {', '.join(unknown)}", stacklevel=2)
        return cls(**{name: value for name, value in values.items() if name in known})


def _plain(value: Any) -> Any:
    """PEFT's string enumerations as plain strings."""
    return value.value if isinstance(value, Enum) else value


def _check_block(config: Any) -> tuple[int, int, int]:
    """Block size, block number and factors of a configuration, each an int and together meaningful."""
    size, num, m = (
        _integer(name, getattr(config, name))
        for name in ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor")
    )
    if size < 0 or num < 0 or (size == 0) == (num == 0):
        raise ValueError(
            "exactly one of boft_block_size and boft_block_num must be positive and the other 0, "
            f"got boft_block_size = {size}, boft_block_num = {num}"
        )
    if m < 1:
        raise ValueError(f"boft_n_butterfly_factor must be an integer >= 1, got {m}")
    return size, num, m


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    return value


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")


def _names(name: str, value: Any, container: type) -> Any:
    """None, one string, or a container of strings."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, Iterable) or not all(isinstance(v, str) for v in value):
        raise TypeError(f"{name} must be a string or a list of strings, got {value!r}")
    return container(value)


def _indices(value: Any) -> list[int] | int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if not isinstance(value, (list, tuple, set, range)) or any(
        isinstance(v, bool) or not isinstance(v, int) for v in value
    ):
        raise TypeError(f"layers_to_transform must be an integer or a list of integers, got {value!r}")
    return sorted(value) if isinstance(value, set) else list(value)
