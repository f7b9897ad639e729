"""`medley convert --to-lora`: the error that it states is the error, and what is near enough answers as the adapter."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    FourierFTConfig,
    HRAConfig,
    LoHaConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    RoadConfig,
    VBLoRAConfig,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from server.cli.app import app
from server.cli.to_lora import convert_to_lora
from server.model import FrozenBase
from tests.harness import alone, assert_same, greedy, make_engine, request, run
from tests.reference.adapters import CAUSAL, save_adapter
from tests.reference.bases import tiny_base

TARGETS = ["q_proj", "down_proj"]
_FIXED: dict[str, Any] = {"task_type": CAUSAL, "target_modules": TARGETS}
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "hra": lambda: HRAConfig(r=4, **_FIXED),  # these two PEFT does not convert
    "oft": lambda: OFTConfig(oft_block_size=8, **_FIXED),
    "fourierft": lambda: FourierFTConfig(n_frequency=50, **_FIXED),
    "loha": lambda: LoHaConfig(r=3, **_FIXED),
    "vblora": lambda: VBLoRAConfig(r=4, num_vectors=20, vector_length=8, **_FIXED),
}
EXACT = {"hra": 4, "loha": 9, "vblora": 4}  # the rank of the change


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny_base("llama").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about tiny bases
        for seed, (name, config) in enumerate(CONFIGS.items()):
            save_adapter(tiny_base("llama"), config(), folder / name, seed)
    return {name: folder / name for name in CONFIGS}


def _convert(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


def _merged(folder: Path | None) -> dict[str, Tensor]:
    """The base's weights with an adapter in them."""
    model: Any = tiny_base("llama")
    if folder is not None:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    return dict(model.state_dict())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("rank", [3, 11])
def test_the_error_is_that_of_the_folder_that_is_written(
    adapters: dict[str, Path], base: str, tmp_path: Path, name: str, rank: int
) -> None:
    output = tmp_path / "lora"
    result = _convert(adapters[name], "--to-lora", rank, "--model", base, "--output", output, "--max-error", 1)
    assert result.exit_code == 0, result.output
    plain, adapted, lora = (_merged(folder) for folder in (None, adapters[name], output))
    found = {}
    for key, weight in adapted.items():
        change = weight - plain[key]
        if bool(change.any()):
            found[key.removesuffix(".weight")] = float((weight - lora[key]).norm() / change.norm())
    stated = convert_to_lora(adapters[name], base, rank).errors
    assert stated == pytest.approx(found, rel=1e-3, abs=1e-5)
    assert len(stated) == 2 * len(TARGETS)
    for kind in TARGETS:
        worst = max(error for module, error in stated.items() if module.endswith(kind))
        assert f"{worst:.2e}" in result.stdout


@pytest.mark.parametrize("name", EXACT)
def test_a_lora_of_the_whole_rank_answers_as_the_adapter(
    adapters: dict[str, Path], base: str, tmp_path: Path, name: str
) -> None:
    result = _convert(adapters[name], "--to-lora", EXACT[name], "--model", base, "--output", tmp_path / "lora")
    assert result.exit_code == 0, result.output
    prompt = [5, 9, 33, 2, 61]
    expected = alone(PeftModel.from_pretrained(tiny_base("llama"), adapters[name]).eval(), prompt, 8)
    engine = make_engine(FrozenBase(tiny_base("llama")))
    results = run(engine, [request("x", prompt, greedy(8), tmp_path / "lora")]).results
    engine.close()
    assert_same(results["x"], expected, name)


def test_one_that_is_not_near_enough_is_refused_and_nothing_is_written(
    adapters: dict[str, Path], base: str, tmp_path: Path
) -> None:
    output = tmp_path / "lora"
    result = _convert(adapters["fourierft"], "--to-lora", 4, "--model", base, "--output", output)
    assert result.exit_code == 1
    for words in ("rank 4", "more than 0.01", "--max-error", "model.layers."):
        assert words in str(result.exception)
    assert not output.exists()


@torch.no_grad()
def test_what_is_no_change_of_weights_alone_is_refused(tmp_path: Path, base: str) -> None:
    save_adapter(tiny_base("llama"), PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=2), tmp_path / "prompt", 0)
    with_bias = tiny_base("qwen2")
    with_bias.save_pretrained(tmp_path / "qwen2")
    save_adapter(with_bias, RoadConfig(task_type=CAUSAL, group_size=8, target_modules=["q_proj"]), tmp_path / "road", 0)
    hra = HRAConfig(task_type=CAUSAL, r=4, target_modules=["q_proj"], bias="hra_only")
    save_adapter(tiny_base("qwen2"), hra, tmp_path / "hra", 0)
    for name, model, says in (
        ("prompt", base, "no weights"),
        ("road", tmp_path / "qwen2", "bias of model.layers.0"),
        ("hra", tmp_path / "qwen2", "bias is 'hra_only'"),
    ):
        result = _convert(tmp_path / name, "--to-lora", 4, "--model", model)
        assert result.exit_code == 1
        assert says in str(result.exception)


def test_tensors_that_do_not_fit_the_base_are_named(adapters: dict[str, Path], base: str, tmp_path: Path) -> None:
    """PEFT itself goes on without them."""
    for index, (leave, add) in enumerate(((1, {}), (0, {"base_model.model.nowhere.hra_u": torch.ones(2, 2)}))):
        folder = Path(shutil.copytree(adapters["hra"], tmp_path / f"{index}"))
        tensors = load_file(folder / "adapter_model.safetensors")
        left_out = sorted(tensors)[:leave]
        kept = {name: tensor for name, tensor in tensors.items() if name not in left_out}
        save_file(kept | add, folder / "adapter_model.safetensors")
        result = _convert(folder, "--to-lora", 4, "--model", base)
        assert result.exit_code == 1
        for name in (*left_out, *add):
            assert name.removesuffix(".hra_u") in str(result.exception)


def test_settings_and_files_that_cannot_be_are_named(adapters: dict[str, Path], base: str, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "HRA", "modules_to_save": ["lm_head"]}))
    for arguments, says in (
        ((adapters["hra"], "--to-lora", 4), "--model"),
        ((adapters["hra"], "--model", base), "--to-lora"),
        ((adapters["hra"], "--to-lora", 99, "--model", base), "99"),
        ((adapters["hra"], "--to-lora", 4, "--model", tmp_path / "none"), "cannot be loaded"),
        ((tmp_path, "--to-lora", 4, "--model", base), "adapter_config.json"),
        ((folder, "--to-lora", 4, "--model", base), "modules_to_save"),
    ):
        result = _convert(*arguments)
        assert result.exit_code != 0, arguments
        assert says in result.output + str(result.exception), arguments
