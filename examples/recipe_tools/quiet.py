"""Keeping the libraries' notes out of a recipe's output."""

from __future__ import annotations

import warnings

from transformers.utils import logging


def quiet() -> None:
    """Only warnings that a user can act on: no bars for loading weights, no notes on how transformers is used.

    Some of the notes come when a pipeline of diffusers is imported: call it before.
    """
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
