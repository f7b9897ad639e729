"""Trainable tokens: some rows of the input embedding, trained.

The rows of new or rare tokens, or of tokens that mark a task; cf. Hewitt, "Initializing New Word Embeddings for
Pretrained Language Models", 2021. Checkpoint (PEFT `TRAINABLE_TOKENS`): `trainable_tokens_delta` `[ids, width]` at the
input embedding, despite its name the rows themselves, in the order of `token_indices`. See `embeddings`.
"""

from __future__ import annotations

from server.adapters.checkpoint import Checkpoint
from server.adapters.method import Adapter, MethodFacts
from server.adapters.methods.embeddings import trained_tokens
from server.adapters.targets import targeted_sites
from server.model import BaseShape, SiteKind

NAME = "trainable_tokens"
PEFT_TYPE = "TRAINABLE_TOKENS"
FACTS = MethodFacts(
    name=NAME,
    mechanism="row delta: rows of the embedding",
    formats=("PEFT TRAINABLE_TOKENS",),
    parameters="width for each token id",
    cost="one thin product for each token; one more at the output layer where that is tied to the embedding",
)


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(
        used=("token_indices", "target_modules"), training_only=("init_weights",), unsupported=("modules_to_save",)
    )
    if checkpoint.config.get("target_modules") is not None:  # else PEFT takes the input embedding
        targeted_sites(checkpoint, base, SiteKind.EMBEDDING)
    deltas = trained_tokens(checkpoint, base, "token_indices", "trainable_tokens_delta")
    checkpoint.close()
    return Adapter(method=NAME, deltas=deltas, parameters=checkpoint.parameters, warnings=tuple(checkpoint.warnings))
