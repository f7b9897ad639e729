"""A base's whole forward pass as one program, for steps whose rows all decode: its layers (`layer_programs`), a last
norm and the output layer.

What a class does around its layers takes longer than the layers themselves where the base is small and the row is one.
The angles of the positions are still the class's own. The pass is tried against the class's forward when the base is
loaded, at positions from the first to the last and with small and large embeddings; where they differ by more than
rounding (the class scales its embeddings, say, or caps its logits) the class's own forward stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from server.model.agreement import MAGNITUDES, agree
from server.model.attention import Attention, AttentionPlan, DecodeGroup
from server.model.decode_kernel import DecodeKernel
from server.model.gathered_attention import PagedAttention
from server.model.kv_cache import KVCache, LayerShape
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
        return self.stack.run_all(plan, hidden, cos, sin, attention)


@torch.inference_mode()
def find_model_program(
    model: nn.Module,
    head: nn.Module | None,
    sites: Sites,
    stack: LayerStack,
    layers: tuple[LayerShape, ...],
    forward: _Forward,
    embed: Callable[[Tensor], Tensor],
    max_model_len: int,
) -> ModelProgram | None:
    """The program that gives what the class's `forward` gives; it takes the place of the stack's own. None where there
    is none."""
    output = multiplication(head) if head is not None and sites.is_packed(head) else None
    if output is None or not stack.is_whole(len(layers)):
        return None
    positions = torch.linspace(0, max_model_len - 1, TRIED_TOKENS).long()
    embeddings = embed(torch.arange(TRIED_TOKENS))
    attention = _each_by_itself(layers)
    with _calls(model) as calls:
        forward(embeddings, positions, attention)
    first, last = (_of(calls, model.get_submodule(name)) for name in (stack.names[0], stack.names[-1]))
    angles = first.named.get("position_embeddings")
    rotary = next((call for call in calls if call.output is angles), None)
    behind = (call for call in calls if call.arguments and call.arguments[0] is last.output)
    norm = next((call for call in behind if _is_norm(call.module)), None)
    if rotary is None or norm is None:
        return None
    weight, epsilon = norm.module.weight, getattr(norm.module, "variance_epsilon", getattr(norm.module, "eps", None))
    assert isinstance(weight, Tensor)
    for offset in (0.0, 1.0):  # what a class adds to a norm's weight
        tail = Tail(weight + offset if offset else weight, float(epsilon), output)  # type: ignore[arg-type]
        candidate = ModelProgram(stack.with_tail(tail), rotary)
        if all(_gives(candidate, embeddings * magnitude, positions, attention, forward) for magnitude in MAGNITUDES):
            return candidate
    return None


def _gives(
    program: ModelProgram, embeddings: Tensor, positions: Tensor, attention: Attention, forward: _Forward
) -> bool:
    expected = forward(embeddings, positions, attention)
    given = program.forward(embeddings, positions, attention, {})
    return given is not None and agree(given, expected)


def _is_norm(module: nn.Module) -> bool:
    """Whether it looks like a root mean square norm that a kernel can compute."""
    weight, epsilon = (
        module._parameters.get("weight"),
        getattr(module, "variance_epsilon", getattr(module, "eps", None)),
    )
    is_vector = weight is not None and weight.dim() == 1 and weight.dtype == torch.float32
    return is_vector and isinstance(epsilon, float) and len(module._parameters) == 1


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


def _each_by_itself(layers: tuple[LayerShape, ...]) -> PagedAttention:
    """Attention of `TRIED_TOKENS` rows that each see their own token alone."""
    rows = TRIED_TOKENS
    cache = KVCache(layers, rows + 1, 1, dtype=torch.float32, device=torch.device("cpu"))
    pages = torch.arange(1, rows + 1)
    group = DecodeGroup(0, rows, pages[:, None], torch.ones(rows, dtype=torch.long))
    plan = AttentionPlan(pages, None, torch.arange(rows), [group], [])
    return PagedAttention(cache, plan, decode_kernel=DecodeKernel())
