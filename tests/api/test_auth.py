"""Every call of the API × {no key, unknown key, revoked key, wrong scope, another tenant's}.

The calls are taken from the application's own list of routes: one that is not in `CASES` or `OPEN` fails.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from fastapi.routing import iter_route_contexts
from redis.asyncio.connection import AbstractConnection

from adapters_store import KeyScope, scoped
from adapters_store.records import TaskSettings
from server.api.auth import GuardedRoute
from server.engine.protocol import BaseFacts, Generate
from tests.api.conftest import BASE_ID, folder_files
from tests.api.keyed import Keyed, error_of, ids_of, keyed

DOCUMENTATION = {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc", "/static-offline-docs"}
OPEN = {"GET /", "GET /healthz", "GET /readyz"}
LESSER: dict[KeyScope, list[KeyScope]] = {"invoke": [], "publish": ["invoke"], "admin": ["publish"]}
TEXT = {"input": "x", "max_tokens": 2}


@dataclass(frozen=True)
class Case:
    """How a call looks, for a task of the name that is to be put in for TASK."""

    scope: KeyScope
    path: str
    json: Any = None
    has_files: bool = False
    makes: bool = False  # it creates what is not there
    params: dict[str, Any] = field(default_factory=dict)


CASES = {
    "GET /v1/models": Case("invoke", "/v1/models"),
    "GET /v1/models/{model:path}": Case("invoke", "/v1/models/TASK"),
    "GET /v1/methods": Case("invoke", "/v1/methods"),
    "POST /v1/completions": Case("invoke", "/v1/completions", {"model": "TASK", "prompt": "x", "max_tokens": 2}),
    "POST /v1/chat/completions": Case(
        "invoke", "/v1/chat/completions", {"model": "TASK", "messages": [{"role": "user", "content": "x"}]}
    ),
    "POST /v1/generate": Case("invoke", "/v1/generate", {"requests": [{"task": "TASK", **TEXT}]}),
    "POST /v1/tasks/{task}/generate": Case("invoke", "/v1/tasks/TASK/generate", TEXT),
    "POST /v1/tasks/{task}/score": Case("invoke", "/v1/tasks/TASK/score", {"input": "x", "choices": ["a", "b"]}),
    "POST /v1/tasks/{task}/classify": Case("invoke", "/v1/tasks/TASK/classify", {"input": "x"}),
    "GET /v1/tasks": Case("invoke", "/v1/tasks"),
    "GET /v1/tasks/{task}": Case("invoke", "/v1/tasks/TASK"),
    "PUT /v1/tasks/{task}": Case("publish", "/v1/tasks/TASK", {"description": "d"}, makes=True),
    "PATCH /v1/tasks/{task}": Case("publish", "/v1/tasks/TASK", {"active_version": 1}),
    "DELETE /v1/tasks/{task}": Case("publish", "/v1/tasks/TASK"),
    "POST /v1/tasks/{task}/versions": Case("publish", "/v1/tasks/TASK/versions", has_files=True, makes=True),
    "GET /v1/tasks/{task}/versions/{number}": Case("invoke", "/v1/tasks/TASK/versions/1"),
    "DELETE /v1/tasks/{task}/versions/{number}": Case("publish", "/v1/tasks/TASK/versions/1"),
    "GET /v1/tasks/{task}/versions/{number}/files/{name}": Case(
        "invoke", "/v1/tasks/TASK/versions/1/files/adapter_config.json"
    ),
    "GET /v1/tasks/{task}/versions/{number}/neighbours": Case(
        "invoke", "/v1/tasks/TASK/versions/1/neighbours", params={"k": 5}
    ),
    "POST /v1/tasks/{task}/rollback": Case("publish", "/v1/tasks/TASK/rollback"),
    "GET /v1/tasks/{task}/history": Case("invoke", "/v1/tasks/TASK/history"),
    "PUT /v1/users/{user}/tasks/{task}": Case("publish", "/v1/users/ann/tasks/TASK", has_files=True),
    "GET /v1/users/{user}/tasks": Case("invoke", "/v1/users/ann/tasks"),
    "GET /v1/users/{user}/tasks/{task}": Case("invoke", "/v1/users/ann/tasks/TASK"),
    "DELETE /v1/users/{user}/tasks/{task}": Case("publish", "/v1/users/ann/tasks/TASK"),
    "DELETE /v1/users/{user}": Case("publish", "/v1/users/ann"),
    "GET /metrics": Case("admin", "/metrics"),
}
OF_A_TASK = [name for name, case in CASES.items() if "TASK" in f"{case.path} {case.json}"]


@pytest.fixture(scope="module")
def server(redis_url: str, base_facts: BaseFacts, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    with keyed(redis_url, base_facts, tmp_path_factory.mktemp("keyed")) as server:
        yield server


@pytest.fixture(scope="module")
def files(adapter_folders: dict[str, Path]) -> list[tuple[str, tuple[str, bytes]]]:
    return folder_files(adapter_folders["lora"])


numbers = count()


@pytest.fixture
def tenant() -> str:
    """One that has nothing yet."""
    return f"tenant-{next(numbers)}"


def call(http: httpx.Client, name: str, task: str, files: Any) -> httpx.Response:
    case = CASES[name]
    given: dict[str, Any] = {"params": case.params, "files": files if case.has_files else None}
    if case.json is not None:
        given["json"] = _put_in(case.json, task)
    return http.request(name.split(maxsplit=1)[0], case.path.replace("TASK", task), **given)


def _put_in(value: Any, task: str) -> Any:
    if isinstance(value, dict):
        return {key: _put_in(inner, task) for key, inner in value.items()}
    if isinstance(value, list):
        return [_put_in(inner, task) for inner in value]
    return task if value == "TASK" else value


def make_task(http: httpx.Client, task: str, files: Any) -> None:
    """With a customization of the user ann."""
    for response in (
        http.post(f"/v1/tasks/{task}/versions", files=files),
        http.put(f"/v1/users/ann/tasks/{task}", files=files),
    ):
        assert response.status_code == 201, response.text


def test_every_route_is_guarded_and_has_a_case(server: Keyed) -> None:
    app = server.server.app
    routes = [context.original_route for context in iter_route_contexts(app.routes)]
    calls = {}
    for route in routes:
        if isinstance(route, GuardedRoute):
            calls.update({f"{method} {route.path}": route.key_scope for method in route.methods or ()})
        else:
            assert getattr(route, "path", None) in DOCUMENTATION
    assert {name for name, scope in calls.items() if scope is None} == OPEN
    assert {name: scope for name, scope in calls.items() if scope is not None} == {
        name: case.scope for name, case in CASES.items()
    }


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer mk_unknown", "Basic bWs6eA==", "mk_unknown"], ids=str)
def test_without_a_key_that_exists_every_call_is_401(server: Keyed, files: Any, name: str, header: str | None) -> None:
    http = server.client(None)
    if header is not None:
        http.headers["Authorization"] = header
    response = call(http, name, "any", files)
    assert error_of(response) == (401, "unauthorized")
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert response.json()["error"]["type"] == "authentication_error"


@pytest.mark.parametrize("name", CASES)
def test_a_revoked_key_is_401(server: Keyed, files: Any, name: str) -> None:
    key, text = server.key("admin")
    http = server.client(text)
    assert http.get("/v1/models").status_code == 200
    server.revoke(key)
    server.server.services.api_keys.clear()  # the feed's delay is another test's
    assert error_of(call(http, name, "any", files)) == (401, "unauthorized")


@pytest.mark.parametrize("name", CASES)
def test_a_key_of_a_lesser_scope_is_403_whether_or_not_the_task_exists(
    server: Keyed, files: Any, name: str, tenant: str
) -> None:
    make_task(server.caller("publish", tenant=tenant), "there", files)
    http = server.caller(*LESSER[CASES[name].scope], tenant=tenant)
    answers = [call(http, name, task, files) for task in ("there", "nowhere")]
    assert [error_of(answer) for answer in answers] == [(403, "forbidden")] * 2
    assert answers[0].json() == answers[1].json()


@pytest.mark.parametrize("name", CASES)
def test_a_key_of_the_scope_is_let_in(server: Keyed, files: Any, name: str, tenant: str) -> None:
    tenant = "" if name == "GET /metrics" else tenant
    task = f"own-{next(numbers)}"
    make_task(server.caller("publish", tenant=tenant), task, files)
    http = server.caller(CASES[name].scope, tenant=tenant)
    if name.endswith("neighbours"):
        response = http.get(f"/v1/tasks/{task}/versions/1/neighbours", params={"k": 0})  # the engine is not asked
    else:
        response = call(http, name, task, files)
    assert response.status_code not in (401, 403, 404, 429), response.text


@pytest.mark.parametrize("name", OF_A_TASK)
def test_another_tenants_task_answers_as_one_that_nobody_has(server: Keyed, files: Any, name: str, tenant: str) -> None:
    owner = server.caller("publish", tenant=tenant)
    make_task(owner, "theirs", files)
    before = owner.get("/v1/tasks/theirs").json()
    for scope in ("publish", "admin"):
        stranger = server.caller(scope, tenant=f"not-{tenant}-{scope}")
        theirs, nobodys = (call(stranger, name, task, files) for task in ("theirs", "nobody"))
        assert said(theirs, "theirs") == said(nobodys, "nobody")
        if name == "POST /v1/generate":
            assert theirs.json()["results"][0]["error"]["code"] == "task_not_found"
        elif not CASES[name].makes:
            assert theirs.status_code == 404
    after = owner.get("/v1/tasks/theirs").json()
    assert {**after, "last_used": None} == {**before, "last_used": None}


@pytest.fixture
def asked(server: Keyed, monkeypatch: pytest.MonkeyPatch) -> Callable[[httpx.Response], list[tuple[Any, ...]]]:
    """Of a request, by its answer: every command that it had Redis carry out, with the number of its arguments."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    send = AbstractConnection.send_packed_command

    async def listen(connection: AbstractConnection, command: Any, *args: Any, **kwargs: Any) -> None:
        request_id = structlog.contextvars.get_contextvars().get("request_id")
        if request_id is not None:
            sent = command if isinstance(command, bytes) else b"".join(map(bytes, command))
            found.setdefault(request_id, []).extend(commands_of(sent))
        await send(connection, command, *args, **kwargs)

    monkeypatch.setattr(AbstractConnection, "send_packed_command", listen)
    return lambda response: found.get(response.headers["X-Request-ID"], [])


def commands_of(sent: bytes) -> Iterator[tuple[Any, ...]]:
    """Redis' protocol, read: a command's name (a script's with its hash) and how many arguments it has. Left out are
    that of the caller's own key, which the feed may just have made the server forget, and what connections begin with.
    """
    while sent:
        header, _, sent = sent.partition(b"\r\n")
        arguments = []
        for _ in range(int(header.removeprefix(b"*"))):
            size, _, sent = sent.partition(b"\r\n")
            length = int(size.removeprefix(b"$"))
            arguments.append(sent[:length])
            sent = sent[length + 2 :]
        if arguments[0] not in (b"CLIENT", b"SELECT") and not arguments[-2:][0].endswith(b":api_keys"):
            yield (arguments[0], arguments[1] if arguments[0] == b"EVALSHA" else None, len(arguments))


@pytest.mark.parametrize("name", OF_A_TASK)
def test_redis_is_asked_the_same_for_another_tenants_task_as_for_one_that_nobody_has(
    server: Keyed, files: Any, name: str, tenant: str, asked: Callable[[httpx.Response], list[tuple[Any, ...]]]
) -> None:
    """So no clock tells them apart either."""
    make_task(server.caller("publish", tenant=tenant), "theirs", files)
    stranger = server.caller("admin", tenant=f"not-{tenant}")
    call(stranger, name, "before", files)  # its scripts are loaded
    theirs, nobodys = (asked(call(stranger, name, task, files)) for task in ("theirs", "nobody"))
    assert theirs == nobodys
    asks_index = CASES[name].scope == "publish" or name.startswith(("GET /v1/tasks/", "GET /v1/users/"))
    assert bool(theirs) is asks_index, "what is read from memory costs no call"


def said(response: httpx.Response, task: str) -> tuple[int, str]:
    """What was answered, with the task's name and times blotted out."""
    text = response.text.replace(task, "TASK")
    return response.status_code, re.sub(r'"(created|updated)":[0-9.]+', "", text)


def test_lists_show_a_tenants_own_and_public_tasks_alone(server: Keyed, files: Any, tenant: str) -> None:
    mine, theirs = server.caller("publish", tenant=tenant), server.caller("publish", tenant=f"x{tenant}")
    for task in ("a", "c", "e"):
        make_task(mine, task, files)
    for task in ("b", "d"):
        make_task(theirs, f"{tenant}-{task}", files)
    assert ids_of(mine.get("/v1/tasks"), "task") == ["a", "c", "e"]
    assert ids_of(mine.get("/v1/models"), "id") == [BASE_ID, "a", "c", "e"]
    make_public(server, f"x{tenant}", f"{tenant}-b")
    try:
        shown = ["a", "c", "e", f"{tenant}-b"]
        assert ids_of(mine.get("/v1/tasks"), "task") == shown
        assert ids_of(mine.get("/v1/models"), "id") == [BASE_ID, *shown]
        paged: list[str] = []
        has_more = True
        while has_more:
            after = {"after": paged[-1]} if paged else {}
            page = mine.get("/v1/tasks", params={"limit": 1, **after})
            paged += ids_of(page, "task")
            has_more = page.json()["has_more"]
        assert paged == shown
    finally:
        theirs.delete(f"/v1/tasks/{tenant}-b")


def test_a_public_task_is_used_by_all_and_changed_by_its_owner_alone(server: Keyed, files: Any, tenant: str) -> None:
    owner, other = server.caller("publish", tenant=tenant), server.caller("publish", tenant=f"x{tenant}")
    name = f"{tenant}-shared"
    make_task(owner, name, files)
    make_public(server, tenant, name)
    answered = other.post(f"/v1/tasks/{name}/generate", json=TEXT)
    assert answered.json()["medley"]["task"] == name
    assert answered.json()["medley"]["public"] is True
    assert "public" not in owner.post(f"/v1/tasks/{name}/generate", json=TEXT).json()["medley"]
    server.server.wait_for(server.server.services.last_used.flush())
    assert owner.get(f"/v1/tasks/{name}").json()["last_used"] is not None
    shown = other.get(f"/v1/tasks/{name}").json()
    assert (shown["task"], shown["active"], shown["last_used"]) == (name, 1, None)
    assert shown["versions"][0]["task"] == name
    for refused in (
        other.patch(f"/v1/tasks/{name}", json={"active_version": 1}),
        other.delete(f"/v1/tasks/{name}"),
        other.delete(f"/v1/tasks/{name}/versions/1"),
    ):
        assert refused.status_code == 404
    make_task(other, name, files)  # their own, which hides it
    assert other.get(f"/v1/tasks/{name}").json()["created"] > shown["created"]
    assert "public" not in other.post(f"/v1/tasks/{name}/generate", json=TEXT).json()["medley"]
    assert ids_of(other.get("/v1/tasks"), "task").count(name) == 1
    assert other.delete(f"/v1/tasks/{name}").status_code == 204
    assert other.get(f"/v1/tasks/{name}").json()["created"] == shown["created"]
    assert owner.delete(f"/v1/tasks/{name}").status_code == 204
    assert other.get(f"/v1/tasks/{name}").status_code == 404


def test_a_scoped_name_leads_nowhere(server: Keyed, files: Any, tenant: str) -> None:
    make_task(server.caller("publish", tenant=tenant), "theirs", files)
    http = server.caller("admin")
    for name in (f"{tenant}/theirs", f"{tenant}/theirs@1"):
        body = {"model": name, "prompt": "x"}
        assert error_of(http.post("/v1/completions", json=body)) == (404, "model_not_found")
        assert http.get(f"/v1/models/{name}").status_code == 404
        batch = http.post("/v1/generate", json={"requests": [{"task": name, **TEXT}]}).json()
        assert batch["results"][0]["error"]["code"] == "task_not_found"
        assert http.get(f"/v1/tasks/{name.replace('/', '%2F')}").status_code == 404
        assert http.get("/v1/tasks", params={"after": name}).status_code == 404


def test_errors_name_tasks_as_their_tenant_does(server: Keyed, files: Any, tenant: str) -> None:
    http = server.caller("publish", tenant=tenant)
    make_task(http, "mine", files)
    http.put("/v1/tasks/empty", json={})
    answers = [
        http.delete("/v1/tasks/mine/versions/1"),
        http.get("/v1/tasks/mine/versions/7"),
        http.get("/v1/tasks/mine/versions/1/files/none"),
        http.post("/v1/tasks/empty/generate", json=TEXT),
        http.post("/v1/tasks/mine@9/generate", json=TEXT),
        http.post("/v1/tasks/mine@canary/generate", json=TEXT),
    ]
    for answer in answers:
        assert answer.status_code in (404, 409)
        assert tenant not in answer.text


def test_figures_of_the_whole_server_are_for_its_operators(server: Keyed, files: Any, tenant: str) -> None:
    make_task(server.caller("publish", tenant=tenant), "measured", files)
    server.caller("invoke", tenant=tenant).post("/v1/tasks/measured/generate", json=TEXT)
    assert server.caller("invoke", tenant=tenant).put("/v1/tasks/measured", json={}).status_code == 403
    assert error_of(server.caller("admin", tenant=tenant).get("/metrics")) == (403, "forbidden")
    figures = server.caller("admin").get("/metrics").text
    assert f'task="{tenant}/measured"' in figures
    assert 'medley_refused_total{code="forbidden"}' in figures


def test_a_wider_scope_contains_the_lesser_ones(server: Keyed, tenant: str) -> None:
    for scope in ("invoke", "publish", "admin"):
        assert server.caller(scope, tenant=tenant).get("/v1/tasks").status_code == 200
    assert server.caller("admin", tenant=tenant).put("/v1/tasks/t", json={}).status_code == 200


def test_requests_of_one_key_are_one_client_of_the_queue(server: Keyed) -> None:
    key, text = server.key("invoke")
    seen = []

    def answer(request: Generate) -> None:
        seen.append(request.client)
        server.answer_request(request)

    server.engine.on_request = answer
    server.client(text).post("/v1/completions", json={"model": BASE_ID, "prompt": "x", "user": "u"})
    server.engine.on_request = server.answer_request
    assert seen == [key.id]


def test_without_auth_no_key_is_asked_for(redis_url: str, base_facts: BaseFacts, tmp_path: Path) -> None:
    with keyed(redis_url, base_facts, tmp_path, auth=False) as server:
        assert server.client(None).get("/v1/tasks").status_code == 200
        assert server.client("mk_anything").get("/metrics").status_code == 200


def make_public(server: Keyed, tenant: str, task: str) -> None:
    name = scoped(tenant, task)
    services = server.server.services
    server.server.wait_for(services.index.put_task(name, TaskSettings(public=True)))
    server.server.wait_for(services.directory.refresh([name]))
