"""`/v1/chat/completions` through the public client, against the real engine."""

from __future__ import annotations

from typing import Any

import httpx
import openai
from openai.types.chat import ChatCompletionUserMessageParam

from tests.api.conftest import BASE_ID as BASE

MESSAGES: list[Any] = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": [{"type": "text", "text": "Good "}, {"type": "text", "text": "food?"}]},
]
RENDERED = "<s><|system|>Be kind.\n<|user|>Good food?\n<|assistant|>"


def test_a_chat_is_the_completion_of_its_rendered_template(client: openai.OpenAI, http: httpx.Client) -> None:
    answer = client.chat.completions.create(model=BASE, messages=MESSAGES, max_tokens=8, temperature=0)
    [choice] = answer.choices
    assert (answer.object, choice.message.role, choice.finish_reason) == ("chat.completion", "assistant", "length")
    ids = http.post(
        "/v1/chat/completions",
        json={"model": BASE, "messages": MESSAGES, "max_tokens": 8, "temperature": 0, "return_token_ids": True},
    ).json()["choices"][0]["prompt_token_ids"]
    completion = client.completions.create(model=BASE, prompt=ids, max_tokens=8, temperature=0)
    assert choice.message.content == completion.choices[0].text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)
    echoed = client.completions.create(model=BASE, prompt=ids, max_tokens=0, echo=True, logprobs=0)
    assert echoed.choices[0].logprobs is not None
    assert "".join(echoed.choices[0].logprobs.tokens or []) == RENDERED, "special tokens of the template, once"


def test_a_chat_stream_adds_up(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": BASE, "messages": MESSAGES, "max_tokens": 30, "temperature": 1.0, "seed": 8, "n": 2}
    whole = client.chat.completions.create(**ask)
    texts, roles = ["", ""], ["", ""]
    last = None
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        last = chunk
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += choice.delta.role or ""
    assert texts == [choice.message.content for choice in whole.choices]
    assert roles == ["assistant", "assistant"]
    assert last is not None
    assert last.usage is not None
    assert whole.usage is not None
    cached = {"prompt_tokens_details": {"cached_tokens"}}  # the second finds the first's text
    assert last.usage.model_dump(exclude=cached) == whole.usage.model_dump(exclude=cached)


def test_chat_logprobs_have_bytes_and_exactly_the_alternatives_asked_for(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=BASE, messages=MESSAGES, max_completion_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 5
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == entry.logprob
        assert entry.bytes is not None
    joined = b"".join(bytes(entry.bytes or []) for entry in logprobs.content)
    assert joined.decode(errors="replace") == answer.choices[0].message.content


def test_without_a_limit_a_chat_may_fill_the_models_length(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=BASE, messages=MESSAGES, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.total_tokens == 256


def test_a_tasks_own_template_wins_in_chat(http: httpx.Client, tasks: dict[str, str], client: openai.OpenAI) -> None:
    http.put(f"/v1/tasks/{tasks['ia3']}", json={"template": "Review: {{ input }} ({{ messages | length }})\n"})
    message: ChatCompletionUserMessageParam = {"role": "user", "content": "Nice."}
    chat = client.chat.completions.create(model=tasks["ia3"], messages=[message], max_tokens=8, temperature=0)
    text = "Review: Nice. (1)\n"
    completion = client.completions.create(model=tasks["ia3"], prompt=text, max_tokens=8, temperature=0)
    http.put(f"/v1/tasks/{tasks['ia3']}", json={"template": None})
    assert chat.choices[0].message.content == completion.choices[0].text


def test_unsupported_features_are_refused_by_name(http: httpx.Client) -> None:
    harmless = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "service_tier": "auto"}
    body: dict[str, Any] = {"model": BASE, "messages": MESSAGES, "max_tokens": 1}
    assert http.post("/v1/chat/completions", json={**body, **harmless, "store": False}).status_code == 200
    asked = {
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "response_format": {"type": "json_object"},
        "store": True,
    }
    for field, value in asked.items():
        error = http.post("/v1/chat/completions", json={**body, field: value}).json()["error"]
        assert (error["code"], error["param"]) == ("unsupported", field)
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]
    error = http.post("/v1/chat/completions", json={**body, "messages": picture}).json()["error"]
    assert (error["code"], error["param"]) == ("unsupported", "messages.0.content")
