"""The benchmarks of the engine as smoke tests: they run and print every figure. No figure's value is looked at, but
for those that are counted rather than timed."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import long_prompts, many, memory, shared, small

FIGURES = {
    "many": (
        many.app,
        [
            *(f"{method}: uniform among 30 ÷ 16 tasks" for method in ("prompt tuning", "(IA)³", "LoRA r=8 on q, v")),
            *(f"{method}: zipf 1.1 among 60 ÷ 16 tasks" for method in ("prompt tuning", "(IA)³", "LoRA r=8 on q, v")),
            "lookup, 60 ÷ 100 tasks registered",
            "publication, 60 ÷ 100 tasks registered",
        ],
    ),
    "small": (small.app, ["outside products and attention, 8 rows", "1 row: products alone ÷ step"]),
    "long_prompts": (
        long_prompts.app,
        [
            "longest gap of a stream ÷ step of a full chunk, worst round",
            "longest gap of a stream ÷ step of a full chunk, median round",
            "step of a full chunk ÷ decode step",
            "first token beside the streams ÷ alone",
            "step of short rows and a long one ÷ the sum of each apart",
        ],
    ),
    "shared": (shared.app, ["hit rate: one beginning, served before", "rate: a chat each, second turn ÷ all fresh"]),
    "memory": (memory.app, ["growth over 16 LoRAs ÷ their tensors", "start-up: peak ÷ the weights and one layer"]),
}
COUNTED = {  # what does not depend on the machine, as printed
    "many": [],
    "small": [],
    "long_prompts": [],
    "shared": [
        r"pages in use ÷ the prefix once and each request's own +│ +1\.?0* × │",
        r"hit rate: all fresh +│ +0\.?0* of",
        r"hit rate: one beginning, served before +│ +0\.857\d? of",  # 48 of 56 tokens, three pages
    ],
    "memory": [
        r"a prefix's pages while it runs ÷ its positions' +│ +1\.?0* × │",
        r"the same while it is idle +│ +1\.?0* × │",
        r"all pages given to another once it is idle +│ +1\.?0* of",
        r"overload: fullest bank ÷ its setting +│ [^│]+│ +≤ 1 │ +reached",
        r"overload: fullest KV cache ÷ its setting +│ [^│]+│ +≤ 1 │ +reached",
    ],
}


@pytest.fixture(autouse=True)
def _reference_library_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", FIGURES)
def test_quick_mode_prints_every_figure(name: str) -> None:
    app, figures = FIGURES[name]
    output = _output(app)
    for figure in figures:
        assert re.search(rf"{re.escape(figure)} +│ +-?\d", output), f"{figure} is missing in:\n{output}"
    for pattern in COUNTED[name]:
        assert re.search(pattern, output), f"{pattern} is missing in:\n{output}"


@pytest.mark.parametrize(("worst", "verdict"), [(2.0, "reached"), (2.1, "not reached")])
def test_one_round_in_which_a_stream_waits_too_long_is_too_much(worst: float, verdict: str) -> None:
    mixed = [_arrival(gap) for gap in (1.2, 1.2, worst, 1.2, 1.2)]
    steps = {name: [1.0] * 5 for name in ("short", "fewer", "together", "long")}
    figures = long_prompts.figures({"mixed": mixed, "alone": [_arrival(0.0)] * 5}, steps)
    [judged, median_round] = [figure for figure in figures if figure.name.startswith("longest gap")]
    assert (judged.value, judged.target, judged.verdict) == (worst, long_prompts.GAP, verdict)
    assert (median_round.value, median_round.target) == (1.2, None)


def _arrival(gap: float) -> long_prompts.Arrival:
    return long_prompts.Arrival(decode=1.0, gap=gap, first_token=1.0, chunk=1.0, chunk_tokens=1, cached_text=0)


def _output(app: typer.Typer) -> str:
    outcome = CliRunner().invoke(app, ["--quick"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return outcome.output
