"""The plan of a step's row deltas: every token of every adapter once, with that adapter's rows, and nothing else."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from server.adapters import Adapter, EmbeddingPrefix, Resident, RowPool
from server.adapters.deltas import input_scale, low_rank, output_scale
from server.adapters.methods.top_layers import Dense
from server.adapters.resident import Loaded
from server.engine.batch import BatchBuilder, StepBatch
from server.engine.packing import MANY_TOKENS
from server.engine.prefixes import PrefixRun, Span
from server.engine.protocol import Generate, Sampling
from server.engine.scheduler import Row, Schedule
from server.engine.sequence import Sequence
from server.model import BaseShape, LayerShape, RowDelta
from server.model.sites import SiteShape

CPU = torch.device("cpu")
HIDDEN, INNER, VOCABULARY = 4, 6, 9
SITES = {
    "up": SiteShape(HIDDEN, INNER, is_head=False),
    "down": SiteShape(INNER, HIDDEN, is_head=False),
    "head": SiteShape(HIDDEN, VOCABULARY, is_head=True),
}
SHAPE = BaseShape(
    SITES, (LayerShape(1, HIDDEN),), HIDDEN, torch.float32, lambda name: torch.zeros(HIDDEN, HIDDEN), lambda name: None
)
VIRTUAL = 3
PAGE_SIZE, RUN_PAGES = 4, 16

KINDS = ("lora", "wide", "ia3", "prompt", "dense")
Cell = tuple[str, int, int]  # site, level, token of the step or, at the head, row of the logits


def _lora(rank: int, *sites: str) -> dict[str, RowDelta]:
    return {
        site: low_rank(torch.randn(rank, SITES[site].inputs), torch.randn(rank, SITES[site].outputs)) for site in sites
    }


def _adapter(kind: str) -> Adapter:
    deltas = {
        "lora": lambda: _lora(2, "up", "down"),
        "wide": lambda: _lora(3, "up", "head"),
        "ia3": lambda: {"up": output_scale(torch.randn(INNER)), "down": input_scale(torch.randn(INNER))},
        "prompt": lambda: _lora(1, "head"),
        "dense": lambda: {"up": RowDelta(Dense(), (torch.randn(INNER, HIDDEN),))},
    }[kind]()
    prefix = EmbeddingPrefix(torch.randn(VIRTUAL, HIDDEN)) if kind == "prompt" else None
    return Adapter(kind, prefix=prefix, deltas=deltas)


class Crowd:
    """Adapters in a pool, three of each shape, and schedules of sequences that have them."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.rng = random.Random(seed)
        self.runs = 0
        self.pool = RowPool(1 << 14, VOCABULARY, dtype=torch.float32, device=CPU)
        self.adapters = {f"{kind}{n}": _adapter(kind) for kind in KINDS for n in range(3)}
        self.residents = [self._placed(digest) for digest in self.rng.sample(list(self.adapters), len(self.adapters))]

    def _placed(self, digest: str) -> Resident:
        loaded = Loaded.of(self.adapters[digest], CPU)
        first = self.pool.take(loaded.counts)
        assert first is not None
        for width, rows in loaded.rows.items():
            self.pool.rows(width)[first[width] : first[width] + len(rows)] = rows
        return Resident(digest, loaded.layout, loaded.counts, first, loaded.bytes)

    def schedule(self, num_sequences: int) -> Schedule:
        """Rows of one position and of many, at any place of their sequences; some prefixes run beside them."""
        schedule = Schedule()
        for number in range(num_sequences):
            stack = tuple(self.rng.choices(self.residents, k=self.rng.choice([0, 1, 1, 2, 2])))
            sequence = self._sequence(number, stack)
            if sequence.spans and self.rng.random() < 0.5:
                run = PrefixRun(sequence.stack_key, self._pages(), None, spans=sequence.spans)
                schedule.rows[run] = [Row(run, 0, run.length)]
                schedule.owners[run] = sequence
            length = sequence.num_tokens
            start = self.rng.randrange(sequence.num_prefix, length)
            count = min(self.rng.choice([1, 1, self.rng.randrange(1, 5), length]), length - start)
            if self.rng.random() < 0.5:  # its last positions, which need logits
                start = length - count
            schedule.rows[sequence] = [Row(sequence, start, count)]
        return schedule

    def _sequence(self, number: int, stack: tuple[Resident, ...]) -> Sequence:
        spans: list[Span] = []
        at = 0
        for level, resident in enumerate(stack):
            if resident.layout.prefix is not None:
                spans.append(Span(at, at + VIRTUAL, level, is_run=True))
                at += VIRTUAL
        request = Generate(
            id=str(number),
            prompt=[5] * self.rng.choice([0, 1, 5, 30] if spans else [1, 5, 30]),
            sampling=Sampling(max_tokens=1, prompt_logprobs_from=self.rng.choice([None, None, None, 0, 3])),
            deadline=0.0,
        )
        return Sequence(request, stack=stack, spans=tuple(spans), block_table=self._pages())

    def _pages(self) -> list[int]:
        """A run's own, so that a slot says whose token is written there."""
        self.runs += 1
        return list(range(self.runs * RUN_PAGES, (self.runs + 1) * RUN_PAGES))


def _owners(batch: StepBatch, schedule: Schedule) -> list[tuple[Resident, ...]]:
    """Each token's stack, by the page to which its key and value go."""
    stacks: dict[int, tuple[Resident, ...]] = {}
    for run in schedule.rows:
        if isinstance(run, Sequence):
            stacks[run.block_table[0]] = run.stack
        else:
            stacks[run.pages[0]] = schedule.owners[run].stack
    pages = [slot // PAGE_SIZE for slot in batch.attention.slots.tolist()]
    return [stacks[page - page % RUN_PAGES] for page in pages]


def _expected(batch: StepBatch, owners: list[tuple[Resident, ...]]) -> dict[Cell, Resident]:
    expected: dict[Cell, Resident] = {}
    heads = batch.logit_tokens.tolist()
    for name, site in SITES.items():
        for place, token in enumerate(heads if site.is_head else range(len(owners))):
            for level, resident in enumerate(owners[token]):
                if any(delta.site == name for delta in resident.layout.deltas):
                    expected[name, level, place] = resident
    return expected


def _planned(batch: StepBatch, num_tokens: int) -> Iterator[tuple[Cell, object, tuple[Tensor, ...]]]:
    """Every cell of the plan with its kind and the rows that it is given."""
    for site, levels in batch.deltas.items():
        count = len(batch.logit_tokens) if SITES[site].is_head else num_tokens
        for level, segments in enumerate(levels):
            for segment in segments:
                blocks = [block.gather() for block in segment.blocks]
                tokens = torch.arange(count)[segment.tokens].tolist()
                assert tokens, "a segment without tokens"
                assert not (segment.is_each and segment.kind.by_adapter), "a copy of each token's large blocks"
                assert all(len(block) == (len(tokens) if segment.is_each else 1) for block in blocks)
                for index, token in enumerate(tokens):
                    rows = tuple(block[index if segment.is_each else 0] for block in blocks)
                    yield (site, level, token), segment.kind, rows


@pytest.mark.parametrize("seed", range(25))
def test_a_plan_has_every_token_of_every_adapter_once_with_its_own_rows(seed: int) -> None:
    crowd = Crowd(seed)
    builder = BatchBuilder(SHAPE, crowd.pool, PAGE_SIZE, CPU)
    schedule = crowd.schedule(crowd.rng.choice([1, 4, 12, 40]))
    batch = builder.build(schedule)
    owners = _owners(batch, schedule)
    assert len(owners) == sum(row.count for row in schedule)
    expected = _expected(batch, owners)
    planned = list(_planned(batch, len(owners)))
    times = Counter(cell for cell, _, _ in planned)
    assert set(times.values()) <= {1}, "a delta is applied twice"
    assert times.keys() == expected.keys()
    for cell, kind, rows in planned:
        own = crowd.adapters[expected[cell].digest].deltas[cell[0]]
        assert kind == own.kind
        assert all(torch.equal(given, block) for given, block in zip(rows, own.blocks, strict=True))
    assert batch.num_adapters == len({resident.digest for stack in owners for resident in stack})


def test_a_plan_serves_the_next_step_only_while_the_same_stacks_stand_at_the_same_places() -> None:
    crowd = Crowd(3)
    builder = BatchBuilder(SHAPE, crowd.pool, PAGE_SIZE, CPU)
    lora, other = (next(each for each in crowd.residents if each.digest == name) for name in ("lora0", "lora1"))

    def step(*stacks: tuple[Resident, ...], counts: tuple[int, ...] = (1, 1, 1)) -> StepBatch:
        schedule = Schedule()
        for number, (stack, count) in enumerate(zip(stacks, counts, strict=True)):
            request = Generate(id=str(number), prompt=[5] * 9, sampling=Sampling(max_tokens=1), deadline=0.0)
            sequence = Sequence(request, stack=stack, spans=(), block_table=crowd._pages())
            schedule.rows[sequence] = [Row(sequence, 9 - count, count)]
        batch = builder.build(schedule)
        owners = _owners(batch, schedule)
        planned = {cell: rows for cell, _, rows in _planned(batch, len(owners))}
        assert planned.keys() == _expected(batch, owners).keys()
        for cell, resident in _expected(batch, owners).items():
            own = next(delta for delta in crowd.adapters[resident.digest].deltas.items() if delta[0] == cell[0])[1]
            for given, block in zip(planned[cell], own.blocks, strict=True):
                assert torch.equal(given, block)
        return batch

    first = step((lora,), (other,), ())
    assert step((lora,), (other,), ()).deltas is first.deltas
    for changed in (
        step((lora,), (lora,), ()),
        step((lora,), (other,), (lora,)),
        step((lora,), (other, lora), ()),
        step((lora,), (other,), (), counts=(2, 1, 1)),
        step((lora,), (other,), (), counts=(9, 8, 1)),
    ):
        assert changed.deltas is not first.deltas


@pytest.mark.parametrize("seed", range(5))
def test_an_adapter_of_many_rows_does_not_part_the_others_of_its_layout(seed: int) -> None:
    crowd = Crowd(seed)
    builder = BatchBuilder(SHAPE, crowd.pool, PAGE_SIZE, CPU)
    alike = [resident for resident in crowd.residents if resident.digest.startswith("lora")]
    schedule = Schedule()
    for number, resident in enumerate(crowd.rng.sample([*alike[:1] * MANY_TOKENS, *alike * 2], MANY_TOKENS + 6)):
        request = Generate(id=str(number), prompt=[5], sampling=Sampling(max_tokens=1), deadline=0.0)
        sequence = Sequence(request, stack=(resident,), spans=(), block_table=crowd._pages())
        schedule.rows[sequence] = [Row(sequence, 0, 1)]
    (segments,) = builder.build(schedule).deltas["up"]
    assert sorted(segment.is_each for segment in segments) == [False, True]
    assert all(isinstance(segment.tokens, slice) for segment in segments)
