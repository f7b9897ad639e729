"""`medley gc`: beside a running server, and without one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import httpx

from tests.cli.conftest import Medley
from tests.server_process import ServerProcess, generate, one_line, run_medley, upload


def figures(text: str) -> dict[str, int]:
    found: dict[str, int] = json.loads(text)
    return found


def test_files_that_nobody_needs_are_shown_and_deleted_beside_a_server(
    server: ServerProcess, adapters: dict[str, Path], medley: Medley, tmp_path: Path
) -> None:
    options = ("--data-dir", str(server.data), "--json")
    assert medley("gc", *options, "--grace", "0").returncode == 0  # what other tests left
    own = shutil.copytree(adapters["prompt"], tmp_path / "own")
    with (own / "adapter_config.json").open("a") as config:
        config.write("\n")  # no other task has this file
    for task, folder in (("kept", adapters["lora"]), ("gone", own)):
        assert upload(server.url, task, folder).status_code == 201
    assert httpx.delete(f"{server.url}/v1/tasks/gone").status_code == 204
    before = figures(medley("gc", *options, "--grace", "0", "--dry-run").stdout)
    assert before["unnamed"] == before["due"] > 0
    waiting = figures(medley("gc", *options).stdout)  # its grace is a day
    assert waiting == {**before, "due": 0, "due_bytes": 0}
    assert figures(medley("gc", *options, "--grace", "0").stdout) == before
    after = figures(medley("gc", *options, "--grace", "0").stdout)
    assert after == {"stored": before["stored"] - before["unnamed"], **dict.fromkeys(list(before)[1:], 0)}
    assert generate(server.url, "kept").status_code == 200
    assert upload(server.url, "gone", own).status_code == 201
    assert generate(server.url, "gone").status_code == 200


def test_it_works_without_a_server_and_says_what_it_did(tmp_path: Path) -> None:
    orphan = tmp_path / "blobs" / "blobs" / "ab" / ("ab" * 32)
    orphan.parent.mkdir(parents=True)
    orphan.write_bytes(b"orphan")
    for options in ((), ("--dry-run",)):
        refused = run_medley("gc", "--data-dir", str(tmp_path), "--grace", "0", *options)
        assert refused.returncode == 1
        assert "medley gc --adopt" in one_line(refused.stderr)
    dry = run_medley("gc", "--data-dir", str(tmp_path), "--grace", "0", "--dry-run", "--adopt")
    assert "1 files are stored; 1 of them (6 bytes) nobody needs" in dry.stdout
    assert "would be deleted: 1 (6 bytes); within their grace: 0" in dry.stdout
    assert orphan.exists()
    done = run_medley("gc", "--data-dir", str(tmp_path), "--grace", "0", "--adopt")
    assert "\ndeleted: 1 (6 bytes); within their grace: 0" in done.stdout
    assert not orphan.exists()


def test_a_store_that_is_none_is_one_line(tmp_path: Path) -> None:
    failed = run_medley("gc", "--data-dir", str(tmp_path), "--store", "ftp://host")
    assert failed.returncode == 1
    assert "--store" in one_line(failed.stderr)
    assert run_medley("gc", "--grace", "-1").returncode == 2
