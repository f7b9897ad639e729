"""`python -m benchmarks.methods`: what does each method cost over the base alone, and all of them while unused?

For each row of the table of methods, alternated on one engine: the base only; requests of 16 tasks of the method; of
as many distinct tasks as there are requests, all in one step once their prompts are in. Each adapter is resident and
each prefix computed before the clock starts. Beside the rates: what a task keeps in the bank and in pages of the KV
cache, its parameters, and what it keeps in the bank ÷ its own tensors: the values in its files, indices too, in the
base's type.

Then the base only, alternated on two engines: one that has never had an adapter, and one where 16 of every method's
are resident and no request asks for them.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

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
from benchmarks.inprocess import Size, default, drive, engine_limits, make_resident, open_engine, prepare, read_folder
from benchmarks.recipes import RECIPES, Recipe, write_tasks
from benchmarks.workload import Run, Task, Workload
from server.adapters import METHODS, Adapter
from server.engine.engine import Engine
from server.engine.pages import pages_for
from server.errors import AdapterError
from server.model import FrozenBase

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

BASE = "base only"
FEW = 16
UNUSED = Target(0.98)
RESIDENT = Target(1.1, at_most=True)  # bytes in the bank ÷ those of the adapter's own tensors
_EMPTY, _FULL = f"{BASE}, nothing resident", f"{BASE}, all resident"
_SPARE = 2**24  # bytes of a bank beside a row's own: what its adapters share, and where a width's rows must begin
_PAGE: int = default("page_size")


@dataclass(frozen=True)
class Measured:
    """One round of one case."""

    run: Run
    adapters: int  # distinct ones, in the step that had most


@dataclass(frozen=True)
class Made:
    """A row's tasks, and one of their adapters."""

    recipe: Recipe
    tasks: list[Task]
    adapter: Adapter


def make(base: FrozenBase, recipe: Recipe, workload: Workload, folder: Path) -> Made | str:
    """The tasks of a row, or why there are none."""
    try:
        tasks = write_tasks(recipe, workload, folder)
        return Made(recipe, tasks, read_folder(tasks[0].folder, base))
    except (AdapterError, ValueError, NotImplementedError) as error:
        return f"{recipe.title} is skipped: {error}"


def measure(engine: Engine, workload: Workload, tasks: Sequence[Task], prompts: random.Random) -> Measured:
    """Fresh prompts, the tasks taken in turn."""
    make_resident(engine, tasks)  # a prefix's pages may have been given up; the bank holds the rest
    adapters: list[int] = []
    jobs = workload.jobs(list(tasks), prompts)
    run = drive(engine, jobs, workload.new_tokens, lambda output: adapters.append(output.stats.adapters))
    assert not run.cached_text, "the prompts are fresh"
    return Measured(run, max(adapters))


def engine_for(base: FrozenBase, workload: Workload, made: Sequence[Made], stack: ExitStack) -> Engine:
    """One whose bank and cache hold all these tasks beside the requests, so that nothing has to go."""
    count = sum(len(each.tasks) for each in made)
    pages = workload.requests * pages_for(workload.length, _PAGE)
    pages += sum(len(each.tasks) * pages_for(each.adapter.virtual_tokens, _PAGE) for each in made)
    limits = engine_limits(
        pages,
        max_seqs=max(default("max_seqs"), workload.requests),
        max_queue=max(default("max_queue"), workload.requests, count),
        adapter_bytes=sum(len(each.tasks) * each.adapter.bytes + _SPARE for each in made),
    )
    return stack.enter_context(open_engine(base, limits))


def row(base: FrozenBase, workload: Workload, made: Made, rounds: int) -> Sequence[str]:
    """Measure a row, and put it into words."""
    with ExitStack() as stack:
        engine = engine_for(base, workload, [made], stack)
        make_resident(engine, made.tasks)
        assert len(engine.bank) == len(made.tasks), "the bank has room for all"
        shared = engine.bank.used - len(engine.bank) * made.adapter.bytes
        chosen = {BASE: [], f"{FEW} tasks": made.tasks[:FEW], "distinct tasks": made.tasks}
        cases = [Case(name, _measuring(engine, workload, tasks)) for name, tasks in chosen.items()]
        measured = alternate(cases, rounds)
    rates = {name: [each.run.tokens_per_second for each in measures] for name, measures in measured.items()}
    few, all_distinct = (ratio(rates[name], rates[BASE]) for name in list(chosen)[1:])
    return (
        made.recipe.title,
        f"{median(rates[BASE]):.1f}",
        f"{few:.3f}",
        f"{all_distinct:.3f}",
        f"{median(each.adapters for each in measured['distinct tasks']):.0f}",
        f"{made.adapter.parameters:,}",
        f"{made.adapter.bytes:,}" + (f" + {shared:,} once" if shared else ""),
        _to_tensors(base, made.adapter, shared),
        f"{_page_bytes(base, made.adapter):,}",
    )


def _measuring(engine: Engine, workload: Workload, tasks: Sequence[Task]) -> Callable[[random.Random], Measured]:
    return lambda prompts: measure(engine, workload, tasks, prompts)


def _to_tensors(base: FrozenBase, adapter: Adapter, shared: int) -> str:
    """Bytes in the bank ÷ those of its own tensors, and the verdict; a text has no tensors. `shared` bytes of its files
    are in the bank once for all adapters."""
    own = adapter.parameters * base.dtype.itemsize - shared
    if not own:
        return "–"
    figure = Figure("÷ tensors", adapter.bytes / own, target=RESIDENT)
    return f"{figure.value:.2f} {figure.verdict}"


def _page_bytes(base: FrozenBase, adapter: Adapter) -> int:
    """Of the KV cache's pages that a task's prefix has."""
    position = sum(2 * layer.kv_heads * layer.head_dim for layer in base.shape.layers) * base.dtype.itemsize
    return pages_for(adapter.virtual_tokens, _PAGE) * _PAGE * position


def unused(base: FrozenBase, workload: Workload, made: Sequence[Made], rounds: int) -> Figure:
    """The base alone beside every method's adapters, ÷ the base alone."""
    with ExitStack() as stack:
        engines = {name: engine_for(base, workload, made, stack) for name in (_EMPTY, _FULL)}  # alike but for those
        make_resident(engines[_FULL], [task for each in made for task in each.tasks])
        cases = [Case(name, _measuring(engine, workload, []), "all") for name, engine in engines.items()]
        measured = alternate(cases, rounds)
        resident = len(engines[_FULL].bank)
        assert resident == sum(len(each.tasks) for each in made), "the bank has room for all"
    empty, full = ([each.run.tokens_per_second for each in measured[name]] for name in (_EMPTY, _FULL))
    name = f"{BASE}, {resident} adapters of {len(made)} kinds resident and unused ÷ none resident"
    return Figure(name, ratio(full, empty), target=UNUSED)


def compare(workload: Workload, rounds: int) -> Report:
    """Every row, then all of them at once and unused."""
    facts = machine()
    base = FrozenBase(random_base(workload.size, workload.length))
    known = {recipe.method for recipe in RECIPES}
    notes = [f"{method.NAME} is skipped: no recipe makes one" for method in METHODS if method.NAME not in known]
    rows, few = [], []
    with tempfile.TemporaryDirectory(prefix="medley-benchmark-") as parent:
        for number, recipe in enumerate(RECIPES):
            with tempfile.TemporaryDirectory(dir=parent) as folder:
                made = make(base, recipe, workload, Path(folder))
                if isinstance(made, str):
                    notes.append(made)
                    continue
                rows.append(row(base, workload, made, rounds))
            again = make(base, recipe, replace(workload, tasks=FEW), Path(parent) / str(number))
            assert isinstance(again, Made)
            few.append(again)
        figure = unused(base, workload, few, rounds)
    title = (
        f"Llama of {base.parameters / 1e6:.1f} M parameters ({workload.size}), float32: {workload.requests} requests "
        f"of {workload.prompt_tokens} prompt and {workload.new_tokens} new tokens, median of {rounds} rounds"
    )
    columns = ("method", f"{BASE}, tokens/s", f"{FEW} tasks ÷", f"{workload.tasks} tasks ÷", "in a step", "parameters")
    table = Table(
        "Methods",
        (*columns, "bytes in the bank", f"÷ tensors ({RESIDENT})", "in pages"),
        rows,
        caption=f"÷ {BASE}; ‘in a step’ are distinct adapters, in the step that had most; bytes are of one task",
    )
    return Report("methods", title, [figure], facts, [table], notes, rounds=rounds)


@app.command()
def main(
    size: Size = SIZES["small"],
    requests: Annotated[int, typer.Option(min=1, help="requests of a round, all at once; distinct tasks too")] = 64,
    prompt: Annotated[int, typer.Option(min=1, help="prompt tokens of a request")] = 32,
    new: Annotated[int, typer.Option(min=1, help="new tokens of a request: enough that all run at once")] = 64,
    virtual: Annotated[int, typer.Option(min=1, help="virtual tokens of a prompt or a prefix")] = 20,
    rounds: Rounds = 5,
    threads: Threads = None,
    quick: Quick = False,
    save: Save = False,
) -> None:
    """Every method beside the base alone."""
    if quick:
        size, requests, prompt, new, virtual, rounds = SIZES["tiny"], 4, 4, 4, 5, 1
    prepare(threads, is_saved=save)
    compare(Workload(size, requests, prompt, new, virtual, tasks=requests), rounds).finish(save)


if __name__ == "__main__":
    app()
