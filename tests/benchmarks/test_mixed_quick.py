"""The benchmark's smoke test: it runs, finds both systems right, and prints every row. No figure is looked at."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.adapters import write_adapters
from benchmarks.agreement import DisagreementError, check
from benchmarks.bases import SIZES, BaseSize
from benchmarks.medley import Medley
from benchmarks.mixed import app
from benchmarks.peft_peer import PeftPeer
from benchmarks.workload import Workload

ROWS = ["base only", "4 × prompt tuning", "4 × prefix tuning", "4 × (IA)³", "4 × LoRA r=8 on q, v", "4 of all methods"]
RATE = r"\d+\.\d"


@pytest.fixture(autouse=True)
def _reference_library_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_quick_mode_prints_every_row_with_both_systems_rates() -> None:
    outcome = CliRunner().invoke(app, ["--quick"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    assert "greedy tokens equal those of PEFT alone" in outcome.output
    for row in ROWS:
        # task │ Medley │ ÷ base │ cached virtual / text │ PEFT │ way │ ratio
        line = rf"{re.escape(row)} +│ +{RATE} │ +\d+\.\d+ │ +\d+ / 0 │ +{RATE} │ [^│]+│ +\d+\.\d\d │"
        assert re.search(line, outcome.output), f"{row} is missing in:\n{outcome.output}"


def test_an_unknown_size_is_refused_with_the_known_ones() -> None:
    outcome = CliRunner().invoke(app, ["--size", "huge"])
    assert outcome.exit_code == 2
    assert "'huge' is no base size" in outcome.output


def test_a_size_may_be_given_by_its_widths() -> None:
    assert BaseSize.parse("768x12x12x8192") == SIZES["large"]


def test_wrong_answers_stop_the_benchmark_before_any_timing(tmp_path: Path) -> None:
    workload = Workload(SIZES["tiny"], requests=8, prompt_tokens=8, new_tokens=4, virtual_tokens=5, tasks=2)
    tasks = write_adapters(workload, tmp_path)
    peer = PeftPeer(workload, tasks)
    with Medley(workload, num_prefixes=8) as medley:
        with torch.no_grad():
            medley.engine.base.model.model.norm.weight[::2] = -1
        with pytest.raises(DisagreementError, match=r"Medley gives .* for base only"):
            check(workload, medley, peer, tasks)
