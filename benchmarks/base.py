"""`python -m benchmarks.base`: the base alone beside the machine's limit, Hugging Face and vLLM.

Every system gets the same work in the same run, alternately: greedy, to the full length, prompts that nobody has seen.
The limit is that of the steps that Medley really ran (`benchmarks.limit`). Servers are processes of their own, reached
through one HTTP client, and stopped while another system is measured; vLLM's is measured where `--vllm` names an
environment that has it (`benchmarks.vllm_peer` says how to make one). One more pair of rows mixes LoRA adapters,
through both servers. No figure is printed before the servers have been found to give the tokens of PEFT alone, and none
where a prompt token came from a cache.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from benchmarks.adapters import LORA, write_adapters
from benchmarks.agreement import DisagreementError, certain_tokens
from benchmarks.bases import SIZES, BaseSize
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
from benchmarks.inprocess import Size, prepare
from benchmarks.limit import Limit, Recorder
from benchmarks.medley import Medley
from benchmarks.peft_peer import PeftPeer
from benchmarks.servers import Served, medley_server, served_medley, upload, write_base
from benchmarks.vllm_peer import VLLM_BASE, VllmEnvironment, installed_version, vllm_server
from benchmarks.workload import Job, Task, Workload, by_round, check_fresh

LINEAR = "limit: linear modules alone"
WITH_ATTENTION = "limit: linear modules and attention's products"
IN_PROCESS = "Medley in-process"
MEDLEY = "Medley over HTTP"
HF = "Hugging Face generate, one static batch"
VLLM = "vLLM over HTTP"
MIXED = ", LoRAs mixed"
NO_VLLM = "vLLM is skipped: name its environment with --vllm; the docstring of benchmarks/vllm_peer.py makes one"
_QUICK = BaseSize(128, 2, 2, 512)  # vLLM has no attention for narrower heads
# GiB, as vLLM's: little, so that after a round or two no server is given memory anew while it is measured
_KV_OPTION = ("--kv-cache-memory", "1")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@dataclass(frozen=True)
class Measured:
    """A row in one round."""

    seconds: float
    cached: int | None = None  # prompt tokens that came from a cache, which must be none; None: there is no cache


Rows = dict[str, Measured]  # of one round


@dataclass(frozen=True)
class Systems:
    """All that is measured, up and running."""

    workload: Workload
    tasks: list[Task]  # LoRAs
    medley: Medley
    peer: PeftPeer
    limit: Limit
    servers: dict[str, Served]  # by the row's name

    def cases(self) -> Iterator[Case[Rows]]:
        """Every system once in a round, the limit beside Medley."""
        yield Case(LINEAR, lambda _: self._limits())
        yield Case(IN_PROCESS, self._in_process, "base")
        yield Case(HF, lambda numbers: {HF: Measured(self.peer.run(self._jobs([], numbers)).seconds)}, "base")
        for row in self.servers:
            yield Case(row, partial(self._served, row), "mixed" if row.endswith(MIXED) else "base")

    def check(self) -> str:
        """Every server gives the tokens of PEFT alone; what was compared, in words. Raises `DisagreementError`."""
        compared = 0
        for row, served in self.servers.items():
            task = self.tasks[-1] if row.endswith(MIXED) else None
            job = Job(self.workload.prompt(random.Random(1)), task)
            expected, count = certain_tokens(self.peer, job)
            given = served.answers([job])[0]
            if given[:count] != expected[:count]:
                raise DisagreementError(f"{row} gives {given}, where PEFT alone gives {expected}")
            compared += count
        return f"{compared} greedy tokens of the servers equal those of PEFT alone"

    def _jobs(self, tasks: list[Task], numbers: random.Random) -> list[Job]:
        return self.workload.jobs(tasks, numbers)

    def _limits(self) -> Rows:
        least = self.limit.measure()
        return {LINEAR: Measured(least.linear), WITH_ATTENTION: Measured(least.with_attention)}

    def _in_process(self, numbers: random.Random) -> Rows:
        run = self.medley.run(self._jobs([], numbers))
        return {IN_PROCESS: Measured(run.seconds, run.cached_text)}

    def _served(self, row: str, numbers: random.Random) -> Rows:
        return {row: Measured(*self.servers[row].run(self._jobs(self.tasks if row.endswith(MIXED) else [], numbers)))}


def start(workload: Workload, vllm: Path | None, stack: ExitStack) -> Systems:
    """Every system, one behind the other; those started before are paused."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="medley-benchmark-")))
    base = write_base(workload, folder / "base")
    tasks = write_adapters(workload, folder / "adapters", [LORA])
    loras = tasks[LORA]
    server = stack.enter_context(medley_server(base, *_KV_OPTION))
    upload(server, loras)
    served = served_medley(server, workload.new_tokens)
    servers = {MEDLEY: served}
    if vllm is not None:
        servers[VLLM] = _served_vllm(vllm, base, workload, [], stack)
    servers[MEDLEY + MIXED] = served
    if vllm is not None:
        servers[VLLM + MIXED] = _served_vllm(vllm, base, workload, loras, stack)
    medley = stack.enter_context(Medley(workload, num_prefixes=0))
    jobs = workload.jobs([], random.Random(0))
    recorder = Recorder(jobs)
    medley.run(jobs, recorder)
    return Systems(workload, loras, medley, PeftPeer(workload, tasks), Limit(workload.size, recorder.steps), servers)


def _served_vllm(environment: Path, base: Path, workload: Workload, tasks: Sequence[Task], stack: ExitStack) -> Served:
    """Paused. The base has a server without LoRA to itself, so that its rate is the best there is."""
    server = stack.enter_context(vllm_server(environment, base, workload, tasks))
    server.pause()
    return Served(server, VLLM_BASE, workload.new_tokens)


def figures(rounds: Sequence[Rows]) -> Iterator[Figure]:
    """Rates of two rows as ratios: a row's rate ÷ another's is the other's seconds ÷ the row's."""

    def rate(row: str, other: str, target: Target | None = None, aim: float | None = None) -> Iterator[Figure]:
        if row in rounds[0] and other in rounds[0]:
            name = f"{row} ÷ {other}" if aim is None else f"{row} ÷ {other}, {aim:g} is the aim"
            yield Figure(name, ratio(_seconds(rounds, other), _seconds(rounds, row)), target=target)

    yield from rate(IN_PROCESS, LINEAR, Target(0.90))
    yield from rate(IN_PROCESS, WITH_ATTENTION)
    yield from rate(MEDLEY, HF, Target(1.0))
    yield from rate(MEDLEY, VLLM, Target(1.0), aim=1.05)
    yield from rate(MEDLEY + MIXED, VLLM + MIXED, Target(1.8))
    yield from rate(MEDLEY + MIXED, MEDLEY)


def _seconds(rounds: Sequence[Rows], row: str) -> list[float]:
    return [each[row].seconds for each in rounds]


def cached(rounds: Sequence[Rows]) -> dict[str, list[int]]:
    """Prompt tokens from the cache in each round, of every row that has one."""
    found = {row: [each[row].cached for each in rounds] for row in rounds[0]}
    return {
        row: [count for count in counts if count is not None] for row, counts in found.items() if None not in counts
    }


def table(systems: Systems, rounds: Sequence[Rows]) -> Table:
    """Output tokens/s of every row, and how far the rounds lie apart."""
    workload = systems.workload
    tokens = workload.requests * workload.new_tokens
    from_cache = {row: by_round(counts) for row, counts in cached(rounds).items()}
    rows = []
    for row in rounds[0]:
        rates = [tokens / seconds for seconds in _seconds(rounds, row)]
        share = ratio(_seconds(rounds, LINEAR), _seconds(rounds, row))
        spread = f"{min(rates):.1f} – {max(rates):.1f}"
        rows.append((row, f"{median(rates):.1f}", spread, f"{share:.3f}", from_cache.get(row, "–")))
    return Table(
        f"Llama of {systems.medley.parameters / 1e6:.1f} M parameters ({workload.size}), float32: {workload.requests} "
        f"requests of {workload.prompt_tokens} prompt and {workload.new_tokens} new tokens",
        ("system", "tokens/s", "of the rounds", "÷ limit of the linear modules", "cached, by round"),
        rows,
        f"output tokens/s, prompts included in the time; median of {len(rounds)} rounds; "
        f"{len(systems.tasks)} LoRAs of rank 8 on q and v where they are mixed",
    )


@app.command()
def main(
    size: Size = SIZES["large"],
    vllm: VllmEnvironment = None,
    requests: Annotated[int, typer.Option(min=1, help="requests of a round, all at once")] = 64,
    prompt: Annotated[int, typer.Option(min=1, help="prompt tokens of a request")] = 64,
    new: Annotated[int, typer.Option(min=1, help="new tokens of a request")] = 64,
    tasks: Annotated[int, typer.Option(min=1, help="LoRAs that are mixed")] = 16,
    rounds: Rounds = 5,
    threads: Threads = None,
    quick: Quick = False,
    save: Save = False,
) -> None:
    """The base alone beside the machine's limit, Hugging Face `generate` and vLLM."""
    prepare(threads, is_saved=save)
    if quick:
        size, requests, prompt, new, tasks, rounds = _QUICK, 8, 8, 4, 2, 1
    facts = machine()
    with ExitStack() as stack:
        systems = start(Workload(size, requests, prompt, new, 0, tasks), vllm, stack)
        notes = [
            systems.check(),
            f"vLLM's CPU build {installed_version(vllm)}, compiled, as it starts by default" if vllm else NO_VLLM,
        ]
        measured = alternate(list(systems.cases()), rounds)
        by_round = [
            {row: value for each in one for row, value in each.items()} for one in zip(*measured.values(), strict=True)
        ]
        check_fresh(cached(by_round))
        details = [table(systems, by_round)]
    title = "Base only, and LoRAs mixed"
    Report("base", title, list(figures(by_round)), facts, details, notes, rounds=rounds).finish(save)


if __name__ == "__main__":
    app()
