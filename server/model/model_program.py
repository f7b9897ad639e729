"""A base's whole forward pass as one program, for steps whose rows all decode: its layers (`layer_programs`), a last
norm and the output layer.

What a class does around its layers takes longer than the layers themselves where the base is small and the row is one.
The angles of the positions are the class's own (`angles`). The pass is tried against the class's forward when the base
is loaded, at positions from the first to the last and with a last norm that gives less and more; where they differ by
more than rounding (the class scales its embeddings, say, or caps its logits) the class's own forward stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from server.model.agreement import agree
from server.model.angles import AngleTable
from server.model.attention import Attention
from server.model.kv_cache import LayerShape
from server.model.layer_forms import TRIALS, norm_weight, own_token_attention, scaled
from server.model.layer_operations import Tail
from server.model.layer_programs import LayerStack
from server.model.module_calls import recorded_calls
from server.model.norms import OFFSETS
from server.model.paged_attention import only_decodes
from server.model.program_kernels import MOST_TOKENS
from server.model.programs import TRIED_TOKENS, multiplication
from server.model.row_deltas import SitePlan
from server.model.sites import Sites

_Forward = Callable[[Tensor, Tensor, Attention], Tensor]  # embeddings, positions → logits, by the class


@dataclass(frozen=True)
class ModelProgram:
    """See the module."""

    stack: LayerStack
    angles: AngleTable

    def forward(self, embeddings: Tensor, positions: Tensor, attention: Attention, plan: SitePlan) -> Tensor | None:
        """Logits `[num_tokens, vocabulary]` of all tokens; None for steps that are none of its own. `embeddings` is
        `[num_tokens, hidden]`."""
        tokens = len(positions)
        if not 0 < tokens <= MOST_TOKENS or not only_decodes(attention) or not self.stack.program(plan).is_closed:
            return None
        cos, sin = self.angles.at(positions)
        return self.stack.logits(plan, embeddings[None], cos, sin, attention)


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
    positions, attention = torch.linspace(0, max_model_len - 1, TRIED_TOKENS).long(), own_token_attention(layers)
    with recorded_calls(model.modules()) as calls:
        forward(embeddings, positions, attention)
    by_module = {call.module: call for call in calls}
    first, last = (by_module[model.get_submodule(name)] for name in (stack.names[0], stack.names[-1]))
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
    program = ModelProgram(stack, AngleTable(rotary, max_model_len))
    weight, epsilon = weighted
    for offset in OFFSETS:
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
