"""Runs a step's batch on the base: page operations, then one forward pass. Holds the KV cache.

On CUDA it looks for the fastest attention that gives the right answers, and steps of one token per row run as graphs.
"""

from __future__ import annotations

import logging
from functools import partial

import torch
from torch import Tensor

from server.adapters import RowPool
from server.engine.batch import BatchBuilder, StepBatch
from server.engine.graphs import Composition, DecodeGraphs, GraphInputs
from server.engine.scheduler import PrefixCopy, Schedule
from server.model import AttentionPlan, FrozenBase, KVCache, PagedAttention, SitePlan, VarlenAttention
from server.model.attention import Attention
from server.model.kernels import kernel_at
from server.model.kv_cache import index_tensor
from server.model.varlen_attention import Kernel, find_kernel

logger = logging.getLogger("medley.runner")


class Runner:
    """See the module."""

    def __init__(self, base: FrozenBase, cache: KVCache, pool: RowPool, *, max_rows: int) -> None:
        """`cache` has a page for every id that the scheduler hands out, `pool` the adapters' rows; no step has more
        than `max_rows` rows of running streams."""
        self._base = base
        self._cache = cache
        self._pool = pool
        self._max_rows = max_rows
        self._is_cuda = base.device.type == "cuda"
        self.returns_early = self._is_cuda  # `run` returns while the device computes what it gives
        self._kernel: Kernel | None = None
        self._inputs: GraphInputs | None = None
        self._graphs: DecodeGraphs | None = None
        self._compiled, reason = base.kernels, base.kernels_note
        self.states: Tensor | None = None  # of the last step's logits the head's inputs [num_logits, hidden], if wanted
        if self._is_cuda:
            self._kernel, reason = find_kernel(base, cache.page_size)
            self.pad_decode_steps()
            self._graphs = DecodeGraphs(self._run_composition, max_rows)
        self._reads_in_place = self._kernel is not None or bool(self._compiled and self._compiled.decode)
        logger.info("attention %s: %s", "in place" if self._reads_in_place else "over gathered pages", reason)

    def pad_decode_steps(self) -> None:
        """Let steps of one token per row have inputs that a graph can refer to."""
        self._inputs = GraphInputs(
            self._cache,
            self._pool,
            max_rows=self._max_rows,
            max_length=self._base.max_model_len,
            is_varlen=self._kernel is not None,
            kernel_of=partial(kernel_at, self._base.shape, self._compiled and self._compiled.deltas),
        )

    def batch_builder(self) -> BatchBuilder:
        """What makes the batches that `run` takes."""
        return BatchBuilder(
            self._base.shape,
            self._pool,
            self._cache.page_size,
            self._base.device,
            is_varlen=self._kernel is not None,
            kernels=self._compiled,
            graph_inputs=self._inputs,
        )

    @torch.inference_mode()
    def run(self, schedule: Schedule, batch: StepBatch) -> Tensor:
        """The logits `[num_logits, vocabulary]` that the batch asks for, float32; of a padded batch more."""
        self._prepare_pages(schedule)
        if batch.composition is not None:
            run = self._run_composition if self._graphs is None else self._graphs.run
            return run(batch.composition)
        embeddings = self._base.embed(batch.token_ids, batch.deltas)
        for start, given in batch.embeddings:
            embeddings[start : start + len(given)] = given
        states: list[Tensor] | None = [] if batch.wants_states else None
        logits = self._forward(embeddings, batch.positions, batch.attention, batch.deltas, batch.logit_tokens, states)
        self.states = states[0] if states else None
        return logits

    def _run_composition(self, composition: Composition) -> Tensor:
        """A padded batch, its inputs where `GraphInputs` has put them. A graph holds all of this."""
        assert self._inputs is not None, "only they make such batches"
        static = self._inputs.batch(composition)
        deltas = self._inputs.deltas(static)
        embeddings = self._base.embed(static.token_ids, deltas)
        return self._forward(embeddings, static.positions, static.attention, deltas, static.logit_tokens)

    def _forward(
        self,
        embeddings: Tensor,
        positions: Tensor,
        plan: AttentionPlan,
        deltas: SitePlan,
        logit_tokens: Tensor,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        attention: Attention
        if self._kernel is not None:
            attention = VarlenAttention(self._cache, plan, self._kernel)
        else:
            attention = PagedAttention(self._cache, plan, self._is_cuda, self._compiled and self._compiled.decode)
        return self._base.forward(embeddings, positions, attention, deltas, logit_tokens, states)

    def _prepare_pages(self, schedule: Schedule) -> None:
        """Zero, fill, copy: in this order, for a copied page may be one that is filled here."""
        if schedule.fresh_pages and not self._reads_in_place:  # what is not read cannot hurt
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
        self._cache.fill(index_tensor(slots, self._base.device), entries)
