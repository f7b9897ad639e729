"""Steps on a CPU in float32 run by compiled kernels: that they are there, and that plans name them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from server.engine.batch import StepBatch
from server.engine.packing import MANY_TOKENS
from server.engine.runner import Runner
from server.engine.scheduler import Schedule
from server.model import FrozenBase, Segment
from server.model.delta_kernels import DeltaKernels
from server.model.kernels import find_kernels
from tests.harness import greedy, make_engine, request, run


def test_a_cpu_has_kernels_for_float32_alone() -> None:
    assert find_kernels(torch.device("cpu"), torch.float32)[0] is not None
    assert find_kernels(torch.device("cpu"), torch.bfloat16)[0] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what a machine without CUDA does not have")
def test_a_device_that_is_not_there_has_none() -> None:
    found, why = find_kernels(torch.device("cuda"), torch.float32)
    assert found is None
    assert why.startswith("Triton")


@pytest.mark.parametrize("run_work", [0, DeltaKernels.run_work])
def test_scales_and_low_rank_updates_of_few_tokens_are_left_to_kernels(
    base: FrozenBase, tasks: dict[str, Path], run_work: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    segments: list[Segment] = []
    own = Runner.run

    def noting(self: Runner, schedule: Schedule, batch: StepBatch) -> Tensor:
        segments.extend(each for levels in batch.deltas.values() for level in levels for each in level)
        return own(self, schedule, batch)

    monkeypatch.setattr(Runner, "run", noting)
    monkeypatch.setattr(DeltaKernels, "run_work", run_work)
    engine = make_engine(base)
    names = ["ia3", "lora", "lora", "ia3"]
    run(engine, [request(str(at), list(range(3, 15)), greedy(4), tasks[name]) for at, name in enumerate(names)])
    engine.close()
    seen = set()
    for segment in segments:
        count = segment.tokens.stop - segment.tokens.start if isinstance(segment.tokens, slice) else len(segment.tokens)
        few = max(MANY_TOKENS, run_work // 8)  # prompts of 12 tokens are few where there is work for them
        is_fit = segment.is_each or segment.kind.is_elementwise or count < few
        assert (segment.kernel is not None) == (segment.kind.compiled is not None and is_fit)
        seen.add((segment.kind.compiled, is_fit))
    assert seen >= {("scale", True), ("low_rank", True)}
    assert (("low_rank", False) in seen) == (run_work == 0)
