"""The tensors of the paged KV cache. Which page belongs to whom is the engine's business.

Page 0 is the null page: always zero, never handed out, so that padded block tables point somewhere harmless. One more
page behind the last is never handed out either: the scratch page, where rows write that only fill up a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

NULL_PAGE = 0


def index_tensor(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device, bits: int = 64) -> Tensor:
    """Integers on the device. CUDA gets them from pinned memory, so that nobody waits for what it is doing."""
    # numpy reads Python's numbers in a fifth of the time that torch takes
    numbers = torch.from_numpy(np.array(values, np.int32 if bits == 32 else np.int64))
    if device.type != "cuda":
        return numbers
    return (numbers.pin_memory() if len(values) else numbers).to(device, non_blocking=True)


class LayerShape(NamedTuple):
    """Keys and values of one token in one layer."""

    kv_heads: int
    head_dim: int


class KVCache:
    """Keys and values of all layers, in pages of `page_size` tokens.

    `layers[i]` is `[2, num_pages + 1, page_size, kv_heads, head_dim]`: keys, then values. Slot `s` of a layer is
    token `s % page_size` of page `s // page_size`.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_pages: int,
        page_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate everything at once; the cache never grows. Pages are zeroed as they are handed out (`zero`), not
        here: touching gigabytes would be most of a start."""
        self.page_size = page_size
        self.num_pages = num_pages
        self.scratch_page = num_pages
        self.layers = [torch.empty(2, num_pages + 1, page_size, *shape, dtype=dtype, device=device) for shape in shapes]
        self._parts = [tuple(layer.unbind()) for layer in self.layers]  # keys, values
        self._slots = [tuple(part.flatten(0, 1) for part in parts) for parts in self._parts]
        self._gathered = torch.empty(0, dtype=dtype, device=device) if device.type == "cpu" else None
        self.zero([NULL_PAGE, self.scratch_page])

    @staticmethod
    def page_bytes(shapes: Sequence[LayerShape], page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page over all layers."""
        return sum(2 * page_size * shape.kv_heads * shape.head_dim for shape in shapes) * dtype.itemsize

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store tokens. `slots` `[n]`; `keys`, `values` `[n, kv_heads, head_dim]`."""
        key_slots, value_slots = self._slots[layer]
        key_slots.index_copy_(0, slots, keys)
        value_slots.index_copy_(0, slots, values)

    def gather(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of `pages` `[n]`, side by side: each `[n, page_size, kv_heads, head_dim]`.

        On a CPU valid until the next call: the memory is used again, so that what is gathered for one group of rows and
        layer after the other stays in the processor's cache. A captured CUDA graph would go on writing to memory that
        has been given up for more, so there it is torch's allocator that uses it again.
        """
        keys, values = self._parts[layer]
        if self._gathered is None:
            return keys.index_select(0, pages), values.index_select(0, pages)
        size = len(pages) * keys[0].numel()
        if self._gathered.numel() < 2 * size:
            self._gathered = self._gathered.new_empty(2 * size)
        chosen_keys, chosen_values = self._gathered[: 2 * size].view(2, len(pages), *keys.shape[1:]).unbind()
        torch.index_select(keys, 0, pages, out=chosen_keys)
        torch.index_select(values, 0, pages, out=chosen_values)
        return chosen_keys, chosen_values

    def zero(self, pages: Sequence[int]) -> None:
        """Clear pages that are handed out anew.

        What a former owner left may be NaN, and a masked position still meets its value as `0 · NaN`: without
        this one request's fault could reach another.
        """
        index = index_tensor(pages, self.layers[0].device)
        for layer in self.layers:
            layer.index_fill_(1, index, 0)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole pages."""
        device = self.layers[0].device
        source_index, target_index = index_tensor(sources, device), index_tensor(targets, device)
        for layer in self.layers:
            layer[:, target_index] = layer[:, source_index]

    def fill(self, slots: Tensor, entries: Sequence[Tensor]) -> None:
        """Store given entries, as prefix tuning has them: per layer `[2, n, kv_heads, head_dim]`."""
        for index, entry in enumerate(entries):
            self.write(index, slots, entry[0], entry[1])
