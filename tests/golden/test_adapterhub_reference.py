"""The formulas of `adapterhub/README.md` give the stored answers of the `adapters` library."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.golden.adapterhub import reference

CASES = sorted(path.parent for path in reference.HERE.glob("cases/*/expected.json"))
TOLERANCE = 1e-4


@pytest.mark.parametrize("case", [case for case in CASES if case.name != "base"], ids=lambda case: case.name)
def test_formula_gives_the_library_s_answer(case: Any) -> None:
    model = reference.adapted(case)
    for row in json.loads((case / "expected.json").read_text()):
        if "class_logits" in row:
            found = reference.class_logits(model, case, row["prompt"])
            torch.testing.assert_close(found, torch.tensor(row["class_logits"]), atol=TOLERANCE, rtol=0)
            continue
        tokens, logprobs, logits = reference.answer(model, row["prompt"], len(row["tokens"]))
        torch.testing.assert_close(logits, torch.tensor(row["last_logits"]), atol=TOLERANCE, rtol=0)
        assert tokens == row["tokens"]
        torch.testing.assert_close(logprobs, torch.tensor(row["logprobs"]), atol=TOLERANCE, rtol=0)
