"""Tasks: settings, versions, activation, deletion, and what models list."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.api.conftest import BASE_ID, folder_files
from tests.api.server_thread import ServerThread

METHODS = ("lora", "ia3", "prompt")


@pytest.fixture
def task(http: httpx.Client, adapter_folders: dict[str, Path]) -> Iterator[str]:
    """A task with three versions, the last one active."""
    name = "several"
    numbers = []
    for method in METHODS:
        response = http.post(f"/v1/tasks/{name}/versions", files=folder_files(adapter_folders[method]))
        assert response.status_code == 201, response.text
        numbers.append(response.json()["version"])
    assert numbers == sorted(numbers)
    yield name
    http.delete(f"/v1/tasks/{name}")


def numbers_of(http: httpx.Client, task: str) -> list[int]:
    return [version["version"] for version in http.get(f"/v1/tasks/{task}").json()["versions"]]


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def methods_of(http: httpx.Client, model: str) -> Any:
    body = {"model": model, "prompt": "x", "max_tokens": 1}
    return http.post("/v1/completions", json=body).json()["medley"]["methods"]


def test_a_task_shows_settings_versions_and_pointers(http: httpx.Client, task: str) -> None:
    shown = http.get(f"/v1/tasks/{task}").json()
    first, second, third = numbers_of(http, task)
    assert (shown["active"], shown["previous"], shown["canary"]) == (third, second, None)
    assert [version["active"] for version in shown["versions"]] == [False, False, True]
    assert all(version["servable"] for version in shown["versions"])
    assert shown["bytes"] == shown["versions"][2]["bytes"]
    assert shown["methods"] == [shown["versions"][2]["method"]]
    [listed] = [entry for entry in http.get("/v1/tasks").json()["data"] if entry["task"] == task]
    assert listed == {name: value for name, value in shown.items() if name != "versions"}
    single = http.get(f"/v1/tasks/{task}/versions/{first}").json()
    assert single == shown["versions"][0]


def test_switching_and_rolling_back_take_effect_at_once(http: httpx.Client, task: str) -> None:
    first, _, third = numbers_of(http, task)
    assert methods_of(http, task) == methods_of(http, f"{task}@{third}")
    patched = http.patch(f"/v1/tasks/{task}", json={"active_version": first})
    assert (patched.status_code, patched.json()["active"]) == (200, first)
    assert methods_of(http, task) == ["lora"]
    previous = patched.json()["previous"]
    assert http.patch(f"/v1/tasks/{task}", json={"active_version": previous}).json()["active"] == third
    assert error_of(http.patch(f"/v1/tasks/{task}", json={"active_version": 999})) == (404, "version_not_found")
    assert error_of(http.patch("/v1/tasks/nobody", json={"active_version": 1})) == (404, "task_not_found")


def test_settings_keep_what_is_left_out_and_null_resets(http: httpx.Client, task: str) -> None:
    given = {"description": "d", "template": "{{ input }}!", "defaults": {"stop": "\n"}, "labels": {"a": "b"}}
    http.put(f"/v1/tasks/{task}", json=given)
    shown = http.put(f"/v1/tasks/{task}", json={"description": "new", "template": None}).json()
    assert (shown["description"], shown["template"], shown["labels"]) == ("new", None, {"a": "b"})
    assert shown["defaults"] == {"stop": ["\n"]}


def test_a_task_may_be_set_up_before_its_first_version(http: httpx.Client, adapter_folders: dict[str, Path]) -> None:
    assert http.put("/v1/tasks/early", json={"defaults": {"max_tokens": 3}}).status_code == 200
    assert error_of(http.post("/v1/tasks/early/generate", json={"input": "x"})) == (409, "no_active_version")
    http.post("/v1/tasks/early/versions", files=folder_files(adapter_folders["lora"]))
    body = {"input": "x", "ignore_eos": True}
    assert http.post("/v1/tasks/early/generate", json=body).json()["usage"]["completion_tokens"] == 3
    http.delete("/v1/tasks/early")


@pytest.mark.parametrize(
    ("settings", "code", "param"),
    [
        ({"template": "a\n{% if %}"}, "invalid_template", "template"),
        ({"template": "{{ input | nofilter }}"}, "invalid_template", "template"),
        ({"defaults": {"temperature": 9}}, "invalid_request", "defaults.temperature"),
        ({"defaults": {"stream": True}}, "unknown_field", "defaults.stream"),
        ({"defaults": {"logit_bias": {"99999": 1}}}, "invalid_request", "logit_bias"),
        ({"labels": {"a": 1}}, "invalid_request", "labels.a"),
        ({"labels": {"a": "x", "b": ""}}, "invalid_request", "labels.b"),
        ({"labels": {"a": "x", "b": "y", "{c}": "x"}}, "invalid_request", "labels"),
        ({"colour": "red"}, "unknown_field", "colour"),
    ],
)
def test_bad_settings_are_refused_by_name(http: httpx.Client, settings: Any, code: str, param: str) -> None:
    response = http.put("/v1/tasks/bad-settings", json=settings)
    assert error_of(response) == (400, code)
    assert response.json()["error"]["param"] == param
    assert error_of(http.get("/v1/tasks/bad-settings")) == (404, "task_not_found")


def test_the_bases_name_is_reserved(http: httpx.Client) -> None:
    assert error_of(http.put(f"/v1/tasks/{BASE_ID}", json={})) == (409, "reserved")


def test_an_active_version_is_not_deleted_and_numbers_are_never_reused(
    http: httpx.Client, task: str, adapter_folders: dict[str, Path]
) -> None:
    first, second, third = numbers_of(http, task)
    assert error_of(http.delete(f"/v1/tasks/{task}/versions/{third}")) == (409, "version_active")
    assert http.delete(f"/v1/tasks/{task}/versions/{first}").status_code == 204
    assert error_of(http.get(f"/v1/tasks/{task}/versions/{first}")) == (404, "version_not_found")
    assert numbers_of(http, task) == [second, third]
    assert http.delete(f"/v1/tasks/{task}").status_code == 204
    assert error_of(http.get(f"/v1/tasks/{task}")) == (404, "task_not_found")
    assert error_of(http.delete(f"/v1/tasks/{task}")) == (404, "task_not_found")
    body = {"model": task, "prompt": "x"}
    assert error_of(http.post("/v1/completions", json=body)) == (404, "model_not_found")
    again = http.post(f"/v1/tasks/{task}/versions", files=folder_files(adapter_folders["lora"]))
    assert again.json()["version"] == third + 1


def test_tasks_are_listed_in_pages(http: httpx.Client, tasks: dict[str, str]) -> None:
    names: list[str] = []
    after: dict[str, str] = {}
    while True:
        page = http.get("/v1/tasks", params={"limit": 2, **after}).json()
        assert page["object"] == "list"
        names += [task["task"] for task in page["data"]]
        if not page["has_more"]:
            break
        after = {"after": names[-1]}
    assert set(tasks.values()) <= set(names)
    assert names == sorted(names)
    assert http.get("/v1/tasks", params={"limit": 0}).json()["error"]["param"] == "limit"


def test_last_use_is_recorded(http: httpx.Client, tasks: dict[str, str], server: ServerThread) -> None:
    import asyncio

    methods_of(http, tasks["ia3"])
    asyncio.run_coroutine_threadsafe(server.services.last_used.flush(), server.loop).result()
    shown = http.get(f"/v1/tasks/{tasks['ia3']}").json()
    assert shown["last_used"] >= shown["created"]


def test_models_are_the_base_then_every_task(client: openai.OpenAI, http: httpx.Client, tasks: dict[str, str]) -> None:
    models = [model.id for model in client.models.list()]
    assert models[0] == BASE_ID
    assert set(tasks.values()) <= set(models[1:])
    assert client.models.retrieve(BASE_ID).id == BASE_ID
    assert client.models.retrieve(tasks["lora"]).id == tasks["lora"]
    assert client.models.retrieve(f"{tasks['lora']}@1").id == f"{tasks['lora']}@1"
    assert error_of(http.get("/v1/models/nobody")) == (404, "model_not_found")
    assert error_of(http.get(f"/v1/models/{tasks['lora']}@7")) == (404, "version_not_found")


def test_unknown_files_and_versions_are_404(http: httpx.Client, tasks: dict[str, str]) -> None:
    task = tasks["lora"]
    assert error_of(http.get(f"/v1/tasks/{task}/versions/1/files/x")) == (404, "file_not_found")
    assert error_of(http.get(f"/v1/tasks/{task}/versions/9/files/x")) == (404, "version_not_found")
    assert error_of(http.get(f"/v1/tasks/{task}/versions/one")) == (400, "invalid_request")
