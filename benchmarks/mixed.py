"""`python -m benchmarks.mixed`: what does mixing tasks cost over the base alone, and what does it gain over PEFT?

Rows: tasks of each method; of several methods at once; as many distinct LoRAs as there are requests; one LoRA for all.
Prompts and prefixes are compared with the base after texts that are cached, as many and as long, for their positions
are there too; mixtures with a base of which as many rows have such a text; everything else with the base only. A row
and what it is compared with run one right after the other, in turn the one and the other first: machines drift within a
minute.

Virtual tokens are one more than whole pages, so that every request also copies the partly filled page behind the shared
ones: a whole page, however little is in it. Text is served from the cache by whole pages only; a text of as many tokens
would have the base compute the one that is left for every request, and one of a page more would have it attend over
more than the tasks do. So the cached text is the whole pages: one token less to attend over, and no copy.

Every request has a fresh prompt. Adapters, prefixes and the cached texts are there before the clock starts, so the
cached tokens that are printed are virtual ones and these texts, and nothing else. No figure is printed where more or
less text came from the cache.

With `--peft` each round also runs the same prompts by Hugging Face PEFT, each method in the best way that PEFT has for
it, and no figure is printed before both systems have been found to give the right tokens.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle, islice
from pathlib import Path
from statistics import median
from typing import Annotated, TypeVar

import typer

from benchmarks.adapters import IA3, LORA, PREFIX, PROMPT, write_adapters, write_variants
from benchmarks.agreement import check
from benchmarks.bases import SIZES
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
from benchmarks.inprocess import Size, default, drive, make_resident, prepare
from benchmarks.medley import Medley
from benchmarks.peft_peer import PeftPeer
from benchmarks.workload import Job, Run, Task, Workload, check_cached
from server.engine.protocol import StepOutput

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

BASE = "base only"
OVER_PEFT = Target(3.0)  # where PEFT runs one batch per task
_PER_TASK = "one batch per task"
_PAGE: int = default("page_size")
T = TypeVar("T")


@dataclass(frozen=True)
class Mix:
    """A row to be measured."""

    title: str
    tasks: Sequence[Task] = ()  # taken in turn; none: the base only
    beginnings: Sequence[Sequence[int]] = ((),)  # cached text before the prompts, taken in turn
    beside: Mix | None = None  # what it is compared with
    least: float | None = None  # ÷ that
    peft_way: str | None = None  # how PEFT runs it; None: it is not asked to

    def known_text(self, requests: int) -> int:
        """Tokens of the beginnings of so many requests."""
        return sum(map(len, islice(cycle(self.beginnings), requests)))


@dataclass(frozen=True)
class Measured:
    """One round of a row."""

    medley: Run
    adapters: int  # distinct ones, in the step that had most
    beside: Run | None
    peft: Run | None


def mixes(workload: Workload, tasks: dict[str, list[Task]], loras: list[Task]) -> Iterator[Mix]:
    """Every row; `loras` are as many as requests."""
    count, mixable = workload.tasks, [PROMPT, PREFIX, IA3]
    texts = cached_texts(workload)
    base = Mix(BASE, peft_way="one static batch")
    after = Mix(f"base after {count} cached texts of {len(texts[0])} tokens", beginnings=texts, beside=base)

    def partly(methods: Sequence[str]) -> Mix:
        """The base, with texts in place of the virtual tokens that a mixture of these methods has."""
        in_turn = _in_turn([[each] * count for each in methods], count)
        beginnings = [text if method in (PROMPT, PREFIX) else [] for text, method in zip(texts, in_turn, strict=True)]
        return Mix(f"base, {sum(map(bool, beginnings))} of {count} rows after such text", beginnings=beginnings)

    yield base
    yield after
    for method in (PROMPT, PREFIX):
        yield Mix(f"{count} × {method}", tasks[method], beside=after, least=0.97, peft_way=_PER_TASK)
    yield Mix(f"{count} × {IA3}", tasks[IA3], beside=base, least=0.97, peft_way=_PER_TASK)
    three = _in_turn([tasks[method] for method in mixable], count)
    yield Mix(f"{count} of these three", three, beside=partly(mixable), least=0.97)
    yield Mix(f"{count} × {LORA}", tasks[LORA], beside=base, least=0.90, peft_way="one batch, adapter_names")
    every = _in_turn(list(tasks.values()), count)
    way = "LoRAs in one, rest per task"
    yield Mix(f"{count} of all methods", every, beside=partly(list(tasks)), least=0.95, peft_way=way)
    yield Mix(f"{len(loras)} distinct LoRAs", loras, beside=base, least=0.85)
    yield Mix("one LoRA for all", tasks[LORA][:1], beside=base, least=0.93)


def cached_texts(workload: Workload) -> list[list[int]]:
    """A text for each task, of as many whole pages as a soft prompt fills, so that all of it is cached: never more than
    its tokens."""
    numbers, length = random.Random(3), workload.virtual_tokens // _PAGE * _PAGE
    return [[numbers.randrange(workload.size.vocabulary) for _ in range(length)] for _ in range(workload.tasks)]


def _in_turn(methods: list[list[T]], count: int) -> list[T]:
    """`count` things, one of each method in turn."""
    return [methods[index % len(methods)][index // len(methods)] for index in range(count)]


def measure(
    workload: Workload,
    medley: Medley,
    peer: PeftPeer | None,
    mix: Mix,
    is_first: Iterator[bool],
    numbers: random.Random,
) -> Measured:
    """One round of a row, before or after what it is compared with, on Medley, and then of the row on PEFT with its
    prompts."""
    runs: dict[str, tuple[Run, int]] = {}
    both = [mix] if mix.beside is None else [mix, mix.beside]
    jobs = {each.title: _jobs(workload, medley, each, numbers) for each in both}
    for each in both if next(is_first) else reversed(both):
        outputs: list[StepOutput] = []
        run = medley.run(jobs[each.title], outputs.append)
        runs[each.title] = run, max(output.stats.adapters for output in outputs)
    peft = peer.run(jobs[mix.title]) if peer is not None and mix.peft_way is not None else None
    return Measured(*runs[mix.title], None if mix.beside is None else runs[mix.beside.title][0], peft)


def _jobs(workload: Workload, medley: Medley, mix: Mix, numbers: random.Random) -> list[Job]:
    """A row's requests; what they find there already is computed here."""
    make_resident(medley.engine, list(mix.tasks))
    texts = [Job([*text, 0], None) for text in mix.beginnings if text]
    if texts:
        drive(medley.engine, texts, 1)
    fresh = workload.jobs(list(mix.tasks), numbers)
    return [Job([*text, *job.prompt], job.task) for text, job in zip(cycle(mix.beginnings), fresh, strict=False)]


def compare(workload: Workload, rounds: int, *, with_peft: bool) -> Report:
    """Build, check, measure."""
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="medley-benchmark-") as folder:
        tasks = write_adapters(workload, Path(folder))
        loras = write_variants(tasks[LORA][0], Path(folder), range(workload.requests))
        peer = PeftPeer(workload, tasks) if with_peft else None
        num_prefixes = sum(map(len, tasks.values())) + workload.tasks  # of tasks and of cached texts
        with Medley(workload, num_prefixes) as medley:
            notes = [f"check: {check(workload, medley, peer, tasks)}"] if peer is not None else []
            rows = list(mixes(workload, tasks, loras))
            cases = [
                Case(mix.title, partial(measure, workload, medley, peer, mix, cycle((True, False)))) for mix in rows
            ]
            pairs = alternate(cases, rounds)
            check_text(rows, pairs, workload.requests)
            title = (
                f"Llama of {medley.parameters / 1e6:.1f} M parameters ({workload.size}), float32: {workload.requests} "
                f"requests of {workload.prompt_tokens} prompt and {workload.new_tokens} new tokens, median of {rounds} "
                "rounds"
            )
    figures = list(chain(_over_base(rows, pairs), _over_peft(rows, pairs)))
    return Report("mixed", title, figures, facts, [_table(rows, pairs, workload)], notes, rounds=rounds)


def check_text(rows: Sequence[Mix], pairs: dict[str, list[Measured]], requests: int) -> None:
    """Raises `CachedTextError` where the text from the cache is not exactly the beginnings, of a row or of what it is
    compared with."""
    cached: dict[str, list[int]] = {}
    known: dict[str, int] = {}
    for mix in rows:
        cached[mix.title] = [pair.medley.cached_text for pair in pairs[mix.title]]
        known[mix.title] = mix.known_text(requests)
        if mix.beside is not None:
            beside = f"{mix.beside.title}, beside {mix.title}"
            cached[beside] = [pair.beside.cached_text for pair in pairs[mix.title] if pair.beside is not None]
            known[beside] = mix.beside.known_text(requests)
    check_cached(cached, known)


def _rates(pairs: Sequence[Measured]) -> list[float]:
    return [pair.medley.tokens_per_second for pair in pairs]


def _peft_rates(pairs: Sequence[Measured]) -> list[float]:
    """None of them where PEFT was not asked."""
    return [pair.peft.tokens_per_second for pair in pairs if pair.peft is not None]


def _rates_beside(pairs: Sequence[Measured]) -> list[float]:
    """None of them where nothing is beside."""
    return [pair.beside.tokens_per_second for pair in pairs if pair.beside is not None]


def _over_base(rows: Sequence[Mix], pairs: dict[str, list[Measured]]) -> Iterator[Figure]:
    for mix in rows:
        if mix.beside is not None:
            measured = pairs[mix.title]
            value = ratio(_rates(measured), _rates_beside(measured))
            target = None if mix.least is None else Target(mix.least)
            yield Figure(f"{mix.title} ÷ {mix.beside.title}", value, target=target)


def _over_peft(rows: Sequence[Mix], pairs: dict[str, list[Measured]]) -> Iterator[Figure]:
    for mix in rows:
        peft = _peft_rates(pairs[mix.title])
        if peft:
            target = OVER_PEFT if mix.peft_way == _PER_TASK else None
            yield Figure(f"{mix.title}: Medley ÷ PEFT", ratio(_rates(pairs[mix.title]), peft), target=target)


def _cached(runs: Sequence[Run]) -> str:
    """Positions not computed: virtual tokens / text, of all rounds."""
    return " / ".join(
        " – ".join(map(str, sorted(set(counts))))
        for counts in ([run.cached_virtual for run in runs], [run.cached_text for run in runs])
    )


def _table(rows: Sequence[Mix], pairs: dict[str, list[Measured]], workload: Workload) -> Table:
    with_peft = bool(_peft_rates(pairs[BASE]))
    lines = []
    for mix in rows:
        measured = pairs[mix.title]
        runs = [pair.medley for pair in measured]
        beside = _rates_beside(measured)
        runs_beside = [pair.beside for pair in measured if pair.beside is not None]
        line = [
            mix.title,
            f"{median(_rates(measured)):.1f}",
            _cached(runs),
            f"{median(pair.adapters for pair in measured):.0f}",
            f"{median(beside):.1f}" if beside else "–",
            _cached(runs_beside) if beside else "–",
        ]
        if with_peft:
            peft = _peft_rates(measured)
            line += [f"{median(peft):.1f}" if peft else "–", mix.peft_way or "–"]
        lines.append(line)
    columns = ["tasks", "Medley tokens/s", "cached", "distinct in a step", "beside", "cached"]
    if with_peft:
        columns += ["PEFT tokens/s", "PEFT runs it as"]
    caption = (
        "tokens/s are output tokens, ‘beside’ of what the row is compared with; ‘cached’ are positions not computed, "
        f"in each round: virtual tokens / text; a prompt or prefix has {workload.virtual_tokens}, in pages of {_PAGE}"
    )
    return Table("Mixed tasks", columns, lines, caption)


@app.command()
def main(
    size: Size = SIZES["large"],
    requests: Annotated[int, typer.Option(min=1, help="requests of a round, all at once")] = 64,
    prompt: Annotated[int, typer.Option(min=1, help="prompt tokens of a request")] = 64,
    new: Annotated[int, typer.Option(min=1, help="new tokens of a request")] = 64,
    tasks: Annotated[int, typer.Option(min=1, help="tasks of each method")] = 16,
    virtual: Annotated[int, typer.Option(min=_PAGE, help="virtual tokens of a prompt or a prefix")] = 2 * _PAGE + 1,
    peft: Annotated[
        bool, typer.Option("--peft", help="beside Hugging Face PEFT, which takes most of the time")
    ] = False,
    rounds: Rounds = 5,
    threads: Threads = None,
    quick: Quick = False,
    save: Save = False,
) -> None:
    """Mixed tasks beside the base alone and, if asked, beside Hugging Face PEFT."""
    if quick:
        size, requests, prompt, new, tasks, rounds = SIZES["tiny"], 8, 8, 4, 4, 1
    prepare(threads, is_saved=save)
    compare(Workload(size, requests, prompt, new, virtual, tasks), rounds, with_peft=peft).finish(save)


if __name__ == "__main__":
    app()
