"""Every refusal of the bad-upload table: its code, and that the message names what is at fault."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from server.adapters import Adapter, Checkpoint, read_adapter
from server.adapters.checkpoint import CONFIG_FILE, DERIVED_FILE, WEIGHTS_FILE
from server.errors import AdapterError
from server.model import BaseShape, LayerShape
from server.model.sites import SiteShape

SHAPE = BaseShape(
    sites={
        "model.layers.0.self_attn.q_proj": SiteShape(8, 8, False),
        "model.layers.0.mlp.down_proj": SiteShape(12, 8, False),
        "model.layers.1.self_attn.q_proj": SiteShape(8, 8, False),
        "model.layers.1.mlp.down_proj": SiteShape(12, 8, False),
        "lm_head": SiteShape(8, 20, True),
    },
    layers=(LayerShape(2, 4), LayerShape(2, 4)),
    embedding_width=8,
    dtype=torch.float32,
    weight=lambda name: torch.ones(8, 8),
    bias=lambda name: None,
)
PROMPT: dict[str, Any] = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
PREFIX = {**PROMPT, "peft_type": "PREFIX_TUNING"}
LORA: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
IA3: dict[str, Any] = {
    "peft_type": "IA3",
    "target_modules": ["q_proj", "down_proj"],
    "feedforward_modules": ["down_proj"],
}


def _tensors(config: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors that fit."""
    torch.manual_seed(0)
    match config["peft_type"]:
        case "PROMPT_TUNING":
            return {"prompt_embeddings": torch.randn(3, 8)}
        case "PREFIX_TUNING":
            return {"prompt_embeddings": torch.randn(3, 2 * 2 * 2 * 4)}
        case "IA3":
            prefix = "base_model.model.model.layers"
            outputs = {f"{prefix}.{layer}.self_attn.q_proj.ia3_l": torch.randn(8, 1) for layer in range(2)}
            return outputs | {f"{prefix}.{layer}.mlp.down_proj.ia3_l": torch.randn(1, 12) for layer in range(2)}
        case _:
            tensors = {}
            for layer in range(2):
                name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
                tensors[f"{name}.lora_A.weight"] = torch.randn(2, 8)
                tensors[f"{name}.lora_B.weight"] = torch.randn(8, 2)
            return tensors


def _read(config: Any, tensors: dict[str, Tensor] | None = None, dtype: torch.dtype = torch.float32) -> Adapter:
    content = save(_tensors(config) if tensors is None else tensors)
    files = {CONFIG_FILE: json.dumps(config).encode(), WEIGHTS_FILE: content}
    return read_adapter(Checkpoint.parse(files, dtype), SHAPE)


def _refused(code: str, config: Any, tensors: dict[str, Tensor] | None = None, says: str = "", **kw: Any) -> None:
    with pytest.raises(AdapterError) as caught:
        _read(config, tensors, **kw)
    assert caught.value.code == code, caught.value.message
    assert says in caught.value.message


@pytest.mark.parametrize("config", [PROMPT, PREFIX, LORA, IA3], ids=lambda config: config["peft_type"])
def test_what_fits_is_read(config: dict[str, Any]) -> None:
    adapter = _read(config)
    assert adapter.warnings == ()
    assert adapter.parameters == sum(tensor.numel() for tensor in _tensors(config).values())


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_named(name: str) -> None:
    files = {CONFIG_FILE: json.dumps(PROMPT).encode(), WEIGHTS_FILE: save(_tensors(PROMPT))}
    del files[name]
    with pytest.raises(AdapterError, match=name) as caught:
        Checkpoint.parse(files, torch.float32)
    assert caught.value.code == "missing_file"


def _header(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded) if length is None else length) + encoded + data


_F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04\x95pickle",
        b"PK\x03\x04" + b"\0" * 60,
        _header({}, length=2**63),
        _header({}, length=10**9),
        _header(b"{" * 5000),
        _header(b"\xff\xfe"),
        _header([1, 2]),
        _header({"a": _F32}),
        _header({"a": _F32}, b"\0" * 7),
        _header({"a": _F32}, b"\0" * 9),
        _header({"a": {**_F32, "data_offsets": [8, 0]}}, b"\0" * 8),
        _header({"a": {**_F32, "data_offsets": [0, 2**63]}}, b"\0" * 8),
        _header({"a": {**_F32, "shape": [-2]}}, b"\0" * 8),
        _header({"a": {**_F32, "shape": [2**62, 2**62]}}, b"\0" * 8),
        _header({"a": {**_F32, "dtype": "F31"}}, b"\0" * 8),
        _header({"a": _F32, "b": _F32}, b"\0" * 8),
        _header({"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}}, b"\0" * 8),
        _header({"a": {"dtype": "F8_E8M0", "shape": [8], "data_offsets": [0, 8]}}, b"\0" * 8)[:-1],
    ],
    ids=range(19),
)
def test_what_is_not_safetensors_is_never_opened_as_anything_else(content: bytes) -> None:
    files = {CONFIG_FILE: json.dumps(PROMPT).encode(), WEIGHTS_FILE: content}
    with pytest.raises(AdapterError, match=WEIGHTS_FILE) as caught:
        Checkpoint.parse(files, torch.float32)
    assert caught.value.code == "not_safetensors"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"{}",
        b'{"peft_type": null}',
        b'{"peft_type": 3}',
        b'{"peft_type": "LORA", "r": NaN}',
        b'{"peft_type": "LORA", "\\ud800": 1}',
        b'\xef\xbb\xbf{"peft_type": "LORA"}',
        b"\xff",
        b"[" * 100_000,
    ],
    ids=range(13),
)
def test_a_config_that_is_no_config_is_refused(content: bytes) -> None:
    files = {CONFIG_FILE: content, WEIGHTS_FILE: save(_tensors(PROMPT))}
    with pytest.raises(AdapterError, match=r"adapter_config.json") as caught:
        Checkpoint.parse(files, torch.float32)
    assert caught.value.code == "bad_config"


def test_a_config_that_would_take_long_to_parse_is_too_large() -> None:
    files = {CONFIG_FILE: json.dumps({**PROMPT, "x": [0] * 2**20}).encode(), WEIGHTS_FILE: save(_tensors(PROMPT))}
    with pytest.raises(AdapterError, match=CONFIG_FILE) as caught:
        Checkpoint.parse(files, torch.float32)
    assert caught.value.code == "too_large"


_SENSELESS: list[tuple[dict[str, Any], str, list[Any]]] = [
    (PROMPT, "num_virtual_tokens", [0, -1, 1.5, "3", True, None, []]),
    (LORA, "r", [0, -2, "2", None, True]),
    (LORA, "lora_alpha", ["x", None, True, [], 10**400]),
    (LORA, "rank_pattern", ["x", {"q_proj": 0}, {"q_proj": "2"}, {"(": 3}]),
    (LORA, "alpha_pattern", [["a"], {"q_proj": "x"}, {"(": 3}]),
    (LORA, "target_modules", [3, {"a": 1}, [1], "("]),
    (LORA, "exclude_modules", [3, [None], "["]),
    (LORA, "layers_to_transform", ["x", 1.5, {"0": 1}, ["0"], [True], True]),
    (IA3, "feedforward_modules", [3, [1], "("]),
]


@pytest.mark.parametrize(
    ("base", "key", "value"),
    [(base, key, value) for base, key, values in _SENSELESS for value in values],
    ids=str,
)
def test_values_that_make_no_sense_are_bad_config_and_named(base: dict[str, Any], key: str, value: Any) -> None:
    _refused("bad_config", {**base, key: value}, _tensors(base), says=key)


def test_a_layers_pattern_that_is_no_regular_expression_is_bad_config() -> None:
    _refused("bad_config", {**LORA, "layers_to_transform": [0], "layers_pattern": "("}, says="layers_pattern")
    _refused("bad_config", {**LORA, "layers_to_transform": [0], "layers_pattern": 3}, says="layers_pattern")


@pytest.mark.parametrize("peft_type", ["OFT", "HIRA", "BONE", "", "lora"])
def test_an_unknown_method_is_refused_with_those_that_are_served(peft_type: str) -> None:
    _refused("unsupported_method", {**LORA, "peft_type": peft_type}, says="PROMPT_TUNING")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["experts.w"]),
        ("layer_replication", [[0, 1]]),
        ("alora_invocation_tokens", [1, 2]),
        ("arrow_config", {"top_k": 1}),
        ("use_bdlora", {"nblocks": 2}),
        ("use_qalora", True),
        ("kasa_config", {"beta": 1}),
        ("velora_config", {"scale": 1}),
        ("monteclora_config", {"num_samples": 1}),
        ("megatron_config", {"x": 1}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "olora"),
    ],
)
def test_lora_options_that_change_the_mathematics_are_refused_by_name(key: str, value: Any) -> None:
    _refused("unsupported_method", {**LORA, key: value}, says=key)


@pytest.mark.parametrize("config", [PROMPT, PREFIX, IA3], ids=lambda config: config["peft_type"])
def test_saved_modules_are_refused_for_every_method(config: dict[str, Any]) -> None:
    _refused("unsupported_method", {**config, "modules_to_save": ["lm_head"]}, says="modules_to_save")


def test_what_does_not_fit_the_base_is_named() -> None:
    _refused("base_mismatch", PROMPT, {"prompt_embeddings": torch.randn(3, 9)}, says="prompt_embeddings")
    _refused("base_mismatch", PROMPT, {"prompt_embeddings": torch.randn(4, 8)}, says="prompt_embeddings")
    _refused("base_mismatch", PROMPT, {"prompt_embeddings": torch.randn(24)}, says="prompt_embeddings")
    _refused("base_mismatch", PROMPT, {}, says="prompt_embeddings")
    _refused("base_mismatch", {**PROMPT, "num_virtual_tokens": 10**9}, says="prompt_embeddings")
    _refused("base_mismatch", {**PROMPT, "num_transformer_submodules": 2}, says="num_transformer_submodules")
    _refused("base_mismatch", PREFIX, {"prompt_embeddings": torch.randn(3, 2 * 2 * 4 * 4)}, says="prompt_embeddings")
    _refused("base_mismatch", {**LORA, "target_modules": ["nothing"]}, says="target_modules")
    _refused("base_mismatch", {**LORA, "r": 10**9}, says="lora_A")
    _refused("base_mismatch", {**LORA, "target_modules": ["q_proj", "down_proj"]}, says="down_proj")
    _refused("base_mismatch", {**LORA, "layers_to_transform": [0]}, says="layers.1")
    _refused("base_mismatch", IA3 | {"feedforward_modules": []}, says="down_proj")
    extra = _tensors(LORA) | {"base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight": torch.randn(2, 8)}
    _refused("base_mismatch", LORA, extra, says="layers.7")


def test_a_prefix_of_a_base_whose_layers_differ_is_refused() -> None:
    shape = replace(SHAPE, layers=(LayerShape(2, 4), LayerShape(1, 4)))
    with pytest.raises(AdapterError) as caught:
        read_adapter(Checkpoint(PREFIX, _tensors(PREFIX), torch.float32), shape)
    assert caught.value.code == "base_mismatch"


@pytest.mark.parametrize("config", [PROMPT, PREFIX, LORA, IA3], ids=lambda config: config["peft_type"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_and_their_tensor_named(config: dict[str, Any], value: float) -> None:
    for name in _tensors(config):
        tensors = _tensors(config)
        tensors[name].view(-1)[-1] = value
        _refused("not_finite", config, tensors, says=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_values_are_finite_though_their_sum_is_beyond_the_dtype(dtype: torch.dtype) -> None:
    largest = torch.full((3, 8), torch.finfo(dtype).max, dtype=dtype)
    assert largest.sum().isinf()
    adapter = read_adapter(Checkpoint(PROMPT, {"prompt_embeddings": largest}, dtype), replace(SHAPE, dtype=dtype))
    assert adapter.virtual_tokens == 3


def test_values_beyond_the_bases_dtype_are_not_finite() -> None:
    large = {"prompt_embeddings": torch.full((3, 8), 1e6)}
    assert _read(PROMPT, large).virtual_tokens == 3
    _refused("not_finite", PROMPT, large, says="prompt_embeddings", dtype=torch.float16)


def test_a_scaling_that_leaves_the_bases_dtype_is_not_finite() -> None:
    _refused("not_finite", {**LORA, "lora_alpha": 1e300}, says="lora_B")
    _refused("not_finite", {**LORA, "lora_alpha": 1e6}, says="lora_B", dtype=torch.float16)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_tensors_that_hold_no_floating_point_values_are_refused(dtype: torch.dtype) -> None:
    _refused("bad_config", PROMPT, {"prompt_embeddings": torch.ones(3, 8).to(dtype)}, says="prompt_embeddings")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_every_floating_point_type_is_read(dtype: torch.dtype) -> None:
    adapter = _read(PROMPT, {"prompt_embeddings": torch.ones(3, 8).to(dtype)})
    assert adapter.prefix is not None
    assert adapter.prefix.blocks[0].dtype == torch.float32


def test_unknown_settings_are_warnings() -> None:
    adapter = _read({**LORA, "made_up_later": 1, "revision": None, "peft_version": "0.1", "lora_dropout": 0.1})
    assert len(adapter.warnings) == 1
    assert adapter.warnings[0].startswith("made_up_later")


def test_an_expression_that_takes_for_ever_is_refused() -> None:
    _refused("bad_config", {**LORA, "target_modules": r"(.|\w)+[!?]"}, says="target_modules")


def test_a_whole_number_of_thousands_of_digits_is_refused_without_them() -> None:
    _refused("bad_config", {**LORA, "r": 10**4299}, says="r is too large")
    _refused("bad_config", {**LORA, "rank_pattern": {"q_proj": 10**4299}}, says="rank_pattern")
    _refused("bad_config", {**PROMPT, "num_virtual_tokens": 2**63}, says="num_virtual_tokens is too large")


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("target_modules", {**LORA, "target_modules": ".*a{1001}"}),
        ("exclude_modules", {**LORA, "exclude_modules": ".*a{1001}"}),
        ("rank_pattern", {**LORA, "rank_pattern": {"a{1001}": 2}}),
        ("alpha_pattern", {**LORA, "alpha_pattern": {"a{1001}": 2}}),
        ("layers_pattern", {**LORA, "layers_to_transform": [0], "layers_pattern": "a{1001}"}),
        ("feedforward_modules", {**IA3, "feedforward_modules": ".*a{1001}"}),
        ("block_size_pattern", {**LORA, "peft_type": "C3A", "block_size": 4, "block_size_pattern": {"a{1001}": 2}}),
    ],
)
def test_an_expression_that_is_large_to_compile_is_refused_in_every_setting(key: str, config: dict[str, Any]) -> None:
    _refused("bad_config", config, says=f"{key}: the counted repeats")


def _multitask(**changes: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = {**PROMPT, "peft_type": "MULTITASK_PROMPT_TUNING", "num_tasks": 4, "num_ranks": 2, **changes}
    tensors = {
        "prompt_embeddings": torch.randn(3, 8),
        "prefix_task_cols": torch.randn(4, 3, 2),
        "prefix_task_rows": torch.randn(4, 2, 8),
    }
    return config, tensors


def test_a_checkpoint_of_many_tasks_says_how_many() -> None:
    config, tensors = _multitask()
    adapter = _read(config, tensors)
    assert (adapter.tasks, adapter.parameters) == (4, 3 * 8 + 3 * 2 + 2 * 8)


def test_a_checkpoint_of_many_tasks_that_does_not_hold_them_is_refused() -> None:
    _refused("bad_config", *_multitask(num_tasks=0), says="num_tasks")
    _refused("bad_config", *_multitask(num_ranks=None), says="num_ranks")
    _refused("base_mismatch", *_multitask(num_tasks=5), says="prefix_task_cols")
    _refused("base_mismatch", *_multitask(num_ranks=3), says="prefix_task_cols")
    _refused("too_large", *_multitask(num_tasks=10**6), says="num_tasks")


@pytest.mark.parametrize("index", [4, -1, 1.0, "1", None, True])
def test_a_task_that_the_checkpoint_does_not_hold_is_refused(index: Any) -> None:
    config, tensors = _multitask()
    files = {CONFIG_FILE: json.dumps(config).encode(), WEIGHTS_FILE: save(tensors)}
    files[DERIVED_FILE] = json.dumps({"task_index": index}).encode()
    with pytest.raises(AdapterError, match="task_index"):
        read_adapter(Checkpoint.parse(files, torch.float32), SHAPE)


@pytest.mark.parametrize("key", ["config", "medley_method"])
def test_a_config_of_two_formats_is_refused(key: str) -> None:
    _refused("bad_config", {**PROMPT, key: "x"}, _tensors(PROMPT), says=key)


def test_a_file_of_another_format_is_refused() -> None:
    files = {CONFIG_FILE: json.dumps(PROMPT).encode(), WEIGHTS_FILE: save(_tensors(PROMPT))}
    files["model_head.safetensors"] = save({"lm_head.weight": torch.ones(20, 8)})
    with pytest.raises(AdapterError, match=r"model_head\.safetensors") as caught:
        Checkpoint.parse(files, torch.float32)
    assert caught.value.code == "unknown_file"


def test_an_unknown_method_of_our_own_is_refused_with_those_that_are_served() -> None:
    _refused("unsupported_method", {"medley_method": "made_up"}, {}, says="text_prompt")
