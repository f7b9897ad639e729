"""A base's whole forward pass as one program, for steps whose rows all decode: its layers (`layer_programs`), a last
norm and the output layer.

What a class does around its layers takes longer than the layers themselves where the base is small and the row is one.
The angles of the positions are still the class's own. The pass is tried against the class's forward when the base is
loaded, at positions from the first to the last and with a last norm that gives less and more; where they differ by more
than rounding (the class scales its embeddings, say, or caps its logits) the class's own forward stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from server.model.agreement import agree
from server.model.attention import Attention
from server.model.gathered_attention import PagedAttention
from server.model.kv_cache import LayerShape
from server.model.layer_forms import TRIALS, each_by_itself, norm_weight, scaled
from server.model.layer_programs import LayerStack, Tail
from server.model.program_kernels import MOST_TOKENS
from server.model.programs import TRIED_TOKENS, multiplication
from server.model.row_deltas import SitePlan
from server.model.sites import Sites

_Forward = Callable[[Tensor, Tensor, Attention], Tensor]  # embeddings, positions → logits, by the class


@dataclass(frozen=True)
class _Call:
    """A module's call in a forward pass."""

    module: nn.Module
    arguments: tuple[Any, ...]
    named: Mapping[str, Any]
    output: Any


@dataclass(frozen=True)
class ModelProgram:
    """See the module."""

    stack: LayerStack
    angles: _Call  # of a pass's positions

    def forward(self, embeddings: Tensor, positions: Tensor, attention: Attention, plan: SitePlan) -> Tensor | None:
        """Logits `[num_tokens, vocabulary]` of all tokens; None for steps that are none of its own. `embeddings` is
        `[num_tokens, hidden]`."""
        tokens = len(positions)
        if not (0 < tokens <= MOST_TOKENS and isinstance(attention, PagedAttention) and attention.only_decodes):
            return None
        if not self.stack.step(plan).is_closed:
            return None
        hidden = embeddings[None]

        def now(given: Any) -> Any:
            """What took the place of an argument in this pass."""
            if not isinstance(given, Tensor):
                return given
            return hidden if given.is_floating_point() else positions[None]

        call = self.angles
        named = {name: now(given) for name, given in call.named.items()}
        cos, sin = call.module(*map(now, call.arguments), **named)
        return self.stack.logits(plan, hidden, cos, sin, attention)


@torch.inference_mode()
def find_model_program(
    model: nn.Module,
    head: nn.Module | None,
    sites: Sites,
    stack: LayerStack,
    layers: Sequence[LayerShape],
    embeddings: Tensor,
    forward: _Forward,
    max_model_len: int,
) -> ModelProgram | None:
    """The program that gives what the class's `forward` gives, tried on `embeddings` `[TRIED_TOKENS, hidden]`.

    None where there is none. `stack` has been found to give what the class's own layers do.
    """
    output = multiplication(head) if head is not None and sites.is_packed(head) else None
    if output is None or not stack.is_whole(len(layers)):
        return None
    positions, attention = torch.linspace(0, max_model_len - 1, TRIED_TOKENS).long(), each_by_itself(layers)
    with _calls(model) as calls:
        forward(embeddings, positions, attention)
    first, last = (_of(calls, model.get_submodule(name)) for name in (stack.names[0], stack.names[-1]))
    angles = first.named.get("position_embeddings")
    rotary = next((call for call in calls if call.output is angles), None)
    behind = (call.module for call in calls if call.arguments and call.arguments[0] is last.output)
    norm, weighted = next(((module, found) for module in behind if (found := norm_weight(module))), (None, None))
    if rotary is None or norm is None or weighted is None:
        return None
    expected = []
    for magnitude, factor in TRIALS:
        with scaled([norm], factor):
            expected.append(forward(embeddings * magnitude, positions, attention))
    program = ModelProgram(stack, rotary)
    weight, epsilon = weighted
    for offset in (0.0, 1.0):  # what a class adds to a norm's weight
        scale = weight + offset if offset else weight
        given = []
        for magnitude, factor in TRIALS:
            stack.set_tail(Tail(scale * factor, epsilon, output))
            given.append(program.forward(embeddings * magnitude, positions, attention, {}))
        if all(logits is not None and agree(logits, own) for logits, own in zip(given, expected, strict=True)):
            stack.set_tail(Tail(scale, epsilon, output))
            return program
    stack.set_tail(None)
    return None


def _of(calls: list[_Call], module: nn.Module) -> _Call:
    return next(call for call in calls if call.module is module)


@contextmanager
def _calls(model: nn.Module) -> Iterator[list[_Call]]:
    """Every call of a module inside the block, in the order in which they end."""
    calls: list[_Call] = []

    def keep(module: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        calls.append(_Call(module, arguments, named, output))

    hooks = [module.register_forward_hook(keep, with_kwargs=True) for module in model.modules()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
