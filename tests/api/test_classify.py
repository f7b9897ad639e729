"""`POST /v1/tasks/{task}/classify`: labels, values and refusals over HTTP."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, LlamaForSequenceClassification

from server.engine.protocol import Classification, Generate, Tokens
from tests.api.conftest import BASE_ID, Scripted, folder_files
from tests.api.tiny_base import make_tokenizer

TEXT = "The restaurant on the river serves good food"


def _classifier(base_folder: Path) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(base_folder, num_labels=3, pad_token_id=2)
    return LlamaForSequenceClassification.from_pretrained(base_folder, config=config).eval()


@pytest.fixture(scope="module")
def folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA with a head for three labels."""
    torch.manual_seed(3)
    model = get_peft_model(
        _classifier(base_folder), LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "v_proj"])
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    path = tmp_path_factory.mktemp("classifier")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def task(http: httpx.Client, folder: Path) -> str:
    response = http.post("/v1/tasks/topics/versions", files=folder_files(folder))
    assert response.status_code == 201, response.text
    return "topics"


def test_the_labels_have_the_library_s_probabilities(
    http: httpx.Client, task: str, folder: Path, base_folder: Path
) -> None:
    ids = torch.tensor([make_tokenizer().encode(TEXT).ids])
    model = PeftModel.from_pretrained(_classifier(base_folder), folder).eval()
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].softmax(-1).tolist()
    answer = http.post(f"/v1/tasks/{task}/classify", json={"input": TEXT}).json()
    found = {label["label"]: label["probability"] for label in answer["labels"]}
    assert found == pytest.approx({f"LABEL_{index}": value for index, value in enumerate(expected)}, abs=1e-4)
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert answer["best"] == next(iter(found)) == f"LABEL_{expected.index(max(expected))}"
    assert (answer["task"], answer["version"], answer["medley"]["methods"]) == (task, 1, ["lora"])
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] == ids.shape[1]
    try:
        http.put(f"/v1/tasks/{task}", json={"labels": {"food": " food", "places": " places", "else": " else"}})
        named = http.post(f"/v1/tasks/{task}@1/classify", json={"prompt_token_ids": ids[0].tolist()}).json()
        assert named["best"] == ["food", "places", "else"][expected.index(max(expected))]
        http.put(f"/v1/tasks/{task}", json={"labels": {"food": " food", "places": " places"}})
        assert http.post(f"/v1/tasks/{task}/classify", json={"input": TEXT}).json()["best"] == answer["best"]
    finally:
        http.put(f"/v1/tasks/{task}", json={"labels": None})


def test_a_task_with_a_head_generates_nothing_and_one_without_classifies_nothing(
    http: httpx.Client, task: str, tasks: dict[str, str]
) -> None:
    refused = {
        f"/v1/tasks/{task}/generate": ({"input": "a"}, "/classify"),
        f"/v1/tasks/{task}/score": ({"input": "a", "choices": [" b"]}, "/classify"),
        f"/v1/tasks/{tasks['lora']}/classify": ({"input": "a"}, "no classification head"),
        f"/v1/tasks/{BASE_ID}/classify": ({"input": "a"}, "no classification head"),
    }
    for path, (body, says) in refused.items():
        response = http.post(path, json=body)
        error = response.json()["error"]
        assert (response.status_code, error["code"]) == (400, "invalid_request"), path
        assert says in error["message"]


@pytest.mark.parametrize("body", [{}, {"input": "a", "prompt_token_ids": [5]}, {"input": "a", "max_tokens": 3}])
def test_a_wrong_body_is_refused(http: httpx.Client, task: str, body: dict[str, Any]) -> None:
    assert http.post(f"/v1/tasks/{task}/classify", json=body).status_code == 400


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (Classification("regression", ["LABEL_0"], [-2.5]), {"value": -2.5}),
        (
            Classification("multiple", ["a", "b", "c"], [0.0, -1000.0, 1000.0]),
            {
                "labels": [
                    {"label": "c", "probability": 1.0},
                    {"label": "a", "probability": 0.5},
                    {"label": "b", "probability": 0.0},
                ],
                "best": "c",
            },
        ),
        (
            Classification("single", ["a", "b"], [999.0, 1000.0]),
            {
                "labels": [
                    {"label": "b", "probability": pytest.approx(1 / (1 + math.exp(-1)))},
                    {"label": "a", "probability": pytest.approx(1 / (1 + math.exp(1)))},
                ],
                "best": "b",
            },
        ),
    ],
    ids=["regression", "several", "one"],
)
def test_each_kind_of_head_has_its_answer(scripted: Scripted, said: Classification, expected: dict[str, Any]) -> None:
    engine, http, _ = scripted()

    def answer(request: Generate) -> None:
        assert request.classify
        engine.say(Tokens(id=request.id, token_ids=[], classification=said, finish_reason="length"))

    engine.on_request = answer
    found = http.post(f"/v1/tasks/{BASE_ID}/classify", json={"input": "a"}).json()
    assert {key: found[key] for key in found if key in ("value", "labels", "best")} == expected
