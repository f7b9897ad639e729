"""`medley keys`, a server that asks for them, and what is refused without."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from adapters_store import PrivateRedis
from server.errors import StartupError
from server.supervisor.http_server import listen
from tests.server_process import PATIENCE_SECONDS, ServerProcess, one_line, run_medley


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    redis = PrivateRedis(tmp_path / "redis")
    redis.start()
    yield redis.url
    redis.stop()


def test_a_key_is_shown_once_listed_without_it_and_revoked(redis_url: str) -> None:
    index = ("--redis-url", redis_url)
    made = run_medley("keys", "create", "ci", "--scope", "publish", "--tenant", "acme", *index)
    text = one_line(made.stdout).strip()
    assert one_line(made.stderr) == f"the key is made in the index at {redis_url}\n"
    assert text.startswith("mk_")
    quotas = ("--requests-per-minute", "60", "--stored-bytes", "1000000")
    shown = json.loads(run_medley("keys", "create", "other", *quotas, "--json", *index).stdout)
    assert shown["key"].startswith("mk_")
    assert shown["quotas"] == {"requests_per_minute": 60, "stored_bytes": 1_000_000}
    assert shown["scopes"] == ["invoke"]

    listed = run_medley("keys", "list", *index).stdout
    header, first, second = (line.split("\t") for line in listed.splitlines())
    assert header == ["key", "name", "tenant", "scopes", "quotas", "created"]
    assert first[1:5] == ["ci", "acme", "publish", ""]
    assert second[4] == "requests per minute: 60, stored bytes: 1000000"
    as_json = run_medley("keys", "list", "--json", MEDLEY_REDIS_URL=redis_url).stdout
    assert [key["id"] for key in json.loads(as_json)] == [first[0], second[0]]
    assert text not in listed + as_json

    assert run_medley("keys", "revoke", first[0], *index).stdout == f"revoked {first[0]}\n"
    assert first[0] not in run_medley("keys", "list", *index).stdout
    again = run_medley("keys", "revoke", first[0], *index)
    assert again.returncode == 1
    assert one_line(again.stderr) == f"medley: there is no key '{first[0]}'\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["create"],
        ["create", "ci", "--scope", "everything"],
        ["create", "ci", "--tenant", "a/b"],
        ["create", "ci", "--requests-per-minute", "0"],
        ["create", "ci", "--requests-per-minute", "9007199254740993"],
        ["create", "ci", "--stored-bytes", "1" + "0" * 29],
        ["create", ""],
        ["create", " "],
        ["revoke"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2(arguments: list[str], tmp_path: Path) -> None:
    result = run_medley("keys", *arguments, "--data-dir", str(tmp_path / "none"))
    assert result.returncode == 2
    assert not (tmp_path / "none").exists()


def test_the_first_key_needs_no_server_and_later_ones_reach_the_running_one(base: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    folder = ("--data-dir", str(data))
    first = run_medley("keys", "create", "first", "--scope", "admin", *folder)
    assert first.returncode == 0, first.stderr
    key = first.stdout.strip()
    with ServerProcess(base, data, "--auth") as server:
        here = {"MEDLEY_URL": server.url}
        refused = run_medley("tasks", **here)
        assert refused.returncode == 1
        assert "an API key is needed" in one_line(refused.stderr)
        assert run_medley("tasks", MEDLEY_API_KEY=key, **here).returncode == 0
        for command in (["show", "none"], ["methods"], ["delete", "none"], ["generate", "none", "text"]):
            answered = run_medley(*command, MEDLEY_API_KEY=key, **here)
            assert "unauthorized" not in answered.stderr, command

        later = json.loads(run_medley("keys", "create", "later", "--json", *folder).stdout)
        headers = {"Authorization": f"Bearer {later['key']}"}
        assert httpx.get(f"{server.url}/v1/tasks", headers=headers).status_code == 200
        assert httpx.put(f"{server.url}/v1/tasks/t", json={}, headers=headers).status_code == 403
        assert run_medley("keys", "revoke", later["id"], *folder).returncode == 0
        give_up = time.monotonic() + PATIENCE_SECONDS
        while httpx.get(f"{server.url}/v1/tasks", headers=headers).status_code != 401:
            assert time.monotonic() < give_up
            time.sleep(0.05)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_others_are_let_in_only_with_keys_or_insecurely(host: str) -> None:
    with pytest.raises(StartupError, match=r"--auth .*--insecure"):
        listen(host, 0, beyond_loopback=False)
    if host == "::" and not socket.has_dualstack_ipv6():
        return
    with listen(host, 0, beyond_loopback=True) as listener:
        assert listener.getsockname()[1] > 0


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost"])
def test_on_loopback_no_keys_are_needed(host: str) -> None:
    with listen(host, 0, beyond_loopback=False) as listener:
        assert listener.getsockname()[1] > 0


def test_serve_refuses_to_let_everyone_in(tmp_path: Path) -> None:
    result = run_medley("serve", "--host", "0.0.0.0", "--port", "0", "--data-dir", str(tmp_path / "data"))
    assert result.returncode == 1
    assert "--insecure" in one_line(result.stderr)
