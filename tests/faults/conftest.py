"""Short forms of the faults for `make test`, their full figures for `make soak` (which sets MEDLEY_TEST_SOAK)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.adapters import Adapters
from tests.faults.cluster import Cluster, running_cluster
from tests.server_process import PATIENCE_SECONDS, write_long_base


@dataclass(frozen=True)
class Scale:
    """How much of each fault."""

    publishes: int = 15
    away_seconds: float = 3.0
    soon_seconds: float = PATIENCE_SECONDS
    """In which a change has to be seen everywhere. The promise is one second; tests that run beside others on a busy
    machine ask only whether it comes."""
    rounds: int = 1
    """How often each kind of change has to be."""
    clients: int = 10
    churn_seconds: float = 5.0
    contents: int = 8
    """Of each method, that versions have."""
    grown_bytes: int = 2**27
    """What a process may grow by after a warm-up of half of these seconds: libraries and compiled kernels take memory
    of their own at the first use of each form of a batch, and it does not grow on from there."""


FULL = Scale(
    publishes=200,
    away_seconds=30.0,
    soon_seconds=1.0,
    rounds=20,
    clients=50,
    churn_seconds=60.0,
    contents=100,
    grown_bytes=2**26,
)
IN_FULL = bool(os.environ.get("MEDLEY_TEST_SOAK"))

Record = Callable[[str, object], None]
"""What `record_property` is: a figure of a test, shown after a soak."""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What the tests have measured."""
    measured = [report for report in terminalreporter.stats.get("passed", []) if report.user_properties]
    if IN_FULL and measured:
        terminalreporter.section("as measured")
        for report in measured:
            terminalreporter.write_line(report.nodeid.partition("::")[2])
            for name, value in report.user_properties:
                terminalreporter.write_line(f"    {name}: {value}")


@pytest.fixture(scope="session")
def scale() -> Scale:
    return FULL if IN_FULL else Scale()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_long_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def prompts(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    """Soft prompts."""
    return _adapters(base, tmp_path_factory.mktemp("prompts"), "prompt")


@pytest.fixture(scope="session")
def loras(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    """LoRAs."""
    return _adapters(base, tmp_path_factory.mktemp("loras"), "lora")


def _adapters(base: Path, folder: Path, method: str) -> Adapters:
    from tests.api.tiny_base import write_adapter

    write_adapter(base, folder / "pattern", method)
    return Adapters(folder / "pattern", folder)


@pytest.fixture(scope="session")
def running(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with running_cluster(base, tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def cluster(running: Cluster) -> Iterator[Cluster]:
    """The three servers. A test that makes its own tasks and keys needs nothing of what others left."""
    with running.closing_clients() as cluster:
        yield cluster
