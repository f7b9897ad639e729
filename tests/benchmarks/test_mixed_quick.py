"""`benchmarks.mixed` as a smoke test: it runs, finds both systems right, prints every row. No rate is looked at."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.adapters import LORA, METHODS, PREFIX, PROMPT, write_adapters
from benchmarks.agreement import DisagreementError, check
from benchmarks.bases import SIZES, BaseSize
from benchmarks.medley import Medley
from benchmarks.mixed import BASE, app, cached_texts, mixes
from benchmarks.peft_peer import PeftPeer
from benchmarks.workload import Task, Workload

RATE = r"\d+\.\d"
AFTER_TEXT = "base after 4 cached texts of 32 tokens"
CACHED = {  # of 8 requests, by row: virtual tokens / text of the row and of what it is compared with
    BASE: ("0 / 0", "–"),
    AFTER_TEXT: ("0 / 256", "0 / 0"),
    "4 × prompt tuning": ("264 / 0", "0 / 256"),
    "4 × prefix tuning": ("264 / 0", "0 / 256"),
    "4 × (IA)³": ("0 / 0", "0 / 0"),
    "4 of these three": ("198 / 0", "0 / 192"),
    "4 × LoRA r=8 on q, v": ("0 / 0", "0 / 0"),
    "4 of all methods": ("132 / 0", "0 / 128"),
    "8 distinct LoRAs": ("0 / 0", "0 / 0"),
    "one LoRA for all": ("0 / 0", "0 / 0"),
}
WORKLOAD = Workload(SIZES["tiny"], requests=8, prompt_tokens=8, new_tokens=4, virtual_tokens=20, tasks=4)


@pytest.fixture(autouse=True)
def _reference_library_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_quick_mode_prints_every_row_and_serves_from_cache_only_what_it_says() -> None:
    outcome = CliRunner().invoke(app, ["--quick"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    for row, (cached, beside) in CACHED.items():
        # task │ Medley │ cached virtual / text │ distinct │ beside │ its cached │
        line = rf"{re.escape(row)} +│ +{RATE} │ +{cached} │ +\d+ │ +({RATE}|–) │ +{beside} │"
        assert re.search(line, outcome.output), f"{row} is missing in:\n{outcome.output}"
    assert "Medley ÷ PEFT" not in outcome.output, "it was not asked for"


def test_with_peft_both_systems_are_checked_and_compared() -> None:
    outcome = CliRunner().invoke(app, ["--quick", "--peft"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    assert "greedy tokens equal those of PEFT alone" in outcome.output
    for method in METHODS:
        line = rf"4 × {re.escape(method)}: Medley ÷ PEFT +│ +{RATE}"
        assert re.search(line, outcome.output), f"{method} is missing in:\n{outcome.output}"


@pytest.mark.parametrize("options", [["--quick", "--save"], ["--save", "--quick"]])
def test_a_smoke_test_is_never_saved(options: list[str]) -> None:
    outcome = CliRunner().invoke(app, options)
    assert outcome.exit_code == 2
    assert "smoke test" in outcome.output


def test_an_unknown_size_is_refused_with_the_known_ones() -> None:
    outcome = CliRunner().invoke(app, ["--size", "huge"])
    assert outcome.exit_code == 2
    assert "'huge' is no base size" in outcome.output


def test_a_size_may_be_given_by_its_widths() -> None:
    assert BaseSize.parse("768x12x12x8192") == SIZES["large"]


def test_each_row_has_as_many_tasks_as_it_says_and_is_compared_with_the_base() -> None:
    tasks = {method: [Task(method, f"{method} {index}", Path(f"{index}")) for index in range(4)] for method in METHODS}
    loras = [Task(LORA, f"variant {index}", Path(f"v{index}")) for index in range(8)]
    for mix in mixes(WORKLOAD, tasks, loras):
        count = re.match(r"\d+", mix.title)
        assert len({task.name for task in mix.tasks}) == (int(count[0]) if count else len(mix.tasks))
        assert (mix.beside is None) == (mix.title == BASE)
        assert mix.beside is None or not mix.beside.tasks
        if mix.beside is not None and any(mix.beside.beginnings):  # as many texts as rows with virtual tokens
            virtual = [task.name for task in mix.tasks if task.method in (PROMPT, PREFIX)]
            assert len([text for text in mix.beside.beginnings if text]) == len(virtual)


@pytest.mark.parametrize(("virtual", "length"), [(16, 16), (20, 16), (31, 16), (32, 32)])
def test_cached_texts_are_whole_pages_never_longer_than_a_soft_prompt_and_one_for_each_task(
    virtual: int, length: int
) -> None:
    texts = cached_texts(replace(WORKLOAD, virtual_tokens=virtual))
    assert [len(text) for text in texts] == [length] * WORKLOAD.tasks
    assert len(set(map(tuple, texts))) == WORKLOAD.tasks


def test_wrong_answers_stop_the_benchmark_before_any_timing(tmp_path: Path) -> None:
    workload = Workload(SIZES["tiny"], requests=8, prompt_tokens=8, new_tokens=4, virtual_tokens=5, tasks=2)
    tasks = write_adapters(workload, tmp_path)
    peer = PeftPeer(workload, tasks)
    with Medley(workload, num_prefixes=8) as medley:
        with torch.no_grad():
            medley.engine.base.model.model.norm.weight[::2] = -1
        with pytest.raises(DisagreementError, match=r"Medley gives .* for base only"):
            check(workload, medley, peer, tasks)
