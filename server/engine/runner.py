"""Runs a step's batch on the base: page operations, then one forward pass. Holds the KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from server.adapters import RowPool
from server.engine.batch import StepBatch
from server.engine.scheduler import PrefixCopy, Schedule
from server.model import FrozenBase, KVCache, PagedAttention


class Runner:
    """See the module."""

    def __init__(self, base: FrozenBase, cache: KVCache, pool: RowPool) -> None:
        """`cache` has a page for every id that the scheduler hands out, `pool` the adapters' rows."""
        self._base = base
        self._cache = cache
        self._pool = pool

    @torch.inference_mode()
    def run(self, schedule: Schedule, batch: StepBatch) -> Tensor:
        """The logits `[num_logits, vocabulary]` that the batch asks for, float32."""
        self._prepare_pages(schedule)
        embeddings = self._base.embed(batch.token_ids)
        for start, given in batch.embeddings:
            embeddings[start : start + len(given)] = given
        attention = PagedAttention(self._cache, batch.attention)
        return self._base.forward(embeddings, batch.positions, attention, batch.deltas, batch.logit_tokens)

    def _prepare_pages(self, schedule: Schedule) -> None:
        """Zero, fill, copy: in this order, for a copied page may be one that is filled here."""
        if schedule.fresh_pages:
            self._cache.zero(schedule.fresh_pages)
        for copy in schedule.prefix_copies:
            self._fill(copy)
        if schedule.page_copies:
            self._cache.copy(
                [copy.source for copy in schedule.page_copies], [copy.target for copy in schedule.page_copies]
            )

    def _fill(self, copy: PrefixCopy) -> None:
        resident = copy.sequence.stack[copy.span.level]
        prefix = resident.layout.prefix
        assert prefix is not None, "a span is of an adapter with virtual tokens"
        assert not prefix.is_run, "only spans that are not run are copied"
        size, pages = self._cache.page_size, copy.prefix.pages
        slots = [pages[at // size] * size + at % size for at in range(copy.span.start, copy.span.stop)]
        entries = [
            resident.block(self._pool, block).view(2, prefix.length, layer.kv_heads, layer.head_dim)
            for block, layer in zip(prefix.blocks, self._base.layers, strict=True)
        ]
        self._cache.fill(torch.tensor(slots, device=self._base.device), entries)
