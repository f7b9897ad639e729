"""Law 5 and the bank's bounds: loads run beside the steps, and no adapter waits for ever."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from server.adapters import Adapter, Checkpoint, read_adapter
from server.adapters.bank import PATIENCE
from server.engine.engine import Engine, EngineLimits
from server.errors import RequestError
from server.model import FrozenBase
from tests.harness import Result, collect, greedy, make_engine, request, run

_BOUND = 2000  # steps after which a test says that there is no end


class Gate:
    """A loader whose loads of one folder wait, and fail while told so."""

    def __init__(self, base: FrozenBase, folder: Path) -> None:
        self.opened = threading.Event()
        self.failing = False
        self.loads = 0  # of the folder
        self._base = base
        self._folder = folder

    def load(self, files: Mapping[str, str]) -> Adapter:
        folder = Path(files["folder"])
        if folder == self._folder:
            self.loads += 1
            assert self.opened.wait(20)
            if self.failing:
                raise RequestError("adapter_unavailable", "told to fail")
        return read_adapter(Checkpoint.open(folder, self._base.dtype), self._base.shape)


@pytest.fixture
def engine_of(base: FrozenBase) -> Iterator[Callable[[Gate], Engine]]:
    engines: list[Engine] = []

    def make(gate: Gate) -> Engine:
        limits = EngineLimits(
            max_seqs=8,
            max_batch_tokens=64,
            max_prefill_tokens=64,
            max_queue=99,
            num_pages=200,
            page_size=4,
            adapter_bytes=10**9,
        )
        engines.append(Engine(base, limits, gate.load))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


def _until(engine: Engine, results: dict[str, Result], done: Callable[[], bool]) -> None:
    for _ in range(_BOUND):
        if done():
            return
        collect(engine, results)
        if engine.must_wait:
            time.sleep(0.001)
    raise AssertionError("no end")


def test_a_cold_adapters_load_stops_no_running_row(
    base: FrozenBase, tasks: dict[str, Path], engine_of: Callable[[Gate], Engine]
) -> None:
    gate = Gate(base, tasks["lora"])
    engine = engine_of(gate)
    results = {name: Result() for name in ("stream", "cold", "hot", "later")}
    engine.add(request("cold", [5, 6], greedy(4), tasks["lora"]))
    engine.add(request("stream", [5, 6], greedy(20)))
    engine.add(request("hot", [5, 6], greedy(6), tasks["ia3"]))
    for step in range(20):
        collect(engine, results)
        assert len(results["stream"].tokens) == step + 1
    _until(engine, results, lambda: results["hot"].ends == 1)
    engine.add(request("later", [5, 6], greedy(3), tasks["ia3"]))
    _until(engine, results, lambda: results["later"].ends == 1)
    assert results["cold"].tokens == []
    gate.opened.set()
    _until(engine, results, lambda: results["cold"].ends == 1)
    assert len(results["cold"].tokens) == 4


def test_one_failing_load_fails_all_its_requests_alone_and_works_once_healed(
    base: FrozenBase, tasks: dict[str, Path], engine_of: Callable[[Gate], Engine]
) -> None:
    gate = Gate(base, tasks["lora"])
    gate.failing = True
    gate.opened.set()
    engine = engine_of(gate)
    results = {name: Result() for name in ("one", "two", "good", "again")}
    for name, task in (("one", "lora"), ("two", "lora"), ("good", "ia3")):
        engine.add(request(name, [5], greedy(4), tasks[task]))
    _until(engine, results, lambda: not engine.has_work)
    for name in ("one", "two"):
        failed = results[name].failed
        assert failed is not None
        assert failed.code == "adapter_unavailable"
        assert results[name].ends == 1
    assert len(results["good"].tokens) == 4
    assert gate.loads == 1
    gate.failing = False
    engine.heal([str(tasks["lora"])])  # the blob's name here
    engine.add(request("again", [5], greedy(4), tasks["lora"]))
    _until(engine, results, lambda: not engine.has_work)
    assert len(results["again"].tokens) == 4


def _bytes(base: FrozenBase, folder: Path) -> int:
    return read_adapter(Checkpoint.open(folder, base.dtype), base.shape).bytes


def test_one_more_adapter_than_the_bank_holds_and_all_finish(base: FrozenBase, tasks: dict[str, Path]) -> None:
    largest = max(_bytes(base, folder) for folder in tasks.values())
    engine = make_engine(base, adapter_bytes=largest)
    requests = [
        request(f"{name}/{copy}", [5, 6], greedy(5), folder) for name, folder in tasks.items() for copy in range(2)
    ]
    outcome = run(engine, requests)
    engine.close()
    assert all(len(result.tokens) == 5 for result in outcome.results.values())
    assert max(step.bank_bytes for step in outcome.steps) <= largest


def test_an_adapter_larger_than_the_bank_is_refused(base: FrozenBase, tasks: dict[str, Path]) -> None:
    engine = make_engine(base, adapter_bytes=_bytes(base, tasks["lora"]) - 1)
    results = run(engine, [request("big", [5], greedy(2), tasks["lora"]), request("base", [5], greedy(2))]).results
    engine.close()
    failed = results["big"].failed
    assert failed is not None
    assert failed.code == "adapter_too_large"
    assert len(results["base"].tokens) == 2


def test_a_cold_task_behind_ever_arriving_hot_ones_has_a_bounded_wait(base: FrozenBase, tasks: dict[str, Path]) -> None:
    hot, cold = tasks["lora"], tasks["lora_patterns"]
    engine = make_engine(base, adapter_bytes=max(_bytes(base, hot), _bytes(base, cold)), max_seqs=4)
    results: dict[str, Result] = {}

    def add(name: str, folder: Path) -> None:
        results[name] = Result()
        engine.add(request(name, [5], greedy(6), folder))

    add("first", hot)
    _until(engine, results, lambda: bool(results["first"].tokens))
    add("cold", cold)
    collect(engine, results)
    for load in engine.bank._loads._loads.values():
        load.future.result(20)  # from here on it waits for room alone
    steps = 0
    while not results["cold"].ends:
        if steps % 3 == 0:
            add(f"hot {steps}", hot)
        collect(engine, results)
        steps += 1
        assert steps < PATIENCE + 40, "the cold task starves"
    assert steps > PATIENCE // 2, "the bank had room after all"
    _until(engine, results, lambda: not engine.has_work)
    engine.close()
    assert all(len(result.tokens) == 6 for result in results.values())
