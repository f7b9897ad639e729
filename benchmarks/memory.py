"""`python -m benchmarks.memory`: does the server keep to what it was given, and no more than it needs?

Adapters: this process's own memory (RssAnon: without mapped files) before and after 200 LoRAs become resident, beside
their tensors' bytes. Prefix: the KV pages that a soft prompt holds while it runs and while it is idle, and whether a
request that needs every page gets them. Overload: 300 requests of tasks that fit neither the bank nor the KV cache,
whose fill is read after every step. Start-up: the peak of a process that loads a saved base, read from outside every
millisecond, less the same of a tiny base, which is Python and the libraries.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Annotated

import typer

from benchmarks.adapters import LORA, PROMPT, write_adapters, write_variants
from benchmarks.bases import SIZES, BaseSize, random_base
from benchmarks.frame import Case, Figure, Quick, Report, Rounds, Save, Table, Target, Threads, alternate, machine
from benchmarks.inprocess import Size, drive, engine_limits, make_resident, open_engine, prepare, read_folder
from benchmarks.process_memory import Peak, anonymous_bytes, load_peak, return_freed_memory
from benchmarks.workload import Job, Task, Workload
from server.engine.pages import pages_for
from server.engine.protocol import StepOutput
from server.model import FrozenBase, KVCache

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

RESIDENT = Target(1.1, at_most=True)
WITHIN = Target(1.0, at_most=True)
_MIB = 1024**2
_TINY = SIZES["tiny"]


@dataclass(frozen=True)
class Prefix:
    """A soft prompt's KV pages."""

    expected: int
    running: int  # in use beside the requests' own
    idle: int  # nobody's, but still there
    reclaimed: bool  # a request that needs every page got them


@dataclass(frozen=True)
class Fill:
    """The fullest that a run made bank and KV cache, as shares of their settings, and what the process grew by."""

    bank: float
    pages: float
    preemptions: int
    loads: int
    grown: int
    allowed: int  # bytes of bank and KV cache


def adapters_growth(base: FrozenBase, tasks: Sequence[Task]) -> float:
    """Bytes that the process grew by ÷ the adapters' bytes. An eighth of them comes before the first look, and with
    them what loads and steps need."""
    return_freed_memory()
    with open_engine(base, engine_limits(8, max_queue=len(tasks))) as engine:
        make_resident(engine, tasks[: len(tasks) // 8])
        before, held = anonymous_bytes(), engine.bank.used
        make_resident(engine, tasks[len(tasks) // 8 :])
        return (anonymous_bytes() - before) / (engine.bank.used - held)


def prefix_pages(base: FrozenBase, workload: Workload, task: Task) -> Prefix:
    """One request of the task, then one of the base alone that needs the whole KV cache."""
    size = engine_limits(0).page_size
    expected = pages_for(workload.virtual_tokens, size)
    whole = pages_for(workload.length, size) + 1  # pages: of the larger request, which is the second
    outputs: list[StepOutput] = []
    with open_engine(base, engine_limits(whole)) as engine:
        drive(engine, [Job([0], task)], 2, outputs.append)
        own = pages_for(workload.virtual_tokens + 2, size) - workload.virtual_tokens // size
        running = max(output.stats.kv_pages_used for output in outputs) - own
        idle = outputs[-1].stats.kv_pages_idle
        prompt = replace(workload, prompt_tokens=whole * size - 1).prompt(random.Random(0))
        drive(engine, [Job(prompt, None)], 2, outputs.append)
        used = max(output.stats.kv_pages_used for output in outputs)
    return Prefix(expected, running, idle, used == whole)


def overload(base: FrozenBase, workload: Workload, tasks: Sequence[Task], requests: int) -> Fill:
    """A bank for a quarter of the tasks, and pages for an eighth of the requests."""
    size = engine_limits(0).page_size
    pages = max(requests // 8, 1) * pages_for(workload.length, size)
    bank = sum(read_folder(task.folder, base).bytes for task in tasks) // 4
    outputs: list[StepOutput] = []
    return_freed_memory()
    before = anonymous_bytes()
    with open_engine(base, engine_limits(pages, adapter_bytes=bank, max_queue=requests)) as engine:
        jobs = replace(workload, requests=requests).jobs(list(tasks), random.Random(0))
        drive(engine, jobs, workload.new_tokens, outputs.append)
        grown = anonymous_bytes() - before
        cache = engine.limits.num_pages * KVCache.page_bytes(base.layers, size, base.dtype)
    stats = [output.stats for output in outputs]
    return Fill(
        bank=max(each.bank_bytes / each.bank_capacity for each in stats),
        pages=max((each.kv_pages_used + each.kv_pages_idle) / each.kv_pages for each in stats),
        preemptions=sum(each.preemptions for each in stats),
        loads=sum(len(each.load_seconds) for each in stats),
        grown=grown,
        allowed=cache + bank,
    )


def start_up(size: BaseSize, folder: Path, starts: int) -> tuple[dict[str, list[Peak]], int, int]:
    """Peaks of the processes that load a base of `size` and a tiny one, which need no round to warm up; the weights'
    bytes; the largest layer's."""
    folders = {"base": folder / "base", "tiny": folder / "tiny"}
    weights = layer = 0
    for name, each in (("tiny", _TINY), ("base", size)):
        model = random_base(each, 64)
        model.save_pretrained(folders[name])
        weights = sum(parameter.nbytes for parameter in model.parameters())
        layer = max(sum(parameter.nbytes for parameter in part.parameters()) for part in model.model.layers)
    peaks: dict[str, list[Peak]] = {name: [] for name in folders}
    for _ in range(starts):
        for name, path in folders.items():
            peaks[name].append(load_peak(path))
    return peaks, weights, layer


def compare(size: BaseSize, workload: Workload, adapters: int, requests: int, starts: int, rounds: int) -> Report:
    """All four parts."""
    facts = machine()
    with tempfile.TemporaryDirectory(prefix="medley-benchmark-") as parent:
        folder = Path(parent)
        peaks, weights, layer = start_up(size, folder, starts)
        base = FrozenBase(random_base(size, workload.length + 64))
        patterns = write_adapters(workload, folder / "patterns")
        loras = write_variants(patterns[LORA][0], folder / "loras", range(adapters))
        growth = alternate([Case("growth", lambda _: adapters_growth(base, loras))], rounds)["growth"]
        prefix = prefix_pages(base, workload, patterns[PROMPT][0])
        fill = overload(base, workload, list(chain(*patterns.values())) + loras[: 4 * workload.tasks], requests)
    extra = [ours.anonymous - tiny.anonymous for ours, tiny in zip(peaks["base"], peaks["tiny"], strict=True)]
    figures = [
        Figure(f"growth over {adapters} LoRAs ÷ their tensors", median(growth), target=RESIDENT),
        Figure("a prefix's pages while it runs ÷ its positions'", prefix.running / prefix.expected, target=WITHIN),
        Figure("the same while it is idle", prefix.idle / prefix.expected, target=WITHIN),
        Figure("all pages given to another once it is idle", float(prefix.reclaimed), "of 1", Target(1.0)),
        Figure("overload: fullest bank ÷ its setting", fill.bank, target=WITHIN),
        Figure("overload: fullest KV cache ÷ its setting", fill.pages, target=WITHIN),
        Figure("start-up: peak ÷ the weights and one layer", median(extra) / (weights + layer), target=WITHIN),
    ]
    rows = [
        ("start-up of the base, own memory", _mib(median(each.anonymous for each in peaks["base"]))),
        ("start-up of the base, with mapped files", _mib(median(each.resident for each in peaks["base"]))),
        ("start-up of a tiny base, own memory", _mib(median(each.anonymous for each in peaks["tiny"]))),
        ("weights", _mib(weights)),
        ("one layer", _mib(layer)),
        ("overload: growth of the process, activations too", _mib(fill.grown)),
        ("overload: bank and KV cache may have", _mib(fill.allowed)),
    ]
    notes = [
        f"the overload had {requests} requests, {fill.preemptions} preemptions, {fill.loads} loads",
        f"the soft prompt's {workload.virtual_tokens} virtual tokens are {prefix.expected} pages",
    ]
    title = f"Llama ({size}), float32: median of {rounds} rounds and {starts} starts"
    return Report("memory", title, figures, facts, [Table("Memory", ("what", "MiB"), rows)], notes, rounds=rounds)


def _mib(size: float) -> str:
    return f"{size / _MIB:.1f}"


@app.command()
def main(
    size: Size = SIZES["large"],
    adapters: Annotated[int, typer.Option(min=16, help="LoRAs that are loaded")] = 200,
    requests: Annotated[int, typer.Option(min=1, help="requests of the overload")] = 300,
    virtual: Annotated[int, typer.Option(min=1, help="virtual tokens of a prompt or a prefix")] = 20,
    starts: Annotated[int, typer.Option(min=1, help="starts of each base")] = 5,
    rounds: Rounds = 5,
    threads: Threads = None,
    quick: Quick = False,
    save: Save = False,
) -> None:
    """Memory at start-up, of adapters, of prefixes, under overload."""
    if quick:
        size, adapters, requests, starts, rounds = _TINY, 16, 24, 1, 1
    prepare(threads, is_saved=save)
    workload = Workload(size, requests=1, prompt_tokens=32, new_tokens=16, virtual_tokens=virtual, tasks=4)
    compare(size, workload, adapters, requests, starts, rounds).finish(save)


if __name__ == "__main__":
    app()
