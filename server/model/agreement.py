"""Whether a faster form gives what a class's own code gives, but for rounding."""

from __future__ import annotations

import torch
from torch import Tensor

_TOLERANCE = {torch.float32: 1e-5}  # of the largest value
_LOW_PRECISION_TOLERANCE = 2e-2
_ROUNDINGS = 4  # of a residual stream in one layer, on both sides
MAGNITUDES = (1e-3, 1.0, 1e2)
"""Of the inputs on which forms are tried: an epsilon shows in the small ones."""


def agree(form: Tensor, own: Tensor, rounded_at: float = 0.0) -> bool:
    """Whether they are the same within rounding, in shape and type too. Where they are differences of larger numbers,
    `rounded_at` is the size of those."""
    if form.shape != own.shape or form.dtype != own.dtype:
        return False
    allowed = float(own.abs().max()) * _TOLERANCE.get(own.dtype, _LOW_PRECISION_TOLERANCE)
    allowed += rounded_at * _ROUNDINGS * torch.finfo(own.dtype).eps
    return float((form.float() - own.float()).abs().max()) <= allowed
