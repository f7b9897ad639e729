"""The benchmark of huge pages' smoke test: both kinds are measured and compared. Here in this process, for the
libraries take longer to load than all the rest."""

from __future__ import annotations

import re
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import huge_pages
from benchmarks.workload import Workload


def _here(workload: Workload, threads: int | None, is_moved: bool, _: Any) -> huge_pages.Measured:
    return huge_pages.measure(workload, threads, is_moved=is_moved)


def test_quick_mode_prints_both_kinds_and_their_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_apart", _here)
    outcome = CliRunner().invoke(huge_pages.app, ["--quick"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    for kind in ("as it came", "moved"):
        assert re.search(rf"│ {kind} +│ +[\d.]+ \(", outcome.output)
    assert len(re.findall(r"rows?: rate with its memory moved ÷ as it came +│ +[\d.]+ ×", outcome.output)) == 2
    assert "all moves" in outcome.output or "both kinds are alike" in outcome.output
