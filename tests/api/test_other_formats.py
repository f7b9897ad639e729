"""Uploads of other forms than a PEFT folder: AdapterHub's, a text alone, one file of many tasks."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save

from adapters_store import StoreUnavailable, publish_files
from tests.api.tiny_base import make_tokenizer

CONFIG = "adapter_config.json"
TASKS = 3


@pytest.fixture
def task(http: httpx.Client) -> Iterator[str]:
    """A name that nobody has used."""
    name = f"form-{uuid.uuid4().hex}"
    yield name
    for used in (name, *(f"{name}:{index}" for index in range(TASKS))):
        http.delete(f"/v1/tasks/{used}")


def upload(http: httpx.Client, task: str, config: Any, weights: dict[str, bytes], **query: Any) -> httpx.Response:
    files = [("files", (CONFIG, json.dumps(config).encode()))]
    files += [("files", (name, content)) for name, content in weights.items()]
    return http.post(f"/v1/tasks/{task}/versions", files=files, params=query)


def token_ids(http: httpx.Client, model: str, prompt: Any) -> list[int]:
    body = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0, "return_token_ids": True}
    response = http.post("/v1/completions", json={**body, "ignore_eos": True})
    assert response.status_code == 200, response.text
    ids: list[int] = response.json()["choices"][0]["token_ids"]
    return ids


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"text": "The restaurant: "}, "The restaurant: "),
        (
            {
                "examples": [{"input": "good", "output": "yes"}, {"input": "bad", "output": "no"}],
                "template": "{{ input }} -> {{ output }}\n",
            },
            "good -> yes\nbad -> no\n",
        ),
    ],
    ids=["text", "examples"],
)
def test_a_text_without_tensors_answers_as_if_it_stood_before_the_prompt(
    http: httpx.Client, task: str, config: dict[str, Any], text: str
) -> None:
    response = upload(http, task, {"medley_method": "text_prompt", **config}, {})
    assert response.status_code == 201, response.text
    ids = make_tokenizer().encode(text, add_special_tokens=False).ids
    assert (response.json()["method"], response.json()["virtual_tokens"]) == ("text_prompt", len(ids))
    derived = http.get(f"/v1/tasks/{task}/versions/1/files/medley.json")
    assert derived.json() == {"token_ids": ids}
    assert token_ids(http, task, [40, 41]) == token_ids(http, "tiny-llama", [*ids, 40, 41])
    again = upload(http, task, {"medley_method": "text_prompt", **config}, {})
    assert (again.status_code, again.json()["version"]) == (200, 1)


@pytest.mark.parametrize(
    "config",
    [
        {"text": 5},
        {"text": ""},
        {"examples": []},
        {"examples": [{"input": "a", "output": "b"}]},
        {"examples": [{"input": "a"}], "template": "x"},
        {"examples": [{"input": "a", "output": "b"}], "template": "{{ unknown }}"},
    ],
    ids=str,
)
def test_a_text_prompt_without_a_text_is_refused(http: httpx.Client, task: str, config: dict[str, Any]) -> None:
    response = upload(http, task, {"medley_method": "text_prompt", **config}, {})
    assert response.status_code == 400, response.text
    assert http.get(f"/v1/tasks/{task}").status_code == 404


def test_what_the_server_derives_cannot_be_uploaded(http: httpx.Client, task: str) -> None:
    response = upload(http, task, {"medley_method": "text_prompt", "text": "a"}, {"medley.json": b"{}"})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "unknown_file")


def multitask() -> tuple[dict[str, Any], dict[str, bytes]]:
    torch.manual_seed(4)
    tensors = {
        "prompt_embeddings": torch.randn(4, 32),
        "prefix_task_cols": torch.randn(TASKS, 4, 2),
        "prefix_task_rows": torch.randn(TASKS, 2, 32),
    }
    config = {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 4, "num_tasks": TASKS, "num_ranks": 2}
    return config, {"adapter_model.safetensors": save(tensors)}


def test_one_upload_of_many_tasks_gives_each_of_them(http: httpx.Client, task: str) -> None:
    names = [f"{task}:{index}" for index in range(TASKS)]
    checked = upload(http, task, *multitask(), dry_run=True)
    assert checked.json()["tasks"] == names
    assert http.get(f"/v1/tasks/{names[0]}").status_code == 404
    response = upload(http, task, *multitask())
    assert response.status_code == 201, response.text
    assert [version["task"] for version in response.json()["tasks"]] == names
    assert response.json()["task"] == names[0]
    assert len({version["digest"] for version in response.json()["tasks"]}) == TASKS
    assert len({tuple(token_ids(http, name, [40, 41])) for name in names}) == TASKS
    assert http.get(f"/v1/tasks/{task}").status_code == 404, "the name itself is no task"
    again = upload(http, task, *multitask())
    assert (again.status_code, [version["version"] for version in again.json()["tasks"]]) == (200, [1] * TASKS)


def test_an_upload_of_many_tasks_that_is_cut_off_is_served_by_none_of_them_and_says_so(
    http: httpx.Client, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    async def fail_at_the_last(*given: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == TASKS:
            raise StoreUnavailable("the index does not answer")
        return await publish_files(*given, **options)

    monkeypatch.setattr("server.api.publish.publish_files", fail_at_the_last)
    response = upload(http, task, *multitask())
    assert (response.status_code, response.json()["error"]["code"]) == (503, "store_unavailable")
    assert f"of the {TASKS} tasks of this upload {TASKS - 1} have" in response.json()["error"]["message"]
    states = [http.get(f"/v1/tasks/{task}:{index}") for index in range(TASKS)]
    assert [state.status_code for state in states] == [200, 200, 404]
    assert [state.json()["active"] for state in states[:-1]] == [None, None]
    monkeypatch.undo()
    again = upload(http, task, *multitask())
    assert again.status_code == 201, again.text
    assert [(version["version"], version["active"]) for version in again.json()["tasks"]] == [(1, True)] * TASKS


def test_a_task_s_name_that_leaves_no_room_for_its_number_is_refused(http: httpx.Client) -> None:
    response = upload(http, "t" * 127, *multitask())
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_request")


def adapterhub() -> tuple[dict[str, Any], dict[str, bytes]]:
    torch.manual_seed(6)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(2):
        key = f"model.layers.{layer}.self_attn.q_proj.loras.mine"
        tensors |= {f"{key}.lora_A": torch.randn(2, 32), f"{key}.lora_B": torch.randn(32, 2)}
    config = {
        "architecture": "lora",
        "composition_mode": "add",
        "r": 2,
        "alpha": 4,
        "attn_matrices": ["q"],
        "selfattn_lora": True,
    }
    outer = {"config": config, "name": "mine", "model_type": "llama", "version": "adapters.1.3.0"}
    return outer, {"adapter.safetensors": save(tensors)}


def test_an_adapterhub_folder_is_taken_under_its_own_file_names(http: httpx.Client, task: str) -> None:
    config, weights = adapterhub()
    response = upload(http, task, config, weights)
    assert response.status_code == 201, response.text
    assert (response.json()["method"], response.json()["rank"]) == ("lora", 2)
    assert token_ids(http, task, [40, 41]) != token_ids(http, "tiny-llama", [40, 41])
    assert http.get(f"/v1/tasks/{task}/versions/1/files/adapter.safetensors").content == weights["adapter.safetensors"]


def test_a_file_of_another_format_is_refused(http: httpx.Client, task: str) -> None:
    config, weights = adapterhub()
    response = upload(http, task, config, {"adapter_model.safetensors": weights["adapter.safetensors"]})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "unknown_file")
    response = upload(http, task, config, {})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "missing_file")
    assert "adapter.safetensors" in response.json()["error"]["message"]
