"""With Redis away: what the server knows is served, what it cannot know answers 503, and it catches up later."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters_store import PrivateRedis
from server.engine.protocol import BaseFacts
from tests.api.conftest import BASE_ID, configuration, folder_files
from tests.api.fake_engine import FakeEngine
from tests.api.server_thread import ServerThread


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[PrivateRedis]:
    redis = PrivateRedis(tmp_path / "redis")
    redis.start()
    yield redis
    redis.stop()


@pytest.fixture
def http(redis: PrivateRedis, base_facts: BaseFacts, tmp_path: Path) -> Iterator[httpx.Client]:
    configure = configuration(tmp_path, tmp_path)
    with (
        FakeEngine(base_facts) as engine,
        ServerThread(redis.url, engine.connection, configure) as server,
        httpx.Client(base_url=server.url, timeout=60) as http,
    ):
        engine.on_request = lambda request: engine.finish(request, [70])
        yield http


def test_known_tasks_are_served_and_the_rest_answers_503(
    redis: PrivateRedis, http: httpx.Client, adapter_folders: dict[str, Path]
) -> None:
    files = folder_files(adapter_folders["lora"])
    assert http.post("/v1/tasks/known/versions", files=files).status_code == 201
    redis.stop()
    known: dict[str, Any] = {"model": "known", "prompt": "x"}
    assert http.post("/v1/completions", json=known).status_code == 200
    assert http.post("/v1/completions", json={**known, "model": BASE_ID}).status_code == 200
    listed = http.get("/v1/tasks").json()["data"]
    assert [(entry["task"], entry["active"], entry["methods"]) for entry in listed] == [("known", 1, ["lora"])]
    assert [model["id"] for model in http.get("/v1/models").json()["data"]] == [BASE_ID, "known"]
    refusals = [
        http.put("/v1/tasks/known", json={"description": "d"}),
        http.post("/v1/tasks/other/versions", files=files),
        http.patch("/v1/tasks/known", json={"active_version": 1}),
        http.delete("/v1/tasks/known"),
        http.get("/v1/tasks/known"),
    ]
    for refused in refusals:
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert refused.headers["retry-after"]
    assert "medley_store_errors_total 5.0" in http.get("/metrics").text
    redis.start()
    while http.put("/v1/tasks/known", json={"description": "back"}).status_code == 503:
        time.sleep(0.05)
    assert http.get("/v1/tasks/known").json()["description"] == "back"
