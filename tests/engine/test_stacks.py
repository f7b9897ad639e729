"""Stacks of two adapters, against the definition of their order run slowly, one request at a time."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from server.model import FrozenBase
from tests.engine.conftest import ARCHITECTURE
from tests.engine.slow import slow_generate
from tests.harness import assert_same, greedy, load_first, make_engine, request, run
from tests.reference.bases import VOCABULARY, tiny_base

MAX_TOKENS = 10
STACKS = [
    ("prompt", "prefix"),
    ("prefix", "prompt"),
    ("prefix", "page_prefix"),
    ("prompt", "long_prompt"),
    ("page_prompt", "p_tuning"),
    ("prompt", "prompt"),  # the same content twice
    ("ia3", "lora"),
    ("lora", "ia3"),
    ("ia3", "other_lora"),  # both on one module: its input scaled before or after the update
    ("other_lora", "ia3"),
    ("lora", "other_ia3"),
    ("other_ia3", "lora"),
    ("ia3", "other_ia3"),
    ("lora", "other_lora"),
    ("lora", "lora"),
    ("prompt", "lora"),  # the task's virtual tokens run under the user's deltas
    ("ia3", "prefix"),
    ("lora", "prompt"),
    ("one_prompt", "other_lora"),
    ("dora", "lora"),
    ("lora", "dora"),  # it adds its difference from the base
    ("ia3", "dora"),
    ("adalora", "vera"),
    ("vera", "vera"),
    ("prompt", "vera"),
]
PROMPTS = ([5], [9, 8, 7, 6], [random.Random(1).randrange(3, VOCABULARY) for _ in range(19)])


@pytest.mark.parametrize(
    ("page_size", "num_pages", "max_batch_tokens"), [(16, 200, 512), (4, 26, 17)], ids=["roomy", "preempting"]
)
def test_a_stacks_adapters_apply_in_order_in_a_mixed_batch(
    base: FrozenBase, tasks: dict[str, Path], page_size: int, num_pages: int, max_batch_tokens: int
) -> None:
    expected = {
        f"{'+'.join(names)}/{index}": slow_generate(
            tiny_base(ARCHITECTURE), [tasks[name] for name in names], prompt, MAX_TOKENS
        )
        for names in STACKS
        for index, prompt in enumerate(PROMPTS)
    }
    engine = make_engine(base, page_size=page_size, num_pages=num_pages, max_batch_tokens=max_batch_tokens)
    requests = [
        request(f"{'+'.join(names)}/{index}", prompt, greedy(MAX_TOKENS), *(tasks[name] for name in names))
        for names in STACKS
        for index, prompt in enumerate(PROMPTS)
    ]
    outcome = run(engine, requests, random.Random(3))
    engine.close()
    left_out = sum(assert_same(outcome.results[name], alone, name) for name, alone in expected.items())
    assert left_out <= len(expected) * MAX_TOKENS // 20
    assert len({tuple(alone.tokens) for alone in expected.values()}) > len(STACKS) * 2, "the stacks answer alike"
    assert (outcome.preemptions > 0) == (num_pages < 100)


def test_the_order_of_a_stack_matters(base: FrozenBase, tasks: dict[str, Path]) -> None:
    engine = make_engine(base)
    stacks = {"ab": ("ia3", "lora"), "ba": ("lora", "ia3"), "pq": ("prompt", "p_tuning"), "qp": ("p_tuning", "prompt")}
    requests = [request(key, PROMPTS[1], greedy(8), *(tasks[name] for name in names)) for key, names in stacks.items()]
    results = run(engine, requests).results
    engine.close()
    assert results["ab"].tokens != results["ba"].tokens
    assert results["pq"].tokens != results["qp"].tokens


def test_one_adapter_in_stacks_of_different_depth_and_place_in_one_step(
    base: FrozenBase, tasks: dict[str, Path]
) -> None:
    """Rows of one adapter are not neighbours then, and it stands on two levels at once."""
    stacks = [("lora",), ("ia3", "lora"), (), ("lora", "ia3"), ("other_lora",), ("lora", "lora"), ("other_ia3", "lora")]
    alone = [
        slow_generate(tiny_base(ARCHITECTURE), [tasks[name] for name in names], PROMPTS[1], MAX_TOKENS)
        for names in stacks
    ]
    engine = make_engine(base)
    requests = [
        request(str(index), PROMPTS[1], greedy(MAX_TOKENS), *(tasks[name] for name in names))
        for index, names in enumerate(stacks)
    ]
    load_first(engine, requests)
    outcome = run(engine, requests)
    engine.close()
    assert max(step.rows for step in outcome.steps) == len(stacks)
    for index, expected in enumerate(alone):
        assert_same(outcome.results[str(index)], expected, "+".join(stacks[index]))


@pytest.mark.parametrize("sizes", [(16, 100), (4, 100), (4, 9), (1, 60)], ids=str)
def test_an_empty_prompt_continues_from_the_last_virtual_token(
    base: FrozenBase, tasks: dict[str, Path], sizes: tuple[int, int]
) -> None:
    stacks = [("prompt",), ("page_prompt",), ("one_prompt",), ("prefix", "prompt"), ("prompt", "lora"), ("p_tuning",)]
    alone = [
        slow_generate(tiny_base(ARCHITECTURE), [tasks[name] for name in names], [], MAX_TOKENS) for names in stacks
    ]
    engine = make_engine(base, page_size=sizes[0], num_pages=sizes[1], max_batch_tokens=16)
    outcome = run(
        engine,
        [
            request(f"{index}/{copy}", [], greedy(MAX_TOKENS), *(tasks[name] for name in names))
            for index, names in enumerate(stacks)
            for copy in range(2)
        ],
    )
    engine.close()
    for index, expected in enumerate(alone):
        for copy in range(2):
            assert_same(outcome.results[f"{index}/{copy}"], expected, "+".join(stacks[index]))


def test_an_empty_prompt_without_a_soft_prompt_at_its_end_is_refused(base: FrozenBase, tasks: dict[str, Path]) -> None:
    engine = make_engine(base)
    stacks = {"base": (), "prefix": ("prefix",), "prompt+prefix": ("prompt", "prefix"), "lora": ("lora",)}
    requests = [request(key, [], greedy(3), *(tasks[name] for name in names)) for key, names in stacks.items()]
    results = run(engine, requests).results
    engine.close()
    for result in results.values():
        assert result.failed is not None
        assert result.failed.code == "empty_prompt"
        assert result.ends == 1
