"""What the server writes beside an upload's files: what follows from them once, and must never follow otherwise again.

`medley.json` is a file of the version like the others, and part of the adapter's identity:

    {"token_ids": […]}    of a text prompt: its text, by the base's tokenizer as it is today
    {"task_index": k}     of a checkpoint that holds several tasks: which of them this version is

The engine reads it and knows no text. What a text prompt's config holds:
`server.adapters.methods.text_prompt`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec

from server.api.services import ServedBase
from server.api.templates import PromptTemplate
from server.errors import AdapterError

DERIVED_FILE = "medley.json"
_TEXT_PROMPT = "text_prompt"
_MOST_CONFIG_BYTES = 2**20  # what the engine reads


def write_task_index(folder: Path, index: int) -> None:
    """Say which task of its checkpoint a version is."""
    (folder / DERIVED_FILE).write_bytes(msgspec.json.encode({"task_index": index}))


async def write_token_ids(base: ServedBase, folder: Path) -> None:
    """Encode the text of a text prompt; does nothing for what is none, or has no text. Raises `AdapterError`.

    The text is encoded as it stands, without special tokens around it.
    """
    config = await asyncio.to_thread(_text_prompt_config, folder)
    if config is None or not ("text" in config or "examples" in config):
        return
    text = _text(config)
    token_ids = await base.require_tokenizer("text").encode(text, special_tokens=False)
    content = msgspec.json.encode({"token_ids": token_ids})
    await asyncio.to_thread((folder / DERIVED_FILE).write_bytes, content)


def _text_prompt_config(folder: Path) -> dict[str, Any] | None:
    """The config of a text prompt. A file that is none is the engine's to refuse, with all else that is wrong."""
    path = folder / "adapter_config.json"
    if path.stat().st_size > _MOST_CONFIG_BYTES:
        return None
    try:
        config = msgspec.json.decode(path.read_bytes())
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return config if isinstance(config, dict) and config.get("medley_method") == _TEXT_PROMPT else None


def _text(config: dict[str, Any]) -> str:
    """The text, or the examples through their template."""
    if "text" in config:
        if not isinstance(config["text"], str):
            raise AdapterError("bad_config", f"text is {config['text']!r:.80}; it must be a string", "text")
        return config["text"]
    template, examples = config.get("template"), config["examples"]
    if not isinstance(template, str):
        message = f"template is {template!r:.80}; examples need a Jinja template over input and output"
        raise AdapterError("bad_config", message, "template")
    if not isinstance(examples, list) or not all(_is_example(example) for example in examples):
        message = 'examples must be a list of {"input": text, "output": text}'
        raise AdapterError("bad_config", message, "examples")
    compiled = PromptTemplate(template, param="template")
    return "".join(compiled.render(example) for example in examples)


def _is_example(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"input", "output"}
        and all(isinstance(text, str) for text in value.values())
    )
