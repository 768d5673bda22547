"""Write a tiny diffusion model and pictures of one subject, for trying the DreamBooth recipe without a download.

DIR/model is a pipeline for --pretrained-model-name-or-path, DIR/instance holds five pictures of the subject, a square
that is half white and half magenta. With --pretrain the model first learns to draw shapes of one colour.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from recipe_tools.arguments import Parser, output_folder, whole

if TYPE_CHECKING:
    import torch
    from PIL import Image

FAMILIES = ("sd", "sdxl", "flux")
SUBJECTS = 5
_RESOLUTION = 64


def draw_subject(source: random.Random) -> Image.Image:
    """The subject somewhere on a light ground, turned somehow: 64 x 64 pixels."""
    from PIL import Image, ImageDraw

    angle, radius = source.uniform(0, 2 * math.pi), source.uniform(16, 20)
    centre = (source.uniform(24, 40), source.uniform(24, 40))
    corners = [
        (centre[0] + radius * math.cos(angle + turn), centre[1] + radius * math.sin(angle + turn))
        for turn in (0, math.pi / 2, math.pi, 3 * math.pi / 2)
    ]
    image = Image.new("RGB", (_RESOLUTION, _RESOLUTION), (150, 170, 190))
    pen = ImageDraw.Draw(image)
    pen.polygon(corners, fill=(245, 245, 245))
    pen.polygon(corners[:3], fill=(220, 40, 200))
    return image


def draw_shape(generator: torch.Generator) -> tuple[Image.Image, str]:
    """A shape of one colour and its text, which leaves the colour out in a third of all cases."""
    import torch
    from recipe_tools.drawn_shapes import drawings

    seed, leave_out = torch.randint(2**31, (2,), generator=generator).tolist()
    drawing = next(drawings(1, _RESOLUTION, seed))
    _, _, shape = drawing.text.split()
    return drawing.image, f"a {shape}" if leave_out % 3 == 0 else drawing.text


def main(argv: Sequence[str] | None = None) -> None:
    """Write both folders; the same bytes for the same arguments."""
    parser = Parser(prog="make_tiny_model.py", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="where to write model/ and instance/")
    parser.add_argument("--family", choices=FAMILIES, default="sd", help="which pipeline (default %(default)s)")
    parser.add_argument("--pretrain", action="store_true", help="teach it to draw shapes (sd only, about a minute)")
    parser.add_argument("--seed", type=whole(0, 2**31), default=0, help="of weights and pictures (default %(default)s)")
    options = parser.parse_args(argv)
    if options.pretrain and options.family != "sd":
        parser.error(f"--pretrain is for --family sd, not {options.family}")
    output_folder(parser, options.folder, "DIR")

    # These take seconds to import: wrong arguments are reported before.
    from recipe_tools.tiny_diffusion import pretrain, tiny_pipeline

    pipeline = tiny_pipeline(options.family, options.seed)
    if options.pretrain:
        losses = pretrain(pipeline, draw_shape, seed=options.seed)
        print(f"pretrained: autoencoder loss {losses['autoencoder']:.4f}, denoiser loss {losses['denoiser']:.4f}")
    pipeline.save_pretrained(options.folder / "model")
    instance = options.folder / "instance"
    instance.mkdir(exist_ok=True)
    source = random.Random(options.seed)
    for index in range(SUBJECTS):
        draw_subject(source).save(instance / f"{index}.png")
    print(f"wrote {options.folder / 'model'} and {SUBJECTS} pictures in {instance}")


if __name__ == "__main__":
    main()
