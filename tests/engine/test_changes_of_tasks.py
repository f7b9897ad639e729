"""What happens to tasks while they are served: another content under their name, removal, more of them than fit."""

from __future__ import annotations

import random
import shutil
import warnings
from pathlib import Path

import pytest
from peft import LoraConfig, PeftModel

from server.adapters import Checkpoint, read_adapter
from server.engine.engine import Engine
from server.model import FrozenBase
from tests.engine.conftest import ARCHITECTURE
from tests.harness import Alone, Result, alone, assert_same, collect, greedy, make_engine, request, run
from tests.reference.adapters import CAUSAL, save_adapter
from tests.reference.bases import tiny_base

MAX_TOKENS = 12
PROMPT = [5, 9, 33, 12]
NUM_EQUAL = 5  # adapters of one size


@pytest.fixture(scope="module")
def equal(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, Alone]]:
    """LoRAs of one size, and what each answers alone."""
    root = tmp_path_factory.mktemp("equal")
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference library's, about this tiny base
        for seed in range(NUM_EQUAL):
            config = LoraConfig(task_type=CAUSAL, r=4, target_modules=["q_proj", "down_proj"])
            save_adapter(tiny_base(ARCHITECTURE), config, root / str(seed), seed)
            model = PeftModel.from_pretrained(tiny_base(ARCHITECTURE), root / str(seed)).eval()
            found.append((root / str(seed), alone(model, PROMPT, MAX_TOKENS)))
    return found


def _drain(engine: Engine, results: dict[str, Result]) -> None:
    while engine.has_work:
        collect(engine, results)


def test_one_more_adapter_than_the_bank_has_places_for_and_each_answers_as_alone(
    base: FrozenBase, equal: list[tuple[Path, Alone]]
) -> None:
    size = read_adapter(Checkpoint.open(equal[0][0], base.dtype), base.shape).bytes
    engine = make_engine(base, adapter_bytes=(NUM_EQUAL - 1) * size, max_seqs=NUM_EQUAL)
    loads = 0
    for copy in range(3):
        requests = [
            request(f"{index}/{copy}", PROMPT, greedy(MAX_TOKENS), folder) for index, (folder, _) in enumerate(equal)
        ]
        outcome = run(engine, requests, random.Random(copy))
        for index, (_, expected) in enumerate(equal):
            assert_same(outcome.results[f"{index}/{copy}"], expected, str(index))
        assert max(step.bank_adapters for step in outcome.steps) == NUM_EQUAL - 1
        loads += sum(len(step.load_seconds) for step in outcome.steps)
    engine.close()
    assert loads > NUM_EQUAL, "none of them had to come again"


def test_new_content_under_a_tasks_name_serves_new_requests_while_old_ones_end_on_the_old(
    base: FrozenBase, equal: list[tuple[Path, Alone]]
) -> None:
    """A version's content is its address: the engine sees another digest."""
    (old, before), (new, after) = equal[:2]
    engine = make_engine(base)
    results = {name: Result() for name in ("old", "new", "old again")}
    engine.add(request("old", PROMPT, greedy(MAX_TOKENS), old))
    while len(results["old"].tokens) < 3:
        collect(engine, results)
    engine.add(request("new", PROMPT, greedy(MAX_TOKENS), new))
    engine.add(request("old again", PROMPT, greedy(MAX_TOKENS), old))
    _drain(engine, results)
    engine.close()
    assert before.tokens != after.tokens
    for name, expected in (("old", before), ("new", after), ("old again", before)):
        assert_same(results[name], expected, name)


def test_a_task_that_is_removed_while_it_generates_generates_to_its_end(
    base: FrozenBase, equal: list[tuple[Path, Alone]], tmp_path: Path
) -> None:
    """Preempted or crowded by others, its files gone: what a request holds never leaves."""
    folder, expected = equal[0]
    removed = Path(shutil.copytree(folder, tmp_path / "removed"))
    size = read_adapter(Checkpoint.open(folder, base.dtype), base.shape).bytes
    engine = make_engine(base, adapter_bytes=2 * size, num_pages=8, max_seqs=3)
    results = {"removed": Result(), **{str(index): Result() for index in range(1, NUM_EQUAL)}}
    engine.add(request("removed", PROMPT, greedy(MAX_TOKENS), removed))
    while not results["removed"].tokens:
        collect(engine, results)
    shutil.rmtree(removed)
    for index, (other, _) in enumerate(equal[1:], 1):
        engine.add(request(str(index), PROMPT, greedy(MAX_TOKENS), other))
    _drain(engine, results)
    engine.close()
    assert_same(results["removed"], expected, "removed")
    for index, (_, alone_answer) in enumerate(equal[1:], 1):
        assert_same(results[str(index)], alone_answer, str(index))
