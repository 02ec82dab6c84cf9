"""What counts as accurate enough, for every operator and backend."""

import torch
from torch import Tensor


def relative_rms(actual: Tensor, truth: Tensor) -> float:
    """Root mean square of the error, relative to that of the truth."""
    scale = truth.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return float((actual.double() - truth).square().mean().sqrt() / scale)


def assert_as_accurate(actual: Tensor, plain: Tensor, truth: Tensor, *, slack: float = 0.0) -> None:
    """`actual` is at most twice as far from `truth` (float64) as `plain`, the same in plain torch at actual's dtype.

    `slack` is the relative error that the operator's own tolerance allows on top.
    """
    assert actual.dtype == plain.dtype and truth.dtype == torch.float64
    assert actual.isfinite().all()
    if truth.numel() == 0:
        return
    error, allowed = relative_rms(actual, truth), 2 * relative_rms(plain, truth) + torch.finfo(actual.dtype).eps + slack
    assert error <= allowed, f"relative RMS error {error:.3g}, allowed {allowed:.3g}"
