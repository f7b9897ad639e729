"""A real `medley serve` in a process of its own, and the tiny base that it serves."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import httpx
import psutil

MEDLEY = str(Path(sys.executable).with_name("medley"))
PATIENCE_SECONDS = 120.0  # for what takes a few: the machine may be busy
LONG = 1536  # positions, so that a request can run for a while
READY = "Medley is ready at "


def environment(**variables: str) -> dict[str, str]:
    """This process's, without settings of its own for Medley."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEDLEY_")}
    return {**kept, "OMP_NUM_THREADS": "1", **variables}


def write_long_base(folder: Path) -> Path:
    """A tiny base that takes `LONG` positions."""
    from tests.api.tiny_base import write_base

    write_base(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": LONG}))
    return folder


class ServerProcess:
    """A server in its own session. As a context manager it waits until it is ready, and leaves nothing behind."""

    def __init__(
        self, model: Path | None, data: Path, *options: str, wrapper: Sequence[str] = (), **variables: str
    ) -> None:
        """`wrapper`: a command that has to replace itself by the one that follows it."""
        self.data = data
        self._log = data.with_suffix(".log")
        command = [*wrapper, MEDLEY, "serve", "--data-dir", str(data), "--port", "0", *options]
        if model is not None:
            command += ["--model", str(model)]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, "--kv-cache-memory", "0.05"],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(**variables),
                start_new_session=True,
            )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self._family: list[psutil.Process] = []
        self.url = ""

    def __enter__(self) -> ServerProcess:
        try:
            line = self._lines.get(timeout=PATIENCE_SECONDS)
            assert line.startswith(READY), self.log()
        except BaseException:
            self.end()
            raise
        self.url = line.removeprefix(READY).strip()
        self._family = psutil.Process(self.process.pid).children(recursive=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def child(self, name: str) -> psutil.Process:
        """`engine` or `redis`."""
        marks = {"engine": "server.engine", "redis": "redis-server"}
        return next(child for child in self._children() if any(marks[name] in part for part in child.cmdline()))

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the parent alone."""
        self.process.send_signal(number)

    def wait(self) -> int:
        """Wait for its end; the exit status."""
        status = self.process.wait(PATIENCE_SECONDS)
        self._reader.join()
        return status

    def stop(self) -> int:
        """SIGTERM, and the exit status."""
        self.signal(signal.SIGTERM)
        return self.wait()

    def log(self) -> str:
        """All of stderr so far."""
        return self._log.read_text()

    def printed(self) -> list[str]:
        """What stdout has had since the first line."""
        lines = []
        while not self._lines.empty():
            lines.append(self._lines.get())
        return lines

    def orphans(self) -> Sequence[psutil.Process]:
        """Its children that live on after what takes a moment has had its time."""
        give_up = time.monotonic() + PATIENCE_SECONDS
        while (alive := [child for child in self._family if _lives(child)]) and time.monotonic() < give_up:
            time.sleep(0.05)
        return alive

    def end(self) -> None:
        """Kill whatever is left."""
        family = self._children()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        for child in family:
            if child.is_running():
                child.kill()

    def _children(self) -> list[psutil.Process]:
        if self.process.poll() is None:
            return psutil.Process(self.process.pid).children(recursive=True)
        return self._family

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)


def _lives(process: psutil.Process) -> bool:
    """Whether it still runs: one that ended and that nobody has waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def run_medley(*arguments: str, stdin: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """The command, to its end."""
    return subprocess.run(
        [MEDLEY, *arguments],
        env=environment(**variables),
        input=stdin,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=PATIENCE_SECONDS,
        check=False,
    )


def one_line(text: str) -> str:
    """The text, which has to be a single line."""
    assert text.count("\n") == 1, text
    assert text.endswith("\n")
    return text


def upload(url: str, task: str, folder: Path) -> httpx.Response:
    """Publish a PEFT folder."""
    names = ("adapter_config.json", "adapter_model.safetensors")
    files = [("files", (name, (folder / name).read_bytes())) for name in names]
    return httpx.post(f"{url}/v1/tasks/{task}/versions", files=files, timeout=PATIENCE_SECONDS)


def generate(url: str, task: str, **fields: object) -> httpx.Response:
    """One short answer of a task."""
    body = {"input": "a river", "max_tokens": 4, "temperature": 0, **fields}
    return httpx.post(f"{url}/v1/tasks/{task}/generate", json=body, timeout=PATIENCE_SECONDS)
