"""`python -m benchmarks.mixed`: what does mixing tasks cost, and what does it gain over PEFT?

Prints, measured alternately in one run: base only, each method's tasks mixed, all methods at once; for Medley and
for Hugging Face PEFT. Every round has fresh prompts, the first round warms up and is not counted, and no figure is
printed before both systems have been found to give the right tokens.
"""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.progress import Progress
from transformers.utils import logging

from benchmarks.adapters import LORA, write_adapters
from benchmarks.agreement import check
from benchmarks.bases import SIZES, BaseSize
from benchmarks.medley import Medley
from benchmarks.peft_peer import PeftPeer
from benchmarks.report import Row, console, print_machine, print_table
from benchmarks.workload import Task, Workload

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class _Mix:
    """A row to be measured."""

    title: str
    tasks: list[Task]
    peft_way: str
    has_target: bool


def _mixes(tasks: dict[str, list[Task]]) -> Iterator[_Mix]:
    """Base only, each method, and all at once with as many tasks as each method has alone."""
    yield _Mix("base only", [], "one static batch", False)
    for method, own in tasks.items():
        per_task = method != LORA
        way = "one batch per task" if per_task else "one batch, adapter_names"
        yield _Mix(f"{len(own)} × {method}", own, way, per_task)
    count = len(next(iter(tasks.values())))
    methods = list(tasks.values())
    every = [methods[index % len(methods)][index // len(methods)] for index in range(count)]
    yield _Mix(f"{count} of all methods", every, "LoRAs in one, rest per task", False)


def measure(workload: Workload, medley: Medley, peer: PeftPeer, mixes: list[_Mix], rounds: int) -> list[Row]:
    """Alternate: each round runs every row on Medley and then on PEFT, with the same prompts."""
    rows = [Row(mix.title, mix.peft_way, mix.has_target, [], []) for mix in mixes]
    random_tokens = random.Random(0)
    out = console()
    with Progress(console=out, transient=True, disable=not out.is_terminal) as progress:
        bar = progress.add_task("rounds, the first to warm up", total=(rounds + 1) * len(rows))
        for number in range(rounds + 1):
            for mix, row in zip(mixes, rows, strict=True):
                jobs = workload.jobs(mix.tasks, random_tokens)
                medley_run, peft_run = medley.run(jobs), peer.run(jobs)
                if number > 0:
                    row.medley.append(medley_run)
                    row.peft.append(peft_run)
                progress.advance(bar)
    return rows


def compare(workload: Workload, rounds: int) -> None:
    """Build, check, measure and print for one base."""
    out = console()
    with tempfile.TemporaryDirectory(prefix="medley-benchmark-") as folder:
        tasks = write_adapters(workload, Path(folder))
        peer = PeftPeer(workload, tasks)
        with Medley(workload, num_prefixes=sum(map(len, tasks.values()))) as medley:
            out.print(f"check: {check(workload, medley, peer, tasks)}", highlight=False)
            rows = measure(workload, medley, peer, list(_mixes(tasks)), rounds)
            print_table(out, workload, medley.parameters, rounds, rows)


@app.command()
def main(
    size: Annotated[
        list[str] | None, typer.Option(help=f"base: {', '.join(SIZES)} or WIDTHxLAYERSxHEADSxVOCABULARY; repeatable")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="requests of a round, all at once")] = 64,
    prompt: Annotated[int, typer.Option(min=1, help="prompt tokens of a request")] = 64,
    new: Annotated[int, typer.Option(min=1, help="new tokens of a request")] = 64,
    tasks: Annotated[int, typer.Option(min=1, help="tasks of each method")] = 16,
    virtual: Annotated[int, typer.Option(min=1, help="virtual tokens of a prompt or a prefix")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="measured rounds, of which the median is printed")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="torch threads; absent: torch's own choice")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="seconds, on a tiny base: for smoke tests, not figures")
    ] = False,
) -> None:
    """Mixed tasks beside the base alone and beside Hugging Face PEFT."""
    if quick:
        size, requests, prompt, new, tasks, virtual, rounds = ["tiny"], 8, 8, 4, 4, 5, 1
    try:
        sizes = [BaseSize.parse(text) for text in size or ["small"]]
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--size") from error
    if threads is not None:
        torch.set_num_threads(threads)
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module="peft|transformers")  # the peers' own, about their own calls
    print_machine(console())
    for each in sizes:
        compare(Workload(each, requests, prompt, new, virtual, tasks), rounds)


if __name__ == "__main__":
    app()
