"""Servers as they are run for real: processes of their own, stopped while another system is measured."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import psutil
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from benchmarks.bases import random_base
from benchmarks.http_client import complete_all, completion
from benchmarks.workload import Job, Task, Workload
from server.adapters.checkpoint import CONFIG_FILE, WEIGHTS_FILE

_START_SECONDS = 600.0
_STOP_SECONDS = 30.0
_LOOK_SECONDS = 0.5
_AT_REST, _LOOKS_AT_REST = 0.3, 2  # of a core
_UPLOAD_SECONDS = 120.0
_MEDLEY = Path(sys.executable).with_name("medley")
_READY = "Medley is ready at "


class ServerError(Exception):
    """A server did not come up, or refused what it was given."""


def write_base(workload: Workload, folder: Path) -> Path:
    """A random base in Hugging Face form, with a tokenizer of one word per id, so that servers make text."""
    logging.disable_progress_bar()
    random_base(workload.size, workload.length).save_pretrained(folder)
    words = {f"w{index}": index for index in range(workload.size.vocabulary)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1").save_pretrained(folder)
    return folder


class ServerProcess:
    """A process and its children. As a context manager it is ready inside, and gone with all of them after."""

    def __init__(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> None:
        """Start it. Its output goes to `log`; `environment` is added to this process's."""
        self.url = ""
        self.log = log
        self.started = time.perf_counter()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**_environment(), **(environment or {})},
                start_new_session=True,
            )

    def wait_for_line(self, beginning: str) -> str:
        """The rest of the first line of the log that begins so. Raises `ServerError`."""
        while True:
            self.check_alive()
            for line in self.log.read_text(errors="replace").splitlines(keepends=True):
                if line.startswith(beginning) and line.endswith("\n"):
                    return line.removeprefix(beginning).strip()
            time.sleep(0.01)

    def check_alive(self) -> None:
        """Raises `ServerError` where it has ended, or has had its time."""
        if self._process.poll() is not None or time.perf_counter() - self.started > _START_SECONDS:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
            raise ServerError(f"{self._process.args!r} did not come up:\n{tail}")

    def family(self) -> list[psutil.Process]:
        """The process and all below it."""
        parent = psutil.Process(self._process.pid)
        return [parent, *parent.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """Processor time of all of them so far."""
        return sum(times.user + times.system for times in (process.cpu_times() for process in self.family()))

    def settle(self) -> None:
        """Wait until they do next to nothing: what can wait until nobody asks for anything is done."""
        looks_at_rest = 0  # in a row
        while looks_at_rest < _LOOKS_AT_REST:
            self.check_alive()
            used = self.cpu_seconds()
            time.sleep(_LOOK_SECONDS)
            is_at_rest = self.cpu_seconds() - used < _AT_REST * _LOOK_SECONDS
            looks_at_rest = looks_at_rest + 1 if is_at_rest else 0

    def pause(self) -> None:
        """Stop all of them until `resume`."""
        for process in self.family():
            process.suspend()

    def resume(self) -> None:
        """Let them go on, children first."""
        for process in reversed(self.family()):
            process.resume()

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Inside it goes on, after it is paused."""
        self.resume()
        try:
            yield
        finally:
            self.pause()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process.poll() is None:
            family = self.family()
            self.resume()
            self._process.terminate()
            psutil.wait_procs(family[:1], timeout=_STOP_SECONDS)
            for process in family:
                if process.is_running():
                    process.kill()
            psutil.wait_procs(family, timeout=_STOP_SECONDS)
        self._process.wait()


def _environment() -> dict[str, str]:
    """This process's without settings of its own for Medley, and with its number of torch threads."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MEDLEY_")}
    return {**kept, "OMP_NUM_THREADS": str(torch.get_num_threads())}


@contextmanager
def medley_server(base: Path, *options: str, environment: Mapping[str, str] | None = None) -> Iterator[ServerProcess]:
    """`medley serve` on a base's folder, with data and log in a temporary folder; `environment` is added to this
    process's."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="medley-server-")))
        data = folder / "data"
        command = [str(_MEDLEY), "serve", "--model", str(base), "--data-dir", str(data), "--port", "0", *options]
        server = stack.enter_context(ServerProcess(command, folder / "log", environment))
        server.url = server.wait_for_line(_READY)
        yield server


def upload(server: ServerProcess, tasks: Sequence[Task]) -> None:
    """Give Medley's server the tasks. Raises `ServerError`."""
    for task in tasks:
        files = [("files", (name, (task.folder / name).read_bytes())) for name in (CONFIG_FILE, WEIGHTS_FILE)]
        answer = httpx.post(f"{server.url}/v1/tasks/{task.name}/versions", files=files, timeout=_UPLOAD_SECONDS)
        if answer.status_code != 201:
            raise ServerError(f"Medley refuses {task.name}: {answer.text}")


@dataclass(frozen=True)
class Served:
    """A server as one of the systems: jobs in, seconds and tokens out; stopped except while it works."""

    server: ServerProcess
    base_name: str  # what it calls the base; tasks go by their own names
    new_tokens: int

    def run(self, jobs: Sequence[Job]) -> tuple[float, int]:
        """All jobs at once, one request each: seconds from the first request to the last answer's end, and how many
        prompt tokens came from the server's cache."""
        with self.server.awake():
            seconds, answers = complete_all(self.server.url, [self.request(job) for job in jobs])
        return seconds, sum(answer.cached_tokens() for answer in answers)

    def answers(self, jobs: Sequence[Job]) -> list[list[int]]:
        """The new tokens of each job."""
        bodies = [{**self.request(job), "return_token_ids": True} for job in jobs]
        with self.server.awake():
            return [answer.json()["choices"][0]["token_ids"] for answer in complete_all(self.server.url, bodies)[1]]

    def request(self, job: Job) -> dict[str, Any]:
        """The body of a job's request."""
        return completion(job.task.name if job.task else self.base_name, job.prompt, self.new_tokens)


def served_medley(server: ServerProcess, new_tokens: int) -> Served:
    """Medley's server, which calls its base as it likes; stopped once it has nothing more to do."""
    models = httpx.get(f"{server.url}/v1/models", timeout=_UPLOAD_SECONDS).json()["data"]
    server.settle()
    server.pause()
    return Served(server, models[0]["id"], new_tokens)
