"""A task's life over HTTP: settings that no two callers lose, rollback, deletion, pins, damaged blobs."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from server.engine.protocol import BaseFacts
from tests.api.conftest import Scripted, folder_files
from tests.api.fake_engine import FACTS
from tests.api.keyed import error_of, keyed
from tests.api.server_thread import ServerThread

Files = list[tuple[str, tuple[str, bytes]]]
WEIGHTS = "adapter_model.safetensors"
numbers = count()


@pytest.fixture(scope="session")
def files(adapter_folders: dict[str, Path]) -> dict[str, Files]:
    return {method: folder_files(folder) for method, folder in adapter_folders.items()}


@pytest.fixture
def task() -> str:
    return f"living-{next(numbers)}"


def publish(http: httpx.Client, task: str, files: Files) -> dict[str, Any]:
    response = http.post(f"/v1/tasks/{task}/versions", files=files)
    assert response.status_code in (200, 201), response.text
    version: dict[str, Any] = response.json()
    return version


def eventually(holds: Callable[[], bool]) -> None:
    give_up = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_settings_that_are_changed_at_once_are_all_kept(scripted: Scripted) -> None:
    _, http, _ = scripted()
    changes: list[dict[str, Any]] = [
        {"description": "d"},
        {"template": "{{ input }}"},
        {"labels": {"a": "b"}},
        {"defaults": {"top_k": 3}},
    ]
    with ThreadPoolExecutor() as pool:
        answers = list(pool.map(lambda change: http.put("/v1/tasks/t", json=change), changes))
    assert {answer.status_code for answer in answers} == {200}
    shown = http.get("/v1/tasks/t").json()
    assert shown["revision"] == len(changes)
    assert all(shown[name] == value for change in changes for name, value in change.items())


def test_a_revision_that_is_named_is_the_only_one_that_is_changed(http: httpx.Client, task: str) -> None:
    path = f"/v1/tasks/{task}"
    assert error_of(http.put(path, json={}, headers={"If-Match": '"1"'})) == (412, "changed_meanwhile")
    assert error_of(http.put(path, json={}, headers={"If-Match": "1" * 5000})) == (400, "invalid_request")
    made = http.put(path, json={"description": "one"})
    assert made.headers["etag"] == http.get(path).headers["etag"] == f'"{made.json()["revision"]}"'
    seen = {"If-Match": made.headers["etag"]}
    assert http.put(path, json={"description": "two"}, headers=seen).status_code == 200
    refused = http.put(path, json={"description": "three"}, headers=seen)
    assert error_of(refused) == (412, "changed_meanwhile")
    assert http.get(path).json()["description"] == "two"
    bad = http.put(path, json={}, headers={"If-Match": '"abc"'})
    assert (error_of(bad), bad.json()["error"]["param"]) == ((400, "invalid_request"), "If-Match")
    http.delete(path)


def test_customization_limits_are_checked_and_shown(http: httpx.Client, task: str) -> None:
    path = f"/v1/tasks/{task}"
    limits = {"methods": ["lora"], "max_virtual_tokens": 0, "max_parameters": 10, "max_bytes": 20}
    assert http.put(path, json={"customization": limits}).json()["customization"] == limits
    assert http.put(path, json={"description": "d"}).json()["customization"] == limits
    bad = http.put(path, json={"customization": {"methods": ["lara"]}})
    assert (error_of(bad), bad.json()["error"]["param"]) == ((400, "invalid_request"), "customization.methods")
    bad = http.put(path, json={"customization": {"max_bytes": -1}})
    assert bad.json()["error"]["param"] == "customization.max_bytes"
    for limit in ("max_virtual_tokens", "max_parameters", "max_bytes"):
        bad = http.put(path, json={"customization": {limit: 2**70}})
        assert (error_of(bad), bad.json()["error"]["param"]) == ((400, "invalid_request"), f"customization.{limit}")
    assert http.put(path, json={"customization": None}).json()["customization"] is None
    http.delete(path)


def test_rollback_goes_back_through_what_was_active_and_still_exists(
    http: httpx.Client, task: str, files: dict[str, Files]
) -> None:
    path = f"/v1/tasks/{task}"
    assert error_of(http.post(f"{path}/rollback")) == (404, "task_not_found")
    for method in ("lora", "ia3", "prompt"):
        publish(http, task, files[method])
    assert http.get(path).json()["previous"] == 2
    assert http.delete(f"{path}/versions/2").status_code == 204
    back = http.post(f"{path}/rollback")
    assert (back.status_code, back.json()["active"], back.json()["previous"]) == (200, 1, None)
    answered = http.post("/v1/completions", json={"model": task, "prompt": "x", "max_tokens": 1}).json()
    assert answered["medley"]["version"] == 1
    assert error_of(http.post(f"{path}/rollback")) == (409, "no_previous")
    http.delete(path)


def test_only_an_admin_makes_a_task_public_and_its_id_is_the_only_public_one(
    redis_url: str, base_facts: BaseFacts, tmp_path: Path
) -> None:
    with keyed(redis_url, base_facts, tmp_path) as server:
        publisher, admin = server.caller("publish", tenant="a"), server.caller("admin", tenant="a")
        assert error_of(publisher.put("/v1/tasks/t", json={"public": True})) == (403, "forbidden")
        assert error_of(publisher.get("/v1/tasks/t")) == (404, "task_not_found")
        assert publisher.put("/v1/tasks/t", json={"public": False}).status_code == 200
        assert admin.put("/v1/tasks/t", json={"public": True}).json()["public"]
        kept = publisher.put("/v1/tasks/t", json={"description": "d"}).json()
        assert (kept["public"], kept["description"]) == (True, "d")
        other = server.caller("admin", tenant="b")
        assert error_of(other.put("/v1/tasks/t", json={"public": True})) == (409, "public_name_taken")
        assert error_of(publisher.put("/v1/tasks/t", json={"public": None})) == (403, "forbidden")


def test_the_engine_is_told_the_complete_set_of_pinned_adapters_whenever_it_changes(
    scripted: Scripted, files: dict[str, Files]
) -> None:
    engine, http, _ = scripted()
    digests = {method: publish(http, method, files[method])["digest"] for method in ("lora", "ia3")}

    def pinned() -> set[str]:
        return {adapter.digest for adapter in engine.pinned.get(timeout=30).adapters}

    assert http.put("/v1/tasks/lora", json={"pinned": True}).json()["pinned"]
    assert pinned() == {digests["lora"]}
    http.put("/v1/tasks/ia3", json={"pinned": True})
    assert pinned() == set(digests.values())
    newer = publish(http, "lora", files["prompt"])["digest"]
    assert pinned() == {newer, digests["ia3"]}
    http.post("/v1/tasks/lora/rollback")
    assert pinned() == set(digests.values())
    http.put("/v1/tasks/ia3", json={"pinned": None})
    assert pinned() == {digests["lora"]}
    http.delete("/v1/tasks/lora")
    assert pinned() == set()
    assert engine.pinned.empty()


def test_a_pin_on_one_server_is_told_to_the_engines_of_all(
    redis_url: str, base_facts: BaseFacts, tmp_path: Path, files: dict[str, Files]
) -> None:
    with (
        keyed(redis_url, base_facts, tmp_path, auth=False, namespace="pins") as here,
        keyed(redis_url, base_facts, tmp_path, auth=False, namespace="pins") as there,
    ):
        digest = publish(here.client(None), "t", files["lora"])["digest"]
        here.client(None).put("/v1/tasks/t", json={"pinned": True})
        assert [adapter.digest for adapter in there.engine.pinned.get(timeout=30).adapters] == [digest]
        with keyed(redis_url, base_facts, tmp_path, auth=False, namespace="pins") as later:
            assert [adapter.digest for adapter in later.engine.pinned.get(timeout=30).adapters] == [digest]


def test_pins_have_half_of_the_adapter_memory_and_no_more(
    scripted: Scripted, base_facts: BaseFacts, files: dict[str, Files]
) -> None:
    gib = 2**30
    engine, http, _ = scripted(adapter_memory=4096 / gib)  # so 2048 bytes, 512 numbers
    for task, parameters, method in (("a", 300, "lora"), ("b", 300, "ia3"), ("same-as-a", 300, "lora")):
        engine.facts = msgspec.structs.replace(FACTS, parameters=parameters)
        publish(http, task, files[method])
    assert http.put("/v1/tasks/a", json={"pinned": True}).status_code == 200
    refused = http.put("/v1/tasks/b", json={"pinned": True})
    assert error_of(refused) == (409, "pins_too_large")
    for said in ("'b'", "1200", "2048", "--adapter-memory"):
        assert said in refused.json()["error"]["message"]
    assert not http.get("/v1/tasks/b").json()["pinned"]
    kept = engine.pinned.get(timeout=30)
    engine.facts = msgspec.structs.replace(FACTS, parameters=600)
    for params in ({}, {"dry_run": True}):
        grown = http.post("/v1/tasks/a/versions", files=files["prompt"], params=params)
        assert error_of(grown) == (409, "pins_too_large")
    assert len(http.get("/v1/tasks/a").json()["versions"]) == 1, "nothing of it is kept"
    inactive = http.post("/v1/tasks/a/versions", files=files["prompt"], params={"activate": False})
    assert inactive.status_code == 201
    assert error_of(http.patch("/v1/tasks/a", json={"active_version": 2})) == (409, "pins_too_large")
    assert http.get("/v1/tasks/a").json()["active"] == 1
    assert engine.pinned.empty()
    assert "medley_pins_left_out 0.0" in http.get("/metrics").text
    assert kept.adapters


def test_a_rollback_beyond_the_pins_room_is_done_and_the_figures_tell(
    scripted: Scripted, files: dict[str, Files]
) -> None:
    engine, http, _ = scripted(adapter_memory=4096 / 2**30)  # so pins may have 512 numbers
    for parameters, method in ((600, "lora"), (300, "ia3")):
        engine.facts = msgspec.structs.replace(FACTS, parameters=parameters)
        publish(http, "a", files[method])
    assert http.put("/v1/tasks/a", json={"pinned": True}).status_code == 200
    kept = engine.pinned.get(timeout=30)
    assert http.post("/v1/tasks/a/rollback").json()["active"] == 1
    assert engine.pinned.get(timeout=30).adapters == []
    assert "medley_pins_left_out 1.0" in http.get("/metrics").text
    assert http.patch("/v1/tasks/a", json={"active_version": 2}).status_code == 200
    assert engine.pinned.get(timeout=30) == kept
    assert "medley_pins_left_out 0.0" in http.get("/metrics").text


def _damage(server: ServerThread, sha256: str) -> None:
    path = Path(server._configure.blobs) / "blobs" / sha256[:2] / sha256
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _changed(files: Files, seed: int) -> Files:
    """The same adapter with other numbers, so that nothing of it is loaded yet."""
    from safetensors.torch import load, save

    tensors = {name: tensor + 0.01 * seed for name, tensor in load(dict(_parts(files))[WEIGHTS]).items()}
    return [("files", (name, save(tensors) if name == WEIGHTS else content)) for name, content in _parts(files)]


def _parts(files: Files) -> list[tuple[str, bytes]]:
    return [part for _, part in files]


def test_a_damaged_version_is_503_by_name_others_go_on_and_the_same_upload_heals_it_at_once(
    http: httpx.Client, server: ServerThread, task: str, files: dict[str, Files], tasks: dict[str, str]
) -> None:
    content = _changed(files["lora"], 1)
    version = publish(http, task, content)
    [weights] = [file["sha256"] for file in version["files"] if file["name"] == WEIGHTS]
    _damage(server, weights)
    body = {"prompt": "x", "max_tokens": 1}
    for _ in range(2):
        refused = http.post("/v1/completions", json={**body, "model": task})
        assert error_of(refused) == (503, "version_corrupt")
        message = refused.json()["error"]["message"]
        assert f"version 1 of task '{task}'" in message
        assert weights in message
        assert "Retry-After" in refused.headers
    file = http.get(f"/v1/tasks/{task}/versions/1/files/{WEIGHTS}")
    assert error_of(file) == (503, "version_corrupt")
    assert f"version 1 of task '{task}'" in file.json()["error"]["message"]
    assert http.post("/v1/completions", json={**body, "model": tasks["ia3"]}).status_code == 200
    again = http.post(f"/v1/tasks/{task}/versions", files=content)
    assert (again.status_code, again.json()["version"]) == (200, 1)
    assert http.post("/v1/completions", json={**body, "model": task}).status_code == 200
    http.delete(f"/v1/tasks/{task}")


def test_a_damaged_customization_is_503_by_name_and_the_task_goes_on(
    http: httpx.Client, server: ServerThread, tasks: dict[str, str], files: dict[str, Files]
) -> None:
    path, content = f"/v1/users/damaged/tasks/{tasks['ia3']}", _changed(files["lora"], 2)
    made = http.put(path, files=content).json()
    [weights] = [file["sha256"] for file in made["files"] if file["name"] == WEIGHTS]
    _damage(server, weights)
    body = {"model": tasks["ia3"], "prompt": "x", "max_tokens": 1}
    refused = http.post("/v1/completions", json={**body, "user": "damaged"})
    assert error_of(refused) == (503, "version_corrupt")
    message = refused.json()["error"]["message"]
    assert f"the customization of user 'damaged' for task '{tasks['ia3']}'" in message
    assert weights in message
    assert http.post("/v1/completions", json=body).status_code == 200
    assert http.put(path, files=content).status_code == 201
    assert http.post("/v1/completions", json={**body, "user": "damaged"}).status_code == 200
    http.delete(path)


def test_a_composition_with_a_damaged_task_is_the_server_s_fault_not_the_upload_s(
    http: httpx.Client, server: ServerThread, task: str, files: dict[str, Files]
) -> None:
    version = publish(http, task, _changed(files["lora"], 3))
    [weights] = [file["sha256"] for file in version["files"] if file["name"] == WEIGHTS]
    _damage(server, weights)
    refused = http.put(f"/v1/users/ann/tasks/{task}", files=files["ia3"])
    assert error_of(refused) == (503, "version_corrupt")
    assert f"version 1 of task '{task}'" in refused.json()["error"]["message"]
    assert http.put(f"/v1/users/ann/tasks/{task}", files=files["ia3"], params={"mode": "replace"}).status_code == 201
    http.delete(f"/v1/tasks/{task}")


def test_one_of_a_checkpoint_s_tasks_may_be_uploaded_by_its_index(scripted: Scripted, files: dict[str, Files]) -> None:
    engine, http, _ = scripted()
    path = "/v1/tasks/t/versions"
    bad = http.post(path, files=files["lora"], params={"task_index": 0})
    assert (error_of(bad), bad.json()["error"]["param"]) == ((400, "invalid_request"), "task_index")
    engine.facts = msgspec.structs.replace(FACTS, tasks=2)
    many = http.post(path, files=files["lora"]).json()
    assert [version["task"] for version in many["tasks"]] == ["t:0", "t:1"]
    one = http.post(path, files=files["lora"], params={"task_index": 1}).json()
    assert (one["task"], one["digest"]) == ("t", many["tasks"][1]["digest"])
    assert http.post(path, files=files["lora"], params={"task_index": 2}).status_code == 400
