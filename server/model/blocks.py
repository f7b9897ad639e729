"""The sub-blocks of a base's layers, found in the data of one forward pass: between which modules an attention or a
feed-forward network adds to the residual stream.

With r the input of a sub-block's norm and h the output of its last linear module, the next norm of the residual stream
must read r + h, bit by bit. A base that does otherwise (norms after a sub-block, sub-blocks side by side, a factor on
h) has no such places, and no adapter that needs them can be served on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from server.model.attention import Attention, AttentionOptions

TRACED_TOKENS = 13  # unlike any usual number of heads
_NORMS_WITHIN = 4  # of a sub-block and the one that follows: norms of queries and keys lie between


@dataclass(frozen=True)
class Block:
    """A sub-block: r goes into `norm`, h comes out of `output`."""

    layer: str  # the layer's module
    is_attention: bool  # else the feed-forward network
    norm: str  # module names
    output: str

    @property
    def site(self) -> str:
        """Its name among the sites."""
        return f"{self.layer}.{'attention' if self.is_attention else 'feed-forward'} block"

    @property
    def result_site(self) -> str:
        """An attention's: the name of the site of what `output` gives, which sees the attention's queries."""
        return f"{self.layer}.attention result"


@dataclass
class Trace:
    """What one forward pass did, in order; values of the attention do not matter, so it gives back the queries."""

    attended: list[int] = field(default_factory=list)  # events before each call of the attention
    events: list[tuple[str, Tensor]] = field(default_factory=list)  # a norm's input, a linear module's output
    norms: set[str] = field(default_factory=set)
    query_widths: dict[int, int] = field(default_factory=dict)  # of each layer, all heads together

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """See `Attention`."""
        self.attended.append(len(self.events))
        self.query_widths[layer] = query.shape[1] * query.shape[2]
        return query

    def usable_norms(self) -> list[str]:
        """Norms that ran once and whose input has the tokens where sites look for them: `[1, tokens, (heads,)
        width]` or `[tokens, width]`."""
        shapes: dict[str, list[torch.Size]] = {}
        for name, values in self.events:
            if name in self.norms:
                shapes.setdefault(name, []).append(values.shape)
        return [
            name
            for name, (first, *others) in shapes.items()
            if not others
            and ((first[:2] == (1, TRACED_TOKENS) and len(first) in (3, 4)) or first[:-1] == (TRACED_TOKENS,))
        ]

    def blocks(self) -> list[Block]:
        """The sub-blocks, in order."""
        stream = [index for index, (name, values) in enumerate(self.events) if name in self.norms and values.dim() < 4]
        found: list[Block] = []
        for place, start in enumerate(stream):
            for stop in stream[place + 1 : place + 1 + _NORMS_WITHIN]:
                if block := self._block(start, stop):
                    found.append(block)
                    break
        return found

    def _block(self, start: int, stop: int) -> Block | None:
        """The sub-block whose norm is event `start`, if the norm that is event `stop` reads what it leaves."""
        norm, residual = self.events[start]
        following = self.events[stop][1]
        outputs = [
            index
            for index in range(start + 1, stop)
            if self.events[index][1].numel() == residual.numel() == following.numel()
            and torch.equal(residual.flatten() + self.events[index][1].flatten(), following.flatten())
        ]
        if len(outputs) != 1:
            return None
        output = self.events[outputs[0]][0]
        pairs = zip(norm.split("."), output.split("."), strict=False)
        layer = ".".join(left for left, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return Block(layer, any(start < at <= outputs[0] for at in self.attended), norm, output)


def trace(model: nn.Module, norms: Iterable[str], linears: Iterable[str], run: Callable[[Attention], Any]) -> Trace:
    """Run the model once and note what its norms read and its linear modules give."""
    traced = Trace(norms=set(norms))

    def on_norm(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        traced.events.append((name, inputs[0].clone()))

    def on_linear(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        traced.events.append((name, output.clone()))

    hooks = [model.get_submodule(name).register_forward_pre_hook(partial(on_norm, name)) for name in traced.norms]
    hooks += [model.get_submodule(name).register_forward_hook(partial(on_linear, name)) for name in linears]
    try:
        run(traced)
    finally:
        for hook in hooks:
            hook.remove()
    return traced
