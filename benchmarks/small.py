"""`python -m benchmarks.small`: how much of a small base's step is neither matrix product nor attention?

Decode steps of 64 rows on a base so small that everything else shows. The step and its parts are timed with a clock
around each call: the engine's own parts, attention, and each matrix product that torch makes. What runs as a program is
divided by the cycles that its threads have counted for each of its operations. So what is called ‘products’ here is a
little more than them: a program's product of a gated MLP makes the activation too, and each operation has the time in
which its threads wait for each other. A part of what is outside of products is thus counted among them.

Beside attention: a plain sum of as many numbers as it reads of keys and values, which lie side by side. Beside all of
it: a step of one row, and the same step's matrix products alone in the fastest way that torch has. In the step they may
be faster, for a program asks for the next product's weights while it multiplies.
"""

from __future__ import annotations

import functools
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from statistics import mean, median
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import typer
from torch import Tensor

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
from server.model import FrozenBase, PagedAttention, products
from server.model.program_kernels import Kind
from server.model.programs import Program

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

OUTSIDE = Target(0.25, at_most=True)
ONE_ROW = Target(0.85)
_SUMS = 5  # of which the median counts
_PARTS: dict[str, tuple[type, str]] = {  # what is timed, by what it is called here
    "scheduling": (Scheduler, "schedule"),
    "packing": (BatchBuilder, "build"),
    "forward": (Runner, "run"),
    "attention": (PagedAttention, "attend"),
    "sampling": (Sampler, "choose"),
}
_OPERATIONS = {"products": (Kind.PRODUCT, Kind.GATED), "attention": (Kind.WRITE, Kind.ATTEND)}  # of programs
_AND_MORE = "gated activations and waits included"
_PRODUCTS = ("pack", "activated", "multiplied")  # of `server.model.products`: what makes a module's product


@dataclass(frozen=True)
class Parts:
    """Seconds of one step: all of it, of what is in it by name, and of a plain sum of as many numbers as it reads keys
    and values."""

    whole: float
    parts: dict[str, float]
    plain_sum: float = 0.0


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


def timed(
    engine: Engine, rows: int, workload: Workload, numbers: Tensor, prompts: random.Random, spent: dict[str, float]
) -> Parts:
    """`workload.new_tokens` decode steps by the clock: means of the whole and of its parts. `numbers` are as many as
    all streams have keys and values at their longest."""
    with decoding(engine, rows, workload, prompts):
        spent.clear()
        seconds, shares, sums = [], [], []
        for _ in range(workload.new_tokens):
            started = time.perf_counter()
            step(engine)
            seconds.append(time.perf_counter() - started)
            positions = sum(sequence.num_tokens for sequence in engine.scheduler.running)
            shares.append(positions / (workload.requests * engine.base.max_model_len))
        parts = {part: each / len(seconds) for part, each in spent.items()}
        read = numbers[: int(mean(shares) * len(numbers))]
        for _ in range(_SUMS):
            started = time.perf_counter()
            read.sum()
            sums.append(time.perf_counter() - started)
        return Parts(mean(seconds), parts, median(sums))


@contextmanager
def clocks() -> Iterator[dict[str, float]]:
    """Seconds spent in each of `_PARTS`, in programs, and in the products of bases that are made inside the block."""
    spent: dict[str, float] = defaultdict(float)
    places: list[tuple[Any, str, str, bool]] = [(owner, name, part, False) for part, (owner, name) in _PARTS.items()]
    places += [(products, name, "products", True) for name in _PRODUCTS]
    with ExitStack() as stack:
        for owner, name, part, makes in places:
            clocked = (_making if makes else _clocked)(getattr(owner, name), spent, part)
            stack.enter_context(mock.patch.object(owner, name, clocked))
        stack.enter_context(mock.patch.object(Program, "run", _divided(Program.run, spent)))
        yield spent


def _making(original: Callable[..., Any], spent: dict[str, float], part: str) -> Callable[..., Any]:
    """What makes a product makes a clocked one."""

    def make(*arguments: Any) -> Callable[..., Any] | None:
        made = original(*arguments)
        return None if made is None else _clocked(made, spent, part)

    return make


def _clocked(original: Callable[..., Any], spent: dict[str, float], part: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return original(*arguments, **named)
        finally:
            spent[part] += time.perf_counter() - started

    return call


def _divided(run: Callable[..., None], spent: dict[str, float]) -> Callable[..., None]:
    """A program's run whose seconds go to its operations."""

    def divided(program: Program, start: int = 0, stop: int | None = None) -> None:
        records = program.records[start:stop]
        before = records["cycles"].copy()
        started = time.perf_counter()
        run(program, start, stop)
        seconds = time.perf_counter() - started
        cycles = records["cycles"] - before
        for part, kinds in _OPERATIONS.items():
            spent[part] += seconds * float(cycles[np.isin(records["kind"], kinds)].sum() / cycles.sum())
        spent["programs"] += seconds

    return divided


def compare(base: FrozenBase, workload: Workload, rounds: int, spent: dict[str, float]) -> Report:
    """All cases of one base, made inside `clocks`, which gave `spent`."""
    facts = machine()
    rows = workload.requests
    limit = Limit(workload.size, [Step(tokens=1, logits=1)])
    pages = rows * pages_for(base.max_model_len, engine_limits(0).page_size)
    position = sum(2 * layer.kv_heads * layer.head_dim for layer in base.layers)
    numbers = torch.ones(rows * base.max_model_len * position)
    with open_engine(base, engine_limits(pages)) as engine:
        cases = [
            Case("steps", lambda prompts: timed(engine, rows, workload, numbers, prompts, spent)),
            Case("steps of 1 row", lambda prompts: timed(engine, 1, workload, numbers, prompts, spent)),
            Case("products of 1 row", lambda _: Parts(limit.measure().linear, {})),
        ]
        measured = alternate(cases, rounds)
    return _report(base, workload, measured, facts, rounds)


def _report(
    base: FrozenBase, workload: Workload, measured: dict[str, list[Parts]], facts: dict[str, Any], rounds: int
) -> Report:
    steps = measured["steps"]
    whole = [each.whole for each in steps]
    multiplied = [each.parts["products"] for each in steps]
    attention = [each.parts["attention"] for each in steps]
    sums = [each.plain_sum for each in steps]
    outside = [all_ - product - attend for all_, product, attend in zip(whole, multiplied, attention, strict=True)]
    forward = [each.parts["forward"] for each in steps]
    between = [run - product - attend for run, product, attend in zip(forward, multiplied, attention, strict=True)]
    parts = {
        f"matrix products, {_AND_MORE}": multiplied,
        "attention, waits included": attention,
        "the rest of the forward pass": between,
        **{part: [each.parts[part] for each in steps] for part in ("scheduling", "packing", "sampling")},
        "the whole step": whole,
    }
    table = Table(
        f"A decode step of {workload.requests} rows",
        ("part", "ms", "share"),
        [
            *[(part, f"{1e3 * median(values):.3f}", f"{ratio(values, whole):.3f}") for part, values in parts.items()],
            ("a plain sum of as many keys and values", f"{1e3 * median(sums):.3f}", "–"),
        ],
    )
    one = [each.whole for each in measured["steps of 1 row"]]
    names = {"programs": "programs", "products": f"products, {_AND_MORE}", "attention": "attention, waits included"}
    inside = {
        f"of it {name}": [each.parts.get(part, 0.0) for each in measured["steps of 1 row"]]
        for part, name in names.items()
    }
    alone = [each.whole for each in measured["products of 1 row"]]
    one_table = Table(
        "A decode step of 1 row",
        ("part", "ms"),
        [
            ("the whole step", f"{1e3 * median(one):.3f}"),
            *[(part, f"{1e3 * median(values):.3f}") for part, values in inside.items()],
            ("its products alone, by torch", f"{1e3 * median(alone):.3f}"),
        ],
    )
    figures = [
        Figure(
            f"outside products and attention, {workload.requests} rows", ratio(outside, whole), "of a step", OUTSIDE
        ),
        Figure("a plain sum of as many keys and values ÷ attention", ratio(sums, attention)),
        Figure("1 row: products alone ÷ step", ratio(alone, one), target=ONE_ROW),
    ]
    title = (
        f"Llama of {base.parameters / 1e6:.1f} M parameters ({workload.size}), float32: contexts from "
        f"{workload.prompt_tokens} on, median of {rounds} rounds"
    )
    return Report("small", title, figures, facts, [table, one_table], rounds=rounds)


@app.command()
def main(
    size: Size = SIZES["small"],
    rows: Annotated[int, typer.Option(min=2, help="rows of a step")] = 64,
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
    prepare(threads, is_saved=save)
    chunks = -(-rows * prompt // engine_limits(0).max_prefill_tokens)
    workload = Workload(size, rows, prompt, steps, 0, tasks=0)
    with clocks() as spent:
        base = FrozenBase(random_base(size, prompt + steps + chunks + 8))
        report = compare(base, workload, rounds, spent)
    report.finish(save)


if __name__ == "__main__":
    app()
