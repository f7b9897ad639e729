"""A client of one server, in the words of these tests."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.faults.adapters import CONFIG, WEIGHTS
from tests.server_process import PATIENCE_SECONDS

PROMPT = "on the river"


@dataclass(frozen=True)
class Said:
    """A task's answer, and what it says that it comes from."""

    output: str
    version: int
    methods: tuple[str, ...]


class Client:
    """Speaks to the server at `url`; with a key, as its owner."""

    def __init__(self, url: str, key: str | None = None) -> None:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        # No certificates are needed here, and reading the system's takes longer than a request.
        self.http = httpx.Client(base_url=url, headers=headers, timeout=PATIENCE_SECONDS, verify=False)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self.http.close()

    def publish(self, task: str, folder: Path, *, activate: bool = True) -> httpx.Response:
        """Upload a PEFT folder as a version."""
        path = f"/v1/tasks/{task}/versions?activate={'true' if activate else 'false'}"
        return self.http.post(path, files=parts(folder))

    def customize(self, user: str, task: str, folder: Path, mode: str = "compose") -> httpx.Response:
        """Upload a PEFT folder as the user's layer over a task."""
        return self.http.put(f"/v1/users/{user}/tasks/{task}?mode={mode}", files=parts(folder))

    def published(self, task: str, folder: Path) -> int:
        """The number of a version that has to be published."""
        response = self.publish(task, folder)
        assert response.status_code in (200, 201), response.text
        number: int = response.json()["version"]
        return number

    def generate(self, task: str, **fields: Any) -> httpx.Response:
        """One short greedy answer."""
        body = {"input": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True, **fields}
        return self.http.post(f"/v1/tasks/{task}/generate", json=body)

    def said(self, task: str, **fields: Any) -> Said:
        """The answer, which has to come."""
        response = self.generate(task, **fields)
        assert response.status_code == 200, response.text
        document = response.json()
        return _said(document["output"], document["medley"])

    def stream(self, task: str, **fields: Any) -> Iterator[str]:
        """The texts of a streamed answer, as they come; at last its whole `Said` as JSON, which `streamed` reads."""
        body = {"input": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "stream": True, **fields}
        with self.http.stream("POST", f"/v1/tasks/{task}/generate", json=body) as response:
            if response.status_code != 200:
                raise AssertionError((response.status_code, response.read().decode()))
            for line in response.iter_lines():
                assert not line.startswith("event: error"), line
                if line.startswith("data:"):
                    yield line.removeprefix("data:").strip()

    def streamed(self, task: str, **fields: Any) -> Said:
        """A streamed answer, whole: its first and its last event have to name the same version."""
        return whole(self.stream(task, **fields))

    def ready(self) -> dict[str, Any]:
        """What `/readyz` says of a server that is ready."""
        response = self.http.get("/readyz")
        assert response.status_code == 200, response.text
        document: dict[str, Any] = response.json()
        return document

    def figure(self, name: str) -> float:
        """One of `/metrics`, which has no labels."""
        lines = self.http.get("/metrics").text.splitlines()
        return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} "))


def parts(folder: Path) -> list[tuple[str, tuple[str, bytes]]]:
    """A PEFT folder as multipart parts."""
    return [("files", (name, (folder / name).read_bytes())) for name in (CONFIG, WEIGHTS)]


def whole(events: Iterator[str]) -> Said:
    """The answer of a stream's events."""
    *data, done = events
    assert done == "[DONE]", done
    documents = [json.loads(item) for item in data]
    named = [document["medley"] for document in documents if "medley" in document]
    assert len(named) == 2
    assert named[0] == named[1]
    assert documents[-1]["finish_reason"] is not None
    return _said("".join(document.get("text", "") for document in documents), named[0])


def error_of(response: httpx.Response) -> tuple[int, str]:
    """Status and code."""
    return response.status_code, response.json()["error"]["code"]


def _said(output: str, medley: Mapping[str, Any]) -> Said:
    return Said(output, medley["version"], tuple(medley["methods"]))
