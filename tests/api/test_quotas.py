"""Quotas of API keys over HTTP: what is refused, what the refusal says, and that servers share what was used."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters_store import LocalUsage, PrivateRedis, Quotas
from server.api.caller import Caller
from server.api.quotas import QuotaKeeper
from server.engine.protocol import BaseFacts, Generate, Tokens
from tests.api.conftest import BASE_ID, folder_files
from tests.api.keyed import Keyed, error_of, keyed

PROMPT = {"model": BASE_ID, "prompt": "a b c", "max_tokens": 8}


@pytest.fixture
def server(redis_url: str, base_facts: BaseFacts, tmp_path: Path) -> Iterator[Keyed]:
    with keyed(redis_url, base_facts, tmp_path) as server:
        yield server


@pytest.fixture
def other(server: Keyed, redis_url: str, base_facts: BaseFacts, tmp_path: Path) -> Iterator[Keyed]:
    """A second server on the same index."""
    with keyed(redis_url, base_facts, tmp_path, namespace=server.server.namespace) as other:
        yield other


def complete(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post("/v1/completions", json={**PROMPT, **fields})


def refused(response: httpx.Response, quota: str) -> int:
    """Check a refusal by this quota; the seconds that it says."""
    assert error_of(response) == (429, "quota_exceeded"), response.text
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("rate_limit_error", quota)
    return int(response.headers["Retry-After"])


def test_requests_per_minute_hold_over_servers_and_per_key(server: Keyed, other: Keyed) -> None:
    _, text = server.key("invoke", quotas=Quotas(requests_per_minute=4))
    here, there = server.client(text), other.client(text)
    answers = [http.get("/v1/models").status_code for http in (here, there, here, there)]
    assert answers == [200] * 4
    for http in (here, there):
        response = http.get("/v1/models")
        assert 1 <= refused(response, "requests_per_minute") <= 60
        assert "4 requests a minute" in response.json()["error"]["message"]
    assert server.caller("invoke", quotas=Quotas(requests_per_minute=4)).get("/v1/models").status_code == 200


def test_a_key_without_quotas_is_not_counted(server: Keyed) -> None:
    http = server.caller("invoke")
    assert {http.get("/v1/models").status_code for _ in range(20)} == {200}


class Held:
    """Requests that the scripted engine does not answer until it is told."""

    def __init__(self, *servers: Keyed) -> None:
        self.servers = servers
        self.came = threading.Semaphore(0)
        self.requests: list[tuple[Keyed, Generate]] = []
        for server in servers:
            server.engine.on_request = self._hold(server)

    def _hold(self, server: Keyed) -> Any:
        def hold(request: Generate) -> None:
            self.requests.append((server, request))
            self.came.release()

        return hold

    def start(self, http: httpx.Client, **fields: Any) -> tuple[threading.Thread, list[httpx.Response]]:
        """Ask, and return when the engine has the request."""
        answers: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: answers.append(complete(http, **fields)))
        thread.start()
        assert self.came.acquire(timeout=30)
        return thread, answers

    def finish(self) -> None:
        for server, request in self.requests:
            server.engine.finish(request, [70])
        self.requests.clear()


def test_concurrent_requests_hold_over_servers_and_end_with_their_answer(server: Keyed, other: Keyed) -> None:
    held = Held(server, other)
    _, text = server.key("invoke", quotas=Quotas(concurrent_requests=2))
    started = [held.start(server.client(text)), held.start(other.client(text), stream=True)]
    for keyed_server in (server, other):
        assert refused(complete(keyed_server.client(text)), "concurrent_requests") == 1
    held.finish()
    for thread, answers in started:
        thread.join()
        assert answers[0].status_code == 200
    server.engine.on_request = server.answer_request
    http = server.client(text)
    assert {complete(http, stream=stream).status_code for stream in (True, False) for _ in range(10)} == {200}


def test_a_client_that_goes_away_and_a_refused_request_leave_no_lease(server: Keyed) -> None:
    server.engine.on_request = lambda request: server.engine.say(Tokens(id=request.id, token_ids=[70]))
    _, text = server.key("invoke", quotas=Quotas(concurrent_requests=1))
    with server.client(text).stream("POST", "/v1/completions", json={**PROMPT, "stream": True}) as response:
        next(response.iter_bytes())
    assert server.engine.aborted.get(timeout=30)
    server.engine.on_request = server.answer_request
    http = server.client(text)
    give_up = threading.Event()
    while complete(http).status_code == 429:  # the server learns of the disconnect in its own time
        assert not give_up.wait(0.02)
    assert error_of(complete(http, model="nobody")) == (404, "model_not_found")
    assert error_of(complete(http, max_tokens="many")) == (400, "invalid_request")
    assert complete(http).status_code == 200


@pytest.mark.parametrize(("stream", "told"), [(True, 3), (True, 0), (False, 3)])
def test_a_client_that_goes_away_pays_for_what_it_was_told_and_frees_its_place(
    server: Keyed, stream: bool, told: int
) -> None:
    """Its prompt, and each token that had come by then; told by quotas that this amount does, and does not, use up."""

    def hold(request: Generate) -> None:
        for _ in range(told):
            server.engine.say(Tokens(id=request.id, token_ids=[70]))
        came.release()

    came = threading.Semaphore(0)
    whole = complete(server.caller("invoke")).json()["usage"]
    charged = whole["prompt_tokens"] + told
    for quota, is_spent in ((charged, True), (charged + 1, False)):
        _, text = server.key("invoke", quotas=Quotas(tokens_per_day=quota, concurrent_requests=1))
        server.engine.on_request = hold
        go_away(server, text, came, stream=stream, told=told)
        assert server.engine.aborted.get(timeout=30)
        http = server.client(text)
        while (after := complete(http)).status_code == 429 and after.json()["error"]["param"] == "concurrent_requests":
            assert not threading.Event().wait(0.02)
        assert (after.status_code == 429) is is_spent, after.text
        if is_spent:
            refused(after, "tokens_per_day")


def go_away(server: Keyed, text: str, came: threading.Semaphore, *, stream: bool, told: int) -> None:
    """Ask over a connection of its own, and close it: of a stream, once `told` of its tokens are read."""
    host, port = server.server.url.removeprefix("http://").split(":")
    body = json.dumps({**PROMPT, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {text}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode() + body)
        assert came.acquire(timeout=30)
        server.engine.on_request = server.answer_request
        assert complete(server.caller("invoke")).status_code == 200  # so the server has read what came before it
        read = b""
        while stream and read.count(b"data: ") < told:
            read += connection.recv(2**16)


class SlowUsage(LocalUsage):
    """Charges tokens when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.let = asyncio.Event(), asyncio.Event()

    async def charge_tokens(self, key_id: str, limit: int, count: int) -> None:
        self.begun.set()
        await self.let.wait()
        await super().charge_tokens(key_id, limit, count)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_request_that_is_cancelled_while_it_is_charged_pays_and_frees_its_place() -> None:
    """As a client does that closes once it has read [DONE]."""
    usage = SlowUsage()
    keeper = QuotaKeeper(usage, lambda: True)  # type: ignore[arg-type]  # the calls that it makes are the same
    quotas = Quotas(concurrent_requests=1, tokens_per_day=5)
    caller = Caller(key_id="k", quotas=quotas)
    admitted = await keeper.admit(caller)
    caller.bill.tokens = 5
    ending = asyncio.create_task(keeper.settle(admitted))
    await usage.begun.wait()
    ending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ending
    usage.let.set()
    await keeper.settle(admitted)
    assert await usage.lease("k", "another", 1) is None, "its place is free"
    assert await usage.tokens("k", 5) is not None, "it has paid"
    assert not keeper._held, "its lease is not renewed"


def test_a_request_over_the_minute_takes_no_place_among_the_concurrent(server: Keyed) -> None:
    http = server.caller("invoke", quotas=Quotas(requests_per_minute=1, concurrent_requests=1))
    assert complete(http).status_code == 200
    for _ in range(3):
        refused(complete(http), "requests_per_minute")


def test_tokens_of_prompts_and_answers_are_charged_at_the_end(server: Keyed, other: Keyed) -> None:
    server.answer = other.answer = [70, 71]
    _, text = server.key("invoke", quotas=Quotas(tokens_per_day=1))
    here, there = server.client(text), other.client(text)
    usage = complete(here).json()["usage"]
    assert usage["total_tokens"] > 2
    assert 80_000 <= refused(complete(there), "tokens_per_day") <= 86_400
    _, text = server.key("invoke", quotas=Quotas(tokens_per_day=2 * usage["total_tokens"] + 1))
    here, there = server.client(text), other.client(text)
    charged = [complete(here), complete(there, stream=True), complete(here)]
    assert [response.status_code for response in charged] == [200] * 3  # the third began with one token left
    refused(complete(there), "tokens_per_day")


def test_every_choice_and_every_item_of_a_batch_is_charged(server: Keyed) -> None:

    def use(http: httpx.Client) -> int:
        total = complete(http, n=3).json()["usage"]["total_tokens"]
        items = [{"task": BASE_ID, "input": "a b", "max_tokens": 2}] * 2 + [{"task": "nobody", "input": "x"}]
        results = http.post("/v1/generate", json={"requests": items}).json()["results"]
        return int(total + sum(result["usage"]["total_tokens"] for result in results[:2]))

    total = use(server.caller("invoke"))
    for quota, is_spent in ((total, True), (total + 1, False)):
        http = server.caller("invoke", quotas=Quotas(tokens_per_day=quota))
        assert use(http) == total
        assert (complete(http).status_code == 429) is is_spent


def test_with_redis_away_each_server_counts_for_itself(base_facts: BaseFacts, tmp_path: Path) -> None:
    redis = PrivateRedis(tmp_path / "redis")
    redis.start()
    namespace = uuid.uuid4().hex
    try:
        with keyed(redis.url, base_facts, tmp_path, namespace=namespace) as server:
            quotas = Quotas(requests_per_minute=2, concurrent_requests=1, tokens_per_day=1000)
            http = server.caller("invoke", quotas=quotas)
            assert complete(http).status_code == 200
            redis.stop()
            assert [complete(http).status_code for _ in range(2)] == [200] * 2
            refused(complete(http), "requests_per_minute")
            assert error_of(server.client("mk_unknown").get("/v1/models")) == (503, "store_unavailable")
    finally:
        redis.stop()


def test_a_revoked_key_is_refused_by_every_server(server: Keyed, other: Keyed) -> None:
    key, text = server.key("invoke")
    clients = [server.client(text), other.client(text)]
    assert [http.get("/v1/models").status_code for http in clients] == [200, 200]
    server.revoke(key)
    waiting = threading.Event()
    for http in clients:
        while http.get("/v1/models").status_code == 200:
            assert not waiting.wait(0.01)
        assert error_of(http.get("/v1/models")) == (401, "unauthorized")


def test_what_a_key_uploaded_counts_until_it_is_deleted(server: Keyed, adapter_folders: dict[str, Path]) -> None:
    folders = [folder_files(adapter_folders[method]) for method in ("lora", "ia3")]
    sizes = [sum(len(content) for _, (_, content) in files) for files in folders]
    key, text = server.key("publish", quotas=Quotas(stored_bytes=sum(sizes) - 1))
    http = server.client(text)

    def publish(task: str, files: Any, **params: Any) -> httpx.Response:
        return http.post(f"/v1/tasks/{task}/versions", files=files, params=params)

    assert publish("a", folders[0]).status_code == 201
    refused(publish("b", folders[1]), "stored_bytes")
    refused(publish("b", folders[1], dry_run=True), "stored_bytes")
    assert publish("a", folders[0]).status_code == 200  # the same again costs nothing
    assert http.get("/v1/tasks/b").status_code == 404
    assert server.client(server.key("publish")[1]).delete("/v1/tasks/a").status_code == 204  # whoever deletes it
    assert publish("b", folders[1]).status_code == 201
    stored = server.server.services.index.usage.stored_bytes
    assert server.server.wait_for(stored(key.id)) == sizes[1]
    second = publish("b", [(part, (name, content + b" ")) for part, (name, content) in folders[1]][:1] + folders[1][1:])
    assert second.status_code == 201
    assert http.delete("/v1/tasks/b/versions/1").status_code == 204
    size = sum(file["bytes"] for file in second.json()["files"])
    assert server.server.wait_for(stored(key.id)) == size


def test_what_replaces_a_customization_needs_room_for_the_difference_alone(
    server: Keyed, adapter_folders: dict[str, Path]
) -> None:
    files = folder_files(adapter_folders["ia3"])
    size = sum(len(content) for _, (_, content) in files)
    assert server.caller("publish").post("/v1/tasks/t/versions", files=files).status_code == 201
    key, text = server.key("publish", quotas=Quotas(stored_bytes=size + 1))
    http = server.client(text)

    def customize(more: int, user: str = "ann") -> httpx.Response:
        config, weights = files
        grown = ("files", (config[1][0], config[1][1] + b" " * more))
        return http.put(f"/v1/users/{user}/tasks/t", files=[grown, weights])

    stored = server.server.services.index.usage.stored_bytes
    for more in (0, 1, 0):
        assert customize(more).status_code == 201, "there is room for the new one in place of the old"
        assert server.server.wait_for(stored(key.id)) == size + more
    refused(customize(2), "stored_bytes")
    refused(customize(0, user="bob"), "stored_bytes")
    other = server.caller("publish", quotas=Quotas(stored_bytes=1))
    response = other.put("/v1/users/ann/tasks/t", files=files)  # it would count for this key, which did not pay for it
    refused(response, "stored_bytes")
    assert server.server.wait_for(stored(key.id)) == size
