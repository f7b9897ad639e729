"""The saved reports as one picture, `benchmarks/results/cpu.svg`.

Every figure that has a target is a bar, grouped by benchmark. A bar's length is the figure as a share of its target
(of the inverse where the target is an upper bound), so that one line marks every target and longer is better. The
picture follows the reader's light or dark scheme.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.frame import RESULTS, Figure, Target

PICTURE = "cpu.svg"
_WIDTH = 960
_LABELS = 470  # width of the names
_UNIT = 250  # length of a bar that meets its target
_LONGEST = 1.25  # targets; longer bars are cut, with an arrow
_ROW = 22
_BAR = 12
_HEADING = 34
_TOP = 58
_LETTER = 6.9  # width of a letter, on average
_STYLE = """
text { font-family: system-ui, "DejaVu Sans", sans-serif; font-size: 12px; fill: #1f2328 }
.card { fill: #ffffff }
.title { font-size: 15px; font-weight: 600 }
.heading { font-weight: 600 }
.faint { font-size: 11px; fill: #6b7280 }
.value { text-anchor: end }
.reached { fill: #2f7d4f }
.missed { fill: #c2681a }
.target { stroke: #1f2328; stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) {
  .card { fill: #0d1117 }
  text { fill: #e6e9ed }
  .faint { fill: #9aa3ae }
  .reached { fill: #58b27c }
  .missed { fill: #e08a3c }
  .target { stroke: #e6e9ed }
}
"""


@dataclass(frozen=True)
class Group:
    """The bars of one benchmark."""

    title: str
    figures: Sequence[Figure]  # each with a target


def saved(folder: Path, names: Sequence[str]) -> tuple[list[Group], dict[str, Any]]:
    """The saved reports of these names in their order, a heading for each that is missing; and the first one's machine.

    Raises `FileNotFoundError` where there is none.
    """
    paths = {name: folder / f"{name}.json" for name in names}
    reports = {name: json.loads(path.read_text("utf-8")) for name, path in paths.items() if path.exists()}
    if not reports:
        raise FileNotFoundError(f"{folder} has none of {', '.join(names)}; run the benchmarks with --save")
    groups = []
    for name in names:
        report = reports.get(name)
        if report is None:
            groups.append(Group(f"benchmarks.{name}: not saved", []))
            continue
        figures = [
            Figure(each["name"], each["value"], each["unit"], Target(**each["target"]))
            for each in report["figures"]
            if each["target"] is not None
        ]
        if figures:
            groups.append(Group(report["title"], figures))
    return groups, next(iter(reports.values()))["machine"]


def share_of_target(figure: Figure) -> float:
    """1 where the figure just meets its target, more where it is better."""
    assert figure.target is not None
    if not figure.target.at_most:
        return figure.value / figure.target.bound
    return figure.target.bound / figure.value if figure.value > 0 else float("inf")


def draw(groups: Sequence[Group], machine: dict[str, Any]) -> ElementTree.Element:
    """The picture as an `svg` element."""
    height = _TOP + sum(_HEADING + _ROW * len(group.figures) for group in groups) + 16
    svg = ElementTree.Element(
        "svg",
        {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {_WIDTH} {height}", "role": "img"},
    )
    ElementTree.SubElement(svg, "title").text = "Medley's benchmarks: each figure as a share of its target"
    ElementTree.SubElement(svg, "style").text = _STYLE
    ElementTree.SubElement(svg, "rect", {"class": "card", "width": f"{_WIDTH}", "height": f"{height}", "rx": "8"})
    _text(svg, 12, 22, "Each figure as a share of its target", "title")
    facts = f"{machine['date']}, {machine['processor']}, {machine['cores']} cores, torch {machine['torch']}"
    _text(svg, 12, 40, facts, "faint")
    line = _LABELS + _UNIT
    ElementTree.SubElement(
        svg, "line", {"class": "target", "x1": f"{line}", "x2": f"{line}", "y1": f"{_TOP - 6}", "y2": f"{height - 10}"}
    )
    _text(svg, line, _TOP - 12, "target", "faint", anchor="middle")
    y = _TOP
    for group in groups:
        _text(svg, 12, y + 22, _shortened(group.title, _WIDTH - 24), "heading")
        y += _HEADING
        for figure in group.figures:
            _bar(svg, y, figure)
            y += _ROW
    return svg


def _bar(svg: ElementTree.Element, y: int, figure: Figure) -> None:
    """One row: name, bar, value beside target."""
    share = share_of_target(figure)
    kind = "reached" if figure.verdict == "reached" else "missed"
    _text(svg, 24, y + _BAR, _shortened(figure.name, _LABELS - 30))
    length = max(1.0, min(share, _LONGEST) * _UNIT)
    ElementTree.SubElement(
        svg,
        "rect",
        {"class": kind, "x": f"{_LABELS}", "y": f"{y + 2}", "width": f"{length:.1f}", "height": f"{_BAR}", "rx": "2"},
    )
    if share > _LONGEST:
        tip, top = _LABELS + length, y + 2
        points = f"{tip:.1f},{top} {tip + 7:.1f},{top + _BAR / 2} {tip:.1f},{top + _BAR}"
        ElementTree.SubElement(svg, "polygon", {"class": kind, "points": points})
    _text(svg, _WIDTH - 12, y + _BAR, f"{figure.text} ({figure.target})", "value")


def _text(svg: ElementTree.Element, x: int, y: int, content: str, kind: str = "", anchor: str = "") -> None:
    attributes = {"x": f"{x}", "y": f"{y}"}
    if kind:
        attributes["class"] = kind
    if anchor:
        attributes["text-anchor"] = anchor
    ElementTree.SubElement(svg, "text", attributes).text = content


def _shortened(name: str, width: int) -> str:
    """What fits into so many pixels."""
    most = int(width / _LETTER)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def write(names: Sequence[str], folder: Path = RESULTS) -> Path:
    """Draw the saved reports of these names into `cpu.svg` beside them. Raises `FileNotFoundError`."""
    svg = draw(*saved(folder, names))
    ElementTree.indent(svg)
    path = folder / PICTURE
    path.write_text(ElementTree.tostring(svg, encoding="unicode") + "\n", encoding="utf-8")
    return path
