"""From a model fine-tuned with BOFT back to its base model, one butterfly component at a time (the paper's figure 10).

    python examples/interpolate/interpolate.py --pretrained-model-name-or-path MODEL --adapter DIR \\
        --prompt "a photo of sks dog" --output-dir runs/interpolate

Components are set to the identity from the left, B̃_m first, without any training. The ends are checked: with all of
them trained the outputs are the fine-tuned model's, with none the base model's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from recipe_tools.arguments import Parser, existing_file, existing_folder, number, output_folder, whole

TOLERANCE = 1e-4


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options of `argv`; bad ones end the program in one line and status 2."""
    parser = Parser(prog="interpolate.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pretrained-model-name-or-path",
        required=True,
        metavar="MODEL",
        help="the base model, of diffusers or transformers: a name on the hub, or a folder",
    )
    parser.add_argument("--adapter", type=Path, metavar="DIR", help="folder with adapter_config.json")
    parser.add_argument("--output-dir", type=Path, required=True, metavar="DIR", help="for all results")
    parser.add_argument(
        "--tolerance",
        type=number(0, 1),
        default=TOLERANCE,
        help="largest difference at the ends, as a share of the largest output (default %(default)g)",
    )
    inputs = parser.add_argument_group("what the model gets (one of the three)").add_mutually_exclusive_group(
        required=True
    )
    inputs.add_argument("--prompt", nargs="+", metavar="TEXT", help="a diffusion pipeline draws an image for each")
    inputs.add_argument("--text", metavar="TEXT", help="for a transformers model and its tokenizer")
    inputs.add_argument(
        "--inputs", type=existing_file, metavar="FILE", help="safetensors file of a model's inputs by name"
    )
    drawing = parser.add_argument_group("images")
    drawing.add_argument("--resolution", type=whole(8, 8192), default=512, help="pixels a side (default %(default)s)")
    drawing.add_argument("--inference-steps", type=whole(1, 10**4), default=25, help="(default %(default)s)")
    drawing.add_argument("--guidance-scale", type=number(0, 100), default=7.5, help="(default %(default)s)")
    drawing.add_argument("--seed", type=whole(0, 2**31), default=0, help="of the first image (default %(default)s)")
    drawing.add_argument(
        "--control-dir",
        type=existing_folder,
        metavar="DIR",
        help="output folder of the ControlNet recipe, instead of --adapter",
    )
    drawing.add_argument(
        "--conditioning-image",
        type=existing_file,
        nargs="+",
        metavar="FILE",
        help="for --control-dir, one for each prompt",
    )
    options = parser.parse_args(argv)
    _check(parser, options)
    return options


def _check(parser: Parser, options: argparse.Namespace) -> None:
    if (options.adapter is None) == (options.control_dir is None):
        parser.error("give one of --adapter and --control-dir")
    if options.control_dir is not None:
        texts, files = len(options.prompt or []), len(options.conditioning_image or [])
        if texts != files or not texts:
            parser.error(f"--control-dir needs a --conditioning-image for each --prompt, got {files} and {texts}")
        options.adapter = options.control_dir / "unet"
    if not (options.adapter / "adapter_config.json").is_file():
        parser.error(f"there is no adapter_config.json in {options.adapter}")
    output_folder(parser, options.output_dir)


def main(argv: Sequence[str] | None = None) -> None:
    """Interpolate as the command line says. Status 1 if an end differs from the model that it should be."""
    options = parse(argv)
    # These take seconds to import: wrong arguments are reported before.
    from recipe_tools.quiet import quiet

    quiet()
    from components import Components, base_biases
    from recipe_tools.report import adapt, first_line, patch
    from subjects import subject_of

    patch()
    subject = subject_of(options)
    base = subject.outputs()
    biases = base_biases(subject.model)
    subject.adapt()
    tuned = subject.outputs()
    components = adapt(lambda: Components(subject.model, biases))
    print(first_line(subject.model))

    # From the base model up, so that the last state shows that nothing of the earlier ones is left over.
    outputs = {}
    for count in range(components.m + 1):
        components.keep(count)
        outputs[count] = subject.outputs()
    rows = [
        {
            "components": count,
            "from_tuned": (outputs[count] - tuned).norm().item() / base.norm().item(),
            "from_base": (outputs[count] - base).norm().item() / base.norm().item(),
        }
        for count in reversed(outputs)
    ]
    print("components trained   distance from fine-tuned   from base (shares of the base outputs' norm)")
    for row in rows:
        print(f"{row['components']:18}   {row['from_tuned']:24.6f}   {row['from_base']:9.6f}")
    ends = {
        "fine-tuned": _difference(outputs[components.m], tuned),
        "base": _difference(outputs[0], base),
    }
    result = {"m": components.m, "rows": rows, "largest_differences": ends, "tolerance": options.tolerance}
    (options.output_dir / "interpolation.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    pictures = {count: subject.pictures(found) for count, found in outputs.items()}
    if pictures[0]:
        from recipe_tools.images import save_grid

        strip = [(text, [pictures[count][i] for count in reversed(pictures)]) for i, text in enumerate(options.prompt)]
        headings = ["fine-tuned", *(f"{count} of {components.m}" for count in range(components.m - 1, 0, -1)), "base"]
        save_grid(options.output_dir / "strip.png", strip, headings)
    for name, difference in ends.items():
        if not difference <= options.tolerance:
            sys.exit(f"interpolate.py: this end is not the {name} model: largest difference {difference:g}")
        print(f"the {name} end: largest difference {difference:g}, allowed {options.tolerance:g}")


def _difference(found, expected) -> float:
    """The largest difference, as a share of the largest expected value."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


if __name__ == "__main__":
    main()
