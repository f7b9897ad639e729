"""Decoder layers as programs give what their classes give, whatever the number of tokens."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from server.model import FrozenBase
from server.model.program_kernels import MOST_TOKENS
from tests.model.mixing import Mixing, own_logits
from tests.model.packed import for_many_tokens
from tests.reference.bases import VOCABULARY, tiny_base

pytestmark = pytest.mark.usefixtures("blocked_weights")

USUAL = ("llama", "qwen2", "qwen3", "mistral", "gemma")
OTHERS = ("gpt2", "opt", "gpt_neox", "phi3")


@pytest.mark.parametrize("architecture", USUAL + OTHERS)
@torch.inference_mode()
def test_programs_give_the_logits_of_the_class(architecture: str) -> None:
    model = tiny_base(architecture)
    base = FrozenBase(deepcopy(model))
    assert len(base.layer_programs) == (2 if architecture in USUAL else 0)
    for tokens in (1, 2, 5, 6, 7, 13, 48, 49, 200, MOST_TOKENS, MOST_TOKENS + 1):
        ids = torch.arange(tokens) * 7 % VOCABULARY
        positions = torch.arange(tokens) * 11 % base.max_model_len
        expected, asked = own_logits(model, ids, positions)
        mixing = Mixing()
        logits = base.forward(base.embed(ids), positions, mixing, {}, torch.arange(tokens))
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
        assert mixing.asked == asked.asked


@torch.inference_mode()
def test_a_step_without_tokens_is_the_class_s_own_matter() -> None:
    base = FrozenBase(tiny_base("llama"))
    nothing = torch.empty(0, dtype=torch.long)
    with pytest.raises(RuntimeError, match="0 elements"):
        base.forward(base.embed(nothing), nothing, Mixing(), {}, nothing)


@torch.inference_mode()
def test_bases_take_steps_in_turn() -> None:
    bases = [FrozenBase(tiny_base(architecture)) for architecture in ("llama", "qwen2")]
    ids = torch.arange(3)
    alone = [base.forward(base.embed(ids), ids, Mixing(), {}, ids) for base in bases]
    for _ in range(2):
        for base, expected in zip(bases, alone, strict=True):
            assert torch.equal(base.forward(base.embed(ids), ids, Mixing(), {}, ids), expected)


@for_many_tokens
@pytest.mark.usefixtures("threads")
@torch.inference_mode()
def test_a_token_s_logits_are_the_same_to_the_bit_in_every_company() -> None:
    base = FrozenBase(tiny_base("qwen3"))
    ids, positions = torch.arange(9), torch.arange(9) + 3
    together = base.forward(base.embed(ids), positions, Mixing(), {}, torch.arange(9))
    for start, stop in ((0, 1), (1, 3), (3, 6), (5, 9)):
        part = slice(start, stop)
        logits = base.forward(base.embed(ids[part]), positions[part], Mixing(), {}, torch.arange(stop - start))
        assert torch.equal(logits, together[part])


@torch.inference_mode()
def test_a_token_that_is_not_finite_hurts_no_other() -> None:
    base = FrozenBase(tiny_base("llama"))
    every = torch.arange(9)
    embedded = base.embed(every).clone()
    embedded[1] = torch.nan
    logits = base.forward(embedded, every, Mixing(), {}, every)
    assert logits.isfinite().all(-1).tolist() == [index != 1 for index in range(9)]
