"""Medley's engine in this process, with the server's own default sizes; adapters are read from PEFT folders."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType

from benchmarks.bases import random_base
from benchmarks.inprocess import default, drive, engine_limits, open_engine
from benchmarks.workload import Job, Run, Workload
from server.engine.pages import pages_for
from server.engine.protocol import StepOutput
from server.model import FrozenBase, KVCache


class Medley:
    """An engine for one workload. A context manager: leaving it stops the loader's threads."""

    def __init__(self, workload: Workload, num_prefixes: int) -> None:
        """The KV cache holds all requests and `num_prefixes` prefixes at once, so that nothing is preempted."""
        self._new_tokens = workload.new_tokens
        page_size = default("page_size")
        pages = workload.requests * pages_for(workload.length, page_size)
        pages += num_prefixes * pages_for(workload.virtual_tokens, page_size)
        room = {name: max(default(name), workload.requests) for name in ("max_seqs", "max_batch_tokens", "max_queue")}
        base = FrozenBase(random_base(workload.size, workload.length))
        self.kv_bytes = (1 + pages) * KVCache.page_bytes(base.layers, page_size, base.dtype)
        """Of the KV cache, the null page counted."""
        self._stack = ExitStack()
        self.engine = self._stack.enter_context(open_engine(base, engine_limits(pages, **room)))

    def __enter__(self) -> Medley:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def parameters(self) -> int:
        """Of the base."""
        return self.engine.base.parameters

    def run(self, jobs: list[Job], watch: Callable[[StepOutput], None] = lambda _: None) -> Run:
        """All jobs, mixed as they come, from the first one's arrival to the last one's end. `watch` sees every step;
        a sequence's id is its job's index."""
        return drive(self.engine, jobs, self._new_tokens, watch)
