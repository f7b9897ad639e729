"""What all tests share."""

from __future__ import annotations

import pytest
import structlog


def silence_log() -> None:
    """Without the supervisor's configuration structlog prints to stdout, between the runner's own lines."""
    structlog.configure(
        processors=[structlog.processors.KeyValueRenderer()], logger_factory=structlog.ReturnLoggerFactory()
    )


@pytest.fixture(scope="session", autouse=True)
def quiet_log() -> None:
    """From the first test on."""
    silence_log()
