"""Multitask prompt tuning: one prompt for many tasks, and for each a low-rank factor of it.

Wang et al., "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning", ICLR 2023. Checkpoint (PEFT
`MULTITASK_PROMPT_TUNING`): `prompt_embeddings` P `[virtual_tokens, hidden]`, `prefix_task_cols` U `[tasks,
virtual_tokens, ranks]`, `prefix_task_rows` V `[tasks, ranks, hidden]`; task k's prompt is P ⊙ (Uₖ Vₖ).

One upload gives all its tasks: a version of each, with the same files and the task's number in `medley.json`. Without
that number it is read as its first task.
"""

from __future__ import annotations

from server.adapters.checkpoint import Checkpoint
from server.adapters.method import Adapter, EmbeddingPrefix, MethodFacts
from server.adapters.methods.prompt_tuning import FACTS as PROMPT_TUNING
from server.adapters.methods.prompt_tuning import SHAPE_KEYS, virtual_tokens
from server.errors import AdapterError
from server.model import BaseShape

NAME = "multitask_prompt_tuning"
PEFT_TYPE = "MULTITASK_PROMPT_TUNING"
FACTS = MethodFacts(
    name=NAME,
    mechanism=PROMPT_TUNING.mechanism,
    formats=("PEFT MULTITASK_PROMPT_TUNING",),
    parameters="0; T·h before the first layer, for all tasks, and r·(T + h) for each",
    cost=PROMPT_TUNING.cost,
)
MOST_TASKS = 1024  # of one checkpoint: each is a version, published while the uploader waits

_TRAINING_ONLY = (
    "prompt_tuning_init",
    "prompt_tuning_init_text",
    "prompt_tuning_init_state_dict_path",
    "prompt_tuning_init_task",
    "tokenizer_name_or_path",
    "tokenizer_kwargs",
)


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    used = (*SHAPE_KEYS, "num_tasks", "num_ranks")
    checkpoint.check_keys(used=used, training_only=_TRAINING_ONLY, unsupported=("modules_to_save",))
    length, width = virtual_tokens(checkpoint), base.embedding_width
    tasks, ranks = checkpoint.integer("num_tasks"), checkpoint.integer("num_ranks")
    if tasks > MOST_TASKS:
        raise AdapterError("too_large", f"num_tasks is {tasks}; at most {MOST_TASKS} are possible", "num_tasks")
    index = checkpoint.derived.get("task_index", 0)
    if type(index) is not int or not 0 <= index < tasks:
        raise AdapterError("bad_config", f"task_index is {index!r}; the checkpoint has {tasks} tasks", "task_index")
    shared = checkpoint.take("prompt_embeddings", (length, width)).float()
    columns = checkpoint.take("prefix_task_cols", (tasks, length, ranks))[index].float()
    rows = checkpoint.take("prefix_task_rows", (tasks, ranks, width))[index].float()
    checkpoint.close()
    embeddings = checkpoint.finite("prompt_embeddings", (shared * (columns @ rows)).to(base.dtype))
    return Adapter(
        method=NAME,
        prefix=EmbeddingPrefix(embeddings),
        parameters=shared.numel() + columns.numel() + rows.numel(),
        tasks=tasks,
        warnings=tuple(checkpoint.warnings),
    )
