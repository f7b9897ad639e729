"""Every method on a base in bfloat16: all of them in one batch, near what they answer in float32."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from server.adapters import METHODS, Checkpoint, read_adapter
from server.adapters.methods import multitask_prompt
from server.model import FrozenBase
from tests.harness import greedy, make_engine, request, run
from tests.reference.adapters import configs, save_adapter
from tests.reference.bases import tiny_base
from tests.reference.test_adapterhub_bottleneck import GOLDEN, case_folders
from tests.reference.test_own_formats import MAKERS

_PROMPT = [5, 9, 33, 2, 61, 17, 8]
_HUB_CASES = (
    *("seq_bn", "double_seq_bn", "par_bn_ln", "adapter_plus", "compacter", "ln_after_residual", "no_original"),
    *("mam", "union_places", "fusion", "fusion_mixed", "lora", "ia3", "prefix"),
)
_ROUNDING = 0.1  # of the tiny bases themselves, mean over the vocabulary's log-probabilities


def _peft_folders(work: Path) -> dict[str, Path]:
    """An adapter of each method of PEFT's, and of each format of our own."""
    folders = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, about tiny bases
        for seed, (name, config) in enumerate(configs("llama").items()):
            folders[name] = work / name
            save_adapter(tiny_base("llama"), config(), folders[name], seed)
    for name, (method, make) in MAKERS.items():
        if "again" not in name:
            folders[name] = _own_folder(work / name, {"medley_method": method}, make(tiny_base("llama")))
    text = {"medley_method": "text_prompt", "token_ids": [7, 11, 5]}
    folders["text_prompt"] = _own_folder(work / "text_prompt", text, {})
    return folders


def _own_folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if tensors:
        save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def _hub_folders(work: Path) -> dict[str, Path]:
    return {case: case_folders(case, work)[0] for case in _HUB_CASES}


def _golden_base() -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(GOLDEN / "base", attn_implementation="eager")
    return model


_BASES: dict[str, Callable[[], Any]] = {"tiny": lambda: tiny_base("llama"), "golden": _golden_base}


def _first_logprobs(base: FrozenBase, folders: dict[str, Path]) -> dict[str, Tensor]:
    """The first token's log-probabilities `[vocabulary]` under each adapter, all in one batch."""
    engine = make_engine(base, max_seqs=14, num_pages=400)
    sampling = greedy(4, logprobs=base.vocab_size)
    requests = [request("base", _PROMPT, sampling)]
    requests += [request(name, _PROMPT, sampling, folder) for name, folder in folders.items()]
    results = run(engine, requests, random.Random(5)).results
    engine.close()
    for name, result in results.items():
        assert result.failed is None, f"{name}: {result.failed}"
        assert len(result.tokens) == 4, name
    return {
        name: torch.tensor([result.logprobs[0].top[token] for token in range(base.vocab_size)])
        for name, result in results.items()
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    """Adapters by the base that they are for."""
    work = tmp_path_factory.mktemp("adapters")
    return {"tiny": _peft_folders(work), "golden": _hub_folders(work)}


@pytest.mark.parametrize("kind", _BASES)
def test_every_method_answers_in_bfloat16_nearly_as_in_float32(folders: dict[str, dict[str, Path]], kind: str) -> None:
    wanted = _first_logprobs(FrozenBase(_BASES[kind]()), folders[kind])
    found = _first_logprobs(FrozenBase(_BASES[kind]().to(torch.bfloat16)), folders[kind])
    for name, values in found.items():
        error, effect = ((wanted[name] - other).abs().mean() for other in (values, wanted["base"]))
        assert error < _ROUNDING + effect / 4, name  # not a number is not less


def test_no_method_is_left_out(folders: dict[str, dict[str, Path]]) -> None:
    served = set()
    for kind, make in _BASES.items():
        base = FrozenBase(make())
        read = [read_adapter(Checkpoint.open(folder, base.dtype), base.shape) for folder in folders[kind].values()]
        served |= {adapter.method for adapter in read}
    assert served == {method.NAME for method in METHODS} - {multitask_prompt.NAME}  # which becomes soft prompts
