"""The GPU benchmark: that it runs, here on a CPU, and what its limits count."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import frame, gpu
from benchmarks.frame import Report
from benchmarks.gpu_base import SHAPES, decode_bytes, prefill_operations, random_llama
from benchmarks.gpu_engine import Bench
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


@pytest.mark.parametrize("name", ["banana", "meta", "cuda:x"])
def test_what_is_neither_cuda_nor_a_cpu_is_refused_by_name(name: str) -> None:
    outcome = CliRunner().invoke(gpu.app, ["--quick", "--device", name])
    assert outcome.exit_code == 2
    assert f"not {name}" in outcome.output


def test_a_device_without_room_for_anything_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "fits", lambda *given: False)
    outcome = CliRunner().invoke(gpu.app, ["--quick", "--device", "cpu"])
    assert outcome.exit_code == 1
    assert outcome.output.strip() == "no figures: the device has no room for 1 × 16 (rows × context) beside the base"


def test_each_size_has_a_report_of_its_own_and_the_peers_come_last(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def own_rate(*given: object) -> float:
        order.append("own")
        return 1.0

    def peers(*given: object) -> Iterator[tuple[str, float]]:
        order.append("peers")
        yield "peer", 1.0

    monkeypatch.setattr(gpu, "own_rate", own_rate)
    monkeypatch.setattr(gpu, "peers", peers)
    monkeypatch.setitem(SHAPES, "other", SHAPES["tiny"])
    report = gpu.compare("other", torch.device("cpu"), 1)
    assert report.name == "gpu_other"
    assert report.rounds == 1, "of which it warns"
    assert order == ["own", "peers"]
    assert any("pages of 16 tokens" in note for note in report.notes), "as the server has them"


def test_what_is_saved_waits_for_an_idle_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    waits: list[bool] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(frame, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu, "prepare", lambda threads, *, is_saved: waits.append(is_saved))
    monkeypatch.setattr(gpu, "compare", lambda size, *given: Report(f"gpu_{size}", size, [], {"busy": 0.0}))
    for options in ([], ["--save"]):
        assert CliRunner().invoke(gpu.app, options, catch_exceptions=False).exit_code == 0
    assert waits == [False, True]
    assert [path.name for path in tmp_path.iterdir()] == ["gpu_8b.json"]


def test_a_step_reads_every_weight_once_and_the_keys_and_values_of_its_context() -> None:
    base = FrozenBase(random_llama(SHAPES["tiny"], torch.device("cpu"), torch.float32))
    weights = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128) + 5 * 64 + 512 * 64  # layers, norms, head
    assert decode_bytes(base, 10) == 4 * (weights + 10 * 2 * 2 * 2 * 16)
    assert prefill_operations(SHAPES["tiny"], base) == 2 * (weights - 5 * 64 - 512 * 64) + 2 * 32 * 64 * 2
