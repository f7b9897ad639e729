"""Prints the demo's table from a running server: `python -m demo.check --url http://127.0.0.1:8000`.

The requests of all tasks, with and without adapters, are shuffled together and sent concurrently, so that the server
answers them from mixed batches. Exits with 1 where an adapter is below the bar or the base alone is not.
"""

import argparse
import asyncio
import random
import sys
from collections import defaultdict
from dataclasses import dataclass

import httpx

from demo.scores import BAR, WAYS, TaskScores, as_table, share_right
from demo.skills import Example, examples
from demo.tasks import RECIPES, TEST_EXAMPLES, TEST_SEED, DemoTask, read_tasks

CONCURRENCY = 64
TIMEOUT = 120.0  # seconds a request may wait for its answer


@dataclass(frozen=True)
class Question:
    """One example asked in one way."""

    task: DemoTask
    way: str
    example: Example


async def ask(client: httpx.AsyncClient, base: str, question: Question) -> str:
    """The server's output. Raises `httpx.HTTPStatusError` where it answers with an error."""
    task, text = question.task, question.example.input
    if question.way == "adapter":
        answer = await client.post(f"/v1/tasks/{task.task}/generate", json={"input": text})
        answer.raise_for_status()
        return str(answer.json()["output"])
    prompt = task.template.replace("{{ input }}", text)
    if question.way == "base + text prompt":
        prompt = f"{task.text_prompt}\n{prompt}"
    body = {"model": base, "prompt": prompt, "max_tokens": task.max_tokens, "temperature": 0}
    answer = await client.post("/v1/completions", json=body)
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["text"])


async def check(url: str) -> list[TaskScores]:
    """Ask everything and score it."""
    questions = [
        Question(task, way, example)
        for task in read_tasks()
        for example in examples(task.task, "test", TEST_EXAMPLES, TEST_SEED)
        for way in WAYS
    ]
    random.Random(TEST_SEED).shuffle(questions)
    slots = asyncio.Semaphore(CONCURRENCY)
    limits = httpx.Limits(max_connections=CONCURRENCY)
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT, limits=limits) as client:
        models = await client.get("/v1/models")
        models.raise_for_status()
        base = str(models.json()["data"][0]["id"])

        async def ask_in_turn(question: Question) -> str:
            async with slots:
                return await ask(client, base, question)

        outputs = await asyncio.gather(*(ask_in_turn(question) for question in questions))
    return _scores(questions, outputs)


def _scores(questions: list[Question], outputs: list[str]) -> list[TaskScores]:
    asked: dict[tuple[str, str], tuple[list[Example], list[str]]] = defaultdict(lambda: ([], []))
    for question, output in zip(questions, outputs, strict=True):
        rows, texts = asked[question.task.task, question.way]
        rows.append(question.example)
        texts.append(output)
    return [
        TaskScores(name, RECIPES[name].method, {way: share_right(name, *asked[name, way]) for way in WAYS})
        for name in RECIPES
    ]


def main() -> int:
    """Print the table; 1 where a task misses the bar or the server cannot be asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the running server")
    url = parser.parse_args().url
    try:
        scores = asyncio.run(check(url))
    except httpx.HTTPStatusError as error:
        print(f"{error}: {error.response.text}", file=sys.stderr)
        return 1
    except httpx.HTTPError as error:
        print(f"no answer from {url}: {error!r}; is `make serve` running?", file=sys.stderr)
        return 1
    print(as_table(scores))
    missed = [row.task for row in scores if not row.reached]
    if missed:
        print(f"not at {BAR:.0%} (or reached without an adapter): {', '.join(missed)}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
