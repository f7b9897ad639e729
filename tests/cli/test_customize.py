"""`medley customize`, `--user`, and the commands that say which version answers, against a real server."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import httpx

from tests.cli.conftest import Medley
from tests.server_process import ServerProcess, generate, one_line

GREEDY = ("--max-tokens", "20", "--temperature", "0")


def test_a_user_s_own_adapter_is_laid_over_a_task_and_used_with_user(
    medley: Medley, server: ServerProcess, adapters: dict[str, Path]
) -> None:
    assert medley("push", "shared", str(adapters["lora"])).returncode == 0
    made = medley("customize", "ann", "shared", str(adapters["prompt"]))
    assert made.returncode == 0, made.stderr
    assert one_line(made.stdout).startswith("ann on shared, compose: prompt_tuning, ")
    hers = generate(server.url, "shared", input="a river", max_tokens=20, user="ann").json()
    assert hers["medley"]["methods"] == ["lora", "prompt_tuning"]
    assert medley("generate", "shared", "a river", "--user", "ann", *GREEDY).stdout == hers["output"] + "\n"
    others = medley("generate", "shared", "a river", *GREEDY).stdout
    assert others == medley("generate", "shared", "a river", "--user", "bob", *GREEDY).stdout
    assert others != hers["output"] + "\n"

    made = medley("customize", "ann", "shared", str(adapters["prompt"]), "--mode", "replace")
    assert one_line(made.stdout).startswith("ann on shared, replace: ")
    hers = generate(server.url, "shared", user="ann").json()
    assert hers["medley"]["methods"] == ["prompt_tuning"]


def test_what_cannot_be_laid_over_is_said_on_one_line(
    medley: Medley, adapters: dict[str, Path], tmp_path: Path
) -> None:
    for arguments, words in (
        (("ann", "nobody", str(adapters["lora"])), "(task_not_found)"),
        (("-ann", "shared", str(adapters["lora"])), "(invalid_request)"),
        (("ann", "shared", str(tmp_path)), "has no adapter_config.json"),
    ):
        result = medley("customize", "--", *arguments)
        assert result.returncode == 1, arguments
        assert words in one_line(result.stderr)
    wrong = medley("customize", "ann", "shared", str(adapters["lora"]), "--mode", "beside")
    assert wrong.returncode == 2


def test_a_canary_is_given_shown_ended_and_the_history_tells_all(medley: Medley, adapters: dict[str, Path]) -> None:
    for method in ("lora", "prompt"):
        assert medley("push", "tried", str(adapters[method]), "--no-activate").returncode == 0
    assert medley("activate", "tried", "1").stdout == "tried@1 is active\n"
    assert medley("canary", "tried", "2", "12.5").stdout == "tried@2 answers 12.5% of the requests\n"
    settings, versions = medley("show", "tried").stdout.split("\n\n")
    assert "canary\t2, 12.5% of the requests" in settings
    assert [line.split("\t")[:2] for line in versions.splitlines()[1:]] == [["1", "active"], ["2", "canary"]]
    refused = medley("delete", "tried", "--version", "2")
    assert refused.returncode == 1
    assert "(version_canary)" in one_line(refused.stderr)
    assert medley("canary", "tried", "off").stdout == "tried has no canary\n"
    assert medley("activate", "tried", "2").stdout == "tried@2 is active\n"
    assert medley("rollback", "tried").stdout == "tried@1 is active\n"

    header, *rows = [line.split("\t") for line in medley("show", "tried", "--history").stdout.splitlines()]
    assert header == ["change", "time", "what", "key", "request", "detail"]
    listed = json.loads(medley("show", "tried", "--history", "--json").stdout)
    assert [entry["id"] for entry in listed] == [int(row[0]) for row in rows]
    assert [datetime.fromisoformat(row[1]).timestamp() for row in rows] == [int(entry["time"]) for entry in listed]
    assert all(entry["request_id"] for entry in listed)
    assert [row[4] for row in rows] == [entry["request_id"] for entry in listed]
    assert [row[2] for row in rows] == [
        "task_rolled_back",
        "version_activated",
        "canary_set",
        "canary_set",
        "version_activated",
        "version_published",
        "version_published",
        "task_put",
    ]
    assert json.loads(rows[0][5]) == {"version": 1, "previous": 2}


def test_the_history_is_shown_whole_however_many_pages_it_has(medley: Medley, server: ServerProcess) -> None:
    with httpx.Client(base_url=server.url) as http:
        for number in range(101):
            http.put("/v1/tasks/changing", json={"description": str(number)}).raise_for_status()
    _, *lines = medley("show", "changing", "--history").stdout.splitlines()
    assert [int(line.split("\t")[0]) for line in lines] == list(range(101, 0, -1))


def test_wrong_use_of_canary_is_2_and_says_what_is_missing(medley: Medley) -> None:
    for arguments in (("t", "2"), ("t", "two", "5"), ("t", "2", "101"), ("t", "off", "5"), ("t",)):
        assert medley("canary", *arguments).returncode == 2, arguments
