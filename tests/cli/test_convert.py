"""`medley convert`: what comes out, and that nothing else is opened."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from server.cli.app import app
from server.cli.errors import CommandError
from server.cli.pickles import convert_file, convert_folder, pickled_tensors
from tests.golden.adapterhub.reference import HERE
from tests.server_process import run_medley

CONFIG = "adapter_config.json"


@pytest.mark.parametrize("case", ["prefix", "seq_bn_rf4"])
def test_an_adapterhub_folder_has_the_same_tensors_afterwards(tmp_path: Path, case: str) -> None:
    source = tmp_path / case
    source.mkdir()
    for name in (CONFIG, "pytorch_adapter.bin"):
        shutil.copy(HERE / "cases" / case / name, source)
    result = CliRunner().invoke(app, ["convert", str(source)])
    assert result.exit_code == 0, result.output
    output = tmp_path / f"{case}-safetensors"
    assert str(output) in result.stdout
    assert sorted(path.name for path in output.iterdir()) == ["adapter.safetensors", CONFIG]
    assert (output / CONFIG).read_bytes() == (source / CONFIG).read_bytes()
    converted, expected = (
        load_file(output / "adapter.safetensors"),
        load_file(HERE / "cases" / case / "adapter.safetensors"),
    )
    expected = {name: tensor for name, tensor in expected.items() if ".prefix_tuning.pool." not in name}
    assert converted.keys() == expected.keys(), "what a prefix repeats under every layer is left out"
    for name, tensor in expected.items():
        assert torch.equal(converted[name], tensor), name


@pytest.mark.parametrize("is_pickled", [False, True])
def test_a_fusion_s_folders_become_one(tmp_path: Path, is_pickled: bool) -> None:
    source = tmp_path / "setup"
    shutil.copytree(HERE / "cases" / "fusion", source)
    tensors: dict[str, Tensor] = {}
    for path in sorted(source.rglob("*.safetensors")):
        found = load_file(path)
        assert not tensors.keys() & found.keys()
        tensors |= found
        if is_pickled:
            torch.save(found, path.with_name(f"pytorch_{path.stem}.bin"))
            path.unlink()
    save_file({"lm_head.weight": torch.ones(2, 3)}, source / "first" / "model_head.safetensors")
    save_file({"heads.x.1.weight": torch.ones(2, 3)}, source / "first,second" / "model_head.safetensors")
    (source / "first,second" / "head_config.json").write_text("{}")
    result = CliRunner().invoke(app, ["convert", str(source)])
    assert result.exit_code == 0, result.output
    output = tmp_path / "setup-safetensors"
    assert str(source / "first" / "model_head.safetensors") in result.stdout.replace("\n", "")
    assert list(load_file(output / "model_head.safetensors")) == ["heads.x.1.weight"]
    assert (output / "head_config.json").is_file()
    joined = load_file(output / "adapter.safetensors")
    assert joined.keys() == tensors.keys()
    assert all(torch.equal(joined[name], tensor) for name, tensor in tensors.items())
    config = json.loads((output / CONFIG).read_text())
    own = {name: json.loads((source / name / CONFIG).read_text())["config"] for name in ("first", "second")}
    assert config["adapters"] == own
    fusion = json.loads((source / "first,second" / "adapter_fusion_config.json").read_text())
    assert {key: value for key, value in config.items() if key != "adapters"} == fusion


def test_a_fusion_that_lacks_something_is_named(tmp_path: Path) -> None:
    source = Path(shutil.copytree(HERE / "cases" / "fusion", tmp_path / "setup"))
    weights = source / "first,second" / "model_adapter_fusion.safetensors"

    def refused(says: str) -> None:
        result = CliRunner().invoke(app, ["convert", str(source), "--output", str(tmp_path / "out")])
        assert result.exit_code == 1
        assert says in str(result.exception)
        assert not (tmp_path / "out").exists()

    content = weights.read_bytes()
    weights.write_bytes(b"no")
    refused("not safetensors")
    weights.unlink()
    refused("model_adapter_fusion.safetensors")
    weights.write_bytes(content)
    shutil.copytree(source / "first,second", source / "other")
    refused("2 fusions")
    shutil.rmtree(source / "other")
    shutil.rmtree(source / "second")
    refused("'second' is not under")


def test_peft_s_pickled_weights_and_a_head_are_converted_too(tmp_path: Path) -> None:
    source = tmp_path / "folder"
    source.mkdir()
    (source / CONFIG).write_text("{}")
    (source / "head_config.json").write_text("{}")
    torch.save({"prompt_embeddings": torch.ones(2, 3)}, source / "adapter_model.bin")
    torch.save({"lm_head.weight": torch.ones(4, 3)}, source / "pytorch_model_head.bin")
    convert_folder(source, tmp_path / "out")
    assert load_file(tmp_path / "out" / "adapter_model.safetensors")["prompt_embeddings"].shape == (2, 3)
    assert load_file(tmp_path / "out" / "model_head.safetensors")["lm_head.weight"].shape == (4, 3)
    assert (tmp_path / "out" / "head_config.json").is_file()


def test_a_layer_s_copy_of_a_prefix_that_differs_is_kept_for_the_server_to_refuse(tmp_path: Path) -> None:
    source, own = tmp_path / "folder", torch.ones(2, 3)
    pool = "model.layers.{}.self_attn.prefix_tuning.pool.prefix_tunings.task.self_prefix.wte.weight"
    tensors = {
        "model.prefix_tuning.prefix_tunings.task.self_prefix.wte.weight": own,
        pool.format(0): own,
        pool.format(1): own + 1,
    }
    source.mkdir()
    (source / CONFIG).write_text("{}")
    torch.save(tensors, source / "pytorch_adapter.bin")
    convert_folder(source, tmp_path / "out")
    assert load_file(tmp_path / "out" / "adapter.safetensors").keys() == tensors.keys() - {pool.format(0)}


def test_a_t_few_file_becomes_an_ia3_folder_that_scales_outputs(tmp_path: Path) -> None:
    modules = ["encoder.block.0.layer.0.SelfAttention.k", "encoder.block.0.layer.1.DenseReluDense.wi_1"]
    scales = {f"{module}.multi_lora_b": torch.rand(5, 1) for module in modules}
    torch.save(scales, tmp_path / "finish.pt")
    convert_file(tmp_path / "finish.pt", tmp_path / "out")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["peft_type"], config["target_modules"], config["feedforward_modules"]) == ("IA3", modules, [])
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert tensors.keys() == {f"base_model.model.{module}.ia3_l" for module in modules}
    for module in modules:
        assert torch.equal(tensors[f"base_model.model.{module}.ia3_l"], scales[f"{module}.multi_lora_b"])


def test_tensors_that_share_memory_are_written_apart(tmp_path: Path) -> None:
    shared = torch.rand(4, 1)
    torch.save({"a.multi_lora_b": shared, "b.multi_lora_b": shared}, tmp_path / "two.pt")
    convert_file(tmp_path / "two.pt", tmp_path / "out")
    assert len(load_file(tmp_path / "out" / "adapter_model.safetensors")) == 2


class Dangerous:
    """A pickle that would run a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, (f"touch {self.mark}",)


def test_a_pickle_that_holds_more_than_weights_is_not_opened(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    torch.save({"a.multi_lora_b": Dangerous(mark)}, tmp_path / "bad.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Dangerous(mark)))
    (tmp_path / "text.pt").write_text("no pickle")
    for name in ("bad.pt", "plain.pt", "text.pt"):
        result = run_medley("convert", str(tmp_path / name))
        assert result.returncode == 1, name
        assert "is not opened" in result.stderr, result.stderr
        assert result.stderr.count("\n") == 1, result.stderr
    assert not mark.exists()


@pytest.mark.parametrize("is_zipped", [True, False])
def test_a_damaged_pickle_is_said_to_be(tmp_path: Path, is_zipped: bool) -> None:
    """Of old files torch's reader says anything: that an index is wrong, a key, an argument's type."""
    path = tmp_path / "adapter.bin"
    torch.save({"a": torch.ones(3)}, path, _use_new_zipfile_serialization=is_zipped)
    whole = path.read_bytes()
    for length in range(0, len(whole) - 1, 5):
        path.write_bytes(whole[:length])
        with pytest.raises(CommandError, match="is damaged or holds more"):
            pickled_tensors(path)


def test_what_is_not_converted_is_named(tmp_path: Path) -> None:
    torch.save({"prompt_embedding": torch.ones(2, 3)}, tmp_path / "prompt.pt")
    torch.save([torch.ones(2)], tmp_path / "list.pt")
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, says in (
        (tmp_path / "prompt.pt", "prompt_embedding"),
        (tmp_path / "list.pt", "dictionary"),
        (empty, ".bin"),
    ):
        result = CliRunner().invoke(app, ["convert", str(path), "--output", str(tmp_path / "out")])
        assert result.exit_code == 1, path
        assert says in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    torch.save({"a.multi_lora_b": torch.ones(2, 1)}, tmp_path / "a.pt")
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("mine")
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "a.pt"), "--output", str(output)])
    assert result.exit_code == 1
    assert "--output" in str(result.exception)
    assert [path.name for path in output.iterdir()] == ["mine"]
