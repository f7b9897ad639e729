"""`python -m benchmarks.fairness`: what is left of a client's share beside one that sends 100 × as much?

Five clients send requests of one size, so a fair share is a fifth of all output tokens. In every wave each of four
sends one request and the hog sends 100; a wave comes whenever one of the four has fewer than two requests waiting, so
that all five are backlogged all the time. One round's waves follow those of the round before; the first ones fill the
engine and are not counted. The least and the most that one of the four gets must be within a fifth of the fair share.
Every prompt is fresh: no figure is printed where a prompt token came from the cache.

It runs in process: over HTTP a client is the request's API key or `user`, which the engine gets as the name that it is
given here, and the hog's thousands of connections would be what is measured.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Annotated

import msgspec
import typer

from benchmarks.bases import SIZES, BaseSize, random_base
from benchmarks.frame import Case, Figure, Quick, Report, Rounds, Save, Table, Target, Threads, alternate, machine
from benchmarks.inprocess import Size, ask, default, engine_limits, open_engine, prepare
from benchmarks.workload import Job, Workload, by_round, check_fresh
from server.engine.engine import Engine
from server.engine.pages import pages_for
from server.model import FrozenBase

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

AT_LEAST, AT_MOST = Target(0.8), Target(1.2, at_most=True)
HOG_FACTOR = 100
_BACKLOG = 2  # requests that each of the others has waiting, at least


@dataclass
class _Client:
    """One client, and what has become of its requests."""

    name: str
    per_wave: int
    waiting: set[str] = field(default_factory=set)  # sent, without a first token
    sent: int = 0
    refused: int = 0
    tokens: int = 0  # of this round
    cached: int = 0  # prompt tokens from the cache, of requests whose first token came in this round


@dataclass(frozen=True)
class _Got:
    """What a client got in one round."""

    rate: float  # output tokens/s
    cached: int  # prompt tokens that were not computed, which must be none


class _Crowd:
    """All clients at one engine."""

    def __init__(self, engine: Engine, workload: Workload) -> None:
        self._engine = engine
        self._workload = workload
        self.hog = _Client("hog", HOG_FACTOR)
        self.others = [_Client(f"client {number}", 1) for number in range(1, 5)]
        self._by_name = {client.name: client for client in [self.hog, *self.others]}

    @property
    def clients(self) -> list[_Client]:
        return list(self._by_name.values())

    def run(self, waves: int, prompts: random.Random) -> dict[str, _Got]:
        """Serve until so many waves have been sent; what each client got. All are backlogged in each step."""
        for client in self.clients:
            client.tokens = client.cached = 0
        started = time.perf_counter()
        while waves:
            if any(len(client.waiting) < _BACKLOG for client in self.others):
                self._send_wave(prompts)
                waves -= 1
                continue
            if not self.hog.waiting:
                raise RuntimeError("the hog is not backlogged: the queue is too short for this benchmark")
            self._step()
        seconds = time.perf_counter() - started
        return {client.name: _Got(client.tokens / seconds, client.cached) for client in self.clients}

    def _send_wave(self, prompts: random.Random) -> None:
        for client in self.clients:
            for _ in range(client.per_wave):
                request = ask(
                    f"{client.name}/{client.sent}",
                    Job(self._workload.prompt(prompts), None),
                    self._workload.new_tokens,
                )
                self._engine.add(msgspec.structs.replace(request, client=client.name))
                client.waiting.add(request.id)
                client.sent += 1

    def _step(self) -> None:
        output = self._engine.step()
        for failed in output.failed:
            client = self._client_of(failed.id)
            if client is not self.hog or failed.code != "queue_full":
                raise RuntimeError(f"the engine refused {failed.id}: {failed.message}")
            client.waiting.discard(failed.id)
            client.refused += 1
        for tokens in output.tokens:
            client = self._client_of(tokens.id)
            if tokens.id in client.waiting:
                client.waiting.remove(tokens.id)
                client.cached += tokens.cached_tokens
            client.tokens += len(tokens.token_ids)

    def _client_of(self, request_id: str) -> _Client:
        return self._by_name[request_id.partition("/")[0]]


def compare(size: BaseSize, workload: Workload, max_seqs: int, waves: int, rounds: int) -> Report:
    """Fill, count, and say what each client got."""
    facts = machine()
    base = FrozenBase(random_base(size, workload.length))
    pages = 2 * max_seqs * pages_for(workload.length, default("page_size"))
    with open_engine(base, engine_limits(pages, max_seqs=max_seqs)) as engine:
        crowd = _Crowd(engine, workload)
        crowd.run(1 + max_seqs // len(crowd.clients), random.Random(0))
        measured = alternate([Case("crowd", lambda prompts: crowd.run(waves, prompts))], rounds)["crowd"]
    cached = {client.name: [each[client.name].cached for each in measured] for client in crowd.clients}
    check_fresh(cached)
    rates = [{name: got.rate for name, got in each.items()} for each in measured]
    fair = [sum(each.values()) / len(crowd.clients) for each in rates]
    shares = {
        client.name: [each[client.name] / share for each, share in zip(rates, fair, strict=True)]
        for client in crowd.clients
    }
    others = list(zip(*(shares[client.name] for client in crowd.others), strict=True))  # by round
    rows = [
        (
            client.name,
            f"{client.sent}",
            f"{client.refused}",
            f"{median(each[client.name] for each in rates):.1f}",
            f"{median(fair):.1f}",
            f"{median(shares[client.name]):.3f}",
            f"{min(shares[client.name]):.3f} – {max(shares[client.name]):.3f}",
            by_round(cached[client.name]),
        )
        for client in crowd.clients
    ]
    title = (
        f"Llama of {base.parameters / 1e6:.1f} M parameters ({size}), float32: requests of {workload.prompt_tokens} "
        f"prompt and {workload.new_tokens} new tokens, {max_seqs} at once, median of {rounds} rounds of {waves} waves"
    )
    columns = ("client", "sent", "queue_full", "tokens/s", "fair share", "÷ fair share", "of the rounds")
    caption = "tokens/s: output tokens; sent and refused: from the beginning"
    table = Table("Fairness", (*columns, "cached, by round"), rows, caption)
    figures = [
        Figure("least of the four ÷ fair share", median(map(min, others)), target=AT_LEAST),
        Figure("most of the four ÷ fair share", median(map(max, others)), target=AT_MOST),
    ]
    return Report("fairness", title, figures, facts, [table], rounds=rounds)


@app.command()
def main(
    size: Size = SIZES["small"],
    prompt: Annotated[int, typer.Option(min=1, help="prompt tokens of a request")] = 64,
    new: Annotated[int, typer.Option(min=1, help="new tokens of a request")] = 64,
    max_seqs: Annotated[int, typer.Option(min=1, help="requests that run at once")] = 32,
    waves: Annotated[int, typer.Option(min=1, help="waves of a round: requests of each of the four")] = 16,
    rounds: Rounds = 5,
    threads: Threads = None,
    quick: Quick = False,
    save: Save = False,
) -> None:
    """One client sends 100 × what each of four others sends."""
    if quick:
        size, prompt, new, max_seqs, waves, rounds = SIZES["tiny"], 8, 8, 5, 12, 1
    prepare(threads, is_saved=save)
    workload = Workload(size, max_seqs, prompt, new, virtual_tokens=0, tasks=0)
    compare(size, workload, max_seqs, waves, rounds).finish(save)


if __name__ == "__main__":
    app()
