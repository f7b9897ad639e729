"""`benchmarks.index` as a smoke test: its synthetic records are the real ones, and every figure is printed."""

from __future__ import annotations

import re

from typer.testing import CliRunner

from benchmarks.index import app


def test_it_prints_every_figure() -> None:
    outcome = CliRunner().invoke(app, ["--quick"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    calls = (
        "list a user's 100",
        "find a customization",
        "not held",
        "answer, held",
        "list 100 tasks",
        "resolve a task",
    )
    for figure in ("memory of a customization", *calls):
        assert re.search(rf"{figure}[^│]*│[^│]+│ +≤ \d+ │ +(not )?reached", outcome.output), outcome.output
    for figure in ("load of a mirror", "a collection of garbage", "its longest hold"):
        assert re.search(rf"{figure}[^│]*│ +[\d.]+ (s|ms) │", outcome.output), outcome.output
    memory = re.search(r"memory of a customization[^│]*│ +([\d.]+) B", outcome.output)
    assert memory is not None
    assert 200 < float(memory[1]) < 500
