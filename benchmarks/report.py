"""The machine's facts and the table of one run."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import version
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.workload import Run, Workload

TARGET = 3.0  # Medley mixed ÷ PEFT's one batch per task, at least


@dataclass(frozen=True)
class Row:
    """One line of the table: the measured rounds of both systems."""

    title: str
    peft_way: str  # how PEFT runs this
    has_target: bool
    medley: list[Run]
    peft: list[Run]

    @property
    def medley_rate(self) -> float:
        """Output tokens/s, median over the rounds."""
        return median(run.tokens_per_second for run in self.medley)

    @property
    def peft_rate(self) -> float:
        """Output tokens/s, median over the rounds."""
        return median(run.tokens_per_second for run in self.peft)

    @property
    def advantage(self) -> float:
        """Medley ÷ PEFT."""
        return self.medley_rate / self.peft_rate

    @property
    def verdict(self) -> str:
        """Whether the target is reached; `–` where there is none."""
        if not self.has_target:
            return "–"
        return "reached" if self.advantage >= TARGET else "not reached"


def console() -> Console:
    """A terminal's own width; wide enough for the table where there is none."""
    return Console() if sys.stdout.isatty() else Console(width=150)


def print_machine(out: Console) -> None:
    """What was run on what."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    out.print(f"command: python -m benchmarks.mixed {shlex.join(sys.argv[1:])}", highlight=False)
    out.print(
        f"machine: {os.cpu_count()} cores ({platform.machine()}), {torch.get_num_threads()} torch threads, "
        f"load before the run {load}; Python {platform.python_version()}, {versions}",
        highlight=False,
    )


def print_table(out: Console, workload: Workload, parameters: int, rounds: int, rows: list[Row]) -> None:
    """All rows, side by side."""
    table = Table(
        title=(
            f"Llama of {parameters / 1e6:.1f} M parameters ({workload.size}), float32: {workload.requests} requests of "
            f"{workload.prompt_tokens} prompt and {workload.new_tokens} new tokens, median of {rounds} rounds"
        ),
        caption="tokens/s are output tokens; ‘cached’ are positions not computed, per round: virtual tokens / text",
    )
    for heading in ("tasks", "Medley tokens/s", "÷ base only", "cached", "PEFT tokens/s", "PEFT runs it as"):
        table.add_column(heading, justify="left" if heading in ("tasks", "PEFT runs it as") else "right")
    table.add_column("Medley ÷ PEFT", justify="right")
    table.add_column(f"≥ {TARGET:g} ×")
    base_rate = rows[0].medley_rate
    for row in rows:
        cached = row.medley[-1]
        table.add_row(
            row.title,
            f"{row.medley_rate:.1f}",
            f"{row.medley_rate / base_rate:.3f}",
            f"{cached.cached_virtual} / {cached.cached_text}",
            f"{row.peft_rate:.1f}",
            row.peft_way,
            f"{row.advantage:.2f}",
            row.verdict,
        )
    out.print(table)
