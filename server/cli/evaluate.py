"""`medley evaluate`: a task's accuracy, exact match, BLEU or ROUGE-L over JSON lines of {"input", "output"}.

With choices it is rank classification: the choice that the server scores highest against the one that the line names.
Else the server generates, greedily, and the answer is compared with the line's output. Many requests are under way at
once, so that the server's batch is full; one that is told to come back later does, for a while.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

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

_FULL, _AWAY = 429, 503
_MOST_RETRY_SECONDS = 30.0
_PATIENCE_SECONDS = 60.0  # with one request that the server cannot answer now; one that is full comes to each in time


def evaluate(
    task: Annotated[str, typer.Argument(help="Task id; task@N asks for one version.")],
    data: Annotated[
        Path, typer.Argument(metavar="DATA.jsonl", help='Lines of {"input", "output"}.', exists=True, dir_okay=False)
    ],
    metric: Annotated[
        Metric | None,
        typer.Option(
            help="Absent: accuracy where there are choices, else exact match, BLEU and ROUGE-L. BLEU is of up to four "
            "words in a row, so 0 where no answer has four."
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
    examples = _read(data)[:limit]
    common: Json = {} if user is None else {"user": user}
    labels = dict(zip(choices, choices, strict=True)) if choices else {}
    if not labels and metric in (None, "accuracy"):
        labels = _labels(task, url)
    if labels:
        wanted = [_index_of(output, labels, where) for _, output, where in examples]
        fields = {**common, "choices": list(labels.values()), "normalize": normalize}
        answers = _ask(
            url, task_path(task, "score"), [{"input": given, **fields} for given, *_ in examples], concurrency
        )
        right = sum(answer["best"] == index for answer, index in zip(answers, wanted, strict=True))
        measured = {"accuracy": right / len(examples)}
    elif metric == "accuracy":
        raise CommandError(f"'{task}' has no labels to choose from; name them with --choices")
    else:
        fields = {**common, "temperature": 0} | ({} if max_tokens is None else {"max_tokens": max_tokens})
        answers = _ask(
            url, task_path(task, "generate"), [{"input": given, **fields} for given, *_ in examples], concurrency
        )
        outputs = [answer["output"] for answer in answers]
        measured = compare(outputs, [output for _, output, _ in examples], metric)
    _tell(task, answers, measured, as_json=as_json)


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


def _read(path: Path) -> list[Example]:
    return [(example.input, example.output, example.where) for example in read_examples(path)]


def _labels(task: str, url: str | None) -> Labels:
    with Client(url) as client:
        labels: Labels = client.call("GET", task_path(task.split("@", maxsplit=1)[0]))["labels"]
    return labels


def _index_of(output: str, labels: Labels, where: str) -> int:
    """Which choice a line names, by its label or its text."""
    for index, names in enumerate(labels.items()):
        if output.strip() in {name.strip() for name in names}:
            return index
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
    unless that is long from now, as for a quota that is used up."""
    last = time.monotonic() + _PATIENCE_SECONDS
    while True:
        response = await http.post(path, json=body)
        wait = float(response.headers.get("Retry-After", "inf"))
        is_later = response.status_code == _FULL or (response.status_code == _AWAY and time.monotonic() < last)
        if not is_later or wait > _MOST_RETRY_SECONDS:
            break
        await asyncio.sleep(wait)
    if response.is_error:
        raise refusal(response)
    answer: Json = response.json()
    return answer


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
