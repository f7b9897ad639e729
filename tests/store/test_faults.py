"""Less common states of Redis: slow, busy, its feed gone. The store says so, and goes on when they end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509 import NameOID
from redis import Redis
from redis.exceptions import ResponseError

from adapters_store import (
    LocalBlobs,
    PrivateRedis,
    RedisIndex,
    RedisNotStarted,
    StoreFull,
    StoreUnavailable,
    TaskDirectory,
)
from adapters_store.index.connection import redis_errors
from adapters_store.index.feed import FeedEvent
from adapters_store.records import TaskSettings
from tests.store.samples import eventually, new_version, publish_text

pytestmark = pytest.mark.anyio

TLS_DOOR = """
import asyncio, ssl, sys
async def pump(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()
async def serve(reader, writer):
    inner_reader, inner_writer = await asyncio.open_unix_connection(sys.argv[1])
    await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer), return_exceptions=True)
async def main():
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(sys.argv[2])
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""
ENDLESS_SCRIPT = "while redis.call('EXISTS', KEYS[1]) == 0 do end"  # but for SCRIPT KILL


async def test_a_redis_that_does_not_answer_is_unavailable_and_followed_again_when_it_does(
    own_redis: PrivateRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters_store.index.connection.CALL_TIMEOUT", 0.3)
    monkeypatch.setattr("adapters_store.mirror.directory.FEED_WAIT", 0.1)
    index = await RedisIndex.connect(own_redis.url)
    tasks = TaskDirectory(index)
    await tasks.start()
    await index.publish("t", new_version("a"), activate=True)
    await eventually(lambda: tasks.get("t") is not None)
    assert own_redis.pid is not None
    os.kill(own_redis.pid, signal.SIGSTOP)
    try:
        with pytest.raises(StoreUnavailable):
            await index.put_task("u", TaskSettings())
        await eventually(lambda: not tasks.available)
        assert (await tasks.resolve("t"))[1].number == 1
        with pytest.raises(StoreUnavailable):
            await tasks.resolve("unknown")
    finally:
        os.kill(own_redis.pid, signal.SIGCONT)
    await eventually(lambda: tasks.available)
    await index.publish("v", new_version("a"), activate=True)
    await eventually(lambda: tasks.get("v") is not None)
    await tasks.stop()
    await index.close()


async def test_while_redis_is_known_to_be_away_nothing_is_asked_of_it(
    index: RedisIndex, blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call would wait until it fails, and those beyond the number of connections for as long again."""
    await index.put_task("t", TaskSettings())
    monkeypatch.setattr(index.redis.connection_pool, "get_connection", None)  # asking would be another error
    index.is_away = lambda: True
    calls = [
        index.get_task("t"),
        index.read_tasks(["t"]),
        index.list_states(9),
        index.count_tasks(),
        index.last_uses(["t"]),
        index.history("t", 9),
        index.customization_history(9),
        index.get_version("t", 1),
        index.list_versions("t"),
        index.find_customization("u", "t"),
        index.charged_for("u", "t", "key"),
        index.customized_as("u", "t"),
        index.list_user_customizations("u", 9),
        index.scan_customizations("t", 9),
        index.count_customizations("t"),
        index.put_task("t", TaskSettings()),
        publish_text(index, blobs, "t", "text"),
    ]
    for call in calls:
        with pytest.raises(StoreUnavailable, match="away"):
            await call
    assert not list(blobs.list()), "nor is a file put for nothing"


async def test_a_redis_busy_with_a_script_is_unavailable_and_followed_again_when_it_ends(
    own_redis: PrivateRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters_store.index.connection.CALL_TIMEOUT", 0.3)
    monkeypatch.setattr("adapters_store.mirror.directory.FEED_WAIT", 0.1)
    index = await RedisIndex.connect(own_redis.url)
    tasks = TaskDirectory(index)
    await tasks.start()
    with Redis.from_url(own_redis.url, socket_timeout=60) as busy, Redis.from_url(own_redis.url) as redis:
        redis.config_set("lua-time-limit", 1)
        script = asyncio.create_task(asyncio.to_thread(_run_until_killed, busy))
        await eventually(lambda: not tasks.available)
        for call in (index.put_task("t", TaskSettings()), index.list_versions("t")):
            with pytest.raises(StoreUnavailable):
                await call
        redis.script_kill()
        await script
    await eventually(lambda: tasks.available)
    await index.publish("t", new_version("a"), activate=True)
    await eventually(lambda: tasks.get("t") is not None)
    await tasks.stop()
    await index.close()


def _run_until_killed(redis: Redis) -> None:
    with pytest.raises(Exception, match="killed"):
        redis.eval(ENDLESS_SCRIPT, 1, "never")


@pytest.mark.parametrize("loss", ["trimmed", "deleted"])
async def test_a_feed_without_any_entry_is_begun_anew_and_followed(
    index: RedisIndex, directory: TaskDirectory, redis_url: str, namespace: str, loss: str
) -> None:
    before = index.index_id
    with Redis.from_url(redis_url) as redis:
        if loss == "trimmed":
            redis.xtrim(f"{namespace}:feed", maxlen=0, approximate=False)
        else:
            redis.delete(f"{namespace}:feed")
        await eventually(lambda: redis.xlen(f"{namespace}:feed") == 1)  # begun by the directory's reload
    await index.publish("t", new_version("a"), activate=True)
    await eventually(lambda: directory.available and directory.get("t") is not None)
    assert index.index_id == before, "the index itself was never lost"


async def test_a_directory_remembers_a_bounded_number_of_old_versions(
    index: RedisIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters_store.mirror.directory.REMEMBERED", 2)
    for text in "abcd":
        await index.publish("t", new_version(text), activate=True)
    directory = TaskDirectory(index)
    await directory.start()
    await directory.stop()  # so that no feed makes it read anything again
    for number in (1, 2, 1, 3):  # 2 is now the one that was asked for longest ago
        assert (await directory.resolve(f"t@{number}"))[1].number == number
    asked: list[int] = []
    get_version = index.get_version

    async def noted(task: str, number: int) -> object:
        asked.append(number)
        return await get_version(task, number)

    monkeypatch.setattr(index, "get_version", noted)
    for number in (1, 3, 2):
        assert (await directory.resolve(f"t@{number}"))[1].number == number
    assert asked == [2]


async def test_a_socket_place_that_another_user_made_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        server = PrivateRedis(tmp_path / ("long" * 30))
        place = Path(server.url.removeprefix("unix://")).parent
        place.symlink_to(tmp_path)
        with pytest.raises(RedisNotStarted, match="TMPDIR"):
            server.start()
        assert server.pid is None


class _RefusedByUvloop:
    """What uvloop raises for a write to a connection that was reset a moment before."""

    def pipeline(self, **_: object) -> None:
        raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")


async def test_a_connection_that_is_reset_under_a_write_is_redis_away_and_ends_no_follower(
    own_redis: PrivateRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters_store.mirror.directory.FEED_WAIT", 0.1)
    index = await RedisIndex.connect(own_redis.url)
    tasks = TaskDirectory(index)
    await tasks.start()
    with monkeypatch.context() as reset:
        reset.setattr(index.feed, "_redis", _RefusedByUvloop())
        with pytest.raises(StoreUnavailable, match="handler is closed"):
            await index.feed.after("0", index.index_id, wait=None)
        await eventually(lambda: not tasks.available)
    await eventually(lambda: tasks.available)
    with monkeypatch.context() as broken:
        broken.setattr(index.feed, "_redis", None)  # a fault that nobody has thought of
        await eventually(lambda: not tasks.available)
    await eventually(lambda: tasks.available)
    await tasks.stop()
    await index.close()


def test_a_script_that_found_no_memory_before_redis_7_means_full() -> None:
    message = (
        "Error running script (call to f_1): @user_script:9: -OOM command not allowed when used memory > 'maxmemory'"
    )
    with pytest.raises(StoreFull), redis_errors():
        raise ResponseError(message)


async def test_an_event_of_a_later_release_makes_everything_be_read_anew_once(
    index: RedisIndex, directory: TaskDirectory, redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    end = index.feed.end

    async def counted() -> str:
        loads.append(1)
        return await end()

    monkeypatch.setattr(index.feed, "end", counted)
    with Redis.from_url(redis_url) as redis:
        redis.xadd(f"{namespace}:feed", {"kind": "not_yet_known"})
    await eventually(lambda: bool(loads))
    await index.publish("t", new_version("a"), activate=True)
    await eventually(lambda: directory.available and directory.get("t") is not None)
    assert len(loads) == 1


class _Told:
    """A listener that counts how often it was cleared."""

    def __init__(self) -> None:
        self.cleared = 0

    def subscribed(self, _: object) -> None:
        pass

    def changed(self, _: FeedEvent) -> None:
        pass

    def clear(self) -> None:
        self.cleared += 1


async def test_listeners_forget_again_what_they_read_while_the_mirror_loaded(
    index: RedisIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, told = TaskDirectory(index), _Told()
    tasks.subscribe(told)
    list_states, cleared = tasks._reader.list_states, []

    async def noted(*arguments: object) -> object:
        cleared.append(told.cleared)
        return await list_states(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(tasks._reader, "list_states", noted)
    await tasks.start()
    assert (cleared, told.cleared) == ([1], 2)
    await tasks.stop()


@pytest.fixture
def tls_door(own_redis: PrivateRedis, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that passes TLS on to a Redis; the port at which it listens is its first line."""
    command = [sys.executable, "-c", TLS_DOOR, own_redis.url.removeprefix("unix://"), write_certificate(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as door:
        yield door
        door.kill()


async def test_a_stop_ends_cleanly_while_the_other_end_of_a_tls_connection_hangs(
    tls_door: subprocess.Popen[bytes],
) -> None:
    """There the other end is to answer when a connection is closed."""
    assert tls_door.stdout is not None
    port = int(tls_door.stdout.readline())
    index = await RedisIndex.connect(f"rediss://127.0.0.1:{port}/0?ssl_cert_reqs=none&ssl_check_hostname=false")
    tasks = TaskDirectory(index)
    await tasks.start()
    feed: Any = index.feed
    await eventually(lambda: feed._waiting is not None and feed._waiting.connection is not None)
    writer = feed._waiting.connection._writer
    tls_door.send_signal(signal.SIGSTOP)
    await tasks.stop()
    assert not tasks.available
    tls_door.kill()
    with suppress(OSError):
        await writer.wait_closed()
    await index.close()


def write_certificate(folder: Path) -> str:
    """A key and a certificate that it signs itself, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "redis")])
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    file = folder / "certificate.pem"
    plain = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    file.write_bytes(plain + builder.sign(key, SHA256()).public_bytes(Encoding.PEM))
    return str(file)
