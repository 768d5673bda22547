"""The loss that masks are trained with: cross-entropy of the pixels plus the Dice loss of the area."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def mask_loss(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """The mean over the masks, a scalar.

    Args:
        logits: ``(masks, height, width)``.
        target: the same shape, from 0 to 1.
        valid: the same shape, 0 for pixels that do not count (padding), otherwise 1.
    """
    logits = logits.float()
    entropy = F.binary_cross_entropy_with_logits(logits, target, weight=valid, reduction="none")
    entropy = entropy.sum((1, 2)) / valid.sum((1, 2))
    share = logits.sigmoid() * valid
    overlap = 2 * (share * target).sum((1, 2)) + 1
    dice = 1 - overlap / (share.sum((1, 2)) + (target * valid).sum((1, 2)) + 1)
    return (entropy + dice).mean()
