"""What the tests of layers attend with: each token by itself."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from server.model.attention import IMPLEMENTATION, AttentionOptions


class Mixing:
    """An attention of each token by itself, which shows its queries, keys and values; and what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, AttentionOptions]] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        self.asked.append((layer, options))
        heads = query.shape[1] // key.shape[1]
        return query * key.sum(-1, keepdim=True).repeat_interleave(heads, 1).tanh() - value.repeat_interleave(heads, 1)


def own_logits(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> tuple[Tensor, Mixing]:
    """Logits of the class itself, nothing of it changed."""
    model.set_attn_implementation(IMPLEMENTATION)
    mixing = Mixing()
    inputs = model.get_input_embeddings()(ids[None])
    output = model(inputs_embeds=inputs, position_ids=positions[None], use_cache=False, medley_attention=mixing)
    return output.logits[0], mixing
