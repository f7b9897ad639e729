"""The fairness benchmark's smoke test: it runs and prints every client. How fast they are is not looked at."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from benchmarks import fairness

NUMBER = r"\d+\.\d+"


def test_quick_mode_prints_every_client_with_its_share_and_a_verdict() -> None:
    outcome = CliRunner().invoke(fairness.app, ["--quick"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    # client │ sent │ refused │ tokens/s │ fair share │ ratio │ of the rounds │ cached
    lines = {
        name: rf"{name} +│ +(\d+) │ +(\d+) │ +{NUMBER} │ +{NUMBER} │ +({NUMBER}) │ +{NUMBER} – {NUMBER} │ +0 │"
        for name in ("hog", r"client \d")
    }
    [hog] = re.findall(lines["hog"], outcome.output)
    others = re.findall(lines[r"client \d"], outcome.output)
    assert len(others) == 4
    assert {int(sent) * fairness.HOG_FACTOR for sent, _, _ in others} == {int(hog[0])}
    assert int(hog[1]) > 0, "the hog overfills the queue"
    assert {refused for _, refused, _ in others} == {"0"}
    assert sum(float(ratio) for _, _, ratio in [hog, *others]) == pytest.approx(5, abs=0.01)
    for end, target in (("least", r"≥ 0\.8"), ("most", r"≤ 1\.2")):
        verdict = rf"{end} of the four ÷ fair share +│ +{NUMBER} × │ +{target} │ +(not )?reached"
        assert re.search(verdict, outcome.output), outcome.output
