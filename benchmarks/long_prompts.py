"""`python -m benchmarks.long_prompts`: what does a long prompt do to the streams that run?

Alternated: 32 streams decode and a prompt of 1,900 tokens arrives; the same prompt alone, under the same limits; and
steps in which rows decode after short and long contexts, for the cost of attention. Times are of the engine's steps,
in process, with the server's default limits. The prompt and the streams' own are fresh: no figure is printed where text
of theirs came from the cache.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Annotated, Any

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
from benchmarks.inprocess import Size, ask, engine_limits, open_engine, prepare, step
from benchmarks.workload import Job, Workload, check_fresh
from server.engine.engine import Engine
from server.engine.pages import pages_for
from server.engine.process import PREFILL_TOKENS
from server.engine.protocol import StepOutput
from server.model import FrozenBase

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

GAP = Target(2.0, at_most=True)  # a stream's longest gap ÷ the median step of a full chunk, in the worst round
CHUNK = Target(5.0, at_most=True)  # that step ÷ a step in which only the streams decode
FIRST_TOKEN = Target(1.5, at_most=True)  # the prompt's first token ÷ the same alone
ATTENTION = Target(1.0, at_most=True)  # short rows and a long one in one step ÷ each in its own
_AFTER = 8  # tokens of the long prompt's answer
_ROOM = 64  # positions beside those that a run surely takes
_LONG = "long"


@dataclass(frozen=True)
class Arrival:
    """What one long prompt did. Times in seconds."""

    decode: float  # median step before it came
    gap: float  # the longest time between two tokens of a stream, from its arrival on; 0 without streams
    first_token: float  # from its arrival
    chunk: float  # median step that ran as much of it as any
    chunk_tokens: int  # how much that is
    cached_text: int  # prompt tokens from the cache, its own and the streams'


def arrival(engine: Engine, workload: Workload, long_tokens: int, prompts: random.Random) -> Arrival:
    """Let `workload.requests` streams (or none) decode, then add the prompt; forget all of them at the end."""
    streams = [str(index) for index in range(workload.requests)]
    steps_to_come = engine.base.max_model_len - workload.prompt_tokens
    for name in streams:
        engine.add(ask(name, Job(workload.prompt(prompts), None), steps_to_come))
    _until_all_run(engine, len(streams))
    decode = [_timed(engine)[0] for _ in range(workload.new_tokens)] if streams else [0.0]
    long_prompt = replace(workload, prompt_tokens=long_tokens).prompt(prompts)
    last = dict.fromkeys(streams, time.perf_counter())
    arrived = time.perf_counter()
    engine.add(ask(_LONG, Job(long_prompt, None), _AFTER))
    first_token = gap = 0.0
    chunks: list[tuple[int, float]] = []
    cached: dict[str, int] = {}  # prompt tokens, by the request's name
    ended = False
    while not ended:
        seconds, output = _timed(engine)
        now = time.perf_counter()
        chunks.append((output.stats.prefill_tokens, seconds))
        for tokens in output.tokens:
            cached[tokens.id] = tokens.cached_tokens
            if tokens.id == _LONG:
                first_token = first_token or now - arrived
                ended = tokens.finish_reason is not None
            else:
                gap = max(gap, now - last[tokens.id])
                last[tokens.id] = now
    for name in streams:
        engine.abort(name)
    most = max(tokens for tokens, _ in chunks)
    full = median(seconds for tokens, seconds in chunks if tokens == most)
    return Arrival(median(decode), gap, first_token, full, most, sum(cached.values()))


def decode_step(engine: Engine, contexts: Sequence[int], steps: int, _: random.Random) -> float:
    """Median seconds of a step in which rows of these context lengths decode. The contexts are the same each time, so
    that from the second on they come from the cache: they are not what is timed."""
    prompts = random.Random(0)
    names = [str(index) for index in range(len(contexts))]
    for name, length in zip(names, contexts, strict=True):
        prompt = [prompts.randrange(engine.base.vocab_size) for _ in range(length)]
        engine.add(ask(name, Job(prompt, None), engine.base.max_model_len - length))
    _until_all_run(engine, len(names))
    seconds = median(_timed(engine)[0] for _ in range(steps))
    for name in names:
        engine.abort(name)
    return seconds


def _until_all_run(engine: Engine, count: int) -> None:
    """Step until `count` rows decode."""
    while count and step(engine).stats.decode_tokens < count:
        pass


def _timed(engine: Engine) -> tuple[float, StepOutput]:
    started = time.perf_counter()
    output = step(engine)
    return time.perf_counter() - started, output


def compare(base: FrozenBase, workload: Workload, long_tokens: int, rounds: int) -> Report:
    """All cases of one base."""
    facts = machine()
    rows, short = workload.requests, workload.prompt_tokens
    alone = replace(workload, requests=0)
    page_size = engine_limits(0).page_size
    pages = (rows + 1) * pages_for(base.max_model_len, page_size)
    with open_engine(base, engine_limits(pages)) as engine:
        arrivals = alternate(
            [
                Case("mixed", lambda prompts: arrival(engine, workload, long_tokens, prompts)),
                Case("alone", lambda prompts: arrival(engine, alone, long_tokens, prompts)),
            ],
            rounds,
        )
        check_fresh({name: [each.cached_text for each in measured] for name, measured in arrivals.items()})
        contexts = {
            f"{rows} rows of {short}": [short] * rows,
            f"{rows - 1} rows of {short}": [short] * (rows - 1),
            f"{rows - 1} rows of {short}, 1 of {long_tokens}": [short] * (rows - 1) + [long_tokens],
            f"1 row of {long_tokens}": [long_tokens],
        }
        steps = alternate(
            [Case(name, partial(decode_step, engine, given, workload.new_tokens)) for name, given in contexts.items()],
            rounds,
        )
    return _report(base, workload, arrivals, steps, facts, rounds)


def figures(arrivals: dict[str, list[Arrival]], steps: dict[str, list[float]]) -> list[Figure]:
    """All of them. No stream may wait too long, so the gap's target is the worst round's. `steps` are by contexts, in
    `compare`'s order."""
    mixed, alone = arrivals["mixed"], arrivals["alone"]
    short, fewer, together, long = steps.values()
    gaps = [each.gap / each.chunk for each in mixed]
    return [
        Figure("longest gap of a stream ÷ step of a full chunk, worst round", max(gaps), target=GAP),
        Figure("longest gap of a stream ÷ step of a full chunk, median round", median(gaps)),
        Figure("step of a full chunk ÷ decode step", median(each.chunk / each.decode for each in mixed), target=CHUNK),
        Figure(
            "first token beside the streams ÷ alone",
            ratio([each.first_token for each in mixed], [each.first_token for each in alone]),
            target=FIRST_TOKEN,
        ),
        Figure(
            "step of short rows and a long one ÷ the sum of each apart",
            median(one / (a + b) for one, a, b in zip(together, fewer, long, strict=True)),
            target=ATTENTION,
        ),
        Figure("step with one long row ÷ step of short rows alone", ratio(together, short)),
    ]


def _report(
    base: FrozenBase,
    workload: Workload,
    arrivals: dict[str, list[Arrival]],
    steps: dict[str, list[float]],
    facts: dict[str, Any],
    rounds: int,
) -> Report:
    rows = [
        (
            name,
            *(
                f"{1e3 * median(values):.1f}"
                for values in (
                    [each.decode for each in measured],
                    [each.chunk for each in measured],
                    [each.gap for each in measured],
                    [each.first_token for each in measured],
                )
            ),
            f"{max(each.chunk_tokens for each in measured)}",
            f"{max(each.cached_text for each in measured)}",
        )
        for name, measured in arrivals.items()
    ]
    columns = ("the prompt", "decode step", "full chunk's step", "longest gap", "first token", "chunk", "cached text")
    arrival_table = Table(
        "A long prompt arrives", columns, rows, caption="times in ms, medians of the rounds; chunk in tokens"
    )
    step_table = Table(
        "Decode steps", ("rows by context", "ms"), [(name, f"{1e3 * median(each):.1f}") for name, each in steps.items()]
    )
    title = (
        f"Llama of {base.parameters / 1e6:.1f} M parameters ({workload.size}), float32: {workload.requests} streams, "
        f"medians of {rounds} rounds or the worst of them; the gap is the longest of all streams"
    )
    tables = [arrival_table, step_table]
    return Report("long_prompts", title, figures(arrivals, steps), facts, tables, rounds=rounds)


@app.command()
def main(
    size: Size = SIZES["large"],
    streams: Annotated[int, typer.Option(min=2, help="requests that decode")] = 32,
    prompt: Annotated[int, typer.Option(min=1, help="prompt tokens of each of them")] = 64,
    long: Annotated[int, typer.Option(min=2, help="tokens of the long prompt")] = 1900,
    steps: Annotated[int, typer.Option(min=1, help="decode steps that are timed, each round")] = 16,
    rounds: Rounds = 5,
    threads: Threads = None,
    quick: Quick = False,
    save: Save = False,
) -> None:
    """A long prompt beside running streams."""
    if quick:
        size, streams, prompt, long, steps, rounds = SIZES["tiny"], 4, 8, 400, 3, 1
    prepare(threads, is_saved=save)
    chunks = -(-long // PREFILL_TOKENS["cpu"])
    longest = max(long, prompt) + steps + chunks + _ROOM
    base = FrozenBase(random_base(size, longest))
    compare(base, Workload(size, streams, prompt, steps, 0, tasks=0), long, rounds).finish(save)


if __name__ == "__main__":
    app()
