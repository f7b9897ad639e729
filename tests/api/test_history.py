"""Who changed a task, when, and by which request: over HTTP."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest

from server.engine.protocol import BaseFacts
from tests.api.conftest import Scripted, folder_files
from tests.api.keyed import error_of, keyed


def test_every_change_is_recorded_with_its_key_and_request(
    redis_url: str, base_facts: BaseFacts, tmp_path: Path, adapter_folders: dict[str, Path]
) -> None:
    with keyed(redis_url, base_facts, tmp_path) as server:
        first, first_text = server.key("publish")
        second, second_text = server.key("publish")
        one, two = server.client(first_text), server.client(second_text)
        before = time.time()

        def by(request_id: str) -> dict[str, str]:
            return {"X-Request-ID": request_id}

        for request_id, method in (("r-1", "lora"), ("r-2", "ia3")):
            one.post("/v1/tasks/t/versions", files=folder_files(adapter_folders[method]), headers=by(request_id))
        two.put("/v1/tasks/t", json={"description": "d"}, headers=by("r-3"))
        two.post("/v1/tasks/t/rollback", headers=by("r-4"))
        two.patch("/v1/tasks/t", json={"canary": {"version": 2, "percent": 5}}, headers=by("r-5"))
        one.patch("/v1/tasks/t", json={"canary": None}, headers=by("r-6"))
        one.patch("/v1/tasks/t", json={"active_version": 2}, headers=by("r-7"))
        one.delete("/v1/tasks/t/versions/1", headers=by("r-8"))
        one.delete("/v1/tasks/t", headers=by("r-9"))

        page = server.caller("invoke").get("/v1/tasks/t/history").json()
        assert (page["object"], page["has_more"]) == ("list", False)
        entries = list(reversed(page["data"]))
        assert [(entry["action"], entry["request_id"]) for entry in entries] == [
            ("task_put", "r-1"),
            ("version_published", "r-1"),
            ("version_published", "r-2"),
            ("task_put", "r-3"),
            ("task_rolled_back", "r-4"),
            ("canary_set", "r-5"),
            ("canary_set", "r-6"),
            ("version_activated", "r-7"),
            ("version_deleted", "r-8"),
            ("task_deleted", "r-9"),
        ]
        keys = {first.id: {"r-1", "r-2", "r-6", "r-7", "r-8", "r-9"}, second.id: {"r-3", "r-4", "r-5"}}
        for entry in entries:
            assert entry["request_id"] in keys[entry["actor"]]
            assert before - 1 <= entry["time"] <= time.time() + 1
        details = {entry["request_id"]: entry["detail"] for entry in entries}
        assert details["r-3"]["settings"]["description"] == "d"
        assert details["r-4"] == {"version": 1, "previous": 2}
        assert details["r-5"] == {"version": 2, "percent": 5}
        assert details["r-6"] == {"version": None, "percent": None}


def test_it_is_read_in_pages_outlives_the_task_and_is_empty_without_keys(scripted: Scripted) -> None:
    _, http, _ = scripted()
    for number in range(5):
        http.put("/v1/tasks/t", json={"description": str(number)})
    http.delete("/v1/tasks/t")
    seen: list[int] = []
    has_more = True
    while has_more:
        before = {"before": seen[-1]} if seen else {}
        page = http.get("/v1/tasks/t/history", params={"limit": 4, **before}).json()
        seen += [entry["id"] for entry in page["data"]]
        assert {entry["actor"] for entry in page["data"]} == {""}
        has_more = page["has_more"]
    assert seen == [6, 5, 4, 3, 2, 1]
    assert http.get("/v1/tasks/t/history", params={"before": 1}).json()["data"] == []
    assert error_of(http.get("/v1/tasks/t/history", params={"limit": 0})) == (400, "invalid_request")
    assert error_of(http.get("/v1/tasks/nobody/history")) == (404, "task_not_found")


@pytest.mark.parametrize("is_public", [False, True])
def test_another_tenants_history_is_not_shown(
    redis_url: str, base_facts: BaseFacts, tmp_path: Path, is_public: bool
) -> None:
    with keyed(redis_url, base_facts, tmp_path) as server:
        owner, other = server.caller("admin", tenant="a"), server.caller("admin", tenant="b")
        owner.put("/v1/tasks/t", json={"public": is_public})
        assert owner.get("/v1/tasks/t/history").status_code == 200
        refused: httpx.Response = other.get("/v1/tasks/t/history")
        assert error_of(refused) == (404, "task_not_found")
