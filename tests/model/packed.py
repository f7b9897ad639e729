"""Packed modules of the models' tests."""

from __future__ import annotations

from torch import nn

from server.model import products
from server.model.products import Product


def packed(module: nn.Module) -> Product:
    """The module's product, once its weight is packed."""
    product = products.pack(module)
    assert product is not None, "oneDNN gives what torch's own product gives"
    return product
