"""What happens when something goes wrong or away: overload, deadlines, the engine's death, clients that vanish."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from server.engine.protocol import BaseFacts, Generate, Tokens
from tests.api.conftest import BASE_ID as BASE
from tests.api.conftest import Scripted

ASK: dict[str, Any] = {"model": BASE, "prompt": "x", "max_tokens": 50}


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do; the test's own time limit bounds it."""
    while not condition():
        time.sleep(0.005)


class Caller:
    """A request under way in a thread."""

    def __init__(self, http: httpx.Client, path: str, body: Any) -> None:
        self._answer: list[httpx.Response] = []
        self._thread = threading.Thread(target=lambda: self._answer.append(http.post(path, json=body)))
        self._thread.start()

    def answer(self) -> httpx.Response:
        self._thread.join()
        return self._answer[0]


@pytest.fixture
def raw_post() -> Iterator[Callable[[httpx.Client, Any], socket.socket]]:
    """Sends a completion over a bare connection, which the test may drop."""
    connections: list[socket.socket] = []

    def post(http: httpx.Client, body: Any) -> socket.socket:
        content = json.dumps(body).encode()
        connection = socket.create_connection((http.base_url.host, http.base_url.port or 80))
        connections.append(connection)
        headers = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\n" + headers.encode() + content)
        return connection

    yield post
    for connection in connections:
        connection.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "status", "retry"),
    [
        ("queue_full", 429, True),
        ("adapter_unavailable", 503, True),
        ("deadline_exceeded", 504, False),
        ("not_finite_logits", 500, False),
        ("context_length_exceeded", 400, False),
    ],
)
def test_an_early_error_has_its_own_status(
    scripted: Scripted, code: str, status: int, retry: bool, stream: bool
) -> None:
    engine, http, _ = scripted()
    engine.on_request = lambda request: engine.fail(request.id, code)
    response = http.post("/v1/completions", json={**ASK, "stream": stream})
    assert error_of(response) == (status, code)
    assert ("retry-after" in response.headers) == retry


def test_one_failed_choice_ends_the_request_and_frees_the_others(scripted: Scripted) -> None:
    engine, http, server = scripted()
    caller = Caller(http, "/v1/completions", {**ASK, "n": 3})
    ids = [engine.requests.get().id for _ in range(3)]
    engine.fail(ids[1], "queue_full")
    assert error_of(caller.answer()) == (429, "queue_full")
    assert {engine.aborted.get(), engine.aborted.get()} == {ids[0], ids[2]}
    assert server.services.base is not None
    assert server.services.base.engine.open_sequences == 0


def test_an_error_in_mid_stream_is_an_error_event(scripted: Scripted) -> None:
    engine, http, _ = scripted()

    def answer(request: Generate) -> None:
        engine.say(Tokens(id=request.id, token_ids=[70]))
        engine.fail(request.id, "deadline_exceeded", "too late")

    engine.on_request = answer
    response = http.post("/v1/completions", json={**ASK, "stream": True})
    assert response.status_code == 200
    *_, last = response.text.strip().split("\n\n")
    kind, data = last.split("\n")
    assert kind == "event: error"
    error = json.loads(data.removeprefix("data: "))["error"]
    assert (error["code"], error["message"], error["type"]) == ("deadline_exceeded", "too late", "server_error")
    assert "[DONE]" not in response.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_before_the_first_token_frees_its_sequence(
    scripted: Scripted, raw_post: Callable[[httpx.Client, Any], socket.socket], stream: bool
) -> None:
    engine, http, server = scripted()
    connection = raw_post(http, {**ASK, "stream": stream, "n": 2})
    ids = {engine.requests.get().id, engine.requests.get().id}
    connection.close()
    assert {engine.aborted.get(), engine.aborted.get()} == ids
    until(lambda: server.services.open_requests == 0)
    assert 'outcome="cancelled"' in http.get("/metrics").text


def test_a_client_that_vanishes_in_mid_stream_frees_its_sequence(
    scripted: Scripted, raw_post: Callable[[httpx.Client, Any], socket.socket]
) -> None:
    engine, http, server = scripted()
    connection = raw_post(http, {**ASK, "stream": True})
    request = engine.requests.get()
    engine.say(Tokens(id=request.id, token_ids=[70]))
    assert b"200" in connection.recv(1000)
    connection.close()
    assert engine.aborted.get() == request.id
    until(lambda: server.services.open_requests == 0)


def test_a_client_that_vanishes_frees_a_batch(
    scripted: Scripted, raw_post: Callable[[httpx.Client, Any], socket.socket]
) -> None:
    engine, http, _ = scripted()
    items = [{"task": BASE, "input": "x"}] * 3
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/generate", json={"requests": items}, timeout=0.5)
    ids = {engine.requests.get().id for _ in items}
    assert {engine.aborted.get() for _ in items} == ids


def test_a_stop_string_aborts_the_sequence(scripted: Scripted, base_facts: BaseFacts) -> None:
    engine, http, _ = scripted()
    assert base_facts.tokenizer is not None
    ids = Tokenizer.from_str(base_facts.tokenizer).encode("good food", add_special_tokens=False).ids
    caller = Caller(http, "/v1/completions", {**ASK, "stop": "d f"})
    request = engine.requests.get()
    for token in ids:
        engine.say(Tokens(id=request.id, token_ids=[token]))
    [choice] = caller.answer().json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("goo", "stop")
    assert engine.aborted.get() == request.id


def test_when_the_engine_dies_every_request_gets_an_error_and_readyz_turns(scripted: Scripted) -> None:
    engine, http, server = scripted()
    assert http.get("/readyz").status_code == 200
    callers = [Caller(http, "/v1/completions", {**ASK, "n": n}) for n in (1, 2)]
    for _ in range(3):
        engine.requests.get()
    engine.die("out of memory")
    for caller in callers:
        response = caller.answer()
        assert error_of(response) == (503, "engine_dead")
        assert "out of memory" in response.json()["error"]["message"]
    assert error_of(http.get("/readyz")) == (503, "not_ready")
    assert http.get("/healthz").status_code == 200
    assert error_of(http.post("/v1/completions", json=ASK)) == (503, "engine_dead")
    assert server.services.base is not None
    assert not server.services.base.engine.alive


def test_a_silent_engine_does_not_hold_a_request_past_its_deadline(
    scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.client.DEADLINE_GRACE_SECONDS", 0.05)
    engine, http, _ = scripted(request_timeout=0.05)
    response = http.post("/v1/completions", json=ASK)
    assert error_of(response) == (504, "deadline_exceeded")
    assert engine.aborted.get() == engine.requests.get().id


def test_a_body_that_does_not_come_is_not_waited_for(scripted: Scripted) -> None:
    _, http, _ = scripted(request_timeout=0.2)
    with socket.create_connection((http.base_url.host, http.base_url.port or 80)) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        received = b""
        while chunk := connection.recv(1000):
            received += chunk
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"body_timeout"' in received


def test_a_fault_of_the_server_has_the_same_shape_and_its_request_id(scripted: Scripted) -> None:
    _, http, server = scripted()
    server.services.directory = None  # type: ignore[assignment]  # nothing less breaks it
    response = http.post("/v1/completions", json={**ASK, "model": "t"}, headers={"X-Request-ID": "r-1"})
    assert error_of(response) == (500, "internal_error")
    assert response.headers["x-request-id"] == "r-1"
    assert "date" in response.headers


def test_the_deadline_is_sent_to_the_engine(scripted: Scripted) -> None:
    engine, http, _ = scripted(request_timeout=33.0)
    before = time.time()
    engine.on_request = lambda request: engine.finish(request, [70])
    http.post("/v1/completions", json=ASK)
    assert before + 33 <= engine.requests.get().deadline <= time.time() + 33


def test_a_draining_server_refuses_new_requests_and_finishes_running_ones(scripted: Scripted) -> None:
    engine, http, server = scripted()
    caller = Caller(http, "/v1/completions", {**ASK, "stream": True})
    request = engine.requests.get()
    server.services.draining = True
    refused = http.post("/v1/completions", json=ASK)
    assert error_of(refused) == (503, "shutting_down")
    assert "retry-after" in refused.headers
    assert http.get("/healthz").status_code == 200
    assert http.get("/readyz").status_code == 503
    assert server.services.open_requests == 1
    engine.finish(request, [70, 71])
    assert caller.answer().text.endswith("data: [DONE]\n\n")
    until(lambda: server.services.open_requests == 0)


def test_before_the_base_is_loaded_only_operations_answer(scripted: Scripted) -> None:
    _, http, server = scripted()
    server.services.base = None
    assert http.get("/healthz").status_code == 200
    assert error_of(http.get("/readyz")) == (503, "not_ready")
    refused = http.post("/v1/completions", json=ASK)
    assert error_of(refused) == (503, "not_ready")
    assert "retry-after" in refused.headers


def test_a_base_without_a_tokenizer_takes_token_ids_only(scripted: Scripted, base_facts: BaseFacts) -> None:
    import msgspec

    engine, http, _ = scripted(msgspec.structs.replace(base_facts, tokenizer=None, chat_template=None))
    engine.on_request = lambda request: engine.finish(request, [70, 71], "length")
    answer = http.post("/v1/completions", json={**ASK, "prompt": [5, 6], "return_token_ids": True}).json()
    assert (answer["choices"][0]["text"], answer["choices"][0]["token_ids"]) == ("", [70, 71])
    assert error_of(http.post("/v1/completions", json=ASK)) == (400, "no_tokenizer")
    assert error_of(http.post("/v1/completions", json={**ASK, "prompt": [5], "stop": "a"})) == (400, "no_tokenizer")
    chat = {"model": BASE, "messages": [{"role": "user", "content": "x"}]}
    assert error_of(http.post("/v1/chat/completions", json=chat)) == (400, "no_chat_template")


def test_a_version_made_for_another_base_is_listed_and_not_served(scripted: Scripted, adapter_folders: Any) -> None:
    from tests.api.conftest import folder_files

    engine, http, server = scripted()
    response = http.post("/v1/tasks/t/versions", files=folder_files(adapter_folders["lora"]))
    assert response.status_code == 201
    assert engine.inspected.get().folder
    base = server.services.base
    assert base is not None
    import msgspec

    base.facts = msgspec.structs.replace(base.facts, fingerprint="0" * 64)
    assert not http.get("/v1/tasks/t").json()["versions"][0]["servable"]
    refused = http.post("/v1/completions", json={**ASK, "model": "t"})
    assert error_of(refused) == (409, "base_mismatch")


def test_a_version_made_for_another_base_is_not_put_before_requests(scripted: Scripted, adapter_folders: Any) -> None:
    import msgspec

    from tests.api.conftest import folder_files

    _, http, server = scripted()
    base, files = server.services.base, folder_files(adapter_folders["lora"])
    assert base is not None
    made_for = base.facts
    assert http.post("/v1/tasks/t/versions", files=files).status_code == 201
    base.facts = msgspec.structs.replace(made_for, fingerprint="0" * 64)
    assert http.post("/v1/tasks/t/versions", files=files).json()["version"] == 2
    for refused in (
        http.patch("/v1/tasks/t", json={"active_version": 1}),
        http.patch("/v1/tasks/t", json={"canary": {"version": 1, "percent": 50}}),
        http.post("/v1/tasks/t/rollback"),
    ):
        assert error_of(refused) == (409, "base_mismatch")
        assert "another base" in refused.json()["error"]["message"]
    shown = http.get("/v1/tasks/t").json()
    assert (shown["active"], shown["previous"], shown["canary"]) == (2, 1, None)
    base.facts = made_for  # a server of that base, on the same index
    assert http.patch("/v1/tasks/t", json={"active_version": 1}).json()["active"] == 1


def test_an_upload_during_the_engines_death_gets_an_error(scripted: Scripted, adapter_folders: Any) -> None:
    from tests.api.conftest import folder_files

    engine, http, _ = scripted()
    engine.die()
    response = http.post("/v1/tasks/t/versions", files=folder_files(adapter_folders["lora"]))
    assert error_of(response) == (503, "engine_dead")
