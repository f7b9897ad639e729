"""What a method is to the rest of the server: a reader of checkpoints that fills one or both mechanisms.

Prefix pages (what a sequence starts with) come from a `Prefix`; everything else is row deltas at the base's
sites. Nothing outside a method's own file knows its checkpoint format, and nothing outside `methods` its name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from server.adapters.checkpoint import Checkpoint
from server.model import BaseShape, RowDelta


@dataclass(frozen=True)
class EmbeddingPrefix:
    """Virtual tokens by their embeddings, run once under the stack's row deltas."""

    embeddings: Tensor  # [virtual_tokens, hidden]

    @property
    def length(self) -> int:
        """Virtual tokens."""
        return self.embeddings.shape[0]

    def tensors(self) -> tuple[Tensor, ...]:
        """What it keeps resident."""
        return (self.embeddings,)

    def to(self, device: torch.device) -> EmbeddingPrefix:
        """The same on `device`."""
        return EmbeddingPrefix(self.embeddings.to(device))


@dataclass(frozen=True)
class KeyValuePrefix:
    """Virtual tokens by their keys and values, copied into pages as they are: no rotation is applied to them."""

    entries: tuple[Tensor, ...]  # per layer [2, virtual_tokens, kv_heads, head_dim]

    @property
    def length(self) -> int:
        """Virtual tokens."""
        return self.entries[0].shape[1]

    def tensors(self) -> tuple[Tensor, ...]:
        """What it keeps resident."""
        return self.entries

    def to(self, device: torch.device) -> KeyValuePrefix:
        """The same on `device`."""
        return KeyValuePrefix(tuple(entry.to(device) for entry in self.entries))


Prefix = EmbeddingPrefix | KeyValuePrefix


@dataclass(frozen=True)
class Adapter:
    """One adapter, read, checked and in the base's dtype."""

    method: str
    prefix: Prefix | None = None
    deltas: dict[str, RowDelta] = field(default_factory=dict)  # site name → delta
    parameters: int = 0  # values in the checkpoint
    rank: int | None = None  # the largest, for low-rank methods
    warnings: tuple[str, ...] = ()

    @property
    def virtual_tokens(self) -> int:
        """Positions before the text."""
        return self.prefix.length if self.prefix else 0

    @property
    def bytes(self) -> int:
        """Resident on the device."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def _tensors(self) -> list[Tensor]:
        tensors = list(self.prefix.tensors()) if self.prefix else []
        for delta in self.deltas.values():
            tensors.extend(delta.tensors())
        return tensors

    def to(self, device: torch.device) -> Adapter:
        """The same on `device`."""
        return Adapter(
            method=self.method,
            prefix=self.prefix.to(device) if self.prefix else None,
            deltas={site: delta.to(device) for site, delta in self.deltas.items()},
            parameters=self.parameters,
            rank=self.rank,
            warnings=self.warnings,
        )


class Method(Protocol):
    """One line of the table of methods; each method's module is one."""

    NAME: str  # as the API shows it
    PEFT_TYPE: str  # as `adapter_config.json` names it

    def read(self, checkpoint: Checkpoint, base: BaseShape) -> Adapter:
        """The adapter of a checkpoint. Raises `AdapterError` for anything that would be served wrongly."""
        ...
