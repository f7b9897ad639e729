"""What a method is to the rest of the server: a reader of checkpoints that fills one or both mechanisms.

Prefix pages (what a sequence starts with) come from a `Prefix`; everything else is row deltas at the base's
sites. Nothing outside a method's own file knows its checkpoint format, and nothing outside `methods` its name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from server.adapters.checkpoint import Checkpoint
from server.adapters.heads import ClassificationHead
from server.model import BaseShape, RowDelta


@dataclass(frozen=True, eq=False)
class EmbeddingPrefix:
    """Virtual tokens by their embeddings, run once under the stack's row deltas."""

    embeddings: Tensor  # [virtual_tokens, hidden]
    takes_positions: bool = field(default=True, init=False)

    @property
    def length(self) -> int:
        """Virtual tokens."""
        return self.embeddings.shape[0]

    @property
    def blocks(self) -> tuple[Tensor, ...]:
        """What it keeps resident, as rows."""
        return (self.embeddings,)


@dataclass(frozen=True, eq=False)
class TokenPrefix:
    """Virtual tokens that are text, run once as any text: under all of the stack's row deltas, the embedding's too."""

    token_ids: tuple[int, ...]
    takes_positions: bool = field(default=True, init=False)
    blocks: tuple[Tensor, ...] = field(default=(), init=False)

    @property
    def length(self) -> int:
        """Virtual tokens."""
        return len(self.token_ids)


@dataclass(frozen=True, eq=False)
class KeyValuePrefix:
    """Virtual tokens by their keys and values, copied into pages as they are: no rotation is applied to them."""

    length: int  # virtual tokens
    blocks: tuple[Tensor, ...]  # per layer [2 · virtual_tokens, kv_heads · head_dim]: keys, then values
    takes_positions: bool = True  # else what follows is numbered as if it were not there


Prefix = EmbeddingPrefix | TokenPrefix | KeyValuePrefix


@dataclass(frozen=True, eq=False)
class Adapter:
    """One adapter, read, checked and in the base's dtype."""

    method: str
    prefix: Prefix | None = None
    deltas: dict[str, RowDelta] = field(default_factory=dict)  # site name → delta
    head: ClassificationHead | None = None  # then it classifies, and generates nothing
    parameters: int = 0  # values in the checkpoint
    rank: int | None = None  # the largest, for low-rank methods
    tasks: int | None = None  # of its checkpoint, where that holds several and this adapter is one of them
    warnings: tuple[str, ...] = ()

    @property
    def virtual_tokens(self) -> int:
        """Positions before the text."""
        return self.prefix.length if self.prefix else 0

    @property
    def blocks(self) -> list[Tensor]:
        """All that it keeps resident, as rows `[rows, width]`: the prefix's, then each delta's, then the head's."""
        blocks = list(self.prefix.blocks) if self.prefix else []
        for delta in self.deltas.values():
            blocks.extend(delta.blocks)
        if self.head:
            blocks.extend(self.head.blocks)
        return blocks

    @property
    def bytes(self) -> int:
        """Resident on the device."""
        return sum(block.nbytes for block in self.blocks)


@dataclass(frozen=True)
class MethodFacts:
    """What the listing of methods says of one. `h` is the base's hidden size, `r` a rank, `T` the virtual tokens."""

    name: str
    mechanism: str  # "prefix pages", or "row delta: " and its kind
    formats: tuple[str, ...]  # checkpoints: the library, and the name of the method in its config
    parameters: str  # per layer, as a formula
    cost: str  # while served


class Method(Protocol):
    """One line of the table of methods; each method's module is one."""

    NAME: str  # as the API shows it
    FACTS: MethodFacts


class Reader(Method, Protocol):
    """A method that a checkpoint's config names."""

    def read(self, checkpoint: Checkpoint, base: BaseShape) -> Adapter:
        """The adapter of a checkpoint. Raises `AdapterError` for anything that would be served wrongly."""
        ...


@runtime_checkable
class PeftMethod(Reader, Protocol):
    """A method whose checkpoints PEFT saves."""

    PEFT_TYPE: str  # as `adapter_config.json` names it


@runtime_checkable
class OwnMethod(Reader, Protocol):
    """A method whose checkpoints are of Medley's own format."""

    MEDLEY_METHOD: str  # as `adapter_config.json` names it
