"""The limit's arithmetic: which products, at which sizes, how often. No time is looked at."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from benchmarks import limit
from benchmarks.bases import SIZES, random_base
from benchmarks.limit import Limit, Recorder, Step, products, total
from benchmarks.medley import Medley
from benchmarks.workload import Workload

TINY = SIZES["tiny"]


def test_few_sizes_are_timed_themselves() -> None:
    asked: list[int] = []

    def seconds(size: int) -> float:
        asked.append(size)
        return float(size**2)

    assert total(Counter({2: 3, 5: 1, 0: 7}), seconds) == 3 * 4 + 25
    assert sorted(asked) == [2, 5]


def test_many_sizes_are_timed_at_some_and_linear_in_between() -> None:
    asked: list[int] = []

    def seconds(size: int) -> float:
        asked.append(size)
        return 2.0 * size + 1

    sizes = Counter({size: size % 3 + 1 for size in range(1, 101)})
    assert total(sizes, seconds) == pytest.approx(sum(count * (2 * size + 1) for size, count in sizes.items()))
    assert len(asked) < 10
    assert {1, 100} <= set(asked)


def test_no_sizes_take_no_time() -> None:
    assert total(Counter(), lambda _: 1.0) == 0.0


def test_the_products_are_those_of_every_linear_module() -> None:
    model = random_base(TINY, 16)
    modules = Counter(tuple(module.weight.shape) for module in model.modules() if isinstance(module, torch.nn.Linear))
    counted: Counter[tuple[int, int]] = Counter()
    for product in products(TINY):
        for outputs in product.outputs:
            counted[outputs, product.width] += product.times
    assert counted == modules


def test_layers_count_the_steps_tokens_and_the_head_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit._Weights, "seconds", lambda self, rows: float(rows))
    steps = [Step(tokens=10, logits=2), Step(tokens=3, logits=3)]
    least = Limit(TINY, steps).measure()
    of_a_layer = 4  # q, k and v are one product, and gate and up
    assert least.linear == TINY.layers * of_a_layer * (10 + 3) + (2 + 3)
    assert least.with_attention == least.linear


def test_attention_counts_the_rows_own_contexts_in_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limit._Weights, "seconds", lambda self, rows: 0.0)
    monkeypatch.setattr(limit, "_decode_seconds", lambda heads, head_dim, rows, context: float(rows * context))
    monkeypatch.setattr(limit, "_prompt_seconds", lambda heads, head_dim, length: 1000.0 * length)
    steps = [Step(4, 4, decoding=(5, 7)), Step(4, 4, decoding=(9,), prompts=(3,))]
    assert Limit(TINY, steps).measure().with_attention == TINY.layers * (2 * 6 + 9 + 3000)


def test_every_way_gives_the_same_product() -> None:
    torch.manual_seed(0)
    weight, given = torch.randn(24, 16), torch.randn(5, 16)
    expected = given @ weight.T
    for way in (limit._plain, limit._packed) if torch.backends.mkldnn.is_available() else (limit._plain,):  # type: ignore[no-untyped-call]
        (call,) = way([weight])
        torch.testing.assert_close(call(given), expected)


def test_the_recorder_notes_what_the_engine_ran() -> None:
    workload = Workload(TINY, requests=3, prompt_tokens=8, new_tokens=4, virtual_tokens=0, tasks=0)
    with Medley(workload, num_prefixes=0) as medley:
        jobs = workload.jobs([], random.Random(0))
        recorder = Recorder(jobs)
        medley.run(jobs, recorder)
    steps = [step for step in recorder.steps if step.tokens]
    assert sum(step.tokens for step in steps) == 3 * (8 + 4 - 1)  # the last token is never run
    assert sum(step.logits for step in steps) == 3 * 4
    assert [length for step in steps for length in step.prompts] == [8, 8, 8]
    contexts = sorted(context for step in steps for context in step.decoding)
    assert contexts == sorted([9, 10, 11] * 3)
    least = Limit(TINY, steps).measure()
    assert 0 < least.linear < least.with_attention
