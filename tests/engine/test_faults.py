"""Laws 1 and 6: the base is frozen, a fault stays with its owner, and every sequence has exactly one end."""

from __future__ import annotations

import hashlib
import random
import time
from pathlib import Path

import pytest

from server.engine.engine import Engine
from server.engine.protocol import Generate
from server.model import FrozenBase
from tests.harness import Result, Run, collect, greedy, make_engine, request, run
from tests.reference.bases import VOCABULARY

METHODS = ("prompt", "prefix", "ia3", "lora", "p_tuning")


def _weights(base: FrozenBase) -> str:
    """A hash of every parameter and buffer."""
    whole = hashlib.sha256()
    for name, tensor in [*base.model.named_parameters(), *base.model.named_buffers()]:
        plain = tensor.to_dense() if tensor.is_mkldnn else tensor
        whole.update(name.encode() + plain.detach().numpy().tobytes())
    return whole.hexdigest()


def _good(tasks: dict[str, Path], max_tokens: int = 8) -> list[Generate]:
    return [request(name, [5, 6, 7], greedy(max_tokens), tasks[name]) for name in METHODS] + [
        request("base", [5, 6, 7], greedy(max_tokens))
    ]


def _assert_unharmed(outcome: Run, alone: Run) -> None:
    """The good ones answer as without the others."""
    for name, expected in alone.results.items():
        result = outcome.results[name]
        assert result.failed is None
        assert result.tokens == expected.tokens, name
        assert [token.chosen for token in result.logprobs] == pytest.approx(
            [token.chosen for token in expected.logprobs], abs=1e-4
        )


def _lost_pages(engine: Engine) -> int:
    """Pages that are lost: neither free nor idle in the cache, though nobody has them."""
    return engine.scheduler.pages.capacity - engine.scheduler.cache.available


def test_frozen_no_run_changes_a_base_weight(
    base: FrozenBase, tasks: dict[str, Path], overflowing: dict[str, Path], tmp_path: Path
) -> None:
    before = _weights(base)
    engine = make_engine(base, num_pages=30, max_batch_tokens=20)
    bad = [request(f"bad {name}", [3, 4], greedy(6), folder) for name, folder in overflowing.items()]
    bad += [request("missing", [3], greedy(6), tmp_path / "nothing"), request("long", [3] * 200, greedy(6))]
    stacks = [request("stack", [3, 4], greedy(6), tasks["ia3"], tasks["lora"])]
    outcome = run(engine, _good(tasks) + bad + stacks, random.Random(1))
    engine.close()
    assert sum(result.failed is not None for result in outcome.results.values()) == len(bad)
    assert _weights(base) == before


def test_an_adapter_whose_outputs_are_not_finite_fails_alone(
    base: FrozenBase, tasks: dict[str, Path], overflowing: dict[str, Path]
) -> None:
    alone = run(make_engine(base), _good(tasks))
    engine = make_engine(base)
    bad = [request(f"bad {name}", [5, 6, 7], greedy(8), folder) for name, folder in overflowing.items()]
    outcome = run(engine, bad[:1] + _good(tasks) + bad[1:])
    engine.close()
    for item in bad:
        failed = outcome.results[item.id].failed
        assert failed is not None, item.id
        assert failed.code == "not_finite_logits"
        assert outcome.results[item.id].ends == 1
    _assert_unharmed(outcome, alone)


def test_pages_that_held_values_that_are_not_finite_harm_no_later_owner(
    base: FrozenBase, tasks: dict[str, Path], overflowing: dict[str, Path]
) -> None:
    alone = run(make_engine(base), _good(tasks))
    engine = make_engine(base, num_pages=20, page_size=8)
    for name, folder in overflowing.items():  # each fills most of the pool
        poison = run(engine, [request(f"{name} {index}", [5] * 25, greedy(4), folder) for index in range(4)])
        assert all(result.failed is not None for result in poison.results.values())
    outcome = run(engine, _good(tasks))
    _assert_unharmed(outcome, alone)
    assert _lost_pages(engine) == 0
    engine.close()


def test_a_prompt_scored_without_new_tokens_fails_too_when_it_is_not_finite(
    base: FrozenBase, overflowing: dict[str, Path]
) -> None:
    engine = make_engine(base)
    sampling = greedy(0, prompt_logprobs_from=0)
    outcome = run(engine, [request("bad", [5, 6, 7, 8], sampling, overflowing["lora"])])
    engine.close()
    failed = outcome.results["bad"].failed
    assert failed is not None
    assert failed.code == "not_finite_logits"
    assert outcome.results["bad"].ends == 1


def test_an_abort_frees_row_pages_and_adapters_before_the_next_step(base: FrozenBase, tasks: dict[str, Path]) -> None:
    engine = make_engine(base)
    results = {item.id: Result() for item in _good(tasks, 50)}
    for item in _good(tasks, 50):
        engine.add(item)
    for _ in range(100):
        if len(engine.scheduler.running) < len(results):
            collect(engine, results)
            time.sleep(0.001)
    assert len(engine.scheduler.running) == len(results)
    kept = "lora"
    for name in results:
        if name != kept:
            engine.abort(name)
    assert [sequence.id for sequence in engine.scheduler.running] == [kept]
    assert [resident.holders for resident in engine.bank._residents.values() if resident.holders] == [1]
    told = {name: list(result.tokens) for name, result in results.items()}
    stats = collect(engine, results)
    assert stats.rows == 1
    assert all(results[name].tokens == tokens for name, tokens in told.items() if name != kept)
    engine.abort(kept)
    engine.abort("never seen")
    assert not engine.has_work
    assert _lost_pages(engine) == 0
    assert not any(resident.holders for resident in engine.bank._residents.values())
    engine.close()


def test_a_sequence_aborted_while_its_adapter_loads_leaves_nothing_behind(
    base: FrozenBase, tasks: dict[str, Path]
) -> None:
    engine = make_engine(base)
    engine.add(request("x", [5], greedy(5), tasks["lora"]))
    engine.step()
    engine.abort("x")
    if engine.has_work:  # the load has just ended
        engine.step()
    assert not engine.has_work
    assert engine.bank.waiting == 0
    assert len(run(engine, [request("y", [5], greedy(5), tasks["lora"])]).results["y"].tokens) == 5
    engine.close()


def test_a_deadline_ends_running_and_waiting_sequences(base: FrozenBase, tasks: dict[str, Path]) -> None:
    engine = make_engine(base, max_seqs=1)
    overdue = time.time() - 1
    requests = [
        request("running", [5], greedy(30), deadline=time.time() + 0.05),
        request("waiting", [5], greedy(30), deadline=overdue),
        request("loading", [5], greedy(30), tasks["lora"], deadline=overdue),
        request("fine", [5], greedy(3)),
    ]
    results = {item.id: Result() for item in requests}
    engine.add(requests[0])
    collect(engine, results)
    assert results["running"].tokens
    time.sleep(0.06)
    for item in requests[1:]:
        engine.add(item)
    while engine.has_work:
        collect(engine, results)
    for name in ("running", "waiting", "loading"):
        failed = results[name].failed
        assert failed is not None
        assert failed.code == "deadline_exceeded"
        assert results[name].ends == 1
    assert len(results["fine"].tokens) == 3
    assert _lost_pages(engine) == 0
    engine.close()


def test_a_full_queue_refuses_one_more_at_once(base: FrozenBase, tasks: dict[str, Path]) -> None:
    engine = make_engine(base, max_queue=3, max_seqs=1)
    stacks: list[list[Path]] = [[], [tasks["lora"]], [], [tasks["lora"]]]
    requests = [request(str(index), [5], greedy(2), *stack) for index, stack in enumerate(stacks)]
    results = {item.id: Result() for item in requests}
    for item in requests:
        engine.add(item)
    collect(engine, results)
    failed = results["3"].failed
    assert failed is not None
    assert failed.code == "queue_full"
    while engine.has_work:
        collect(engine, results)
    assert [result.ends for result in results.values()] == [1] * 4
    assert [len(result.tokens) for result in results.values()] == [2, 2, 2, 0]
    engine.close()


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "names", "fits"),
    [
        (100, 28, (), True),
        (100, 29, (), False),
        (128, 0, (), True),
        (129, 0, (), False),
        (100, 23, ("prompt",), True),
        (100, 24, ("prompt",), False),
        (95, 21, ("prefix", "prompt"), False),
    ],
)
def test_virtual_prompt_and_new_tokens_together_keep_to_the_models_length(
    base: FrozenBase, tasks: dict[str, Path], prompt: int, max_tokens: int, names: tuple[str, ...], fits: bool
) -> None:
    engine = make_engine(base)
    item = request("x", [5] * prompt, greedy(max_tokens), *(tasks[name] for name in names))
    if names == ("prefix", "prompt"):
        item = request("x", [5] * (prompt + 2), greedy(max_tokens), *(tasks[name] for name in names))
    result = run(engine, [item]).results["x"]
    engine.close()
    if fits:
        assert result.finish_reason == "length"
        assert len(result.tokens) == max_tokens
    else:
        assert result.failed is not None
        assert result.failed.code == "context_length_exceeded"


@pytest.mark.parametrize("stack", [(), ("prompt",), ("page_prompt",), ("prefix",)], ids=str)
@pytest.mark.parametrize("prompt", [0, 1, 9], ids=str)
def test_a_sequence_either_fits_the_pages_alone_or_is_refused_at_the_edge(
    base: FrozenBase, tasks: dict[str, Path], stack: tuple[str, ...], prompt: int
) -> None:
    ends = []
    for num_pages in range(2, 12):
        engine = make_engine(base, num_pages=num_pages, page_size=4, max_batch_tokens=16)
        results = {"x": Result()}
        engine.add(request("x", [5] * prompt, greedy(6), *(tasks[name] for name in stack)))
        for _ in range(200):
            if engine.has_work:
                assert collect(engine, results).preemptions == 0
                if engine.must_wait:
                    time.sleep(0.001)
        engine.close()
        assert results["x"].ends == 1, f"{num_pages} pages: no end"
        failed = results["x"].failed
        ends.append(failed.code if failed else "served")
    if prompt or stack in (("prompt",), ("page_prompt",)):
        refused = ends.count("context_length_exceeded")
        assert 0 < refused < len(ends)
        assert ends == ["context_length_exceeded"] * refused + ["served"] * (len(ends) - refused)
    else:
        assert "served" not in ends


def test_random_workloads_with_aborts_and_tiny_pools_end_everything_once(
    base: FrozenBase, tasks: dict[str, Path], overflowing: dict[str, Path]
) -> None:
    rng = random.Random(11)
    choices = [[], *([folder] for folder in tasks.values()), *([folder] for folder in overflowing.values())]
    choices += [[tasks["prompt"], tasks["lora"]], [tasks["ia3"], tasks["prefix"]], [tasks["prompt"], tasks["prompt"]]]
    for workload in range(6):
        engine = make_engine(
            base,
            num_pages=rng.randint(5, 30),
            page_size=rng.choice([1, 3, 4, 16]),
            max_seqs=(seqs := rng.randint(1, 8)),
            max_batch_tokens=seqs + rng.randint(0, 20),
            adapter_bytes=rng.choice([6_000, 20_000, 10**9]),
        )
        pending = [
            request(
                f"{workload}.{index}",
                [rng.randrange(VOCABULARY) for _ in range(rng.randint(0, 30))],
                greedy(
                    rng.randint(0, 12),
                    temperature=rng.choice([0.0, 1.0]),
                    seed=index,
                    ignore_eos=rng.random() < 0.5,
                    prompt_logprobs_from=rng.choice([None, None, 0, 4]),
                ),
                *rng.choice(choices),
            )
            for index in range(30)
        ]
        results = {item.id: Result() for item in pending}
        aborted: set[str] = set()
        for _ in range(3000):
            if pending and rng.random() < 0.6:
                engine.add(pending.pop())
            if rng.random() < 0.05:
                victim = rng.choice(list(results))
                if any(item.id == victim for item in pending) or results[victim].ends:
                    continue
                engine.abort(victim)
                aborted.add(victim)
            if engine.has_work:
                collect(engine, results)
                if engine.must_wait:
                    time.sleep(0.001)
        assert not engine.has_work, f"workload {workload} does not end"
        for name, result in results.items():
            assert result.ends == (0 if name in aborted and result.ends == 0 else 1), name
        assert _lost_pages(engine) == 0
        assert not any(resident.holders for resident in engine.bank._residents.values())
        assert not engine._sequences
        assert not engine._tickets
        engine.close()
