"""ControlNet with BOFT: teach a text-to-image model to follow a second picture.

For Stable Diffusion 1.x and 2.x. BOFT adapts to_q, to_k and to_v of every attention layer of the UNet; the picture
comes in through the paper's light hint encoder or through diffusers' ControlNet. See README.md beside this file.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from control_options import parse


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says; the output folder then has everything."""
    options = parse(argv)
    # These take seconds to import: wrong arguments are reported before.
    from recipe_tools.quiet import quiet

    quiet()
    from control_loop import train

    train(options)


if __name__ == "__main__":
    main()
