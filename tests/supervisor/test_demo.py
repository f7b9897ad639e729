"""The bundled demo, with a tiny one in its place: what a server without `--model` publishes and prints."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import httpx
import pytest

from tests.server_process import MEDLEY, ServerProcess, run_medley, write_long_base


@pytest.fixture
def demo(tmp_path: Path, adapter: Path) -> Path:
    """A folder to import `demo` from: two tasks with one adapter."""
    package = tmp_path / "bundle" / "demo"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    write_long_base(package / "base")
    (package / "adapters").mkdir()
    (package / "adapters" / "shared").symlink_to(adapter)
    tasks = [
        {
            "task": name,
            "description": f"the {name}",
            "template": "{{ input }}:",
            "defaults": {"max_tokens": 3, "temperature": 0},
            "example": "it's a river",
            "adapter": "shared",
        }
        for name in ("first", "second")
    ]
    (package / "tasks.json").write_text(json.dumps(tasks))
    return package.parent


def test_the_demo_tasks_go_into_an_empty_index_once_and_a_cut_off_publication_is_completed(
    demo: Path, tmp_path: Path
) -> None:
    def names(server: ServerProcess) -> list[str]:
        return [task["task"] for task in httpx.get(f"{server.url}/v1/tasks").json()["data"]]

    data = tmp_path / "data"
    with ServerProcess(None, data, PYTHONPATH=str(demo)) as server:
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "medley-demo"
        task = httpx.get(f"{server.url}/v1/tasks/second").json()
        assert (task["active"], task["template"], task["description"]) == (1, "{{ input }}:", "the second")
        header, *commands = server.printed()
        assert header == "Try:\n"
        assert len(commands) == 2
        for command in commands:
            program, *arguments = shlex.split(command)
            assert Path(program).samefile(MEDLEY)
            result = run_medley(*arguments)
            assert result.returncode == 0, result.stderr
            assert result.stdout.strip()
        assert httpx.delete(f"{server.url}/v1/tasks/second").status_code == 204
        assert server.stop() == 0

    with ServerProcess(None, data, PYTHONPATH=str(demo)) as server:
        assert names(server) == ["first"], "what a user deleted stays deleted"
        assert server.stop() == 0

    (data / "demo-incomplete").touch()
    with ServerProcess(None, data, PYTHONPATH=str(demo)) as server:
        assert names(server) == ["first", "second"]
        assert server.stop() == 0
    assert not (data / "demo-incomplete").exists()
