"""Text prompts: a fixed text before every request's own, as a task without tensors.

In-context learning: Brown et al., "Language Models are Few-Shot Learners", NeurIPS 2020; tokens found by search: Shin
et al., "AutoPrompt: Eliciting Knowledge from Language Models with Automatically Generated Prompts", EMNLP 2020.

Checkpoint (Medley's own): a config `{"medley_method": "text_prompt", …}` and no weights, with one of

    "token_ids": [5, 17, …]                      taken as they are
    "text": "Translate to French:\\n"             by the base's tokenizer, once, when it is uploaded
    "examples": [{"input": …, "output": …}, …]   one after the other through "template", Jinja over `input` and `output`

Text is encoded as it stands: no special tokens are put around it (write them into the text if they are wanted), and it
is encoded apart from the request's, which comes after it with whatever special tokens the tokenizer gives a prompt. The
tokens are run once, as any virtual tokens: the answer is the base's with these ids before the request's.
"""

from __future__ import annotations

from server.adapters.checkpoint import Checkpoint
from server.adapters.method import Adapter, MethodFacts, TokenPrefix
from server.adapters.methods.prompt_tuning import PROMPT_COST
from server.errors import AdapterError
from server.model import BaseShape

NAME = "text_prompt"
MEDLEY_METHOD = "text_prompt"
FACTS = MethodFacts(
    name=NAME,
    mechanism="prefix pages",
    formats=("Medley text_prompt",),
    parameters="0",
    cost=PROMPT_COST,
)
_SOURCES = ("token_ids", "text", "examples")


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(used=(*_SOURCES, "template"), training_only=(), unsupported=())
    given = [key for key in _SOURCES if key in checkpoint.config]
    if len(given) != 1:
        said = " and ".join(given) or "nothing"
        raise AdapterError("bad_config", f"a text prompt has one of {', '.join(_SOURCES)}; this one has {said}", "text")
    source = checkpoint.config if given == ["token_ids"] else checkpoint.derived
    token_ids = source.get("token_ids")
    if not isinstance(token_ids, list) or not token_ids or not all(type(token) is int for token in token_ids):
        message = f"{given[0]} must give at least one token; a list of token ids must hold whole numbers"
        raise AdapterError("bad_config", message, given[0])
    foreign = next((token for token in token_ids if not 0 <= token < base.vocab_size), None)
    if foreign is not None:
        message = f"token {foreign} is not in this base's vocabulary of {base.vocab_size}"
        raise AdapterError("base_mismatch", message, given[0])
    checkpoint.close()
    return Adapter(method=NAME, prefix=TokenPrefix(tuple(token_ids)), warnings=tuple(checkpoint.warnings))
