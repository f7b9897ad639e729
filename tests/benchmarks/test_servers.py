"""Processes that are measured: seen to come up, paused, and gone with their children."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.servers import ServerError, ServerProcess

PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; print('child up', flush=True); time.sleep(600)"])
print("ready at somewhere", flush=True)
time.sleep(600)
"""


def _python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_server_that_ends_is_reported_with_its_last_words(tmp_path: Path) -> None:
    command = _python("import sys; sys.exit('no such model')")
    with ServerProcess(command, tmp_path / "log") as server, pytest.raises(ServerError, match="no such model"):
        server.wait_for_line("ready")


def test_a_paused_server_stands_still_with_its_children_and_leaves_none_behind(tmp_path: Path) -> None:
    with ServerProcess(_python(PARENT), tmp_path / "log") as server:
        assert server.wait_for_line("ready at ") == "somewhere"
        server.wait_for_line("child up")
        family = server.family()
        assert len(family) == 2
        assert server.cpu_seconds() > 0
        server.pause()
        _until(lambda: all(process.status() == psutil.STATUS_STOPPED for process in family))
        with server.awake():
            _until(lambda: all(process.status() != psutil.STATUS_STOPPED for process in family))
        _until(lambda: all(process.status() == psutil.STATUS_STOPPED for process in family))
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family)


def _until(condition: object) -> None:
    give_up = time.monotonic() + 30
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < give_up
        time.sleep(0.01)
