"""Whether a faster form gives what a class's own code gives, but for rounding."""

from __future__ import annotations

import torch
from torch import Tensor

_TOLERANCE = {torch.float32: 1e-5}  # of the largest value
_LOW_PRECISION_TOLERANCE = 2e-2
MAGNITUDES = (1e-3, 1.0, 1e2)
"""Of the inputs on which forms are tried: an epsilon shows in the small ones."""


def agree(form: Tensor, own: Tensor) -> bool:
    """Whether they are the same within rounding, in shape and type too."""
    if form.shape != own.shape or form.dtype != own.dtype:
        return False
    scale = float(own.abs().max())
    return float((form.float() - own.float()).abs().max()) <= scale * _TOLERANCE.get(
        own.dtype, _LOW_PRECISION_TOLERANCE
    )
