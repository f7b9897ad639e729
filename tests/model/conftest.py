"""What the models' tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from server.model.programs import Programs
from tests.model.packed import packed


@pytest.fixture(params=[1, 2, 4], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch's number of threads, which compiled kernels take too; whatever it was, it is that again afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def blocked_weights() -> None:
    """oneDNN lays weights out in the blocks that programs read."""
    linear = nn.Linear(64, 64).requires_grad_(False)
    own = packed(linear)
    if Programs().product(linear, own) is own:
        pytest.skip("oneDNN lays weights out otherwise on this processor: its own products run")
