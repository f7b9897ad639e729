"""Attention by a kernel that reads pages: against the gathered attention, with a slow kernel and with torch's."""

from __future__ import annotations

import random

import pytest
import torch

from server.model import FrozenBase, KVCache, LayerShape, PagedAttention, VarlenAttention
from server.model.attention import AttentionOptions
from server.model.varlen_attention import (
    Kernel,
    LayerCall,
    UnsupportedOptionsError,
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


@pytest.mark.parametrize("options", [AttentionOptions(None, softcap=2.0), AttentionOptions(None, sinks=torch.zeros(2))])
def test_what_a_kernel_leaves_out_is_not_left_out_silently(options: AttentionOptions) -> None:
    cache = KVCache([LayerShape(2, 8)], 3, 4, dtype=torch.float32, device=CPU)
    varlen, _ = trial_plans([(1, 1)], [[1]], cache)
    query = torch.randn(1, 2, 8)
    with pytest.raises(UnsupportedOptionsError):
        VarlenAttention(cache, varlen, slow_kernel).attend(0, query, query, query, options)


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
def test_torchs_kernel_where_it_is_found_agrees_with_the_gathered_attention(page_size: int, window: int | None) -> None:
    base = FrozenBase(tiny_base("llama").to("cuda", torch.bfloat16))
    kernel, reason = find_kernel(base, page_size)
    if kernel is None:
        pytest.skip(f"the gathered attention serves this torch: {reason}")
    for seed in range(8):
        difference = _largest_difference(kernel, seed, window, page_size, torch.bfloat16, torch.device("cuda"))
        assert difference < 5e-2
