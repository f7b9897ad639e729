"""Changes of the input embedding: what is refused, mixed and padded steps, and prompts beside them."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from server.adapters import Checkpoint, read_adapter
from server.errors import AdapterError
from server.model import FrozenBase, SiteKind
from tests.engine.test_graphs import _pad
from tests.harness import greedy, make_engine, request, run
from tests.reference.adapters import configs, save_adapter
from tests.reference.bases import VOCABULARY, tiny_base

WIDTH = 32
SITE = "model.embed_tokens"
_KEY = f"base_model.model.{SITE}"
LORA: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["embed_tokens"]}
TOKENS: dict[str, Any] = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [5, 3], "target_modules": SITE}
_Q = "model.layers.0.self_attn.q_proj"
LORA_TOKENS = {**LORA, "target_modules": [_Q], "trainable_token_indices": {"embed_tokens": [5, 3]}}


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    """Its output layer has the embedding's weight."""
    return FrozenBase(tiny_base("qwen2"))


def _tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    if config["peft_type"] == "TRAINABLE_TOKENS":
        return {f"{_KEY}.trainable_tokens_delta": torch.randn(2, WIDTH)}
    if "trainable_token_indices" not in config:
        return {
            f"{_KEY}.lora_embedding_A": torch.randn(2, VOCABULARY),
            f"{_KEY}.lora_embedding_B": torch.randn(WIDTH, 2),
        }
    key = f"base_model.model.{_Q}.lora_"
    factors = {f"{key}A.weight": torch.randn(2, WIDTH), f"{key}B.weight": torch.randn(WIDTH, 2)}
    return factors | {f"{_KEY}.token_adapter.trainable_tokens_delta": torch.randn(2, WIDTH)}


def _refused(
    base: FrozenBase, code: str, says: str, config: dict[str, Any], tensors: dict[str, Tensor] | None = None
) -> None:
    given = _tensors(config) if tensors is None else tensors
    with pytest.raises(AdapterError) as caught:
        read_adapter(Checkpoint(config, given, torch.float32), base.shape)
    assert caught.value.code == code, caught.value.message
    assert says in caught.value.message


@pytest.mark.parametrize("config", [LORA, TOKENS, LORA_TOKENS], ids=["lora", "tokens", "lora_tokens"])
def test_what_fits_is_read_and_what_is_wrong_is_named(base: FrozenBase, config: dict[str, Any]) -> None:
    adapter = read_adapter(Checkpoint(config, _tensors(config), torch.float32), base.shape)
    assert base.shape.sites[SITE].kind is SiteKind.EMBEDDING
    assert SITE in adapter.deltas
    assert adapter.warnings == ()
    for name, tensor in _tensors(config).items():
        _refused(base, "not_finite", name, config, _tensors(config) | {name: torch.full_like(tensor, torch.inf)})
        _refused(base, "base_mismatch", name, config, _tensors(config) | {name: torch.randn(3, 3)})
    _refused(base, "base_mismatch", "wpe.x", config, _tensors(config) | {"wpe.x": torch.randn(1)})


@pytest.mark.parametrize(
    ("code", "ids"),
    [
        ("bad_config", [5, 5]),
        ("bad_config", [5, True]),
        ("bad_config", "5"),
        ("bad_config", {"embed_tokens": 5}),
        ("base_mismatch", [5, VOCABULARY]),
        ("base_mismatch", [5, -1]),
        ("unsupported_method", {"lm_head": [5, 3]}),
        ("unsupported_method", {"embed_tokens": [5, 3], "lm_head": [5, 3]}),
    ],
    ids=str,
)
def test_ids_that_cannot_be_served_are_refused(base: FrozenBase, code: str, ids: Any) -> None:
    _refused(base, code, "", {**LORA_TOKENS, "trainable_token_indices": ids}, _tensors(LORA_TOKENS))
    _refused(base, code, "", {**TOKENS, "token_indices": ids}, _tensors(TOKENS))


def test_trained_tokens_without_ids_are_refused(base: FrozenBase) -> None:
    config = {key: value for key, value in TOKENS.items() if key != "token_indices"}
    _refused(base, "bad_config", "token_indices", config, _tensors(TOKENS))
    _refused(base, "bad_config", "token_indices", config | {"token_indices": None}, _tensors(TOKENS))


@pytest.mark.parametrize("key", ["use_dora", "lora_bias", "ensure_weight_tying"])
def test_variants_at_the_embedding_are_refused(base: FrozenBase, key: str) -> None:
    _refused(base, "unsupported_method", key, {**LORA, key: True})


def test_one_module_is_changed_in_one_way(base: FrozenBase) -> None:
    both = _tensors(LORA) | {f"{_KEY}.token_adapter.trainable_tokens_delta": torch.randn(2, WIDTH)}
    _refused(base, "unsupported_method", SITE, {**LORA, "trainable_token_indices": [5, 3]}, both)
    _refused(base, "base_mismatch", "input embedding", {**TOKENS, "target_modules": ["q_proj"]})


def test_a_copy_of_the_bases_own_weight_is_taken_only_if_it_is_that(base: FrozenBase) -> None:
    name, own = f"{_KEY}.base_layer.weight", base.shape.weight(SITE)
    assert read_adapter(Checkpoint(LORA, _tensors(LORA) | {name: own.clone()}, torch.float32), base.shape).deltas
    _refused(base, "unsupported_method", name, LORA, _tensors(LORA) | {name: own + 1})
    head = "base_model.model.lm_head.trainable_tokens_delta"
    _refused(base, "base_mismatch", head, TOKENS, _tensors(TOKENS) | {head: torch.randn(2, WIDTH)})


@pytest.mark.parametrize("name", ["lm_head.base_layer.weight", "lm_head.weight", "model.embed_tokens.weight"])
def test_a_copy_of_the_bases_own_weight_is_taken_whatever_the_method(base: FrozenBase, name: str) -> None:
    own = base.shape.weight(name.removesuffix(".weight").removesuffix(".base_layer"))
    ia3 = {"peft_type": "IA3", "target_modules": ["lm_head"], "feedforward_modules": []}
    prompt = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2}
    for config, tensors, prefix in (
        (ia3, {"base_model.model.lm_head.ia3_l": torch.randn(VOCABULARY, 1)}, "base_model.model."),
        (prompt, {"prompt_embeddings": torch.randn(2, WIDTH)}, "base_model."),
    ):
        adapter = read_adapter(Checkpoint(config, tensors | {prefix + name: own.clone()}, torch.float32), base.shape)
        assert adapter.parameters == sum(tensor.numel() for tensor in tensors.values())
        for other in (own + 1, own[1:]):
            with pytest.raises(AdapterError, match=name):
                read_adapter(Checkpoint(config, tensors | {prefix + name: other}, torch.float32), base.shape)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_padded_steps_of_trained_tokens_answer_as_ordinary_ones(architecture: str, tmp_path: Path) -> None:
    base = FrozenBase(tiny_base(architecture))
    stacks = [(), ("trainable_tokens",), ("lora_tokens",), ("lora", "trainable_tokens"), ("prompt", "lora_tokens")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference library's, about these tiny bases
        for seed, name in enumerate({name for stack in stacks for name in stack}):
            save_adapter(tiny_base(architecture), configs(architecture)[name](), tmp_path / name, seed)
    rng = random.Random(3)
    requests = [
        request(
            f"{stack}/{index}",
            [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, 9))],
            greedy(8),
            *(tmp_path / name for name in stack),
        )
        for stack in stacks
        for index in range(2)
    ]
    results = []
    for is_padded in (False, True):
        engine = make_engine(base, page_size=4, num_pages=200, max_batch_tokens=40, max_seqs=8)
        padded = _pad(engine) if is_padded else []
        results.append(run(engine, requests, random.Random(5)).results)
        engine.close()
        assert bool(padded) == is_padded
    ordinary, in_graphs = results
    for name, result in ordinary.items():
        assert in_graphs[name].tokens == result.tokens, name
