"""Prefix tuning: trained keys and values before the text, in every layer.

Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", ACL 2021.
Checkpoint (PEFT `PREFIX_TUNING`): `prompt_embeddings` `[virtual_tokens, layers · 2 · kv_heads · head_dim]`; a layer's
keys stand before its values. They are cache entries as they are: keys are not rotated, and PEFT has applied the
training-time projection when saving. The text starts at position T. Files of grouped-query models from before
PEFT corrected its config are too wide; the width is checked against the base, never taken from the config.
"""

from __future__ import annotations

from server.adapters.checkpoint import Checkpoint
from server.adapters.method import Adapter, KeyValuePrefix
from server.adapters.prompt_tuning import SHAPE_KEYS, virtual_tokens
from server.errors import AdapterError
from server.model import BaseShape

NAME = "prefix_tuning"
PEFT_TYPE = "PREFIX_TUNING"

_TRAINING_ONLY = ("encoder_hidden_size", "prefix_projection", "init_weights")


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(used=SHAPE_KEYS, training_only=_TRAINING_ONLY, unsupported=("modules_to_save",))
    length = virtual_tokens(checkpoint)
    shape = base.layers[0]
    if any(layer != shape for layer in base.layers):
        raise AdapterError("base_mismatch", "the layers of this base differ in KV heads; a prefix cannot fit them all")
    flat = checkpoint.take("prompt_embeddings", (length, len(base.layers) * 2 * shape.kv_heads * shape.head_dim))
    checkpoint.close()
    layers = flat.view(length, len(base.layers), 2, shape.kv_heads * shape.head_dim)
    entries = tuple(layers[:, index].transpose(0, 1).flatten(0, 1) for index in range(len(base.layers)))
    return Adapter(
        method=NAME,
        prefix=KeyValuePrefix(length, entries),
        parameters=checkpoint.parameters,
        warnings=tuple(checkpoint.warnings),
    )
