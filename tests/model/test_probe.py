"""What the probe lets in and what it refuses, found by trying tiny models."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import create_causal_mask
from transformers.models.mistral import modeling_mistral

from server.errors import StartupError
from server.model import FrozenBase
from tests.harness import alone, assert_same, greedy, make_engine, request, run

_TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 40,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _model(architecture: str, **changes: Any) -> PreTrainedModel:
    """Random weights; a change to None leaves a setting to the architecture's config."""
    torch.manual_seed(4)
    fields = {name: value for name, value in {**_TINY, **changes}.items() if value is not None}
    config = AutoConfig.for_model(architecture, **fields)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(3.0 if "embed" in name or "lm_head" in name else 10.0)
            elif name.endswith("sinks"):
                parameter.normal_(std=2.0)
    return model.eval()


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("gemma2", {"sliding_window": 5, "attn_logit_softcapping": 4.0, "final_logit_softcapping": 9.0}),
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6}),
        ("mistral", {"sliding_window": 4}),
    ],
)
def test_softcaps_sinks_and_windows_are_served_as_generate_answers(architecture: str, changes: dict[str, Any]) -> None:
    prompts = [[5, 6], [random.Random(1).randrange(3, 61) for _ in range(17)], [9]]
    expected = [alone(_model(architecture, **changes), prompt, 12) for prompt in prompts]
    assert len({tuple(answer.tokens) for answer in expected}) == len(prompts)
    engine = make_engine(FrozenBase(_model(architecture, **changes)), num_pages=17, max_batch_tokens=16, page_size=3)
    requests = [request(str(index), prompt, greedy(12)) for index, prompt in enumerate(prompts)]
    outcome = run(engine, requests)
    engine.close()
    for index, answer in enumerate(expected):
        assert_same(outcome.results[str(index)], answer, f"{architecture} {index}")


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("bloom", {"n_head": 4, "n_layer": 2}),
        ("falcon", {"alibi": True, "head_dim": None}),
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}),
        ("mamba", {"state_size": 4}),
    ],
)
def test_what_would_be_answered_wrongly_is_refused_with_a_sentence(architecture: str, changes: dict[str, Any]) -> None:
    model = _model(architecture, **changes)
    with pytest.raises(StartupError, match=f"{type(model).__name__} cannot be served: "):
        FrozenBase(model, max_model_len=64)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_depend_on_the_batchs_length_are_refused_beyond_their_original_length(
    kind: str,
) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
        model = _model("phi3", rope_parameters=rope, original_max_position_embeddings=32)
    else:
        rope |= {"original_max_position_embeddings": 32}
        model = _model("llama", rope_parameters=rope)
    with pytest.raises(StartupError, match="--max-model-len 32"):
        FrozenBase(model)
    assert FrozenBase(model, max_model_len=32).max_model_len == 32


_LLAMA4 = {"intermediate_size_mlp": 40, "num_local_experts": 1, "num_experts_per_tok": 1}
_PHIMOE = {"num_local_experts": 2, "num_experts_per_tok": 2}


@pytest.mark.parametrize("window", [13, 40])  # the probe's forwards reach beyond one, not beyond the other
@pytest.mark.parametrize(
    ("architecture", "changes", "setting"),
    [("llama4_text", _LLAMA4, "attention_chunk_size"), ("phimoe", _PHIMOE, "sliding_window")],
)
def test_a_window_that_a_class_keeps_from_attention_is_the_longest_length(
    architecture: str, changes: dict[str, Any], setting: str, window: int
) -> None:
    model = _model(architecture, **changes, **{setting: window})
    for wanted in (None, window + 1):
        with pytest.raises(StartupError, match=f"set --max-model-len {window} or less"):
            FrozenBase(model, max_model_len=wanted)
    assert FrozenBase(model, max_model_len=window).max_model_len == window


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("gemma2", {"sliding_window": 40}),
        ("gemma3_text", {"sliding_window": 40, "layer_types": ["sliding_attention", "full_attention"]}),
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 40}),
        ("mistral", {"sliding_window": 40}),
        ("qwen2", {"sliding_window": 40, "use_sliding_window": True, "max_window_layers": 1}),
        ("llama4_text", {**_LLAMA4, "attention_chunk_size": 64}),
        ("phimoe", {**_PHIMOE, "sliding_window": 64}),
    ],
)
def test_a_window_that_a_class_passes_or_that_no_length_reaches_limits_nothing(
    architecture: str, changes: dict[str, Any]
) -> None:
    model = _model(architecture, **changes)
    ids = torch.randint(3, 61, (60,), generator=torch.Generator().manual_seed(5))
    with torch.inference_mode():
        expected = model(input_ids=ids[None]).logits[0, -1]
    base = FrozenBase(model)
    assert base.max_model_len == 64
    engine = make_engine(base, num_pages=40, max_batch_tokens=64, page_size=3)
    outcome = run(engine, [request("long", ids.tolist(), greedy(1))])
    engine.close()
    assert outcome.results["long"].tokens == [int(expected.argmax())]


def test_a_window_that_attention_is_told_and_the_mask_lacks_limits_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("mistral", sliding_window=40)
    monkeypatch.setattr(modeling_mistral, "create_sliding_window_causal_mask", create_causal_mask)
    with pytest.raises(StartupError, match="set --max-model-len 40 or less"):
        FrozenBase(model)


def test_a_length_beyond_the_models_own_is_refused() -> None:
    with pytest.raises(StartupError, match="--max-model-len 65"):
        FrozenBase(_model("llama"), max_model_len=65)


def test_the_probe_is_the_same_whatever_memory_held_before() -> None:
    for _ in range(20):
        held = [torch.full((2, 13, 4, 2, 8), torch.nan) for _ in range(8)]
        model = _model("llama")
        del held
        FrozenBase(model)
