"""Law 3: a version never changes, and a request ends on the version that it started on."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from tests.api.conftest import folder_files

STREAMS = 12
LENGTH = 200  # tokens: the switch comes while they run


def _body(model: str, prompt: list[int], **fields: Any) -> dict[str, Any]:
    greedy = {"temperature": 0, "ignore_eos": True, "return_token_ids": True, "max_tokens": LENGTH}
    return {"model": model, "prompt": prompt, **greedy, **fields}


def _events(response: httpx.Response) -> list[dict[str, Any]]:
    lines = (line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {"))
    return [json.loads(line) for line in lines]


def _token_ids(events: list[dict[str, Any]]) -> list[int]:
    return [token for event in events for choice in event["choices"] for token in choice.get("token_ids") or []]


def test_a_request_ends_on_the_version_it_started_on_whatever_is_published_switched_or_deleted(
    http: httpx.Client, adapter_folders: dict[str, Path]
) -> None:
    task = "law-3"
    first = http.post(f"/v1/tasks/{task}/versions", files=folder_files(adapter_folders["lora"])).json()["version"]
    prompts = [[5 + index, 9, 14] for index in range(STREAMS)]
    alone = [http.post("/v1/completions", json=_body(f"{task}@{first}", prompt)).json() for prompt in prompts]
    with ExitStack() as streams:
        started = [
            streams.enter_context(http.stream("POST", "/v1/completions", json=_body(task, prompt, stream=True)))
            for prompt in prompts
        ]
        upload = http.post(f"/v1/tasks/{task}/versions", files=folder_files(adapter_folders["ia3"]))
        second = upload.json()["version"]
        assert http.delete(f"/v1/tasks/{task}/versions/{first}").status_code == 204
        after = http.post("/v1/completions", json=_body(task, prompts[0], max_tokens=4)).json()
        heard = [_events(response) for response in started]
    assert after["medley"]["version"] == second
    for events, expected in zip(heard, alone, strict=True):
        assert events[0]["medley"]["version"] == events[-1]["medley"]["version"] == first
        assert _token_ids(events) == expected["choices"][0]["token_ids"]
    http.delete(f"/v1/tasks/{task}")
