"""Choices scored for an input: as a full forward pass of each alone, with the input run once for all of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from server.engine.engine import Engine
from server.engine.protocol import Generate
from server.engine.scheduler import PROMPT_LOGPROB_CHUNK
from server.model import FrozenBase
from tests.engine.conftest import ARCHITECTURE
from tests.engine.world import Arrival, Stack, make_world, own_text, scheduled
from tests.harness import Result, greedy, make_engine, request, run
from tests.reference.bases import VOCABULARY, tiny_base

_RANDOM = random.Random(3)
INPUT = [_RANDOM.randrange(3, VOCABULARY) for _ in range(18)]
CHOICES = [[5], [6], [5, 6], [5, 6, 7], [5, 6, 7, 8, 9, 10, 11, 12, 13], [9] * 4]
METHODS = (None, "prompt", "page_prompt", "long_prompt", "p_tuning", "prefix", "ia3", "lora")


@pytest.fixture(scope="module")
def expected(tasks: dict[str, Path]) -> dict[tuple[str | None, int], list[float]]:
    """Per method and choice: each token's log-probability, by a forward pass of input and choice alone."""
    found = {}
    for method in METHODS:
        model = tiny_base(ARCHITECTURE)
        if method is not None:
            model = PeftModel.from_pretrained(model, tasks[method]).eval()
        for index, choice in enumerate(CHOICES):
            text = torch.tensor([INPUT + choice])
            with torch.inference_mode():
                logits = model(input_ids=text, attention_mask=torch.ones_like(text)).logits[0]
            before = logits[-len(choice) - 1 : -1].log_softmax(-1)
            found[method, index] = before[range(len(choice)), choice].tolist()
    return found


@pytest.fixture
def engine(base: FrozenBase) -> Iterator[Engine]:
    engine = make_engine(base, max_seqs=64)
    yield engine
    engine.close()


def _scoring(name: str, prompt: list[int], choice: list[int], *folders: Path) -> Generate:
    sampling = greedy(0, logprobs=None, prompt_logprobs_from=len(prompt))
    return request(name, prompt + choice, sampling, *folders)


def _scores(result: Result) -> list[float]:
    assert result.ends == 1
    assert result.failed is None
    assert result.finish_reason == "length"
    assert result.prompt_logprobs is not None
    return [score.chosen for score in result.prompt_logprobs if score is not None]


@pytest.mark.parametrize(
    ("page_size", "num_pages", "max_batch_tokens", "max_prefill_tokens"),
    [(4, 900, 2000, 2000), (1, 3000, 80, 40), (3, 900, 70, 11), (4, 45, 70, 30), (16, 60, 200, 64)],
    ids=["whole", "slots", "chunks", "few-pages", "large-pages"],
)
def test_choices_of_every_method_score_as_alone_when_they_come_and_when_they_come_again(
    base: FrozenBase,
    tasks: dict[str, Path],
    expected: dict[tuple[str | None, int], list[float]],
    page_size: int,
    num_pages: int,
    max_batch_tokens: int,
    max_prefill_tokens: int,
) -> None:
    engine = make_engine(
        base,
        max_seqs=64,
        page_size=page_size,
        num_pages=num_pages,
        max_batch_tokens=max_batch_tokens,
        max_prefill_tokens=max_prefill_tokens,
    )
    for seed in range(2):
        requests = [
            _scoring(f"{method}/{index}", INPUT, CHOICES[index], *([tasks[method]] if method else []))
            for method, index in expected
        ]
        streams = [request(f"stream {index}", INPUT[: 9 + index], greedy(12)) for index in range(3)]
        outcome = run(engine, requests + streams, random.Random(seed))
        for (method, index), logprobs in expected.items():
            assert _scores(outcome.results[f"{method}/{index}"]) == pytest.approx(logprobs, abs=1e-3)
    engine.close()
    assert engine.scheduler.cache.available == num_pages - 1


def test_scores_do_not_depend_on_what_else_is_scored(base: FrozenBase, tasks: dict[str, Path]) -> None:
    prompts = [INPUT, INPUT[:16], INPUT[:5], INPUT[:1], [*INPUT[:17], 4]]
    for folders in ([], [tasks["prompt"]], [tasks["prefix"], tasks["lora"]]):
        requests = [
            _scoring(f"{at}/{index}", prompt, choice, *folders)
            for at, prompt in enumerate(prompts)
            for index, choice in enumerate(CHOICES)
        ]
        engine = make_engine(base, max_seqs=7, num_pages=300)
        results = run(engine, requests, random.Random(1)).results
        engine.close()
        for item in requests[::4]:
            fresh = make_engine(base)
            alone = run(fresh, [item]).results[item.id]
            fresh.close()
            assert _scores(results[item.id]) == pytest.approx(_scores(alone), abs=1e-4)


def test_choices_behind_a_soft_prompt_alone_score_as_alone(base: FrozenBase, tasks: dict[str, Path]) -> None:
    stacks = {
        "prompt": [tasks["prompt"]],  # it ends in the midst of a page
        "page_prompt": [tasks["page_prompt"]],  # and at the end of one
        "long_prompt": [tasks["long_prompt"]],
    }
    for pages, tokens in ((300, 2000), (40, 12)):
        engine = make_engine(base, max_seqs=64, page_size=4, num_pages=pages, max_batch_tokens=max(tokens, 64))
        requests = [
            _scoring(f"{name}/{index}/{time}", [], choice, *stack)
            for time in range(2)
            for name, stack in stacks.items()
            for index, choice in enumerate(CHOICES)
        ]
        outcome = run(engine, requests, random.Random(tokens))
        engine.close()
        assert engine.scheduler.cache.available == pages - 1
        for name, stack in stacks.items():
            model = PeftModel.from_pretrained(tiny_base(ARCHITECTURE), stack[0]).eval()
            for index, choice in enumerate(CHOICES):
                text = torch.tensor([choice])
                with torch.inference_mode():
                    logits = model(input_ids=text, attention_mask=torch.ones_like(text)).logits[0]
                expected = logits[-len(choice) - 1 : -1].log_softmax(-1)[range(len(choice)), choice].tolist()
                for time in range(2):
                    scores = _scores(outcome.results[f"{name}/{index}/{time}"])
                    assert scores == pytest.approx(expected, abs=1e-3)
    results = run(make_engine(base), [_scoring("prefix", [], [5, 6], tasks["prefix"])]).results
    assert results["prefix"].prompt_logprobs is not None
    assert results["prefix"].prompt_logprobs[0] is None, "nothing predicts it"


def test_300_choices_run_their_input_once(engine: Engine) -> None:
    choices = [[3 + index % 90, 5 + index // 90] for index in range(300)]
    requests = [_scoring(str(index), INPUT, choice) for index, choice in enumerate(choices)]
    outcome = run(engine, requests)
    scores = [_scores(outcome.results[item.id]) for item in requests]
    assert all(len(score) == 2 for score in scores)
    for index in range(90):  # those that share their first token
        firsts = [score[0] for score in scores[index::90]]
        assert firsts == pytest.approx([firsts[0]] * len(firsts), abs=1e-4)
    # The first step runs the input's last, partly filled page for each choice that starts in it; after that only three
    # positions of each remain: the input's last, whose logits are needed, and the choice's two.
    first, *_ = outcome.steps
    assert first.prefill_tokens == len(INPUT) + 2 + (first.rows - 1) * 4
    assert sum(step.prefill_tokens for step in outcome.steps) == first.prefill_tokens + 3 * (300 - first.rows)


def test_a_page_that_a_choice_began_in_is_left_to_the_next_choices() -> None:
    world = make_world(100, 4, 8, 200)
    text = own_text(0, 12)  # positions 8 to 10 of the third page are the input's that need no logits

    def choice(name: str, *tokens: int) -> dict[str, int]:
        sequence = Arrival(0, (*text, *tokens), 0, Stack(()), scored_from=12).sequence(name)
        world.scheduler.add(sequence)
        schedule = world.step()
        world.scheduler.remove(sequence)
        world.check_ownership()
        return {run.id: sum(row.count for row in schedule.rows[run]) for run in scheduled(schedule)}

    assert choice("first", 1, 2, 3, 4, 5, 6) == {"first": 18}
    assert choice("second", 7) == {"second": 2}
    assert choice("third", 1, 2, 3, 4, 5, 6) == {"third": 7}
    assert sum(len(node.pages) for node in world.nodes()) == 3, "nothing of the choices is kept"


def test_a_step_has_no_more_logits_of_prompts_than_its_limit() -> None:
    world = make_world(400, 4, 8, 2000)
    sequences = [
        Arrival(0, own_text(index, 300), 0, Stack(()), scored_from=1).sequence(str(index)) for index in range(4)
    ]
    for sequence in sequences:
        world.scheduler.add(sequence)
    wanted = []
    while sequences:
        running = scheduled(world.step())
        counts = [sequence.num_computed - sequence.first_logit for sequence in running]
        wanted.append(sum(counts))
        for sequence, count in zip(running, counts, strict=True):
            sequence.prompt_logprobs += [None] * count
            if not sequence.num_remaining:
                world.scheduler.remove(sequence)
                sequences.remove(sequence)
    assert max(wanted) == PROMPT_LOGPROB_CHUNK
    assert sum(wanted) >= 4 * 299
