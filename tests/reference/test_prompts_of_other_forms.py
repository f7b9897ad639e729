"""Law 2 for prompts whose files are more, or less, than one adapter's tensors: many tasks in one file; text alone."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import MultitaskPromptTuningConfig, PeftModel

from server.adapters import Checkpoint, read_adapter
from server.adapters.checkpoint import CONFIG_FILE, DERIVED_FILE
from server.errors import AdapterError
from server.model import FrozenBase
from tests.harness import alone, assert_same, greedy, make_engine, request, run
from tests.reference.adapters import CAUSAL, save_adapter
from tests.reference.bases import tiny_base

MAX_TOKENS = 10
TASKS = 3
PROMPTS = ([5], [9, 8, 7, 6, 11, 12])


def text_prompt(folder: Path, **config: object) -> Path:
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(json.dumps({"medley_method": "text_prompt", **config}))
    return folder


def test_each_task_of_a_multitask_prompt_answers_as_peft_does_with_its_task_id(tmp_path: Path) -> None:
    config = MultitaskPromptTuningConfig(task_type=CAUSAL, num_virtual_tokens=5, num_tasks=TASKS, num_ranks=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference library's, about this tiny base
        save_adapter(tiny_base("llama"), config, tmp_path / "all", seed=3)
        model = PeftModel.from_pretrained(tiny_base("llama"), tmp_path / "all").eval()
        expected = {
            f"{task}/{index}": alone(model, prompt, MAX_TOKENS, task_ids=torch.tensor([task]))
            for task in range(TASKS)
            for index, prompt in enumerate(PROMPTS)
        }
    requests = []
    for task in range(TASKS):
        folder = Path(shutil.copytree(tmp_path / "all", tmp_path / str(task)))
        (folder / DERIVED_FILE).write_text(json.dumps({"task_index": task}))
        requests += [
            request(f"{task}/{index}", prompt, greedy(MAX_TOKENS), folder) for index, prompt in enumerate(PROMPTS)
        ]
    engine = make_engine(FrozenBase(tiny_base("llama")))
    results = run(engine, requests, random.Random(1)).results
    engine.close()
    for name, answer in expected.items():
        assert_same(results[name], answer, name)
    assert len({tuple(answer.tokens) for answer in expected.values()}) > TASKS, "the tasks answer alike"


@pytest.mark.parametrize("architecture", ["llama", "gemma", "gpt2", "opt"])
def test_a_text_prompt_answers_as_the_base_with_its_tokens_before_the_request_s(
    architecture: str, tmp_path: Path
) -> None:
    texts = {"short": [33], "long": [random.Random(7).randrange(3, 97) for _ in range(21)]}
    model = tiny_base(architecture)
    expected, requests = {}, []
    for name, token_ids in texts.items():
        folder = text_prompt(tmp_path / name, token_ids=token_ids)
        for index, prompt in enumerate([*PROMPTS, []]):
            expected[f"{name}/{index}"] = alone(model, token_ids + prompt, MAX_TOKENS)
            requests.append(request(f"{name}/{index}", prompt, greedy(MAX_TOKENS), folder))
    engine = make_engine(FrozenBase(tiny_base(architecture)), max_batch_tokens=16)
    results = run(engine, requests, random.Random(2)).results
    engine.close()
    for name, answer in expected.items():
        assert_same(results[name], answer, name)


def test_a_text_prompt_s_text_is_what_the_server_encoded(tmp_path: Path) -> None:
    base = FrozenBase(tiny_base("llama"))
    folder = text_prompt(tmp_path / "text", text="some text")
    (folder / DERIVED_FILE).write_text(json.dumps({"token_ids": [4, 5]}))
    adapter = read_adapter(Checkpoint.open(folder, base.dtype), base.shape)
    assert (adapter.virtual_tokens, adapter.parameters) == (2, 0)


@pytest.mark.parametrize(
    ("code", "config"),
    [
        ("bad_config", {}),
        ("bad_config", {"token_ids": []}),
        ("bad_config", {"token_ids": [True]}),
        ("bad_config", {"token_ids": "5"}),
        ("bad_config", {"token_ids": [5], "text": "five"}),
        ("bad_config", {"text": "nobody has encoded it"}),
        ("base_mismatch", {"token_ids": [5, 97]}),
        ("base_mismatch", {"token_ids": [-1]}),
    ],
    ids=str,
)
def test_a_text_prompt_that_is_none_is_refused(tmp_path: Path, code: str, config: dict[str, object]) -> None:
    base = FrozenBase(tiny_base("llama"))
    with pytest.raises(AdapterError) as caught:
        read_adapter(Checkpoint.open(text_prompt(tmp_path / "bad", **config), base.dtype), base.shape)
    assert caught.value.code == code
