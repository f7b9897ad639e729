"""`POST /v1/tasks/{task}/score`: its answers against a forward pass per choice, its errors, its ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM

from server.engine.protocol import Generate, TokenLogprobs, Tokens
from tests.api.conftest import BASE_ID, Scripted
from tests.api.tiny_base import make_tokenizer

TEXT = "The restaurant on the river serves good food at a low"
CHOICES = [" price", " rating", " price and a good price", "price", " p", " price"]

LogProbs = Callable[[str | None, list[int], str], float]


@pytest.fixture(scope="module")
def logprob_alone(base_folder: Path, adapter_folders: dict[str, Path]) -> LogProbs:
    """The slow way: one forward pass of the input and one choice, by PEFT."""
    tokenizer = make_tokenizer()
    models: dict[str | None, Any] = {}

    def logprob(method: str | None, prompt: list[int], choice: str) -> float:
        if method not in models:
            base = LlamaForCausalLM.from_pretrained(base_folder)
            models[method] = base if method is None else PeftModel.from_pretrained(base, adapter_folders[method])
            models[method].eval()
        tokens = tokenizer.encode(choice, add_special_tokens=False).ids
        ids = torch.tensor([prompt + tokens])
        with torch.inference_mode():
            logits = models[method](input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        return float(logits[-len(tokens) - 1 : -1].log_softmax(-1)[range(len(tokens)), tokens].sum())

    return logprob


def _score(http: httpx.Client, task: str, **body: Any) -> Any:
    response = http.post(f"/v1/tasks/{task}/score", json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("method", [None, "lora", "ia3", "prompt", "prefix"])
def test_each_choice_scores_as_alone(
    http: httpx.Client, tasks: dict[str, str], logprob_alone: LogProbs, method: str | None
) -> None:
    tokenizer = make_tokenizer()
    prompt = tokenizer.encode(TEXT).ids
    expected = [logprob_alone(method, prompt, choice) for choice in CHOICES]
    lengths = [len(tokenizer.encode(choice, add_special_tokens=False).ids) for choice in CHOICES]
    task = BASE_ID if method is None else tasks[method]
    for normalize, divisors in (("tokens", lengths), ("none", [1] * len(CHOICES))):
        answer = _score(http, task, input=TEXT, choices=CHOICES, normalize=normalize)
        assert [choice["text"] for choice in answer["choices"]] == CHOICES
        assert [choice["tokens"] for choice in answer["choices"]] == lengths
        assert [choice["logprob"] for choice in answer["choices"]] == pytest.approx(expected, abs=1e-3)
        values = [logprob / divisor for logprob, divisor in zip(expected, divisors, strict=True)]
        assert values[answer["best"]] == pytest.approx(max(values), abs=1e-3)
        assert answer["best"] != 5, "a tie is the first one's"
        assert answer["medley"]["methods"] == ([] if method is None else [answer["medley"]["methods"][0]])
        usage = answer["usage"]
        assert usage["prompt_tokens"] == usage["total_tokens"] == len(prompt) + sum(lengths)
        assert usage["prompt_tokens_details"]["virtual_tokens"] == {"prompt": 5, "prefix": 6}.get(method or "", 0)
    given = _score(http, task, prompt_token_ids=prompt, choices=CHOICES)
    assert [choice["logprob"] for choice in given["choices"]] == pytest.approx(expected, abs=1e-3)
    assert given["usage"]["prompt_tokens_details"]["cached_tokens"] >= len(prompt) - 1, "the input was run before"


def test_an_empty_input_is_scored_behind_a_soft_prompt_alone(
    http: httpx.Client, tasks: dict[str, str], logprob_alone: LogProbs
) -> None:
    expected = [logprob_alone("prompt", [], choice) for choice in CHOICES]
    answer = _score(http, tasks["prompt"], prompt_token_ids=[], choices=CHOICES)
    assert [choice["logprob"] for choice in answer["choices"]] == pytest.approx(expected, abs=1e-3)
    for task in (BASE_ID, tasks["lora"], tasks["prefix"]):
        response = http.post(f"/v1/tasks/{task}/score", json={"prompt_token_ids": [], "choices": CHOICES})
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("empty_prompt", "prompt_token_ids")


def test_without_choices_the_task_s_labels_are_scored_behind_its_template(
    http: httpx.Client, tasks: dict[str, str], logprob_alone: LogProbs
) -> None:
    task = tasks["lora"]
    refused = http.post(f"/v1/tasks/{task}/score", json={"input": "x"}).json()["error"]
    assert (refused["code"], refused["param"]) == ("invalid_request", "choices")
    settings = {"template": "{{ input }} at a", "labels": {"low": " low", "high": " average"}}
    try:
        assert http.put(f"/v1/tasks/{task}", json=settings).status_code == 200
        answer = _score(http, task, input="food")
    finally:
        http.put(f"/v1/tasks/{task}", json={"template": None, "labels": None})
    prompt = make_tokenizer().encode("food at a").ids
    assert [choice["label"] for choice in answer["choices"]] == ["low", "high"]
    assert [choice["logprob"] for choice in answer["choices"]] == pytest.approx(
        [logprob_alone("lora", prompt, " low"), logprob_alone("lora", prompt, " average")], abs=1e-3
    )


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"choices": ["a"]}, "invalid_request", None),
        ({"input": "a", "prompt_token_ids": [5], "choices": ["a"]}, "invalid_request", None),
        ({"prompt_token_ids": [], "choices": ["a"]}, "empty_prompt", "prompt_token_ids"),
        ({"prompt_token_ids": [10**6], "choices": ["a"]}, "invalid_request", "prompt_token_ids"),
        ({"input": "a", "choices": []}, "invalid_request", "choices"),
        ({"input": "a", "choices": ["a", ""]}, "invalid_request", "choices.1"),
        ({"input": "a", "choices": ["a", 3]}, "invalid_request", "choices.1"),
        ({"input": "a", "choices": ["a"] * 513}, "invalid_request", "choices"),
        ({"input": "a", "choices": ["a"], "normalize": "bytes"}, "invalid_request", "normalize"),
        ({"input": "a", "choices": ["a"], "temperature": 0}, "unknown_field", "temperature"),
        ({"input": "a", "choices": ["a", "high " * 200]}, "context_length_exceeded", "input"),
    ],
)
def test_a_wrong_body_is_refused_by_its_field(
    http: httpx.Client, body: dict[str, Any], code: str, param: str | None
) -> None:
    response = http.post(f"/v1/tasks/{BASE_ID}/score", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (code, param)


def test_an_unknown_task_is_404(http: httpx.Client) -> None:
    response = http.post("/v1/tasks/nobody/score", json={"input": "a", "choices": ["a"]})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "task_not_found")


def test_ties_are_the_first_ones_and_what_cannot_follow_is_a_number(scripted: Scripted) -> None:
    engine, http, _ = scripted()
    values = {0: -1.5, 1: -1.0, 2: -1.0, 3: float("-inf")}

    def answer(request: Generate) -> None:
        assert request.sampling.max_tokens == 0
        assert request.sampling.prompt_logprobs_from == 2
        scores: list[TokenLogprobs | None] = [TokenLogprobs(values[int(request.id.split("-")[-1])], {})]
        scores *= len(request.prompt) - 2
        engine.say(Tokens(id=request.id, token_ids=[], prompt_logprobs=scores, finish_reason="length"))

    engine.on_request = answer
    body = {"input": "a", "choices": ["b", "cd", "e", "f"]}
    found = _score(http, BASE_ID, **body)
    assert found["best"] == 1
    assert [choice["logprob"] for choice in found["choices"]] == [-1.5, -2.0, -1.0, -9999.0]
    assert _score(http, BASE_ID, **body, normalize="none")["best"] == 2
    metrics = http.get("/metrics").text
    assert 'medley_requests_total{outcome="ok",task="base"} 2.0' in metrics


def test_one_choice_that_fails_fails_the_request_and_ends_the_others(scripted: Scripted) -> None:
    engine, http, server = scripted()
    engine.on_request = lambda request: engine.fail(request.id, "queue_full") if request.id.endswith("-1") else None
    response = http.post(f"/v1/tasks/{BASE_ID}/score", json={"input": "a", "choices": ["b", "c", "d"]})
    assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
    assert {engine.aborted.get(timeout=10)[-2:] for _ in range(2)} == {"-0", "-2"}
    assert server.services.require_base().engine.open_sequences == 0


def test_a_client_that_leaves_ends_all_its_choices(scripted: Scripted) -> None:
    engine, http, server = scripted()

    def leave() -> None:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(
                f"{server.url}/v1/tasks/{BASE_ID}/score", json={"input": "a", "choices": ["b", "c"]}, timeout=0.5
            )

    client = threading.Thread(target=leave)
    client.start()
    ids = {engine.requests.get(timeout=10).id for _ in range(2)}
    client.join()
    assert {engine.aborted.get(timeout=10) for _ in range(2)} == ids
    assert 'outcome="cancelled"' in http.get("/metrics").text
