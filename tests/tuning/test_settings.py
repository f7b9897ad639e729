"""Settings that cannot be followed are refused by name before anything is loaded."""

from pathlib import Path
from typing import Any

import pytest

from server.tuning import TuneError, TuneSettings


def settings(**changes: Any) -> TuneSettings:
    given: dict[str, Any] = {"method": "prompt", "model": "m", "data": Path("d"), "output": Path("o")}
    return TuneSettings(**(given | changes))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"method": "adapter"}, "method"),
        ({"epochs": 0}, "epochs"),
        ({"steps": 0}, "steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"validation_share": 1.0}, "validation_share"),
        ({"method": "lora", "virtual_tokens": 4}, "virtual_tokens"),
        ({"method": "prompt", "projection": True}, "projection"),
        ({"init": "zeros"}, "init"),
        ({"init": "text:"}, "init"),
        ({"method": "ptuning", "init": "vocabulary"}, "init"),
        ({"method": "prefix", "projection": True, "init": "text:hello"}, "init"),
        ({"method": "prompt", "target_modules": ("q_proj",)}, "target_modules"),
        ({"method": "ia3", "target_modules": ("k",), "feedforward_modules": ("d",)}, "feedforward_modules"),
    ],
)
def test_a_setting_that_cannot_be_followed_is_named(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(TuneError, match=f"^{name}: "):
        settings(**changes)


def test_the_saved_base_name_is_never_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "some-base"
    folder.mkdir()
    assert settings(model=str(folder)).saved_base_name == "some-base"
    assert settings(model="team/base").saved_base_name == "team/base"
    assert settings(model=str(folder), base_name="other").saved_base_name == "other"
