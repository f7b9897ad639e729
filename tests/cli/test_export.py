"""`medley export` and `medley import`: a task in one file, whole or refused."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import save_file

from tests.cli.conftest import Medley
from tests.server_process import ServerProcess, generate, one_line, run_medley

SETTINGS: dict[str, Any] = {
    "description": "a task that travels",
    "template": "{{ input }}!",
    "defaults": {"max_tokens": 8, "logit_bias": {"7": -1.0}},
    "labels": {"good": " good"},
    "pinned": True,
    "customization": {"methods": ["lora"], "max_virtual_tokens": 3, "max_parameters": None, "max_bytes": None},
}


@pytest.fixture(scope="module")
def other(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, str]]:
    """Another server, which asks for keys, and a key of its."""
    data = tmp_path_factory.mktemp("other") / "data"
    key = run_medley("keys", "create", "import", "--scope", "admin", "--data-dir", str(data)).stdout.strip()
    with ServerProcess(base, data, "--auth") as server:
        yield server, key


@pytest.fixture(scope="session")
def archive(
    server: ServerProcess, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """An exported task with three versions and a gap, and what the server said of it."""
    folder = tmp_path_factory.mktemp("exports")
    (folder / "text").mkdir()
    (folder / "text" / "adapter_config.json").write_text('{"medley_method": "text_prompt", "text": "A river. "}')
    here = {"MEDLEY_URL": server.url}
    for path in (adapters["lora"], adapters["prompt"], folder / "text"):
        assert run_medley("push", "traveller", str(path), **here).returncode == 0
    assert run_medley("delete", "traveller", "--version", "1", **here).returncode == 0
    assert run_medley("push", "traveller", str(adapters["lora"]), "--no-activate", **here).returncode == 0
    httpx.put(f"{server.url}/v1/tasks/traveller", json=SETTINGS).raise_for_status()
    assert run_medley("canary", "traveller", "4", "10", **here).returncode == 0
    exported = run_medley("export", "traveller", str(folder / "traveller.tar"), **here)
    assert exported.returncode == 0, exported.stderr
    assert "traveller, 3 versions, " in one_line(exported.stdout)
    assert not list(folder.glob("*.part"))
    return folder / "traveller.tar", httpx.get(f"{server.url}/v1/tasks/traveller").json()


def test_an_imported_task_is_the_exported_one_with_numbers_of_its_own_under_another_name_and_key(
    archive: tuple[Path, dict[str, Any]], server: ServerProcess, other: tuple[ServerProcess, str]
) -> None:
    path, exported = archive
    there = {"MEDLEY_URL": other[0].url, "MEDLEY_API_KEY": other[1]}
    imported = run_medley("import", str(path), "--as", "arrived", **there)
    assert imported.returncode == 0, imported.stderr
    assert imported.stdout.splitlines() == [
        "arrived@1: version 2 of the archive, prompt_tuning",
        "arrived@2: version 3 of the archive, text_prompt",
        "arrived@3: version 4 of the archive, lora",
        "arrived@2 is active",
        "arrived@3 answers 10% of the requests",
    ]
    shown = json.loads(run_medley("show", "arrived", "--json", **there).stdout)
    for name in SETTINGS:
        assert shown[name] == exported[name], name
    assert [version["digest"] for version in shown["versions"]] == [
        version["digest"] for version in exported["versions"]
    ]
    assert (shown["active"], shown["canary"]) == (2, {"version": 3, "percent": 10.0})
    said = run_medley("generate", "arrived@2", "a river", "--temperature", "0", **there).stdout
    assert said == generate(server.url, "traveller@3", max_tokens=8).json()["output"] + "\n"

    again = run_medley("import", str(path), "--as", "arrived", **there)
    assert again.stdout == imported.stdout  # the same content makes no versions
    refused = run_medley("import", str(path), MEDLEY_URL=other[0].url)
    assert refused.returncode == 1
    assert "(unauthorized)" in one_line(refused.stderr)


def test_what_a_publisher_may_not_set_is_named_after_everything_else_is_imported(
    archive: tuple[Path, dict[str, Any]], other: tuple[ServerProcess, str]
) -> None:
    path, exported = archive
    data = other[0].data
    key = run_medley(
        "keys", "create", "p", "--scope", "publish", "--tenant", "acme", "--data-dir", str(data)
    ).stdout.strip()
    there = {"MEDLEY_URL": other[0].url, "MEDLEY_API_KEY": key}
    imported = run_medley("import", str(path), "--as", "unpinned", **there)
    assert imported.returncode == 1
    said = one_line(imported.stderr)
    assert "unpinned is imported with all its versions and other settings, but not pinned: " in said
    assert imported.stdout.splitlines()[-2:] == ["unpinned@2 is active", "unpinned@3 answers 10% of the requests"]
    shown = json.loads(run_medley("show", "unpinned", "--json", **there).stdout)
    for name in SETTINGS:
        assert shown[name] == (False if name == "pinned" else exported[name]), name


def test_a_task_of_a_checkpoint_of_many_is_imported_as_that_task(medley: Medley, tmp_path: Path) -> None:
    config = {"peft_type": "MULTITASK_PROMPT_TUNING", "num_virtual_tokens": 2, "num_tasks": 2, "num_ranks": 1}
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        "prompt_embeddings": torch.randn(2, 32),
        "prefix_task_cols": torch.randn(2, 2, 1),
        "prefix_task_rows": torch.randn(2, 1, 32),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    assert medley("push", "many", str(folder)).returncode == 0
    assert medley("export", "many:1", str(tmp_path / "one.tar")).returncode == 0
    imported = medley("import", str(tmp_path / "one.tar"), "--as", "second-of-many")
    assert imported.returncode == 0, imported.stderr
    digests = [
        json.loads(medley("show", task, "--json").stdout)["versions"][0]["digest"]
        for task in ("many:1", "second-of-many")
    ]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("damage", ["cut", "altered", "without-manifest", "newer", "no-archive", "escaping"])
def test_a_damaged_archive_is_refused_before_anything_is_sent(
    archive: tuple[Path, dict[str, Any]], medley: Medley, tmp_path: Path, damage: str
) -> None:
    content = bytearray(archive[0].read_bytes())
    path = tmp_path / "damaged.tar"
    if damage == "cut":
        content = content[: len(content) // 2]
    elif damage == "no-archive":
        content = bytearray(b"hello")
    elif damage == "altered":
        with tarfile.open(archive[0]) as tar:
            content[tar.getmember("versions/4/adapter_model.safetensors").offset_data + 700] ^= 1
    elif damage == "newer":
        content = content.replace(b'"medley_export": 1', b'"medley_export": 2')
    elif damage == "without-manifest":
        content = content.replace(b"manifest.json", b"manifesto.txt")
    else:  # a file's name that leads out of the archive's folders
        content = content.replace(b'"adapter_config.json"', b'"../../../etc/passwd"')
    path.write_bytes(content)
    result = medley("import", str(path), "--as", f"never-{damage}")
    assert result.returncode == 1
    assert "damaged.tar" in one_line(result.stderr)
    assert f"never-{damage}" not in medley("tasks").stdout


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        (b'"task":', b'"tusk":', "`task`"),
        (b'"versions":', b'"virsions":', "`versions`"),
        (b'"sha256":', b'"sha255":', "`sha256`"),
        (b'"active": ', b'"active": 7', "`active`"),
        (b'"percent":', b'"precent":', "`percent`"),
    ],
)
def test_an_archive_that_lacks_a_field_is_refused_by_its_name(
    archive: tuple[Path, dict[str, Any]], medley: Medley, tmp_path: Path, before: bytes, after: bytes, named: str
) -> None:
    path = tmp_path / "damaged.tar"
    with tarfile.open(archive[0]) as whole, tarfile.open(path, "w") as damaged:
        for member in whole:
            source = whole.extractfile(member)
            assert source is not None
            content = source.read()
            if member.name == "manifest.json":
                assert before in content
                content = content.replace(before, after)
                member.size = len(content)
            damaged.addfile(member, io.BytesIO(content))
    result = medley("import", str(path), "--as", "never")
    assert result.returncode == 1
    assert named in one_line(result.stderr)
    assert "manifest.json" in result.stderr
    assert "never" not in [line.split()[0] for line in medley("tasks").stdout.splitlines()]


def test_what_cannot_be_exported_leaves_no_file(medley: Medley, tmp_path: Path) -> None:
    result = medley("export", "nobody", str(tmp_path / "nobody.tar"))
    assert result.returncode == 1
    assert "(task_not_found)" in one_line(result.stderr)
    result = medley("export", "nobody", str(tmp_path / "absent" / "nobody.tar"))
    assert result.returncode == 1
    assert "cannot be written" in one_line(result.stderr)
    assert list(tmp_path.iterdir()) == []
