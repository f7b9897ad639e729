"""An engine in the test's own process, with adapters read straight from PEFT folders."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from server.adapters import Adapter, Checkpoint, read_adapter
from server.engine.engine import Engine, EngineLimits
from server.engine.protocol import AdapterRef, Failed, Generate, Sampling, StepStats, TokenLogprobs
from server.model import FrozenBase

NEAR_TIE = 1e-4  # a step whose two best logits are closer may go either way


@dataclass
class Result:
    """What one sequence was told."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    stop_token: int | None = None
    failed: Failed | None = None
    ends: int = 0
    virtual_tokens: int = 0
    cached_tokens: int = 0


@dataclass
class Run:
    """A finished run: each sequence's result, and every step's figures."""

    results: dict[str, Result]
    steps: list[StepStats]

    @property
    def preemptions(self) -> int:
        """Over all steps."""
        return sum(step.preemptions for step in self.steps)


def folder_ref(folder: Path) -> AdapterRef:
    """An adapter by its folder, for engines of `make_engine`."""
    return AdapterRef(digest=str(folder), files={"folder": str(folder)})


def make_engine(base: FrozenBase, **limits: int) -> Engine:
    """An engine with small default limits."""
    sizes = {
        "max_seqs": 16,
        "max_batch_tokens": 256,
        "max_queue": 1000,
        "num_pages": 256,
        "page_size": 4,
        "adapter_bytes": 10**9,
    }

    def load(files: Mapping[str, str]) -> Adapter:
        checkpoint = Checkpoint.open(Path(files["folder"]), base.dtype)
        return read_adapter(checkpoint, base.shape)

    sizes |= limits
    sizes.setdefault("max_prefill_tokens", sizes["max_batch_tokens"])
    return Engine(base, EngineLimits(**sizes), load)


def greedy(max_tokens: int, **changes: object) -> Sampling:
    """Greedy, to the full length, with the chosen tokens' log-probabilities."""
    fields = {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True, "logprobs": 0, **changes}
    return Sampling(**fields)  # type: ignore[arg-type]


def request(name: str, prompt: list[int], sampling: Sampling, *folders: Path, **changes: object) -> Generate:
    """A sequence under the adapters in `folders`."""
    fields = {
        "id": name,
        "prompt": prompt,
        "sampling": sampling,
        "stack": tuple(folder_ref(folder) for folder in folders),
        "deadline": time.time() + 600,
        **changes,
    }
    return Generate(**fields)  # type: ignore[arg-type]


def collect(engine: Engine, results: dict[str, Result]) -> StepStats:
    """Step once and note what each sequence was told."""
    output = engine.step()
    for tokens in output.tokens:
        result = results[tokens.id]
        result.tokens += tokens.token_ids
        result.logprobs += tokens.logprobs or []
        result.prompt_logprobs = tokens.prompt_logprobs or result.prompt_logprobs
        result.virtual_tokens, result.cached_tokens = tokens.virtual_tokens, tokens.cached_tokens
        if tokens.finish_reason is not None:
            result.finish_reason, result.stop_token = tokens.finish_reason, tokens.stop_token
            result.ends += 1
    for failed in output.failed:
        results[failed.id].failed = failed
        results[failed.id].ends += 1
    return output.stats


def load_first(engine: Engine, requests: Iterable[Generate]) -> None:
    """Load the adapters of requests, so that who meets in a step does not hang on how fast files are read."""
    adapters = {ref.digest: ref for item in requests for ref in item.stack}
    engine.pin(adapters.values())
    while len(engine.bank) < len(adapters):
        engine.step()
        time.sleep(0.001)
    engine.pin([])


def run(engine: Engine, requests: Iterable[Generate], arrivals: random.Random | None = None) -> Run:
    """Run to the end. With `arrivals` the requests come in random order, a few at random steps."""
    pending = list(requests)
    if arrivals is not None:
        arrivals.shuffle(pending)
    results = {item.id: Result() for item in pending}
    steps: list[StepStats] = []
    while pending or engine.has_work:
        count = len(pending) if arrivals is None else arrivals.randint(0, 4)
        for item in pending[:count]:
            engine.add(item)
        del pending[:count]
        if engine.has_work:
            steps.append(collect(engine, results))
            if engine.must_wait:
                time.sleep(0.001)
    return Run(results, steps)


@dataclass
class Alone:
    """What the reference gives for one request alone."""

    tokens: list[int]
    logprobs: list[float]
    near_tie: int | None  # the first step whose two best logits are within `NEAR_TIE`


def alone(model: PreTrainedModel | PeftModel, prompt: list[int], max_tokens: int, **options: torch.Tensor) -> Alone:
    """Hugging Face `generate`, greedy: one request, no padding. `options` are for the model."""
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=max_tokens,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
            eos_token_id=None,
            **options,
        )
    tokens = output.sequences[0, len(prompt) :].tolist()
    logits = torch.cat(output.logits)
    logprobs = logits.log_softmax(-1)[torch.arange(len(tokens)), torch.tensor(tokens)].tolist()
    best = logits.topk(2).values
    ties = (best[:, 0] - best[:, 1] < NEAR_TIE).nonzero()
    return Alone(tokens, logprobs, int(ties[0]) if len(ties) else None)


def assert_same(result: Result, expected: Alone, name: str) -> int:
    """Law 2. Returns how many steps were left out from a near tie on."""
    assert result.failed is None, f"{name}: {result.failed}"
    assert result.ends == 1, f"{name}: {result.ends} ends"
    compared = len(expected.tokens) if expected.near_tie is None else expected.near_tie
    assert result.tokens[:compared] == expected.tokens[:compared], name
    for given, wanted in zip(result.logprobs[:compared], expected.logprobs[:compared], strict=True):
        assert abs(given.chosen - wanted) < 1e-3, name
    return len(expected.tokens) - compared
