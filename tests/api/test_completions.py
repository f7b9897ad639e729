"""`/v1/completions` through the public client, against the real engine."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from tokenizers import Tokenizer

from tests.api.conftest import BASE_ID as BASE
from tests.api.server_thread import ServerThread

PROMPT = "The restaurant on the river"


@pytest.fixture(scope="module")
def tokenizer(server: ServerThread) -> Tokenizer:
    assert server.facts.tokenizer is not None
    return Tokenizer.from_str(server.facts.tokenizer)


def complete(http: httpx.Client, **body: Any) -> dict[str, Any]:
    response = http.post("/v1/completions", json={"model": BASE, "max_tokens": 8, "temperature": 0, **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_a_completion_has_text_usage_and_what_was_applied(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = client.completions.create(model=BASE, prompt=PROMPT, max_tokens=8, temperature=0)
    [choice] = answer.choices
    assert (answer.object, choice.finish_reason) == ("text_completion", "length")
    assert choice.text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer.encode(PROMPT).ids)
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (8, answer.usage.prompt_tokens + 8)
    applied: dict[str, Any] = {"task": None, "version": None, "user": None, "customization": None, "methods": []}
    assert answer.model_extra is not None
    assert answer.model_extra["medley"] == applied


def test_openai_default_is_sixteen_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=BASE, prompt=PROMPT, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize("method", ["lora", "ia3", "prompt", "prefix"])
def test_each_method_is_applied_and_named(client: openai.OpenAI, tasks: dict[str, str], method: str) -> None:
    base = client.completions.create(model=BASE, prompt=PROMPT, max_tokens=12, temperature=0)
    tuned = client.completions.create(model=tasks[method], prompt=PROMPT, max_tokens=12, temperature=0)
    assert tuned.choices[0].text != base.choices[0].text
    medley = tuned.model_extra["medley"] if tuned.model_extra else {}
    assert (medley["task"], medley["version"], len(medley["methods"])) == (tasks[method], 1, 1)
    pinned = client.completions.create(model=f"{tasks[method]}@1", prompt=PROMPT, max_tokens=12, temperature=0)
    assert pinned.choices[0].text == tuned.choices[0].text


def test_virtual_tokens_are_counted_apart(http: httpx.Client, tasks: dict[str, str], tokenizer: Tokenizer) -> None:
    usage = complete(http, model=tasks["prompt"], prompt=PROMPT)["usage"]
    assert usage["prompt_tokens"] == len(tokenizer.encode(PROMPT).ids)
    assert usage["prompt_tokens_details"]["virtual_tokens"] == 5
    again = complete(http, model=tasks["prompt"], prompt=PROMPT)["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] == 8  # they and the text that fills their page


def test_a_stream_adds_up_to_the_answer_without_streaming(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": BASE, "prompt": PROMPT, "max_tokens": 40, "temperature": 1.0, "seed": 11}
    whole = client.completions.create(**ask, n=3)
    chunks = list(client.completions.create(**ask, n=3, stream=True, stream_options={"include_usage": True}))
    texts, reasons = ["", "", ""], ["", "", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert len(set(texts)) == 3, "choices differ"
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    cached = {"prompt_tokens_details": {"cached_tokens"}}  # the second finds the first's text
    assert chunks[-1].usage.model_dump(exclude=cached) == whole.usage.model_dump(exclude=cached)
    assert chunks[-1].choices == []
    for sent in (chunks, list(client.completions.create(**ask, n=3, stream=True))):
        marked = ["medley" in (chunk.model_extra or {}) for chunk in sent]
        assert marked == [True] + [False] * (len(sent) - 2) + [True]


def test_a_seed_repeats_and_none_differs(http: httpx.Client) -> None:
    ask = {"prompt": PROMPT, "temperature": 1.5, "max_tokens": 24}
    seeded = [complete(http, **ask, seed=-3)["choices"][0]["text"] for _ in range(2)]
    free = [complete(http, **ask)["choices"][0]["text"] for _ in range(2)]
    assert seeded[0] == seeded[1]
    assert free[0] != free[1]


def test_list_prompts_give_choices_in_order(http: httpx.Client) -> None:
    prompts = [PROMPT, "A family friendly place"]
    both = complete(http, prompt=prompts, n=2)
    single = [complete(http, prompt=prompt)["choices"][0]["text"] for prompt in prompts]
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in both["choices"]] == [single[0], single[0], single[1], single[1]]


def test_token_ids_are_taken_as_they_are(http: httpx.Client, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT).ids
    text = complete(http, prompt=PROMPT, return_token_ids=True)
    tokens = complete(http, prompt=ids, return_token_ids=True)
    assert tokens["choices"] == text["choices"]
    assert tokens["choices"][0]["prompt_token_ids"] == ids
    assert len(tokens["choices"][0]["token_ids"]) == 8
    bare = complete(http, prompt=ids[1:], return_token_ids=True)["choices"][0]
    assert bare["prompt_token_ids"] == ids[1:], "no special token is added to ids"
    assert complete(http, prompt=[ids, ids])["choices"][1]["text"] == tokens["choices"][0]["text"]


def test_text_is_that_of_the_tokens(http: httpx.Client, tokenizer: Tokenizer) -> None:
    choice = complete(http, prompt=PROMPT, max_tokens=64, temperature=1.2, seed=4, return_token_ids=True)["choices"][0]
    together = tokenizer.decode(tokenizer.encode(PROMPT).ids + choice["token_ids"])
    assert PROMPT + choice["text"] == together


def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": BASE, "prompt": PROMPT, "max_tokens": 48, "temperature": 1.0, "seed": 2}
    whole = client.completions.create(**ask).choices[0].text
    stop = whole[9:13]  # across a border of tokens, wherever that is
    cut = client.completions.create(**ask, stop=["never", stop])
    assert cut.choices[0].text == whole[: whole.index(stop)]
    assert cut.choices[0].finish_reason == "stop"
    assert cut.usage is not None
    assert cut.usage.completion_tokens < 48
    chunks = list(client.completions.create(**ask, stop=stop, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == cut.choices[0].text


def test_stop_strings_wait_for_min_tokens(http: httpx.Client) -> None:
    ask = {"prompt": PROMPT, "max_tokens": 30, "ignore_eos": True}
    whole = complete(http, **ask)["choices"][0]["text"]
    early = complete(http, **ask, stop=whole[0])
    late = complete(http, **ask, stop=whole[0], min_tokens=30)
    assert early["choices"][0]["text"] == ""
    assert late["choices"][0]["text"] == whole


def test_stop_token_ids_stop(http: httpx.Client) -> None:
    whole = complete(http, prompt=PROMPT, return_token_ids=True, ignore_eos=True)["choices"][0]
    last = whole["token_ids"][-1]
    cut = complete(http, prompt=PROMPT, return_token_ids=True, ignore_eos=True, stop_token_ids=[last])["choices"][0]
    assert cut["token_ids"] == whole["token_ids"][: whole["token_ids"].index(last)]
    assert cut["finish_reason"] == "stop"


def test_logit_bias_forces_a_token(http: httpx.Client) -> None:
    choice = complete(http, prompt=PROMPT, max_tokens=3, logit_bias={"70": 100}, return_token_ids=True)["choices"][0]
    assert choice["token_ids"] == [70, 70, 70]


def test_logprobs_come_in_four_lists(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=BASE, prompt=PROMPT, max_tokens=6, temperature=0, logprobs=2)
    [choice] = answer.choices
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert "".join(logprobs.tokens) == choice.text or "bytes:" in "".join(logprobs.tokens)
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values()), "greedy takes the likeliest"
        assert 2 <= len(top) <= 3
    assert logprobs.text_offset is not None
    assert logprobs.text_offset[0] == 0


def test_echo_puts_the_prompt_before_the_answer(http: httpx.Client, tokenizer: Tokenizer) -> None:
    plain = complete(http, prompt=PROMPT)["choices"][0]["text"]
    choice = complete(http, prompt=PROMPT, echo=True, logprobs=1)["choices"][0]
    assert choice["text"] == PROMPT + plain
    prompt_ids = tokenizer.encode(PROMPT).ids
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(prompt_ids) + 8
    assert logprobs["token_logprobs"][0] is None
    assert all(value < 0 for value in logprobs["token_logprobs"][1:])
    first = len(prompt_ids)
    assert logprobs["text_offset"][first] == len(PROMPT)
    assert choice["text"][logprobs["text_offset"][2] :].startswith(logprobs["tokens"][2])


def test_max_tokens_zero_with_echo_scores_the_prompt(http: httpx.Client, tokenizer: Tokenizer) -> None:
    answer = complete(http, prompt=PROMPT, max_tokens=0, echo=True, logprobs=0)
    [choice] = answer["choices"]
    assert choice["text"] == PROMPT
    assert len(choice["logprobs"]["tokens"]) == len(tokenizer.encode(PROMPT).ids)
    assert answer["usage"]["completion_tokens"] == 0
    assert not any(math.isnan(value) for value in choice["logprobs"]["token_logprobs"][1:])


def test_streamed_logprobs_and_ids_are_those_of_the_answer(http: httpx.Client, client: openai.OpenAI) -> None:
    extra = {"return_token_ids": True}
    ask: dict[str, Any] = {"model": BASE, "prompt": PROMPT, "max_tokens": 6, "temperature": 0, "logprobs": 1}
    whole = client.completions.create(**ask, echo=True, extra_body=extra).choices[0]
    tokens: list[str] = []
    ids: list[int] = []
    for chunk in client.completions.create(**ask, echo=True, stream=True, extra_body=extra):
        logprobs = chunk.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        tokens += logprobs.tokens
        ids += (chunk.choices[0].model_extra or {})["token_ids"]
    assert whole.logprobs is not None
    assert tokens == whole.logprobs.tokens
    assert ids == (whole.model_extra or {})["token_ids"]


def test_an_empty_text_goes_on_from_a_soft_prompt_and_is_refused_over_a_prefix(
    http: httpx.Client, tasks: dict[str, str]
) -> None:
    assert complete(http, model=tasks["prompt"], prompt=[[]])["choices"][0]["text"]
    refused = http.post("/v1/completions", json={"model": tasks["prefix"], "prompt": [[]], "stream": True})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "empty_prompt")


def test_a_prompt_that_leaves_no_room_is_refused(http: httpx.Client, tasks: dict[str, str]) -> None:
    ids = [70] * 250
    assert complete(http, prompt=ids, max_tokens=6)
    body = {"model": tasks["prompt"], "prompt": ids, "max_tokens": 6}  # five virtual tokens more
    refused = http.post("/v1/completions", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_a_full_queue_answers_429_with_retry_after_and_the_rest_is_served(http: httpx.Client) -> None:
    body = {"model": BASE, "prompt": [PROMPT] * 8, "n": 4, "max_tokens": 200, "ignore_eos": True}
    with ThreadPoolExecutor(8) as pool:  # 256 sequences for 32 rows and 64 places
        responses = list(pool.map(lambda _: http.post("/v1/completions", json=body), range(8)))
    assert {response.status_code for response in responses} == {200, 429}
    for response in responses:
        if response.status_code == 429:
            assert response.json()["error"]["code"] == "queue_full"
            assert int(response.headers["retry-after"]) > 0
    assert complete(http, prompt=PROMPT)
