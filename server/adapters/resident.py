"""An adapter in the bank: where its rows lie in the pool, and what they are.

The layout says what an adapter's rows are, the same for all adapters of one shape; with the first row of each width it
says where they are. The rows of tokens with the same layout are picked out together, whoever they belong to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from server.adapters.heads import HeadShape
from server.adapters.method import Adapter, KeyValuePrefix, TokenPrefix
from server.adapters.pool import RowPool
from server.adapters.shared import SharedMatrices, SharingKind
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
    is_run: bool  # embeddings or text, run through the model; else keys and values per layer, copied
    takes_positions: bool
    blocks: tuple[Block, ...]
    token_ids: tuple[int, ...] = ()  # of text


class HeadBlocks(NamedTuple):
    """A classification head without its values; no part of the layout, since no step applies it to several rows."""

    shape: HeadShape
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Layout:
    """An adapter without its values; equal for adapters of one shape."""

    prefix: PrefixBlocks | None
    deltas: tuple[SiteBlocks, ...]

    def __hash__(self) -> int:
        """Of all that it holds, found once: a step asks for it row by row."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.prefix, self.deltas))

    @cached_property
    def shared(self) -> frozenset[SharedMatrices]:
        """What it has in common with other adapters, beside its rows."""
        return frozenset(delta.kind.shared for delta in self.deltas if isinstance(delta.kind, SharingKind))

    @cached_property
    def looks_up(self) -> bool:
        """Whether tokens look rows up by their ids."""
        return any(delta.kind.looks_up for delta in self.deltas)

    @cached_property
    def by_adapter(self) -> bool:
        """Whether each adapter is applied by itself, however few its tokens."""
        return any(delta.kind.by_adapter for delta in self.deltas)

    @cached_property
    def delta_rows(self) -> Mapping[int, tuple[int, int]]:
        """Width → the first of the deltas' rows of that width among the adapter's own, and one past the last."""
        blocks = [block for delta in self.deltas for block in delta.blocks]
        return {
            width: (
                min(block.offset for block in blocks if block.width == width),
                max(block.offset + block.height for block in blocks if block.width == width),
            )
            for width in sorted({block.width for block in blocks})
        }


@dataclass(frozen=True, eq=False)
class Loaded:
    """An adapter on the device, ready to be written into the pool: its rows of each width in one matrix."""

    layout: Layout
    rows: Mapping[int, Tensor]  # width → [rows, width]
    head: HeadBlocks | None = None

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
            given = adapter.prefix
            is_run = not isinstance(given, KeyValuePrefix)
            token_ids = given.token_ids if isinstance(given, TokenPrefix) else ()
            prefix = PrefixBlocks(given.length, is_run, given.takes_positions, placed(given.blocks), token_ids)
        deltas = tuple(SiteBlocks(site, delta.kind, placed(delta.blocks)) for site, delta in adapter.deltas.items())
        head = None
        if adapter.head is not None:
            head = HeadBlocks(adapter.head.shape, placed(adapter.head.blocks))
        rows = {width: torch.cat(blocks) for width, blocks in parts.items()}
        return cls(Layout(prefix, deltas), _on_device(rows, device), head)

    @property
    def counts(self) -> dict[int, int]:
        """Rows of each width."""
        return {width: len(rows) for width, rows in self.rows.items()}

    @property
    def bytes(self) -> int:
        """Resident on the device."""
        return sum(rows.nbytes for rows in self.rows.values())

    def write(self, pool: RowPool, first: Mapping[int, int]) -> None:
        """Put the rows into the pool, each width's from `first[width]` on; on the engine's thread."""
        for width, rows in self.rows.items():
            pool.rows(width)[first[width] : first[width] + len(rows)] = rows
            if rows.is_cuda:  # made on a loader's stream: not to be used again there before this copy is done
                rows.record_stream(torch.cuda.current_stream(rows.device))


def _on_device(rows: Mapping[int, Tensor], device: torch.device) -> Mapping[int, Tensor]:
    """The same rows on the device. With CUDA through pinned memory, on a stream of the loader's own, which its thread
    waits for: neither the steps' thread nor their stream ever does."""
    if device.type != "cuda":
        return {width: matrix.to(device) for width, matrix in rows.items()}
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch's
    with torch.cuda.stream(stream):
        copied = {width: matrix.pin_memory().to(device, non_blocking=True) for width, matrix in rows.items()}
    stream.synchronize()
    return copied


@dataclass(eq=False)
class Resident:
    """An adapter in the bank."""

    digest: str
    layout: Layout
    counts: Mapping[int, int]  # width → rows
    first: Mapping[int, int]  # width → the first of its rows in the pool
    bytes: int
    holders: int = field(default=0)
    head: HeadBlocks | None = None

    def block(self, pool: RowPool, block: Block) -> Tensor:
        """One of its matrices `[rows, width]`, as it lies in the pool."""
        start = self.first[block.width] + block.offset
        return pool.rows(block.width)[start : start + block.height]

    def rows(self, pool: RowPool, blocks: Iterable[Block]) -> tuple[Rows, ...]:
        """Blocks of a delta, for tokens that are all its own."""
        return tuple(
            Rows(pool.rows(block.width), self.first[block.width] + block.offset, block.height) for block in blocks
        )
