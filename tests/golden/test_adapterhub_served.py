"""What AdapterHub's library answers with its files alone, the engine answers with them in a mixed batch."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from server.adapters import Checkpoint, read_adapter
from server.adapters.checkpoint import HEAD_WEIGHTS_FILE, HUB_WEIGHTS_FILE
from server.errors import AdapterError
from server.model import FrozenBase
from tests.golden.adapterhub.modules import low_rank, under
from tests.golden.adapterhub.reference import HERE
from tests.harness import Result, greedy, make_engine, request, run
from tests.reference.adapters import CAUSAL, save_adapter

SERVED = ("base", "lora", "lora_everywhere", "dora", "vera", "ia3", "ia3_everywhere", "prefix", "prefix_flat")
REFUSED = {
    "lora_gating": "use_gating",
    "prefix_gating": "use_gating",
    "prefix_relu_leave_out": "leave_out",
    "noreft": "reft",
}


@pytest.fixture(scope="module")
def base() -> FrozenBase:
    return FrozenBase(AutoModelForCausalLM.from_pretrained(HERE / "base", attn_implementation="eager"))


def _rows(case: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((HERE / "cases" / case / "expected.json").read_text())
    return rows


def _assert_the_library_s(result: Result, row: dict[str, Any], name: str) -> None:
    assert result.failed is None, f"{name}: {result.failed}"
    assert result.tokens == row["tokens"], name
    for given, wanted in zip(result.logprobs, row["logprobs"], strict=True):
        assert abs(given.chosen - wanted) < 1e-3, name
    expected = torch.tensor(row["last_logits"]).log_softmax(-1)
    given_all = torch.tensor([result.logprobs[0].top[token] for token in range(len(expected))])
    torch.testing.assert_close(given_all, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(("page_size", "num_pages"), [(16, 100), (3, 40)], ids=["roomy", "odd-pages"])
def test_the_engine_gives_the_library_s_answers(base: FrozenBase, page_size: int, num_pages: int) -> None:
    engine = make_engine(base, page_size=page_size, num_pages=num_pages, max_batch_tokens=24)
    requests, expected = [], {}
    for case in SERVED:
        for index, row in enumerate(_rows(case)):
            name = f"{case}/{index}"
            folders = [] if case == "base" else [HERE / "cases" / case]
            sampling = greedy(len(row["tokens"]), logprobs=base.vocab_size)
            requests.append(request(name, row["prompt"], sampling, *folders))
            expected[name] = row
    outcome = run(engine, requests, random.Random(page_size))
    engine.close()
    for name, row in expected.items():
        _assert_the_library_s(outcome.results[name], row, name)


def _read(folder: Path, base: FrozenBase) -> str:
    return read_adapter(Checkpoint.open(folder, base.dtype), base.shape).method


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_served_is_refused_by_its_name(base: FrozenBase, case: str) -> None:
    with pytest.raises(AdapterError, match=REFUSED[case]) as caught:
        _read(HERE / "cases" / case, base)
    assert caught.value.code == "unsupported_method"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the case `lora`."""
    return Path(shutil.copytree(HERE / "cases" / "lora", tmp_path / "lora"))


def _change_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("code", "says", "changes"),
    [
        ("unsupported_method", "model_type", {"model_type": "gpt2"}),
        ("unsupported_method", "lora", {"config": "lora"}),
        ("unsupported_method", "version", {"version": "0.1.0"}),
        ("bad_config", "peft_type", {"peft_type": "LORA"}),
        ("bad_config", "name", {"name": None}),
        ("unsupported_method", "made_up", {"config": {"architecture": "made_up"}}),
        ("unsupported_method", "architecture", {"config": {"architecture": ["lora"]}}),
        ("base_mismatch", "loras.other", {"name": "other"}),
    ],
    ids=str,
)
def test_a_bad_config_is_refused(base: FrozenBase, folder: Path, code: str, says: str, changes: dict[str, Any]) -> None:
    _change_config(folder, **changes)
    with pytest.raises(AdapterError, match=says) as caught:
        _read(folder, base)
    assert caught.value.code == code


def test_a_file_from_before_alpha_was_trained_with_is_served_without_it(base: FrozenBase, folder: Path) -> None:
    new = read_adapter(Checkpoint.open(folder, base.dtype), base.shape)
    _change_config(folder, version="adapters.1.0.1")
    old = read_adapter(Checkpoint.open(folder, base.dtype), base.shape)
    site = "model.layers.0.self_attn.q_proj"
    torch.testing.assert_close(new.deltas[site].blocks[1], old.deltas[site].blocks[1] * (6 / 4))


def _changed_weights(folder: Path, draw: torch.Generator) -> dict[str, Tensor]:
    """Magnitudes beside a case's tensors, with `use_dora` in its config."""
    config = json.loads((folder / "adapter_config.json").read_text())["config"]
    _change_config(folder, config={**config, "use_dora": True})
    tensors = load_file(folder / HUB_WEIGHTS_FILE)
    for key in [key for key in tensors if key.endswith(".vera_B")]:
        tensors[key.replace("vera_B", "m.weight")] = torch.empty(32, 1).uniform_(0.5, 2, generator=draw)
    save_file(tensors, folder / HUB_WEIGHTS_FILE)
    return tensors


def test_vera_with_magnitudes_is_the_library_s_formula_and_its_bias_is_scaled(tmp_path: Path) -> None:
    """DvoRA, of which no answers are stored; over a base with biases, which stored ones do not have."""
    draw = torch.Generator().manual_seed(5)
    folder = Path(shutil.copytree(HERE / "cases" / "vera", tmp_path / "dvora"))
    tensors = _changed_weights(folder, draw)
    model = AutoModelForCausalLM.from_pretrained(HERE / "base", attention_bias=True, attn_implementation="eager")
    site = "model.layers.1.self_attn.q_proj"
    model.get_submodule(site).bias.data.normal_(generator=draw)
    biased = FrozenBase(model)
    adapter = read_adapter(Checkpoint.open(folder, biased.dtype), biased.shape)
    delta = adapter.deltas[site]
    assert delta.kind.is_relative
    weight, bias = biased.shape.weight(site), biased.shape.bias(site)
    x = torch.empty(7, 32).normal_(generator=draw)
    y = torch.nn.functional.linear(x, weight, bias)
    own = under(tensors, f"{site}.loras.task.")
    config = json.loads((folder / "adapter_config.json").read_text())["config"]
    expected = low_rank(config, own, under(tensors, "model.shared_parameters.task."), weight, x, y)
    changed = y.clone()[None]
    delta.kind.change_output(x[None], changed, *[block[None] for block in delta.blocks])
    torch.testing.assert_close(changed[0], expected)
    assert not torch.allclose(expected, y, atol=0.1)


@pytest.mark.parametrize(
    ("case", "code", "says", "changes"),
    [
        ("ia3", "unsupported_method", "use_dora", {"use_dora": True}),
        ("vera", "bad_config", "attn_matrices", {"attn_matrices": [[]]}),
        ("vera", "base_mismatch", "different widths", {"attn_matrices": ["q", "k"]}),
        ("vera", "bad_config", "leave_out", {"leave_out": [0, 1, 2]}),
        ("vera", "base_mismatch", "lora_A", {"vera_d": 1, "vera_b": 0}),  # to the library a LoRA
        ("dora", "base_mismatch", "m.weight", {"use_dora": False}),
        ("lora", "base_mismatch", "m.weight", {"use_dora": True}),
    ],
)
def test_a_kin_of_lora_that_does_not_fit_its_config_is_refused(
    base: FrozenBase, tmp_path: Path, case: str, code: str, says: str, changes: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(HERE / "cases" / case, tmp_path / case))
    config = json.loads((folder / "adapter_config.json").read_text())["config"]
    _change_config(folder, config={**config, **changes})
    with pytest.raises(AdapterError, match=says) as caught:
        _read(folder, base)
    assert caught.value.code == code


def test_a_tensor_that_is_missing_or_left_over_is_named(base: FrozenBase, folder: Path) -> None:
    tensors = load_file(folder / HUB_WEIGHTS_FILE)
    name = next(iter(tensors))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, folder / HUB_WEIGHTS_FILE)
    with pytest.raises(AdapterError, match=name):
        _read(folder, base)
    save_file({**tensors, "model.layers.0.mlp.up_proj.loras.task.lora_B": torch.ones(48, 4)}, folder / HUB_WEIGHTS_FILE)
    with pytest.raises(AdapterError, match="up_proj"):
        _read(folder, base)


def test_a_head_that_is_the_base_s_own_changes_nothing_and_any_other_is_refused(base: FrozenBase, folder: Path) -> None:
    own = base.shape.weight("lm_head").clone()
    save_file({"lm_head.weight": own}, folder / HEAD_WEIGHTS_FILE)
    assert _read(folder, base) == "lora"
    own[3, 4] += 1e-3
    for head in ({"lm_head.weight": own}, {"heads.task.1.weight": torch.ones(2, 32)}):
        save_file(head, folder / HEAD_WEIGHTS_FILE)
        with pytest.raises(AdapterError, match=HEAD_WEIGHTS_FILE) as caught:
            _read(folder, base)
        assert caught.value.code == "unsupported_method"


def test_a_prefix_whose_repetitions_differ_is_refused(base: FrozenBase, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(HERE / "cases" / "prefix_flat", tmp_path / "prefix"))
    tensors = load_file(folder / HUB_WEIGHTS_FILE)
    name = next(key for key in tensors if "layers.1" in key)
    tensors[name] = tensors[name] + 1
    save_file(tensors, folder / HUB_WEIGHTS_FILE)
    with pytest.raises(AdapterError, match="differs"):
        _read(folder, base)


def _base_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(HERE / "base", attn_implementation="eager")


def _slow(parts: list[tuple[str, Tensor]], prompt: list[int], new_tokens: int) -> list[int]:
    """Greedy tokens behind virtual tokens in order: "embeddings" `[n, hidden]`, or keys and values `[n, layers · 2 ·
    width]`, which are "numbered" where they take positions."""
    model = _base_model()
    cache = DynamicCache(config=model.config)
    position = 0
    layers = model.config.num_hidden_layers

    def advance(embeddings: Tensor) -> Tensor:
        nonlocal position
        positions = torch.arange(position, position + len(embeddings))[None]
        position += len(embeddings)
        mask = torch.zeros(len(embeddings), cache.get_seq_length() + len(embeddings))
        mask = mask.masked_fill(torch.ones_like(mask).triu(cache.get_seq_length() + 1).bool(), -torch.inf)
        output = model(
            inputs_embeds=embeddings[None],
            position_ids=positions,
            past_key_values=cache,
            attention_mask=mask[None, None],
        )
        logits: Tensor = output.logits[0, -1]
        return logits

    with torch.inference_mode():
        for kind, values in parts:
            if kind == "embeddings":
                advance(values)
                continue
            entries = values.view(len(values), 2 * layers, model.config.num_key_value_heads, -1).permute(1, 2, 0, 3)
            for layer in range(layers):
                cache.update(entries[2 * layer][None], entries[2 * layer + 1][None], layer)
            position += len(values) if kind == "numbered" else 0
        embed = model.get_input_embeddings()
        tokens: list[int] = []
        logits = advance(embed(torch.tensor(prompt)))
        while len(tokens) < new_tokens:
            tokens.append(int(logits.argmax()))
            logits = advance(embed(torch.tensor(tokens[-1:])))
    return tokens


@pytest.mark.parametrize("page_size", [16, 3])
def test_in_a_stack_a_prefix_without_positions_shifts_nobody_s(
    base: FrozenBase, tmp_path: Path, page_size: int
) -> None:
    flat = load_file(HERE / "cases" / "prefix_flat" / HUB_WEIGHTS_FILE)
    hub = flat["model.prefix_tuning.prefix_tunings.task.self_prefix.control_trans"].view(4, -1)
    own = {"embeddings": PromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=3)}
    own["numbered"] = PrefixTuningConfig(task_type=CAUSAL, num_virtual_tokens=5)
    parts: dict[str, Tensor] = {"hub": hub}
    folders = {"hub": HERE / "cases" / "prefix_flat"}
    for seed, (kind, config) in enumerate(own.items()):
        save_adapter(_base_model(), config, tmp_path / kind, seed)
        folders[kind] = tmp_path / kind
        parts[kind] = load_file(tmp_path / kind / "adapter_model.safetensors")["prompt_embeddings"]
    stacks = [("hub", "embeddings"), ("embeddings", "hub"), ("hub", "numbered"), ("numbered", "hub"), ("hub", "hub")]
    prompt = [7, 41, 19, 3, 58, 22]
    requests = [request("+".join(names), prompt, greedy(8), *(folders[name] for name in names)) for names in stacks]
    engine = make_engine(base, page_size=page_size, max_batch_tokens=24)
    results = run(engine, requests, random.Random(3)).results
    engine.close()
    expected = {"+".join(names): _slow([(name, parts[name]) for name in names], prompt, 8) for names in stacks}
    assert {name: result.tokens for name, result in results.items()} == expected
    assert len(set(map(tuple, expected.values()))) == len(stacks) - 1, "two prefixes alone have no order"
