"""A whole decode step as one program gives the logits of the class, and only where it is all there is to do."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from server.model import AttentionPlan, FrozenBase, KVCache, PagedAttention, SitePlan
from server.model.attention import IMPLEMENTATION, DecodeGroup, PrefillRow
from server.model.decode_kernel import DecodeKernel
from server.model.model_program import ModelProgram
from server.model.program_kernels import MOST_TOKENS
from tests.model.segments import segment_at
from tests.reference.bases import VOCABULARY, tiny_base

pytestmark = pytest.mark.usefixtures("blocked_weights")

PAGE, LONGEST = 4, 12  # tokens of a page, of a row
MOST_ROWS = min(20, MOST_TOKENS)
WHOLE = ("llama", "qwen2", "qwen3", "mistral", "gemma")


def _granite(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(9)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    plain = {"embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "pad_token_id": 0}
    config = AutoConfig.for_model("granite", vocab_size=VOCABULARY, num_key_value_heads=2, **sizes, **plain | changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


Forward = Callable[[Tensor, Tensor, PagedAttention, SitePlan], Tensor]  # token ids, positions → logits


def _by_base(base: FrozenBase) -> Forward:
    def forward(ids: Tensor, positions: Tensor, attention: PagedAttention, plan: SitePlan) -> Tensor:
        return base.forward(base.embed(ids), positions, attention, plan, torch.arange(len(ids)))

    return forward


def _by_class(model: PreTrainedModel) -> Forward:
    """The class itself, nothing of it changed."""
    model.set_attn_implementation(IMPLEMENTATION)

    def forward(ids: Tensor, positions: Tensor, attention: PagedAttention, plan: SitePlan) -> Tensor:
        assert not plan, "a class has no deltas"
        inputs = model.get_input_embeddings()(ids[None])
        output = model(inputs_embeds=inputs, position_ids=positions[None], use_cache=False, medley_attention=attention)
        logits: Tensor = output.logits[0]
        return logits

    return forward


class _Rows:
    """Rows that decode, each with pages of its own, token after token."""

    def __init__(self, base: FrozenBase, rows: int, forward: Forward | None = None, *, by_kernel: bool = True) -> None:
        """`forward` is the base's unless another is given."""
        self.rows, self.forward, self.by_kernel = rows, forward or _by_base(base), by_kernel
        pages = 1 + rows * (LONGEST // PAGE)
        self.cache = KVCache(base.layers, pages, PAGE, dtype=torch.float32, device=torch.device("cpu"))
        self.cache.zero(range(pages))  # as the engine does for attention that gathers them
        self.tables = torch.arange(1, pages).view(rows, -1)
        self.length = 0

    def step(self, plan: SitePlan | None = None) -> Tensor:
        at, tokens = self.length, torch.arange(self.rows)
        self.length += 1
        slots = self.tables[:, at // PAGE] * PAGE + at % PAGE
        group = DecodeGroup(0, self.rows, self.tables, torch.full((self.rows,), self.length))
        attention = PagedAttention(
            self.cache,
            AttentionPlan(slots, None, tokens, [group], []),
            decode_kernel=DecodeKernel() if self.by_kernel else None,
        )
        ids = (tokens * 7 + at * 3) % VOCABULARY
        return self.forward(ids, torch.full((self.rows,), at), attention, plan or {})


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each forward pass whether it ran as one program."""
    ran: list[bool] = []
    own = ModelProgram.forward

    def forward(program: ModelProgram, *arguments: Any) -> Tensor | None:
        logits = own(program, *arguments)
        ran.append(logits is not None)
        return logits

    monkeypatch.setattr(ModelProgram, "forward", forward)
    return ran


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("rows", [each for each in (1, 3, 5, 20) if each <= MOST_TOKENS])
@pytest.mark.parametrize("architecture", WHOLE)
@torch.inference_mode()
def test_decode_steps_give_the_logits_of_the_class(architecture: str, rows: int, ran: list[bool]) -> None:
    model = tiny_base(architecture)
    base = FrozenBase(deepcopy(model))
    ran.clear()
    whole, expected = _Rows(base, rows), _Rows(base, rows, _by_class(model), by_kernel=False)
    for _ in range(LONGEST):
        torch.testing.assert_close(whole.step(), expected.step(), rtol=1e-4, atol=1e-4)
    assert ran == [True] * LONGEST


@torch.inference_mode()
def test_caches_numbers_of_rows_and_of_threads_may_change_from_step_to_step() -> None:
    model = tiny_base("qwen3")
    base, own = FrozenBase(deepcopy(model)), _by_class(model)
    pairs = [(_Rows(base, rows), _Rows(base, rows, own, by_kernel=False)) for rows in (3, 1, MOST_ROWS)]
    before = torch.get_num_threads()
    try:
        for at in range(3 * LONGEST):
            torch.set_num_threads(1 + at % 4)
            whole, expected = pairs[at % 3]
            torch.testing.assert_close(whole.step(), expected.step(), rtol=1e-4, atol=1e-4)
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def test_a_cache_is_given_up_with_its_engine() -> None:
    base = FrozenBase(tiny_base("llama"))
    rows = _Rows(base, 2)
    rows.step()
    cache = weakref.ref(rows.cache)
    del rows
    assert cache() is None


@torch.inference_mode()
def test_a_bound_on_logits_that_only_large_ones_meet_keeps_the_class_s_own() -> None:
    model = tiny_base("llama")
    largest = float(model(torch.arange(20)[None] % VOCABULARY).logits.abs().max())
    model.get_output_embeddings().register_forward_hook(lambda *call: call[-1].clamp(max=3 * largest))
    base = FrozenBase(model)
    assert base.layer_programs != []
    assert base._program is None


@pytest.mark.parametrize("architecture", ["gpt2", "phi3"])
def test_classes_with_other_layers_have_none(architecture: str) -> None:
    assert FrozenBase(tiny_base(architecture))._program is None


@pytest.mark.parametrize("field", ["embedding_multiplier", "logits_scaling"])
def test_a_class_that_scales_embeddings_or_logits_has_none(field: str) -> None:
    plain, scaled = FrozenBase(_granite()), FrozenBase(_granite(**{field: 3.0}))
    assert plain.layer_programs == scaled.layer_programs != []
    assert plain._program is not None
    assert scaled._program is None


@torch.inference_mode()
def test_row_deltas_are_in_it_and_those_elsewhere_are_the_class_s(ran: list[bool]) -> None:
    base = FrozenBase(tiny_base("llama"))
    closed = segment_at(base, "model.layers.1.self_attn.v_proj", slice(0, 3))
    others = segment_at(base, "lm_head", slice(0, 3)), segment_at(base, "model.norm", slice(0, 3), "output scale")
    ran.clear()
    for plan, is_whole in ((closed, True), (others[0], False), (closed | others[1], False)):
        rows, slow, plain = _Rows(base, 3), _Rows(base, 3, by_kernel=False), _Rows(base, 3)
        for _ in range(3):
            changed = rows.step(plan)
            torch.testing.assert_close(changed, slow.step(plan), rtol=1e-4, atol=1e-4)
            assert float((changed - plain.step()).abs().max()) > 0.01
        assert ran[::3] == [is_whole] * 3
        ran.clear()


@torch.inference_mode()
def test_prompts_and_states_that_are_wanted_are_the_class_s(ran: list[bool]) -> None:
    base = FrozenBase(tiny_base("llama"))
    cache = KVCache(base.layers, 8, PAGE, dtype=torch.float32, device=torch.device("cpu"))
    ids = torch.arange(5)
    row = PrefillRow(0, 5, torch.tensor([1, 2]), 5)
    plan = AttentionPlan(ids + PAGE, None, ids[:0], [], [row])
    ran.clear()
    base.forward(base.embed(ids), ids, PagedAttention(cache, plan, decode_kernel=DecodeKernel()), {}, ids)
    assert ran == [False]
    states: list[Tensor] = []
    group = DecodeGroup(0, 1, torch.tensor([[1, 2]]), torch.tensor([6]))
    decode = AttentionPlan(torch.tensor([2 * PAGE + 1]), None, ids[:1], [group], [])
    attention = PagedAttention(cache, decode, decode_kernel=DecodeKernel())
    given = base.forward(base.embed(ids[:1]), torch.tensor([5]), attention, {}, ids[:1], states)
    assert ran == [False]
    torch.testing.assert_close(states[0] @ base.shape.weight("lm_head").t(), given, rtol=1e-4, atol=1e-4)
