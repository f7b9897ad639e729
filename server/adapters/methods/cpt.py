"""CPT: the embeddings of a context's tokens, trained, before the text.

Blau et al., "Context-aware Prompt Tuning: Advancing In-Context Learning with Adversarial Methods", 2024 (arXiv
2410.17222). Checkpoint (PEFT `CPT`): `prompt_embeddings` `[virtual_tokens, hidden]`: the context's own embeddings and
what was trained on top of them, already added. Which tokens they came from and which of them were trained concerns
training only.
"""

from __future__ import annotations

from server.adapters.checkpoint import Checkpoint
from server.adapters.method import Adapter, MethodFacts
from server.adapters.methods.prompt_tuning import FACTS as PROMPT_TUNING
from server.adapters.methods.prompt_tuning import SHAPE_KEYS, read_embeddings
from server.model import BaseShape

NAME = "cpt"
PEFT_TYPE = "CPT"
FACTS = MethodFacts(
    name=NAME,
    mechanism=PROMPT_TUNING.mechanism,
    formats=("PEFT CPT",),
    parameters=PROMPT_TUNING.parameters,
    cost=PROMPT_TUNING.cost,
)

_TRAINING_ONLY = (
    "cpt_token_ids",
    "cpt_mask",
    "cpt_tokens_type_mask",
    "opt_weighted_loss_type",
    "opt_loss_decay_factor",
    "opt_projection_epsilon",
    "opt_projection_format_epsilon",
    "tokenizer_name_or_path",
    "is_prompt_learning",
)


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(used=SHAPE_KEYS, training_only=_TRAINING_ONLY, unsupported=("modules_to_save",))
    return read_embeddings(checkpoint, base, NAME)
