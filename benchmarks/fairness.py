"""`python -m benchmarks.fairness`: what is left of a client's share beside one that sends 100 × as much?

Five clients send requests of one size, so a fair share is a fifth of all output tokens. In every wave each of four
sends one request and the hog sends 100; a wave comes whenever one of the four has fewer than two requests waiting, so
that all five are backlogged all the time. The first waves fill the engine and are not counted.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field
from typing import Annotated

import msgspec
import typer

from benchmarks.bases import SIZES, BaseSize, random_base
from benchmarks.frame import Figure, Quick, Report, Save, Table, Target, Threads, machine
from benchmarks.inprocess import Size, ask, default, engine_limits, open_engine, prepare
from benchmarks.workload import Job, Workload
from server.engine.engine import Engine
from server.engine.pages import pages_for
from server.model import FrozenBase

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

TARGET = Target(0.8)
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
    tokens: int = 0  # since the counting began


class _Crowd:
    """All clients at one engine."""

    def __init__(self, engine: Engine, workload: Workload) -> None:
        self._engine = engine
        self._workload = workload
        self._random_tokens = random.Random(0)
        self.hog = _Client("hog", HOG_FACTOR)
        self.others = [_Client(f"client {number}", 1) for number in range(1, 5)]
        self._by_name = {client.name: client for client in [self.hog, *self.others]}

    @property
    def clients(self) -> list[_Client]:
        return list(self._by_name.values())

    def run(self, waves: int) -> float:
        """Serve until so many waves have been sent; seconds. All clients are backlogged in each step."""
        started = time.perf_counter()
        while waves:
            if any(len(client.waiting) < _BACKLOG for client in self.others):
                self._send_wave()
                waves -= 1
                continue
            if not self.hog.waiting:
                raise RuntimeError("the hog is not backlogged: the queue is too short for this benchmark")
            self._step()
        return time.perf_counter() - started

    def _send_wave(self) -> None:
        for client in self.clients:
            for _ in range(client.per_wave):
                request = ask(
                    f"{client.name}/{client.sent}",
                    Job(self._workload.prompt(self._random_tokens), None),
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
            client.waiting.discard(tokens.id)
            client.tokens += len(tokens.token_ids)

    def _client_of(self, request_id: str) -> _Client:
        return self._by_name[request_id.partition("/")[0]]


def compare(size: BaseSize, workload: Workload, max_seqs: int, waves: int) -> Report:
    """Fill, count, and say what each client got."""
    facts = machine()
    base = FrozenBase(random_base(size, workload.length))
    pages = 2 * max_seqs * pages_for(workload.length, default("page_size"))
    with open_engine(base, engine_limits(pages, max_seqs=max_seqs)) as engine:
        crowd = _Crowd(engine, workload)
        crowd.run(1 + max_seqs // len(crowd.clients))
        for client in crowd.clients:
            client.tokens = 0
        seconds = crowd.run(waves)
    fair = sum(client.tokens for client in crowd.clients) / len(crowd.clients)
    rows = [
        (
            client.name,
            f"{client.sent}",
            f"{client.refused}",
            f"{client.tokens / seconds:.1f}",
            f"{fair / seconds:.1f}",
            f"{client.tokens / fair:.3f}",
        )
        for client in crowd.clients
    ]
    title = (
        f"Llama of {base.parameters / 1e6:.1f} M parameters ({size}), float32: requests of {workload.prompt_tokens} "
        f"prompt and {workload.new_tokens} new tokens, {max_seqs} at once, {seconds:.1f} seconds"
    )
    columns = ("client", "sent", "queue_full", "tokens/s", "fair share", "÷ fair share")
    table = Table("Fairness", columns, rows, caption="tokens/s: output tokens; sent and refused: from the beginning")
    figures = [Figure(f"{each.name} ÷ fair share", each.tokens / fair, target=TARGET) for each in crowd.others]
    return Report("fairness", title, figures, facts, [table])


@app.command()
def main(
    size: Size = SIZES["small"],
    prompt: Annotated[int, typer.Option(min=1, help="prompt tokens of a request")] = 64,
    new: Annotated[int, typer.Option(min=1, help="new tokens of a request")] = 64,
    max_seqs: Annotated[int, typer.Option(min=1, help="requests that run at once")] = 32,
    waves: Annotated[int, typer.Option(min=1, help="counted waves: requests of each of the four")] = 40,
    threads: Threads = None,
    quick: Quick = False,
    save: Save = False,
) -> None:
    """One client sends 100 × what each of four others sends."""
    if quick:
        size, prompt, new, max_seqs, waves = SIZES["tiny"], 8, 8, 5, 12
    prepare(threads)
    workload = Workload(size, max_seqs, prompt, new, virtual_tokens=0, tasks=0)
    compare(size, workload, max_seqs, waves).finish(save)


if __name__ == "__main__":
    app()
