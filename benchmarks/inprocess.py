"""Engines in the benchmark's own process, with any limits, driven to the end or step by step.

`benchmarks.medley` is one with room for a whole workload; benchmarks that need other sizes use this module and set them
themselves. What is not set is the server's default.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers.utils import logging

from benchmarks.bases import SIZES, BaseSize
from benchmarks.frame import await_idle
from benchmarks.workload import Job, Run, Task
from server.adapters import Adapter, Checkpoint, read_adapter
from server.engine.engine import Engine, EngineLimits
from server.engine.process import PREFILL_TOKENS
from server.engine.protocol import AdapterRef, Generate, Sampling, StepOutput
from server.model import FrozenBase
from server.model.heap import move_to_huge_pages
from server.settings import GIB, Settings

_DEADLINE_SECONDS = 3600.0


def _parse_size(text: str | BaseSize) -> BaseSize:
    if isinstance(text, BaseSize):  # an option's default comes this way too
        return text
    try:
        return BaseSize.parse(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


Size = Annotated[
    BaseSize,
    typer.Option(parser=_parse_size, metavar="SIZE", help=f"base: {', '.join(SIZES)} or WIDTHxLAYERSxHEADSxVOCABULARY"),
]


def prepare(threads: int | None, *, is_saved: bool = False) -> None:
    """Set torch's threads, silence what the reference libraries say about their own calls, and wait for an idle machine
    where the figures are to be saved."""
    if threads is not None:
        torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module="peft|transformers")
    if is_saved:
        await_idle()


def default(setting: str) -> Any:
    """What the server does when nobody says otherwise, whatever this process's environment says."""
    return Settings.model_fields[setting].default


def engine_limits(num_pages: int, **changes: int) -> EngineLimits:
    """The server's default sizes but for `changes`; `num_pages` of the KV cache, the null page not counted."""
    given = {
        "num_pages": 1 + num_pages,
        "adapter_bytes": int(default("adapter_memory") * GIB),
        "max_prefill_tokens": PREFILL_TOKENS["cpu"],
        **changes,
    }
    for limit in fields(EngineLimits):
        if limit.name not in given:
            given[limit.name] = default(limit.name)
    return EngineLimits(**given)


@contextmanager
def open_engine(base: FrozenBase, limits: EngineLimits, *, is_moved: bool = True) -> Iterator[Engine]:
    """An engine that reads adapters from PEFT folders; its loader's threads end with the block. `is_moved`: its memory
    is on huge pages, as a server's that had a moment's rest."""

    def load(files: Mapping[str, str]) -> Adapter:
        return read_folder(Path(files["folder"]), base)

    engine = Engine(base, limits, load)
    gc.collect()
    gc.freeze()  # as the engine's process does, and this too
    if is_moved:
        move_to_huge_pages()
    try:
        yield engine
    finally:
        engine.close()
        gc.unfreeze()


def read_folder(folder: Path, base: FrozenBase) -> Adapter:
    """The adapter in a PEFT folder, as the engine's loader makes it."""
    return read_adapter(Checkpoint.open(folder, base.dtype), base.shape)


def ask(name: str, job: Job, new_tokens: int) -> Generate:
    """A greedy request of exactly `new_tokens` tokens."""
    stack: tuple[AdapterRef, ...] = ()
    if job.task is not None:
        folder = str(job.task.folder)
        stack = (AdapterRef(digest=folder, files={"folder": folder}),)
    return Generate(
        id=name,
        prompt=job.prompt,
        stack=stack,
        sampling=Sampling(max_tokens=new_tokens, temperature=0.0, ignore_eos=True),
        deadline=time.time() + _DEADLINE_SECONDS,
    )


def step(engine: Engine) -> StepOutput:
    """One step that must not fail anybody; a moment's wait where only loads are under way."""
    output = engine.step()
    if output.failed:
        raise RuntimeError(f"the engine refused a request: {output.failed[0].message}")
    if engine.must_wait:
        time.sleep(0.001)
    return output


def drive(
    engine: Engine, jobs: Sequence[Job], new_tokens: int, watch: Callable[[StepOutput], None] = lambda _: None
) -> Run:
    """All jobs at once, from the first one's arrival to the last one's end; ids are their indices. `watch` sees every
    step's output."""
    answers: list[list[int]] = [[] for _ in jobs]
    cached_virtual = cached_text = 0
    started = time.perf_counter()
    for index, job in enumerate(jobs):
        engine.add(ask(str(index), job, new_tokens))
    while engine.has_work:
        output = step(engine)
        watch(output)
        for tokens in output.tokens:
            answers[int(tokens.id)] += tokens.token_ids
            if tokens.finish_reason is not None:
                cached_virtual += min(tokens.cached_tokens, tokens.virtual_tokens)
                cached_text += max(tokens.cached_tokens - tokens.virtual_tokens, 0)
    return Run(answers, time.perf_counter() - started, cached_virtual, cached_text)


def make_resident(engine: Engine, tasks: Sequence[Task]) -> None:
    """Load the tasks' adapters and compute their prefixes, unless that is done already."""
    drive(engine, [Job([0], task) for task in tasks], 1)
