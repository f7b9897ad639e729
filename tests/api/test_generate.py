"""`/v1/tasks/{task}/generate` and `/v1/generate` against the real engine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.api.conftest import BASE_ID, folder_files


@pytest.fixture(scope="module")
def templated(http: httpx.Client, tasks: dict[str, str], adapter_folders: Any) -> Iterator[str]:
    """A task with a template and defaults of its own."""
    name = "templated"
    http.post(f"/v1/tasks/{name}/versions", files=folder_files(adapter_folders["lora"]))
    settings = {
        "template": "{{ input }} / {{ inputs.area | upper }}:",
        "defaults": {"max_tokens": 5, "temperature": 0, "ignore_eos": True},
    }
    assert http.put(f"/v1/tasks/{name}", json=settings).status_code == 200
    yield name
    http.delete(f"/v1/tasks/{name}")


def events_of(response: httpx.Response) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def test_template_and_defaults_of_the_task_apply(http: httpx.Client, templated: str) -> None:
    body = {"input": "food", "inputs": {"area": "river"}}
    answer = http.post(f"/v1/tasks/{templated}/generate", json=body).json()
    same = {"model": templated, "prompt": "food / RIVER:", "max_tokens": 5, "temperature": 0, "ignore_eos": True}
    completion = http.post("/v1/completions", json=same).json()
    assert answer["output"] == completion["choices"][0]["text"]
    assert answer["usage"]["completion_tokens"] == 5
    assert (answer["task"], answer["version"], answer["finish_reason"]) == (templated, 1, "length")
    overridden = http.post(f"/v1/tasks/{templated}/generate", json={**body, "max_tokens": 2}).json()
    assert overridden["usage"]["completion_tokens"] == 2


def test_defaults_apply_to_completions_too(http: httpx.Client, templated: str) -> None:
    answer = http.post("/v1/completions", json={"model": templated, "prompt": "x"}).json()
    assert answer["usage"]["completion_tokens"] == 5


def test_a_missing_template_variable_is_named(http: httpx.Client, templated: str) -> None:
    response = http.post(f"/v1/tasks/{templated}/generate", json={"input": "food"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_template"
    assert "'inputs' is undefined" in response.json()["error"]["message"]


def test_without_a_template_the_input_is_the_prompt_verbatim(http: httpx.Client, tasks: dict[str, str]) -> None:
    text = "{{ input }} <b>"
    ask = {"max_tokens": 4, "temperature": 0}
    answer = http.post(f"/v1/tasks/{tasks['lora']}/generate", json={"input": text, **ask}).json()
    completion = http.post("/v1/completions", json={"model": tasks["lora"], "prompt": text, **ask}).json()
    assert answer["output"] == completion["choices"][0]["text"]
    refused = http.post(f"/v1/tasks/{tasks['lora']}/generate", json={"inputs": {"a": 1}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "inputs")


def test_a_stream_is_texts_then_the_end_then_done(http: httpx.Client, templated: str) -> None:
    body = {"input": "food", "inputs": {"area": "river"}}
    whole = http.post(f"/v1/tasks/{templated}/generate", json=body).json()
    response = http.post(f"/v1/tasks/{templated}/generate", json={**body, "stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *texts, end, done = events_of(response)
    assert done == "[DONE]"
    assert "".join(event["text"] for event in texts) == whole["output"]
    for answer in (whole, end):
        del answer["usage"]["prompt_tokens_details"]["cached_tokens"]  # the second finds the first's text
    assert {name: end[name] for name in ("finish_reason", "usage")} == {
        name: whole[name] for name in ("finish_reason", "usage")
    }
    assert texts[0]["medley"] == end["medley"] == whole["medley"]
    assert not any("medley" in event for event in texts[1:])


def test_a_batch_mixes_tasks_and_each_item_fails_alone(http: httpx.Client, tasks: dict[str, str]) -> None:
    ask = {"input": "The food", "max_tokens": 6, "temperature": 0}
    names = [*tasks.values(), BASE_ID]
    alone = [http.post(f"/v1/tasks/{name}/generate", json=ask).json()["output"] for name in names]
    broken = [{"task": "nobody", **ask}, {**ask, "task": BASE_ID, "temperature": -1}, {"task": BASE_ID}]
    response = http.post("/v1/generate", json={"requests": [{"task": name, **ask} for name in names] + broken})
    assert response.status_code == 200
    results = response.json()["results"]
    assert [result["output"] for result in results[: len(names)]] == alone
    errors = [result["error"] for result in results[len(names) :]]
    assert [(error["code"], error["param"]) for error in errors] == [
        ("task_not_found", "task"),
        ("invalid_request", "temperature"),
        ("invalid_request", None),
    ]


def test_a_batch_is_bounded(http: httpx.Client) -> None:
    response = http.post("/v1/generate", json={"requests": [{"task": BASE_ID, "input": "x"}] * 9})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "requests")
    streamed = http.post("/v1/generate", json={"requests": [{"task": BASE_ID, "input": "x", "stream": True}]})
    assert streamed.json()["results"][0]["error"]["code"] == "unsupported"


def test_user_is_reported_without_a_customization(http: httpx.Client, tasks: dict[str, str]) -> None:
    body = {"input": "x", "max_tokens": 1, "user": "ann"}
    medley = http.post(f"/v1/tasks/{tasks['lora']}/generate", json=body).json()["medley"]
    assert (medley["user"], medley["customization"], medley["methods"]) == ("ann", None, ["lora"])
