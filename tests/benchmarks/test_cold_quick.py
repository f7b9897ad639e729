"""The benchmark of cold adapters' smoke test: it runs and prints every request. How fast they are is not looked at."""

from __future__ import annotations

import re

from typer.testing import CliRunner

from benchmarks import cold

NUMBER = r"-?\d[\d.e+-]*"


def test_quick_mode_prints_every_request_and_a_verdict_for_each_figure() -> None:
    outcome = CliRunner().invoke(cold.app, ["--quick"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    for name in ("resident", "cold", "resident beside a stream", "cold beside a stream"):
        [first] = re.findall(rf"│ {name} +│ +({NUMBER}) │", outcome.output)
        assert float(first) > 0
    verdicts = re.findall(rf"│ +{NUMBER} (?:ms|steps) │ +≤ [\d.]+ │ +(?:not )?reached │", outcome.output)
    assert len(verdicts) == 3
