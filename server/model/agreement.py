"""Whether a faster form gives what a class's own code gives, but for rounding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TOLERANCE = {torch.float32: 1e-5}  # of the largest value
_LOW_PRECISION_TOLERANCE = 2e-2
_ROUNDINGS = 4  # of a residual stream in one layer, on both sides
MAGNITUDES = (1e-3, 1.0, 1e2)
"""Of the inputs on which forms are tried: an epsilon shows in the small ones."""
_SEED = 1


def random_input(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """Standard normal numbers, the same at every start, so that the same forms are found."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(_SEED), dtype=torch.float32).to(device, dtype)


def agree(form: Tensor, own: Tensor, rounded_at: float = 0.0) -> bool:
    """Whether they are the same within rounding, in shape and type too, and finite. Where they are differences of
    larger numbers, `rounded_at` is the size of those."""
    largest = float(own.abs().max())
    if form.shape != own.shape or form.dtype != own.dtype or not math.isfinite(largest):
        return False
    allowed = largest * _TOLERANCE.get(own.dtype, _LOW_PRECISION_TOLERANCE)
    allowed += rounded_at * _ROUNDINGS * torch.finfo(own.dtype).eps
    return float((form.float() - own.float()).abs().max()) <= allowed
