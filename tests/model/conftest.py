"""What the models' tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=[1, 2, 4], ids="{} threads".format)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """torch's number of threads, which compiled kernels take too; whatever it was, it is that again afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
