"""Which adapters cannot be laid over one another: asked of adapters as they are read, and of resident ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from peft import IA3Config, LNTuningConfig, LoraConfig, PeftConfig, PrefixTuningConfig

from server.adapters import Adapter, Checkpoint, Resident, read_adapter, why_no_stack
from server.adapters.resident import Loaded
from server.model import FrozenBase
from tests.reference.adapters import CAUSAL, configs, save_adapter
from tests.reference.bases import tiny_base

_PROMPT = "adaption_prompt"  # in the second of two layers
_TOP = "transformer.h.1"
_CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    _PROMPT: configs("gpt2")[_PROMPT],
    "queries": lambda: LoraConfig(task_type=CAUSAL, target_modules=["c_attn"]),
    "scaled queries": lambda: IA3Config(task_type=CAUSAL, target_modules=["c_attn"], feedforward_modules=[]),
    "norm before": lambda: LNTuningConfig(task_type=CAUSAL, target_modules=["ln_1"]),
    "other layer": lambda: LoraConfig(task_type=CAUSAL, target_modules=["c_attn"], layers_to_transform=[0]),
    "other modules": lambda: LoraConfig(task_type=CAUSAL, target_modules=["attn.c_proj", "c_fc"]),
    "other norm": lambda: LNTuningConfig(task_type=CAUSAL, target_modules=["ln_2", "ln_f"]),
    "prefix": lambda: PrefixTuningConfig(task_type=CAUSAL, num_virtual_tokens=2),
}
_CHANGED = {"queries": "attn.c_attn", "scaled queries": "attn.c_attn", "norm before": "ln_1"}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    """Of PEFT, for a GPT-2 of two layers."""
    folder, base = tmp_path_factory.mktemp("adapters"), FrozenBase(tiny_base("gpt2"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's, about tiny bases
        for name, config in _CONFIGS.items():
            save_adapter(tiny_base("gpt2"), config(), folder / name, seed=1)
    return {name: read_adapter(Checkpoint.open(folder / name, base.dtype), base.shape) for name in _CONFIGS}


def _resident(adapter: Adapter) -> Resident:
    loaded = Loaded.of(adapter, torch.device("cpu"))
    return Resident("digest", loaded.layout, loaded.counts, dict.fromkeys(loaded.counts, 0), loaded.bytes)


def test_on_gpt2_nothing_may_change_what_llama_adapter_s_queries_are_made_of(adapters: dict[str, Adapter]) -> None:
    for name, module in _CHANGED.items():
        for stack in permutations([adapters[_PROMPT], adapters[name]]):
            reason = why_no_stack(stack)
            assert reason is not None, name
            assert f"{_TOP}.{module} " in reason
            assert why_no_stack([_resident(adapter) for adapter in stack]) == reason


def test_everything_else_goes_over_it_and_under_it(adapters: dict[str, Adapter]) -> None:
    for name in adapters.keys() - _CHANGED:
        for stack in permutations([adapters[_PROMPT], adapters[name]]):
            assert why_no_stack(stack) is None, name
            assert why_no_stack([_resident(adapter) for adapter in stack]) is None, name


def test_without_it_every_pair_goes(adapters: dict[str, Adapter]) -> None:
    others = [adapter for name, adapter in adapters.items() if name != _PROMPT]
    assert [why_no_stack(pair) for pair in permutations(others, 2)] == [None] * 42
