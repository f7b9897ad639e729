"""Cartridge: a trained KV cache of a corpus, before the text.

Eyuboglu et al., "Cartridges: Lightweight and general-purpose long context representations via self-study", 2025 (arXiv
2506.06266). Checkpoint (PEFT `CARTRIDGE`): `prompt_embeddings` as prefix tuning's. Its first `num_frozen_tokens` were
not trained; served, all are alike.
"""

from __future__ import annotations

from server.adapters.checkpoint import Checkpoint
from server.adapters.method import Adapter, MethodFacts
from server.adapters.methods.prefix_tuning import FACTS as PREFIX_TUNING
from server.adapters.methods.prefix_tuning import read_key_values
from server.adapters.methods.prompt_tuning import SHAPE_KEYS
from server.model import BaseShape

NAME = "cartridge"
PEFT_TYPE = "CARTRIDGE"
FACTS = MethodFacts(
    name=NAME,
    mechanism=PREFIX_TUNING.mechanism,
    formats=("PEFT CARTRIDGE",),
    parameters=PREFIX_TUNING.parameters,
    cost=PREFIX_TUNING.cost,
)


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(used=SHAPE_KEYS, training_only=("num_frozen_tokens",), unsupported=("modules_to_save",))
    return read_key_values(checkpoint, base, NAME)
