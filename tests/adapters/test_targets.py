"""Which modules a config targets: PEFT's rules, held against PEFT's own functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, LoraConfig
from peft.tuners.ia3.model import IA3Model
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from server.adapters import Checkpoint
from server.adapters.methods.ia3 import _scales_input
from server.adapters.targets import matched, pattern_value, targeted_sites
from server.errors import AdapterError
from server.model import BaseShape, LayerShape
from server.model.sites import SiteShape

NAMES = [
    *(f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1, 2, 10, 11) for name in ("q_proj", "v_proj")),
    *(f"model.layers.{layer}.mlp.experts.{expert}.w1" for layer in (0, 1) for expert in (0, 1)),
    *(f"transformer.h.{layer}.{name}" for layer in (0, 1) for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj")),
    "model.project_in",
    "project_in",
    "my_q_proj",
    "lm_head",
]
SHAPE = BaseShape(
    {name: SiteShape(4, 4, name == "lm_head") for name in NAMES},
    (LayerShape(1, 4),),
    4,
    torch.float32,
    lambda name: torch.zeros(4, 4),
    lambda name: None,
)

_WORDS = ["q_proj", "v_proj", "proj", "c_proj", "attn.c_proj", "w1", "project_in", "lm_head", "0.w1", "missing"]
_LISTS = st.lists(st.sampled_from([*_WORDS, *NAMES]), min_size=1, max_size=4)
_EXPRESSIONS = st.sampled_from(
    [".*q_proj", "q_proj", r"model\.layers\.\d+\..*", ".*", r".*(0|1)\..*proj", "lm_head|.*w1", "", "(?!x)x"]
)
_LAYERS = st.none() | st.integers(0, 12) | st.lists(st.integers(0, 12), max_size=3)
_PATTERNS = st.none() | st.sampled_from(
    ["layers", "h", "", [], ["h"], ["layers", "h"], ["h", "layers"], "(layers|h)", "experts", "[a-z]+"]
)


def _ours(config: dict[str, Any]) -> list[str]:
    try:
        return targeted_sites(Checkpoint(config, {}, torch.float32), SHAPE)
    except AdapterError as error:
        if error.code != "base_mismatch":  # nothing is targeted
            raise
        return []


@settings(deadline=None, database=None, max_examples=400)
@given(targets=_LISTS, exclude=st.none() | _LISTS | _EXPRESSIONS, layers=_LAYERS, pattern=_PATTERNS)
def test_lists_of_targets_are_matched_as_peft_matches_them(
    targets: list[str], exclude: Any, layers: Any, pattern: Any
) -> None:
    peft = LoraConfig(target_modules=targets, exclude_modules=exclude)
    peft.layers_to_transform, peft.layers_pattern = layers, pattern  # past PEFT's check that they go together
    config = {
        "target_modules": targets,
        "exclude_modules": exclude,
        "layers_to_transform": layers,
        "layers_pattern": pattern,
    }
    assert _ours(config) == [name for name in NAMES if check_target_module_exists(peft, name)]


@settings(deadline=None, database=None)
@given(targets=_EXPRESSIONS, exclude=st.none() | _LISTS | _EXPRESSIONS)
def test_expressions_for_targets_are_matched_as_peft_matches_them(targets: str, exclude: Any) -> None:
    peft = LoraConfig(target_modules=targets, exclude_modules=exclude)
    config = {"target_modules": targets, "exclude_modules": exclude}
    assert _ours(config) == [name for name in NAMES if check_target_module_exists(peft, name)]


@settings(deadline=None, database=None)
@given(feedforward=st.lists(st.sampled_from([*_WORDS, "j", "_proj"]), max_size=3) | _EXPRESSIONS)
def test_feedforward_modules_are_matched_as_peft_matches_them(feedforward: Any) -> None:
    peft = IA3Config(target_modules=["q_proj"])
    peft.feedforward_modules = feedforward
    for name in NAMES:
        assert _scales_input(feedforward, name) == IA3Model._check_target_module_feedforward(peft, name)


@settings(deadline=None, database=None)
@given(
    keys=st.lists(st.sampled_from([*_WORDS, r"layers\.\d+\..*", ".*1.*", "^model.*", "q|v"]), max_size=4, unique=True)
)
def test_rank_and_alpha_patterns_are_matched_as_peft_matches_them(keys: list[str]) -> None:
    patterns = {key: index for index, key in enumerate(keys)}
    for name in NAMES:
        expected = patterns.get(get_pattern_key(keys, name), -1)
        assert pattern_value(patterns, name, "rank_pattern", -1) == expected


@pytest.mark.parametrize("spelling", ["all-linear", "ALL-LINEAR"])
def test_all_linear_is_every_module_but_the_head(spelling: str) -> None:
    assert _ours({"target_modules": spelling}) == [name for name in NAMES if name != "lm_head"]
    kept = _ours({"target_modules": spelling, "exclude_modules": ["q_proj"]})
    assert kept == [name for name in NAMES if name != "lm_head" and not name.endswith(".q_proj")]


@pytest.mark.parametrize(
    "repeats",
    [
        "a{1001}",
        "a{1001,}",
        "a{0,1001}",
        "a{,1001}",
        "(?:a{100}){11}",
        "(?:(?:a?){11,}){,91}",
        "a{2}b{501}",
        "(?x)a{ 10 01 }",
        "(?x)a{10#}\n01}",
        "(?x)a{1#{2}\n001}",
        "a{5#{1001}",  # no comment here
        "(?:a){e<=1001}",
        "(?:a){1<=e<=1001}",
        "(?:a){i<=1,d<=1001}",
        "(?:a){2i+1d<=1001}",
        "a{99999999999999999999}",
        "(?:" + "a" * 60 + "){400}",  # few repeats of much
        "a" * 2001,
        "(?:" * 900 + "a" + ")" * 90,
        "(" * 700 + "a" + ")" * 700,
    ],
)
def test_an_expression_that_would_take_long_to_compile_is_refused_before(repeats: str) -> None:
    with pytest.raises(AdapterError) as caught:
        matched(repeats, "model.layers.0.self_attn.q_proj", "exclude_modules")
    assert caught.value.code == "bad_config"
    assert caught.value.message.startswith("exclude_modules")


@pytest.mark.parametrize(
    "rule",
    [
        r"model\.layers\.\d{1,2}\.self_attn\.(?:q|k|v|o)_proj",
        r".*\.\d{1,3}\..*\d{0,2}(self_attn|mlp).*",
        r"(?:.*?(?:language|text|model).*?(?:self_attn|attention|attn|mlp).*?(?:q_proj|k_proj|v_proj|gate_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn)\.(?:(?:q_proj|k_proj|v_proj)))" * 4,
        "|".join(rf"model\.layers\.{layer}\.self_attn\.q_proj" for layer in range(40)),
    ],
)
def test_expressions_as_people_write_them_are_not_too_large(rule: str) -> None:
    assert "model.layers.0.self_attn.q_proj" in _ours({"target_modules": rule})


def test_lists_of_names_may_be_long() -> None:
    names = [f"model.layers.{layer}.self_attn.{module}_proj" for layer in range(200) for module in "qkvo"]
    assert _ours({"target_modules": names}) == [name for name in NAMES if name in names]
    assert pattern_value({name: index for index, name in enumerate(names)}, names[-1], "rank_pattern", None) == 799
