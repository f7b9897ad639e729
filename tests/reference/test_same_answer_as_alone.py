"""Law 2, for every architecture and every method: the same answer as alone.

The reference is PEFT generating one request at a time without padding. Against it all requests of all adapters
run at once, in random order of arrival, with small pages and chunks and so few pages that sequences are
preempted.
"""

from __future__ import annotations

import random
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
from peft import PeftModel

from server.model import FrozenBase
from tests.harness import Alone, alone, assert_same, greedy, load_first, make_engine, request, run
from tests.reference.adapters import configs, save_adapter
from tests.reference.bases import ARCHITECTURES, VOCABULARY, tiny_base

MAX_TOKENS = 14
PROMPT_LENGTHS = (1, 4, 23)


@dataclass
class Case:
    """One request with its reference."""

    name: str
    folder: Path | None
    prompt: list[int]
    expected: Alone


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def cases(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Case]]:
    """An architecture, and what its base and all adapters answer alone."""
    architecture: str = request.param
    random_prompts = random.Random(5)
    prompts = [[random_prompts.randrange(3, VOCABULARY) for _ in range(length)] for length in PROMPT_LENGTHS]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference library's, about these tiny bases
        return architecture, _cases(architecture, prompts, tmp_path_factory)


def _cases(architecture: str, prompts: list[list[int]], folders: pytest.TempPathFactory) -> list[Case]:
    base = tiny_base(architecture)
    cases = [
        Case(f"base/{index}", None, prompt, alone(base, prompt, MAX_TOKENS)) for index, prompt in enumerate(prompts)
    ]
    for seed, (name, config) in enumerate(configs(architecture).items()):
        folder = folders.mktemp(f"{architecture}-{name}")
        save_adapter(tiny_base(architecture), config(), folder, seed)
        model = PeftModel.from_pretrained(tiny_base(architecture), folder).eval()
        for index, prompt in enumerate(prompts):
            cases.append(Case(f"{name}/{index}", folder, prompt, alone(model, prompt, MAX_TOKENS)))
    return cases


@pytest.mark.parametrize(
    ("page_size", "num_pages", "max_batch_tokens", "must_preempt"),
    [(16, 200, 512, False), (4, 40, 24, True), (3, 48, 17, True)],
    ids=["roomy", "preempting", "odd-pages"],
)
def test_same_answer_as_alone(
    cases: tuple[str, list[Case]], page_size: int, num_pages: int, max_batch_tokens: int, must_preempt: bool
) -> None:
    architecture, expected = cases
    base = FrozenBase(tiny_base(architecture))
    engine = make_engine(base, page_size=page_size, num_pages=num_pages, max_batch_tokens=max_batch_tokens, max_seqs=14)
    requests = [
        request(case.name, case.prompt, greedy(MAX_TOKENS), *([case.folder] if case.folder else []))
        for case in expected
    ]
    load_first(engine, requests)
    outcome = run(engine, requests, random.Random(page_size))
    engine.close()
    left_out = sum(assert_same(outcome.results[case.name], case.expected, case.name) for case in expected)
    assert left_out <= len(expected) * MAX_TOKENS // 20, "too many steps near a tie to say that the answers agree"
    assert (outcome.preemptions > 0) == must_preempt
    assert max(step.adapters for step in outcome.steps) > 3, "the methods were not mixed"


def test_the_methods_change_the_answers(cases: tuple[str, list[Case]]) -> None:
    """Else the reference would prove nothing."""
    _, expected = cases
    answers = {tuple(case.expected.tokens) for case in expected if len(case.prompt) == PROMPT_LENGTHS[1]}
    assert len(answers) > 7
