"""The tensors of the paged KV cache. Which page belongs to whom is the engine's business.

Page 0 is the null page: always zero, never handed out, so that padded block tables point somewhere harmless.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

NULL_PAGE = 0


class LayerShape(NamedTuple):
    """Keys and values of one token in one layer."""

    kv_heads: int
    head_dim: int


class KVCache:
    """Keys and values of all layers, in pages of `page_size` tokens.

    `layers[i]` is `[2, num_pages, page_size, kv_heads, head_dim]`: keys, then values. Slot `s` of a layer is
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
        self.layers = [torch.empty(2, num_pages, page_size, *shape, dtype=dtype, device=device) for shape in shapes]
        self._gathered = torch.empty(0, dtype=dtype, device=device)
        self.zero([NULL_PAGE])

    @staticmethod
    def page_bytes(shapes: Sequence[LayerShape], page_size: int, dtype: torch.dtype) -> int:
        """Bytes of one page over all layers."""
        return sum(2 * page_size * shape.kv_heads * shape.head_dim for shape in shapes) * dtype.itemsize

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store tokens. `slots` `[n]`; `keys`, `values` `[n, kv_heads, head_dim]`."""
        flat = self.layers[layer].flatten(1, 2)
        flat[0].index_copy_(0, slots, keys)
        flat[1].index_copy_(0, slots, values)

    def gather(self, layer: int, pages: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of `pages` `[n]`, side by side: each `[n, page_size, kv_heads, head_dim]`.

        Valid until the next call: the memory is used again, so that what is gathered for one group of rows and layer
        after the other stays in the processor's cache.
        """
        keys, values = self.layers[layer]
        size = len(pages) * keys[0].numel()
        if self._gathered.numel() < 2 * size:
            self._gathered = self._gathered.new_empty(2 * size)
        gathered = self._gathered[: 2 * size].view(2, len(pages), *keys.shape[1:])
        torch.index_select(keys, 0, pages, out=gathered[0])
        torch.index_select(values, 0, pages, out=gathered[1])
        return gathered[0], gathered[1]

    def zero(self, pages: Sequence[int]) -> None:
        """Clear pages that are handed out anew.

        What a former owner left may be NaN, and a masked position still meets its value as `0 · NaN`: without
        this one request's fault could reach another.
        """
        index = torch.tensor(pages, device=self.layers[0].device)
        for layer in self.layers:
            layer.index_fill_(1, index, 0)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole pages."""
        device = self.layers[0].device
        source_index, target_index = (
            torch.tensor(sources, device=device),
            torch.tensor(targets, device=device),
        )
        for layer in self.layers:
            layer[:, target_index] = layer[:, source_index]

    def fill(self, slots: Tensor, entries: Sequence[Tensor]) -> None:
        """Store given entries, as prefix tuning has them: per layer `[2, n, kv_heads, head_dim]`."""
        for index, entry in enumerate(entries):
            self.write(index, slots, entry[0], entry[1])
