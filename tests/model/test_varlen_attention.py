"""Attention by a kernel that reads pages: against the gathered attention, with a slow kernel and with torch's."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import attention as torch_attention
from torch.nn.attention import varlen as torch_varlen

from server.model import FrozenBase, KVCache, LayerShape, PagedAttention, VarlenAttention, VarlenRows
from server.model.attention import AttentionOptions
from server.model.varlen_attention import (
    Kernel,
    LayerCall,
    UnsupportedOptionsError,
    choose_kernel,
    find_kernel,
    trial_plans,
    worst_difference,
)
from tests.model.slow_varlen import multiplying_kernel, slow_kernel
from tests.reference.bases import tiny_base

CPU = torch.device("cpu")


def _largest_difference(
    kernel: Kernel, seed: int, window: int | None, page_size: int, dtype: torch.dtype, device: torch.device
) -> float:
    """Between the two attentions, over rows of one token, chunks and whole prompts."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    shape, heads = LayerShape(2, 64), 2 * rng.choice([1, 4])
    rows = [(1, rng.randint(1, 50)) for _ in range(rng.randint(1, 4))]
    if seed % 2:  # else rows of one token only, which a kernel may treat apart
        length = rng.randint(2, 60)
        rows += [(length, length), (rng.randint(2, 9), rng.randint(9, 60))]
    rng.shuffle(rows)
    cache = KVCache([shape], 200, page_size, dtype=dtype, device=device)
    cache.layers[0].normal_()
    cache.zero([0])
    free = list(range(1, 200))
    rng.shuffle(free)
    tables = [[free.pop() for _ in range(-(-length // page_size))] for _, length in rows]
    num_tokens = sum(count for count, _ in rows)
    query = torch.randn(num_tokens, heads, shape.head_dim).to(device, dtype)
    key, value = torch.randn(2, num_tokens, *shape).to(device, dtype)
    options = AttentionOptions(rng.choice([None, 0.1]), window)
    varlen, gathered = trial_plans(rows, tables, cache)
    actual = VarlenAttention(cache, varlen, kernel).attend(0, query, key, value, options)
    expected = PagedAttention(cache, gathered).attend(0, query, key, value, options)
    return float((actual - expected).float().abs().max())


@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_rows_reach_the_kernel_with_their_pages_lengths_and_window(window: int | None) -> None:
    for seed in range(4):
        assert _largest_difference(slow_kernel, seed, window, 4, torch.float32, CPU) < 1e-5


CALL = LayerCall(4, LayerShape(2, 16), AttentionOptions(None))


def right_varlen_attn(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    key_starts: Tensor | None,
    most_tokens: int,
    longest: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
    seqused_k: Tensor,
    block_table: Tensor,
) -> Tensor:
    """What torch's `varlen_attn` has to compute, of a build that wants cumulative key lengths."""
    if key_starts is None:
        raise RuntimeError("cu_seqlens_k is missing\nat some place")
    assert enable_gqa == (query.shape[1] != keys.shape[2])
    assert window_size[1] == 0 or (most_tokens == 1 and window_size == (-1, -1))
    rows = VarlenRows(starts, seqused_k, block_table, most_tokens, longest)
    return slow_kernel(query, keys, values, rows, AttentionOptions(scale, window_size[0] + 1 or None))


def wrong_varlen_attn(
    query: Tensor, *rest: object, seqused_k: Tensor, block_table: Tensor, enable_gqa: bool, **more: object
) -> Tensor:
    return query.clone()


@pytest.fixture
def implementations(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What FlashAttention's were put in place, None for torch's own; one of two is installed."""
    calls: list[str | None] = []

    def activate(name: str) -> None:
        if name == "FA8":
            raise ModuleNotFoundError(name)
        calls.append(name)

    monkeypatch.setattr(torch_attention, "list_flash_attention_impls", lambda: ["FA8", "FA9"], raising=False)
    monkeypatch.setattr(torch_attention, "activate_flash_attention_impl", activate, raising=False)
    monkeypatch.setattr(torch_attention, "restore_flash_attention_impl", lambda: calls.append(None), raising=False)
    return calls


def _choose(
    monkeypatch: pytest.MonkeyPatch,
    varlen_attn: Callable[..., Tensor],
    triton: Kernel | None = slow_kernel,
    call: LayerCall = CALL,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Kernel | None, str]:
    monkeypatch.setattr(torch_varlen, "varlen_attn", varlen_attn)
    module = None if triton is None else SimpleNamespace(kernels=lambda device: [triton, slow_kernel])
    monkeypatch.setitem(sys.modules, "server.model.triton_attention", module)
    return choose_kernel({call}, 16, dtype, CPU)


def test_what_is_installed_beside_torch_comes_first(
    implementations: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, note = _choose(monkeypatch, right_varlen_attn)
    assert kernel is not None
    assert note == "varlen_attn of FA9 over pages"
    assert implementations == ["FA9"], "it stays in its place"


def test_torchs_own_comes_next(implementations: list[str | None], monkeypatch: pytest.MonkeyPatch) -> None:
    def varlen_attn(*given: Tensor, seqused_k: Tensor, block_table: Tensor, enable_gqa: bool, **more: object) -> Tensor:
        if implementations[-1] is not None:
            raise RuntimeError("pages of 16 tokens")
        return right_varlen_attn(
            *given,  # type: ignore[arg-type]
            seqused_k=seqused_k,
            block_table=block_table,
            enable_gqa=enable_gqa,
            **more,  # type: ignore[arg-type]
        )

    kernel, note = _choose(monkeypatch, varlen_attn)
    assert kernel is not None
    assert note == "varlen_attn over pages"
    assert implementations == ["FA9", None]


@pytest.mark.parametrize(
    ("varlen_attn", "call", "dtype"),
    [
        (wrong_varlen_attn, CALL, torch.bfloat16),
        (lambda query: query, CALL, torch.bfloat16),
        (right_varlen_attn, CALL, torch.float32),
        (right_varlen_attn, LayerCall(4, CALL.shape, AttentionOptions(None, softcap=2.0)), torch.bfloat16),
        (right_varlen_attn, LayerCall(4, CALL.shape, AttentionOptions(None, sinks=torch.ones(4))), torch.bfloat16),
    ],
    ids=["wrong", "without block tables", "of another type", "without caps", "without sinks"],
)
def test_tritons_kernel_serves_what_torchs_does_not(
    varlen_attn: Callable[..., Tensor],
    call: LayerCall,
    dtype: torch.dtype,
    implementations: list[str | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel, note = _choose(monkeypatch, varlen_attn, call=call, dtype=dtype)
    assert kernel is slow_kernel
    assert note == "Triton's kernel over pages"
    assert implementations in ([], ["FA9", None]), "torch's own is in its place again"


def _fail(*given: object) -> Tensor:
    raise ValueError("no compiler\nfor this")


@pytest.mark.parametrize(
    ("triton", "reason"),
    [
        (multiplying_kernel, "Triton's kernel over pages is off by inf"),
        (_fail, "Triton's kernel does not take pages of 16 tokens: ValueError: no compiler"),
        (None, "Triton's kernel does not take pages of 16 tokens: ModuleNotFoundError: "),
    ],
    ids=["wrong", "failing", "missing"],
)
def test_pages_are_gathered_where_no_kernel_is_right(
    triton: Kernel | None, reason: str, implementations: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, note = _choose(monkeypatch, wrong_varlen_attn, triton)
    assert kernel is None
    assert note.startswith("varlen_attn of FA9 over pages is off by ")
    assert f"; {reason}" in note
    assert "\n" not in note
    assert implementations == ["FA9", None]


def test_other_types_have_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _choose(monkeypatch, right_varlen_attn, dtype=torch.float64) == (None, "no kernels for torch.float64")


@pytest.mark.parametrize("options", [AttentionOptions(None, softcap=2.0), AttentionOptions(None, sinks=torch.zeros(4))])
def test_what_torchs_kernel_leaves_out_is_not_left_out_silently(
    options: AttentionOptions, implementations: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, _ = _choose(monkeypatch, right_varlen_attn)
    assert kernel is not None
    cache = KVCache([CALL.shape], 3, 4, dtype=torch.bfloat16, device=CPU)
    varlen, _ = trial_plans([(1, 1)], [[1]], cache)
    query, key = torch.randn(1, 4, 16).bfloat16(), torch.randn(1, 2, 16).bfloat16()
    with pytest.raises(UnsupportedOptionsError):
        VarlenAttention(cache, varlen, kernel).attend(0, query, key, key, options)


def test_no_kernel_is_looked_for_on_a_cpu() -> None:
    assert find_kernel(FrozenBase(tiny_base("llama")), 16) == (None, "no CUDA device")


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("page_size", [4, 16, 256])
def test_the_trial_finds_out_a_kernel_that_multiplies_by_0_what_a_row_must_not_see(
    page_size: int, window: int | None
) -> None:
    call = LayerCall(4, LayerShape(2, 16), AttentionOptions(None, window))
    assert worst_difference(call, slow_kernel, page_size, torch.float32, CPU) < 1e-5
    assert worst_difference(call, multiplying_kernel, page_size, torch.float32, CPU) == float("inf")
    assert _largest_difference(multiplying_kernel, 1, window, page_size, torch.float32, CPU) < 1e-5  # else it is right


@pytest.mark.parametrize("tokens", [2, 33])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_a_whole_prompt_gives_the_same_with_and_without_a_mask(tokens: int, scaling: float | None) -> None:
    torch.manual_seed(tokens)
    cache = KVCache([LayerShape(2, 8)], 20, 4, dtype=torch.float32, device=CPU)
    _, plan = trial_plans([(tokens, tokens)], [list(range(1, -(-tokens // 4) + 1))], cache)
    query, key, value = torch.randn(tokens, 6, 8), torch.randn(tokens, 2, 8), torch.randn(tokens, 2, 8)
    masked, causal = (
        PagedAttention(cache, plan, has_causal_kernel=flag).attend(0, query, key, value, AttentionOptions(scaling))
        for flag in (False, True)
    )
    torch.testing.assert_close(causal, masked)


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 256])
@pytest.mark.parametrize("window", [None, 7])
def test_the_kernel_that_is_found_agrees_with_the_gathered_attention(page_size: int, window: int | None) -> None:
    base = FrozenBase(tiny_base("llama").to("cuda", torch.bfloat16))
    kernel, reason = find_kernel(base, page_size)
    if kernel is None:
        pytest.skip(f"the gathered attention serves this torch: {reason}")
    for seed in range(8):
        difference = _largest_difference(kernel, seed, window, page_size, torch.bfloat16, torch.device("cuda"))
        assert difference < 5e-2
