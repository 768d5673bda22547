"""A Stable Diffusion UNet with a BOFT adapter and a picture that controls it, in two ways.

``light`` is the paper's: a hint encoder of eight convolutions turns the condition into features of the latent's size,
which are added to the output of the UNet's first convolution. Its last convolution starts at zero, so that training
starts from the base model exactly. ``full`` is diffusers' ControlNetModel, a trainable copy of the UNet's encoder;
its outputs, which start at zero too, are added to the skip connections.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.controlnets.controlnet import ControlNetConditioningEmbedding
from diffusers.training_utils import cast_training_params
from peft import BOFTConfig
from PIL import Image
from recipe_tools.adapters import load_adapter, save_adapter
from recipe_tools.arguments import fail
from recipe_tools.models import or_fail
from torch import Tensor, nn

TARGETS = ("to_q", "to_k", "to_v")  # of attn1 and attn2; the paper leaves to_out alone
ADAPTER_FOLDER = "unet"
CONTROLNET_FOLDER = "controlnet"
HINT_FILE = "hint_encoder.safetensors"


class Frozen(NamedTuple):
    """The parts of the pipeline that do not train."""

    vae: nn.Module
    text_encoder: nn.Module
    tokenizer: Any
    noise_scheduler: Any


class Control(nn.Module, ABC):
    """What both ways share. Call it with noisy latents ``(n, 4, h, w)``, timesteps ``(n,)``, text states
    ``(n, tokens, width)`` and the condition ``(n, 3, 8 h, 8 w)`` in 0 ... 1; it returns the UNet's prediction.

    Attributes:
        unet: its attention layers hold the adapter, unless that is merged into their weights.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def load_adapter(self, folder: Path, merge: bool) -> None:
        """Load the adapter that `save` wrote, with `merge` into the UNet's weights.

        One line and status 2 if that fails.
        """
        self.unet = load_adapter(self.unet, folder / ADAPTER_FOLDER, merge)

    def save(self, folder: Path, base: str) -> None:
        """Write the adapter in PEFT's format into ``folder/unet`` and the control beside it. `base`: the base model."""
        save_adapter(self.unet, folder / ADAPTER_FOLDER, base)
        self._save_control(folder)

    @abstractmethod
    def _save_control(self, folder: Path) -> None:
        """Write what controls, which is not the adapter, into `folder`."""

    def enable_gradient_checkpointing(self) -> None:
        """Compute activations again in the backward pass."""
        self.unet.enable_gradient_checkpointing()

    @abstractmethod
    def draw(self, frozen: Frozen, scheduler: Any, condition: Tensor, **call: Any) -> list[Image.Image]:
        """Draw one image for each row of `condition`; `call` goes to the pipeline (``prompt``, ``generator``, …)."""

    def _pipeline(self, kind: type, frozen: Frozen, scheduler: Any, **parts: Any) -> Any:
        pipeline = kind(
            vae=frozen.vae,
            text_encoder=frozen.text_encoder,
            tokenizer=frozen.tokenizer,
            unet=self.unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **parts,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


class LightControl(Control):
    """The paper's way. `hint` maps ``(n, 3, 8 h, 8 w)`` to ``(n, first width, h, w)``."""

    def __init__(self, unet: UNet2DConditionModel, hint: ControlNetConditioningEmbedding) -> None:
        super().__init__(unet)
        self.hint = hint
        self._features: Tensor | None = None
        unet.conv_in.register_forward_hook(self._add_features)

    def _add_features(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self._features is None:
            return None
        # Guidance stacks the batch without the prompt on the one with it; both follow the same condition.
        copies = output.shape[0] // self._features.shape[0]
        return output + self._features.repeat(copies, 1, 1, 1).to(output.dtype)

    @contextmanager
    def following(self, condition: Tensor) -> Iterator[None]:
        """Within it, every call of the UNet follows `condition`."""
        self._features = self.hint(condition.to(self.hint.conv_in.weight.dtype))
        try:
            yield
        finally:
            self._features = None

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor, condition: Tensor) -> Tensor:
        with self.following(condition):
            return self.unet(noisy, timesteps, encoder_hidden_states=text, return_dict=False)[0]

    def _save_control(self, folder: Path) -> None:
        safetensors.torch.save_file(self.hint.state_dict(), folder / HINT_FILE)

    def draw(self, frozen: Frozen, scheduler: Any, condition: Tensor, **call: Any) -> list[Image.Image]:
        height, width = condition.shape[-2:]
        pipeline = self._pipeline(StableDiffusionPipeline, frozen, scheduler)
        with self.following(condition):
            return pipeline(height=height, width=width, **call).images


class FullControl(Control):
    """diffusers' ControlNet beside the UNet."""

    def __init__(self, unet: UNet2DConditionModel, controlnet: ControlNetModel) -> None:
        super().__init__(unet)
        self.controlnet = controlnet

    def enable_gradient_checkpointing(self) -> None:
        super().enable_gradient_checkpointing()
        self.controlnet.enable_gradient_checkpointing()

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Tensor, condition: Tensor) -> Tensor:
        down, middle = self.controlnet(noisy, timesteps, text, condition, return_dict=False)
        return self.unet(
            noisy,
            timesteps,
            encoder_hidden_states=text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0]

    def _save_control(self, folder: Path) -> None:
        self.controlnet.save_pretrained(folder / CONTROLNET_FOLDER)

    def draw(self, frozen: Frozen, scheduler: Any, condition: Tensor, **call: Any) -> list[Image.Image]:
        pipeline = self._pipeline(StableDiffusionControlNetPipeline, frozen, scheduler, controlnet=self.controlnet)
        return pipeline(image=condition, **call).images


def make_control(way: str, unet: UNet2DConditionModel, config: BOFTConfig, channels: tuple[int, ...]) -> Control:
    """A control that computes what the frozen `unet` does, ready to train: only the adapter and the control train.

    Args:
        way: "light" or "full". config: of the adapter. channels: of the hint encoder, one for each of its sizes.
    Raises: ValueError if the configuration does not fit the layers. Changes `unet` in place.
    """
    # Before the adapter: what is copied shall be the plain UNet.
    full = way == "full"
    control = FullControl(unet, _controlnet(unet, channels)) if full else LightControl(unet, _hint(unet, channels))
    unet.add_adapter(config)
    cast_training_params(unet, torch.float32)
    return control


def _controlnet(unet: UNet2DConditionModel, channels: tuple[int, ...]) -> ControlNetModel:
    controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)
    return controlnet.requires_grad_(True)


def _hint(unet: UNet2DConditionModel, channels: tuple[int, ...]) -> ControlNetConditioningEmbedding:
    return ControlNetConditioningEmbedding(unet.config.block_out_channels[0], block_out_channels=channels)


def load_control(folder: Path, unet: UNet2DConditionModel) -> Control:
    """The control that `Control.save` wrote into `folder`, around `unet`, for inference, without the adapter. One line
    and status 2 if `folder` holds no control, or one for another model."""
    if (folder / CONTROLNET_FOLDER).is_dir():
        controlnet = or_fail(f"{folder}", ControlNetModel.from_pretrained, folder / CONTROLNET_FOLDER)
        return FullControl(unet, controlnet).eval()
    if not (folder / HINT_FILE).is_file():
        fail(f"{folder} holds neither {HINT_FILE} nor {CONTROLNET_FOLDER}/")
    state = safetensors.torch.load_file(folder / HINT_FILE)
    # Convolutions come in pairs, of which the second one changes the number of channels.
    pairs = sum(name.startswith("blocks.") and name.endswith(".weight") for name in state) // 2
    widths = [state["conv_in.weight"], *(state[f"blocks.{2 * pair + 1}.weight"] for pair in range(pairs))]
    hint = _hint(unet, tuple(weight.shape[0] for weight in widths))
    try:
        hint.load_state_dict(state)
    except RuntimeError:
        found, width = len(state["conv_out.bias"]), unet.config.block_out_channels[0]
        fail(f"{folder / HINT_FILE} makes {found} features, the UNet's first convolution {width}: another base model")
    return LightControl(unet, hint).eval()
