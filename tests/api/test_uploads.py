"""Uploads: what is accepted, what is refused with which code, and that nothing of a refused one stays."""

from __future__ import annotations

import json
import socket
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from filelock import FileLock
from safetensors.torch import load, save

from tests.api.conftest import folder_files
from tests.api.server_thread import ServerThread

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Parts = dict[str, bytes]


@pytest.fixture
def parts(adapter_folders: dict[str, Path]) -> Parts:
    folder = adapter_folders["lora"]
    return {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


@pytest.fixture
def task(http: httpx.Client) -> Iterator[str]:
    """A name that nobody has used."""
    name = f"upload-{uuid.uuid4().hex}"
    yield name
    http.delete(f"/v1/tasks/{name}")


def upload(http: httpx.Client, task: str, parts: Parts, **query: Any) -> httpx.Response:
    files = [("files", (name, content)) for name, content in parts.items()]
    return http.post(f"/v1/tasks/{task}/versions", files=files, params=query)


def refused(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def changed_config(parts: Parts, **changes: Any) -> Parts:
    return {**parts, CONFIG: json.dumps({**json.loads(parts[CONFIG]), **changes}).encode()}


def changed_tensor(parts: Parts, change: Any) -> tuple[Parts, str]:
    tensors = load(parts[WEIGHTS])
    name = sorted(tensors)[0]
    tensors[name] = change(tensors[name]).contiguous()
    return {**parts, WEIGHTS: save(tensors)}, name


def test_a_new_version_is_active_at_once_and_its_files_come_back_byte_for_byte(
    http: httpx.Client, task: str, parts: Parts
) -> None:
    parts["README.md"] = b"# made by PEFT\n"
    response = upload(http, task, parts)
    assert response.status_code == 201
    version = response.json()
    assert (version["task"], version["version"], version["method"], version["active"]) == (task, 1, "lora", True)
    assert version["bytes"] == sum(map(len, parts.values()))
    assert version["parameters"] == sum(tensor.numel() for tensor in load(parts[WEIGHTS]).values())
    for name, content in parts.items():
        file = http.get(f"/v1/tasks/{task}/versions/1/files/{name}")
        assert file.content == content
    assert http.post(f"/v1/tasks/{task}/generate", json={"input": "x", "max_tokens": 1}).json()["version"] == 1


def test_the_same_content_again_is_the_same_version(http: httpx.Client, task: str, parts: Parts) -> None:
    first = upload(http, task, parts, activate=False)
    assert (first.status_code, first.json()["active"]) == (201, False)
    assert refused(http.post(f"/v1/tasks/{task}/generate", json={"input": "x"})) == (409, "no_active_version")
    again = upload(http, task, parts)
    assert (again.status_code, again.json()["active"]) == (200, True)
    assert again.json()["version"] == first.json()["version"] == 1
    assert again.json()["digest"] == first.json()["digest"]


def test_a_dry_run_checks_everything_and_keeps_nothing(
    http: httpx.Client, server: ServerThread, task: str, parts: Parts
) -> None:
    blobs = Path(server._configure.blobs)
    before = sorted(blobs.rglob("*"))
    other, _ = changed_tensor(parts, lambda tensor: tensor + 1)
    response = upload(http, task, other, dry_run=True)
    assert response.status_code == 200
    assert (response.json()["version"], response.json()["method"]) == (None, "lora")
    assert refused(http.get(f"/v1/tasks/{task}")) == (404, "task_not_found")
    assert sorted(blobs.rglob("*")) == before
    published = upload(http, task, other)
    assert published.json()["digest"] == response.json()["digest"]


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_file(http: httpx.Client, task: str, parts: Parts, name: str) -> None:
    del parts[name]
    response = upload(http, task, parts)
    assert refused(response) == (400, "missing_file")
    assert name in response.json()["error"]["message"]


@pytest.mark.parametrize("name", ["adapter_model.bin", "notes.txt", "../../escape", "training_args.bin"])
def test_unknown_file(http: httpx.Client, task: str, parts: Parts, name: str) -> None:
    response = upload(http, task, {**parts, name: b"\x80\x04."})
    assert refused(response) == (400, "unknown_file")
    if name.endswith(".bin"):
        assert "safetensors" in response.json()["error"]["message"]


def test_a_file_that_comes_twice_is_unknown(http: httpx.Client, task: str, parts: Parts) -> None:
    files = [("files", (name, content)) for name, content in [*parts.items(), (CONFIG, b"{}")]]
    assert refused(http.post(f"/v1/tasks/{task}/versions", files=files)) == (400, "unknown_file")


def test_a_part_of_another_name_is_refused(http: httpx.Client, task: str, parts: Parts) -> None:
    files = [("file", (name, content)) for name, content in parts.items()]
    assert refused(http.post(f"/v1/tasks/{task}/versions", files=files)) == (400, "unknown_field")


def test_not_safetensors(http: httpx.Client, task: str, parts: Parts) -> None:
    for content in (b"\x80\x04pickle", parts[WEIGHTS][:-7], b""):
        assert refused(upload(http, task, {**parts, WEIGHTS: content})) == (400, "not_safetensors")


def test_bad_config(http: httpx.Client, task: str, parts: Parts) -> None:
    for content in (b"{", b"[]", b'{"peft_type": 3}'):
        assert refused(upload(http, task, {**parts, CONFIG: content}))[0] == 400
    assert refused(upload(http, task, {**parts, CONFIG: b"{"})) == (400, "bad_config")


def test_unsupported_method(http: httpx.Client, task: str, parts: Parts) -> None:
    response = upload(http, task, changed_config(parts, peft_type="BOFT"))
    assert refused(response) == (400, "unsupported_method")


def test_base_mismatch_names_the_tensor(http: httpx.Client, task: str, parts: Parts) -> None:
    wide, name = changed_tensor(parts, lambda tensor: torch.zeros(tensor.shape[0], tensor.shape[1] + 1))
    response = upload(http, task, wide)
    assert refused(response) == (400, "base_mismatch")
    assert name in response.json()["error"]["message"]


def test_not_finite_names_the_tensor(http: httpx.Client, task: str, parts: Parts) -> None:
    broken, name = changed_tensor(parts, lambda tensor: tensor * float("nan"))
    response = upload(http, task, broken)
    assert refused(response) == (400, "not_finite")
    assert name in response.json()["error"]["message"]


def test_too_large(http: httpx.Client, task: str, parts: Parts) -> None:
    assert refused(upload(http, task, {**parts, "README.md": b"x" * (2**20)})) == (413, "too_large")
    assert refused(upload(http, task, {**parts, "README.md": b"x" * (2**20 + 2**17)})) == (413, "too_large")


def test_nothing_of_a_refused_upload_stays(http: httpx.Client, server: ServerThread, task: str, parts: Parts) -> None:
    blobs = Path(server._configure.blobs)
    before = sorted(blobs.rglob("*"))
    broken, _ = changed_tensor(parts, lambda tensor: tensor * float("inf"))
    for bad in (broken, {CONFIG: parts[CONFIG]}, {**parts, "x.bin": b"1"}, {**parts, "README.md": b"x" * 2**20}):
        assert upload(http, task, bad).is_error
    assert sorted(blobs.rglob("*")) == before
    assert refused(http.get(f"/v1/tasks/{task}")) == (404, "task_not_found")


def test_an_upload_that_waits_for_the_folder_of_uploads_holds_nobody_else_up(
    server: ServerThread, http: httpx.Client, task: str, parts: Parts
) -> None:
    """Another server on the store may hold its lock, on a slow disk for long."""
    lock = FileLock(Path(server._configure.blobs) / "staging.lock")
    with ThreadPoolExecutor() as pool:
        with lock:
            uploading = pool.submit(upload, http, task, parts)
            while not server.services.open_uploads:
                time.sleep(0.01)
            for _ in range(3):
                assert httpx.get(f"{server.url}/healthz", timeout=5).status_code == 200
            assert not uploading.done()
        assert uploading.result().status_code == 201


def test_a_base_of_another_name_is_a_warning(http: httpx.Client, task: str, parts: Parts) -> None:
    response = upload(http, task, changed_config(parts, base_model_name_or_path="someone/else"))
    assert response.status_code == 201
    [warning] = response.json()["warnings"]
    assert "someone/else" in warning


def test_an_upload_is_multipart(http: httpx.Client, task: str) -> None:
    assert refused(http.post(f"/v1/tasks/{task}/versions", json={})) == (415, "unsupported_media_type")
    headers = {"content-type": "multipart/form-data; boundary=x"}
    response = http.post(f"/v1/tasks/{task}/versions", content=b"--y nonsense", headers=headers)
    assert refused(response) == (400, "invalid_request")


def test_names_are_checked(http: httpx.Client, adapter_folders: dict[str, Path]) -> None:
    files = folder_files(adapter_folders["lora"])
    assert refused(http.post("/v1/tasks/tiny-llama/versions", files=files)) == (409, "reserved")
    for name in ("-x", "a b", "a@2", "a" * 129):
        assert refused(http.post(f"/v1/tasks/{name}/versions", files=files)) == (400, "invalid_request")


def test_uploads_beyond_the_servers_places_are_told_to_come_back(
    server: ServerThread, http: httpx.Client, task: str, parts: Parts
) -> None:
    """Every place is held by an upload whose body does not end."""
    port = int(server.url.rsplit(":", 1)[1])
    head = f"POST /v1/tasks/{task}/versions HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
    with ExitStack() as held:
        for _ in range(server.services.settings.max_uploads):
            connection = held.enter_context(socket.create_connection(("127.0.0.1", port)))
            connection.sendall(f"{head}Content-Length: 1000\r\n\r\n--b\r\n".encode())
        while server.services.open_uploads < server.services.settings.max_uploads:
            time.sleep(0.01)
        refused = upload(http, task, parts)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_uploads")
        assert int(refused.headers["Retry-After"]) > 0
    while server.services.open_uploads:
        time.sleep(0.01)
    assert upload(http, task, parts).status_code == 201
