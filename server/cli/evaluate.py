"""`medley evaluate`: a task's accuracy, exact match, BLEU or ROUGE-L over JSON lines of {"input", "output"}.

With choices it is rank classification: the choice that the server scores highest against the one that the line names.
Of a task with a classification head it is the likeliest label. Else the server generates, greedily, and the answer is
compared with the line's output. Many requests are under way at once, so that the server's batch is full; one that is
told to come back later does, for a while.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import quote

import httpx
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from server.cli.client import Address, Client, Json, Url, expressed, refusal, task_path
from server.cli.errors import CommandError
from server.cli.table import print_table
from server.tuning import read_examples

Metric = Literal["accuracy", "exact_match", "bleu", "rouge"]
Labels = dict[str, str]  # name → the text that is scored
Example = tuple[str, str, str]  # input, output, and where they stand
Found = tuple[list[Json], dict[str, float]]  # the answers, and by metric what they are worth

_PATIENCE_SECONDS = {  # with one request, by the status that it is answered with
    429: 600.0,  # full: others are before it, and a queue of long answers takes its time
    503: 60.0,  # away
}
_RETRY_SECONDS = 1.0  # where it is not said when to come back
_LEAST_RETRY_SECONDS, _MOST_RETRY_SECONDS = 0.1, 30.0


def evaluate(
    task: Annotated[str, typer.Argument(help="Task id; task@N asks for one version.")],
    data: Annotated[
        Path, typer.Argument(metavar="DATA.jsonl", help='Lines of {"input", "output"}.', exists=True, dir_okay=False)
    ],
    metric: Annotated[
        Metric | None,
        typer.Option(
            help="Absent: accuracy where there are choices or a head's labels, else exact match, BLEU and ROUGE-L. "
            "BLEU is of up to four words in a row, so 0 where no answer has four."
        ),
    ] = None,
    choices: Annotated[
        list[str] | None, typer.Option(help="A text to choose from; repeatable. Absent: the task's labels.")
    ] = None,
    normalize: Annotated[Literal["tokens", "none"], typer.Option(help="How choices of any length compare.")] = "tokens",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N lines.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.")] = None,
    user: Annotated[str | None, typer.Option(help="Whose customization of the task to use.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
    url: Url = None,
) -> None:
    """Measure a task on examples: accuracy and exact match from 0 to 1, BLEU from 0 to 100, ROUGE-L (F) from 0 to 1."""
    if choices and metric not in (None, "accuracy"):
        raise typer.BadParameter(f"{metric} compares generated text; choices are for accuracy", param_hint="--choices")
    examples = [(example.input, example.output, example.where) for example in read_examples(data)[:limit]]
    run = _Run(task, url, {} if user is None else {"user": user}, concurrency)
    if choices:
        found = _by_choices(run, examples, dict(zip(choices, choices, strict=True)), normalize)
    elif metric in (None, "accuracy") and (head := run.head_labels(examples[0])):
        found = _by_head(run, examples, head)
    elif metric in (None, "accuracy") and (labels := run.labels()):
        found = _by_choices(run, examples, labels, normalize)
    elif metric == "accuracy":
        raise CommandError(f"'{task}' has no labels to choose from; name them with --choices")
    else:
        found = _by_text(run, examples, metric, max_tokens)
    _tell(task, *found, as_json=as_json)


@dataclass(frozen=True)
class _Run:
    """Whom the examples are given to, and how."""

    task: str
    url: str | None
    common: Json  # fields of every request
    concurrency: int

    def ask(self, call: str, examples: Sequence[Example], **fields: Any) -> list[Json]:
        """The task's answers to one of its calls."""
        bodies = [{"input": given, **self.common, **fields} for given, *_ in examples]
        return _ask(self.url, task_path(self.task, call), bodies, self.concurrency)

    def labels(self) -> Labels:
        """Those of the task's settings; none of the base, which answers as a task does and has none."""
        task = self.task.split("@", maxsplit=1)[0]
        with Client(self.url) as client:
            try:
                labels: Labels = client.call("GET", task_path(task))["labels"]
            except CommandError:
                with suppress(CommandError):
                    if client.call("GET", f"/v1/models/{quote(task, safe='')}")["parent"] is None:
                        return {}
                raise
        return labels

    def head_labels(self, example: Example) -> Labels:
        """Those of the task's classification head, found by asking it; none where it has no such head."""
        with suppress(CommandError):
            [answer] = self.ask("classify", [example])
            return {found["label"]: found["label"] for found in answer.get("labels", [])}
        return {}


def _by_choices(run: _Run, examples: Sequence[Example], labels: Labels, normalize: str) -> Found:
    """How often the choice that the line names scores highest."""
    wanted = [wanted_text(output, labels, where) for _, output, where in examples]
    texts = list(labels.values())
    answers = run.ask("score", examples, choices=texts, normalize=normalize)
    right = sum(texts[answer["best"]] == text for answer, text in zip(answers, wanted, strict=True))
    return answers, {"accuracy": right / len(examples)}


def _by_head(run: _Run, examples: Sequence[Example], labels: Labels) -> Found:
    """How often the label that the line names is the likeliest."""
    wanted = [wanted_text(output, labels, where) for _, output, where in examples]
    answers = run.ask("classify", examples)
    right = sum(answer["best"] == label for answer, label in zip(answers, wanted, strict=True))
    return answers, {"accuracy": right / len(examples)}


def _by_text(run: _Run, examples: Sequence[Example], metric: Metric | None, max_tokens: int | None) -> Found:
    """What the server generates, compared."""
    fields = {} if max_tokens is None else {"max_tokens": max_tokens}
    answers = run.ask("generate", examples, temperature=0, **fields)
    return answers, compare([answer["output"] for answer in answers], [output for _, output, _ in examples], metric)


def compare(outputs: Sequence[str], references: Sequence[str], metric: Metric | None) -> dict[str, float]:
    """Generated texts against the wanted ones; None: by each metric. Space around a text does not count."""
    pairs = [(output.strip(), reference.strip()) for output, reference in zip(outputs, references, strict=True)]
    measured: dict[str, float] = {}
    # These libraries take longer to import than another command runs.
    if metric in (None, "exact_match"):
        measured["exact_match"] = sum(output == reference for output, reference in pairs) / len(pairs)
    if metric in (None, "bleu"):
        from sacrebleu import corpus_bleu  # noqa: PLC0415

        measured["bleu"] = corpus_bleu([output for output, _ in pairs], [[reference for _, reference in pairs]]).score
    if metric in (None, "rouge"):
        from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415

        scorer = RougeScorer(["rougeL"])
        scores = [scorer.score(reference, output)["rougeL"].fmeasure for output, reference in pairs]
        measured["rougeL"] = sum(scores) / len(scores)
    return measured


def wanted_text(output: str, labels: Labels, where: str) -> str:
    """The text of the choice that a line names: by its label, else by its text, else by either but for space around."""
    texts, bare = list(labels.values()), output.strip()
    for name, names in (
        (output, list(labels)),
        (output, texts),
        (bare, [label.strip() for label in labels]),
        (bare, [text.strip() for text in texts]),
    ):
        found = {text for text, other in zip(texts, names, strict=True) if other == name}
        if len(found) > 1:
            raise CommandError(
                f"{where}: the output {output!r} is more than one of the choices; write it as one has it"
            )
        if found:
            return found.pop()
    raise CommandError(f"{where}: the output {output!r} is none of the choices: {', '.join(labels)}")


def _ask(url: str | None, path: str, bodies: Sequence[Json], concurrency: int) -> list[Json]:
    """The answers to all requests, in their order, with a bar on the terminal."""
    with _progress(len(bodies)) as advance:
        return asyncio.run(_ask_all(Address(url), path, bodies, concurrency, advance))


async def _ask_all(address: Address, path: str, bodies: Sequence[Json], concurrency: int, advance: Any) -> list[Json]:
    """As many workers as requests may be under way, all from one list. The first refusal ends them all."""
    answers: list[Json] = [{} for _ in bodies]
    left = iter(enumerate(bodies))
    limits = httpx.Limits(max_connections=concurrency)
    with expressed(address.url):
        async with httpx.AsyncClient(
            base_url=address.url, headers=address.headers, timeout=address.timeout, limits=limits
        ) as http:

            async def work() -> None:
                for index, body in left:
                    answers[index] = await _ask_until_taken(http, path, body)
                    advance()

            workers = [asyncio.create_task(work()) for _ in range(min(concurrency, len(bodies)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
    return answers


async def _ask_until_taken(http: httpx.AsyncClient, path: str, body: Json) -> Json:
    """One answer. A server that is full, or cannot answer now, says when to come back; the request is sent again then,
    unless that is long from now, as for a quota that is used up, or it has been put off for long."""
    begun = time.monotonic()
    while True:
        response = await http.post(path, json=body)
        wait = _retry_seconds(response.headers.get("Retry-After"))
        left = begun + _PATIENCE_SECONDS.get(response.status_code, 0.0) - time.monotonic()
        if wait > min(left, _MOST_RETRY_SECONDS):  # nothing is left where it is answered, or refused for good
            break
        await asyncio.sleep(wait)
    if response.is_error:
        raise refusal(response)
    answer: Json = response.json()
    return answer


def _retry_seconds(header: str | None) -> float:
    """What `Retry-After` says, seconds or a date; never so little that the server is asked without end."""
    seconds = _RETRY_SECONDS
    with suppress(ValueError):
        seconds = parsedate_to_datetime(header or "").timestamp() - time.time()
    with suppress(ValueError):
        seconds = int(header or "")
    return max(seconds, _LEAST_RETRY_SECONDS)


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """What to call after each answer."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("examples", total=total)
        yield lambda: progress.advance(bar)


def _tell(task: str, answers: Sequence[Json], measured: dict[str, float], *, as_json: bool) -> None:
    versions = sorted({answer["medley"]["version"] for answer in answers} - {None})
    if as_json:
        print(json.dumps({"task": task, "versions": versions, "examples": len(answers), "metrics": measured}, indent=2))
        return
    rows: list[list[object]] = [[name, f"{value:.4f}"] for name, value in measured.items()]
    print_table(["metric", "value"], [*rows, ["examples", len(answers)]])
