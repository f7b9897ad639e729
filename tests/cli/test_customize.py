"""`medley customize`, `--user`, and the commands that say which version answers, against a real server."""

from __future__ import annotations

import json
from pathlib import Path

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
    assert header == ["change", "when", "what", "key", "detail"]
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
    assert json.loads(rows[0][4]) == {"version": 1, "previous": 2}
    assert [entry["id"] for entry in json.loads(medley("show", "tried", "--history", "--json").stdout)] == [
        int(row[0]) for row in rows
    ]


def test_wrong_use_of_canary_is_2_and_says_what_is_missing(medley: Medley) -> None:
    for arguments in (("t", "2"), ("t", "two", "5"), ("t", "2", "101"), ("t", "off", "5"), ("t",)):
        assert medley("canary", *arguments).returncode == 2, arguments
