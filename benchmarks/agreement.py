"""The check before any timing: Medley mixed, and PEFT as it is timed, give the tokens of each request alone.

A rate of wrong answers is worth nothing. The reference is PEFT with one request and no padding. Matrix products
round differently with the number of rows, so tokens are compared up to the first step whose two best logits are
closer than `NEAR_TIE`, where either may be chosen.
"""

from __future__ import annotations

import random

from benchmarks.medley import Medley
from benchmarks.peft_peer import PeftPeer
from benchmarks.workload import Job, Task, Workload

NEAR_TIE = 1e-4


class DisagreementError(Exception):
    """A system answers wrongly; the message says which, for what, and where."""


def check(workload: Workload, medley: Medley, peer: PeftPeer, tasks: dict[str, list[Task]]) -> str:
    """Compare one base-only request and the first and last task of every method; what was compared, in words.

    Raises `DisagreementError`.
    """
    random_tokens = random.Random(1)
    chosen: list[Task | None] = [None]
    for own in tasks.values():
        chosen += [own[0], own[-1]]
    jobs = [Job(workload.prompt(random_tokens), task) for task in chosen]
    answers = {"Medley": medley.run(jobs).answers, "PEFT": peer.run(jobs).answers}
    compared = 0
    for index, job in enumerate(jobs):
        expected, count = certain_tokens(peer, job)
        compared += count
        for system, given in answers.items():
            if given[index][:count] != expected[:count]:
                name = "base only" if job.task is None else f"{job.task.method}, {job.task.name}"
                raise DisagreementError(f"{system} gives {given[index]} for {name}, where PEFT alone gives {expected}")
    total = len(jobs) * workload.new_tokens
    return (
        f"{compared} greedy tokens equal those of PEFT alone; {total - compared} more follow a near tie, not compared"
    )


def certain_tokens(peer: PeftPeer, job: Job) -> tuple[list[int], int]:
    """The tokens of a job alone, and how many of them come before a near tie."""
    tokens, logits = peer.alone(job)
    best = logits.topk(2).values
    ties = (best[:, 0] - best[:, 1] < NEAR_TIE).nonzero()
    return tokens, int(ties[0]) if len(ties) else len(tokens)
