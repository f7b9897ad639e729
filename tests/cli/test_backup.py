"""`medley backup` beside a running server, `medley restore` into another folder, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import httpx

from tests.cli.conftest import Medley
from tests.server_process import ServerProcess, generate, one_line, run_medley, upload


def test_a_server_s_folder_is_backed_up_and_restored_into_another(
    server: ServerProcess, adapters: dict[str, Path], medley: Medley, tmp_path: Path, base: Path
) -> None:
    for method in ("lora", "prompt"):
        assert upload(server.url, f"saved-{method}", adapters[method]).status_code == 201
    file, other = tmp_path / "backup", tmp_path / "other"
    saved = medley("backup", str(file), "--data-dir", str(server.data), "--json")
    assert saved.returncode == 0, saved.stderr
    restored = medley("restore", str(file), "--data-dir", str(other))
    totals = json.loads(saved.stdout)
    assert f"restored: {totals['tasks']} tasks with {totals['versions']} versions" in restored.stdout, restored.stderr
    with ServerProcess(base, other) as second:
        for method in ("lora", "prompt"):
            task = f"saved-{method}"
            assert generate(second.url, task).json()["output"] == generate(server.url, task).json()["output"]
            assert httpx.delete(f"{server.url}/v1/tasks/{task}").status_code == 204  # other tests count files
        again = medley("restore", str(file), "--data-dir", str(other))
        assert again.returncode == 1
        assert "not empty" in one_line(again.stderr)


def test_files_that_are_refused(tmp_path: Path) -> None:
    data, file = str(tmp_path / "data"), tmp_path / "file"
    file.write_text("notes")
    for command, why in (("backup", "exists already; choose another name"), ("restore", "no backup")):
        failed = run_medley(command, str(file), "--data-dir", data)
        assert failed.returncode == 1
        assert why in one_line(failed.stderr)
    missing = run_medley("restore", str(tmp_path / "none"), "--data-dir", data)
    assert missing.returncode == 1
    assert "none" in one_line(missing.stderr)
    assert file.read_text() == "notes"
