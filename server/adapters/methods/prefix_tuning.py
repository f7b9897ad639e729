"""Prefix tuning: trained keys and values before the text, in every layer.

Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", ACL 2021.
Checkpoint (PEFT `PREFIX_TUNING`): `prompt_embeddings` `[virtual_tokens, layers · 2 · kv_heads · head_dim]`; a layer's
keys stand before its values. They are cache entries as they are: keys are not rotated, and PEFT has applied the
training-time projection when saving. The text starts at position T. Files of grouped-query models from before
PEFT corrected its config are too wide; the width is checked against the base, never taken from the config.
"""

from __future__ import annotations

from torch import Tensor

from server.adapters.checkpoint import Checkpoint
from server.adapters.method import Adapter, KeyValuePrefix, MethodFacts
from server.adapters.methods.prompt_tuning import PROMPT_COST, SHAPE_KEYS, virtual_tokens
from server.errors import AdapterError
from server.model import BaseShape

NAME = "prefix_tuning"
PEFT_TYPE = "PREFIX_TUNING"
FACTS = MethodFacts(
    name=NAME,
    mechanism="prefix pages",
    formats=("PEFT PREFIX_TUNING", "AdapterHub prefix_tuning"),
    parameters="2·T·kv_heads·head_dim",
    cost=PROMPT_COST,
)

_TRAINING_ONLY = ("encoder_hidden_size", "prefix_projection", "init_weights")


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(used=SHAPE_KEYS, training_only=_TRAINING_ONLY, unsupported=("modules_to_save",))
    return read_key_values(checkpoint, base, NAME)


def read_key_values(checkpoint: Checkpoint, base: BaseShape, method: str) -> Adapter:
    """The adapter of any method whose checkpoint is `prompt_embeddings` of keys and values, as above."""
    length = virtual_tokens(checkpoint)
    width = key_value_width(base)
    flat = checkpoint.take("prompt_embeddings", (length, len(base.layers) * 2 * width))
    checkpoint.close()
    return Adapter(
        method=method,
        prefix=KeyValuePrefix(length, layer_entries(flat, length, width)),
        parameters=checkpoint.parameters,
        warnings=tuple(checkpoint.warnings),
    )


def key_value_width(base: BaseShape) -> int:
    """Elements of one token's keys (and of its values), the same in all layers of the base."""
    shape = base.layers[0]
    if any(layer != shape for layer in base.layers):
        raise AdapterError("base_mismatch", "the layers of this base differ in KV heads; a prefix cannot fit them all")
    return shape.kv_heads * shape.head_dim


def layer_entries(flat: Tensor, length: int, width: int) -> tuple[Tensor, ...]:
    """Per layer `[2 · length, width]`: keys, then values. `flat` holds per token each layer's keys and values."""
    layers = flat.view(length, -1, 2, width)
    return tuple(layers[:, index].transpose(0, 1).flatten(0, 1) for index in range(layers.shape[1]))
