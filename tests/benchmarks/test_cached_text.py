"""A benchmark whose fresh prompts come from the cache, or whose known beginnings do not, ends without figures."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import fairness, long_prompts, many, medley, mixed
from benchmarks.inprocess import drive
from benchmarks.workload import CachedTextError, Run, Workload, check_cached, check_fresh

LENGTH = 24  # of prompts: a whole page and more
LONG = 400
SMALL = ("--size", "tiny", "--prompt", f"{LENGTH}", "--rounds", "1")
OPTIONS: dict[str, tuple[typer.Typer, tuple[str, ...]]] = {
    "mixed": (mixed.app, ("--requests", "4", "--new", "2", "--tasks", "4")),
    "many": (many.app, ("--registered", "20", "--resident", "16", "--requests", "4", "--new", "2", "--virtual", "5")),
    "long_prompts": (long_prompts.app, ("--streams", "2", "--long", f"{LONG}", "--steps", "2")),
    "fairness": (fairness.app, ("--new", "8", "--max-seqs", "5", "--waves", "12")),
}


@pytest.fixture(autouse=True)
def _reference_library_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _run(name: str) -> str:
    app, options = OPTIONS[name]
    outcome = CliRunner().invoke(app, [*SMALL, *options], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


@pytest.mark.parametrize(
    ("name", "stale", "row"),
    [
        ("mixed", LENGTH, "base only"),
        ("many", LENGTH, "prompt tuning: zipf 1.1 among 20"),
        ("long_prompts", LENGTH, "mixed"),  # the streams'
        ("long_prompts", LONG, "alone"),
        ("fairness", LENGTH, "client 1"),
    ],
)
def test_a_benchmark_whose_prompts_were_seen_before_fails(
    name: str, stale: int, row: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = Workload.prompt

    def prompt(workload: Workload, numbers: random.Random) -> list[int]:
        return [7] * stale if workload.prompt_tokens == stale else fresh(workload, numbers)

    monkeypatch.setattr(Workload, "prompt", prompt)
    with pytest.raises(CachedTextError, match=rf"{re.escape(row)}: [1-9]\d*, not 0"):
        _run(name)


def test_known_beginnings_that_are_computed_again_fail_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_cache(*given: Any) -> Run:
        return replace(drive(*given), cached_text=0)

    monkeypatch.setattr(medley, "drive", without_cache)
    beside = "base after 4 cached texts of 32 tokens"
    with pytest.raises(
        CachedTextError, match=rf" {beside}: 0, not 128; .*{beside}, beside 4 × prompt tuning: 0, not 128"
    ):
        _run("mixed")


def test_cached_text_is_to_be_as_much_as_is_known() -> None:
    check_cached({"row": [0, 0], "other": [16, 16]}, {"other": 16})
    with pytest.raises(CachedTextError, match=r": row: 0 16, not 0; other: 16 32, not 16$"):
        check_cached({"row": [0, 16], "other": [16, 32], "third": [8, 8]}, {"other": 16, "third": 8})


def test_prompts_that_come_from_a_cache_are_no_result() -> None:
    check_fresh({"row": [0, 0]})
    with pytest.raises(CachedTextError, match=r": other: 0 16, not 0$"):
        check_fresh({"row": [0, 0], "other": [0, 16]})
