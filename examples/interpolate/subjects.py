"""What can be interpolated: models with an adapter, each with something that it computes from fixed inputs."""

from __future__ import annotations

import argparse
import sys
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from diffusers import DiffusionPipeline
from PIL import Image
from recipe_tools.adapters import load_adapter
from recipe_tools.images import fit, load_image
from recipe_tools.models import or_fail
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "controlnet"))


class Subject(ABC):
    """A model without its adapter, until `adapt`. Built from the options of `interpolate.parse`."""

    model: nn.Module
    device = "cuda" if torch.cuda.is_available() else "cpu"

    @abstractmethod
    def adapt(self) -> None:
        """Load the adapter into `model`."""

    @abstractmethod
    def outputs(self) -> Tensor:
        """What the model computes, one row for each input. Deterministic."""

    def pictures(self, outputs: Tensor) -> list[Image.Image]:
        """`outputs` as pictures, if they are any."""
        return []


class Pipeline(Subject):
    """A text-to-image pipeline; the images that it draws for the prompts, in 0 ... 1."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        what = f"--pretrained-model-name-or-path {options.pretrained_model_name_or_path}"
        self.pipeline: Any = or_fail(what, DiffusionPipeline.from_pretrained, options.pretrained_model_name_or_path)
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.to(self.device)
        self.model = self.pipeline.unet if hasattr(self.pipeline, "unet") else self.pipeline.transformer

    def adapt(self) -> None:
        load_adapter(self.model, self._options.adapter, merge=False)

    @torch.no_grad()
    def outputs(self) -> Tensor:
        size = self._options.resolution
        return self.pipeline(height=size, width=size, **self._call()).images

    def pictures(self, outputs: Tensor) -> list[Image.Image]:
        return self.pipeline.image_processor.numpy_to_pil(self.pipeline.image_processor.pt_to_numpy(outputs))

    def _call(self) -> dict[str, Any]:
        options = self._options
        return {
            "prompt": options.prompt,
            "num_inference_steps": options.inference_steps,
            "guidance_scale": options.guidance_scale,
            "generator": [torch.Generator().manual_seed(options.seed + i) for i in range(len(options.prompt))],
            "output_type": "pt",
        }


class ControlledPipeline(Pipeline):
    """The same with a control of the ControlNet recipe, which stays as it was trained: only the UNet's adapter goes."""

    def __init__(self, options: argparse.Namespace) -> None:
        from control import Frozen, load_control
        from control_data import condition_tensor

        super().__init__(options)
        pipeline = self.pipeline
        self._frozen = Frozen(pipeline.vae, pipeline.text_encoder, pipeline.tokenizer, pipeline.scheduler)
        self._control = load_control(options.control_dir, self.model).to(self.device)
        images = [or_fail("--conditioning-image", load_image, path) for path in options.conditioning_image]
        conditions = [condition_tensor(fit([image], options.resolution)[0][0]) for image in images]
        self._condition = torch.stack(conditions).to(self.device)

    @torch.no_grad()
    def outputs(self) -> Tensor:
        return self._control.draw(self._frozen, self.pipeline.scheduler, self._condition, **self._call())


class Transformer(Subject):
    """A transformers model of the class that its configuration names; its logits, or else its last hidden states."""

    def __init__(self, options: argparse.Namespace) -> None:
        name, what = options.pretrained_model_name_or_path, "--pretrained-model-name-or-path"
        config = or_fail(what, transformers.AutoConfig.from_pretrained, name)
        kind = (config.architectures or ["AutoModel"])[0]
        self._options = options
        self.model = or_fail(what, getattr(transformers, kind).from_pretrained, name).to(self.device).eval()
        if options.text is not None:
            tokenizer = or_fail(what, transformers.AutoTokenizer.from_pretrained, name)
            self._inputs = dict(tokenizer(options.text, return_tensors="pt"))
        else:
            self._inputs = or_fail("--inputs", safetensors.torch.load_file, options.inputs)

    def adapt(self) -> None:
        self.model = load_adapter(self.model, self._options.adapter, merge=False)

    @torch.no_grad()
    def outputs(self) -> Tensor:
        found = self.model(**{name: value.to(self.device) for name, value in self._inputs.items()})
        return found.logits if "logits" in found else found.last_hidden_state


def subject_of(options: argparse.Namespace) -> Subject:
    """What `options` describe. One line and status 2 if it cannot be loaded."""
    if options.prompt is None:
        return Transformer(options)
    return Pipeline(options) if options.control_dir is None else ControlledPipeline(options)
