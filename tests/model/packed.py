"""Packed modules of the models' tests."""

from __future__ import annotations

import pytest
from torch import nn

from server.model import products
from server.model.products import Product
from server.model.program_kernels import MOST_TOKENS

for_many_tokens = pytest.mark.skipif(
    MOST_TOKENS < 20, reason=f"this processor has no AVX-512: programs take {MOST_TOKENS} tokens at most"
)


def packed(module: nn.Module) -> Product:
    """The module's product, once its weight is packed."""
    product = products.pack(module)
    assert product is not None, "oneDNN gives what torch's own product gives"
    return product
