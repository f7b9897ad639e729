"""The picture of the saved reports."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks.figure import saved, share_of_target, write
from benchmarks.frame import Figure, Report, Table, Target, machine

SVG = "{http://www.w3.org/2000/svg}"
MACHINE = {**machine(), "busy": 0.0}


def _save(folder: Path, name: str, *figures: Figure, rounds: int | None = None) -> None:
    Report(name, f"title of {name}", figures, MACHINE, rounds=rounds).write(folder)


@pytest.mark.parametrize(
    ("value", "target", "share"),
    [(0.45, Target(0.9), 0.5), (5.0, Target(10, at_most=True), 2.0), (0.0, Target(1, at_most=True), float("inf"))],
)
def test_more_than_one_is_always_better_than_the_target(value: float, target: Target, share: float) -> None:
    assert share_of_target(Figure("a figure", value, target=target)) == pytest.approx(share)


def test_every_figure_with_a_target_is_a_bar_of_its_length(tmp_path: Path) -> None:
    _save(tmp_path, "one", Figure("half <way>", 0.45, target=Target(0.9)), Figure("no target", 1.0))
    _save(tmp_path, "two", Figure("met", 0.9, target=Target(0.9)), Figure("far", 9.0, "s", Target(1)))
    svg = ElementTree.parse(write(["one", "missing", "two"], tmp_path)).getroot()
    bars = [bar for bar in svg.iter(f"{SVG}rect") if bar.get("class") in ("reached", "missed")]
    half, met, far = (float(bar.attrib["width"]) for bar in bars)
    assert met == pytest.approx(2 * half)
    assert met < far < 2 * met, "a bar far beyond its target is cut"
    assert [bar.get("class") for bar in bars] == ["missed", "reached", "reached"]
    assert len(list(svg.iter(f"{SVG}polygon"))) == 1, "with an arrow"
    line = next(svg.iter(f"{SVG}line"))
    assert float(line.attrib["x1"]) == pytest.approx(float(bars[1].attrib["x"]) + met)
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert "half <way>" in texts
    assert "9 s (≥ 1)" in texts
    assert "no target" not in texts
    assert "benchmarks.missing: not saved" in texts


def test_the_groups_are_in_the_order_asked_for(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _save(tmp_path, name, Figure("met", 1.0, target=Target(1)))
    assert [group.title for group in saved(tmp_path, ["b", "a"]).groups] == ["b: title of b", "a: title of a"]


def test_few_rounds_are_told_in_the_heading(tmp_path: Path) -> None:
    _save(tmp_path, "a", Figure("met", 1.0, target=Target(1)), rounds=3)
    assert saved(tmp_path, ["a"]).groups[0].title.startswith("a: rounds kept: 3;")


def test_the_systems_of_base_are_compared_first(tmp_path: Path) -> None:
    rows = [("limit: products", "400.0"), ("Medley in-process", "300.0"), ("vLLM over HTTP", "200.0")]
    table = Table("the work", ("system", "tokens/s"), rows, "a caption")
    Report("base", "title", [Figure("met", 1.0, target=Target(1))], MACHINE, [table]).write(tmp_path)
    svg = ElementTree.parse(write(["base"], tmp_path)).getroot()
    bars = [bar for bar in svg.iter(f"{SVG}rect") if bar.get("class") != "card"]
    assert [bar.get("class") for bar in bars] == ["limit", "ours", "other", "reached"]
    limit, ours, other, _ = (float(bar.attrib["width"]) for bar in bars)
    assert ours / limit == pytest.approx(0.75)
    assert other / limit == pytest.approx(0.5)
    texts = [text.text for text in svg.iter(f"{SVG}text")]
    assert {"the work", "a caption", "Medley in-process", "300 tokens/s"} <= set(texts)


def test_without_any_report_there_is_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--save"):
        write(["one"], tmp_path)
