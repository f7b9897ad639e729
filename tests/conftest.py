"""What all tests share."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
import structlog
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # its kernels run without a device; read when it is first imported
torch.set_num_threads(1)  # the runner's workers share the cores; the models are tiny


def silence_log() -> None:
    """Without the supervisor's configuration structlog prints to stdout, between the runner's own lines."""
    structlog.configure(
        processors=[structlog.processors.KeyValueRenderer()], logger_factory=structlog.ReturnLoggerFactory()
    )


@pytest.hookimpl(wrapper=True, optionalhook=True)  # of xdist
def pytest_xdist_auto_num_workers() -> Generator[None, int, int]:
    """One more than there are cores: many tests wait for servers that they have started."""
    workers = yield
    return workers if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ else workers + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` need a CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device"))


@pytest.fixture(scope="session", autouse=True)
def quiet_log() -> None:
    """From the first test on."""
    silence_log()
