"""What the recipe needs at full size: Stable Diffusion 2.1's shapes as torch's fake tensors, which hold no numbers.

    python examples/controlnet/full_size.py

Parameters, the bytes that one step saves for its backward pass, and its arithmetic are counted, not estimated; what a
GPU needs is estimated from them (README.md).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from control import TARGETS, Control, make_control
from control_options import HINT_CHANNELS
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import BOFTConfig
from recipe_tools.counts import on_fake_cpu, saved_and_flop
from recipe_tools.report import patch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

import boft_ext

LATENT, TOKENS, WIDTH = 64, 77, 1024
# Number of blocks and factors, of the paper's table.
SETTINGS = ((32, 2), (32, 6), (16, 5), (8, 4))


def unet() -> UNet2DConditionModel:
    """Stable Diffusion 2.1's."""
    model = UNet2DConditionModel(
        sample_size=LATENT,
        block_out_channels=(320, 640, 1280, 1280),
        attention_head_dim=(5, 10, 20, 20),
        cross_attention_dim=WIDTH,
        use_linear_projection=True,
    )
    return model.requires_grad_(False)


def frozen_parts() -> tuple[dict[str, int], int]:
    """Parameters of the autoencoder and of the text encoder, and the flop of both for one sample."""
    autoencoder = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    text = CLIPTextModel(
        CLIPTextConfig(hidden_size=WIDTH, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16)
    )
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        autoencoder.encode(torch.empty(1, 3, 8 * LATENT, 8 * LATENT))
        text(torch.empty(1, TOKENS, dtype=torch.int64))
    return {"autoencoder": _count(autoencoder), "text encoder": _count(text)}, counter.get_total_flops()


def control(way: str, blocks: int, factors: int) -> Control:
    """The recipe's module around the UNet."""
    config = BOFTConfig(
        boft_block_size=0,
        boft_block_num=blocks,
        boft_n_butterfly_factor=factors,
        boft_dropout=0.0,  # which blocks a step drops would be drawn, and changes nothing here
        bias="boft_only",
        target_modules=list(TARGETS),
    )
    with torch.device("meta"):
        module = make_control(way, unet(), config, HINT_CHANNELS)
    return on_fake_cpu(module)


def step(module: Control) -> tuple[int, int]:
    """Bytes that one sample of 512 x 512 pixels saves for the backward pass, and the flop of both passes."""
    module.train()
    inputs = (
        torch.empty(1, 4, LATENT, LATENT),
        torch.empty(1, dtype=torch.int64),
        torch.empty(1, TOKENS, WIDTH),
        torch.empty(1, 3, 8 * LATENT, 8 * LATENT),
    )
    return saved_and_flop(module, lambda: module(*inputs))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def main() -> None:
    patch()
    parts, flop = frozen_parts()
    frozen = {"UNet": _count(unet()), **parts}
    print("frozen parameters:", ", ".join(f"{name} {count:,}" for name, count in frozen.items()))
    print(f"autoencoder and text encoder: {flop:.3g} flop per sample and step, beside those below")
    print("control  r   m   #Param of BOFT   trains, stored   saved per sample, MiB   flop per sample and step")
    for way, blocks, factors in (*(("light", *pair) for pair in SETTINGS), ("full", 32, 2)):
        module = control(way, blocks, factors)
        report = boft_ext.parameter_report(module)
        effective = sum(total.effective for total in report.totals.values())
        stored = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        saved, flop = step(module)
        row = f"{way:7} {blocks:3} {factors:3}   {effective:14,}   {stored:14,}   {saved / 2**20:21,.0f}   {flop:.3g}"
        print(row, flush=True)


if __name__ == "__main__":
    with FakeTensorMode():
        main()
