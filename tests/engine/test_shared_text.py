"""Law 2 with text from the page cache: requests that begin alike answer as each does alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from server.engine.engine import Engine
from server.model import FrozenBase
from tests.engine.conftest import ARCHITECTURE
from tests.engine.slow import slow_generate
from tests.harness import Alone, assert_same, greedy, make_engine, request, run
from tests.reference.bases import VOCABULARY, tiny_base

MAX_TOKENS = 9
STACKS = [(), ("lora",), ("prompt",), ("page_prompt",), ("prefix",), ("prompt", "lora"), ("ia3", "prefix")]
_RANDOM = random.Random(8)
TEMPLATE = [_RANDOM.randrange(3, VOCABULARY) for _ in range(17)]
PROMPTS = [TEMPLATE, TEMPLATE[:16], [*TEMPLATE, 5, 6, 7], [*TEMPLATE, 5, 6, 8, 9, 10], [*TEMPLATE[:9], 4, 4, 4]]

Case = tuple[tuple[str, ...], list[int], Alone]


@pytest.fixture(scope="module")
def cases(tasks: dict[str, Path]) -> list[Case]:
    """Every stack with every prompt, and what it answers alone."""
    return [
        (names, prompt, slow_generate(tiny_base(ARCHITECTURE), [tasks[name] for name in names], prompt, MAX_TOKENS))
        for names in STACKS
        for prompt in PROMPTS
    ]


@pytest.fixture
def engine(base: FrozenBase) -> Iterator[Engine]:
    engine = make_engine(base)
    yield engine
    engine.close()


@pytest.mark.parametrize(
    ("page_size", "num_pages", "max_batch_tokens", "max_prefill_tokens"),
    [(4, 600, 900, 900), (1, 2000, 64, 20), (3, 700, 40, 11), (4, 40, 30, 30), (16, 15, 60, 24)],
    ids=["whole", "slots", "chunks", "preempted", "large-pages"],
)
def test_requests_that_begin_alike_answer_as_alone_when_they_come_and_when_they_come_again(
    base: FrozenBase,
    tasks: dict[str, Path],
    cases: list[Case],
    page_size: int,
    num_pages: int,
    max_batch_tokens: int,
    max_prefill_tokens: int,
) -> None:
    engine = make_engine(
        base,
        page_size=page_size,
        num_pages=num_pages,
        max_batch_tokens=max_batch_tokens,
        max_prefill_tokens=max_prefill_tokens,
    )
    cached = preemptions = 0
    for seed in range(2):
        requests = [
            request(str(index), prompt, greedy(MAX_TOKENS), *(tasks[name] for name in names))
            for index, (names, prompt, _) in enumerate(cases)
        ]
        outcome = run(engine, requests, random.Random(seed))
        for index, (names, prompt, expected) in enumerate(cases):
            assert_same(outcome.results[str(index)], expected, f"{names}/{len(prompt)}")
        cached += sum(max(0, result.cached_tokens - result.virtual_tokens) for result in outcome.results.values())
        preemptions += outcome.preemptions
        assert sum(step.cached_tokens for step in outcome.steps) == sum(
            result.cached_tokens for result in outcome.results.values()
        )
        assert sum(step.prompt_tokens for step in outcome.steps) == sum(
            len(prompt) + outcome.results[str(index)].virtual_tokens for index, (_, prompt, _) in enumerate(cases)
        )
    engine.close()
    assert cached > 0
    assert (preemptions > 0) == (num_pages < 100)
    assert engine.scheduler.cache.available == num_pages - 1


def test_a_template_is_computed_once_for_64_that_come_at_once(base: FrozenBase) -> None:
    engine = make_engine(base, max_seqs=64, max_batch_tokens=600, num_pages=400)
    requests = [request(str(index), [*TEMPLATE, 5 + index], greedy(5)) for index in range(64)]
    outcome = run(engine, requests)
    engine.close()
    first = outcome.steps[0]
    assert first.rows == 64
    assert first.prefill_tokens == 18 + 63 * 2
    assert first.kv_pages_used == 4 + 64
    for item in requests:
        alone = run(make_engine(base), [item]).results[item.id]
        assert outcome.results[item.id].tokens == alone.tokens
        assert [score.chosen for score in outcome.results[item.id].logprobs] == pytest.approx(
            [score.chosen for score in alone.logprobs], abs=1e-4
        )


@pytest.mark.parametrize("names", [(), ("prompt",), ("prefix", "lora")], ids="+".join)
def test_each_turn_of_a_chat_takes_what_the_turn_before_left(
    base: FrozenBase, tasks: dict[str, Path], engine: Engine, names: tuple[str, ...]
) -> None:
    folders = [tasks[name] for name in names]
    history, cached = list(TEMPLATE), []
    for turn in range(4):
        result = run(engine, [request(str(turn), history, greedy(MAX_TOKENS), *folders)]).results[str(turn)]
        expected = slow_generate(tiny_base(ARCHITECTURE), folders, history, MAX_TOKENS)
        assert_same(result, expected, f"turn {turn}")
        cached.append(result.cached_tokens)
        history += [*result.tokens, 11, 12 + turn]
    assert cached[0] == 0
    for turn, (before, after) in enumerate(pairwise(cached)):
        computed = result.virtual_tokens + len(TEMPLATE) + turn * (MAX_TOKENS + 2) + MAX_TOKENS - 1
        assert after == computed // 4 * 4 > before


@pytest.mark.parametrize("names", [(), ("page_prompt",)], ids="+".join)
def test_a_tenant_finds_nothing_of_anothers(tasks: dict[str, Path], engine: Engine, names: tuple[str, ...]) -> None:
    folders = [tasks[name] for name in names]
    cached = []
    for tenant in ("one", "other", "one"):
        one = request(tenant, TEMPLATE, greedy(3), *folders, tenant=tenant)
        cached.append(run(engine, [one]).results[tenant].cached_tokens)
    assert cached[:2] == [0, 0]
    assert cached[2] > 0


def test_random_prompts_find_no_text(base: FrozenBase, tasks: dict[str, Path], engine: Engine) -> None:
    prompts = random.Random(4)
    requests = [
        request(
            str(index),
            [prompts.randrange(3, VOCABULARY) for _ in range(12)],
            greedy(4),
            *([tasks["prompt"]] if index % 2 else []),
        )
        for index in range(20)
    ]
    results = run(engine, requests).results.values()
    assert all(result.cached_tokens <= result.virtual_tokens for result in results)


def test_what_is_not_finite_is_not_kept(base: FrozenBase, overflowing: dict[str, Path], engine: Engine) -> None:
    requests = [
        request(f"{name}/{copy}", TEMPLATE, greedy(3), folder)
        for name, folder in overflowing.items()
        for copy in range(3)
    ]
    for _ in range(2):
        results = run(engine, requests).results.values()
        assert [result.failed is not None and result.failed.code for result in results] == ["not_finite_logits"] * 9
        assert engine.scheduler.cache.num_idle == 0
