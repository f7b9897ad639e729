"""`python -m benchmarks.small`: how much of a small base's step is neither matrix product nor attention?

Decode steps of 64 rows on a base so small that everything else shows. The step, its attention and the engine's own
parts are timed with a clock around each call, a few dozen calls a step. The matrix products are inside calls that
others share, so they are taken from torch's profiler, in steps of their own: an operator's own time is hardly changed
by being recorded, while that of the Python between operators is, so the profiled steps' duration is not used.

Beside it: a step of one row, and the same step's matrix products alone in the fastest way that torch has.
"""

from __future__ import annotations

import functools
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import mean, median
from typing import Annotated, Any

import typer
from torch.autograd.profiler import profile

from benchmarks.bases import SIZES, random_base
from benchmarks.frame import (
    Case,
    Figure,
    Quick,
    Report,
    Rounds,
    Save,
    Table,
    Target,
    Threads,
    alternate,
    machine,
    ratio,
)
from benchmarks.inprocess import Size, ask, engine_limits, open_engine, prepare, step
from benchmarks.limit import Limit, Step
from benchmarks.workload import Job, Workload
from server.engine.batch import BatchBuilder
from server.engine.engine import Engine
from server.engine.pages import pages_for
from server.engine.runner import Runner
from server.engine.sampler import Sampler
from server.engine.scheduler import Scheduler
from server.model import FrozenBase, PagedAttention

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

OUTSIDE = Target(0.25, at_most=True)
ONE_ROW = Target(0.85)
_PARTS: dict[str, tuple[type, str]] = {  # what is timed, by what it is called here
    "scheduling": (Scheduler, "schedule"),
    "packing": (BatchBuilder, "build"),
    "forward": (Runner, "run"),
    "attention": (PagedAttention, "attend"),
    "sampling": (Sampler, "choose"),
}
_PRODUCTS = ("addmm", "::mm", "linear")  # in the names of torch's operators; attention's products are batched: `bmm`


@dataclass(frozen=True)
class Parts:
    """Seconds of one step: all of it, and of what is in it by name."""

    whole: float
    parts: dict[str, float]


@contextmanager
def decoding(engine: Engine, rows: int, workload: Workload, prompts: random.Random) -> Iterator[None]:
    """Inside the block the engine's steps decode `rows` fresh streams."""
    names = [str(index) for index in range(rows)]
    for name in names:
        engine.add(ask(name, Job(workload.prompt(prompts), None), engine.base.max_model_len - workload.prompt_tokens))
    while step(engine).stats.decode_tokens < rows:
        pass
    yield
    for name in names:
        engine.abort(name)


def timed(engine: Engine, rows: int, workload: Workload, prompts: random.Random) -> Parts:
    """`workload.new_tokens` decode steps by the clock: means of the whole and of its parts."""
    with decoding(engine, rows, workload, prompts), _clocks() as spent:
        seconds = []
        for _ in range(workload.new_tokens):
            started = time.perf_counter()
            step(engine)
            seconds.append(time.perf_counter() - started)
    return Parts(mean(seconds), {part: each / len(seconds) for part, each in spent.items()})


def profiled(engine: Engine, rows: int, workload: Workload, prompts: random.Random) -> Parts:
    """The matrix products of decode steps, by torch's profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of its own start otherwise
    with decoding(engine, rows, workload, prompts):
        step(engine)
        with profile(use_kineto=False) as record:
            for _ in range(workload.new_tokens):
                step(engine)
    micros = sum(
        event.self_cpu_time_total for event in record.key_averages() if any(name in event.key for name in _PRODUCTS)
    )
    return Parts(0.0, {"products": micros / 1e6 / workload.new_tokens})


@contextmanager
def _clocks() -> Iterator[dict[str, float]]:
    """Seconds spent in each of `_PARTS` inside the block."""
    spent: dict[str, float] = defaultdict(float)
    originals = {part: getattr(owner, name) for part, (owner, name) in _PARTS.items()}
    try:
        for part, (owner, name) in _PARTS.items():
            setattr(owner, name, _clocked(originals[part], spent, part))
        yield spent
    finally:
        for part, (owner, name) in _PARTS.items():
            setattr(owner, name, originals[part])


def _clocked(original: Callable[..., Any], spent: dict[str, float], part: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*arguments, **named)
        finally:
            spent[part] += time.perf_counter() - started

    return call


def compare(base: FrozenBase, workload: Workload, rounds: int) -> Report:
    """All cases of one base."""
    facts = machine()
    rows = workload.requests
    limit = Limit(workload.size, [Step(tokens=1, logits=1)])
    pages = rows * pages_for(base.max_model_len, engine_limits(0).page_size)
    with open_engine(base, engine_limits(pages)) as engine:
        cases = [
            Case("steps", lambda prompts: timed(engine, rows, workload, prompts)),
            Case("products", lambda prompts: profiled(engine, rows, workload, prompts)),
            Case("steps of 1 row", lambda prompts: timed(engine, 1, workload, prompts)),
            Case("products of 1 row", lambda _: Parts(limit.measure().linear, {})),
        ]
        measured = alternate(cases, rounds)
    return _report(base, workload, measured, facts, rounds)


def _report(
    base: FrozenBase, workload: Workload, measured: dict[str, list[Parts]], facts: dict[str, Any], rounds: int
) -> Report:
    steps = measured["steps"]
    whole = [each.whole for each in steps]
    products = [each.parts["products"] for each in measured["products"]]
    attention = [each.parts["attention"] for each in steps]
    outside = [all_ - product - attend for all_, product, attend in zip(whole, products, attention, strict=True)]
    forward = [each.parts["forward"] for each in steps]
    between = [run - product - attend for run, product, attend in zip(forward, products, attention, strict=True)]
    parts = {
        "matrix products": products,
        "attention": attention,
        "the rest of the forward pass": between,
        **{part: [each.parts[part] for each in steps] for part in ("scheduling", "packing", "sampling")},
        "the whole step": whole,
    }
    table = Table(
        f"A decode step of {workload.requests} rows",
        ("part", "ms", "share"),
        [(part, f"{1e3 * median(values):.3f}", f"{ratio(values, whole):.3f}") for part, values in parts.items()],
    )
    one = [each.whole for each in measured["steps of 1 row"]]
    alone = [each.whole for each in measured["products of 1 row"]]
    one_table = Table(
        "A decode step of 1 row",
        ("part", "ms"),
        [("the whole step", f"{1e3 * median(one):.3f}"), ("its products alone", f"{1e3 * median(alone):.3f}")],
    )
    figures = [
        Figure(
            f"outside products and attention, {workload.requests} rows", ratio(outside, whole), "of a step", OUTSIDE
        ),
        Figure("1 row: products alone ÷ step", ratio(alone, one), target=ONE_ROW),
    ]
    title = (
        f"Llama of {base.parameters / 1e6:.1f} M parameters ({workload.size}), float32: contexts from "
        f"{workload.prompt_tokens} on, median of {rounds} rounds"
    )
    return Report("small", title, figures, facts, [table, one_table])


@app.command()
def main(
    size: Size = SIZES["small"],
    rows: Annotated[int, typer.Option(min=1, help="rows of a step")] = 64,
    prompt: Annotated[int, typer.Option(min=1, help="prompt tokens of a row")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="decode steps of each measurement")] = 32,
    rounds: Rounds = 5,
    threads: Threads = None,
    quick: Quick = False,
    save: Save = False,
) -> None:
    """Where a small base's step goes."""
    if quick:
        size, rows, prompt, steps, rounds = SIZES["tiny"], 8, 8, 4, 1
    prepare(threads)
    chunks = -(-rows * prompt // engine_limits(0).max_prefill_tokens)
    workload = Workload(size, rows, prompt, steps, 0, tasks=0)
    base = FrozenBase(random_base(size, prompt + steps + chunks + 8))
    compare(base, workload, rounds).finish(save)


if __name__ == "__main__":
    app()
