"""What numba keeps of compiled kernels."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from numba import types
from numba.core.caching import CacheImpl

from server.model import compiled

# A kernel, and a function that it calls.
MODULE = """
from numba import carray, types
from server.model.compiled import inlined, kernel

@inlined
def plus_one(number):
    return number + 1

@kernel(types.CPointer(types.int64))
def change(pointer):
    numbers = carray(pointer, 1)
    numbers[0] = plus_one(numbers[0])
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where numba keeps what it compiles."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path / "kept"))
    (tmp_path / "module.py").write_text(MODULE)
    return tmp_path / "kept"


def _start(tmp_path: Path) -> Any:
    """The kernel, imported as at the start of a server; it works."""
    spec = spec_from_file_location("module", tmp_path / "module.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    numbers = np.ones(1, np.int64)
    module.change.ctypes(numbers.ctypes.data_as(module.change.ctypes.argtypes[0]))
    assert numbers[0] == 2
    return module.change


def _emptied(path: Path) -> None:
    path.write_bytes(b"")


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize("damage", [_emptied, _cut])
@pytest.mark.parametrize("files", ["*change*.nbi", "*change*.nbc", "*plus_one*.nb?", "*.nb?"])
def test_damaged_files_are_compiled_anew(
    tmp_path: Path, folder: Path, files: str, damage: Callable[[Path], None]
) -> None:
    assert not _start(tmp_path).cache_hits
    assert _start(tmp_path).cache_hits
    damaged = list(folder.glob(f"*/{files}"))
    assert damaged
    for path in damaged:
        damage(path)
    _start(tmp_path)  # from what is sound, or anew
    assert _start(tmp_path).cache_hits


def test_without_a_folder_kernels_are_compiled_at_every_start_and_a_warning_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    monkeypatch.setitem(compiled.COMPILED, "cache", compiled.can_keep())
    assert "NUMBA_CACHE_DIR" in caplog.text
    assert not _start(tmp_path).cache_hits
    assert not _start(tmp_path).cache_hits


@pytest.mark.parametrize("decorate", [compiled.inlined, compiled.kernel(types.CPointer(types.int64))])
def test_closures_are_refused_for_numba_would_keep_another_result_at_each_start(
    decorate: Callable[[Any], Any],
) -> None:
    step = 1

    def change(pointer: Any) -> None:
        pointer[0] += step

    with pytest.raises(AssertionError, match="change refers to a variable"):
        decorate(change)
