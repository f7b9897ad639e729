"""Servers to speak HTTP to: one with the real engine, shared; and small ones with a scripted engine, per test."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from adapters_store import PrivateRedis
from server.engine.protocol import BaseFacts, Configure
from tests.api.fake_engine import FakeEngine
from tests.api.server_thread import ServerThread

BASE_ID = "tiny-llama"
ADAPTERS = ("lora", "ia3", "prompt", "prefix")


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    redis = PrivateRedis(tmp_path_factory.mktemp("redis"))
    redis.start()
    yield redis.url
    redis.stop()


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.api.tiny_base import write_base

    folder = tmp_path_factory.mktemp("bases") / BASE_ID
    write_base(folder)
    return folder


@pytest.fixture(scope="session")
def adapter_folders(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tests.api.tiny_base import write_adapter

    folders = {method: tmp_path_factory.mktemp("adapters") / method for method in ADAPTERS}
    for method, folder in folders.items():
        write_adapter(base_folder, folder, method)
    return folders


def configuration(model: Path, folder: Path) -> Configure:
    """What the tests' engines run with."""
    return Configure(
        model=str(model),
        base_id=BASE_ID,
        device="cpu",
        dtype="float32",
        max_seqs=32,
        max_batch_tokens=64,
        max_prefill_tokens=None,
        max_model_len=None,
        kv_cache_bytes=4 * 2**20,
        adapter_bytes=64 * 2**20,
        page_size=8,
        max_queue=64,
        blobs=str(folder / "blobs"),
        blob_cache=str(folder / "blob-cache"),
        blob_cache_bytes=0,
        cache=str(folder / "cache"),
    )


@pytest.fixture(scope="session")
def engine_connection() -> Iterator[Callable[[], socket.socket]]:
    """Starts engine processes; each ends with its socket."""
    processes: list[subprocess.Popen[bytes]] = []

    def start() -> socket.socket:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "server.engine", str(theirs.fileno())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with theirs:
            processes.append(subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment))
        return ours

    yield start
    for process in processes:
        process.wait(timeout=60)


@pytest.fixture(scope="session")
def server(
    redis_url: str,
    base_folder: Path,
    engine_connection: Callable[[], socket.socket],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[ServerThread]:
    """The real engine over the tiny base."""
    folder = tmp_path_factory.mktemp("server")
    limits: dict[str, Any] = {
        "max_upload_bytes": 2**20,
        "max_body_bytes": 2**16,
        "max_choices": 4,
        "max_batch_requests": 8,
    }
    with ServerThread(redis_url, engine_connection(), configuration(base_folder, folder), **limits) as server:
        yield server


@pytest.fixture(scope="session")
def http(server: ServerThread) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def client(server: ServerThread) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def folder_files(folder: Path) -> list[tuple[str, tuple[str, bytes]]]:
    """A PEFT folder as multipart parts."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    return [("files", (name, (folder / name).read_bytes())) for name in names]


@pytest.fixture(scope="session")
def tasks(http: httpx.Client, adapter_folders: dict[str, Path]) -> dict[str, str]:
    """Method → a task that serves it."""
    names = {method: f"the-{method}" for method in adapter_folders}
    for method, folder in adapter_folders.items():
        response = http.post(f"/v1/tasks/{names[method]}/versions", files=folder_files(folder))
        assert response.status_code == 201, response.text
    return names


@pytest.fixture(scope="session")
def base_facts() -> BaseFacts:
    """Of the scripted engine's base: the same tokenizer, no model."""
    from tests.api.tiny_base import CHAT_TEMPLATE, make_tokenizer

    tokenizer = make_tokenizer()
    return BaseFacts(
        id=BASE_ID,
        fingerprint="f" * 64,
        architecture="Scripted",
        parameters=0,
        dtype="float32",
        device="cpu",
        max_model_len=256,
        vocab_size=tokenizer.get_vocab_size(),
        eos_token_ids=[1],
        tokenizer=tokenizer.to_str(),
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        chat_template=CHAT_TEMPLATE,
        kv_pages=100,
        page_size=8,
    )


Scripted = Callable[..., tuple[FakeEngine, httpx.Client, ServerThread]]


@pytest.fixture
def scripted(redis_url: str, base_facts: BaseFacts, tmp_path: Path) -> Iterator[Scripted]:
    """Starts a server over a scripted engine: `engine, http, server = scripted(**settings)`."""
    with ExitStack() as stack:

        def start(facts: BaseFacts = base_facts, **settings: Any) -> tuple[FakeEngine, httpx.Client, ServerThread]:
            engine = stack.enter_context(FakeEngine(facts))
            configure = configuration(tmp_path, tmp_path)
            server = stack.enter_context(ServerThread(redis_url, engine.connection, configure, **settings))
            http = stack.enter_context(httpx.Client(base_url=server.url, timeout=30))
            return engine, http, server

        yield start
