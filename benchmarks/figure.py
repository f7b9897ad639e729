"""The saved reports as one picture, `benchmarks/results/cpu.svg`.

The first panel compares systems: output tokens/s of each row of `benchmarks.base`. Below it every figure that has a
target is a bar, grouped by benchmark. Such a bar's length is the figure as a share of its target (of the inverse where
the target is an upper bound), so that one line marks every target and longer is better. The picture follows the
reader's light or dark scheme.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.frame import RESULTS, Figure, Target

PICTURE = "cpu.svg"
_SYSTEMS = "base"  # the report whose first table compares systems
_OURS = "Medley"
_LIMIT = "limit"
_WIDTH = 960
_LABELS = 470  # width of the names
_UNIT = 250  # length of a bar that meets its target
_FASTEST = 312  # of the fastest system's
_LONGEST = 1.25  # targets; longer bars are cut, with an arrow
_ROW = 22
_BAR = 12
_HEADING = 34
_TOP = 58
_BELOW_TITLE = 22
_LETTER = 7.2  # width of a letter of a heading, on average
_WIDTHS = re.compile(r"(?<=M parameters) \([^)]*\)")  # what a heading has no room for
_STYLE = """
text { font-family: system-ui, "DejaVu Sans", sans-serif; font-size: 12px; fill: #1f2328 }
.card { fill: #ffffff }
.title { font-size: 15px; font-weight: 600 }
.heading { font-weight: 600 }
.faint { font-size: 11px; fill: #6b7280 }
.value { text-anchor: end }
.reached { fill: #2f7d4f }
.missed { fill: #c2681a }
.ours { fill: #2b6cb0 }
.other { fill: #8b949e }
.limit { fill: none; stroke: #8b949e }
.target { stroke: #1f2328; stroke-dasharray: 3 3 }
@media (prefers-color-scheme: dark) {
  .card { fill: #0d1117 }
  text { fill: #e6e9ed }
  .faint { fill: #9aa3ae }
  .reached { fill: #58b27c }
  .missed { fill: #e08a3c }
  .ours { fill: #5aa2e6 }
  .other { fill: #7d8590 }
  .limit { stroke: #9aa3ae }
  .target { stroke: #e6e9ed }
}
"""


@dataclass(frozen=True)
class Group:
    """The bars of one benchmark."""

    title: str
    figures: Sequence[Figure]  # each with a target


@dataclass(frozen=True)
class Systems:
    """What was given the same work, and how fast each was."""

    title: str  # the work, behind warnings
    caption: str
    rates: Sequence[tuple[str, float]]  # output tokens/s by name


@dataclass(frozen=True)
class Saved:
    """All that is drawn."""

    groups: Sequence[Group]
    machine: dict[str, Any]
    systems: Systems | None  # None: not saved


def saved(folder: Path, names: Sequence[str]) -> Saved:
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
            said = [*report.get("warnings", ()), _WIDTHS.sub("", report["title"])]
            groups.append(Group(f"{name}: {'; '.join(said)}", figures))
    machine = next(iter(reports.values()))["machine"]
    return Saved(groups, machine, _systems(reports[_SYSTEMS]) if _SYSTEMS in reports else None)


def _systems(report: dict[str, Any]) -> Systems:
    table = report["tables"][0]
    title = "; ".join([*report.get("warnings", ()), table["title"]])
    return Systems(title, table["caption"], [(row[0], float(row[1])) for row in table["rows"]])


def share_of_target(figure: Figure) -> float:
    """1 where the figure just meets its target, more where it is better."""
    assert figure.target is not None
    if not figure.target.at_most:
        return figure.value / figure.target.bound
    return figure.target.bound / figure.value if figure.value > 0 else float("inf")


def draw(content: Saved) -> ElementTree.Element:
    """The picture as an `svg` element."""
    top = _TOP if content.systems is None else _TOP + _ROW * (len(content.systems.rates) + 2) + _HEADING
    height = top + _BELOW_TITLE + sum(_HEADING + _ROW * len(group.figures) for group in content.groups) + 16
    svg = ElementTree.Element(
        "svg",
        {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {_WIDTH} {height}", "role": "img"},
    )
    ElementTree.SubElement(
        svg, "title"
    ).text = "Medley's benchmarks: systems compared, and figures beside their targets"
    ElementTree.SubElement(svg, "style").text = _STYLE
    ElementTree.SubElement(svg, "rect", {"class": "card", "width": f"{_WIDTH}", "height": f"{height}", "rx": "8"})
    machine = content.machine
    _text(svg, 12, 22, "Medley's CPU benchmarks", "title")
    facts = f"{machine['date']}, {machine['processor']}, {machine['cores']} cores, torch {machine['torch']}"
    _text(svg, 12, 40, facts, "faint")
    if content.systems is not None:
        _draw_systems(svg, content.systems)
    _draw_groups(svg, top, height, content.groups)
    return svg


def _draw_systems(svg: ElementTree.Element, systems: Systems) -> None:
    """One row each: name, bar, rate."""
    _text(svg, 12, _TOP + 10, _shortened(systems.title, _WIDTH - 24), "heading")
    fastest = max(rate for _, rate in systems.rates)
    y = _TOP + _ROW
    for name, rate in systems.rates:
        kind = "ours" if name.startswith(_OURS) else "limit" if name.startswith(_LIMIT) else "other"
        _text(svg, 24, y + _BAR, _shortened(name, _LABELS - 30))
        _rectangle(svg, kind, y, rate / fastest * _FASTEST)
        _text(svg, _WIDTH - 12, y + _BAR, f"{rate:.0f} tokens/s", "value")
        y += _ROW
    _text(svg, 24, y + _BAR, _shortened(systems.caption, _WIDTH - 36), "faint")


def _draw_groups(svg: ElementTree.Element, top: int, height: int, groups: Sequence[Group]) -> None:
    """From `top` on."""
    _text(svg, 12, top + 10, "Each figure as a share of its target", "title")
    y = top + _BELOW_TITLE
    line = _LABELS + _UNIT
    ElementTree.SubElement(
        svg, "line", {"class": "target", "x1": f"{line}", "x2": f"{line}", "y1": f"{y - 6}", "y2": f"{height - 10}"}
    )
    _text(svg, line, y - 12, "target", "faint", anchor="middle")
    for group in groups:
        _text(svg, 12, y + 22, _shortened(group.title, _WIDTH - 24), "heading")
        y += _HEADING
        for figure in group.figures:
            _bar(svg, y, figure)
            y += _ROW


def _bar(svg: ElementTree.Element, y: int, figure: Figure) -> None:
    """One row: name, bar, value beside target."""
    share = share_of_target(figure)
    kind = "reached" if figure.verdict == "reached" else "missed"
    _text(svg, 24, y + _BAR, _shortened(figure.name, _LABELS - 30))
    length = max(1.0, min(share, _LONGEST) * _UNIT)
    _rectangle(svg, kind, y, length)
    if share > _LONGEST:
        tip, top = _LABELS + length, y + 2
        points = f"{tip:.1f},{top} {tip + 7:.1f},{top + _BAR / 2} {tip:.1f},{top + _BAR}"
        ElementTree.SubElement(svg, "polygon", {"class": kind, "points": points})
    _text(svg, _WIDTH - 12, y + _BAR, f"{figure.text} ({figure.target})", "value")


def _rectangle(svg: ElementTree.Element, kind: str, y: int, length: float) -> None:
    """A row's bar."""
    place = {"x": f"{_LABELS}", "y": f"{y + 2}", "width": f"{length:.1f}", "height": f"{_BAR}", "rx": "2"}
    ElementTree.SubElement(svg, "rect", {"class": kind, **place})


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
    svg = draw(saved(folder, names))
    ElementTree.indent(svg)
    path = folder / PICTURE
    path.write_text(ElementTree.tostring(svg, encoding="unicode") + "\n", encoding="utf-8")
    return path
