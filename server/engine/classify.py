"""Classification of a prompt by the head of its stack, of which there is one at most.

A stack with a head classifies and does nothing else: its adapters were trained for the head, and their text would be
noise.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from server.adapters.stacks import why_no_stack
from server.engine.protocol import Classification
from server.engine.sequence import Sequence
from server.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from server.adapters import Resident, RowPool


def refusal(sequence: Sequence) -> RequestError | None:
    """Why a sequence asks for what its stack does not do, if it does."""
    if (reason := why_no_stack(sequence.stack)) is not None:
        return RequestError("cannot_compose", reason, "user")
    has_head = any(resident.head is not None for resident in sequence.stack)
    if sequence.request.classify == has_head:
        return None
    if has_head:
        message = "this task classifies and generates no text; use POST /v1/tasks/{task}/classify"
    else:
        message = "this task has no classification head; upload an adapter with one, or use /generate or /score"
    return RequestError("invalid_request", message, "task")


def classify(sequence: Sequence, state: Tensor, pool: RowPool) -> Classification | None:
    """The head's answer to the last token's `state` `[hidden]`; None where it is not finite."""
    resident = _with_head(sequence)
    head = resident.head
    assert head is not None, "who has no head was refused"
    logits = head.shape.logits(state, *(resident.block(pool, block) for block in head.blocks)).tolist()
    if not all(map(math.isfinite, logits)):
        return None
    return Classification(head.shape.kind, list(head.shape.labels), logits)


def _with_head(sequence: Sequence) -> Resident:
    return next(resident for resident in sequence.stack if resident.head is not None)
