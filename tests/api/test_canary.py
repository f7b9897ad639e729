"""A canary over HTTP: who gets it, how it is set, ended and promoted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.api.conftest import Scripted, folder_files
from tests.api.fake_engine import FakeEngine
from tests.api.keyed import error_of

Files = list[tuple[str, tuple[str, bytes]]]
USERS = [f"user-{number}" for number in range(100)]


@pytest.fixture
def files(adapter_folders: dict[str, Path]) -> dict[str, Files]:
    return {method: folder_files(folder) for method, folder in adapter_folders.items()}


@pytest.fixture
def http(scripted: Scripted, files: dict[str, Files]) -> httpx.Client:
    """A task `t` with three versions, the first active."""
    engine, http, _ = scripted()
    engine.on_request = _answering(engine)
    for method in ("lora", "ia3", "prompt"):
        http.post("/v1/tasks/t/versions", files=files[method], params={"activate": method == "lora"})
    return http


def _answering(engine: FakeEngine) -> Any:
    return lambda request: engine.finish(request, [70])


def give(http: httpx.Client, version: int, percent: float) -> None:
    response = http.patch("/v1/tasks/t", json={"canary": {"version": version, "percent": percent}})
    assert response.status_code == 200, response.text
    assert response.json()["canary"] == {"version": version, "percent": percent}


def version_of(http: httpx.Client, model: str = "t", request_id: str = "r", **fields: Any) -> int:
    body = {"model": model, "prompt": "x", "max_tokens": 1, **fields}
    answer = http.post("/v1/completions", json=body, headers={"X-Request-ID": request_id})
    assert answer.status_code == 200, answer.text
    version: int = answer.json()["medley"]["version"]
    return version


def versions_by_user(http: httpx.Client, request_id: str) -> list[int]:
    """Which version each of `USERS` gets."""
    items = [{"task": "t", "input": "x", "max_tokens": 1, "user": user} for user in USERS]
    answer = http.post("/v1/generate", json={"requests": items}, headers={"X-Request-ID": request_id})
    return [result["medley"]["version"] for result in answer.json()["results"]]


def test_its_percent_of_the_users_get_it_and_always_the_same_ones(http: httpx.Client) -> None:
    give(http, 2, 25)
    first = versions_by_user(http, "one")
    assert first == versions_by_user(http, "another")
    assert first[:5] == [version_of(http, user=user) for user in USERS[:5]]
    assert 10 <= first.count(2) <= 40  # of 100; 25 are expected, with a deviation of 4
    assert set(first) == {1, 2}
    give(http, 2, 50)
    wider = versions_by_user(http, "one")
    assert all(now == 2 for now, before in zip(wider, first, strict=True) if before == 2)


def test_without_a_user_the_request_s_id_decides(http: httpx.Client) -> None:
    give(http, 3, 50)
    versions = [version_of(http, request_id=f"r-{number}") for number in range(20)]
    assert versions == [version_of(http, request_id=f"r-{number}") for number in range(20)]
    assert set(versions) == {1, 3}


@pytest.mark.parametrize(("percent", "version"), [(0, 1), (100, 2)])
def test_none_and_all_of_them(http: httpx.Client, percent: float, version: int) -> None:
    give(http, 2, percent)
    assert set(versions_by_user(http, "one")) == {version}


def test_a_customization_lies_over_the_canary_and_over_a_version_that_is_named(
    http: httpx.Client, files: dict[str, Files]
) -> None:
    assert http.put("/v1/users/ann/tasks/t", files=files["ia3"]).status_code == 201
    give(http, 2, 100)
    for model, version in (("t", 2), ("t@canary", 2), ("t@3", 3), ("t@1", 1)):
        body = {"model": model, "prompt": "x", "user": "ann"}
        medley = http.post("/v1/completions", json=body).json()["medley"]
        assert (medley["version"], medley["customization"]["made_against"]) == (version, 1), model


def test_it_is_shown_kept_from_deletion_ended_and_promoted(http: httpx.Client) -> None:
    give(http, 2, 12.5)
    assert http.get("/v1/tasks/t").json()["canary"] == {"version": 2, "percent": 12.5}
    assert error_of(http.delete("/v1/tasks/t/versions/2")) == (409, "version_canary")
    ended = http.patch("/v1/tasks/t", json={"canary": None})
    assert (ended.status_code, ended.json()["canary"]) == (200, None)
    assert error_of(http.post("/v1/completions", json={"model": "t@canary", "prompt": "x"})) == (
        404,
        "canary_not_found",
    )
    assert http.delete("/v1/tasks/t/versions/2").status_code == 204
    give(http, 3, 1)
    promoted = http.patch("/v1/tasks/t", json={"active_version": 3}).json()
    assert (promoted["active"], promoted["previous"], promoted["canary"]) == (3, 1, None)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"canary": {"version": 1, "percent": 5}}, 409, "version_active"),
        ({"canary": {"version": 9, "percent": 5}}, 404, "version_not_found"),
        ({"canary": {"version": 2, "percent": 101}}, 400, "invalid_request"),
        ({"canary": {"version": 2, "percent": -1}}, 400, "invalid_request"),
        ({"canary": {"version": 2}}, 400, "invalid_request"),
        ({"canary": {"version": 0, "percent": 1}}, 400, "invalid_request"),
        ({"canary": {"version": 2, "percent": 1}, "active_version": 2}, 400, "invalid_request"),
        ({"canary": None, "active_version": 2}, 400, "invalid_request"),
        ({"active_version": None}, 400, "invalid_request"),
        ({}, 400, "invalid_request"),
    ],
)
def test_what_cannot_be_is_refused(http: httpx.Client, body: Any, status: int, code: str) -> None:
    before = http.get("/v1/tasks/t").json()
    assert error_of(http.patch("/v1/tasks/t", json=body)) == (status, code)
    assert http.get("/v1/tasks/t").json() == before


def test_a_task_without_an_active_version_has_no_canary(http: httpx.Client, files: dict[str, Files]) -> None:
    http.post("/v1/tasks/idle/versions", files=files["lora"], params={"activate": False})
    canary = {"canary": {"version": 1, "percent": 5}}
    assert error_of(http.patch("/v1/tasks/idle", json=canary)) == (409, "no_active_version")
    assert error_of(http.patch("/v1/tasks/nobody", json=canary)) == (404, "task_not_found")
