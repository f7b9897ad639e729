"""The GPU benchmark: that it runs, here on a CPU, and what its limits count."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import gpu
from benchmarks.gpu_base import SHAPES, decode_bytes, prefill_operations, random_llama
from server.model import FrozenBase


def test_the_quick_run_ends_with_a_verdict_for_each_target() -> None:
    outcome = CliRunner().invoke(gpu.app, ["--quick", "--device", "cpu"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    for name in ("bandwidth limit", "matrix-product limit", *gpu.KINDS, "all four"):
        assert name in outcome.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what it does without CUDA")
def test_without_cuda_it_says_so_and_fails() -> None:
    outcome = CliRunner().invoke(gpu.app, ["--save"])
    assert outcome.exit_code == 1
    assert outcome.output.strip() == "no figures: torch finds no CUDA device"


def test_a_cpu_is_no_gpu() -> None:
    assert CliRunner().invoke(gpu.app, ["--device", "cpu"]).exit_code == 2


def test_a_step_reads_every_weight_once_and_the_keys_and_values_of_its_context() -> None:
    base = FrozenBase(random_llama(SHAPES["tiny"], torch.device("cpu"), torch.float32))
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128) + 5 * 64 + 512 * 64  # layers, norms, head
    assert decode_bytes(base, 10) == 4 * (weights + 10 * 2 * 2 * 2 * 16)
    assert prefill_operations(SHAPES["tiny"], base) == 2 * (weights - 5 * 64 - 512 * 64) + 2 * 32 * 64 * 2
