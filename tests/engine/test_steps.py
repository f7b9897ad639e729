"""What a crowd, preemption, chunking and sharing must not show: seeds, streams, prompt scores and prefix pages."""

from __future__ import annotations

import random
from collections.abc import Sequence as Items
from pathlib import Path

import pytest
import torch

from server.engine.engine import Engine
from server.engine.protocol import Generate
from server.model import FrozenBase
from tests.engine.conftest import ARCHITECTURE
from tests.harness import Result, collect, greedy, make_engine, request, run
from tests.reference.bases import VOCABULARY, tiny_base

_RANDOM = random.Random(2)
PROMPT = [_RANDOM.randrange(3, VOCABULARY) for _ in range(29)]


def _run_all(engine: Engine, requests: Items[Generate]) -> dict[str, Result]:
    results = run(engine, requests).results
    engine.close()
    return results


def test_a_seeded_request_draws_the_same_tokens_alone_in_a_crowd_and_preempted(
    base: FrozenBase, tasks: dict[str, Path]
) -> None:
    names = ["prompt", "prefix", "ia3", "lora", None]
    requests = [
        request(
            f"{name}/{choice}",
            PROMPT[:7],
            greedy(14, temperature=1.3, top_p=0.9, seed=5),
            *([tasks[name]] if name else []),
            choice=choice,
        )
        for name in names
        for choice in range(2)
    ]
    alone = {item.id: _run_all(make_engine(base), [item])[item.id].tokens for item in requests}
    crowd = _run_all(make_engine(base), requests)
    engine = make_engine(base, num_pages=24, max_batch_tokens=17)
    outcome = run(engine, requests, random.Random(0))
    engine.close()
    assert outcome.preemptions > 0
    for name, tokens in alone.items():
        assert crowd[name].tokens == tokens
        assert outcome.results[name].tokens == tokens
    assert len({tuple(tokens) for tokens in alone.values()}) == len(requests), "the choices are alike"


def test_a_running_stream_gets_a_token_in_every_step_while_a_long_prompt_is_chunked(base: FrozenBase) -> None:
    engine = make_engine(base, max_seqs=4, max_batch_tokens=6)
    results = {"stream": Result(), "long": Result()}
    engine.add(request("stream", [5], greedy(40)))
    collect(engine, results)
    engine.add(request("long", PROMPT, greedy(4)))
    steps = 0
    while not results["long"].tokens:
        before = len(results["stream"].tokens)
        collect(engine, results)
        steps += 1
        assert len(results["stream"].tokens) == before + 1
    assert steps == 6  # 29 positions, 5 a step
    engine.close()


def test_a_stream_never_waits_for_a_long_prefix_either(base: FrozenBase, tasks: dict[str, Path]) -> None:
    engine = make_engine(base, max_seqs=4, max_batch_tokens=6)
    results = {"stream": Result(), "task": Result()}
    engine.add(request("stream", [5], greedy(60)))
    collect(engine, results)
    engine.add(request("task", [5, 6], greedy(4), tasks["very_long_prompt"]))
    told = []
    while not results["task"].tokens:
        before = len(results["stream"].tokens)
        told.append(collect(engine, results).virtual_tokens)
        assert len(results["stream"].tokens) == before + 1
    assert sum(told) == 30
    assert max(told) == 5
    engine.close()


@pytest.mark.parametrize(
    ("num_pages", "max_batch_tokens"), [(200, 512), (200, 8), (22, 16)], ids=["whole", "chunks", "preempted"]
)
def test_prompt_log_probabilities_are_those_of_a_full_forward(
    base: FrozenBase, num_pages: int, max_batch_tokens: int
) -> None:
    prompts = {"long": PROMPT, "short": PROMPT[:3], "one": PROMPT[:1]}
    model = tiny_base(ARCHITECTURE)
    engine = make_engine(base, num_pages=num_pages, max_batch_tokens=max_batch_tokens, max_seqs=8)
    sampling = greedy(9, prompt_logprobs_from=0, logprobs=3)
    others = [request(f"other {index}", PROMPT[:9], greedy(20)) for index in range(4)]
    requests = [request(name, prompt, sampling) for name, prompt in prompts.items()]
    requests += [request(f"{name} only", prompt, greedy(0, prompt_logprobs_from=0)) for name, prompt in prompts.items()]
    outcome = run(engine, others + requests)
    engine.close()
    assert (outcome.preemptions > 0) == (num_pages < 100)
    for name, prompt in prompts.items():
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        for result in (outcome.results[name], outcome.results[f"{name} only"]):
            scores = result.prompt_logprobs
            assert scores is not None
            assert len(scores) == len(prompt)
            assert scores[0] is None
            for index, score in enumerate(scores[1:]):
                assert score is not None
                assert score.chosen == pytest.approx(float(expected[index, prompt[index + 1]]), abs=1e-3)
        alternatives = outcome.results[name].prompt_logprobs or []
        for index, score in enumerate(alternatives[1:]):
            assert score is not None
            assert list(score.top) == expected[index].topk(3).indices.tolist()
        assert len(outcome.results[name].tokens) == 9
        assert outcome.results[f"{name} only"].tokens == []
        assert outcome.results[f"{name} only"].finish_reason == "length"


def test_an_empty_prompt_has_no_prompt_log_probabilities(base: FrozenBase, tasks: dict[str, Path]) -> None:
    results = _run_all(make_engine(base), [request("x", [], greedy(2, prompt_logprobs_from=0), tasks["prompt"])])
    assert not results["x"].prompt_logprobs
    assert len(results["x"].tokens) == 2


def test_prefix_pages_are_held_once_for_64_sequences_and_given_up_when_idle(
    base: FrozenBase, tasks: dict[str, Path]
) -> None:
    engine = make_engine(base, max_seqs=64, max_batch_tokens=600, num_pages=300)
    requests = [request(str(index), [5 + index], greedy(3), tasks["page_prompt"]) for index in range(64)]
    results = {item.id: Result() for item in requests}
    for item in requests:
        engine.add(item)
    stats = collect(engine, results)
    while not stats.rows:  # the adapter is being loaded
        stats = collect(engine, results)
    assert stats.kv_pages_used == 8 // 4 + 64
    assert stats.virtual_tokens == 8
    while engine.has_work:
        stats = collect(engine, results)
    assert (stats.kv_pages_used, stats.kv_pages_idle) == (0, 2)  # the prefix
    engine.scheduler.cache.take(299)
    assert engine.scheduler.cache.num_idle == 0
    assert len({tuple(result.tokens) for result in results.values()}) > 10
    engine.close()


def test_end_of_sequence_and_stop_ids_end_a_sequence_and_are_not_among_its_tokens(base: FrozenBase) -> None:
    free = _run_all(make_engine(base), [request("x", PROMPT[:4], greedy(12))])["x"].tokens
    stop = free[5]
    first = free.index(stop)
    results = _run_all(
        make_engine(base),
        [
            request("stop", PROMPT[:4], greedy(12, stop_token_ids=(stop,))),
            request("late", PROMPT[:4], greedy(12, stop_token_ids=(stop,), min_tokens=first + 1)),
        ],
    )
    assert results["stop"].tokens == free[:first]
    assert results["stop"].finish_reason == "stop"
    assert results["stop"].stop_token == stop
    assert results["late"].tokens[:first] == free[:first]
    assert len(results["late"].tokens) > first
    assert stop not in results["late"].tokens


def test_ignore_eos_lets_the_end_of_sequence_token_appear_and_go_on(base: FrozenBase) -> None:
    end = base.eos_token_ids[0]
    bias = {end: 1000.0}
    results = _run_all(
        make_engine(base),
        [
            request("ends", [5], greedy(5, ignore_eos=False, logit_bias=bias)),
            request("goes on", [5], greedy(5, logit_bias=bias)),
            request("not yet", [5], greedy(5, logit_bias=bias, min_tokens=3)),
            request("two, then end", [5], greedy(5, ignore_eos=False, logit_bias=bias, min_tokens=2)),
        ],
    )
    assert results["ends"].tokens == []
    assert (results["ends"].finish_reason, results["ends"].stop_token) == ("stop", end)
    assert results["goes on"].tokens == [end] * 5
    assert results["goes on"].finish_reason == "length"
    assert end not in results["not yet"].tokens[:3]
    assert results["not yet"].tokens[3:] == [end] * 2
    assert len(results["two, then end"].tokens) == 2
    assert results["two, then end"].finish_reason == "stop"
