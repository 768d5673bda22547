"""DreamBooth with BOFT: teach a text-to-image model one subject from a few pictures.

For Stable Diffusion (1.x, 2.x), Stable Diffusion XL and FLUX.1. BOFT adapts the query, key and value layers of the
denoiser, with --train-text-encoder also those of the CLIP text encoders. See README.md beside this file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from command_line import parse


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says; the output folder then has everything."""
    options = parse(argv)
    # These take seconds to import: wrong arguments are reported before.
    from recipe_tools.quiet import quiet

    quiet()
    from dreambooth_loop import train

    train(options)


if __name__ == "__main__":
    main()
