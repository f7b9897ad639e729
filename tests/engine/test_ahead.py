"""Steps that are planned while the one before is under way: law 2 for them, and nothing is lost where they do not come.

A device that computes behind the host's back is what they are for; here it is only said that there is one.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from server.engine.engine import Engine
from server.engine.pages import PagePool
from server.engine.protocol import Generate, Sampling
from server.engine.scheduler import Schedule, Scheduler
from server.engine.sequence import Sequence
from server.model import FrozenBase
from tests.harness import Result, greedy, make_engine, request, run
from tests.reference.bases import VOCABULARY

STACKS: list[tuple[str, ...]] = [(), ("prompt",), ("prefix",), ("ia3",), ("lora",), ("other_lora", "ia3"), ("lora",)]


def _requests(tasks: dict[str, Path], seed: int) -> list[Generate]:
    rng = random.Random(seed)
    requests = []
    for index in range(24):
        names = STACKS[index % len(STACKS)]
        prompt = [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, 12))]
        changes = {"temperature": 1.0, "seed": index} if rng.random() < 0.5 else {}
        stops = {"stop_token_ids": [rng.randrange(VOCABULARY) for _ in range(3)]}
        sampling = greedy(rng.randint(1, 30), **changes, **stops)
        requests.append(request(str(index), prompt, sampling, *(tasks[name] for name in names)))
    return requests


def _look_ahead(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Let an engine plan ahead; of each plan whether it was used."""
    engine._runner.returns_early = True
    used: list[bool] = []
    confirm = engine.scheduler.confirm

    def noting(ahead: Schedule) -> bool:
        used.append(confirm(ahead))
        return used[-1]

    monkeypatch.setattr(engine.scheduler, "confirm", noting)
    return used


def _results(engine: Engine, requests: list[Generate]) -> dict[str, Result]:
    results = run(engine, requests, random.Random(5)).results
    assert engine.scheduler.pages.used == engine.scheduler.cache.num_idle, "pages that nobody has are free"
    engine.close()
    return results


@pytest.mark.parametrize("is_padded", [False, True], ids=["ordinary", "padded"])
@pytest.mark.parametrize("is_compiled", [False, True], ids=["gathered", "compiled"])
@pytest.mark.parametrize(("num_pages", "max_seqs"), [(256, 24), (60, 11)], ids=["roomy", "preempting"])
def test_steps_planned_ahead_answer_as_others(
    base: FrozenBase,
    tasks: dict[str, Path],
    num_pages: int,
    max_seqs: int,
    is_compiled: bool,
    is_padded: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not is_compiled:
        monkeypatch.setattr(base, "kernels", None)
    requests = _requests(tasks, num_pages)
    expected = _results(make_engine(base, num_pages=num_pages, max_seqs=max_seqs), requests)
    engine = make_engine(base, num_pages=num_pages, max_seqs=max_seqs)
    for layer in engine._runner._cache.layers:
        layer[:, 1:-1] = torch.nan  # what is read before it is written, or zeroed, shows
    if is_padded:
        engine._runner.pad_decode_steps()
        engine._batches = engine._runner.batch_builder()
    used = _look_ahead(engine, monkeypatch)
    results = _results(engine, requests)
    for name, result in expected.items():
        assert (results[name].tokens, results[name].finish_reason) == (result.tokens, result.finish_reason)
        for given, wanted in zip(results[name].logprobs, result.logprobs, strict=True):
            assert abs(given.chosen - wanted.chosen) < 1e-3
    assert used.count(True) >= 3
    assert used.count(False) >= 3


def test_a_sequence_that_is_aborted_after_the_plan_leaves_the_others_right(
    base: FrozenBase, tasks: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = [request(str(at), [5, 6, 7 + at], greedy(12), tasks["lora"]) for at in range(4)]
    expected = _results(make_engine(base), requests)
    engine = make_engine(base)
    used = _look_ahead(engine, monkeypatch)
    for each in requests:
        engine.add(each)
    tokens: dict[str, list[int]] = {each.id: [] for each in requests}
    while engine.has_work:
        for answer in engine.step().tokens:
            tokens[answer.id] += answer.token_ids
        if engine._ahead is not None and engine.scheduler.running[2].id == "2":
            engine.abort("2")
    engine.close()
    assert used.count(False) >= 1
    assert len(tokens.pop("2")) < 12
    assert tokens == {name: expected[name].tokens for name in tokens}


def test_a_plan_goes_with_the_last_of_its_sequences(base: FrozenBase, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(base)
    _look_ahead(engine, monkeypatch)
    engine.add(request("one", [5, 6], greedy(12)))
    engine.step()
    assert engine._ahead is not None
    engine.abort("one")
    engine.close()
    assert engine._ahead is None, "an idle server keeps nobody's prompt"


def _sequence(name: str, prompt: int, max_tokens: int = 99) -> Sequence:
    return Sequence(
        Generate(id=name, prompt=list(range(prompt)), sampling=Sampling(max_tokens=max_tokens), deadline=0.0)
    )


def _scheduler(num_pages: int = 20) -> Scheduler:
    return Scheduler(PagePool(num_pages, 4), max_seqs=8, max_batch_tokens=64, max_prefill_tokens=64)


def test_a_plan_takes_pages_and_counts_nothing_until_it_is_confirmed() -> None:
    scheduler = _scheduler()
    one, two = _sequence("one", 4), _sequence("two", 2)
    scheduler.add(one)
    scheduler.add(two)
    step = scheduler.schedule()
    ahead = scheduler.plan_ahead(step)
    assert ahead is not None
    assert [(row.run.id, row.start, row.count) for row in ahead if isinstance(row.run, Sequence)] == [
        ("one", 4, 1),
        ("two", 2, 1),
    ]
    assert [len(each.block_table) for each in (one, two)] == [2, 1]
    assert [each.num_computed for each in (one, two)] == [4, 2]
    one.output.append(7)
    two.output.append(8)
    assert scheduler.confirm(ahead)
    assert [each.num_computed for each in (one, two)] == [5, 3]
    assert [each.num_charged for each in (one, two)] == [5, 3]


def test_pages_that_fill_up_in_planned_steps_are_shared() -> None:
    scheduler = _scheduler()
    one = _sequence("one", 4)
    scheduler.add(one)
    step = scheduler.schedule()
    for token in range(50, 54):
        ahead = scheduler.plan_ahead(step)
        assert ahead is not None
        one.output.append(token)
        assert scheduler.confirm(ahead)
        step = ahead
    assert [node.key for node in one.text_nodes] == [(0, 1, 2, 3), (50, 51, 52, 53)]


def test_pages_of_a_plan_that_did_not_come_are_zeroed_in_the_step_that_does() -> None:
    scheduler = _scheduler()
    one = _sequence("one", 4)
    scheduler.add(one)
    ahead = scheduler.plan_ahead(scheduler.schedule())
    assert ahead is not None
    (page,) = ahead.fresh_pages
    one.output.append(7)
    scheduler.add(_sequence("two", 2))
    assert not scheduler.confirm(ahead)
    assert one.num_computed == 4
    step = scheduler.schedule()
    assert page in step.fresh_pages
    assert [row.start for row in step.rows[one]] == [4]
    assert page not in scheduler.schedule().fresh_pages


def test_who_waits_for_a_row_does_not_keep_the_others_from_being_planned() -> None:
    scheduler = Scheduler(PagePool(20, 4), max_seqs=1, max_batch_tokens=64, max_prefill_tokens=64)
    one = _sequence("one", 4)
    scheduler.add(one)
    step = scheduler.schedule()
    scheduler.add(_sequence("two", 2))
    ahead = scheduler.plan_ahead(step)
    assert ahead is not None
    one.output.append(7)
    assert scheduler.confirm(ahead)


@pytest.mark.parametrize("why", ["somebody waits", "a prompt goes on", "the last token", "no pages"])
def test_what_is_not_certain_is_not_planned(why: str) -> None:
    scheduler = _scheduler(num_pages=4 if why == "no pages" else 20)
    if why == "no pages":
        scheduler.add(_sequence("all of them", 8))
    if why == "a prompt goes on":
        scheduler.add(_sequence("long", 70))
    else:
        scheduler.add(_sequence("one", 4, max_tokens=1 if why == "the last token" else 99))
    step = scheduler.schedule()
    if why == "somebody waits":
        scheduler.add(_sequence("two", 2))
    held = scheduler.pages.used
    assert scheduler.plan_ahead(step) is None
    assert scheduler.pages.used == held
