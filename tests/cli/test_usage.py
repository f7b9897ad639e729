"""Wrong usage, and that the options of `serve` and `tune` are the settings that they set. No server is needed."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from typing import Any, get_type_hints

import pytest
from typer.testing import CliRunner

from server.cli.app import app
from server.cli.tune import tune
from server.settings import Settings
from server.tuning import METHODS, TuneSettings
from tests.server_process import environment, run_medley


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("COLUMNS", "300")
    return CliRunner()


@pytest.mark.parametrize(
    "arguments",
    [
        ["unknown"],
        ["show"],
        ["activate", "task", "first"],
        ["activate", "task", "0"],
        ["tasks", "--url", "nowhere"],
        ["generate", "task", "text", "--top-k", "many"],
        ["serve", "--port", "70000"],
        ["serve", "--dtype", "int4"],
        ["serve", "--max-seqs", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_with_2_and_names_what_is_wrong(runner: CliRunner, arguments: list[str]) -> None:
    result = runner.invoke(app, arguments)
    assert result.exit_code == 2
    assert "Error: " in result.stderr
    assert result.stdout == ""


def test_a_wrong_variable_is_named_like_a_wrong_option() -> None:
    result = run_medley("serve", MEDLEY_MAX_SEQS="many")
    assert result.returncode == 2
    assert "MEDLEY_MAX_SEQS" in result.stderr
    assert "'many'" in result.stderr


def test_serve_has_every_setting_as_an_option_with_its_description_and_default(runner: CliRunner) -> None:
    help_text = " ".join(runner.invoke(app, ["serve", "--help"]).stdout.split())
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')} " in help_text
        assert field.description is not None
        assert field.description in help_text
        if field.default is not None:
            assert f"{field.description} (default: {field.default})" in help_text


def test_tune_has_the_settings_of_tuning_and_their_defaults() -> None:
    options = inspect.signature(tune).parameters
    for field in dataclasses.fields(TuneSettings):
        if field.name == "base_name":  # follows from the model
            continue
        option = options[field.name]
        if field.name in ("method", "data"):
            assert option.default is inspect.Parameter.empty
        elif field.name == "feedforward_modules":  # an absent list is an empty one
            assert option.default is None
        elif field.default is not dataclasses.MISSING:
            assert option.default == field.default, field.name
    hints: dict[str, Any] = get_type_hints(tune)
    assert hints["method"].__args__ == METHODS


def test_client_commands_start_without_the_server_s_and_the_training_s_libraries() -> None:
    program = "import sys, server.cli.app; print([m for m in ('torch', 'transformers', 'fastapi') if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_the_version_is_that_of_the_distribution(runner: CliRunner) -> None:
    assert runner.invoke(app, ["--version"]).stdout == "medley 0.1.0\n"
