"""What differs between the families of text-to-image models: layers to adapt, text, noise, and the denoising loss."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from recipe_tools.pipelines import load_pipeline, noise_scheduler, noisy_latents
from torch import Tensor, nn
from torch.nn import functional

Texts = dict[str, Tensor]


class Family(ABC):
    """A pipeline and how to train it. Texts are tensors with one row per prompt, by the pipeline's names for them."""

    denoiser_name = "unet"
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v")
    text_encoder_names: tuple[str, ...] = ("text_encoder",)
    text_targets = ("q_proj", "k_proj", "v_proj")

    def __init__(self, pipeline: DiffusionPipeline, options: argparse.Namespace) -> None:
        self.pipeline = pipeline
        self.resolution = options.resolution
        self.max_sequence_length = options.max_sequence_length
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False).eval()
        pipeline.set_progress_bar_config(disable=True)

    @property
    def denoiser(self) -> nn.Module:
        """The UNet or transformer."""
        return getattr(self.pipeline, self.denoiser_name)

    @abstractmethod
    def encode_texts(self, prompts: list[str]) -> Texts:
        """Encode with the pipeline's text encoders, where they are, with gradients if they train."""

    @abstractmethod
    def losses(self, latents: Tensor, noise: Tensor, uniform: Tensor, texts: Texts, sizes: Tensor) -> Tensor:
        """The mean squared error of each prediction.

        Args:
            latents, noise: (count, channels, height, width).
            uniform: (count,) in 0 ... 1, from which the times of diffusion follow.
            texts: `count` rows.
            sizes: (count, 6) pixels: original height and width, top and left of the crop, target height and width.
        Returns: (count,) float32.
        """

    @torch.no_grad()
    def encode_pictures(self, pixels: Tensor) -> Tensor:
        """Latents, drawn with torch's default generator, of (count, 3, size, size) pixels in -1 ... 1."""
        config = self.pipeline.vae.config
        with torch.autocast(pixels.device.type, enabled=False):
            latents = self.pipeline.vae.encode(pixels.float()).latent_dist.sample()
        return (latents - (config.shift_factor or 0.0)) * config.scaling_factor

    def draw(
        self, text: Texts, negative: Texts, seeds: Sequence[int], options: argparse.Namespace
    ) -> list[Image.Image]:
        """One picture of `text` (one row) for each seed; `negative` guides away from its text.

        Args:
            options: of `diffusion_options.add_drawing_options`.
        """
        pictures: list[Image.Image] = []
        for first in range(0, len(seeds), options.sample_batch_size):
            batch = seeds[first : first + options.sample_batch_size]
            latents = self.pipeline(
                **self._arguments(text, negative),
                num_images_per_prompt=len(batch),
                num_inference_steps=options.inference_steps,
                guidance_scale=options.guidance_scale,
                height=self.resolution,
                width=self.resolution,
                generator=[torch.Generator().manual_seed(seed) for seed in batch],
                output_type="latent",
            ).images
            pictures += self._decode(latents)
        return pictures

    @abstractmethod
    def _arguments(self, text: Texts, negative: Texts) -> dict[str, Any]:
        """What the pipeline is called with for these texts."""

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        config = self.pipeline.vae.config
        latents = latents.float() / config.scaling_factor + (config.shift_factor or 0.0)
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            return self.pipeline.image_processor.postprocess(self.pipeline.vae.decode(latents).sample)


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x, predicting the noise or the velocity."""

    def __init__(self, pipeline: DiffusionPipeline, options: argparse.Namespace) -> None:
        super().__init__(pipeline, options)
        self.noising = noise_scheduler(pipeline)

    def encode_texts(self, prompts: list[str]) -> Texts:
        embeddings, _ = self.pipeline.encode_prompt(prompts, self.denoiser.device, 1, False)
        return {"prompt_embeds": embeddings}

    def losses(self, latents: Tensor, noise: Tensor, uniform: Tensor, texts: Texts, sizes: Tensor) -> Tensor:
        times = (uniform * self.noising.config.num_train_timesteps).long()
        noisy, target = noisy_latents(self.noising, latents, noise, times)
        dtype = self.denoiser.dtype
        predicted = self.denoiser(
            noisy.to(dtype), times, texts["prompt_embeds"].to(dtype), added_cond_kwargs=self._conditions(texts, sizes)
        ).sample
        return _squared_errors(predicted, target)

    def _conditions(self, texts: Texts, sizes: Tensor) -> dict[str, Tensor] | None:
        return None

    def _arguments(self, text: Texts, negative: Texts) -> dict[str, Any]:
        return text | {f"negative_{name}": value for name, value in negative.items()}


class StableDiffusionXL(StableDiffusion):
    """Stable Diffusion XL: two text encoders, and the sizes of the pictures as conditions."""

    text_encoder_names = ("text_encoder", "text_encoder_2")

    def encode_texts(self, prompts: list[str]) -> Texts:
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.denoiser.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}

    def _conditions(self, texts: Texts, sizes: Tensor) -> dict[str, Tensor] | None:
        dtype = self.denoiser.dtype
        return {"text_embeds": texts["pooled_prompt_embeds"].to(dtype), "time_ids": sizes.to(dtype)}


class Flux(Family):
    """FLUX.1: a transformer that predicts the flow from picture to noise."""

    denoiser_name = "transformer"
    targets = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")

    def encode_texts(self, prompts: list[str]) -> Texts:
        embeddings, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.denoiser.device, max_sequence_length=self.max_sequence_length
        )
        return {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}

    def losses(self, latents: Tensor, noise: Tensor, uniform: Tensor, texts: Texts, sizes: Tensor) -> Tensor:
        # Logistic-normal times, as in the flow-matching recipe of Stable Diffusion 3, which put more weight on the
        # middle of the way.
        amount = torch.special.ndtri(uniform.double().clamp(1e-6, 1 - 1e-6)).sigmoid().to(latents.dtype)
        share = amount.view(-1, 1, 1, 1)
        noisy = (1 - share) * latents + share * noise
        dtype, (count, channels, height, width) = self.denoiser.dtype, latents.shape
        pack = self.pipeline._pack_latents
        guidance = torch.ones(count, device=latents.device) if self.denoiser.config.guidance_embeds else None
        embeddings = texts["prompt_embeds"].to(dtype)
        predicted = self.denoiser(
            hidden_states=pack(noisy, count, channels, height, width).to(dtype),
            timestep=amount.to(dtype),
            guidance=guidance,
            pooled_projections=texts["pooled_prompt_embeds"].to(dtype),
            encoder_hidden_states=embeddings,
            txt_ids=embeddings.new_zeros(embeddings.shape[1], 3),
            img_ids=self.pipeline._prepare_latent_image_ids(count, height // 2, width // 2, latents.device, dtype),
        ).sample
        return _squared_errors(predicted, pack(noise - latents, count, channels, height, width))

    def _arguments(self, text: Texts, negative: Texts) -> dict[str, Any]:
        return text  # the guidance is an input of the model

    def _decode(self, latents: Tensor) -> list[Image.Image]:
        factor = self.pipeline.vae_scale_factor
        return super()._decode(self.pipeline._unpack_latents(latents, self.resolution, self.resolution, factor))


_FAMILIES = {
    "StableDiffusionPipeline": StableDiffusion,
    "StableDiffusionXLPipeline": StableDiffusionXL,
    "FluxPipeline": Flux,
}


def load_family(options: argparse.Namespace, dtype: torch.dtype) -> Family:
    """The model of `command_line.add_model_options`, frozen. One line and status 2 if it cannot be loaded."""
    # In 16 bits the autoencoder of SDXL overflows; it is small.
    pipeline = load_pipeline(options, {"default": dtype, "vae": torch.float32}, *_FAMILIES)
    return _FAMILIES[type(pipeline).__name__](pipeline, options)


def _squared_errors(predicted: Tensor, target: Tensor) -> Tensor:
    return functional.mse_loss(predicted.float(), target.float(), reduction="none").flatten(1).mean(dim=1)
