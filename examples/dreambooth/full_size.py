"""What the recipe needs at full size: the denoisers' shapes as torch's fake tensors, which hold no numbers.

    python examples/dreambooth/full_size.py

Parameters, the bytes that one sample saves for the backward pass and its arithmetic are counted, not estimated; what a
GPU needs is estimated from them (README.md).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from families import Flux, StableDiffusion, StableDiffusionXL
from peft import BOFTConfig
from recipe_tools.counts import on_fake_cpu, saved_and_flop
from recipe_tools.report import patch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import boft_ext

BLOCK_SIZE, FACTORS = 8, 2


def stable_diffusion_2() -> nn.Module:
    """The UNet of Stable Diffusion 2.1."""
    return UNet2DConditionModel(
        block_out_channels=(320, 640, 1280, 1280),
        attention_head_dim=(5, 10, 20, 20),
        cross_attention_dim=1024,
        use_linear_projection=True,
    )


def stable_diffusion_xl() -> nn.Module:
    """The UNet of Stable Diffusion XL."""
    return UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def flux() -> nn.Module:
    """The transformer of FLUX.1-dev."""
    return FluxTransformer2DModel(guidance_embeds=True)


def run_unet(side: int, width: int, more: dict[str, tuple[int, ...]]) -> Callable[[nn.Module], Tensor]:
    """A forward pass of one sample with `side` x `side` latents and texts of that width."""

    def forward(model: nn.Module) -> Tensor:
        added = {name: torch.empty(shape) for name, shape in more.items()}
        times = torch.empty(1, dtype=torch.int64)
        return model(torch.empty(1, 4, side, side), times, torch.empty(1, 77, width), added_cond_kwargs=added).sample

    return forward


def run_flux(model: nn.Module) -> Tensor:
    """A forward pass of one sample of 512 x 512 pixels and 512 tokens of text."""
    return model(
        hidden_states=torch.empty(1, 1024, 64),
        encoder_hidden_states=torch.empty(1, 512, 4096),
        pooled_projections=torch.empty(1, 768),
        timestep=torch.empty(1),
        guidance=torch.empty(1),
        img_ids=torch.empty(1024, 3),
        txt_ids=torch.empty(512, 3),
    ).sample


MODELS = (
    ("Stable Diffusion 2.1, 512", stable_diffusion_2, StableDiffusion.targets, run_unet(64, 1024, {})),
    (
        "Stable Diffusion XL, 1024",
        stable_diffusion_xl,
        StableDiffusionXL.targets,
        run_unet(128, 2048, {"text_embeds": (1, 1280), "time_ids": (1, 6)}),
    ),
    ("FLUX.1-dev, 512", flux, Flux.targets, run_flux),
)


def main() -> None:
    patch()
    print("model, pixels               frozen           effective    trains, stored   saved per sample, MiB   flop")
    for name, build, targets, forward in MODELS:
        with torch.device("meta"):
            model = build().requires_grad_(False)
            frozen = sum(parameter.numel() for parameter in model.parameters())
            config = BOFTConfig(
                boft_block_size=BLOCK_SIZE,
                boft_n_butterfly_factor=FACTORS,
                boft_dropout=0.0,  # which blocks a step drops would be drawn, and changes nothing here
                bias="boft_only",
                target_modules=list(targets),
            )
            model.add_adapter(config)
        model = on_fake_cpu(model).train()
        effective = sum(total.effective for total in boft_ext.parameter_report(model).totals.values())
        stored = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        saved, flop = saved_and_flop(model, lambda model=model, forward=forward: forward(model))
        row = f"{name:26}  {frozen:14,}   {effective:11,}   {stored:14,}   {saved / 2**20:21,.0f}   {flop:.3g}"
        print(row, flush=True)


if __name__ == "__main__":
    with FakeTensorMode():
        main()
