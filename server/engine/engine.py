"""The engine: sequences in, tokens out, one step at a time. Single-threaded; knows no sockets and no text.

A sequence's life: `add` asks the bank for its stack; once that is resident it waits in the scheduler; it runs,
step by step, until it ends; then its pages and its hold on the adapters go back. Every sequence that was added
gets exactly one end: a `Tokens` with a finish reason, a `Failed`, or its own `abort`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch

from server.adapters import Adapter, Bank, RowPool
from server.adapters.loads import AdapterKey
from server.adapters.tickets import Ticket
from server.engine.batch import LogitRows, StepBatch
from server.engine.classify import classify, refusal
from server.engine.pages import PagePool
from server.engine.prefixes import Span
from server.engine.protocol import (
    AdapterRef,
    Classification,
    Failed,
    Generate,
    StepOutput,
    StepStats,
    TokenLogprobs,
    Tokens,
)
from server.engine.queue import who_makes_room
from server.engine.runner import Runner
from server.engine.sampler import Choice, Sampler, log_probabilities
from server.engine.scheduler import Schedule, Scheduler
from server.engine.sequence import Sequence
from server.errors import RequestError
from server.model import FrozenBase, KVCache

NOT_FINITE = "the model's output for this request is not finite: its adapters or sampling fields leave the range"


@dataclass(frozen=True)
class EngineLimits:
    """Sizes that the engine keeps to."""

    max_seqs: int  # rows of a step
    max_batch_tokens: int  # positions of a step
    max_prefill_tokens: int  # of those, the ones that are a prompt's or virtual tokens
    max_queue: int  # sequences that may wait
    num_pages: int  # of the KV cache, the null page counted
    page_size: int  # positions of a page
    adapter_bytes: int  # of the bank


@dataclass
class _Outbox:
    """What the step has to say."""

    tokens: list[Tokens] = field(default_factory=list)
    failed: list[Failed] = field(default_factory=list)


class Engine:
    """See the module."""

    def __init__(
        self,
        base: FrozenBase,
        limits: EngineLimits,
        load_adapter: Callable[[Mapping[str, str]], Adapter],
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """`load_adapter` reads an adapter by its files' blobs, on other threads; `wake` is called from those when
        there is something new for `step`."""
        self.base = base
        self.limits = limits
        pool = RowPool(limits.adapter_bytes, base.shape.widest, dtype=base.dtype, device=base.device)
        self.bank = Bank(limits.adapter_bytes, pool, load_adapter, wake)
        self.scheduler = Scheduler(
            PagePool(limits.num_pages, limits.page_size),
            max_seqs=limits.max_seqs,
            max_batch_tokens=limits.max_batch_tokens,
            max_prefill_tokens=limits.max_prefill_tokens,
        )
        cache = KVCache(base.layers, limits.num_pages, limits.page_size, dtype=base.dtype, device=base.device)
        self._runner = Runner(base, cache, pool, max_rows=limits.max_seqs)
        self._batches = self._runner.batch_builder()
        self._eos_token_ids = frozenset(base.eos_token_ids)
        self._sampler = Sampler(base.eos_token_ids)
        self._sequences: dict[str, Sequence] = {}  # in order of arrival
        self._held: Counter[str] = Counter()  # how many of them are each client's
        self._tickets: dict[str, Ticket] = {}
        self._outbox = _Outbox()
        self._ahead: tuple[Schedule, StepBatch] | None = None  # the next step, if nothing comes or goes before it

    @property
    def has_work(self) -> bool:
        """Whether a step would do something; while loads are under way `wake` tells when to look again."""
        return bool(self._sequences or self._outbox.failed) or self.bank.has_news

    @property
    def must_wait(self) -> bool:
        """Every sequence there is waits for an adapter's load."""
        return bool(self._sequences) and not (self.scheduler.running or self.scheduler.waiting)

    def add(self, request: Generate) -> None:
        """Accept a sequence, or say why not in the next step's output."""
        assert request.id not in self._sequences, "ids of open sequences are unique"
        refusal = self._make_room(request.client)
        if refusal is not None:
            self._fail(request.id, refusal)
            return
        sequence = Sequence(request)
        self._sequences[request.id] = sequence
        self._held[request.client] += 1
        if request.stack:
            self._tickets[request.id] = self.bank.request(request.id, _keys(request.stack), request.client)
        else:
            self._enqueue(sequence)

    def abort(self, request_id: str) -> None:
        """Forget a sequence; its row and pages are free before the next step."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is not None:
            self._let_go(sequence.request.client)
            self.scheduler.remove(sequence)
            ticket = self._tickets.pop(request_id, None)
            if ticket is not None:
                self.bank.cancel(ticket)
        if not self._sequences:
            self._ahead = None

    def pin(self, adapters: Iterable[AdapterRef]) -> None:
        """Load these ahead and keep them; those pinned before and not named are ordinary again."""
        self.bank.pin(_keys(adapters))

    def heal(self, blobs: Collection[str]) -> None:
        """These blobs can be read again."""
        self.bank.heal(blobs)

    def step(self) -> StepOutput:
        """One iteration: admit, schedule, run, sample, commit."""
        started = time.perf_counter()
        self._admit()
        self._end_overdue()
        schedule, batch = self._next()
        if batch is not None:
            logits = self._runner.run(schedule, batch)
            if self._runner.returns_early:  # while the device computes
                self._plan_ahead(schedule)
            self._commit(batch, logits)
        return self._output(schedule, batch, time.perf_counter() - started)

    def close(self) -> None:
        """Stop the loader's threads."""
        self.bank.close()

    def _next(self) -> tuple[Schedule, StepBatch | None]:
        """The step that was planned ahead, if it still stands, else a new one; None where it has no rows."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and self.scheduler.confirm(ahead[0]):
            self._batches.set_tokens(ahead[1])
            return ahead
        schedule = self.scheduler.schedule()
        return schedule, self._batches.build(schedule) if schedule.rows else None

    def _plan_ahead(self, schedule: Schedule) -> None:
        ahead = self.scheduler.plan_ahead(schedule)
        if ahead is not None:
            self._ahead = ahead, self._batches.build(ahead)

    def _make_room(self, client: str) -> RequestError | None:
        """See that there is a place in the queue, at the cost of who holds more of it; else why there is none."""
        if self.bank.waiting + len(self.scheduler.waiting) < self.limits.max_queue:
            return None
        full = f"{self.limits.max_queue} requests wait already"
        running = set(self.scheduler.running)
        waiting = (sequence for sequence in self._sequences.values() if sequence not in running)
        victim = who_makes_room(client, self._held, waiting)
        if victim is None:
            return RequestError("queue_full", f"{full}, and this client has its share of them; send it again later")
        message = f"{full}, most of them this client's: this one made room for another client's; send it again later"
        self._end(victim, RequestError("queue_full", message))
        return None

    def _let_go(self, client: str) -> None:
        self._held[client] -= 1
        if not self._held[client]:
            del self._held[client]

    def _admit(self) -> None:
        """Sequences whose adapters have become resident (or cannot be loaded)."""
        for ticket in self.bank.advance():
            sequence = self._sequences[ticket.owner]
            if ticket.stack is None:
                assert ticket.error is not None
                self._end(sequence, ticket.error)
                continue
            sequence.stack = ticket.stack
            sequence.spans = _spans(sequence)
            self._enqueue(sequence)

    def _enqueue(self, sequence: Sequence) -> None:
        """Refuse what can never run; else queue it."""
        request = sequence.request
        longest = sequence.num_tokens + request.sampling.max_tokens
        stored = max(sequence.num_tokens, longest - 1)  # the last token's keys and values are never needed
        pages = self.scheduler.pages_needed(sequence, stored)
        error = None
        if longest > self.base.max_model_len:
            error = f"the model's length is {self.base.max_model_len}"
        elif pages > self.scheduler.pages.capacity:
            error = f"it needs {pages} KV pages and the server has {self.scheduler.pages.capacity}"
        if error is not None:
            message = (
                f"{sequence.num_virtual} virtual tokens + {len(request.prompt)} prompt tokens + "
                f"{request.sampling.max_tokens} new ones are too many: {error}"
            )
            self._end(sequence, RequestError("context_length_exceeded", message, "max_tokens"))
        elif (refused := refusal(sequence)) is not None:
            self._end(sequence, refused)
        elif not request.prompt and not (sequence.spans and sequence.spans[-1].is_run):
            message = "the prompt is empty, and there is no soft prompt whose last virtual token could go on"
            self._end(sequence, RequestError("empty_prompt", message, "prompt"))
        else:
            self.scheduler.add(sequence)

    def _end_overdue(self) -> None:
        now = time.time()
        overdue = [sequence for sequence in self._sequences.values() if sequence.request.deadline < now]
        for sequence in overdue:
            self._end(sequence, RequestError("deadline_exceeded", "the request's time ran out before its last token"))

    def _commit(self, batch: StepBatch, logits: torch.Tensor) -> None:
        """Score prompts, choose tokens, and end what is done."""
        scored = [rows for rows in batch.logit_rows if rows.sequence.sampling.prompt_logprobs_from is not None]
        if scored:
            finite = torch.isfinite(logits.amax(-1)).tolist()  # NaN anywhere makes the maximum NaN
            for rows in scored:
                if not all(finite[rows.start : rows.stop]):
                    self._end_not_finite(rows.sequence)
            _score_prompts([rows for rows in scored if rows.sequence.id in self._sequences], logits)
        sampling = [rows for rows in batch.logit_rows if rows.samples and rows.sequence.id in self._sequences]
        ended = [rows for rows in sampling if rows.sequence.sampling.max_tokens == 0]
        for rows in ended:
            self._end_without_tokens(rows)
        sampling = [rows for rows in sampling if rows.sequence.sampling.max_tokens > 0]
        if sampling:
            places = [rows.stop - 1 for rows in sampling]
            if places == list(range(len(places))):
                chosen = logits[: len(places)]
            else:  # a tenth of the time of indexing by a list
                chosen = logits.index_select(0, torch.tensor(places, device=logits.device))
            sequences = [rows.sequence for rows in sampling]
            for sequence, choice in zip(sequences, self._sampler.choose(sequences, chosen), strict=True):
                self._append(sequence, choice)

    def _end_without_tokens(self, rows: LogitRows) -> None:
        """End a sequence that was to be scored or classified."""
        sequence = rows.sequence
        if not sequence.request.classify:
            self._say(sequence, [], None, "length", None)
            return
        states = self._runner.states
        assert states is not None, "a batch with such a sequence wants them"
        answer = classify(sequence, states[rows.stop - 1], self.bank.pool)
        if answer is None:
            self._end_not_finite(sequence)
        else:
            self._say(sequence, [], None, "length", None, answer)

    def _append(self, sequence: Sequence, choice: Choice) -> None:
        """Give a sequence its next token, or its end."""
        if choice.token is None:
            self._end_not_finite(sequence)
            return
        token, sampling = choice.token, sequence.sampling
        stops = token in sampling.stop_token_ids or (token in self._eos_token_ids and not sampling.ignore_eos)
        if stops:
            self._say(sequence, [], None, "stop", token)
            return
        sequence.output.append(token)
        finish = "length" if len(sequence.output) == sampling.max_tokens else None
        self._say(sequence, [token], choice, finish, None)

    def _say(
        self,
        sequence: Sequence,
        tokens: list[int],
        choice: Choice | None,
        finish: str | None,
        stop_token: int | None,
        classification: Classification | None = None,
    ) -> None:
        first = len(sequence.output) == len(tokens)
        logprobs = [choice.logprobs] if choice is not None and choice.logprobs is not None else None
        self._outbox.tokens.append(
            Tokens(
                id=sequence.id,
                token_ids=tokens,
                logprobs=logprobs,
                prompt_logprobs=sequence.prompt_logprobs
                if first and sequence.sampling.prompt_logprobs_from is not None
                else None,
                classification=classification,
                finish_reason=finish,
                stop_token=stop_token,
                virtual_tokens=sequence.num_virtual,
                cached_tokens=sequence.num_cached,
            )
        )
        if finish is not None:
            self.abort(sequence.id)

    def _end_not_finite(self, sequence: Sequence) -> None:
        """End a sequence whose pages may hold what led to it."""
        self.scheduler.remove(sequence, keep=False)
        self._end(sequence, RequestError("not_finite_logits", NOT_FINITE))

    def _end(self, sequence: Sequence, error: RequestError) -> None:
        """End a sequence by an error."""
        self.abort(sequence.id)
        self._fail(sequence.id, error)

    def _fail(self, request_id: str, error: RequestError) -> None:
        self._outbox.failed.append(Failed(id=request_id, code=error.code, message=error.message, param=error.param))

    def _output(self, schedule: Schedule, batch: StepBatch | None, seconds: float) -> StepOutput:
        outbox, self._outbox = self._outbox, _Outbox()
        load_seconds, self.bank.load_seconds = self.bank.load_seconds, []
        decoded = sum(1 for row in schedule if isinstance(row.run, Sequence) and row.start >= row.run.num_prompt)
        virtual = batch.num_virtual if batch else 0
        stats = StepStats(
            seconds=seconds,
            rows=len(schedule.rows),
            adapters=batch.num_adapters if batch else 0,
            prefill_tokens=sum(row.count for row in schedule) - decoded - virtual,
            decode_tokens=decoded,
            virtual_tokens=virtual,
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting) + self.bank.waiting,
            preemptions=schedule.num_preempted,
            prompt_tokens=schedule.num_prompt_tokens,
            cached_tokens=schedule.num_cached_tokens,
            kv_pages_used=self.scheduler.pages.used - self.scheduler.cache.num_idle,
            kv_pages_idle=self.scheduler.cache.num_idle,
            kv_pages=self.scheduler.pages.capacity,
            bank_bytes=self.bank.used,
            bank_capacity=self.bank.capacity,
            bank_adapters=len(self.bank),
            bank_pinned_bytes=self.bank.pinned_bytes,
            load_seconds=load_seconds,
        )
        return StepOutput(tokens=outbox.tokens, failed=outbox.failed, stats=stats)


def _keys(adapters: Iterable[AdapterRef]) -> list[AdapterKey]:
    return [AdapterKey(adapter.digest, adapter.files) for adapter in adapters]


def _spans(sequence: Sequence) -> tuple[Span, ...]:
    """Where each adapter's virtual tokens stand: in the order of the stack."""
    spans: list[Span] = []
    at = 0
    for level, resident in enumerate(sequence.stack):
        prefix = resident.layout.prefix
        if prefix is not None:
            spans.append(Span(at, at + prefix.length, level, prefix.is_run, prefix.takes_positions))
            at += prefix.length
    return tuple(spans)


def _score_prompts(scored: list[LogitRows], logits: torch.Tensor) -> None:
    """Note the log-probabilities of the prompts' tokens that these rows predict; a prompt's first has none, unless a
    soft prompt stands before it."""
    predicted: list[tuple[Sequence, int, int]] = []  # whose, the row, the token that follows it
    for rows in scored:
        sequence = rows.sequence
        prompt, first = sequence.request.prompt, sequence.sampling.prompt_logprobs_from
        assert first is not None, "only what is to be scored is given"
        if prompt and not first and not sequence.prompt_logprobs and not sequence.scores_first:
            sequence.prompt_logprobs.append(None)
        next_index = first + len(sequence.prompt_logprobs)
        shift = rows.stop - sequence.num_computed + sequence.num_virtual - 1  # row of the logits before prompt[0]'s
        predicted += [
            (sequence, shift + index, prompt[index]) for index in range(next_index, min(len(prompt), rows.stop - shift))
        ]
    if not predicted:
        return
    places, tokens = [row for _, row, _ in predicted], [token for _, _, token in predicted]
    chosen = (logits[places, tokens] - logits.logsumexp(-1)[places]).tolist()
    for (sequence, row, token), value in zip(predicted, chosen, strict=True):
        top = sequence.sampling.logprobs
        score = log_probabilities(logits[row], top).of(token) if top else TokenLogprobs(value, {})
        sequence.prompt_logprobs.append(score)
