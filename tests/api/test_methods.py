"""The listing of methods."""

from __future__ import annotations

import httpx

from server.adapters import METHODS


def test_every_method_of_the_table_is_listed_once_with_its_facts(http: httpx.Client) -> None:
    listed = http.get("/v1/methods").json()["data"]
    assert {entry["method"] for entry in listed} == {method.NAME for method in METHODS}
    assert len({entry["method"] for entry in listed}) == len(listed)
    for entry in listed:
        assert all(entry[key] for key in ("mechanism", "formats", "parameters_per_layer", "cost")), entry


def test_an_upload_s_method_is_one_of_the_listed(http: httpx.Client, tasks: dict[str, str]) -> None:
    names = {entry["method"] for entry in http.get("/v1/methods").json()["data"]}
    used = {name for task in tasks.values() for name in http.get(f"/v1/tasks/{task}").json()["methods"]}
    assert used <= names
