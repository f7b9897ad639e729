"""`python -m benchmarks.many`: do thousands of tasks cost more than sixteen?

For soft prompts, (IA)³ and LoRA each, 64 requests at once, alternated: of 16 tasks; of 64 tasks drawn uniformly among
1,000 that are resident; of tasks drawn by zipf's law among 10,000, of which the bank holds 1,000, so that some are
loaded from their own files while the others run. Beside it: what a lookup and a publication take with 100 and with
10,000 tasks registered. Steps and loads are the engine's, which knows of no task but those that it is asked for.
Prompts are fresh: no figure is printed where text came from the cache.
"""

from __future__ import annotations

import itertools
import random
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from benchmarks.adapters import IA3, LORA, PROMPT, write_adapters, write_variants
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
from benchmarks.inprocess import Size, drive, engine_limits, make_resident, open_engine, prepare, read_folder
from benchmarks.registered import lookups
from benchmarks.workload import Run, Task, Workload, check_fresh
from server.engine.engine import Engine, EngineLimits
from server.engine.pages import pages_for
from server.engine.protocol import StepOutput
from server.model import FrozenBase

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

FEW = 16
ZIPF = 1.1
TARGET = Target(0.93)
_METHODS = (PROMPT, IA3, LORA)

Registered = Annotated[int, typer.Option(min=1, help="tasks that exist")]
Resident = Annotated[int, typer.Option(min=1, help="tasks that the bank holds")]


@dataclass
class Measured:
    """A run, and what its steps told."""

    run: Run
    adapters: int = 0  # distinct ones, in the step that had most
    loads: list[float] = field(default_factory=list)  # seconds each


def measure(engine: Engine, workload: Workload, tasks: Sequence[Task], prompts: random.Random) -> Measured:
    """One request per element of `tasks`, with fresh prompts."""
    outputs: list[StepOutput] = []
    run = drive(engine, workload.jobs(list(tasks), prompts), workload.new_tokens, outputs.append)
    loads = [seconds for output in outputs for seconds in output.stats.load_seconds]
    return Measured(run, max(output.stats.adapters for output in outputs), loads)


def popularity(count: int) -> list[float]:
    """Cumulative weights of zipf's law, the first the most popular."""
    return list(itertools.accumulate((rank + 1) ** -ZIPF for rank in range(count)))


def recently_used(weights: Sequence[float], count: int) -> list[int]:
    """Which of `len(weights)` tasks a cache of `count` holds that drops the least recently used, after a long time of
    such requests."""
    numbers = random.Random(2)
    seen: dict[int, None] = {}
    while len(seen) < min(count, len(weights)):
        seen[numbers.choices(range(len(weights)), cum_weights=weights)[0]] = None
    return list(seen)


@dataclass(frozen=True)
class Draws:
    """Which of the registered tasks a run asks for; no others need files."""

    registered: int
    resident: list[int]
    recent: list[int]  # resident where popularity is zipf's
    rounds: list[list[int]]  # by zipf's law, a request each

    @classmethod
    def of(cls, registered: int, resident: int, requests: int, rounds: int) -> Draws:
        """The same in each run of the benchmark."""
        weights, numbers = popularity(registered), random.Random(3)
        drawn = [numbers.choices(range(registered), cum_weights=weights, k=requests) for _ in range(rounds)]
        return cls(registered, list(range(resident)), recently_used(weights, resident), drawn)

    def write(self, pattern: Task, folder: Path) -> dict[int, Task]:
        """Those that are asked for, like `pattern`, by number."""
        numbers = sorted({*self.resident, *self.recent, *itertools.chain(*self.rounds)})
        return dict(zip(numbers, write_variants(pattern, folder, numbers), strict=True))


def cases(
    base: FrozenBase, workload: Workload, draws: Draws, written: dict[int, Task], stack: ExitStack
) -> list[Case[Measured]]:
    """The three of one method. Two engines, since those that are resident must not be driven out."""
    tasks = [written[number] for number in draws.resident]
    method, resident = tasks[0].method, len(tasks)
    limits = _limits(base, workload, tasks[0], resident)
    steady, churning = (stack.enter_context(open_engine(base, limits)) for _ in range(2))
    make_resident(steady, tasks)
    make_resident(churning, [written[number] for number in draws.recent])
    rounds = iter(draws.rounds)

    def few(prompts: random.Random) -> Measured:
        make_resident(steady, tasks[:FEW])  # its prefix may have been given up; the bank holds it
        return measure(steady, workload, tasks[:FEW], prompts)

    def uniform(prompts: random.Random) -> Measured:
        drawn = prompts.sample(tasks, min(workload.requests, resident))
        make_resident(steady, drawn)
        return measure(steady, workload, drawn, prompts)

    def zipf(prompts: random.Random) -> Measured:
        return measure(churning, workload, [written[number] for number in next(rounds)], prompts)

    measures: dict[str, Callable[[random.Random], Measured]] = {
        f"{FEW} tasks": few,
        f"uniform among {resident}": uniform,
        f"zipf {ZIPF} among {draws.registered}": zipf,
    }
    return [Case(f"{method}: {name}", each) for name, each in measures.items()]


def _limits(base: FrozenBase, workload: Workload, task: Task, resident: int) -> EngineLimits:
    """A bank for exactly `resident` adapters, and pages for all their prefixes beside the requests."""
    adapter = read_folder(task.folder, base)
    page_size = engine_limits(0).page_size
    pages = workload.requests * pages_for(workload.length, page_size)
    pages += resident * pages_for(adapter.virtual_tokens, page_size)
    queue = max(engine_limits(0).max_queue, resident, workload.requests)
    return engine_limits(pages, max_queue=queue, adapter_bytes=resident * adapter.bytes)


def compare(base: FrozenBase, workload: Workload, registered: int, resident: int, rounds: int) -> Report:
    """Every method, one after the other; the rows of one method alternate."""
    facts = machine()
    figures: list[Figure] = []
    rows: list[Sequence[str]] = []
    draws = Draws.of(registered, resident, workload.requests, rounds + 1)  # the first to warm up
    with tempfile.TemporaryDirectory(prefix="medley-benchmark-") as parent:
        patterns = write_adapters(workload, Path(parent), _METHODS)
        for method in _METHODS:
            with tempfile.TemporaryDirectory(dir=parent) as folder, ExitStack() as stack:
                written = draws.write(patterns[method][0], Path(folder))
                measured = alternate(cases(base, workload, draws, written, stack), rounds)
            check_fresh({name: [each.run.cached_text for each in measures] for name, measures in measured.items()})
            rates = {name: [each.run.tokens_per_second for each in measures] for name, measures in measured.items()}
            few = rates[f"{method}: {FEW} tasks"]
            rows += [_row(name, measures, ratio(rates[name], few)) for name, measures in measured.items()]
            figures += [
                Figure(f"{name} ÷ {FEW} tasks", ratio(rate, few), target=TARGET)
                for name, rate in rates.items()
                if rate is not few
            ]
        looked_up = lookups(Path(parent), registered, rounds)
    title = (
        f"Llama of {base.parameters / 1e6:.1f} M parameters ({workload.size}), float32: {workload.requests} requests "
        f"of {workload.prompt_tokens} prompt and {workload.new_tokens} new tokens, median of {rounds} rounds"
    )
    columns = ("tasks", "tokens/s", f"÷ {FEW}", "distinct in a step", "loads", "ms each", "cached virtual / text")
    caption = (
        "medians of the rounds; loads, which wait for each other and for the steps, and cached positions are those of "
        "one round, cached text the most of any"
    )
    table = Table("Many tasks", columns, rows, caption)
    tables = [table, looked_up.table]
    return Report("many", title, [*figures, *looked_up.figures], facts, tables, rounds=rounds)


def _row(name: str, measures: list[Measured], to_few: float) -> Sequence[str]:
    loads = [seconds for each in measures for seconds in each.loads]
    runs = [each.run for each in measures]
    return (
        name,
        f"{median(run.tokens_per_second for run in runs):.1f}",
        f"{to_few:.3f}",
        f"{median(each.adapters for each in measures):.0f}",
        f"{median(len(each.loads) for each in measures):.0f}",
        f"{median(loads) * 1e3:.1f}" if loads else "–",
        f"{median(run.cached_virtual for run in runs):.0f} / {max(run.cached_text for run in runs)}",
    )


@app.command()
def main(
    size: Size = SIZES["small"],
    registered: Registered = 10_000,
    resident: Resident = 1_000,
    requests: Annotated[int, typer.Option(min=1, help="requests of a round, all at once")] = 64,
    prompt: Annotated[int, typer.Option(min=1, help="prompt tokens of a request")] = 64,
    new: Annotated[int, typer.Option(min=1, help="new tokens of a request")] = 64,
    virtual: Annotated[int, typer.Option(min=1, help="virtual tokens of a soft prompt")] = 20,
    rounds: Rounds = 5,
    threads: Threads = None,
    quick: Quick = False,
    save: Save = False,
) -> None:
    """10,000 tasks registered, 1,000 resident, beside 16 tasks."""
    if quick:
        size, registered, resident, requests, prompt, new, virtual, rounds = SIZES["tiny"], 60, 30, 8, 8, 4, 5, 1
    prepare(threads, is_saved=save)
    workload = Workload(size, requests, prompt, new, virtual, tasks=1)
    base = FrozenBase(random_base(size, workload.length))
    compare(base, workload, registered, min(resident, registered), rounds).finish(save)


if __name__ == "__main__":
    app()
