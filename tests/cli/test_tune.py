"""`medley tune`: from lines of examples to a version that is served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.cli import main
from tests.cli.conftest import Medley
from tests.server_process import one_line


def test_a_tuned_adapter_is_pushed_with_the_template_that_it_was_trained_with(
    medley: Medley, base: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"input": f"{n}", "output": "yes"}) + "\n" for n in range(8)))
    options = ("--steps", "2", "--batch-size", "2", "--virtual-tokens", "3")
    template = ("--template", "Say: {{ input }}")
    output = tmp_path / "adapter"
    result = medley(
        *("tune", "tuned", str(data), "--method", "prompt", "--model", str(base), "--output", str(output)),
        *(*options, *template, "--push"),
    )
    assert result.returncode == 0, result.stderr
    trained, pushed = result.stdout.splitlines()
    assert trained.startswith(f"{output}: 96 parameters, validation loss ")
    assert pushed.startswith("tuned@1, active: ")
    shown = json.loads(medley("show", "tuned", "--json").stdout)
    assert shown["template"] == "Say: {{ input }}"
    assert shown["active"] == 1
    assert medley("generate", "tuned", "1", "--max-tokens", "2").returncode == 0


def test_a_wrong_line_and_a_wrong_setting_are_one_line_each(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(*options: str) -> str:
        """In this process, which has loaded the training's libraries already."""
        monkeypatch.setattr("sys.argv", ["medley", *common, *options])
        with pytest.raises(SystemExit, match="1"):
            main()
        return one_line(capsys.readouterr().err)

    data = tmp_path / "data.jsonl"
    data.write_text('{"input": "a", "output": "b"}\n{"input": "a"}\n')
    common = ("tune", "task", str(data), "--model", str(base), "--output", str(tmp_path / "adapter"))
    assert f"{data}, line 2: " in refusal("--method", "lora")
    assert refusal("--method", "ia3", "--virtual-tokens", "3").startswith("medley: virtual_tokens: ")
