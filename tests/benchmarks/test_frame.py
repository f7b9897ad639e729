"""The frame that every benchmark reports through."""

from __future__ import annotations

import io
import json
import random
import shutil
import subprocess
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from benchmarks import frame
from benchmarks.frame import Case, Figure, Report, Table, Target, alternate, commit, machine, ratio


def _cases(seen: list[tuple[str, float]], *names: str, prompts: str | None = None) -> list[Case[float]]:
    def measure(name: str, numbers: random.Random) -> float:
        seen.append((name, numbers.random()))
        return float(len(seen))

    return [Case(name, lambda numbers, name=name: measure(name, numbers), prompts) for name in names]  # type: ignore[misc]


def test_every_round_runs_every_case_from_another_one_on_and_the_first_is_not_counted() -> None:
    seen: list[tuple[str, float]] = []
    measured = alternate(_cases(seen, "a", "b"), rounds=2)
    assert [name for name, _ in seen] == ["a", "b", "b", "a", "a", "b"]
    assert measured == {"a": [4.0, 5.0], "b": [3.0, 6.0]}


def test_cases_have_numbers_of_their_own_which_are_fresh_in_each_round() -> None:
    seen: list[tuple[str, float]] = []
    alternate(_cases(seen, "a", "b"), rounds=3)
    assert len({number for _, number in seen}) == len(seen) == 8


def test_cases_that_share_prompts_have_the_same_numbers_in_a_round() -> None:
    seen: list[tuple[str, float]] = []
    alternate(_cases(seen, "a", "b", prompts="both"), rounds=2)
    numbers = [number for _, number in seen]
    assert numbers[0::2] == numbers[1::2]  # round by round, whichever comes first
    assert len(set(numbers)) == 3


def test_another_run_has_the_same_numbers() -> None:
    runs: list[list[tuple[str, float]]] = [[], []]
    for seen in runs:
        alternate(_cases(seen, "a"), rounds=1)
    assert runs[0] == runs[1]


def test_a_ratio_compares_within_rounds_before_it_takes_the_median() -> None:
    # The machine halves its speed after the first round; each round says 2 all the same.
    assert ratio([4.0, 8.0, 8.0], [2.0, 4.0, 4.0]) == 2.0
    assert ratio([1.0, 2.0, 9.0], [1.0, 1.0, 1.0]) == 2.0


@pytest.mark.parametrize(
    ("rounds", "busy", "warnings"),
    [(None, 0.0, 0), (5, frame.IDLE, 0), (4, 0.0, 1), (5, 0.11, 1), (1, 1.0, 2)],
)
def test_few_rounds_and_a_busy_machine_are_warned_of_in_print_and_file(
    rounds: int | None, busy: float, warnings: int, tmp_path: Path
) -> None:
    report = Report("trial", "A trial", [], {"busy": busy}, rounds=rounds)
    out = io.StringIO()
    report.print(Console(file=out, width=150))
    assert out.getvalue().count("warning: ") == warnings
    assert len(json.loads(report.write(tmp_path).read_text("utf-8"))["warnings"]) == warnings


def test_who_saves_waits_for_an_idle_machine_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([40.0, 30.0, 5.0])
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: next(looks))
    frame.await_idle()
    assert next(looks, None) is None
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 40.0)
    monkeypatch.setattr(frame, "_PATIENCE_SECONDS", 0.0)
    frame.await_idle()


@pytest.fixture
def no_repository_above(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))


def _git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=somebody", "-c", "user.email=somebody@example.org", "-c", "commit.gpgsign=false")
    return subprocess.run(
        ["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
@pytest.mark.usefixtures("no_repository_above")
def test_the_commit_is_told_and_whether_the_code_differs_from_it(tmp_path: Path) -> None:
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    code, saved = tmp_path / "code.py", results / "one.json"
    code.write_text("1")
    saved.write_text("1")
    _git(tmp_path, "init")
    assert commit(tmp_path) is None, "nothing is committed"
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "--message", "first")
    head = _git(tmp_path, "rev-parse", "--short", "HEAD")
    assert commit(tmp_path) == head
    saved.write_text("2")
    assert commit(tmp_path) == head, "what an earlier benchmark saved is no change of the code"
    code.write_text("2")
    assert commit(tmp_path) == f"{head}-dirty"
    _git(tmp_path, "add", ".")
    assert commit(tmp_path) == f"{head}-dirty"


@pytest.mark.usefixtures("no_repository_above")
def test_where_there_is_no_checkout_or_no_git_there_is_no_commit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert commit(tmp_path) is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path) is None


@pytest.mark.parametrize("code", ["1f2e3d4-dirty", None])
def test_the_machines_facts_say_of_which_commit_the_code_is(code: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame, "commit", lambda root: code if (root / "benchmarks" / "frame.py").is_file() else "wrong")
    facts = machine()
    assert facts.get("commit", None) == code
    assert ("commit" in facts) == (code is not None)
    out = io.StringIO()
    Report("trial", "A trial", [], facts).print(Console(file=out, width=300))
    assert ("commit 1f2e3d4-dirty" in out.getvalue()) == (code is not None)


@pytest.mark.parametrize(
    ("value", "target", "verdict"),
    [
        (0.95, Target(0.95), "reached"),
        (0.9499, Target(0.95), "not reached"),
        (10.0, Target(10, at_most=True), "reached"),
        (10.01, Target(10, at_most=True), "not reached"),
        (1.0, None, "–"),
    ],
)
def test_the_verdict_looks_at_the_unrounded_value(value: float, target: Target | None, verdict: str) -> None:
    assert Figure("a figure", value, target=target).verdict == verdict


def _report() -> Report:
    figures = [Figure("speed", 0.5, target=Target(0.9)), Figure("start", 3.0, "s", Target(10, at_most=True))]
    details = Table("details", ("system", "tokens/s"), [("Medley", "12.5")], "a caption")
    return Report("trial", "A trial", figures, machine(), [details], ["something was skipped"], "python -m trial")


def test_a_report_prints_command_machine_details_notes_and_figures() -> None:
    out = io.StringIO()
    _report().print(Console(file=out, width=150))
    for text in ("python -m trial", "torch", "12.5", "a caption", "something was skipped", "0.500 ×", "≥ 0.9"):
        assert text in out.getvalue()
    assert "not reached" in out.getvalue()


def test_a_saved_report_has_all_of_it_and_replaces_the_one_before(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    for _ in range(2):
        path = _report().write(folder)
    assert [each.name for each in folder.iterdir()] == ["trial.json"]
    content = json.loads(path.read_text("utf-8"))
    assert content["command"] == "python -m trial"
    assert content["machine"].keys() >= {"date", "processor", "cores", "torch", "python", "load"}
    assert content["tables"][0]["rows"] == [["Medley", "12.5"]]
    assert [figure["verdict"] for figure in content["figures"]] == ["not reached", "reached"]
    assert content["figures"][1] == {
        "name": "start",
        "value": 3.0,
        "unit": "s",
        "target": {"bound": 10, "at_most": True},
        "verdict": "reached",
    }
