"""What the engine is told, from the settings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters_store import DataFolder
from server.errors import StartupError
from server.settings import Settings
from server.supervisor.configuration import base_id_of, engine_configuration
from server.supervisor.engine_child import SPIN_COUNT, engine_environment


@pytest.fixture
def data(tmp_path: Path) -> Iterator[DataFolder]:
    with DataFolder(tmp_path / "data") as folder:
        yield folder


def settings(**given: object) -> Settings:
    return Settings.model_validate(given)


def test_memory_is_told_in_bytes_and_an_absent_size_is_left_to_the_engine(data: DataFolder) -> None:
    given = engine_configuration(settings(model="some/model", kv_cache_memory=1.5, adapter_memory=0.25), data)
    assert (given.kv_cache_bytes, given.adapter_bytes) == (3 * 2**29, 2**28)
    assert engine_configuration(settings(model="some/model"), data).kv_cache_bytes is None


def test_the_base_is_known_by_its_hub_id_or_its_folder_s_last_name(tmp_path: Path) -> None:
    assert base_id_of("some/model") == "some/model"
    (tmp_path / "my-model").mkdir()
    assert base_id_of(str(tmp_path / "my-model")) == "my-model"
    assert base_id_of(str(tmp_path / "my-model" / "..") + "/my-model/") == "my-model"


def test_files_are_stored_in_the_data_folder_unless_another_folder_is_named(data: DataFolder, tmp_path: Path) -> None:
    assert engine_configuration(settings(model="some/model"), data).blobs == str(data.path / "blobs")
    elsewhere = engine_configuration(settings(model="some/model", store=str(tmp_path / "other")), data)
    assert elsewhere.blobs == str(tmp_path / "other")
    with pytest.raises(StartupError, match="--store"):
        engine_configuration(settings(model="some/model", store="ftp://host"), data)


def test_a_bucket_s_copies_are_kept_in_the_data_folder(data: DataFolder) -> None:
    given = engine_configuration(settings(model="some/model", store="s3://bucket/prefix", store_cache=0.5), data)
    assert (given.blobs, given.blob_cache_bytes) == ("s3://bucket/prefix", 2**29)
    assert given.blob_cache == str(data.blob_cache)
    assert data.blob_cache.parent == data.path


@pytest.mark.parametrize("settled", [{}, {"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "passive"}])
def test_the_engine_s_threads_wait_briefly_unless_it_was_settled_how_they_wait(settled: dict[str, str]) -> None:
    given = {"PATH": "/bin", **settled}
    assert engine_environment(given) == (given if settled else {**given, "GOMP_SPINCOUNT": str(SPIN_COUNT)})
