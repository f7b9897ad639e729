"""`medley evaluate`: its figures against the server's own answers, one by one; and `show --neighbours`."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import httpx
import pytest
from typer.testing import CliRunner, Result

from server.cli.app import app
from server.cli.errors import CommandError
from server.cli.evaluate import compare, wanted_text
from tests.cli.conftest import Medley
from tests.cli.test_classify import write_classifier
from tests.server_process import (
    MEDLEY,
    PATIENCE_SECONDS,
    ServerProcess,
    environment,
    generate,
    one_line,
    run_medley,
    upload,
)

AWAY, FULL = "away", "full"
INPUTS = ["The food", "A river", "good price and", "near the station", "an average", "low", "emoji", "serves"]


@pytest.fixture(scope="module")
def task(server: ServerProcess, adapters: dict[str, Path]) -> str:
    assert upload(server.url, "judged", adapters["prompt"]).status_code == 201
    return "judged"


def _lines(path: Path, pairs: list[tuple[str, str]]) -> str:
    path.write_text("".join(json.dumps({"input": given, "output": output}) + "\n" for given, output in pairs))
    return str(path)


def _score(server: ServerProcess, task: str, **body: Any) -> Any:
    response = httpx.post(f"{server.url}/v1/tasks/{task}/score", json=body, timeout=PATIENCE_SECONDS)
    assert response.status_code == 200, response.text
    return response.json()


def test_accuracy_is_the_share_of_lines_whose_choice_scores_best(
    medley: Medley, server: ServerProcess, task: str, tmp_path: Path
) -> None:
    choices = [" good", " low", " average"]
    best = [_score(server, task, input=given, choices=choices)["best"] for given in INPUTS]
    wrong = [(index + 1) % 3 if at < 3 else index for at, index in enumerate(best)]
    data = _lines(
        tmp_path / "data.jsonl", [(given, choices[at].strip()) for given, at in zip(INPUTS, wrong, strict=True)]
    )
    options = [option for choice in choices for option in ("--choices", choice)]
    result = medley("evaluate", task, data, *options, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {
        "task": task,
        "versions": [1],
        "examples": 8,
        "metrics": {"accuracy": pytest.approx(5 / 8)},
    }
    table = medley("evaluate", task, data, *options, "--limit", "3", "--concurrency", "2")
    assert table.stdout.splitlines() == ["metric\tvalue", "accuracy\t0.0000", "examples\t3"]
    labels = {"labels": {"yes": " good", "no": " low", "so": " average"}}
    httpx.put(f"{server.url}/v1/tasks/{task}", json=labels, timeout=PATIENCE_SECONDS).raise_for_status()
    named = _lines(
        tmp_path / "named.jsonl", [(given, ["yes", "no", "so"][at]) for given, at in zip(INPUTS, best, strict=True)]
    )
    by_labels = medley("evaluate", task, named, "--json")
    httpx.put(f"{server.url}/v1/tasks/{task}", json={"labels": None}, timeout=PATIENCE_SECONDS).raise_for_status()
    assert json.loads(by_labels.stdout)["metrics"] == {"accuracy": 1.0}


def test_without_choices_it_generates_and_compares(
    medley: Medley, server: ServerProcess, task: str, tmp_path: Path
) -> None:
    outputs = [generate(server.url, task, input=given, max_tokens=6).json()["output"] for given in INPUTS]
    pairs = [
        (given, output if at % 2 else "something else")
        for at, (given, output) in enumerate(zip(INPUTS, outputs, strict=True))
    ]
    data = _lines(tmp_path / "data.jsonl", pairs)
    expected = compare(outputs, [output for _, output in pairs], None)
    result = medley("evaluate", task, data, "--max-tokens", "6", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["metrics"] == {name: pytest.approx(value) for name, value in expected.items()}
    alone = medley("evaluate", task, data, "--max-tokens", "6", "--metric", "exact_match", "--json")
    assert json.loads(alone.stdout)["metrics"] == {"exact_match": expected["exact_match"]}


@pytest.mark.parametrize(
    ("output", "labels", "text"),
    [
        ("b", {"a": " b", "b": " a"}, " a"),  # a label before another one's text
        (" b", {"a": " b", "b": " a"}, " b"),  # as only a text is written
        ("1", {"0": "1", "1": "0"}, "0"),
        ("0", {"yes": " 1", "0": " yes"}, " yes"),
        ("yes", {"no": "yes", " yes": "no"}, "yes"),  # as it stands before what is only like it
        (" good\n", {"+": " good", "-": " bad"}, " good"),
        ("+ ", {"+": " good", "-": " bad"}, " good"),
        ("ja", {"yes": " a", "ja": " a", "no": " b"}, " a"),
        (" a", {"yes": " a", "ja": " a", "no": " b"}, " a"),
    ],
)
def test_a_line_names_a_choice_by_its_label_else_by_its_text(output: str, labels: dict[str, str], text: str) -> None:
    assert wanted_text(output, labels, "line 1") == text


def test_a_line_that_is_like_two_choices_names_none() -> None:
    assert wanted_text("a", {"x": "a", "y": " a"}, "line 1") == "a"
    with pytest.raises(CommandError, match=r"line 1.*more than one"):
        wanted_text("a ", {"x": "a", "y": " a"}, "line 1")


def test_a_classification_head_s_likeliest_labels_are_counted(
    medley: Medley, server: ServerProcess, base: Path, tmp_path: Path
) -> None:
    write_classifier(base, tmp_path / "head", num_labels=3)
    write_classifier(base, tmp_path / "number", num_labels=1)
    for name in ("head", "number"):
        assert upload(server.url, f"{name}-judged", tmp_path / name).status_code == 201
    path = f"{server.url}/v1/tasks/head-judged/classify"
    best = [httpx.post(path, json={"input": given}, timeout=PATIENCE_SECONDS).json()["best"] for given in INPUTS]
    wrong = next(f"LABEL_{at}" for at in range(3) if f"LABEL_{at}" != best[0])
    data = _lines(tmp_path / "data.jsonl", list(zip(INPUTS, [wrong, *best[1:]], strict=True)))
    for options in ((), ("--metric", "accuracy")):
        result = medley("evaluate", "head-judged", data, "--json", *options)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["metrics"] == {"accuracy": 7 / 8}
    other = _lines(tmp_path / "other.jsonl", [("a", "LABEL_3")])
    assert "none of the choices: LABEL_" in one_line(medley("evaluate", "head-judged", other).stderr)
    assert "no labels" in one_line(medley("evaluate", "number-judged", data, "--metric", "accuracy").stderr)


def test_the_base_is_measured_too(medley: Medley, server: ServerProcess, tmp_path: Path) -> None:
    base = httpx.get(f"{server.url}/v1/models", timeout=PATIENCE_SECONDS).json()["data"][0]["id"]
    data = _lines(tmp_path / "data.jsonl", [("The food", " x")])
    result = medley("evaluate", base, data, "--max-tokens", "2", "--json")
    assert result.returncode == 0, result.stderr
    assert set(json.loads(result.stdout)["metrics"]) == {"exact_match", "bleu", "rougeL"}


def test_half_a_character_is_refused_with_its_line(medley: Medley, task: str, tmp_path: Path) -> None:
    data = _lines(tmp_path / "data.jsonl", [("a", "b"), ("\ud800", "b")])
    assert "line 2" in one_line(medley("evaluate", task, data).stderr)


def test_metrics_of_known_texts() -> None:
    same = compare(["the cat sat on the mat"], [" the cat sat on the mat\n"], None)
    assert same == {"exact_match": 1.0, "bleu": pytest.approx(100), "rougeL": pytest.approx(1)}
    other = compare(["the cat sat on the mat", "a"], ["the cat on the mat sat", "b"], None)
    assert other["exact_match"] == 0
    assert 0 < other["bleu"] < 100
    assert other["rougeL"] == pytest.approx((5 / 6 + 0) / 2)  # five of six words in order; none of one
    assert compare(["a"], ["a"], "rouge") == {"rougeL": pytest.approx(1)}


def test_300_choices_in_one_call(server: ServerProcess, task: str) -> None:
    choices = [f" {first}{second}" for first in "abcdefghijklmnopqrst" for second in "abcdefghijklmno"]
    answer = _score(server, task, input=" ".join(INPUTS), choices=choices)
    assert [choice["text"] for choice in answer["choices"]] == choices
    for at in (0, 17, 299):
        alone = _score(server, task, input=" ".join(INPUTS), choices=[choices[at]])["choices"][0]
        assert answer["choices"][at] == {**alone, "logprob": pytest.approx(alone["logprob"], abs=1e-3)}


def test_what_cannot_be_measured_is_one_line(medley: Medley, task: str, tmp_path: Path) -> None:
    data = _lines(tmp_path / "data.jsonl", [("a", "b"), ("c", "d")])
    for arguments, words in (
        (("--metric", "accuracy"), "--choices"),
        (("--choices", "b", "--choices", "x"), "line 2: the output 'd' is none of the choices: b, x"),
        (("--user", ""), "(invalid_request)"),
    ):
        result = medley("evaluate", task, data, *arguments)
        assert result.returncode == 1, arguments
        assert words in one_line(result.stderr)
    assert medley("evaluate", task, data, "--metric", "bleu", "--choices", "b").returncode == 2
    assert medley("evaluate", task, str(tmp_path / "absent")).returncode == 2
    assert "task_not_found" in one_line(medley("evaluate", "nobody", data).stderr)


def test_data_is_read_without_the_training_s_libraries(tmp_path: Path) -> None:
    data = _lines(tmp_path / "data.jsonl", [("a", "b")])
    program = (
        "import sys; from typer.testing import CliRunner; from server.cli.app import app; "
        f"result = CliRunner().invoke(app, ['evaluate', 'any', {data!r}, '--url', 'http://127.0.0.1:9']); "
        "print(result.exception, [m for m in ('torch', 'transformers', 'peft') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith("no server at")
    assert result.stdout.endswith(" []\n")


class _Busy(BaseHTTPRequestHandler):
    """Answers each input only when it is asked the second time, and some never."""

    asked: ClassVar[Counter[str]] = Counter()
    refusals: ClassVar[dict[str, int]] = {AWAY: 503, FULL: 429}
    retry_after: ClassVar[str | None] = "0"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        given = body["input"]
        self.asked[given] += 1
        is_later = given in self.refusals or self.asked[given] == 1
        error = {"message": "not now", "code": "adapter_unavailable"}
        answer = {"error": error} if is_later else {"output": given, "medley": {"version": 2}}
        content = json.dumps(answer).encode()
        self.send_response(self.refusals.get(given, 429) if is_later else 200)
        if is_later and self.retry_after is not None:
            self.send_header("Retry-After", self.retry_after)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Not to stderr."""


@pytest.fixture
def busy() -> Iterator[str]:
    _Busy.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Busy) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each wait would have been."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    # in that module alone: the server of the test waits too, on a thread of its own
    monkeypatch.setattr("server.cli.evaluate.asyncio", SimpleNamespace(**{**vars(asyncio), "sleep": sleep}))
    return waits


def _exact_match(url: str, folder: Path, *inputs: str) -> Result:
    data = _lines(folder / "data.jsonl", [(given, given) for given in inputs])
    return CliRunner().invoke(app, ["evaluate", "any", data, "--metric", "exact_match", "--json", "--url", url])


def test_a_full_server_is_asked_again_when_it_says(busy: str, tmp_path: Path) -> None:
    result = _exact_match(busy, tmp_path, *INPUTS)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["metrics"] == {"exact_match": 1.0}
    assert dict(_Busy.asked) == dict.fromkeys(INPUTS, 2)


@pytest.mark.parametrize("never", [AWAY, FULL])
def test_one_that_never_answers_is_given_up(
    busy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, never: str
) -> None:
    monkeypatch.setattr("server.cli.evaluate._PATIENCE_SECONDS", {429: 0.3, 503: 0.3})
    result = _exact_match(busy, tmp_path, never)
    assert result.exit_code == 1
    assert str(result.exception) == "not now (adapter_unavailable)"
    assert _Busy.asked[never] > 1


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("7", 7, 7),
        (formatdate(4_300_000_000, usegmt=True), None, None),  # in 2106
        (formatdate(0, usegmt=True), 0.01, 1),
        ("0", 0.01, 1),
        ("-4", 0.01, 1),
        ("soon", 0.01, 5),
        (None, 0.01, 5),
        ("31", None, None),
    ],
)
def test_it_comes_back_when_it_was_told_to_unless_that_is_long_from_now(
    busy: str,
    tmp_path: Path,
    slept: list[float],
    monkeypatch: pytest.MonkeyPatch,
    header: str | None,
    least: float | None,
    most: float | None,
) -> None:
    monkeypatch.setattr(_Busy, "retry_after", header)
    result = _exact_match(busy, tmp_path, "x")
    if least is None or most is None:
        assert (result.exit_code, slept, _Busy.asked["x"]) == (1, [], 1)
    else:
        assert (result.exit_code, _Busy.asked["x"]) == (0, 2)
        assert least <= slept[0] <= most


def test_a_terminal_sees_a_bar_and_a_pipe_does_not(busy: str, tmp_path: Path) -> None:
    data = _lines(tmp_path / "data.jsonl", [(given, given) for given in INPUTS])
    command = [MEDLEY, "evaluate", "any", data, "--metric", "exact_match", "--json"]
    master, terminal = os.openpty()
    told = environment(MEDLEY_URL=busy, TERM="xterm", COLUMNS="80")
    process = subprocess.Popen(command, env=told, stdout=subprocess.PIPE, stderr=terminal)
    os.close(terminal)
    shown = bytearray()
    with suppress(OSError):  # Linux's end of a terminal that nobody has open any more
        while piece := os.read(master, 4096):
            shown += piece
    os.close(master)
    printed, _ = process.communicate()
    assert process.returncode == 0, shown
    assert b"examples" in shown
    assert b"8/8" in shown
    assert json.loads(printed)["examples"] == 8
    piped = run_medley("evaluate", "any", data, "--metric", "exact_match", "--url", busy)
    assert (piped.returncode, piped.stderr) == (0, "")


def test_show_neighbours_lists_each_virtual_token(
    medley: Medley, server: ServerProcess, adapters: dict[str, Path], task: str
) -> None:
    header, *rows = medley("show", task, "--neighbours").stdout.splitlines()
    assert header.split("\t") == ["virtual token", "norm", "nearest tokens (cosine)"]
    found = json.loads(medley("show", task, "--neighbours", "--json").stdout)["virtual_tokens"]
    assert len(rows) == len(found) == 5
    for row, token in zip(rows, found, strict=True):
        assert row.split("\t")[1] == f"{token['norm']:.3f}"
        assert row.split("\t")[2].count(" 0.") == 5
    assert upload(server.url, "no-prompt", adapters["lora"]).status_code == 201
    refused = medley("show", "no-prompt", "--neighbours")
    assert refused.returncode == 1
    assert "(unsupported_method)" in one_line(refused.stderr)
