"""`python -m benchmarks.huge_pages`: what is it worth that a base's weights lie on huge pages, and what does it cost?

Fresh processes take turns, for what memory a process is given is part of what is asked: in one half of them all that
has been written before the first request is moved to huge pages, as the engine does while nobody asks for anything; in
the other it stays as it came. Each then decodes one row, and many. Memory is looked at, and moved, in pieces, which are
timed one by one: a request that comes meanwhile waits for the one under way.
"""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from benchmarks.bases import SIZES, random_base
from benchmarks.frame import Case, Figure, Quick, Report, Rounds, Save, Table, Threads, alternate, machine, ratio
from benchmarks.inprocess import Size, engine_limits, open_engine, prepare, step
from benchmarks.small import decoding
from benchmarks.workload import Workload
from server.engine.engine import Engine
from server.engine.pages import pages_for
from server.model import FrozenBase
from server.model.heap import moves_to_huge_pages

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_STAYING, _MOVED = "as it came", "moved"


@dataclass(frozen=True)
class Measured:
    """One process."""

    moves: list[float]  # seconds of each
    one: float  # seconds of a step of one row
    many: float  # of one of many


def measure(workload: Workload, threads: int | None, *, is_moved: bool) -> Measured:
    """In a process that has done nothing else."""
    prepare(threads)
    chunks = -(-workload.requests * workload.prompt_tokens // engine_limits(0).max_prefill_tokens)
    base = FrozenBase(random_base(workload.size, workload.length + chunks + 8))  # streams go on while others begin
    pages = workload.requests * pages_for(base.max_model_len, engine_limits(0).page_size)
    with open_engine(base, engine_limits(pages), is_moved=False) as engine:
        moves = _timed_moves() if is_moved else []
        return Measured(moves, _step(engine, 1, workload), _step(engine, workload.requests, workload))


def _timed_moves() -> list[float]:
    seconds = []
    started = time.perf_counter()
    for _ in moves_to_huge_pages():
        now = time.perf_counter()
        seconds.append(now - started)
        started = now
    return seconds


def _step(engine: Engine, rows: int, workload: Workload) -> float:
    """The median of `workload.new_tokens` decode steps, in seconds."""
    seconds = []
    with decoding(engine, rows, workload, random.Random(rows)):
        for _ in range(workload.new_tokens):
            started = time.perf_counter()
            step(engine)
            seconds.append(time.perf_counter() - started)
    return median(seconds)


def _apart(workload: Workload, threads: int | None, is_moved: bool, _: random.Random) -> Measured:
    """`measure` in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(partial(measure, is_moved=is_moved), workload, threads).result()


def report(workload: Workload, threads: int | None, rounds: int) -> Report:
    """Both kinds of processes, alternately."""
    facts = machine()
    names = {_STAYING: False, _MOVED: True}
    measured = alternate(
        [Case(name, partial(_apart, workload, threads, is_moved)) for name, is_moved in names.items()], rounds
    )
    parts: dict[str, Callable[[Measured], float]] = {
        "1 row": lambda each: each.one,
        f"{workload.requests} rows": lambda each: each.many,
    }
    seconds = {
        name: {part: [of(each) for each in measures] for part, of in parts.items()}
        for name, measures in measured.items()
    }
    rows = [
        (
            name,
            *(f"{1e3 * median(own[part]):.2f} ({1e3 * min(own[part]):.2f}–{1e3 * max(own[part]):.2f})" for part in own),
        )
        for name, own in seconds.items()
    ]
    moves = [each.moves for each in measured[_MOVED]]
    figures = [
        Figure(
            f"{part}: rate with its memory moved ÷ as it came", ratio(seconds[_STAYING][part], seconds[_MOVED][part])
        )
        for part in parts
    ]
    if all(moves):
        figures += [
            Figure("all moves", median(sum(each) for each in moves), "s"),
            Figure("the longest that a request waits for", 1e3 * max(max(each) for each in moves), "ms"),
        ]
    is_asked = _SETTING.exists() and "[madvise]" in _SETTING.read_text()
    notes = [] if is_asked else ["this system has no huge pages, or gives them unasked: both kinds are alike"]
    title = f"Llama of {workload.size}, float32: median of {rounds} processes of each kind"
    table = Table("A decode step", ("memory", *(f"{part}, ms" for part in parts)), rows, "medians, and the range")
    return Report("huge_pages", title, figures, facts, [table], notes, rounds=rounds)


@app.command()
def main(
    size: Size = SIZES["large"],
    rows: Annotated[int, typer.Option(min=2, help="rows of a step of many")] = 64,
    prompt: Annotated[int, typer.Option(min=1, help="prompt tokens of a row")] = 48,
    steps: Annotated[int, typer.Option(min=1, help="decode steps that are timed, of each kind")] = 32,
    rounds: Rounds = 5,
    threads: Threads = None,
    quick: Quick = False,
    save: Save = False,
) -> None:
    """What huge pages are worth, and what moving to them costs."""
    if quick:
        size, rows, prompt, steps, rounds = SIZES["tiny"], 4, 4, 2, 1
    prepare(threads, is_saved=save)
    report(Workload(size, rows, prompt, steps, 0, tasks=0), threads, rounds).finish(save)


if __name__ == "__main__":
    app()
