"""The commands against a real server: what they do, print and return."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.cli.conftest import Medley
from tests.server_process import ServerProcess, generate, one_line, run_medley


def test_a_pushed_folder_is_listed_shown_switched_rolled_back_and_deleted(
    medley: Medley, adapters: dict[str, Path]
) -> None:
    pushed = medley("push", "life", str(adapters["lora"]), "--description", "a life")
    assert pushed.returncode == 0, pushed.stderr
    assert one_line(pushed.stdout).startswith("life@1, active: lora, ")
    pushed = medley("push", "life", str(adapters["prompt"]), "--no-activate")
    assert one_line(pushed.stdout).startswith("life@2, not active: ")

    header, *rows = medley("tasks").stdout.splitlines()
    assert header.split("\t") == ["task", "active", "method", "size", "last used", "description"]
    (row,) = [row.split("\t") for row in rows if row.startswith("life\t")]
    assert row[1:3] == ["1", "lora"]
    assert row[-1] == "a life"

    assert medley("activate", "life", "2").stdout == "life@2 is active\n"
    assert medley("rollback", "life").stdout == "life@1 is active\n"
    shown = json.loads(medley("show", "life", "--json").stdout)
    assert (shown["active"], [version["version"] for version in shown["versions"]]) == (1, [1, 2])
    versions = medley("show", "life").stdout.split("\n\n")[1].splitlines()
    assert [line.split("\t")[:2] for line in versions[1:]] == [["1", "active"], ["2", ""]]

    assert medley("delete", "life", "--version", "2").stdout == "deleted life@2\n"
    assert medley("delete", "life").stdout == "deleted life\n"
    assert "life" not in [task["task"] for task in json.loads(medley("tasks", "--json").stdout)]


def test_tasks_lists_every_page(medley: Medley, server: ServerProcess, adapters: dict[str, Path]) -> None:
    for name in ("page-a", "page-b", "page-c"):
        assert medley("push", name, str(adapters["lora"])).returncode == 0
    listed = [task["task"] for task in json.loads(medley("tasks", "--json").stdout)]
    assert listed == sorted(listed)
    assert {"page-a", "page-b", "page-c"} <= set(listed)


def test_generate_takes_its_text_from_the_argument_or_stdin_and_its_options_to_the_server(
    medley: Medley, server: ServerProcess, adapters: dict[str, Path]
) -> None:
    assert medley("push", "said", str(adapters["lora"])).returncode == 0
    expected = generate(server.url, "said", input="a river", max_tokens=20).json()["output"]
    greedy = ("--max-tokens", "20", "--temperature", "0")
    assert medley("generate", "said", "a river", *greedy).stdout == expected + "\n"
    assert medley("generate", "said", *greedy, stdin="a river\n").stdout == expected + "\n"

    sampled = ("--max-tokens", "20", "--temperature", "1.5", "--top-k", "50", "--top-p", "0.9")
    first, again, other = (medley("generate", "said", "a river", *sampled, "--seed", seed) for seed in "778")
    assert first.stdout == again.stdout
    assert first.stdout != other.stdout
    stop = expected[3]
    assert medley("generate", "said", "a river", *greedy, "--stop", stop).stdout == expected.split(stop)[0] + "\n"


def test_what_the_server_refuses_is_its_message_and_code_on_one_line(medley: Medley, adapters: dict[str, Path]) -> None:
    for arguments, code in (
        (("show", "nobody"), "task_not_found"),
        (("activate", "nobody", "1"), "task_not_found"),
        (("delete", "nobody"), "task_not_found"),
        (("generate", "nobody", "text"), "task_not_found"),
        (("push", "no task name", str(adapters["lora"])), "invalid_request"),
    ):
        result = medley(*arguments)
        assert result.returncode == 1, arguments
        assert result.stdout == "", arguments
        line = one_line(result.stderr)
        assert line.startswith("medley: "), line
        assert line.endswith(f"({code})\n"), line


def test_rollback_without_an_earlier_version_says_what_to_do(medley: Medley, adapters: dict[str, Path]) -> None:
    assert medley("push", "young", str(adapters["lora"])).returncode == 0
    result = medley("rollback", "young")
    assert result.returncode == 1
    assert "activate one by its number" in one_line(result.stderr)


def test_push_refuses_a_folder_that_is_no_adapter_before_it_sends_anything(
    adapters: dict[str, Path], tmp_path: Path
) -> None:
    nowhere = {"MEDLEY_URL": "http://127.0.0.1:1"}  # a call would fail with another message
    empty = run_medley("push", "task", str(tmp_path), **nowhere)
    assert empty.returncode == 1
    assert "has no adapter_config.json" in one_line(empty.stderr)
    shutil.copy(adapters["lora"] / "adapter_config.json", tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"pickled")
    pickled = run_medley("push", "task", str(tmp_path), **nowhere)
    assert pickled.returncode == 1
    assert "safe_serialization=True" in one_line(pickled.stderr)
    assert "medley convert" in pickled.stderr
    (tmp_path / "adapter_model.bin").rename(tmp_path / "pytorch_model_head.bin")
    shutil.copy(adapters["lora"] / "adapter_model.safetensors", tmp_path)
    assert "pytorch_model_head.bin" in run_medley("push", "task", str(tmp_path), **nowhere).stderr
    assert run_medley("push", "task", str(tmp_path / "absent"), **nowhere).returncode == 2


def test_a_server_that_is_not_there_or_is_another_one_is_one_line(server: ServerProcess) -> None:
    away = run_medley("tasks", "--url", "http://127.0.0.1:1")
    assert away.returncode == 1
    assert one_line(away.stderr) == (
        "medley: no server at http://127.0.0.1:1; start one with `medley serve` or set --url/MEDLEY_URL\n"
    )
    other = run_medley("tasks", "--url", f"{server.url}/docs")
    assert other.returncode == 1
    assert "--url" in one_line(other.stderr) or "not_found" in other.stderr


def test_an_option_wins_over_its_variable(server: ServerProcess) -> None:
    assert run_medley("tasks", "--url", server.url, MEDLEY_URL="http://127.0.0.1:1").returncode == 0
    assert run_medley("tasks", MEDLEY_URL=server.url).returncode == 0


def test_stdin_that_is_not_text_is_refused(medley: Medley, server: ServerProcess, tmp_path: Path) -> None:
    result = medley("generate", "any", stdin="\udcff")
    assert result.returncode == 1
    assert "UTF-8" in one_line(result.stderr)


def test_methods_lists_what_may_be_pushed(medley: Medley, adapters: dict[str, Path]) -> None:
    header, *rows = medley("methods").stdout.splitlines()
    assert header.split("\t") == ["method", "mechanism", "checkpoints", "parameters per layer", "cost"]
    lora = next(row.split("\t") for row in rows if row.startswith("lora\t"))
    assert lora[1] == "row delta: low rank"
    assert "PEFT LORA" in lora[2]
    names = [entry["method"] for entry in json.loads(medley("methods", "--json").stdout)]
    assert names == [row.split("\t")[0] for row in rows]


def test_a_text_prompt_s_folder_is_its_config_alone(medley: Medley, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"medley_method": "text_prompt", "text": "A river. "}')
    pushed = medley("push", "said-before", str(tmp_path))
    assert pushed.returncode == 0, pushed.stderr
    assert one_line(pushed.stdout).startswith("said-before@1, active: text_prompt, ")


def test_a_folder_of_many_tasks_is_pushed_as_each_of_them(medley: Medley, tmp_path: Path) -> None:
    config = {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 2, "num_tasks": 2, "num_ranks": 1}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        "prompt_embeddings": torch.ones(2, 32),
        "prefix_task_cols": torch.ones(2, 2, 1),
        "prefix_task_rows": torch.ones(2, 1, 32),
    }
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    pushed = medley("push", "several", str(tmp_path), "--description", "one of two")
    assert pushed.returncode == 0, pushed.stderr
    assert [line.split(",")[0] for line in pushed.stdout.splitlines()] == ["several:0@1", "several:1@1"]
    for index in range(2):
        assert json.loads(medley("show", f"several:{index}", "--json").stdout)["description"] == "one of two"
