"""Medley's engine in this process, with the server's own default sizes; adapters are read from PEFT folders."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.bases import random_base
from benchmarks.workload import Job, Run, Workload
from server.adapters import Adapter, Checkpoint, read_adapter
from server.engine.engine import Engine, EngineLimits
from server.engine.pages import pages_for
from server.engine.protocol import AdapterRef, Generate, Sampling
from server.model import FrozenBase
from server.settings import GIB, Settings

_DEADLINE_SECONDS = 3600.0


class Medley:
    """An engine for one workload. A context manager: leaving it stops the loader's threads."""

    def __init__(self, workload: Workload, num_prefixes: int) -> None:
        """The KV cache holds all requests and `num_prefixes` prefixes at once, so that nothing is preempted."""
        self._workload = workload
        base = FrozenBase(random_base(workload.size, workload.length))
        page_size = _default("page_size")
        pages = workload.requests * pages_for(workload.length, page_size)
        pages += num_prefixes * pages_for(workload.virtual_tokens, page_size)
        limits = EngineLimits(
            max_seqs=max(_default("max_seqs"), workload.requests),
            max_batch_tokens=max(_default("max_batch_tokens"), workload.requests),
            max_queue=max(_default("max_queue"), workload.requests),
            num_pages=1 + pages,
            page_size=page_size,
            adapter_bytes=int(_default("adapter_memory") * GIB),
        )

        def load(files: Mapping[str, str]) -> Adapter:
            return read_adapter(Checkpoint.open(Path(files["folder"]), base.dtype), base.shape).to(base.device)

        self.engine = Engine(base, limits, load)

    def __enter__(self) -> Medley:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.engine.close()

    @property
    def parameters(self) -> int:
        """Of the base."""
        return self.engine.base.parameters

    def run(self, jobs: list[Job]) -> Run:
        """All jobs, mixed as they come, from the first one's arrival to the last one's end."""
        answers: list[list[int]] = [[] for _ in jobs]
        cached_virtual = cached_text = 0
        started = time.perf_counter()
        for index, job in enumerate(jobs):
            self.engine.add(self._request(str(index), job))
        while self.engine.has_work:
            output = self.engine.step()
            if output.failed:
                raise RuntimeError(f"the engine refused a request: {output.failed[0].message}")
            for tokens in output.tokens:
                answers[int(tokens.id)] += tokens.token_ids
                if tokens.finish_reason is not None:
                    cached_virtual += min(tokens.cached_tokens, tokens.virtual_tokens)
                    cached_text += max(tokens.cached_tokens - tokens.virtual_tokens, 0)
            if self.engine.must_wait:
                time.sleep(0.001)  # a first run's adapters are being loaded
        return Run(answers, time.perf_counter() - started, cached_virtual, cached_text)

    def _request(self, name: str, job: Job) -> Generate:
        stack: tuple[AdapterRef, ...] = ()
        if job.task is not None:
            folder = str(job.task.folder)
            stack = (AdapterRef(digest=folder, files={"folder": folder}),)
        return Generate(
            id=name,
            prompt=job.prompt,
            stack=stack,
            sampling=Sampling(max_tokens=self._workload.new_tokens, temperature=0.0, ignore_eos=True),
            deadline=time.time() + _DEADLINE_SECONDS,
        )


def _default(setting: str) -> Any:
    """What the server does when nobody says otherwise, whatever this process's environment says."""
    return Settings.model_fields[setting].default
