"""`benchmarks.methods` as a smoke test, and its recipes: each writes what the server reads as its method. No rate is
looked at."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import methods
from benchmarks.bases import SIZES, random_base
from benchmarks.inprocess import read_folder
from benchmarks.methods import app
from benchmarks.recipes import RECIPES, Recipe, write_tasks
from benchmarks.workload import Workload
from server.adapters import Adapter
from server.adapters.method import TokenPrefix
from server.model import FrozenBase

WORKLOAD = Workload(SIZES["tiny"], requests=2, prompt_tokens=4, new_tokens=4, virtual_tokens=5, tasks=2)


@pytest.fixture(autouse=True)
def _reference_library_may_warn() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return FrozenBase(random_base(WORKLOAD.size, WORKLOAD.length))


def _content(adapter: Adapter) -> list[torch.Tensor]:
    text = [torch.tensor(adapter.prefix.token_ids)] if isinstance(adapter.prefix, TokenPrefix) else []
    return [*adapter.blocks, *text]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.title)
def test_a_recipe_writes_distinct_tasks_of_its_method(recipe: Recipe, base: FrozenBase, tmp_path: Path) -> None:
    tasks = write_tasks(recipe, WORKLOAD, tmp_path)
    adapters = [read_folder(task.folder, base) for task in tasks]
    assert [adapter.method for adapter in adapters] == [recipe.method] * 2
    assert not any(adapter.warnings for adapter in adapters)
    contents = [_content(adapter) for adapter in adapters]
    assert contents[0]
    assert not all(torch.equal(left, right) for left, right in zip(*contents, strict=True))


def test_quick_mode_prints_a_row_for_each_recipe_and_why_others_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def impossible(*_: object) -> None:
        raise ValueError("this base has no such module")

    chosen = [recipe for recipe in RECIPES if recipe.title in ("prompt_tuning", "ia3", "vera", "bottleneck, seq_bn")]
    monkeypatch.setattr(methods, "RECIPES", (*chosen, Recipe("loha", "", impossible)))
    outcome = CliRunner().invoke(app, ["--quick"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    # │ base │ 16 tasks │ distinct tasks │ in a step │ parameters │ bytes │ ÷ tensors │ in pages │
    for recipe in chosen:
        rates = r"\d+\.\d │ +\d+\.\d+ │ +\d+\.\d+"
        size = r"[\d,]+( \+ [\d,]+ once)? │ +1\.00 reached │ +[\d,]+"
        line = rf"{re.escape(recipe.title)} +│ +{rates} │ +4 │ +[\d,]+ │ +{size} │"
        assert re.search(line, outcome.output), f"{recipe.title} is missing in:\n{outcome.output}"
    assert re.search(r"vera +│.* \+ 32,768 once │", outcome.output), "64 · (64 + 64) shared values of four bytes"
    assert "loha is skipped: this base has no such module" in outcome.output
    assert "lora is skipped: no recipe makes one" in outcome.output
    unused = rf"base only, {16 * len(chosen)} adapters of {len(chosen)} kinds resident and unused"
    assert re.search(rf"{unused} ÷ none resident +│ +\d+\.\d+ × │ +≥ 0\.98 │", outcome.output), outcome.output
