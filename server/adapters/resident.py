"""An adapter in the bank: where its rows lie in the pool, and what they are.

The layout says what an adapter's rows are, the same for all adapters of one shape; with the first row of each width it
says where they are. The rows of tokens with the same layout are picked out together, whoever they belong to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from server.adapters.method import Adapter, EmbeddingPrefix
from server.adapters.pool import RowPool
from server.model import DeltaKind, Rows


class Block(NamedTuple):
    """A matrix among an adapter's rows."""

    width: int
    offset: int  # rows of this width before it
    height: int  # rows


class SiteBlocks(NamedTuple):
    """A delta without its values."""

    site: str
    kind: DeltaKind
    blocks: tuple[Block, ...]


class PrefixBlocks(NamedTuple):
    """Virtual tokens without their values."""

    length: int
    is_run: bool  # embeddings, run through the model; else keys and values per layer, copied
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Layout:
    """An adapter without its values; equal for adapters of one shape."""

    prefix: PrefixBlocks | None
    deltas: tuple[SiteBlocks, ...]


@dataclass(frozen=True, eq=False)
class Loaded:
    """An adapter on the device, ready to be written into the pool: its rows of each width in one matrix."""

    layout: Layout
    rows: Mapping[int, Tensor]  # width → [rows, width]

    @classmethod
    def of(cls, adapter: Adapter, device: torch.device) -> Loaded:
        """Gather an adapter's blocks by width and copy them to the device; on a loader's thread."""
        counts: Counter[int] = Counter()
        parts: dict[int, list[Tensor]] = {}

        def placed(blocks: Iterable[Tensor]) -> tuple[Block, ...]:
            places: list[Block] = []
            for block in blocks:
                count, width = block.shape
                places.append(Block(width, counts[width], count))
                counts[width] += count
                parts.setdefault(width, []).append(block)
            return tuple(places)

        prefix = None
        if adapter.prefix is not None:
            is_run = isinstance(adapter.prefix, EmbeddingPrefix)
            prefix = PrefixBlocks(adapter.prefix.length, is_run, placed(adapter.prefix.blocks))
        deltas = tuple(SiteBlocks(site, delta.kind, placed(delta.blocks)) for site, delta in adapter.deltas.items())
        rows = {width: torch.cat(blocks).to(device) for width, blocks in parts.items()}
        return cls(Layout(prefix, deltas), rows)

    @property
    def counts(self) -> dict[int, int]:
        """Rows of each width."""
        return {width: len(rows) for width, rows in self.rows.items()}

    @property
    def bytes(self) -> int:
        """Resident on the device."""
        return sum(rows.nbytes for rows in self.rows.values())


@dataclass(eq=False)
class Resident:
    """An adapter in the bank."""

    digest: str
    layout: Layout
    counts: Mapping[int, int]  # width → rows
    first: Mapping[int, int]  # width → the first of its rows in the pool
    bytes: int
    holders: int = field(default=0)

    def block(self, pool: RowPool, block: Block) -> Tensor:
        """One of its matrices `[rows, width]`, as it lies in the pool."""
        start = self.first[block.width] + block.offset
        return pool.rows(block.width)[start : start + block.height]

    def rows(self, pool: RowPool, blocks: Iterable[Block]) -> tuple[Rows, ...]:
        """Blocks of a delta, for tokens that are all its own."""
        return tuple(
            Rows(pool.rows(block.width), self.first[block.width] + block.offset, block.height) for block in blocks
        )
