"""Which adapters can be laid over one another.

Any method over any other: prefixes and virtual tokens follow one another, row deltas apply in order, and what replaces
a part of the base (a norm's weight, rows of the embedding, whole weights) contributes its difference from the base, as
task vectors do (Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023). The exception: of two classification
heads only one can answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from server.adapters.method import Adapter
from server.adapters.resident import Resident


def why_no_stack(stack: Sequence[Adapter] | Sequence[Resident]) -> str | None:
    """Why these, the task's first, cannot serve one request together, in a sentence; None where they can."""
    if sum(1 for adapter in stack if adapter.head is not None) > 1:
        return (
            "both adapters have a classification head, and one request has one answer: upload the user's without a "
            "head, or in place of the task's (mode=replace)"
        )
    return None
