"""`python -m benchmarks.http`: what does HTTP cost?

The same work alternately: in this process; through `medley serve` by as many streaming clients as there are requests,
by clients that want their answers whole, and by one request that holds all prompts. The engine's step time comes from
the server's own `/metrics`. The client shares the server's cores, as it must on one machine, so it is a cheap one
(`benchmarks.http_client`), and what it costs is printed.

Beside it: the time from start to ready, of a machine's first server too, whose kernels numba has to compile; and the
processor time of the whole server while nobody asks for anything. No figure is printed where a prompt token came from a
cache.
"""

from __future__ import annotations

import random
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import httpx
import typer

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
from benchmarks.http_client import complete_all, completion, streamed
from benchmarks.inprocess import Size, prepare
from benchmarks.medley import Medley
from benchmarks.servers import Served, ServerProcess, medley_server, served_medley, write_base
from benchmarks.workload import Job, Workload, by_round, check_fresh
from server.engine.protocol import StepOutput
from server.settings import GIB

IN_PROCESS = "in-process"
_SETTLE_SECONDS = 2.0  # after the last answer, before the server counts as idle
_KV_OPTION = ("--kv-cache-memory", "2")  # GiB, of servers that are only started
_ROUNDING = 1024  # bytes

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Measured:
    """One case in one round."""

    seconds: float
    steps: int
    step_seconds: float  # of all steps together
    cached: int  # prompt tokens that were not computed, which must be none
    client_seconds: float = 0.0  # processor time of the HTTP client

    @property
    def mean_step(self) -> float:
        """Seconds."""
        return self.step_seconds / self.steps


Bodies = Callable[[Served, list[Job]], list[dict[str, Any]]]


def _streams(served: Served, jobs: list[Job]) -> list[dict[str, Any]]:
    return [streamed(served.request(job)) for job in jobs]


def _whole(served: Served, jobs: list[Job]) -> list[dict[str, Any]]:
    return [served.request(job) for job in jobs]


def _one_request(served: Served, jobs: list[Job]) -> list[dict[str, Any]]:
    return [completion(served.base_name, [job.prompt for job in jobs], served.new_tokens)]


def cases(workload: Workload, medley: Medley, served: Served) -> Iterator[Case[Measured]]:
    """The same work, by the number of HTTP requests and streams that it comes by."""
    count = workload.requests

    def over_http(bodies: Bodies, numbers: random.Random) -> Measured:
        return _over_http(served, bodies(served, workload.jobs([], numbers)))

    yield Case(IN_PROCESS, lambda numbers: _in_process(medley, workload.jobs([], numbers)))
    yield Case(_row_of_streams(count), partial(over_http, _streams))
    yield Case(_row_of_whole(count), partial(over_http, _whole))
    yield Case(_row_of_one(count), partial(over_http, _one_request))


def _row_of_streams(count: int) -> str:
    return f"{count} requests over HTTP, streamed"


def _row_of_whole(count: int) -> str:
    return f"{count} requests over HTTP, answered whole"


def _row_of_one(count: int) -> str:
    return f"1 request of {count} prompts over HTTP, answered whole"


def _in_process(medley: Medley, jobs: list[Job]) -> Measured:
    steps: list[float] = []

    def watch(output: StepOutput) -> None:
        steps.append(output.stats.seconds)

    run = medley.run(jobs, watch)
    return Measured(run.seconds, len(steps), sum(steps), run.cached_text)


def _over_http(served: Served, bodies: list[dict[str, Any]]) -> Measured:
    with served.server.awake():
        steps, step_seconds = _steps(served.server)
        client = time.process_time()
        seconds, answers = complete_all(served.server.url, bodies)
        client = time.process_time() - client
        later_steps, later_seconds = _steps(served.server)
    cached = sum(answer.cached_tokens() for answer in answers)
    return Measured(seconds, later_steps - steps, later_seconds - step_seconds, cached, client)


def _steps(server: ServerProcess) -> tuple[int, float]:
    """Number and seconds of all steps so far, by the server's own account."""
    text = httpx.get(f"{server.url}/metrics", timeout=60).text
    values = dict(re.findall(r"^medley_step_seconds_(count|sum) (\S+)$", text, re.MULTILINE))
    return int(float(values["count"])), float(values["sum"])


def start_seconds(base: Path, environment: Mapping[str, str] | None = None) -> float:
    """From the command to ‘ready’, of a server that is ended again."""
    with medley_server(base, *_KV_OPTION, environment=environment) as server:
        return time.perf_counter() - server.started


def first_start_seconds(base: Path) -> float:
    """The same where no kernel has been compiled yet."""
    with tempfile.TemporaryDirectory(prefix="medley-kernels-") as folder:
        return start_seconds(base, {"NUMBA_CACHE_DIR": folder})


def idle_share(server: ServerProcess, seconds: float) -> float:
    """Processor time of the server's processes ÷ time, while nobody asks for anything."""
    with server.awake():
        time.sleep(min(_SETTLE_SECONDS, seconds))
        used, started = server.cpu_seconds(), time.perf_counter()
        time.sleep(seconds)
        return (server.cpu_seconds() - used) / (time.perf_counter() - started)


def figures(workload: Workload, measured: dict[str, list[Measured]]) -> Iterator[Figure]:
    """Rates and step times of the cases, as ratios."""
    count = workload.requests

    def of(row: str, value: Callable[[Measured], float]) -> list[float]:
        return [value(each) for each in measured[row]]

    streams, whole, one = _row_of_streams(count), _row_of_whole(count), _row_of_one(count)
    rate = ratio(of(IN_PROCESS, lambda each: each.seconds), of(streams, lambda each: each.seconds))
    yield Figure(f"{count} streams over HTTP ÷ {IN_PROCESS}", rate, target=Target(0.95))
    for other, name in ((whole, f"{count} whole answers"), (one, f"1 request of {count} prompts")):
        steps = ratio(of(streams, lambda each: each.mean_step), of(other, lambda each: each.mean_step))
        yield Figure(f"the engine's mean step: {count} streams ÷ {name}", steps, target=Target(1.05, at_most=True))


def table(workload: Workload, parameters: int, measured: dict[str, list[Measured]]) -> Table:
    """Every case's medians."""
    tokens = workload.requests * workload.new_tokens
    rows = []
    for row, rounds in measured.items():
        client = "–" if row == IN_PROCESS else f"{median(each.client_seconds / each.seconds for each in rounds):.1%}"
        rows.append(
            (
                row,
                f"{median(tokens / each.seconds for each in rounds):.1f}",
                f"{median(1000 * each.mean_step for each in rounds):.2f}",
                f"{median(each.steps for each in rounds):g}",
                client,
                by_round([each.cached for each in rounds]),
            )
        )
    return Table(
        f"Llama of {parameters / 1e6:.1f} M parameters ({workload.size}), float32: {workload.requests} prompts of "
        f"{workload.prompt_tokens} tokens, {workload.new_tokens} new ones each",
        ("work", "tokens/s", "ms per step", "steps", "client, of a core", "cached, by round"),
        rows,
        f"output tokens/s; medians of {len(next(iter(measured.values())))} rounds",
    )


def measure(
    workload: Workload, rounds: int, starts: int, idle: float, *, first_start: bool
) -> tuple[list[Figure], Table]:
    """Everything, on one base. The first start is measured once, for it takes its time."""
    with tempfile.TemporaryDirectory(prefix="medley-benchmark-") as folder:
        base = write_base(workload, Path(folder) / "base")
        first = [first_start_seconds(base)] if first_start else []
        started = [start_seconds(base) for _ in range(starts)]
        with ExitStack() as stack:
            medley = stack.enter_context(Medley(workload, num_prefixes=0))
            memory = (medley.kv_bytes + _ROUNDING) / GIB  # the same: both go round as many pages
            server = stack.enter_context(medley_server(base, "--kv-cache-memory", f"{memory:.9f}"))
            served = served_medley(server, workload.new_tokens)
            measured = alternate(list(cases(workload, medley, served)), rounds)
            check_fresh({row: [each.cached for each in measures] for row, measures in measured.items()})
            share = idle_share(server, idle)
            parameters = medley.parameters
    results = [
        *figures(workload, measured),
        Figure("a server's start to ready", median(started), "s", Target(10, at_most=True)),
        *(Figure("a machine's first start, kernels compiled", seconds, "s") for seconds in first),
        Figure("an idle server, all its processes", 100 * share, "% of a core", Target(1, at_most=True)),
    ]
    return results, table(workload, parameters, measured)


@app.command()
def main(
    size: Size = SIZES["large"],
    requests: Annotated[int, typer.Option(min=1, help="prompts of a round, all at once")] = 64,
    prompt: Annotated[int, typer.Option(min=1, help="tokens of a prompt")] = 64,
    new: Annotated[int, typer.Option(min=1, help="new tokens for each")] = 64,
    starts: Annotated[int, typer.Option(min=1, help="servers started to time it")] = 3,
    idle: Annotated[float, typer.Option(min=0.1, help="seconds that the server is watched idle")] = 10.0,
    rounds: Rounds = 5,
    threads: Threads = None,
    quick: Quick = False,
    save: Save = False,
) -> None:
    """What HTTP costs beside the same work in-process."""
    prepare(threads, is_saved=save)
    if quick:
        size, requests, prompt, new, starts, idle, rounds = SIZES["tiny"], 8, 8, 4, 1, 0.5, 1
    facts = machine()
    workload = Workload(size, requests, prompt, new, 0, 0)
    results, details = measure(workload, rounds, starts, idle, first_start=not quick)
    Report("http", "HTTP beside the same work in-process", results, facts, [details], rounds=rounds).finish(save)


if __name__ == "__main__":
    app()
