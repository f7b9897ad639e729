"""Redis at its `maxmemory`: changes are refused whole and leave nothing, what is served goes on, and room heals it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from redis import Redis

from adapters_store import PrivateRedis, Quotas
from server.engine.protocol import BaseFacts
from tests.api.conftest import folder_files
from tests.api.keyed import Keyed, error_of, keyed

Files = list[tuple[str, tuple[str, bytes]]]
FULL = (507, "store_full")


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[PrivateRedis]:
    redis = PrivateRedis(tmp_path / "redis")
    redis.start()
    yield redis
    redis.stop()


@pytest.fixture
def operator(redis: PrivateRedis) -> Iterator[Redis]:
    with Redis.from_url(redis.url, decode_responses=True) as operator:
        yield operator


@pytest.fixture
def server(redis: PrivateRedis, base_facts: BaseFacts, tmp_path: Path) -> Iterator[Keyed]:
    with keyed(redis.url, base_facts, tmp_path) as server:
        yield server


@pytest.fixture
def files(adapter_folders: dict[str, Path]) -> dict[str, Files]:
    return {method: folder_files(adapter_folders[method]) for method in ("lora", "ia3", "prompt")}


def publish(http: httpx.Client, task: str, files: Files, **params: Any) -> httpx.Response:
    return http.post(f"/v1/tasks/{task}/versions", files=files, params=params)


def said(http: httpx.Client, task: str) -> Any:
    answer = http.post("/v1/completions", json={"model": task, "prompt": "x", "max_tokens": 1, "user": "ann"})
    return answer.status_code, answer.json().get("medley")


def kept(operator: Redis, folder: Path) -> tuple[set[str], set[str]]:
    """The keys of the index, those that expire left out, and the files of the store."""
    keys = {key for key in operator.scan_iter() if operator.ttl(key) == -1 and not key.endswith(":last_used")}
    return keys, {path.name for path in folder.rglob("*") if path.is_file() and ".redis" not in str(path)}


def test_changes_are_507_and_leave_nothing_what_is_served_goes_on_and_room_heals_it(
    server: Keyed, operator: Redis, files: dict[str, Files], tmp_path: Path
) -> None:
    http = server.caller("admin", quotas=Quotas(requests_per_minute=100, tokens_per_day=10**6))
    for method in ("lora", "ia3"):
        assert publish(http, "kept", files[method], activate=method == "lora").status_code == 201
    assert http.put("/v1/users/ann/tasks/kept", files=files["ia3"]).status_code == 201
    for task in ("kept", "other"):
        assert publish(http, task, files["lora"]).status_code in (200, 201)
    before, shown, stored = said(http, "kept"), http.get("/v1/tasks/kept").json(), kept(operator, tmp_path / "blobs")

    operator.config_set("maxmemory", 1)
    for refused in (
        publish(http, "new", files["prompt"]),
        publish(http, "kept", files["prompt"]),
        http.put("/v1/users/bob/tasks/kept", files=files["prompt"]),
        http.put("/v1/tasks/new", json={}),
        http.put("/v1/tasks/kept", json={"description": "d"}),
        http.patch("/v1/tasks/kept", json={"canary": {"version": 2, "percent": 10}}),
    ):
        assert error_of(refused) == FULL
        assert "maxmemory" in refused.json()["error"]["message"]
    assert kept(operator, tmp_path / "blobs") == stored
    assert http.get("/v1/tasks/kept").json() == {**shown, "last_used": http.get("/v1/tasks/kept").json()["last_used"]}
    assert http.get("/v1/tasks/new").status_code == 404
    assert said(http, "kept") == before, "it is served, and with the user's layer"
    assert http.delete("/v1/tasks/other").status_code == 204, "what makes room is no change that needs any"

    operator.config_set("maxmemory", 0)
    made = publish(http, "new", files["prompt"])
    assert (made.status_code, made.json()["version"]) == (201, 1)
    assert http.put("/v1/users/bob/tasks/kept", files=files["prompt"]).status_code == 201
    assert said(http, "new")[0] == 200
    assert said(http, "kept") == before


def test_a_server_starts_and_follows_the_index_while_redis_is_full(
    server: Keyed, redis: PrivateRedis, operator: Redis, base_facts: BaseFacts, files: dict[str, Files], tmp_path: Path
) -> None:
    _, text = server.key("admin")
    http = server.client(text)
    assert publish(http, "kept", files["lora"]).status_code == 201
    operator.config_set("maxmemory", 1)
    with keyed(redis.url, base_facts, tmp_path, namespace=server.server.namespace) as second:
        there = second.client(text)
        assert said(there, "kept") == said(http, "kept")
        assert http.delete("/v1/tasks/kept").status_code == 204
        while said(there, "kept")[0] == 200:  # until the second has read of it
            pass
        assert said(there, "kept")[0] == 404
