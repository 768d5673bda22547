"""How large an error may be: twice what torch itself makes at the same dtype, plus a stated floor."""

import torch

FLOORS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 2e-4}
"""Relative errors below which nothing is compared: a few roundings of sums (f64, f32), a fraction of one (16 bits)."""

EXACT = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Relative error allowed against the mathematics in float64."""


def relative_error(actual, exact):
    """||actual - exact|| / ||exact|| in float64; infinite if anything is NaN, 0 for two zero tensors."""
    assert actual.shape == exact.shape, f"{tuple(actual.shape)} against {tuple(exact.shape)}"
    difference = (actual.double() - exact.double()).norm()
    size = exact.double().norm()
    error = (difference / size).item() if size > 0 else difference.item()
    return float("inf") if error != error else error


def assert_as_exact_as_torch(what, ours, theirs, exact):
    """`ours` is at most twice as far from `exact` as `theirs`, both computed at the dtype of `ours`."""
    limit = 2 * relative_error(theirs, exact) + FLOORS[ours.dtype]
    error = relative_error(ours, exact)
    assert error <= limit, f"{what}: relative error {error:.3g}, allowed {limit:.3g}"


def assert_exact(what, ours, exact):
    """`ours`, float32 or float64, agrees with the mathematics in float64."""
    error, limit = relative_error(ours, exact), EXACT[ours.dtype]
    assert error <= limit, f"{what}: relative error {error:.3g}, allowed {limit:.3g}"
