"""The bar: an adapter at 90 % counts, unless the base needs no adapter."""

import pytest

from demo.scores import TaskScores, as_table, share_right
from demo.skills import Example


@pytest.mark.parametrize(("alone", "adapter", "reached"), [(0.2, 0.9, True), (0.2, 0.895, False), (0.9, 1.0, False)])
def test_the_bar_is_for_the_adapter_and_not_for_the_base(alone: float, adapter: float, reached: bool) -> None:
    shares = {"base alone": alone, "base + text prompt": 0.5, "adapter": adapter}
    assert TaskScores("shorten", "prompt", shares).reached is reached


def test_the_table_has_a_line_for_each_task() -> None:
    shares = {"base alone": 0.0, "base + text prompt": 0.5, "adapter": 0.995}
    assert as_table([TaskScores("shorten", "prompt", shares)]).splitlines() == [
        "| task | method | base alone | base + text prompt | adapter |",
        "|---|---|--:|--:|--:|",
        "| shorten | prompt | 0.0% | 50.0% | 99.5% |",
    ]


def test_a_description_is_judged_by_its_facts_and_all_else_by_equality() -> None:
    table = Example("name: The Wild Otter; family: no; near: museum", "…")
    outputs = [
        "The Wild Otter is near the museum. Families are not welcome.",
        "The Wild Otter is near the museum. Families are welcome.",
        "The Wild Otter is near the castle. It is for adults only.",
    ]
    assert share_right("describe", [table] * 3, outputs) == pytest.approx(1 / 3)
    assert share_right("answer", [Example("…", "museum")] * 2, ["museum", "museums"]) == 0.5
