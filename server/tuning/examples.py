"""Training data: JSON lines of {"input", "output"}, read and checked line by line. Knows no model."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

from server.tuning.errors import TuneError

FIELDS = ("input", "output")


@dataclass(frozen=True)
class Example:
    """One line of the data; `where` names its file and line, counted from 1."""

    input: str
    output: str
    where: str


def read_examples(path: Path) -> list[Example]:
    """The examples of a file in their order; empty lines are passed over.

    Raises `TuneError` that names the line and the field at fault, or says that the file holds no example.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with the byte order mark
    except OSError as error:
        raise TuneError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise TuneError(f"{path}, line {line}: is not UTF-8 text") from error
    # Not `splitlines`: JSON strings may hold other line separators of Unicode unescaped.
    examples = [
        _parse(line, f"{path}, line {number}") for number, line in enumerate(text.split("\n"), start=1) if line.strip()
    ]
    if not examples:
        raise TuneError(f'{path}: holds no example; each line must be {{"input": "…", "output": "…"}}')
    return examples


def _parse(line: str, where: str) -> Example:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise TuneError(f"{where}: is not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(record, dict):
        raise TuneError(f'{where}: must be an object {{"input": "…", "output": "…"}}')
    for name in FIELDS:
        if name not in record:
            raise TuneError(f"{where}: the field `{name}` is missing")
        if not isinstance(record[name], str):
            raise TuneError(f"{where}: the field `{name}` must be a string")
        if any("\ud800" <= character <= "\udfff" for character in record[name]):
            raise TuneError(f"{where}: the field `{name}` has half of a surrogate pair, which is no text; mend it")
    unknown = sorted(set(record) - set(FIELDS))
    if unknown:
        raise TuneError(f"{where}: unknown field `{unknown[0]}`; an example has only `input` and `output`")
    if not record["output"]:
        raise TuneError(f"{where}: the field `output` is empty; an example needs one")
    return Example(record["input"], record["output"], where)


def split_examples(examples: list[Example], validation_share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Training and validation examples: a random share is held back, one example at least.

    Raises `TuneError` where that would leave no training example.
    """
    shuffled = list(examples)
    random.Random(seed).shuffle(shuffled)
    held_back = max(1, round(len(shuffled) * validation_share))
    if held_back >= len(shuffled):
        raise TuneError(
            f"the data holds {len(examples)} example(s): too few to hold some back; add more or name a validation file"
        )
    return shuffled[held_back:], shuffled[:held_back]
