"""How well a mask fits: intersection over union of the areas, and of the pixels along their boundaries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Width of a boundary as a share of the image's diagonal, as Cheng et al. (CVPR 2021) define boundary IoU.
BOUNDARY = 0.02


def iou(mask: Tensor, truth: Tensor) -> float:
    """Intersection over union of two ``(height, width)`` bool masks; 1 for two empty ones."""
    union = (mask | truth).sum().item()
    return (mask & truth).sum().item() / union if union else 1.0


def boundary(mask: Tensor) -> Tensor:
    """The pixels of a ``(height, width)`` bool mask that lie within `BOUNDARY` of its contour; the image's edge counts
    as contour."""
    height, width = mask.shape
    distance = max(1, round(BOUNDARY * (height**2 + width**2) ** 0.5))
    # One pixel further for each step: what is left of the mask after that many erosions is its interior.
    outside = F.pad((~mask).float()[None, None], (distance,) * 4, value=1.0)
    for _ in range(distance):
        outside = F.max_pool2d(outside, 3, stride=1)
    return mask & (outside[0, 0] > 0)


def boundary_iou(mask: Tensor, truth: Tensor) -> float:
    """`iou` of the two `boundary`; much stricter than that of the areas for large masks with ragged edges."""
    return iou(boundary(mask), boundary(truth))


def mean(values: list[float]) -> float:
    """The mean of at least one number."""
    return torch.tensor(values, dtype=torch.float64).mean().item()
