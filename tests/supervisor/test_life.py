"""A server from its start to its end: ready, drained, refused, hurried."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpx

from tests.server_process import LONG, MEDLEY, PATIENCE_SECONDS, ServerProcess, environment, one_line, run_medley
from tests.supervisor.conftest import Start


def to_group(server: ServerProcess, number: signal.Signals) -> None:
    """As a terminal sends Ctrl-C, and some process managers SIGTERM: to the parent and whoever is in its group."""
    os.killpg(server.process.pid, number)


@contextmanager
def long_stream(server: ServerProcess) -> Iterator[Iterator[str]]:
    """A running request: the lines of its stream, the first of which has come."""
    body = {"model": "tiny", "prompt": "on the river", "max_tokens": LONG - 100, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=PATIENCE_SECONDS) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data:"))
        assert '"text"' in next(lines)
        yield lines


def test_sigterm_lets_the_running_stream_finish_refuses_new_requests_and_exits_0(start: Start) -> None:
    server = start("--log-format", "json")
    assert httpx.get(f"{server.url}/healthz").status_code == 200
    assert httpx.get(f"{server.url}/readyz").status_code == 200

    with long_stream(server) as lines, httpx.Client(base_url=server.url) as other:
        to_group(server, signal.SIGTERM)
        while (refused := other.get("/v1/models")).status_code == 200:
            pass
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert "Retry-After" in refused.headers
        assert other.get("/readyz").status_code == 503
        assert other.get("/healthz").status_code == 200
        *_, last, done = lines
    assert done == "data: [DONE]"
    assert json.loads(last.removeprefix("data:"))["choices"][0]["finish_reason"] == "length"

    assert server.wait() == 0
    assert server.orphans() == []
    assert server.printed() == [], "stdout has the ready line alone"
    assert all(json.loads(line)["level"] in ("info", "warning") for line in server.log().splitlines())


def test_what_outlasts_the_drain_ends_with_an_error_and_the_server_with_0(start: Start) -> None:
    server = start("--drain-timeout", "0.1")
    with long_stream(server) as lines:
        server.signal(signal.SIGTERM)
        *_, last = lines
    assert json.loads(last.removeprefix("data:"))["error"]["code"] == "shutting_down"
    assert server.wait() == 0
    assert server.orphans() == []


def test_ctrl_c_drains_and_a_second_one_does_not_wait_for_it(start: Start) -> None:
    server = start("--drain-timeout", "600")
    with long_stream(server) as lines, httpx.Client(base_url=server.url) as other:
        to_group(server, signal.SIGINT)
        while other.get("/v1/models").status_code == 200:
            pass
        to_group(server, signal.SIGINT)
        *_, last = lines
    assert json.loads(last.removeprefix("data:"))["error"]["code"] == "shutting_down"
    assert server.wait() == 0
    assert server.orphans() == []


def test_an_answer_has_one_date_and_that_is_the_present(shared: ServerProcess) -> None:
    for path in ("/healthz", "/v1/nothing"):
        (date,) = httpx.get(f"{shared.url}{path}").headers.get_list("date")
        assert abs((datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds()) < 600


def test_each_way_in_which_a_start_fails_is_one_line_that_names_the_option(base: Path, tmp_path: Path) -> None:
    def refusal(*options: str) -> str:
        result = run_medley("serve", "--data-dir", str(tmp_path / "data"), *options)
        assert result.returncode == 1, result.stderr
        return one_line(result.stderr)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "--port" in refusal("--model", str(base), "--port", port)
    for url in ("redis://127.0.0.1:1/0", "http://127.0.0.1"):
        assert "--redis-url" in refusal("--model", str(base), "--port", "0", "--redis-url", url)
    assert "--store" in refusal("--model", str(base), "--port", "0", "--store", "ftp://bucket")
    assert "--model" in refusal("--model", str(tmp_path / "nothing"), "--port", "0")
    (tmp_path / "data").rename(tmp_path / "moved")
    (tmp_path / "data").write_text("a file")
    assert "--data-dir" in refusal("--model", str(base), "--port", "0")


def test_a_signal_while_the_base_loads_ends_the_server_with_0(base: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [MEDLEY, "serve", "--model", str(base), "--data-dir", str(tmp_path / "data"), "--port", str(port)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            while not answers(port):
                assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            printed, _ = process.communicate(timeout=PATIENCE_SECONDS)
        finally:
            process.kill()
    assert process.returncode == 0
    assert printed == b""


def answers(port: int) -> bool:
    """Whether it listens and says that it is not ready yet."""
    try:
        return httpx.get(f"http://127.0.0.1:{port}/readyz").status_code == 503
    except httpx.TransportError:
        return False
