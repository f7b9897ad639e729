"""`GET …/versions/{n}/neighbours`: what virtual tokens are near to, against the base's embedding table itself."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from tests.api.conftest import Scripted, folder_files
from tests.api.tiny_base import make_tokenizer

TOKENS = [50, 7, 371, 123, 300]


@pytest.fixture(scope="module")
def table(base_folder: Path) -> torch.Tensor:
    weight: torch.Tensor = LlamaForCausalLM.from_pretrained(base_folder).get_input_embeddings().weight
    return weight.detach()


def test_a_prompt_of_known_tokens_is_near_to_them(
    http: httpx.Client, adapter_folders: dict[str, Path], table: torch.Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    noise = 0.05 * torch.randn(len(TOKENS), table.shape[1])
    prompt = table[TOKENS] * torch.tensor([1.0, 3.0, 0.5, 1.0, 2.0])[:, None] + noise
    (tmp_path / "adapter_config.json").write_text((adapter_folders["prompt"] / "adapter_config.json").read_text())
    save_file({"prompt_embeddings": prompt}, tmp_path / "adapter_model.safetensors")
    assert http.post("/v1/tasks/known/versions", files=folder_files(tmp_path)).status_code == 201
    answer = http.get("/v1/tasks/known/versions/1/neighbours", params={"k": 3})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["task"], found["version"], found["method"], found["layers"]) == ("known", 1, "prompt_tuning", [])
    cosines = torch.nn.functional.cosine_similarity(prompt[:, None], table[None], dim=-1)
    names = make_tokenizer()
    for at, token in enumerate(found["virtual_tokens"]):
        assert token["norm"] == pytest.approx(float(prompt[at].norm()), rel=1e-5)
        near = token["neighbours"]
        assert [item["token_id"] for item in near] == cosines[at].topk(3).indices.tolist()
        assert near[0]["token_id"] == TOKENS[at]
        assert [item["similarity"] for item in near] == pytest.approx(cosines[at].topk(3).values.tolist(), abs=1e-5)
        for item in near:
            assert item["norm"] == pytest.approx(float(table[item["token_id"]].norm()), rel=1e-5)
        spelled = names.decode([TOKENS[at]])
        assert near[0]["token"] == spelled or "�" in spelled
    assert len(http.get("/v1/tasks/known/versions/1/neighbours").json()["virtual_tokens"][0]["neighbours"]) == 5


def test_a_prefix_has_norms_in_each_layer(
    http: httpx.Client, tasks: dict[str, str], adapter_folders: dict[str, Path]
) -> None:
    found = http.get(f"/v1/tasks/{tasks['prefix']}/versions/1/neighbours").json()
    flat = load_file(adapter_folders["prefix"] / "adapter_model.safetensors")["prompt_embeddings"]
    norms = flat.view(len(flat), 2, 2, -1).norm(dim=-1)  # virtual tokens, layers, keys and values
    assert found["virtual_tokens"] == []
    assert len(found["layers"]) == 2
    for layer, given in enumerate(found["layers"]):
        assert given["key_norms"] == pytest.approx(norms[:, layer, 0].tolist(), rel=1e-5)
        assert given["value_norms"] == pytest.approx(norms[:, layer, 1].tolist(), rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "ia3"])
def test_a_method_without_virtual_tokens_is_refused(http: httpx.Client, tasks: dict[str, str], method: str) -> None:
    response = http.get(f"/v1/tasks/{tasks[method]}/versions/1/neighbours")
    assert (response.status_code, response.json()["error"]["code"]) == (400, "unsupported_method")


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("nobody/versions/1/neighbours", 404, "version_not_found"),
        ("the-prompt/versions/99/neighbours", 404, "version_not_found"),
        ("the-prompt/versions/1/neighbours?k=0", 400, "invalid_request"),
        ("the-prompt/versions/1/neighbours?k=101", 400, "invalid_request"),
    ],
)
def test_what_is_not_there_is_refused(
    http: httpx.Client, tasks: dict[str, str], path: str, status: int, code: str
) -> None:
    response = http.get(f"/v1/tasks/{path}")
    assert (response.status_code, response.json()["error"]["code"]) == (status, code), json.dumps(response.json())


def test_an_engine_that_dies_ends_the_search(scripted: Scripted, adapter_folders: dict[str, Path]) -> None:
    engine, http, _ = scripted()
    assert http.post("/v1/tasks/asked/versions", files=folder_files(adapter_folders["prompt"])).status_code == 201
    asked: list[httpx.Response] = []
    client = threading.Thread(target=lambda: asked.append(http.get("/v1/tasks/asked/versions/1/neighbours")))
    client.start()
    message = engine.searched.get(timeout=10)
    assert (message.k, set(message.adapter.files)) == (5, {"adapter_config.json", "adapter_model.safetensors"})
    engine.die()
    client.join()
    assert [(answer.status_code, answer.json()["error"]["code"]) for answer in asked] == [(503, "engine_dead")]
