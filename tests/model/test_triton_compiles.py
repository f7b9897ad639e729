"""Triton's attention compiles for devices that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
ROOT = Path(__file__).parents[2]
_LEAST_SHARED_MEMORY = 99 * 1024  # bytes that a block may have: compute capability 8.6 and 8.9; the others have more


def test_attention_compiles_for_sm_80_and_sm_90_within_any_devices_shared_memory(tmp_path: Path) -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "tests.model.compile_triton"],
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr
    variants = [json.loads(line) for line in outcome.stdout.splitlines()]
    assert {each["variant"].split(",")[0] for each in variants} == {"sm_80", "sm_90"}
    for each in variants:
        assert each["shared"] <= _LEAST_SHARED_MEMORY, each
        assert each["asynchronous"] > 0, f"no tile is asked for ahead: {each}"
        assert each["spilled"] == 0, each
