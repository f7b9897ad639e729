"""Which adapters cannot be laid over one another: asked of adapters as they are read, and of resident ones."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from server.adapters import Adapter, Resident, why_no_stack
from server.adapters.deltas import output_scale
from server.adapters.heads import ClassificationHead, HeadShape
from server.adapters.resident import Loaded

_HEAD = ClassificationHead(HeadShape("single", ("no", "yes"), None), (torch.ones(2, 8), torch.ones(2, 1)))
_ADAPTERS = [
    Adapter("ia3", deltas={"m": output_scale(torch.ones(8))}, head=head) for head in (None, None, _HEAD, _HEAD)
]


def _resident(adapter: Adapter) -> Resident:
    loaded = Loaded.of(adapter, torch.device("cpu"))
    first = dict.fromkeys(loaded.counts, 0)
    return Resident("digest", loaded.layout, loaded.counts, first, loaded.bytes, head=loaded.head)


@pytest.mark.parametrize(("task", "user"), [*permutations(range(4), 2)])
def test_only_two_heads_do_not_go_together(task: int, user: int) -> None:
    stack = [_ADAPTERS[task], _ADAPTERS[user]]
    reason = why_no_stack(stack)
    assert (reason is not None) == all(adapter.head for adapter in stack)
    assert reason is None or "mode=replace" in reason
    assert why_no_stack([_resident(adapter) for adapter in stack]) == reason
