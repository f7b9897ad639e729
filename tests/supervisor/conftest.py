"""A base, an adapter, and servers that a test may kill."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.server_process import ServerProcess, write_long_base

Start = Callable[..., ServerProcess]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_long_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.api.tiny_base import write_adapter

    folder = tmp_path_factory.mktemp("adapters") / "lora"
    write_adapter(base, folder, "lora")
    return folder


@pytest.fixture(scope="module")
def shared(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server for tests that leave it running."""
    with ServerProcess(base, tmp_path_factory.mktemp("shared") / "data") as server:
        yield server


@pytest.fixture
def start(base: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a server on this test's data folder and returns it once it is ready: `start(*options)`."""
    with ExitStack() as servers:
        yield lambda *options: servers.enter_context(ServerProcess(base, tmp_path / "data", *options))
