"""`user` and `priority` reach the engine from every route that generates."""

from __future__ import annotations

from typing import Any

import pytest

from server.engine.protocol import Generate
from tests.api.conftest import BASE_ID as BASE
from tests.api.conftest import Scripted

ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": BASE, "prompt": "x", "n": 2},
    "/v1/chat/completions": {"model": BASE, "messages": [{"role": "user", "content": "x"}], "max_tokens": 4},
    f"/v1/tasks/{BASE}/generate": {"input": "x"},
}


@pytest.mark.parametrize("path", ROUTES)
def test_the_user_is_the_engines_client_and_the_priority_is_the_requests(scripted: Scripted, path: str) -> None:
    engine, http, _ = scripted()
    seen: list[Generate] = []

    def answer(request: Generate) -> None:
        seen.append(request)
        engine.finish(request, [70])

    engine.on_request = answer
    assert http.post(path, json={**ROUTES[path], "user": "ann", "priority": 9}).status_code == 200
    assert {(request.client, request.priority) for request in seen} == {("ann", 9)}
    assert len(seen) == ROUTES[path].get("n", 1)
    seen.clear()
    assert http.post(path, json={**ROUTES[path], "priority": None}).status_code == 200
    assert {(request.client, request.priority) for request in seen} == {("", 0)}


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("priority", [-1, 10, 1.5, "1", True])
def test_a_priority_out_of_range_is_refused_by_name(scripted: Scripted, path: str, priority: Any) -> None:
    engine, http, _ = scripted()
    response = http.post(path, json={**ROUTES[path], "priority": priority})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_request", "priority")
    assert engine.requests.empty()


def test_requests_of_a_batch_have_each_its_own(scripted: Scripted) -> None:
    engine, http, _ = scripted()
    seen: list[Generate] = []

    def answer(request: Generate) -> None:
        seen.append(request)
        engine.finish(request, [70])

    engine.on_request = answer
    items = [{"task": BASE, "input": "x", "user": "ann", "priority": 3}, {"task": BASE, "input": "x", "priority": 10}]
    first, second = http.post("/v1/generate", json={"requests": items}).json()["results"]
    assert "output" in first
    assert second["error"]["param"] == "priority"
    assert [(request.client, request.priority) for request in seen] == [("ann", 3)]
