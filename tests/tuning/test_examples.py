"""Data is read line by line, and what is wrong with it is said with the line."""

from collections.abc import Callable
from pathlib import Path

import pytest

from server.tuning import Example, TuneError, read_examples
from server.tuning.examples import split_examples

GOOD = {"input": "a", "output": "b"}
WriteLines = Callable[..., Path]


def test_lines_become_examples_in_order_with_their_line_numbers(write_lines: WriteLines) -> None:
    path = write_lines(GOOD, "", {"output": "d", "input": "c\u2028"})
    assert read_examples(path) == [Example("a", "b", f"{path}, line 1"), Example("c\u2028", "d", f"{path}, line 3")]


def test_an_unescaped_unicode_line_separator_does_not_end_a_line(write_lines: WriteLines) -> None:
    (example,) = read_examples(write_lines('{"input": "a\u2028b", "output": "c"}'))
    assert example.input == "a\u2028b"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: is not JSON: .* at column 2"),
        ("[]", r"line 2: must be an object"),
        ({"input": "a"}, r"line 2: the field `output` is missing"),
        ({"output": "a"}, r"line 2: the field `input` is missing"),
        ({"input": 1, "output": "a"}, r"line 2: the field `input` must be a string"),
        ({"input": "a", "output": ""}, r"line 2: the field `output` is empty"),
        ({"input": "a\ud800", "output": "a"}, r"line 2: the field `input` has half of a surrogate pair"),
        ('{"input": "a", "output": "\\udfff"}', r"line 2: the field `output` has half"),
        ({**GOOD, "label": "x"}, r"line 2: unknown field `label`"),
    ],
)
def test_a_bad_line_is_refused_by_number_and_field(write_lines: WriteLines, line: object, message: str) -> None:
    with pytest.raises(TuneError, match=message):
        read_examples(write_lines(GOOD, line, GOOD))


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"input": "a", "output": "b"}\n')
    assert read_examples(path) == [Example("a", "b", f"{path}, line 1")]


def test_text_that_is_not_utf8_is_refused_by_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"input": "a", "output": "b"}\n{"input": "\xff", "output": "b"}\n')
    with pytest.raises(TuneError, match="line 2: is not UTF-8"):
        read_examples(path)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_blank_file_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(TuneError, match="holds no example"):
        read_examples(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TuneError, match="cannot be read"):
        read_examples(tmp_path / "absent.jsonl")


def test_a_split_shares_no_example_and_loses_none() -> None:
    examples = [Example(str(i), "x", f"line {i:02}") for i in range(30)]
    training, validation = split_examples(examples, 0.1, seed=1)
    assert len(validation) == 3
    assert sorted(training + validation, key=lambda example: example.where) == examples
    assert split_examples(examples, 0.1, seed=1) == (training, validation)


def test_one_example_is_too_few_to_split() -> None:
    with pytest.raises(TuneError, match="too few"):
        split_examples([Example("a", "b", "line 1")], 0.1, seed=0)
