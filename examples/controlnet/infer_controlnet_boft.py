"""Draw images that follow conditions with a control that train_controlnet_boft.py has saved.

    python examples/controlnet/infer_controlnet_boft.py --pretrained-model-name-or-path MODEL --control-dir DIR \\
        --conditioning-image outline.png --prompt "a red circle" --output-dir images
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from control_options import INFERENCE_STEPS, add_model_options
from recipe_tools.arguments import Parser, existing_file, existing_folder, output_folder
from recipe_tools.diffusion_options import add_drawing_options


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of `argv`; bad ones end the program in one line and status 2."""
    parser = Parser(prog="infer_controlnet_boft.py", description=__doc__.splitlines()[0])
    add_model_options(parser)
    parser.add_argument(
        "--control-dir",
        type=existing_folder,
        required=True,
        metavar="DIR",
        help="output folder of train_controlnet_boft.py",
    )
    parser.add_argument(
        "--conditioning-image", type=existing_file, nargs="+", required=True, metavar="FILE", help="pictures to follow"
    )
    parser.add_argument(
        "--prompt", nargs="+", required=True, metavar="TEXT", help="one text for all of them, or one for each"
    )
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="for the images and their grid")
    parser.add_argument("--merge", action="store_true", help="put the adapter into the UNet's weights first")
    parser.add_argument(
        "--mixed-precision", choices=("no", "fp16", "bf16"), default="no", help="as in training (default %(default)s)"
    )
    add_drawing_options(parser, INFERENCE_STEPS)
    options = parser.parse_args(argv)
    if len(options.prompt) == 1:
        options.prompt *= len(options.conditioning_image)
    if len(options.prompt) != len(options.conditioning_image):
        texts, files = len(options.prompt), len(options.conditioning_image)
        parser.error(f"--prompt has {texts} texts, --conditioning-image {files} files: give one, or one for each file")
    output_folder(parser, options.output_dir)
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Draw as the command line says."""
    options = parse(argv)
    # These take seconds to import: wrong arguments are reported before.
    from recipe_tools.quiet import quiet

    quiet()
    import torch
    from control import load_control
    from control_drawing import draw, save_beside_conditions
    from control_models import load_frozen
    from recipe_tools.accelerate_loop import DTYPES
    from recipe_tools.images import fit, load_image
    from recipe_tools.models import or_fail
    from recipe_tools.report import first_line, patch

    images = [or_fail("--conditioning-image", load_image, path) for path in options.conditioning_image]
    conditions = [fit([image], options.resolution)[0][0] for image in images]
    patch()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    frozen, unet = load_frozen(options, DTYPES[options.mixed_precision], device)
    control = load_control(options.control_dir, unet)
    control.load_adapter(options.control_dir, options.merge)
    control.to(device)
    print(f"{options.control_dir}, merged" if options.merge else first_line(control))
    drawn = draw(control, frozen, conditions, options.prompt, options)
    for index, image in enumerate(drawn):
        image.save(options.output_dir / f"image-{index:04}.png")
    save_beside_conditions(options.output_dir / "grid.png", conditions, {"drawn": drawn}, options.prompt)
    print(f"{len(drawn)} images in {options.output_dir}")


if __name__ == "__main__":
    main()
