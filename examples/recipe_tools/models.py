"""Loading what a recipe was given, and the layers that it tunes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import nn

from .arguments import fail


def or_fail(what: str, function: Callable[..., Any], *arguments: Any, **more: Any) -> Any:
    """What `function` returns; one line that begins with `what` and status 2 if it cannot read what it was given."""
    try:
        return function(*arguments, **more)
    except (OSError, ValueError) as error:
        fail(f"{what}: {' '.join(str(error).split())}")


def block_linears(model: nn.Module) -> list[str]:
    """The names that the linear layers of the numbered blocks have within their block (``attention.q_proj``)."""
    names = (re.fullmatch(r"(?:.*\.)?\d+\.(.+)", name) for name, m in model.named_modules() if isinstance(m, nn.Linear))
    return sorted({match[1] for match in names if match})
