"""Faults: each process of a server killed with `kill -9`, and a second server on the same folder."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import httpx

from tests.server_process import PATIENCE_SECONDS, ServerProcess, generate, one_line, run_medley, upload
from tests.supervisor.conftest import Start
from tests.supervisor.test_life import long_stream


def test_a_killed_parent_leaves_no_process_and_the_next_start_serves_what_was_acknowledged(
    start: Start, adapter: Path
) -> None:
    killed = start()
    assert upload(killed.url, "kept", adapter).status_code == 201
    before = generate(killed.url, "kept").json()["output"]
    killed.signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert killed.orphans() == []

    healed = start()
    assert generate(healed.url, "kept").json()["output"] == before
    assert upload(healed.url, "kept", adapter).status_code == 200, "the same content is the same version"
    assert healed.stop() == 0


def test_a_killed_engine_fails_its_requests_and_ends_the_server_with_1_and_one_line(start: Start) -> None:
    server = start()
    with long_stream(server) as lines:
        server.child("engine").kill()
        *_, last = lines
    assert json.loads(last.removeprefix("data:"))["error"]["code"] == "engine_dead"
    assert server.wait() == 1
    last_line = server.log().splitlines()[-1]
    assert last_line == "medley: the engine process was killed by SIGKILL; the server stops, start it again"
    assert "Traceback" not in server.log()
    assert server.orphans() == []


def test_a_second_server_on_the_same_folder_is_refused_and_the_first_serves_on(
    shared: ServerProcess, base: Path, adapter: Path
) -> None:
    refused = run_medley("serve", "--model", str(base), "--data-dir", str(shared.data), "--port", "0")
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert one_line(refused.stderr).startswith("medley: another server uses the data folder")
    assert "--data-dir" in refused.stderr
    assert upload(shared.url, "served", adapter).status_code == 201
    assert generate(shared.url, "served").status_code == 200


def test_a_killed_private_redis_comes_back_while_known_tasks_are_served(shared: ServerProcess, adapter: Path) -> None:
    server = shared
    assert upload(server.url, "known", adapter).status_code == 201
    redis = server.child("redis")
    redis.kill()
    redis.wait(PATIENCE_SECONDS)
    assert generate(server.url, "known").status_code == 200
    while (response := upload(server.url, "later", adapter)).status_code == 503:
        assert response.json()["error"]["code"] == "store_unavailable"
    assert response.status_code == 201
    assert httpx.get(f"{server.url}/v1/tasks/known").json()["active"] == 1
    assert generate(server.url, "later").status_code == 200
