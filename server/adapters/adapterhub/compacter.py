"""Compacter: bottlenecks whose matrices are sums of Kronecker products, expanded when they are read.

Karimi Mahabadi et al., "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", NeurIPS 2021. A matrix `[in, out]`
is H = Σᵢ ruleᵢ ⊗ Wᵢ over `phm_dim` terms; rule, W or both may be products of two factors, and may be shared by all
places of an adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from server.adapters.checkpoint import Checkpoint

MOST_TERMS = 64  # a rule has their number to the third; the paper's largest is 12
_LEFT, _RIGHT = "_left", "_right"


class Compacter:
    """The matrices of one adapter; what its places share is taken once."""

    def __init__(self, checkpoint: Checkpoint, settings: Mapping[str, Any], terms: int, shared_prefix: str) -> None:
        """`shared_prefix` is where the tensors of all places stand."""
        self._checkpoint = checkpoint
        self._settings = settings
        self.terms = terms
        self._prefix = shared_prefix
        self._shared: dict[str, Tensor] = {}

    def matrix(self, name: str, position: str, rows: int, columns: int) -> Tensor:
        """H `[rows, columns]` of the module called `name`, the `down` or the `up` (`position`) of its place."""
        terms, settings = self.terms, self._settings
        self._checkpoint.expand(name, rows * columns)
        rule = self._product(
            f"{self._prefix}phm_rule" if settings.get("shared_phm_rule", True) else f"{name}.phm_rule",
            (terms, terms, terms),
            is_factorized=bool(settings.get("factorized_phm_rule")),
            is_shared=bool(settings.get("shared_phm_rule", True)),
        )
        is_shared = bool(settings.get("shared_W_phm"))
        weights = self._product(
            f"{self._prefix}W_{position}" if is_shared else f"{name}.W",
            (terms, rows // terms, columns // terms),
            is_factorized=bool(settings.get("factorized_phm_W", True)),
            is_shared=is_shared,
        )
        matrix = torch.zeros(rows, columns)
        for left, right in zip(rule, weights, strict=True):  # one term at a time: all of them may take much more
            matrix += torch.kron(left, right)
        return matrix

    def _product(self, name: str, shape: tuple[int, int, int], *, is_factorized: bool, is_shared: bool) -> Tensor:
        if name in self._shared:
            return self._shared[name]
        if is_factorized:
            count, rows, columns = shape
            left = self._checkpoint.take(f"{name}{_LEFT}", (count, rows, None))
            right = self._checkpoint.take(f"{name}{_RIGHT}", (count, left.shape[2], columns))
            value = left.float() @ right.float()
        else:
            value = self._checkpoint.take(name, shape).float()
        if is_shared:
            self._shared[name] = value
        return value
