"""The server's figures for Prometheus, in a registry of their own.

    medley_requests_total{task,outcome}      generating requests; outcome: ok, cancelled or an error's code
    medley_time_to_first_token_seconds       from the request's arrival to its first token
    medley_time_per_output_token_seconds     mean of one sequence, its first token left out
    medley_open_requests                     HTTP requests under way
    medley_step_seconds                      one step of the engine
    medley_step_rows                         sequences (and prefixes) in a step
    medley_step_adapters                     distinct adapters in a step
    medley_tokens_total{kind}                positions computed: prefill, decode, virtual; and cached ones, not computed
    medley_running_sequences                 in the batch
    medley_waiting_sequences                 in the queue
    medley_preemptions_total                 sequences that gave their pages back and will resume
    medley_prompt_tokens_total               positions of prompts whose turn has come, virtual ones counted
    medley_prompt_tokens_cached_total        of those, the ones found in the KV cache: the hit rate is their quotient
    medley_kv_pages, medley_kv_pages_used    the KV cache, and what sequences have of it
    medley_kv_pages_idle                     cached for whoever may come, given up when pages run short
    medley_bank_capacity_bytes, medley_bank_bytes, medley_bank_adapters   resident adapters
    medley_bank_pinned_bytes                 of adapters that never leave
    medley_pins_left_out                     pinned tasks that may leave: together they are more than pins may have
    medley_adapter_load_seconds              of an adapter that became resident
    medley_store_errors_total                requests that the task index could not answer
    medley_redis_available                   1 while the index's changes are followed, 0 while Redis is away
    medley_refused_total{code}               turned away before they were read: unauthorized, forbidden, quota_exceeded
    medley_uploads_total{outcome}            created, existing, checked (a dry run) or an error's code
    medley_customizations_total{outcome}     users' uploads: created, checked or an error's code
    medley_customized_requests_total{mode}   generating requests that a user's customization was applied to

Labels are bounded: the first 100 tasks seen have their own, the rest are `other`; requests to the base are `base`;
requests for what does not exist, `unknown`.
"""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from server.engine.protocol import StepStats

CONTENT_TYPE = CONTENT_TYPE_LATEST
MAX_TASK_LABELS = 100
_OTHER = "other"
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_COUNTS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Metrics:
    """See the module. Used from the event loop only."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._tasks: set[str] = set()
        self._requests = Counter("medley_requests", "Generating requests", ["task", "outcome"], registry=registry)
        self._uploads = Counter("medley_uploads", "Uploaded versions", ["outcome"], registry=registry)
        self._refused = Counter("medley_refused", "Turned away at the door", ["code"], registry=registry)
        self._customizations = Counter("medley_customizations", "Uploaded by users", ["outcome"], registry=registry)
        self._customized = Counter("medley_customized_requests", "Under a user's own", ["mode"], registry=registry)
        self._store_errors = Counter("medley_store_errors", "Unanswered by the task index", registry=registry)
        self._first_token = _seconds("medley_time_to_first_token_seconds", "Arrival to first token", registry)
        self._output_token = _seconds("medley_time_per_output_token_seconds", "Mean of one sequence", registry)
        self._open_requests = Gauge("medley_open_requests", "HTTP requests under way", registry=registry)
        self._redis = Gauge("medley_redis_available", "Whether the index is followed", registry=registry)
        self._pins_left_out = Gauge("medley_pins_left_out", "Pinned tasks that may leave", registry=registry)
        self._steps = _StepMetrics(registry)

    def request(self, task: str, outcome: str) -> None:
        """A generating request has ended."""
        if task not in self._tasks and len(self._tasks) < MAX_TASK_LABELS:
            self._tasks.add(task)
        self._requests.labels(task if task in self._tasks else _OTHER, outcome).inc()

    def first_token(self, seconds: float) -> None:
        """A request's first token has come."""
        self._first_token.observe(seconds)

    def output_tokens(self, seconds: float, count: int) -> None:
        """A sequence has ended; `seconds` from its first to its last of `count` tokens."""
        if count > 1:
            self._output_token.observe(seconds / (count - 1))

    def cached_tokens(self, count: int) -> None:
        """Positions that a request found computed."""
        self._steps.tokens.labels("cached").inc(count)

    def upload(self, outcome: str) -> None:
        """An upload has ended."""
        self._uploads.labels(outcome).inc()

    def refused(self, code: str) -> None:
        """A caller was not let in."""
        self._refused.labels(code).inc()

    def customization(self, outcome: str) -> None:
        """An upload of a user's customization has ended."""
        self._customizations.labels(outcome).inc()

    def customized(self, mode: str) -> None:
        """A generating request uses a customization of this mode."""
        self._customized.labels(mode).inc()

    def store_error(self) -> None:
        """The index could not answer."""
        self._store_errors.inc()

    def step(self, stats: StepStats) -> None:
        """A step has run; the hook of the engine's client."""
        self._steps.observe(stats)

    def render(self, open_requests: int, *, redis_available: bool, pins_left_out: int) -> bytes:
        """Everything, in Prometheus' text format."""
        self._pins_left_out.set(pins_left_out)
        self._open_requests.set(open_requests)
        self._redis.set(redis_available)
        return generate_latest(self._registry)


class _StepMetrics:
    """What the engine says after each step."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = _seconds("medley_step_seconds", "One step", registry)
        self._rows = Histogram("medley_step_rows", "Rows of a step", buckets=_COUNTS, registry=registry)
        self._adapters = Histogram("medley_step_adapters", "Distinct in a step", buckets=_COUNTS, registry=registry)
        self._loads = _seconds("medley_adapter_load_seconds", "Until resident", registry)
        self.tokens = Counter("medley_tokens", "Positions by kind", ["kind"], registry=registry)
        self._prompt_tokens = Counter("medley_prompt_tokens", "Positions that came", registry=registry)
        self._prompt_tokens_cached = Counter("medley_prompt_tokens_cached", "Of those, found", registry=registry)
        self._preemptions = Counter("medley_preemptions", "Preempted sequences", registry=registry)
        self._gauges = {
            field: Gauge(name, help_text, registry=registry)
            for field, name, help_text in (
                ("running", "medley_running_sequences", "In the batch"),
                ("waiting", "medley_waiting_sequences", "In the queue"),
                ("kv_pages", "medley_kv_pages", "Pages of the KV cache"),
                ("kv_pages_used", "medley_kv_pages_used", "Pages that sequences have"),
                ("kv_pages_idle", "medley_kv_pages_idle", "Cached pages that none has"),
                ("bank_capacity", "medley_bank_capacity_bytes", "Room for resident adapters"),
                ("bank_bytes", "medley_bank_bytes", "Of resident adapters"),
                ("bank_pinned_bytes", "medley_bank_pinned_bytes", "Of adapters that never leave"),
                ("bank_adapters", "medley_bank_adapters", "Resident adapters"),
            )
        }

    def observe(self, stats: StepStats) -> None:
        """Take one step's figures."""
        if stats.rows:  # a step that only answers has run nothing
            self._seconds.observe(stats.seconds)
            self._rows.observe(stats.rows)
            self._adapters.observe(stats.adapters)
        self.tokens.labels("prefill").inc(stats.prefill_tokens)
        self.tokens.labels("decode").inc(stats.decode_tokens)
        self.tokens.labels("virtual").inc(stats.virtual_tokens)
        self._prompt_tokens.inc(stats.prompt_tokens)
        self._prompt_tokens_cached.inc(stats.cached_tokens)
        self._preemptions.inc(stats.preemptions)
        for field, gauge in self._gauges.items():
            gauge.set(getattr(stats, field))
        for seconds in stats.load_seconds:
            self._loads.observe(seconds)


def _seconds(name: str, help_text: str, registry: CollectorRegistry) -> Histogram:
    return Histogram(name, help_text, buckets=_SECONDS, registry=registry)
