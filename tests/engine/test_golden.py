"""Law 2 on a pretrained base: PEFT's own answers, recorded once, in one engine."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest

from server.model import FrozenBase
from tests.harness import greedy, load_first, make_engine, request, run

_VARIABLE = "MEDLEY_TEST_DATA"

pytestmark = pytest.mark.skipif(
    _VARIABLE not in os.environ, reason=f"{_VARIABLE} is unset: no folder with stories260k/ and stories260k_adapters/"
)


@pytest.fixture(scope="module")
def data() -> Path:
    return Path(os.environ[_VARIABLE])


@pytest.fixture(scope="module")
def base(data: Path) -> FrozenBase:
    return FrozenBase.load(data / "stories260k", device="cpu", dtype="float32", max_model_len=None)


@pytest.fixture(scope="module")
def golden(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / "stories260k_adapters" / "golden.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("page_size", "num_pages", "max_batch_tokens", "must_preempt"),
    [(16, 300, 512, False), (4, 130, 24, True), (7, 60, 19, True)],
    ids=["roomy", "preempting", "odd-pages"],
)
def test_recorded_answers_of_a_pretrained_base_come_out_of_one_mixed_engine(
    data: Path,
    base: FrozenBase,
    golden: list[dict[str, Any]],
    page_size: int,
    num_pages: int,
    max_batch_tokens: int,
    must_preempt: bool,
) -> None:
    assert len(golden) == 45
    engine = make_engine(base, page_size=page_size, num_pages=num_pages, max_batch_tokens=max_batch_tokens)
    requests = [
        request(
            str(index),
            line["prompt_ids"],
            greedy(len(line["output_ids"])),
            *([data / "stories260k_adapters" / line["adapter"]] if line["adapter"] else []),
        )
        for index, line in enumerate(golden)
    ]
    load_first(engine, requests)
    outcome = run(engine, requests, random.Random(page_size))
    engine.close()
    for index, line in enumerate(golden):
        result = outcome.results[str(index)]
        assert result.tokens == line["output_ids"], line["adapter"]
        assert [token.chosen for token in result.logprobs] == pytest.approx(line["logprobs"], abs=1e-3)
    assert max(step.adapters for step in outcome.steps) > 4, "the tasks were not mixed"
    assert (outcome.preemptions > 0) == must_preempt
