"""The README's commands, run as they stand there against a server of the demo."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from tests.server_process import MEDLEY, PATIENCE_SECONDS, ServerProcess, environment, run_medley

README = Path(__file__).parents[2] / "README.md"
RUN_HERE = re.compile(r"^(\.venv/bin/medley|medley|curl) (?!serve)", re.MULTILINE)  # other tests serve and install
DEFAULT_URL = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    """The README's code blocks in a language; a long command may go on on the next line."""
    found = re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    return [block.replace("\\\n", " ") for block in found]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(None, tmp_path_factory.mktemp("demo") / "data") as server:
        yield server


@pytest.fixture
def newcomer(demo: ServerProcess, tmp_path: Path) -> Path:
    """A folder with what the README calls the reader's own: a model, an adapter for it, examples; and a task."""
    bundled = Path(str(resources.files("demo")))
    own = tmp_path / "path" / "to"
    own.mkdir(parents=True)
    (own / "model").symlink_to(bundled / "base")
    (own / "peft-folder").symlink_to(bundled / "adapters" / "answer")
    lines = (json.dumps({"input": f"name {n}", "output": "hello"}) for n in range(10))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    earlier = run_medley("push", "summarize", str(bundled / "adapters" / "translate"), "--url", demo.url)
    assert earlier.returncode == 0, earlier.stderr
    return tmp_path


def test_every_command_of_the_readme_does_what_it_says(demo: ServerProcess, newcomer: Path) -> None:
    commands = [line for block in blocks("sh") for line in block.splitlines() if RUN_HERE.match(line)]
    assert any("medley" in command for command in commands)
    (newcomer / "medley").symlink_to(MEDLEY)
    variables = environment(MEDLEY_URL=demo.url, PATH=f"{newcomer}{os.pathsep}{os.environ['PATH']}")
    for command in commands:
        here = command.replace(".venv/bin/medley", "medley").replace(DEFAULT_URL, demo.url)
        result = subprocess.run(
            ["bash", "-e", "-c", here.replace("curl ", "curl --fail-with-body ")],
            cwd=newcomer,
            env=variables,
            capture_output=True,
            text=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"
        assert result.stdout, command


def test_the_python_of_the_readme_runs(demo: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks("python"):
        names: dict[str, object] = {}
        exec(block.replace(DEFAULT_URL, demo.url), names)
        assert capsys.readouterr().out.strip()
        client = names.get("client")
        if client is not None:
            client.close()  # type: ignore[attr-defined]


def test_the_readmes_tree_has_a_phrase_for_every_module() -> None:
    tree = README.read_text().split("## What is where")[1].split("```")[1]
    phrases = {line.split()[0] for line in tree.splitlines() if len(line.split()) > 1}
    root = README.parent
    for package in ("adapters_store", "server", "demo", "benchmarks"):
        for module in (root / package).rglob("*.py"):
            assert module.name in phrases or module.name == "__init__.py", (
                f"{module.relative_to(root)} is not in the tree"
            )
