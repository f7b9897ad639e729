"""The frame of every benchmark: the machine's and the code's facts, alternation, medians, targets, one report.

A benchmark makes `Case`s, measures them with `alternate`, turns the rounds into `Figure`s (some with a `Target`)
and hands them, with tables of its own if it likes, to a `Report`, which prints them and, asked to, saves them.

Machines drift, so nothing is compared across runs: `alternate` goes through all cases round by round, and `ratio`
compares two of them within each round before it takes the median. What is saved waits for others to leave the processor
first (`await_idle`), and a report of few rounds or of a busy machine says so.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Generic, TypeVar

import psutil
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table as RichTable

RESULTS = Path(__file__).with_name("results")
_ROOT = RESULTS.parents[1]
LEAST_ROUNDS = 5  # for a median that counts
IDLE = 0.10  # of all cores' time, which others may have
_PATIENCE_SECONDS = 60.0
_LOOK_SECONDS = 0.5


def _not_both(context: typer.Context, value: bool) -> bool:
    """A smoke test is no result."""
    if value and (context.params.get("quick") or context.params.get("save")):
        raise typer.BadParameter("--quick is a smoke test, whose figures are not saved: give one of --quick and --save")
    return value


# Options that benchmarks share; `rounds` are those that count.
Rounds = Annotated[int, typer.Option(min=1, help="measured rounds, of which the median counts")]
Threads = Annotated[int | None, typer.Option(min=1, help="torch threads; absent: torch's own choice")]
Quick = Annotated[
    bool, typer.Option("--quick", callback=_not_both, help="seconds, on a tiny base: for smoke tests, not figures")
]
Save = Annotated[
    bool, typer.Option("--save", callback=_not_both, help="write the report to benchmarks/results/ as JSON")
]

T = TypeVar("T")


@dataclass(frozen=True)
class Case(Generic[T]):
    """Something to measure, once per round."""

    name: str  # unique among the cases of a run
    measure: Callable[[random.Random], T]  # its prompts come from the numbers that it is given
    prompts: str | None = None  # cases that name the same have the same numbers in a round; absent: the case's own


def alternate(cases: Sequence[Case[T]], rounds: int) -> dict[str, list[T]]:
    """What each case measured in each of `rounds` rounds, by the case's name.

    Every round runs every case, each round beginning with another one, so that no case is always after the same rest.
    One more round comes first, to warm up, and is dropped. The random numbers are fresh in each round and the same in
    each run of the benchmark.
    """
    measured: dict[str, list[T]] = {case.name: [] for case in cases}
    assert len(measured) == len(cases), "names of cases are unique"
    out = console()
    with Progress(console=out, transient=True, disable=not out.is_terminal) as progress:
        bar = progress.add_task("rounds, the first to warm up", total=(rounds + 1) * len(cases))
        for number in range(rounds + 1):
            first = number % len(cases)
            for case in [*cases[first:], *cases[:first]]:
                result = case.measure(random.Random(f"{case.prompts or case.name} {number}"))
                if number > 0:
                    measured[case.name].append(result)
                progress.advance(bar)
    return measured


def ratio(values: Sequence[float], others: Sequence[float]) -> float:
    """The median over the rounds of value ÷ other, both of the same round."""
    return median(value / other for value, other in zip(values, others, strict=True))


@dataclass(frozen=True)
class Target:
    """What a figure has to reach."""

    bound: float
    at_most: bool = False  # else at least

    def reached_by(self, value: float) -> bool:
        """Whether the value keeps to the bound, unrounded."""
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        return f"{'≤' if self.at_most else '≥'} {self.bound:g}"


@dataclass(frozen=True)
class Figure:
    """One value that the benchmark is about."""

    name: str
    value: float
    unit: str = "×"  # × is a ratio
    target: Target | None = None

    @property
    def text(self) -> str:
        """The value in its unit."""
        return f"{self.value:.3f} ×" if self.unit == "×" else f"{self.value:.4g} {self.unit}"

    @property
    def verdict(self) -> str:
        """Whether the target is reached; `–` where there is none."""
        if self.target is None:
            return "–"
        return "reached" if self.target.reached_by(self.value) else "not reached"


@dataclass(frozen=True)
class Table:
    """Details beside the figures. The first column is text, the others are aligned as numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str | None = None


def _command() -> str:
    """This process's, as somebody would type it."""
    main = getattr(sys.modules["__main__"], "__spec__", None)
    program = f"python -m {main.name.removesuffix('.__main__')}" if main else Path(sys.argv[0]).name
    return " ".join([program, shlex.join(sys.argv[1:])]).strip()


@dataclass(frozen=True)
class Report:
    """All that one run of a benchmark has to say."""

    name: str  # the module's, and the saved file's
    title: str
    figures: Sequence[Figure]
    machine: dict[str, Any]  # `machine()`, called before the run
    tables: Sequence[Table] = ()
    notes: Sequence[str] = ()  # what was skipped, and why; what was checked first
    command: str = field(default_factory=_command)
    rounds: int | None = None  # whose medians the figures are; None: nothing is measured in rounds

    @property
    def warnings(self) -> list[str]:
        """Why the figures are worth less than they look."""
        found = []
        if self.rounds is not None and self.rounds < LEAST_ROUNDS:
            found.append(f"rounds kept: {self.rounds}; a median that counts needs {LEAST_ROUNDS}")
        if self.machine["busy"] > IDLE:
            found.append(f"others had {self.machine['busy']:.0%} of the processor before the start")
        return found

    def finish(self, save: bool) -> None:
        """Print everything, and save it if `save`."""
        self.print(console())
        if save:
            self.write(RESULTS)

    def print(self, out: Console) -> None:
        """Command, machine, tables, notes, figures, warnings."""
        out.print(f"command: {self.command}", highlight=False)
        out.print(f"machine: {_in_words(self.machine)}", highlight=False)
        for table in self.tables:
            out.print(_rich(table))
        for note in self.notes:
            out.print(f"note: {note}", highlight=False)
        if self.figures:
            out.print(_rich(Table(self.title, ("figure", "value", "target", "verdict"), list(self._lines()))))
        for warning in self.warnings:
            out.print(f"warning: {warning}", style="bold red", highlight=False)

    def write(self, folder: Path) -> Path:
        """`NAME.json` in `folder`, which is made if need be; an older one is replaced."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        content = {**asdict(self), "warnings": self.warnings}
        for saved, figure in zip(content["figures"], self.figures, strict=True):
            saved["verdict"] = figure.verdict
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    def _lines(self) -> Iterator[tuple[str, str, str, str]]:
        for figure in self.figures:
            target = "–" if figure.target is None else str(figure.target)
            yield figure.name, figure.text, target, figure.verdict


def machine() -> dict[str, Any]:
    """What the benchmark runs on, and of which code. Call it before the run: load and `busy` are those of others."""
    code = commit(_ROOT)
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),  # of the last minute: in a set, the benchmark's before
        "busy": _busy(),  # of all cores' time, just now
        "python": platform.python_version(),
        **{name: version(name) for name in ("medley", "torch", "transformers", "peft")},
        **({} if code is None else {"commit": code}),
    }


def commit(root: Path) -> str | None:
    """The one that is checked out in `root`, as `git describe --always --dirty` names it; None: it is no git checkout.

    What benchmarks save is not counted as a change, or one that is saved would make the next one's code look changed.
    """

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        # without locks: somebody may be committing
        command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    try:
        described = git("describe", "--always")
    except OSError:  # there is no git
        return None
    if described.returncode:
        return None
    is_changed = git("diff", "--quiet", "HEAD", "--", ".", ":(exclude)benchmarks/results").returncode
    return described.stdout.strip() + ("-dirty" if is_changed else "")


def await_idle() -> None:
    """Wait until others have little of the processor, at most a minute, and say so. `machine` tells whether they have.

    The load average will not do: after a benchmark it takes minutes to fall.
    """
    busy = _busy()
    if busy > IDLE:
        said = f"waiting, {_PATIENCE_SECONDS:.0f} s at most: others have {busy:.0%} of the processor"
        console().print(said, highlight=False)
    give_up = time.monotonic() + _PATIENCE_SECONDS
    while busy > IDLE and time.monotonic() < give_up:
        busy = _busy()


def _busy() -> float:
    """Share of all cores' time in which they did something, over a moment in which this process does nothing."""
    return round(psutil.cpu_percent(interval=_LOOK_SECONDS) / 100, 2)


def console() -> Console:
    """A terminal's own width; wide enough for the tables where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=150)


def _in_words(facts: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _processor() -> str:
    """Its own name where the system tells it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _rich(table: Table) -> RichTable:
    drawn = RichTable(title=table.title, caption=table.caption)
    for index, column in enumerate(table.columns):
        drawn.add_column(column, justify="right" if index else "left")
    for row in table.rows:
        drawn.add_row(*row)
    return drawn
