"""Prompt tuning: trained embeddings before the text.

Lester, Al-Rfou, Constant, "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021.
Checkpoint (PEFT `PROMPT_TUNING`): `prompt_embeddings` `[virtual_tokens, hidden]`. Virtual tokens take positions
0 … T-1, the text starts at T. How they were initialised concerns training only: the tokenizer that the config
may name is never loaded.
"""

from __future__ import annotations

from server.adapters.checkpoint import Checkpoint
from server.adapters.method import Adapter, EmbeddingPrefix, MethodFacts
from server.errors import AdapterError
from server.model import BaseShape

NAME = "prompt_tuning"
PEFT_TYPE = "PROMPT_TUNING"
PROMPT_COST = "KV pages of T tokens, shared by all requests of the task; each attends to T more positions"
FACTS = MethodFacts(
    name=NAME,
    mechanism="prefix pages",
    formats=("PEFT PROMPT_TUNING",),
    parameters="0; T·h before the first layer",
    cost=PROMPT_COST,
)

_TRAINING_ONLY = ("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs")
SHAPE_KEYS = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(used=SHAPE_KEYS, training_only=_TRAINING_ONLY, unsupported=("modules_to_save",))
    return read_embeddings(checkpoint, base, NAME)


def read_embeddings(checkpoint: Checkpoint, base: BaseShape, method: str) -> Adapter:
    """The adapter of any method whose checkpoint is `prompt_embeddings` of the embeddings' width."""
    length = virtual_tokens(checkpoint)
    embeddings = checkpoint.take("prompt_embeddings", (length, base.embedding_width))
    checkpoint.close()
    return Adapter(
        method=method,
        prefix=EmbeddingPrefix(embeddings),
        parameters=checkpoint.parameters,
        warnings=tuple(checkpoint.warnings),
    )


def virtual_tokens(checkpoint: Checkpoint) -> int:
    """The config's number of virtual tokens, for a decoder-only base."""
    submodules = checkpoint.config.get("num_transformer_submodules")
    if submodules not in (None, 1):
        raise AdapterError(
            "base_mismatch",
            f"num_transformer_submodules is {submodules!r}: made for an encoder-decoder, this base is a decoder",
            "num_transformer_submodules",
        )
    return checkpoint.integer("num_virtual_tokens")
