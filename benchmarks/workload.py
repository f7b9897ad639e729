"""What both systems are given, and what they give back. Knows neither of them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.bases import BaseSize


@dataclass(frozen=True)
class Task:
    """One adapter."""

    method: str  # a key of `benchmarks.adapters.METHODS`
    name: str
    folder: Path  # as PEFT saved it


@dataclass(frozen=True)
class Job:
    """One request: greedy, to the full length."""

    prompt: list[int]
    task: Task | None  # None: base only


@dataclass(frozen=True)
class Run:
    """The answers to a list of jobs, in their order, and what they took."""

    answers: list[list[int]]  # new token ids of each job
    seconds: float
    cached_virtual: int = 0  # prompt positions that were not computed: virtual tokens of a task's own prefix
    cached_text: int = 0  # the same of the text; 0 where prompts are fresh, which `check_fresh` looks at

    @property
    def tokens_per_second(self) -> float:
        """Output tokens over the whole run, prompts included in the time."""
        return sum(map(len, self.answers)) / self.seconds


class CachedTextError(Exception):
    """Other prompt tokens came from a cache than those that were to: the figures are of other work than they say."""


def by_round(counts: Sequence[int]) -> str:
    """Such as `0 0 0 0 0`."""
    return " ".join(map(str, counts))


def check_fresh(cached: Mapping[str, Sequence[int]]) -> None:
    """Raises `CachedTextError` where a row had cached prompt tokens in any round."""
    check_cached(cached, {})


def check_cached(cached: Mapping[str, Sequence[int]], known: Mapping[str, int]) -> None:
    """Raises `CachedTextError` where a row had, in any round, more or fewer cached prompt tokens than are `known`: none
    where it is not named."""
    wrong = [
        f"{row}: {by_round(counts)}, not {known.get(row, 0)}"
        for row, counts in cached.items()
        if any(count != known.get(row, 0) for count in counts)
    ]
    if wrong:
        raise CachedTextError(f"prompt tokens from the cache, round by round: {'; '.join(wrong)}")


@dataclass(frozen=True)
class Workload:
    """The same work for every row of the table."""

    size: BaseSize
    requests: int
    prompt_tokens: int
    new_tokens: int
    virtual_tokens: int  # of each prompt and each prefix
    tasks: int  # of each method

    @property
    def length(self) -> int:
        """Positions of the longest request."""
        return self.virtual_tokens + self.prompt_tokens + self.new_tokens

    def jobs(self, tasks: list[Task], random_tokens: random.Random) -> list[Job]:
        """Fresh random prompts, the tasks taken in turn; base only where there are none."""
        return [
            Job(self.prompt(random_tokens), tasks[index % len(tasks)] if tasks else None)
            for index in range(self.requests)
        ]

    def prompt(self, random_tokens: random.Random) -> list[int]:
        """Token ids that nobody has seen."""
        return [random_tokens.randrange(self.size.vocabulary) for _ in range(self.prompt_tokens)]
