"""P-tuning: embeddings before the text, trained through a small network.

Liu et al., "GPT Understands, Too", 2021 (arXiv 2103.10385). Checkpoint (PEFT `P_TUNING`): `prompt_embeddings`
`[virtual_tokens, hidden]`, which PEFT has passed through the network when saving, so that serving is prompt
tuning's; the network is not in the file.
"""

from __future__ import annotations

from server.adapters.checkpoint import Checkpoint
from server.adapters.method import Adapter, MethodFacts
from server.adapters.methods.prompt_tuning import FACTS as PROMPT_TUNING
from server.adapters.methods.prompt_tuning import SHAPE_KEYS, read_embeddings
from server.model import BaseShape

NAME = "p_tuning"
PEFT_TYPE = "P_TUNING"
FACTS = MethodFacts(
    name=NAME,
    mechanism=PROMPT_TUNING.mechanism,
    formats=("PEFT P_TUNING",),
    parameters=PROMPT_TUNING.parameters,
    cost=PROMPT_TUNING.cost,
)

_TRAINING_ONLY = (
    "encoder_reparameterization_type",
    "encoder_hidden_size",
    "encoder_num_layers",
    "encoder_dropout",
)


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(used=SHAPE_KEYS, training_only=_TRAINING_ONLY, unsupported=("modules_to_save",))
    return read_embeddings(checkpoint, base, NAME)
