"""LLaMA-Adapter on GPT-2 under and over every other method of PEFT.

It is added behind the attention's output projection, and its queries are those that the step computes, whoever else
changes the norm or the projection that they come from. All stacks run in one engine, in random order of arrival, mixed,
chunked and preempted, each held against one slow forward of it.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from peft import LNTuningConfig, LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from server.engine.batch import StepBatch
from server.engine.engine import Engine
from server.engine.scheduler import Schedule
from server.model import FrozenBase
from tests.harness import NEAR_TIE, Alone, alone, assert_same, greedy, load_first, make_engine, request, run
from tests.reference.adapters import CAUSAL, configs, save_adapter
from tests.reference.bases import VOCABULARY, tiny_base
from tests.reference.stacked import Stacked

MAX_TOKENS = 4
PROMPTS = ([7], [9, 8, 30, 6, 11], [random.Random(3).randrange(3, VOCABULARY) for _ in range(17)])
_PROMPT = "adaption_prompt"
_CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    # but one that the library cannot merge as it runs it here: the output layer's weight is the embedding's
    **{name: config for name, config in configs("gpt2").items() if name != "lora_embedding"},
    "norm before": lambda: LNTuningConfig(task_type=CAUSAL, target_modules=["ln_1"]),
    "projection behind": lambda: LoraConfig(task_type=CAUSAL, r=3, target_modules=["attn.c_proj"]),
    "another": configs("gpt2")[_PROMPT],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters by name, as PEFT saves them."""
    root = tmp_path_factory.mktemp("gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reference library's, about this tiny base
        for seed, (name, config) in enumerate(_CONFIGS.items()):
            save_adapter(tiny_base("gpt2"), config(), root / name, seed)
    return {name: root / name for name in _CONFIGS}


def _slowly(model: Stacked, prompt: list[int]) -> Alone:
    answer = Alone([], [], None)
    for step in range(MAX_TOKENS):
        last = model.logits(prompt + answer.tokens)[-1]
        best = last.topk(2).values
        if answer.near_tie is None and best[0] - best[1] < NEAR_TIE:
            answer.near_tie = step
        answer.tokens.append(int(last.argmax()))
        answer.logprobs.append(float(last.log_softmax(-1).max()))
    return answer


@dataclass
class Case:
    """One request with its reference."""

    name: str
    stack: list[Path]
    prompt: list[int]
    expected: Alone


@pytest.fixture(scope="module")
def cases(folders: dict[str, Path]) -> list[Case]:
    """LLaMA-Adapter under and over every method."""
    pairs = dict.fromkeys(pair for other in folders for pair in ((_PROMPT, other), (other, _PROMPT)))
    found = []
    for task, user in pairs:
        stack = [folders[task], folders[user]]
        model = Stacked(tiny_base("gpt2"), stack)
        found += [
            Case(f"{task}+{user}/{index}", stack, prompt, _slowly(model, prompt))
            for index, prompt in enumerate(PROMPTS)
        ]
    return found


def _pad(engine: Engine) -> list[StepBatch]:
    """Let an engine pad its steps of one token a row; those that it runs from now on."""
    padded: list[StepBatch] = []
    runner = engine._runner
    runner.pad_decode_steps()
    engine._batches = runner.batch_builder()
    run_batch = runner.run

    def watched(schedule: Schedule, batch: StepBatch) -> Tensor:
        if len(batch.logit_rows) < len(batch.token_ids) and batch.composition is not None:
            padded.append(batch)
        return run_batch(schedule, batch)

    runner.run = watched  # type: ignore[method-assign]
    return padded


@pytest.mark.parametrize(
    ("page_size", "num_pages", "max_batch_tokens"),
    [(16, 200, 19), (3, 30, 19), (16, 200, 256)],
    ids=["roomy", "preempting", "padded"],
)
def test_each_stack_answers_as_its_definition_says(
    cases: list[Case], page_size: int, num_pages: int, max_batch_tokens: int
) -> None:
    base, is_padded = FrozenBase(tiny_base("gpt2")), max_batch_tokens > 19
    engine = make_engine(base, page_size=page_size, num_pages=num_pages, max_batch_tokens=max_batch_tokens)
    padded = _pad(engine) if is_padded else []
    requests = [request(case.name, case.prompt, greedy(MAX_TOKENS), *case.stack) for case in cases]
    load_first(engine, requests)
    outcome = run(engine, requests, random.Random(2))
    engine.close()
    left_out = sum(assert_same(outcome.results[case.name], case.expected, case.name) for case in cases)
    assert left_out <= len(cases) * MAX_TOKENS // 20, "too many steps near a tie to say that the answers agree"
    assert bool(padded) == is_padded
    assert (outcome.preemptions > 0) == (num_pages < 50)
    assert max(step.adapters for step in outcome.steps) > 3, "the stacks were not mixed"


def test_over_a_lora_of_the_queries_it_is_the_library_s_over_a_base_with_that_lora_merged(tmp_path: Path) -> None:
    """Only of the queries: the library would make the prompt's keys and values by the changed projection too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's, about this tiny base
        save_adapter(tiny_base("gpt2"), LoraConfig(task_type=CAUSAL, r=4, target_modules=["c_attn"]), tmp_path / "t", 1)
        save_adapter(tiny_base("gpt2"), configs("gpt2")[_PROMPT](), tmp_path / "u", 2)
        weights = tmp_path / "t" / "adapter_model.safetensors"
        tensors = load_file(weights)
        for name in tensors:
            if name.endswith("lora_B.weight"):
                tensors[name][len(tensors[name]) // 3 :] = 0
        save_file(tensors, weights)
        merged = PeftModel.from_pretrained(tiny_base("gpt2"), tmp_path / "t").merge_and_unload()
        both = PeftModel.from_pretrained(merged, tmp_path / "u").eval()
        expected = [alone(both, prompt, MAX_TOKENS) for prompt in PROMPTS]
        upper = PeftModel.from_pretrained(tiny_base("gpt2"), tmp_path / "u").eval()
    assert [alone(upper, prompt, MAX_TOKENS).logprobs for prompt in PROMPTS] != [each.logprobs for each in expected]
    for stack in (["t", "u"], ["u", "t"]):
        engine = make_engine(FrozenBase(tiny_base("gpt2")))
        paths = [tmp_path / name for name in stack]
        requests = [request(str(index), prompt, greedy(MAX_TOKENS), *paths) for index, prompt in enumerate(PROMPTS)]
        outcome = run(engine, requests, random.Random(1))
        engine.close()
        for index, answer in enumerate(expected):
            assert_same(outcome.results[str(index)], answer, f"{stack}/{index}")
