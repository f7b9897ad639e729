"""Bottlenecks, fusions of them and unions against AdapterHub's own answers (tests/golden/adapterhub): all in one batch
beside the base."""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from server.adapters import Adapter, Checkpoint, read_adapter
from server.cli.fused import convert_fusion
from server.errors import AdapterError
from server.model import FrozenBase
from tests.harness import Alone, Result, alone, assert_same, greedy, load_first, make_engine, request, run
from tests.reference.adapters import configs, save_adapter

GOLDEN = Path(__file__).parent.parent / "golden" / "adapterhub"
CASES = (
    "adapter_plus",
    "before_without_after",
    "compacter",
    "compacter_factorized_rule",
    "compacter_full_W",
    "compacter_own_rules",
    "compacter_plus_plus",
    "compacter_shared_W",
    "double_seq_bn",
    "double_seq_bn_leave_out",
    "ln_after",
    "ln_after_residual",
    "ln_before",
    "mh_only",
    "no_original",
    "par_bn",
    "par_bn_learned",
    "par_bn_ln",
    "par_bn_no_original",
    "residual_after_add",
    "seq_bn",
    "seq_bn_channel",
    "seq_bn_gelu",
    "seq_bn_rf4",
    "seq_bn_rf_map",
    "seq_bn_wider",
    "mam",
    "union_places",
    "union_ungated",
)
FUSIONS = (
    "fusion",
    "fusion_double",
    "fusion_late_value",
    "fusion_mixed",
    "fusion_no_original",
    "fusion_parallel",
    "fusion_static",
)
_OTHERS = (  # PEFT's, of every mechanism
    *("prompt", "prefix", "ia3", "lora", "dora", "vera", "lokr", "miss", "ln_tuning"),
    *("adaption_prompt", "hra", "c3a", "road", "shira", "beft"),
)
_PROMPT = [5, 9, 33, 2, 61, 17, 8]
REFUSED = {
    "seq_bn_gating": "use_gating",
    "unipelt": "use_gating",
    "par_bn_gating": "use_gating",
    "seq_bn_inv": "inv_adapter",
}


def _model() -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(GOLDEN / "base", attn_implementation="eager")
    return model


def _base() -> FrozenBase:
    return FrozenBase(_model())


def _read(folder: Path, base: FrozenBase) -> Adapter:
    return read_adapter(Checkpoint.open(folder, base.dtype), base.shape)


def case_folders(case: str, work: Path) -> list[Path]:
    """The adapters of a case, in order; a fusion's folders put together under `work`."""
    folder = GOLDEN / "cases" / case
    if case in FUSIONS:
        convert_fusion(folder, work / case)
        return [work / case]
    return {"base": [], "stack": [folder / "first", folder / "second"]}.get(case, [folder])


def _rows(case: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((GOLDEN / "cases" / case / "expected.json").read_text())
    return rows


def _assert_the_librarys(result: Result, row: dict[str, Any], name: str) -> None:
    assert result.failed is None, f"{name}: {result.failed}"
    assert result.tokens == row["tokens"], name
    tolerance = 1e-3 if name.startswith("fusion") else 1e-4  # a fusion's scores are not divided by √d: rounding grows
    for given, wanted in zip(result.logprobs, row["logprobs"], strict=True):
        assert abs(given.chosen - wanted) < tolerance, name
    last = torch.tensor(row["last_logits"]).log_softmax(-1)
    given_last = torch.tensor([result.logprobs[0].top[token] for token in range(len(last))])
    torch.testing.assert_close(given_last, last, atol=tolerance, rtol=0, msg=lambda text: f"{name}: {text}")


def _peft(folder: Path) -> tuple[list[Path], list[Alone]]:
    """Adapters of another library for the same base, and what they answer to `_PROMPT` alone."""
    folders, answers = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about tiny bases
        for seed, name in enumerate(_OTHERS):
            folders.append(folder / name)
            save_adapter(_model(), configs("llama")[name](), folders[-1], seed)
            answers.append(alone(PeftModel.from_pretrained(_model(), folders[-1]).eval(), _PROMPT, 8))
    return folders, answers


@pytest.mark.parametrize(
    ("page_size", "num_pages", "max_batch_tokens", "must_preempt"),
    [(16, 200, 512, False), (3, 24, 17, True)],
    ids=["roomy", "preempting"],
)
def test_the_librarys_answers_all_cases_mixed(
    tmp_path: Path, page_size: int, num_pages: int, max_batch_tokens: int, must_preempt: bool
) -> None:
    base = _base()
    engine = make_engine(base, page_size=page_size, num_pages=num_pages, max_batch_tokens=max_batch_tokens, max_seqs=14)
    expected: dict[str, dict[str, Any]] = {}
    requests = []
    for case in ("base", "stack", *CASES, *FUSIONS):
        folders = case_folders(case, tmp_path)
        for index, row in enumerate(_rows(case)):
            expected[f"{case}/{index}"] = row
            sampling = greedy(len(row["tokens"]), logprobs=base.vocab_size)
            requests.append(request(f"{case}/{index}", row["prompt"], sampling, *folders))
    others, alone_answers = _peft(tmp_path)
    requests += [request(folder.name, _PROMPT, greedy(8), folder) for folder in others]
    load_first(engine, requests)
    outcome = run(engine, requests, random.Random(page_size))
    engine.close()
    for name, row in expected.items():
        _assert_the_librarys(outcome.results[name], row, name)
    for folder, wanted in zip(others, alone_answers, strict=True):
        assert_same(outcome.results[folder.name], wanted, folder.name)
    assert (outcome.preemptions > 0) == must_preempt
    assert max(step.adapters for step in outcome.steps) > 3, "the adapters were not mixed"


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_served_is_refused_by_name(case: str) -> None:
    with pytest.raises(AdapterError, match=REFUSED[case]) as caught:
        _read(GOLDEN / "cases" / case, _base())
    assert caught.value.code == "unsupported_method"


def test_the_cases_differ() -> None:
    """Else the golden answers would prove nothing."""
    rows = [_rows(case) for case in ("base", *CASES, *FUSIONS)]
    assert len({tuple(row[0]["last_logits"]) for row in rows}) == len(rows)
