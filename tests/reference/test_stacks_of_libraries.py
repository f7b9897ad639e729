"""Stacks whose meaning others have settled: PEFT with two adapters active, embeddings and caches put together."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache

from server.model import FrozenBase
from tests.harness import NEAR_TIE, Alone, alone, assert_same, greedy, load_first, make_engine, request, run
from tests.reference.adapters import CAUSAL, save_adapter
from tests.reference.bases import VOCABULARY, tiny_base

MAX_TOKENS = 8
ARCHITECTURES = {  # modules that take LoRA and (IA)³, and the one whose input (IA)³ scales
    "llama": (["q_proj", "v_proj", "lm_head"], "down_proj"),
    "gpt2": (["c_attn", "mlp.c_fc"], "mlp.c_proj"),
}
PROMPTS = ([7], [9, 8, 30, 6, 11], [random.Random(2).randrange(3, VOCABULARY) for _ in range(17)])


def _configs(architecture: str, method: str) -> list[PeftConfig]:
    """The task's and the user's, of other ranks, modules or lengths."""
    modules, feedforward = ARCHITECTURES[architecture]
    match method:
        case "lora":
            task = LoraConfig(task_type=CAUSAL, r=4, lora_alpha=8, target_modules=modules)
            user = LoraConfig(
                task_type=CAUSAL, r=2, lora_alpha=5, target_modules=[*modules[:1], feedforward], use_rslora=True
            )
            return [task, user]
        case "ia3":
            both = [*modules, feedforward]
            task = IA3Config(task_type=CAUSAL, target_modules=both, feedforward_modules=[feedforward])
            user = IA3Config(task_type=CAUSAL, target_modules=both[1:], feedforward_modules=[feedforward])
            return [task, user]
        case "prompt":
            return [PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=length) for length in (5, 3)]
    return [PrefixTuningConfig(task_type=CAUSAL, num_virtual_tokens=length) for length in (3, 6)]


def _both_active(architecture: str, folders: list[Path], prompt: list[int]) -> Alone:
    """PEFT's own stack."""
    model: Any = PeftModel.from_pretrained(tiny_base(architecture), folders[0], adapter_name="task")
    model.load_adapter(folders[1], adapter_name="user")
    model.base_model.set_adapter(["task", "user"])
    return alone(model.eval(), prompt, MAX_TOKENS)


def _tensors(folder: Path) -> Tensor:
    return load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]


def _embeddings_joined(architecture: str, folders: list[Path], prompt: list[int]) -> Alone:
    """One forward over both soft prompts and the text, as embeddings, for every token."""
    model = tiny_base(architecture)
    virtual = torch.cat([_tensors(folder) for folder in folders])

    def logits(token_ids: list[int]) -> Tensor:
        text = model.get_input_embeddings()(torch.tensor(token_ids))
        return model(inputs_embeds=torch.cat([virtual, text])[None]).logits[0, -1]  # type: ignore[no-any-return]

    return _greedy(logits, prompt)


def _caches_joined(architecture: str, folders: list[Path], prompt: list[int]) -> Alone:
    """One cache with both prefixes' keys and values; the text's positions begin behind both."""
    model = tiny_base(architecture)
    config: Any = model.config
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    flat = torch.cat([_tensors(folder) for folder in folders])
    entries = flat.view(1, len(flat), 2 * config.num_hidden_layers, kv_heads, -1).permute(2, 0, 3, 1, 4)

    def logits(token_ids: list[int]) -> Tensor:
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            cache.update(entries[2 * layer], entries[2 * layer + 1], layer)
        positions = torch.arange(len(flat), len(flat) + len(token_ids))[None]
        ids = torch.tensor([token_ids])
        return model(ids, past_key_values=cache, position_ids=positions).logits[0, -1]  # type: ignore[no-any-return]

    return _greedy(logits, prompt)


@torch.inference_mode()
def _greedy(logits: Callable[[list[int]], Tensor], prompt: list[int]) -> Alone:
    answer = Alone([], [], None)
    for step in range(MAX_TOKENS):
        last = logits(prompt + answer.tokens)
        best = last.topk(2).values
        if answer.near_tie is None and best[0] - best[1] < NEAR_TIE:
            answer.near_tie = step
        answer.tokens.append(int(last.argmax()))
        answer.logprobs.append(float(last.log_softmax(-1).max()))
    return answer


REFERENCES = {"lora": _both_active, "ia3": _both_active, "prompt": _embeddings_joined, "prefix": _caches_joined}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_stack_of_one_method_answers_as_its_library_or_as_the_two_put_together(
    architecture: str, tmp_path: Path
) -> None:
    expected: dict[str, Alone] = {}
    requests = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference library's, about these tiny bases
        for method, reference in REFERENCES.items():
            folders = [tmp_path / f"{method}-{who}" for who in ("task", "user")]
            for seed, (folder, config) in enumerate(zip(folders, _configs(architecture, method), strict=True)):
                save_adapter(tiny_base(architecture), config, folder, seed)
            for name, stack in ((method, folders), (f"{method}, the other way round", folders[::-1])):
                for index, prompt in enumerate(PROMPTS):
                    expected[f"{name}/{index}"] = partial(reference, architecture)(stack, prompt)
                    requests.append(request(f"{name}/{index}", prompt, greedy(MAX_TOKENS), *stack))
    engine = make_engine(FrozenBase(tiny_base(architecture)), page_size=3, num_pages=24, max_batch_tokens=19)
    load_first(engine, requests)
    outcome = run(engine, requests, random.Random(1))
    engine.close()
    left_out = sum(assert_same(outcome.results[name], answer, name) for name, answer in expected.items())
    assert left_out <= len(expected) * MAX_TOKENS // 20, "too many steps near a tie to say that the answers agree"
    assert outcome.preemptions
    assert max(step.adapters for step in outcome.steps) > 3, "the stacks were not mixed"
    assert expected["prompt/1"].tokens != expected["prompt, the other way round/1"].tokens
