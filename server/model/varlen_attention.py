"""Attention by a CUDA kernel that reads the pages where they are: torch's variable-length attention, else Triton's.

One call per layer for rows of one token and chunks of prompts alike. Not every torch has `varlen_attn`, not every build
takes block tables (FlashAttention 3 and 4 do, where they are installed and put in the place of what torch's own wheels
have built in, by `torch.nn.attention.activate_flash_attention_impl`), some want pages of 256 tokens, and none does all
that a class may ask for. `server.model.triton_attention` does, and takes pages of any size. Nothing is read off version
numbers: `find_kernel` calls one after the other on random pages of this base's shapes and compares the answers with
those of the gathered attention.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from server.model.attention import AttentionOptions, AttentionPlan, DecodeGroup, PrefillRow, VarlenRows
from server.model.base import FrozenBase
from server.model.kv_cache import KVCache, LayerShape, index_tensor
from server.model.paged_attention import PagedAttention

Kernel = Callable[[Tensor, Tensor, Tensor, VarlenRows, AttentionOptions], Tensor]
"""(query `[num_tokens, heads, head_dim]`, keys and values `[pages, page_size, kv_heads, head_dim]`, rows, what the
class asks for) → as the query. A row's tokens are the last of its context; each sees itself and what is before it."""

# Relative to the largest value. Both sides round to 8 bits (bfloat16) or to 24, and add in another order.
_TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 2e-2, torch.float32: 1e-4}
_FLASH_DTYPES = (torch.bfloat16, torch.float16)
_TRIAL_ROWS = ((1, 40), (1, 3), (7, 7), (5, 29))  # (tokens, context) of each; on pages of 16 several pages of some


class UnsupportedOptionsError(Exception):
    """A class asks a kernel for what it does not do. At start it is passed over; later the class has changed."""


@dataclass
class VarlenAttention:
    """One step's attention over a KV cache, all rows in one call."""

    cache: KVCache
    plan: AttentionPlan  # with `varlen`
    kernel: Kernel

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """See `Attention`."""
        rows = self.plan.varlen
        assert rows is not None, "the plan is made for this attention"
        self.cache.write(layer, self.plan.slots, *self.plan.written(key, value))
        keys, values = self.cache.layers[layer]
        return self.kernel(query, keys, values, rows, options)


def find_kernel(base: FrozenBase, page_size: int) -> tuple[Kernel | None, str]:
    """A kernel that serves this base on pages of this size, or None, and in words which or why not."""
    if base.device.type != "cuda":
        return None, "no CUDA device"
    return choose_kernel(set(_calls(base)), page_size, base.dtype, base.device)


def choose_kernel(
    calls: set[LayerCall], page_size: int, dtype: torch.dtype, device: torch.device
) -> tuple[Kernel | None, str]:
    """The first one there is that answers all of `calls` as the gathered attention does; see `find_kernel`."""
    if dtype not in _TOLERANCES:
        return None, f"no kernels for {dtype}"
    reasons: list[str] = []
    for name, make in _candidates(dtype, device):
        try:
            kernels = make()
            worst = max(worst_difference(call, each, page_size, dtype, device) for call in calls for each in kernels)
        except Exception as error:  # noqa: BLE001 - Triton, the compilers that it starts and the driver raise their own
            what = f"{name} does not take pages of {page_size} tokens: {type(error).__name__}: {error}"
            reasons.append(what.partition("\n")[0])
            continue
        if worst <= _TOLERANCES[dtype]:
            return kernels[0], f"{name} over pages"
        reasons.append(f"{name} over pages is off by {worst:.2g}")
    return None, "; ".join(reasons)


def _candidates(dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, Callable[[], Sequence[Kernel]]]]:
    """Names, and kernels of which the first serves if all give the right answers. Each is ready until the next is asked
    for."""
    for implementation in _implementations() if dtype in _FLASH_DTYPES else ():
        name = "varlen_attn" if implementation is None else f"varlen_attn of {implementation}"
        for kernel in _torch_kernels():
            yield name, partial(list, (kernel,))
    yield "Triton's kernel", partial(_triton_kernels, device)


def _implementations() -> Iterator[str | None]:
    """FlashAttention's that are installed beside torch's own, each in its place, then torch's own (None)."""
    attention = import_module("torch.nn.attention")
    if hasattr(attention, "activate_flash_attention_impl"):
        for name in attention.list_flash_attention_impls():
            try:
                attention.activate_flash_attention_impl(name)
            except (ImportError, RuntimeError):
                continue  # it is not installed, or not for this torch
            yield name
            attention.restore_flash_attention_impl()
    yield None


def _torch_kernels() -> Iterator[Kernel]:
    """torch's attention, called in the ways in which one build or another takes it."""
    if find_spec("torch.nn.attention.varlen") is None:
        return
    varlen_attn = import_module("torch.nn.attention.varlen").varlen_attn
    if {"block_table", "seqused_k", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters):
        # FlashAttention 3 wants no cumulative key lengths beside a block table, 2 wants some, which it does not use
        yield partial(_torch_kernel, varlen_attn, False)
        yield partial(_torch_kernel, varlen_attn, True)


def _torch_kernel(
    varlen_attn: Callable[..., Tensor],
    passes_key_starts: bool,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: VarlenRows,
    options: AttentionOptions,
) -> Tensor:
    if options.softcap is not None or options.sinks is not None:
        raise UnsupportedOptionsError(f"varlen_attn knows no cap and no sinks: {options}")
    return varlen_attn(
        query,
        keys,
        values,
        rows.starts,
        rows.starts if passes_key_starts else None,
        rows.most_tokens,
        rows.longest,
        scale=options.scaling,
        window_size=_window(options, rows),
        enable_gqa=query.shape[1] != keys.shape[2],
        seqused_k=rows.lengths,
        block_table=rows.block_tables,
    )


def _window(options: AttentionOptions, rows: VarlenRows) -> tuple[int, int]:
    """Positions that a token sees to its left and right, -1 for all. The only token of a row has nothing to its right:
    saying so lets torch's kernel take the query heads of a KV head together and split long contexts."""
    if options.sliding_window is not None:
        return options.sliding_window - 1, 0  # the token itself is not counted
    return (-1, -1) if rows.most_tokens == 1 else (-1, 0)


def _triton_kernels(device: torch.device) -> Sequence[Kernel]:
    from server.model.triton_attention import kernels  # noqa: PLC0415 - Triton comes with torch on CUDA alone

    return kernels(device)


@dataclass(frozen=True)
class LayerCall:
    """What a layer asks of attention."""

    heads: int
    shape: LayerShape
    options: AttentionOptions


def _calls(base: FrozenBase) -> list[LayerCall]:
    """Each layer's, from one token's forward."""
    calls: list[LayerCall] = []

    class Recorder:
        def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
            calls.append(LayerCall(query.shape[1], LayerShape(key.shape[1], key.shape[2]), options))
            return torch.zeros_like(query)

    token = torch.zeros(1, dtype=torch.long, device=base.device)
    base.forward(base.embed(token), token, Recorder(), {}, token)
    return calls


@torch.inference_mode()
def worst_difference(
    call: LayerCall, kernel: Kernel, page_size: int, dtype: torch.dtype, device: torch.device
) -> float:
    """The largest difference between the kernel and the gathered attention, relative to the largest value.

    Pages are not cleared for a kernel that reads them in place: what a former owner left behind a row's end, and in
    pages of nobody, is NaN here, and a kernel that lets it through is infinitely far off.
    """
    generator = torch.Generator().manual_seed(0)
    pages = [-(-length // page_size) for _, length in _TRIAL_ROWS]
    order = (torch.randperm(sum(pages), generator=generator) + 1).tolist()
    tables = [[order.pop() for _ in range(count)] for count in pages]
    worst = 0.0
    for rows in ((0, 1), (0, 1, 2, 3)):  # rows of one token alone, which the kernel may treat apart, and all kinds
        contexts, owned = [_TRIAL_ROWS[row] for row in rows], [tables[row] for row in rows]
        slots = [
            slot for (_, length), own in zip(contexts, owned, strict=True) for slot in _slots(own, page_size, 0, length)
        ]
        written = torch.randn(2, len(slots), *call.shape, generator=generator).to(device, dtype)
        caches = []
        for left in (torch.nan, 0.0):
            cache = KVCache([call.shape], sum(pages) + 1, page_size, dtype=dtype, device=device)
            cache.layers[0][:, 1 : cache.scratch_page] = left
            cache.write(0, index_tensor(slots, device), *written)
            caches.append(cache)
        uncleared, cleared = caches
        num_tokens = sum(count for count, _ in contexts)
        query = torch.randn(num_tokens, call.heads, call.shape.head_dim, generator=generator).to(device, dtype)
        key, value = torch.randn(2, num_tokens, *call.shape, generator=generator).to(device, dtype)
        varlen, gathered = trial_plans(contexts, owned, cleared)
        actual = VarlenAttention(uncleared, varlen, kernel).attend(0, query, key, value, call.options)
        expected = PagedAttention(cleared, gathered).attend(0, query, key, value, call.options)
        difference = (actual - expected).float().abs().max() / expected.float().abs().max()
        worst = max(worst, float(difference) if bool(difference.isfinite()) else float("inf"))
    return worst


def _slots(pages: list[int], size: int, start: int, stop: int) -> list[int]:
    """Of a row's positions from `start` to before `stop`."""
    return [pages[at // size] * size + at % size for at in range(start, stop)]


def trial_plans(
    rows: list[tuple[int, int]], tables: list[list[int]], cache: KVCache
) -> tuple[AttentionPlan, AttentionPlan]:
    """The same rows `(tokens, context)` with their pages, planned for a kernel and for the gathered attention."""
    device, size = cache.layers[0].device, cache.page_size
    starts = [0]
    slots: list[int] = []
    decode: list[int] = []
    groups: list[DecodeGroup] = []
    prefill: list[PrefillRow] = []
    for (count, length), pages in zip(rows, tables, strict=True):
        slots += _slots(pages, size, length - count, length)
        if count == 1:
            lengths = index_tensor([length], device)
            groups.append(DecodeGroup(len(decode), len(decode) + 1, index_tensor([pages], device), lengths))
            decode.append(starts[-1])
        else:
            prefill.append(PrefillRow(starts[-1], starts[-1] + count, index_tensor(pages, device), length))
        starts.append(starts[-1] + count)
    widest = max(map(len, tables))
    varlen = VarlenRows(
        index_tensor(starts, device, bits=32),
        index_tensor([length for _, length in rows], device, bits=32),
        index_tensor([pages + [0] * (widest - len(pages)) for pages in tables], device, bits=32),
        max(count for count, _ in rows),
        max(length for _, length in rows),
    )
    written, none = index_tensor(slots, device), index_tensor([], device)
    return (
        AttentionPlan(written, None, none, [], [], varlen),
        AttentionPlan(written, None, index_tensor(decode, device), groups, prefill),
    )
