"""Every error has OpenAI's shape, a stable code, and names the field at fault."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.api.conftest import BASE_ID as BASE

GOOD: dict[str, Any] = {"model": BASE, "prompt": "x", "max_tokens": 1}


def check_shape(response: httpx.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert response.headers["content-type"] == "application/json"
    return error


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"model": None}, "invalid_request", "model"),
        ({"model": "nobody"}, "model_not_found", "model"),
        ({"model": f"{BASE}@1"}, "model_not_found", "model"),
        ({"prompt": None}, "invalid_request", "prompt"),
        ({"prompt": []}, "invalid_request", "prompt"),
        ({"prompt": [1, "a"]}, "invalid_request", "prompt"),
        ({"prompt": [100_000]}, "invalid_request", "prompt"),
        ({"prompt": [-1]}, "invalid_request", "prompt"),
        ({"prompt": ["x"] * 9}, "invalid_request", "prompt"),
        ({"max_tokens": -1}, "invalid_request", "max_tokens"),
        ({"max_tokens": 10**30}, "invalid_request", "max_tokens"),
        ({"min_tokens": 2**31}, "invalid_request", "min_tokens"),
        ({"max_tokens": "5"}, "invalid_request", "max_tokens"),
        ({"max_tokens": 1000}, "context_length_exceeded", "max_tokens"),
        ({"prompt": [70] * 300}, "context_length_exceeded", "prompt"),
        ({"min_tokens": 2}, "invalid_request", "min_tokens"),
        ({"temperature": 2.5}, "invalid_request", "temperature"),
        ({"top_p": 0}, "invalid_request", "top_p"),
        ({"top_k": -2}, "invalid_request", "top_k"),
        ({"top_k": 2**63}, "invalid_request", "top_k"),
        ({"min_p": 1.5}, "invalid_request", "min_p"),
        ({"repetition_penalty": 0}, "invalid_request", "repetition_penalty"),
        ({"presence_penalty": 3}, "invalid_request", "presence_penalty"),
        ({"frequency_penalty": -3}, "invalid_request", "frequency_penalty"),
        ({"n": 0}, "invalid_request", "n"),
        ({"n": 5}, "invalid_request", "n"),
        ({"logprobs": 21}, "invalid_request", "logprobs"),
        ({"logit_bias": {"a": 1}}, "invalid_request", "logit_bias"),
        ({"logit_bias": {"5": 101}}, "invalid_request", "logit_bias.5"),
        ({"logit_bias": {"5000": 1}}, "invalid_request", "logit_bias"),
        ({"stop": [""]}, "invalid_request", "stop"),
        ({"stop": ["a"] * 17}, "invalid_request", "stop"),
        ({"stop_token_ids": [5000]}, "invalid_request", "stop_token_ids"),
        ({"seed": 2**63}, "invalid_request", "seed"),
        ({"best_of": 3}, "unsupported", "best_of"),
        ({"suffix": "y"}, "unsupported", "suffix"),
        ({"stream_options": {"include": 1}}, "unknown_field", "stream_options.include"),
        ({"use_beam_search": True}, "unknown_field", "use_beam_search"),
    ],
)
def test_a_bad_field_is_refused_by_name(http: httpx.Client, changes: dict[str, Any], code: str, param: str) -> None:
    body = {name: value for name, value in {**GOOD, **changes}.items() if value is not None}
    response = http.post("/v1/completions", json=body)
    error = check_shape(response)
    assert (error["code"], error["param"]) == (code, param)
    assert response.status_code == (404 if code == "model_not_found" else 400)
    assert error["type"] == "invalid_request_error"


def test_openais_own_harmless_fields_are_taken(http: httpx.Client) -> None:
    harmless: dict[str, Any] = {
        "best_of": 1,
        "suffix": None,
        "service_tier": "auto",
        "store": False,
        "metadata": {},
        "user": "ann",
    }
    assert http.post("/v1/completions", json={**GOOD, **harmless}).status_code == 200


@pytest.mark.parametrize("content", [b"{", b"", b"[]", b"\xff", b'"x"'])
def test_a_body_that_is_no_object_is_refused(http: httpx.Client, content: bytes) -> None:
    response = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    check_shape(response)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999"])
def test_numbers_are_finite(http: httpx.Client, value: str) -> None:
    content = f'{{"model": "{BASE}", "prompt": "x", "temperature": {value}}}'
    response = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert check_shape(response)["param"] == "temperature"


@pytest.mark.parametrize("field", ["model", "prompt", "stop", "user"])
def test_half_a_surrogate_pair_is_refused_by_the_field_that_holds_it(http: httpx.Client, field: str) -> None:
    content = json.dumps({**GOOD, field: "a\ud800"})
    response = http.post("/v1/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert check_shape(response)["param"] == field


def test_unknown_paths_and_methods_have_the_same_shape(http: httpx.Client) -> None:
    response = http.get("/v1/nothing")
    assert (response.status_code, check_shape(response)["code"]) == (404, "not_found")
    response = http.put("/v1/completions")
    assert (response.status_code, check_shape(response)["code"]) == (405, "method_not_allowed")
    assert response.headers["allow"] == "POST"


def test_the_openai_client_understands_our_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="nobody", prompt="x")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=BASE, prompt="x", max_tokens=1000, stream=True)
    assert refused.value.code == "context_length_exceeded"


def test_a_body_over_the_limit_is_refused_declared_or_not(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={**GOOD, "prompt": "x" * 2**16})
    assert (response.status_code, check_shape(response)["code"]) == (413, "too_large")

    def chunks() -> Any:
        for _ in range(9):
            yield b" " * 2**13

    response = http.post("/v1/completions", content=chunks(), headers={"content-type": "application/json"})
    assert (response.status_code, check_shape(response)["code"]) == (413, "too_large")
