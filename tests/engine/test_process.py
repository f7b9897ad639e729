"""The engine process's own work, on a thread and over a socket: stored adapters, damaged ones, checks of stacks."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters_store import LocalBlobs
from server.engine.channel import Channel
from server.engine.process import EngineProcess
from server.engine.protocol import (
    AdapterRef,
    Configure,
    FromEngine,
    Generate,
    Healed,
    Inspect,
    Inspected,
    Pin,
    Ready,
    Sampling,
    StepOutput,
    ToEngine,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "adapterhub"


class Engine:
    """The HTTP process's end of the socket."""

    def __init__(self, folder: Path) -> None:
        self.blobs = LocalBlobs(folder / "blobs")
        ours, theirs = socket.socketpair()
        configure = Configure(
            model=str(GOLDEN / "base"),
            base_id="base",
            device="cpu",
            dtype="float32",
            max_seqs=8,
            max_batch_tokens=64,
            max_prefill_tokens=None,
            max_model_len=None,
            kv_cache_bytes=2**20,
            adapter_bytes=2**20,
            page_size=16,
            max_queue=8,
            blobs=str(folder / "blobs"),
            blob_cache=str(folder / "copies"),
            blob_cache_bytes=2**20,
            cache=str(folder),
        )
        channel: Channel[ToEngine] = Channel(theirs, ToEngine)
        self._thread = threading.Thread(target=lambda: EngineProcess(channel, configure).run())
        self._thread.start()
        self._socket = ours
        ours.settimeout(60)
        self._channel: Channel[FromEngine] = Channel(ours, FromEngine)
        assert isinstance(self._channel.receive(), Ready)

    def close(self) -> None:
        """Hang up; the engine ends."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(60)
        self._channel.close()

    def store(self, folder: Path) -> AdapterRef:
        """Publish an adapter's files."""
        files = {}
        with self.blobs.staging() as staging:
            for path in (path for path in folder.iterdir() if path.name != "expected.json"):
                files[path.name] = self.blobs.put(Path(shutil.copy(path, staging))).sha256
        return AdapterRef(digest=folder.name, files=files)

    def ask(self, *messages: Any) -> None:
        """Send these."""
        for message in messages:
            self._channel.send(message)

    def generate(self, *stack: AdapterRef) -> str:
        """How a request for one token ends: "length", or an error's code and message."""
        sampling = Sampling(max_tokens=1, temperature=0.0, ignore_eos=True)
        self.ask(Generate(id="one", prompt=[5], stack=stack, sampling=sampling, deadline=time.time() + 60))
        while True:
            message = self._channel.receive()
            assert isinstance(message, StepOutput)
            for failed in message.failed:
                return f"{failed.code}: {failed.message}"
            for tokens in message.tokens:
                return str(tokens.finish_reason)

    def inspect(self, folder: Path, under: AdapterRef | None) -> Inspected:
        """The answer to a check."""
        self.ask(Inspect(id="check", folder=str(folder), under=under))
        while not isinstance(message := self._channel.receive(), Inspected):
            assert message is not None
        return message

    def until_pinned(self) -> int:
        """Bytes that stay, once there are any."""
        while True:
            message = self._channel.receive()
            assert isinstance(message, StepOutput)
            if message.stats.bank_pinned_bytes:
                return message.stats.bank_pinned_bytes


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    engine = Engine(tmp_path)
    yield engine
    engine.close()


def test_a_damaged_adapter_says_so_at_once_and_serves_once_it_is_healed(engine: Engine) -> None:
    damaged, whole = engine.store(GOLDEN / "cases" / "lora"), engine.store(GOLDEN / "cases" / "ia3")
    sha256 = damaged.files["adapter.safetensors"]
    path = engine.blobs.path(sha256)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for _ in range(3):
        end = engine.generate(damaged)
        assert end.startswith("version_corrupt")
        assert sha256 in end
    assert engine.generate(whole) == "length"
    path.write_bytes(content)
    assert engine.generate(damaged).startswith("version_corrupt"), "it rests"
    engine.ask(Healed(blobs=[sha256]))
    assert engine.generate(damaged) == "length"
    path.unlink()
    assert engine.generate(damaged) == "length", "what is resident needs no blob"


def test_a_missing_blob_is_named(engine: Engine) -> None:
    adapter = engine.store(GOLDEN / "cases" / "lora")
    sha256 = adapter.files["adapter_config.json"]
    engine.blobs.delete(sha256)
    end = engine.generate(adapter)
    assert end.startswith("version_corrupt")
    assert sha256 in end


def test_pins_are_loaded_while_nobody_asks(engine: Engine) -> None:
    adapter = engine.store(GOLDEN / "cases" / "lora")
    engine.ask(Pin(adapters=[adapter]))
    assert engine.until_pinned() > 0
    for sha256 in adapter.files.values():
        engine.blobs.delete(sha256)
    assert engine.generate(adapter) == "length"


def test_of_two_classification_heads_the_upper_is_refused_at_its_upload_and_on_every_request(engine: Engine) -> None:
    folder, other = GOLDEN / "cases" / "head_classification", GOLDEN / "cases" / "head_one_layer"
    task, user = engine.store(folder), engine.store(other)
    answer = engine.inspect(other, under=task)
    assert answer.error is not None
    assert (answer.error.code, answer.error.param) == ("cannot_compose", "mode")
    assert "replace" in answer.error.message
    assert engine.inspect(other, under=None).facts is not None
    assert engine.inspect(GOLDEN / "cases" / "lora", under=task).facts is not None
    assert engine.generate(task, user).startswith("cannot_compose")


def test_virtual_tokens_of_both_count_against_the_models_length(engine: Engine, tmp_path: Path) -> None:
    long = tmp_path / "long"
    long.mkdir()
    ids = ", ".join(["7"] * 70)
    (long / "adapter_config.json").write_text(f'{{"medley_method": "text_prompt", "token_ids": [{ids}]}}')
    assert engine.inspect(long, under=None).facts is not None
    answer = engine.inspect(long, under=engine.store(long))
    assert answer.error is not None
    assert answer.error.param == "num_virtual_tokens"


def test_its_memory_moves_to_huge_pages_while_nobody_asks_for_anything(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    moved = threading.Semaphore(0)

    def moves() -> Iterator[None]:
        for _ in range(3):
            moved.release()
            yield

    monkeypatch.setattr("server.engine.process.moves_to_huge_pages", moves)
    engine = Engine(tmp_path)
    try:
        for _ in range(3):
            assert moved.acquire(timeout=60)
        assert engine.generate() == "length"
    finally:
        engine.close()
