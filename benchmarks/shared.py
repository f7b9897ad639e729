"""`python -m benchmarks.shared`: what is computed once and held once for many requests?

First the KV pages in use while 64 requests of one task with a soft prompt of 100 tokens run, beside what they must be:
the prefix once, and each request's own. Then, alternated, 64 requests of the base alone: whose texts share nothing;
whose texts begin alike, with what nobody has seen; with what was served before (a template, few-shot examples); and
second turns of a chat each, which begin with their first turn and its answer.
"""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.adapters import PROMPT, write_adapters
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
from benchmarks.inprocess import Size, drive, engine_limits, open_engine, prepare
from benchmarks.workload import Job, Run, Task, Workload
from server.engine.engine import Engine
from server.engine.pages import pages_for
from server.model import FrozenBase

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

ONCE = Target(1.0, at_most=True)
_FRESH = "all fresh"


@dataclass(frozen=True)
class Pages:
    """KV pages that requests of one task had in use, at most."""

    measured: int
    once: int  # if the prefix is there once
    apart: int  # if each request had its own


@dataclass(frozen=True)
class Served:
    """One case's run."""

    run: Run
    prompt_tokens: int

    @property
    def hit_rate(self) -> float:
        """Prompt tokens that were not computed ÷ all of them."""
        return self.run.cached_text / self.prompt_tokens


def soft_prompt_pages(base: FrozenBase, workload: Workload, task: Task) -> Pages:
    """Run all requests of one task at once, from the same first step to the same last."""
    size = engine_limits(0).page_size
    rows, virtual = workload.requests, workload.virtual_tokens
    each = pages_for(workload.length - 1, size)  # the last token's keys and values are never needed
    prefix = pages_for(virtual, size)
    apart = rows * each
    tokens = virtual + rows * workload.prompt_tokens
    limits = engine_limits(prefix + apart, max_batch_tokens=rows + tokens, max_prefill_tokens=tokens)
    used: list[int] = []
    with open_engine(base, limits) as engine:
        jobs = workload.jobs([task], random.Random(0))
        drive(engine, jobs, workload.new_tokens, lambda output: used.append(output.stats.kv_pages_used))
    return Pages(max(used), prefix + rows * (each - virtual // size), apart)


class Texts:
    """Requests of the base alone, by what their text shares. `beginning` and `own` are token counts."""

    def __init__(self, engine: Engine, workload: Workload, beginning: int, own: int) -> None:
        self._engine = engine
        self._workload = workload
        self._beginning = beginning
        self._own = own
        self._template = self._tokens(beginning, random.Random(3))

    def fresh(self, numbers: random.Random) -> Served:
        """Nothing is shared."""
        return self._run([self._tokens(self._beginning + self._own, numbers) for _ in self._rows])

    def new_beginning(self, numbers: random.Random) -> Served:
        """One beginning, seen by nobody before these requests, which come at once."""
        return self._run(self._begun(self._tokens(self._beginning, numbers), numbers))

    def template(self, numbers: random.Random) -> Served:
        """One beginning, served before."""
        drive(self._engine, [Job([*self._template, 0], None)], 1)  # it may have been given up since
        return self._run(self._begun(self._template, numbers))

    def chat(self, numbers: random.Random) -> Served:
        """Each goes on from its own first turn, prompt and answer."""
        turns = [self._tokens(self._beginning - self._workload.new_tokens, numbers) for _ in self._rows]
        answers = self._run(turns).run.answers
        spoken = [turn + answer for turn, answer in zip(turns, answers, strict=True)]
        return self._run([history + self._tokens(self._own, numbers) for history in spoken])

    @property
    def _rows(self) -> range:
        return range(self._workload.requests)

    def _begun(self, beginning: list[int], numbers: random.Random) -> list[list[int]]:
        return [beginning + self._tokens(self._own, numbers) for _ in self._rows]

    def _tokens(self, count: int, numbers: random.Random) -> list[int]:
        return replace(self._workload, prompt_tokens=count).prompt(numbers)

    def _run(self, prompts: list[list[int]]) -> Served:
        run = drive(self._engine, [Job(prompt, None) for prompt in prompts], self._workload.new_tokens)
        return Served(run, sum(map(len, prompts)))


def compare(workload: Workload, beginning: int, own: int, rounds: int) -> Report:
    """Both parts, of one base."""
    facts = machine()
    text_length = beginning + own + workload.new_tokens
    base = FrozenBase(random_base(workload.size, max(text_length, workload.length)))
    with tempfile.TemporaryDirectory(prefix="medley-benchmark-") as folder:
        task = write_adapters(workload, Path(folder), [PROMPT])[PROMPT][0]
        pages = soft_prompt_pages(base, workload, task)
    # Twice what runs: a chat's first turns stay until its second ones come.
    limits = engine_limits(2 * workload.requests * pages_for(text_length, engine_limits(0).page_size))
    with open_engine(base, limits) as engine:
        texts = Texts(engine, workload, beginning, own)
        measures = {
            _FRESH: texts.fresh,
            "one beginning, new": texts.new_beginning,
            "one beginning, served before": texts.template,
            "a chat each, second turn": texts.chat,
        }
        served = alternate([Case(name, measure) for name, measure in measures.items()], rounds)
    return _report(base, workload, (beginning, own), pages, served, facts)


def _report(
    base: FrozenBase,
    workload: Workload,
    lengths: tuple[int, int],
    pages: Pages,
    served: dict[str, list[Served]],
    facts: dict[str, Any],
) -> Report:
    rates = {name: [each.run.tokens_per_second for each in runs] for name, runs in served.items()}
    figures = [
        Figure("pages in use ÷ the prefix once and each request's own", pages.measured / pages.once, target=ONCE)
    ]
    for name, runs in served.items():
        hit_rate = median(each.hit_rate for each in runs)
        if name == _FRESH:
            figures.append(Figure(f"hit rate: {name}", hit_rate, "of the prompt", Target(0.0, at_most=True)))
            continue
        figures.append(Figure(f"hit rate: {name}", hit_rate, "of the prompt"))
        figures.append(Figure(f"rate: {name} ÷ {_FRESH}", ratio(rates[name], rates[_FRESH])))
    page_table = Table(
        f"{workload.requests} requests of one task with {workload.virtual_tokens} virtual tokens",
        ("KV pages", "at most in use"),
        [
            ("measured", str(pages.measured)),
            ("the prefix once, each request's own", str(pages.once)),
            ("if each had the prefix", str(pages.apart)),
        ],
    )
    text_table = Table(
        f"{workload.requests} requests with texts of {lengths[0]} + {lengths[1]} tokens",
        ("texts", "tokens/s", "hit rate"),
        [
            (name, f"{median(rates[name]):.1f}", f"{median(each.hit_rate for each in runs):.3f}")
            for name, runs in served.items()
        ],
    )
    title = (
        f"Llama of {base.parameters / 1e6:.1f} M parameters ({workload.size}), float32: {workload.new_tokens} new "
        f"tokens each, median of {len(served[_FRESH])} rounds"
    )
    return Report("shared", title, figures, facts, [page_table, text_table], rounds=len(served[_FRESH]))


@app.command()
def main(
    size: Size = SIZES["small"],
    requests: Annotated[int, typer.Option(min=1, help="requests of a round, all at once")] = 64,
    virtual: Annotated[int, typer.Option(min=1, help="virtual tokens of the soft prompt")] = 100,
    prompt: Annotated[int, typer.Option(min=1, help="prompt tokens of its requests")] = 64,
    beginning: Annotated[int, typer.Option(min=1, help="tokens that texts share")] = 192,
    own: Annotated[int, typer.Option(min=1, help="tokens of each text's own")] = 32,
    new: Annotated[int, typer.Option(min=1, help="new tokens of a request")] = 32,
    rounds: Rounds = 5,
    threads: Threads = None,
    quick: Quick = False,
    save: Save = False,
) -> None:
    """Pages and work that requests share."""
    if quick:
        size, requests, virtual, prompt, beginning, own, new, rounds = SIZES["tiny"], 8, 20, 8, 48, 8, 4, 1
    if beginning <= new:
        raise typer.BadParameter(
            "must be more than --new: a chat's first turn is the rest of it", param_hint="--beginning"
        )
    prepare(threads, is_saved=save)
    compare(Workload(size, requests, prompt, new, virtual, tasks=1), beginning, own, rounds).finish(save)


if __name__ == "__main__":
    app()
