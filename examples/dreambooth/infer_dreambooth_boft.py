"""Draw with what train_dreambooth_boft.py has trained, with the adapters in place or merged into the weights.

Writes the pictures as 00.png, 01.png, ... and all of them in grid.png.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from command_line import add_dreambooth_drawing_options, add_model_options
from recipe_tools.arguments import Parser, output_folder, whole

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of `argv`, with `found`, the names of the components that have adapters."""
    parser = Parser(prog="infer_dreambooth_boft.py", description=__doc__)
    add_model_options(parser)
    parser.add_argument(
        "--adapter-dir", type=Path, required=True, metavar="DIR", help="the output folder of train_dreambooth_boft.py"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what to draw")
    parser.add_argument("--num-images", type=whole(1, 1000), default=4, help="how many (default %(default)s)")
    parser.add_argument("--merge", action="store_true", help="put the adapters into the weights: plain layers")
    parser.add_argument(
        "--mixed-precision", choices=("no", "fp16", "bf16"), default="no", help="as in training (default %(default)s)"
    )
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="where the pictures go")
    add_dreambooth_drawing_options(parser)
    options = parser.parse_args(argv)
    options.found = [name for name in COMPONENTS if (options.adapter_dir / name / "adapter_config.json").is_file()]
    if not options.found:
        parser.error(f"--adapter-dir {options.adapter_dir} has no adapter of {', '.join(COMPONENTS)}")
    output_folder(parser, options.output_dir)
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Draw as the command line says."""
    options = parse(argv)
    # These take seconds to import: wrong arguments are reported before.
    from recipe_tools.quiet import quiet

    quiet()
    import torch
    from families import load_family
    from recipe_tools.accelerate_loop import DTYPES
    from recipe_tools.adapters import load_adapter
    from recipe_tools.arguments import fail
    from recipe_tools.images import save_grid
    from recipe_tools.report import patch

    patch()
    dtype = DTYPES[options.mixed_precision]
    family = load_family(options, dtype)
    pipeline = family.pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    for name in options.found:
        component = getattr(pipeline, name, None)
        if component is None:
            fail(f"--adapter-dir {options.adapter_dir} has an adapter of {name}, which the model does not have")
        adapted = load_adapter(component, options.adapter_dir / name, options.merge)
        setattr(pipeline, name, adapted.eval())
    seeds = range(options.seed, options.seed + options.num_images)
    # Of an adapter in place the weights are float32 whatever the others are.
    with torch.no_grad(), torch.autocast(pipeline.device.type, dtype, enabled=dtype != torch.float32):
        text, negative = family.encode_texts([options.prompt]), family.encode_texts([""])
        images = family.draw(text, negative, seeds, options)
    for index, image in enumerate(images):
        image.save(options.output_dir / f"{index:02}.png")
    save_grid(options.output_dir / "grid.png", [(options.prompt, images)])
    state = "merged" if options.merge else "in place"
    print(f"{len(images)} pictures in {options.output_dir}, adapters of {', '.join(options.found)} {state}")


if __name__ == "__main__":
    main()
