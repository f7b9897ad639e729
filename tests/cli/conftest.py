"""One server for all tests of the commands; each uses tasks of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.server_process import ServerProcess, run_medley, write_long_base

Medley = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_long_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PEFT folders by method."""
    from tests.api.tiny_base import write_adapter

    root = tmp_path_factory.mktemp("adapters")
    for method in ("lora", "prompt"):
        write_adapter(base, root / method, method)
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture(scope="session")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(base, tmp_path_factory.mktemp("cli") / "data") as server:
        yield server


@pytest.fixture
def medley(server: ServerProcess) -> Medley:
    """The command, told by `MEDLEY_URL` where the server is."""

    def run(*arguments: str, stdin: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        return run_medley(*arguments, stdin=stdin, **{"MEDLEY_URL": server.url, **variables})

    return run
