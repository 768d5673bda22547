"""Write a tiny Stable Diffusion model that draws coloured shapes from a text, and pairs of outlines and shapes.

    python examples/controlnet/make_tiny_model.py runs/controlnet

The model knows colours and kinds of shapes but draws them anywhere; what a control has to teach it is where.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipe_tools.arguments import Parser, output_folder, whole

PAIRS = 512
MODEL_SEED, DATA_SEED = 0, 1


def make_model(folder: Path, autoencoder_steps: int, denoiser_steps: int) -> None:
    """Pretrain the model on drawn shapes for so many steps and write it to `folder`; always the same one."""
    import torch
    from PIL import Image
    from recipe_tools.drawn_shapes import drawings
    from recipe_tools.tiny_diffusion import RESOLUTION, pretrain, tiny_pipeline

    def draw(generator: torch.Generator) -> tuple[Image.Image, str]:
        number = int(torch.randint(2**31, (), generator=generator))
        drawing = next(drawings(1, RESOLUTION, number))
        return drawing.image, drawing.text

    pipeline = tiny_pipeline("sd", MODEL_SEED)
    losses = pretrain(pipeline, draw, autoencoder_steps=autoencoder_steps, denoiser_steps=denoiser_steps)
    pipeline.save_pretrained(folder)
    print(f"{folder}: losses at the end {', '.join(f'{name} {value:.4f}' for name, value in losses.items())}")


def main(argv: Sequence[str] | None = None) -> None:
    """Write both as the command line says."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where model/ and data/ go")
    parser.add_argument("--pairs", type=whole(1, 10**4), default=PAIRS, help="drawings in data/ (default %(default)s)")
    parser.add_argument("--autoencoder-steps", type=whole(1, 10**6), default=300, help="(default %(default)s)")
    parser.add_argument("--denoiser-steps", type=whole(1, 10**6), default=600, help="(default %(default)s)")
    options = parser.parse_args(argv)
    folder = output_folder(parser, options.folder, "folder")

    from recipe_tools.drawn_shapes import write_folder
    from recipe_tools.tiny_diffusion import RESOLUTION

    write_folder(folder / "data", options.pairs, RESOLUTION, DATA_SEED)
    print(f"{folder / 'data'}: {options.pairs} pairs of {RESOLUTION} x {RESOLUTION} pixels")
    make_model(folder / "model", options.autoencoder_steps, options.denoiser_steps)


if __name__ == "__main__":
    main()
