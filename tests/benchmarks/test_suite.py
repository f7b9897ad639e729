"""`python -m benchmarks` and the benchmarks that it runs. No figure is looked at."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import base, http
from benchmarks.__main__ import SUITE, command


@pytest.fixture(autouse=True)
def _reference_library_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("name", SUITE)
def test_every_benchmark_of_the_set_takes_the_options_that_it_is_given(name: str) -> None:
    app = typer.main.get_command(importlib.import_module(f"benchmarks.{name}").app)
    known = {option for parameter in app.params for option in parameter.opts}
    assert {*(option for option in SUITE[name] if option.startswith("--")), "--quick", "--save"} <= known


def test_quick_runs_are_not_saved_and_only_base_is_told_of_vllm() -> None:
    assert "--save" not in command("http", None, quick=True)
    assert command("http", Path("env"), quick=False)[-1] == "--save"
    assert command("base", Path("env"), quick=False)[-2:] == ["--vllm", "env"]


def test_base_in_quick_mode_prints_every_row_and_says_what_it_skips() -> None:
    outcome = CliRunner().invoke(base.app, ["--quick"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    assert "equal those of PEFT alone" in outcome.output
    assert "vLLM is skipped" in outcome.output
    rows = [base.LINEAR, base.WITH_ATTENTION, base.IN_PROCESS, base.HF, base.MEDLEY, base.MEDLEY + base.MIXED]
    for row in rows:
        assert re.search(rf"{re.escape(row)} +│ +\d+\.\d │", outcome.output), f"{row} is missing in:\n{outcome.output}"
    assert base.VLLM not in outcome.output
    verdict = rf"{re.escape(base.IN_PROCESS)} ÷ {re.escape(base.LINEAR)} +│ +\d\.\d+ × │ +≥ 0\.9 │ +(not )?reached"
    assert re.search(verdict, outcome.output), outcome.output


def test_http_in_quick_mode_prints_every_case_and_figure() -> None:
    outcome = CliRunner().invoke(http.app, ["--quick"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    for row in ("in-process", "8 requests over HTTP, streamed", "8 requests over HTTP, answered whole", "1 request of"):
        assert re.search(rf"{re.escape(row)}[^│]*│ +\d+\.\d │ +\d+\.\d\d │ +\d+ │", outcome.output), outcome.output
    for figure in ("8 streams over HTTP ÷ in-process", "start to ready", "an idle server"):
        assert re.search(rf"{re.escape(figure)}[^│]*│[^│]+│ +[≥≤] [\d.]+ │ +(not )?reached", outcome.output), (
            outcome.output
        )
