"""The examples that the OpenAPI document shows for each answer."""

from __future__ import annotations

from typing import Any

APPLIED = {
    "mode": "compose",
    "digest": "fcde2b2edba56bf408601fb721fe9b5c338d10ee429ea04fae5511b68fbf8fb9",
    "method": "lora",
    "made_against": 1,
    "created": 1767225700.0,
}
MEDLEY = {
    "task": "sentiment",
    "version": 1,
    "user": "ann",
    "customization": APPLIED,
    "methods": ["prompt_tuning", "lora"],
}
USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 2,
    "total_tokens": 11,
    "prompt_tokens_details": {"cached_tokens": 20, "virtual_tokens": 20},
}
COMPLETION = {
    "id": "cmpl-5f0c",
    "object": "text_completion",
    "created": 1767225600,
    "model": "sentiment",
    "choices": [{"index": 0, "text": " positive", "logprobs": None, "finish_reason": "stop"}],
    "usage": USAGE,
    "medley": MEDLEY,
}
CHAT = {
    "id": "chatcmpl-5f0c",
    "object": "chat.completion",
    "created": 1767225600,
    "model": "sentiment",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "positive", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ],
    "usage": USAGE,
    "medley": MEDLEY,
}
GENERATED = {
    "task": "sentiment",
    "version": 1,
    "output": "positive",
    "finish_reason": "stop",
    "usage": USAGE,
    "medley": MEDLEY,
}
MODEL = {"id": "sentiment", "object": "model", "created": 1767225600, "owned_by": "medley", "parent": "medley-demo"}
VERSION = {
    "task": "sentiment",
    "version": 1,
    "digest": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "method": "prompt_tuning",
    "parameters": 5120,
    "bytes": 20992,
    "virtual_tokens": 20,
    "rank": None,
    "active": True,
    "servable": True,
    "warnings": [],
    "created": 1767225600.0,
    "files": [{"name": "adapter_config.json", "sha256": "0a1b…", "bytes": 512}],
}
CUSTOMIZATION = {
    "user": "ann",
    "task": "sentiment",
    **APPLIED,
    "parameters": 2048,
    "bytes": 8704,
    "virtual_tokens": 0,
    "rank": 4,
    "servable": True,
    "files": [{"name": "adapter_config.json", "sha256": "0a1b…", "bytes": 512}],
}
TASK = {
    "task": "sentiment",
    "description": "Is a review good or bad?",
    "template": "Review: {{ input }}\nSentiment:",
    "defaults": {"temperature": 0.0, "max_tokens": 4},
    "labels": {},
    "public": False,
    "pinned": False,
    "customization": {"methods": ["lora"], "max_virtual_tokens": None, "max_parameters": 100000, "max_bytes": None},
    "revision": 2,
    "active": 1,
    "previous": None,
    "canary": None,
    "methods": ["prompt_tuning"],
    "bytes": 20992,
    "created": 1767225600.0,
    "updated": 1767225600.0,
    "last_used": 1767225900.0,
}
HISTORY_ENTRY = {
    "id": 7,
    "time": 1767225600.0,
    "action": "version_activated",
    "actor": "key-5f0c1a2b3c4d",
    "request_id": "f3a9",
    "detail": {"version": 2, "previous": 1},
}
METHOD = {
    "method": "lora",
    "mechanism": "row delta: low rank",
    "formats": ["PEFT LORA"],
    "parameters_per_layer": "r·(in + out) for each targeted module",
    "cost": "two thin matrix products at each targeted module",
}
ERROR = {
    "error": {
        "message": "there is no task 'sentimant'",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
}


ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"description": "Any error", "content": {"application/json": {"example": ERROR}}}
}


def answers(
    example: Any, *, status: int = 200, description: str = "Done", stream: bool = False
) -> dict[int | str, Any]:
    """The `responses` of a route: its answer, and the one shape of its errors."""
    content: dict[str, Any] = {"application/json": {"example": example}}
    if stream:
        content["text/event-stream"] = {"example": "data: {…}\n\ndata: [DONE]\n\n"}
    return {status: {"description": description, "content": content}, **ERRORS}
