"""Composition is exact: any method over any method gives what the definition of a stack gives (`stacked`).

All pairs run in one engine, in random order of arrival, in mixed batches, chunked and, with few pages, preempted. Each
answer is held against one slow forward of the tokens that the engine chose: each must be the likeliest after those
before it.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, MultitaskPromptTuningConfig, PeftConfig, TrainableTokensConfig
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from server.adapters import METHODS, Checkpoint, read_adapter
from server.cli.fused import convert_fusion
from server.model import FrozenBase
from tests.harness import NEAR_TIE, Result, Run, greedy, make_engine, request, run
from tests.reference.adapters import CAUSAL, configs, save_adapter
from tests.reference.stacked import Stacked

GOLDEN = Path(__file__).parent.parent / "golden" / "adapterhub"
VOCABULARY = 64
MAX_TOKENS = 4
TARGETS = ["q_proj", "v_proj", "down_proj", "lm_head"]
TOKENS = list(range(1, VOCABULARY, 2))  # so many that every prompt and answer has some


@cache
def base_model() -> PreTrainedModel:
    """A Llama of three layers. Nobody changes it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(GOLDEN / "base", attn_implementation="eager")
    return model.eval()


_VARIANTS = {  # of methods that are there already
    *("long_prompt", "projected_prefix", "lora_patterns", "lora_one_layer", "lora_biases", "vera_drawn"),
    *("mini_miss", "hra_orthogonal", "road_2", "road_4"),
}
_PEFT: dict[str, Callable[[], PeftConfig]] = {
    **{name: config for name, config in configs("llama").items() if name not in _VARIANTS},
    "adalora": lambda: AdaLoraConfig(task_type=CAUSAL, init_r=4, lora_alpha=9, target_modules=TARGETS, total_step=10),
    "multitask": lambda: MultitaskPromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=3, num_tasks=2, num_ranks=2),
    "trainable_tokens": lambda: TrainableTokensConfig(task_type=CAUSAL, token_indices=TOKENS),
    "lora_tokens": lambda: LoraConfig(
        task_type=CAUSAL, r=2, target_modules=["v_proj"], trainable_token_indices=TOKENS[::3]
    ),
}
_HUB = {name: GOLDEN / "cases" / name for name in ("seq_bn", "par_bn", "no_original", "compacter")}
_HUB |= {"hub_prefix": GOLDEN / "cases" / "prefix", "union": GOLDEN / "cases" / "union_ungated"}
_HUB |= {"hub_dora": GOLDEN / "cases" / "dora", "hub_vera": GOLDEN / "cases" / "vera"}


def _own_tensors(base: PreTrainedModel) -> dict[str, dict[str, Tensor]]:
    """Adapters of our own format: with a bias where the base has none, a norm, a token-dependent shift; …"""
    draw = torch.Generator().manual_seed(8)
    q, down, norm = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.down_proj", "model.layers.0.input_layernorm"

    def normal(*shape: int, std: float = 0.3) -> Tensor:
        return torch.empty(shape).normal_(std=std, generator=draw)

    named = {f"{q}.bias": normal(32), f"{norm}.weight": normal(32), f"{down}.adapter_bias.vector": normal(32)}
    named |= {f"{down}.adapter_bias.alpha.weight": normal(1, 48), f"{down}.adapter_bias.alpha.bias": normal(1)}
    sparse = {}
    for name in (q, down):
        count = base.get_submodule(name).get_parameter("weight").numel() // 100
        sparse[f"{name}.weight.indices"] = torch.randperm(1024, generator=draw)[:count]
        sparse[f"{name}.weight.values"] = normal(count, std=1.0)
    top = {
        f"{name}.weight": base.get_submodule(name).get_parameter("weight").detach() + change
        for name, change in ((down, normal(32, 48, std=0.1)), ("model.norm", normal(32)), (q, normal(32, 32, std=0.1)))
    }
    return {"named_deltas": named, "sparse": sparse, "top_layers": top}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of every method by name."""
    root = tmp_path_factory.mktemp("stacks")
    base = base_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference library's, about this tiny base
        for seed, (name, config) in enumerate(_PEFT.items()):
            save_adapter(deepcopy(base), config(), root / name, seed)
    (root / "multitask" / "medley.json").write_text(json.dumps({"task_index": 1}))
    for name, tensors in _own_tensors(base).items():
        (root / name).mkdir()
        save_file(tensors, root / name / "adapter_model.safetensors")
        (root / name / "adapter_config.json").write_text(json.dumps({"medley_method": name}))
    (root / "text_prompt").mkdir()
    convert_fusion(GOLDEN / "cases" / "fusion", root / "fusion")
    text = {"medley_method": "text_prompt", "token_ids": [7, 21, 40]}
    (root / "text_prompt" / "adapter_config.json").write_text(json.dumps(text))
    return {**{folder.name: folder for folder in root.iterdir()}, **_HUB}


NAMES = [*_PEFT, *_HUB, "fusion", "named_deltas", "sparse", "top_layers", "text_prompt"]
SIZES = {"roomy": (16, 400, 256), "preempting": (4, 22, 19)}  # positions of a page, pages, positions of a step
EVERY = {"roomy": 3, "preempting": 1}  # the hard way all pairs


def _prompt(name: str) -> list[int]:
    draw = random.Random(name)
    return [draw.randrange(3, VOCABULARY) for _ in range(draw.choice((1, 4, 11)))]


@pytest.fixture(scope="module")
def answers(folders: dict[str, Path]) -> Callable[[str], Run]:
    """What the engine says to all pairs at once, by sizes."""

    @cache
    def answer(sizes: str) -> Run:
        page_size, num_pages, max_batch_tokens = SIZES[sizes]
        engine = make_engine(
            FrozenBase(deepcopy(base_model())),
            page_size=page_size,
            num_pages=num_pages,
            max_batch_tokens=max_batch_tokens,
        )
        pairs = [(task, user) for task in NAMES for user in NAMES][:: EVERY[sizes]]
        outcome = run(
            engine,
            [
                request(f"{task}+{user}", _prompt(f"{task}+{user}"), greedy(MAX_TOKENS), folders[task], folders[user])
                for task, user in pairs
            ],
            random.Random(4),
        )
        engine.close()
        return outcome

    return answer


@cache
def _logits(stack: tuple[Path, ...], tokens: tuple[int, ...]) -> Tensor:
    """After each token of a text; the same for all sizes whose engines choose alike."""
    return Stacked(base_model(), list(stack)).logits(list(tokens))


def _compared(result: Result, stack: tuple[Path, ...], prompt: list[int], name: str) -> int:
    """Steps that agree; from a near tie on nothing is compared."""
    assert result.failed is None, f"{name}: {result.failed}"
    assert (result.ends, len(result.tokens)) == (1, MAX_TOKENS), name
    logits = _logits(stack, (*prompt, *result.tokens))[len(prompt) - 1 : -1]
    best = logits.topk(2)
    for step, (values, tokens) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
        if values[0] - values[1] < NEAR_TIE:
            return step
        assert result.tokens[step] == tokens[0], f"{name}, step {step}"
        wanted = float(logits[step].log_softmax(-1)[tokens[0]])
        assert abs(result.logprobs[step].chosen - wanted) < 1e-3, f"{name}, step {step}"
    return MAX_TOKENS


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("task", NAMES)
def test_a_method_under_every_method(
    task: str, sizes: str, folders: dict[str, Path], answers: Callable[[str], Run]
) -> None:
    results = answers(sizes).results
    compared = 0
    users = [user for user in NAMES if f"{task}+{user}" in results]
    for user in users:
        name = f"{task}+{user}"
        compared += _compared(results[name], (folders[task], folders[user]), _prompt(name), name)
    assert compared >= len(users) * MAX_TOKENS * 19 // 20, "too many steps near a tie to say that the answers agree"


def test_the_table_s_methods_are_all_there_and_all_matter(folders: dict[str, Path]) -> None:
    base = FrozenBase(deepcopy(base_model()))
    adapters = [read_adapter(Checkpoint.open(folders[name], base.dtype), base.shape) for name in NAMES]
    assert {adapter.method for adapter in adapters} == {method.NAME for method in METHODS}
    prompt = [5, 9, 33, 12]
    alone = {tuple(Stacked(base_model(), [folders[name]]).logits(prompt)[-1].tolist()) for name in NAMES}
    assert len(alone) == len(NAMES)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_pairs_ran_mixed_and_as_the_sizes_say(sizes: str, answers: Callable[[str], Run]) -> None:
    outcome = answers(sizes)
    assert max(step.adapters for step in outcome.steps) > 8
    assert (outcome.preemptions > 0) == (sizes == "preempting")
