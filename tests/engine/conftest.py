"""One tiny base with adapters of every method, shared by the engine's tests."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file

from server.adapters.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from server.model import FrozenBase
from tests.reference.adapters import CAUSAL, configs, save_adapter
from tests.reference.bases import tiny_base

ARCHITECTURE = "llama"

_MORE: dict[str, Callable[[], PeftConfig]] = {
    "page_prompt": lambda: PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=8),
    "one_prompt": lambda: PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=1),
    "very_long_prompt": lambda: PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=30),
    "page_prefix": lambda: PrefixTuningConfig(task_type=CAUSAL, num_virtual_tokens=4),
    "other_lora": lambda: LoraConfig(
        task_type=CAUSAL, r=2, lora_alpha=3, target_modules=["q_proj", "down_proj", "lm_head"]
    ),
    "other_ia3": lambda: IA3Config(
        task_type=CAUSAL, target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
}


@pytest.fixture(scope="session")
def base() -> FrozenBase:
    """Shared by all tests: no run changes it, which is law 1."""
    return FrozenBase(tiny_base(ARCHITECTURE))


@pytest.fixture(scope="session")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """PEFT folders by name: those of the reference test, and a few of other lengths and targets."""
    root = tmp_path_factory.mktemp("tasks")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference library's, about these tiny bases
        for seed, (name, config) in enumerate({**configs(ARCHITECTURE), **_MORE}.items()):
            save_adapter(tiny_base(ARCHITECTURE), config(), root / name, 100 + seed)
    return {folder.name: folder for folder in root.iterdir()}


def multiplied(source: Path, target: Path, factor: float) -> Path:
    """A copy of an adapter with all its values multiplied; not its copies of the base's."""
    target.mkdir()
    shutil.copy(source / CONFIG_FILE, target)
    tensors = {
        name: tensor * factor for name, tensor in load_file(source / WEIGHTS_FILE).items() if ".base_layer." not in name
    }
    save_file(tensors, target / WEIGHTS_FILE)
    return target


@pytest.fixture
def overflowing(tasks: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Adapters of finite values whose answers are not finite."""
    factors = {"lora": 1e37, "ia3": 1e38, "prefix": 2e38}
    return {name: multiplied(tasks[name], tmp_path / f"overflowing-{name}", factor) for name, factor in factors.items()}
