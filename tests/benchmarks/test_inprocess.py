"""What the engine's benchmarks stand on: adapters in thousands, popularity, clocks, a process's memory."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.adapters import LORA, write_adapters, write_variants
from benchmarks.bases import SIZES, random_base
from benchmarks.inprocess import drive, engine_limits, make_resident, open_engine
from benchmarks.many import Draws, popularity, recently_used
from benchmarks.process_memory import anonymous_bytes, load_peak, return_freed_memory
from benchmarks.small import clocks, timed
from benchmarks.workload import Job, Task, Workload
from server.adapters.checkpoint import WEIGHTS_FILE
from server.engine.runner import Runner
from server.model import FrozenBase, PagedAttention, products
from server.model.programs import Program

WORKLOAD = Workload(SIZES["tiny"], requests=4, prompt_tokens=8, new_tokens=4, virtual_tokens=4, tasks=1)


@pytest.fixture
def base() -> FrozenBase:
    return FrozenBase(random_base(WORKLOAD.size, 64))


@pytest.fixture
def pattern(tmp_path: Path) -> Task:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return write_adapters(WORKLOAD, tmp_path, [LORA])[LORA][0]


@pytest.fixture
def loras(pattern: Task, tmp_path: Path) -> list[Task]:
    return write_variants(pattern, tmp_path / "variants", range(5))


def test_variants_are_served_and_no_two_are_equal(base: FrozenBase, loras: list[Task]) -> None:
    weights = [load_file(task.folder / WEIGHTS_FILE) for task in loras]
    for name in weights[0]:
        values = [each[name].flatten()[0].item() for each in weights]
        assert len(set(values)) == len(loras)
    with open_engine(base, engine_limits(16)) as engine:
        make_resident(engine, loras)
        assert len(engine.bank) == len(loras)
        run = drive(engine, [Job([1, 2, 3], task) for task in loras], 4)
    assert [len(answer) for answer in run.answers] == [4] * len(loras)


def test_a_task_is_drawn_by_zipfs_law() -> None:
    drawn = Counter(random.Random(0).choices(range(1000), cum_weights=popularity(1000), k=100_000))
    assert drawn[0] / drawn[9] == pytest.approx(10**1.1, rel=0.15)


def test_what_a_cache_holds_is_distinct_and_favours_the_popular() -> None:
    held = recently_used(popularity(1000), 100)
    assert len(held) == len(set(held)) == 100
    assert {0, 1, 2} <= set(held)
    assert sorted(recently_used(popularity(5), 100)) == [0, 1, 2, 3, 4]


def test_of_the_registered_tasks_those_that_are_asked_for_have_files(pattern: Task, tmp_path: Path) -> None:
    draws = Draws.of(registered=1000, resident=20, requests=8, rounds=2)
    assert [len(each) for each in draws.rounds] == [8, 8]
    written = draws.write(pattern, tmp_path / "variants")
    assert written.keys() == {*range(20), *draws.recent, *draws.rounds[0], *draws.rounds[1]}
    assert all((task.folder / WEIGHTS_FILE).is_file() for task in written.values())


def test_clocks_are_taken_off_again_and_parts_fit_into_the_step() -> None:
    own = Runner.run, PagedAttention.attend, products.pack, Program.run
    with clocks() as spent:
        base = FrozenBase(random_base(WORKLOAD.size, 64))
        with open_engine(base, engine_limits(32)) as engine:
            parts = timed(engine, 5, WORKLOAD, torch.ones(1000), random.Random(0), spent)
    assert (Runner.run, PagedAttention.attend, products.pack, Program.run) == own
    assert parts.parts["attention"] > 0
    assert parts.parts["products"] > 0
    assert parts.plain_sum > 0
    assert parts.parts["attention"] + parts.parts["products"] < parts.parts["forward"] < parts.whole


def test_limits_are_the_servers_but_for_what_is_given() -> None:
    limits = engine_limits(7, page_size=8)
    assert (limits.num_pages, limits.page_size, limits.max_queue) == (8, 8, 1024)


def test_own_memory_grows_with_what_is_kept() -> None:
    return_freed_memory()  # of other tests: what is kept would take its place
    before = anonymous_bytes()
    kept = bytearray(b"1" * 50_000_000)
    assert anonymous_bytes() - before > 0.9 * len(kept)


def test_a_process_that_cannot_load_its_base_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ended with status 1"):
        load_peak(tmp_path)
