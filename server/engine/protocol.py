"""The messages between the HTTP process and the engine process.

Frozen msgspec structs, one MessagePack frame each, over one stream socket (`server.engine.channel`). Requests
name their adapters by content, so the engine needs the blob store but no index; text stays on the HTTP side,
so the engine knows token ids only. This module knows no torch.

    HTTP → engine   Configure, once; then Generate, Abort, Pin, Healed, Inspect, Neighbours
    engine → HTTP   Ready, once; then StepOutput after each step, Inspected per upload, NeighboursFound per question,
                    Fatal before it dies
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of every message; the tag is the class's name."""


class Configure(Message, frozen=True, kw_only=True):
    """What the engine runs with; the values are those of `server.settings`, sizes in bytes."""

    model: str  # hub id or folder
    base_id: str  # the id that clients use
    device: str
    dtype: str
    max_seqs: int
    max_batch_tokens: int
    max_prefill_tokens: int | None
    max_model_len: int | None
    kv_cache_bytes: int | None
    adapter_bytes: int
    page_size: int
    max_queue: int
    blobs: str  # the blob store, as `open_blobs` takes it
    blob_cache: str  # a folder for copies of its blobs, where it is a bucket
    blob_cache_bytes: int
    cache: str  # a folder for what may be computed again: fingerprints
    log_level: str = "info"
    log_format: Literal["text", "json"] = "text"


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How the next token is chosen. Names and meanings are OpenAI's and vLLM's."""

    max_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # Keskar et al. 2019 (CTRL); over prompt and output
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0  # the HTTP side draws one where the caller gave none
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = None  # how many alternatives beside the chosen token; None: no log-probabilities
    prompt_logprobs_from: int | None = None  # the same for the prompt's tokens from this one on; None: for none


class AdapterRef(msgspec.Struct, frozen=True):
    """One adapter of a stack, by content: the version's digest and the blobs of its files."""

    digest: str
    files: dict[str, str]  # file name → sha256 of its blob


class Generate(Message, frozen=True, kw_only=True):
    """Run one sequence: a prompt under a stack of adapters, task's first. `n` choices are `n` of these."""

    id: str  # unique among the open ones
    prompt: list[int]
    stack: tuple[AdapterRef, ...] = ()
    sampling: Sampling
    classify: bool = False  # the stack's classification head answers, with the prompt's scores; `max_tokens` is 0
    choice: int = 0  # index among the request's choices; with seed and position it fixes the noise
    client: str = ""  # who is served: fairness is between clients
    tenant: str = ""  # only its own requests find in the KV cache what it has computed
    priority: int = 0  # 0–9; lower starts earlier
    deadline: float  # Unix time in seconds


class Abort(Message, frozen=True, kw_only=True):
    """Forget the sequence; nothing more is said of it. An unknown id is ignored."""

    id: str


class Pin(Message, frozen=True, kw_only=True):
    """These adapters, and no others, are loaded ahead and stay in the bank from now on."""

    adapters: list[AdapterRef]


class Healed(Message, frozen=True, kw_only=True):
    """These blobs are whole again: adapters that failed for them may be read at once."""

    blobs: list[str]  # sha256


class Inspect(Message, frozen=True, kw_only=True):
    """Check an adapter's files in a local folder against the base, beside the steps."""

    id: str
    folder: str
    under: AdapterRef | None = None  # the task's adapter, over which these files are to be laid


class Neighbours(Message, frozen=True, kw_only=True):
    """Find what an adapter's virtual tokens are near to, beside the steps."""

    id: str
    adapter: AdapterRef
    k: int  # tokens of the vocabulary for each


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities (nats) at one position, of the model's own distribution."""

    chosen: float
    top: dict[int, float]  # token id → log-probability, best first


class Classification(msgspec.Struct, frozen=True, array_like=True):
    """What a classification head says of a prompt."""

    kind: Literal["single", "multiple", "regression"]  # one label is right, any number of them are, or it is a number
    labels: list[str]  # the checkpoint's names
    logits: list[float]  # of each label; of a regression the number


class Tokens(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a step gave one sequence. The one with `finish_reason` is its last."""

    id: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """With the first tokens. None of the prompt's first, unless a soft prompt stands before it."""
    classification: Classification | None = None
    finish_reason: str | None = None  # stop | length
    stop_token: int | None = None  # the id that ended it; not in `token_ids`
    virtual_tokens: int = 0  # of the stack
    cached_tokens: int = 0  # positions that were not computed for this sequence, virtual ones counted


class Failed(msgspec.Struct, frozen=True, kw_only=True):
    """A sequence's end by an error: the fields of a `RequestError`."""

    id: str
    code: str
    message: str
    param: str | None = None


class StepStats(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of one step, for the metrics."""

    seconds: float
    rows: int
    adapters: int  # distinct ones in the step
    prefill_tokens: int
    decode_tokens: int
    virtual_tokens: int  # soft-prompt positions run in this step
    running: int
    waiting: int
    preemptions: int  # since the step before
    prompt_tokens: int  # of the sequences that started in this step, virtual ones counted; none is counted twice
    cached_tokens: int  # of those, the ones that were found in the KV cache
    kv_pages_used: int  # by sequences
    kv_pages_idle: int  # of the cache, nobody's at present; given up when pages run short
    kv_pages: int
    bank_bytes: int
    bank_capacity: int
    bank_adapters: int
    bank_pinned_bytes: int = 0  # of `bank_bytes`, what never leaves
    load_seconds: list[float]  # of adapters that became resident since the step before


class StepOutput(Message, frozen=True, kw_only=True):
    """Everything one step has to say, in one frame."""

    tokens: list[Tokens]
    failed: list[Failed]
    stats: StepStats


class AdapterFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What a checked adapter is."""

    method: str
    parameters: int
    bytes: int  # resident on the device
    virtual_tokens: int
    rank: int | None
    warnings: list[str]
    tasks: int | None = None  # how many tasks its checkpoint holds, where it is one of several


class Inspected(Message, frozen=True, kw_only=True):
    """The answer to `Inspect`: facts, or the error that refuses the upload."""

    id: str
    facts: AdapterFacts | None = None
    error: Failed | None = None


class Neighbour(msgspec.Struct, frozen=True, array_like=True):
    """A token of the vocabulary near a virtual one."""

    token_id: int
    similarity: float  # cosine of the two embeddings
    norm: float  # of the token's embedding


class VirtualToken(msgspec.Struct, frozen=True, array_like=True):
    """A soft prompt's."""

    norm: float
    nearest: list[Neighbour]  # the nearest first


class LayerNorms(msgspec.Struct, frozen=True, array_like=True):
    """A prefix's in one layer: of each virtual token's key and value, over all heads."""

    keys: list[float]
    values: list[float]


class NeighboursFound(Message, frozen=True, kw_only=True):
    """The answer to `Neighbours`: a soft prompt's tokens, a prefix's norms, or an error."""

    id: str
    tokens: list[VirtualToken] = []
    layers: list[LayerNorms] = []
    error: Failed | None = None


class MethodEntry(msgspec.Struct, frozen=True, kw_only=True):
    """A method that adapters may have here, for the listing."""

    name: str
    mechanism: str
    formats: list[str]  # of checkpoints
    parameters: str  # per layer
    cost: str


class BaseFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What the HTTP side needs to know of the base."""

    id: str
    fingerprint: str
    architecture: str
    parameters: int
    dtype: str
    device: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: list[int]
    tokenizer: str | None  # `tokenizer.json`'s text; None: token-id prompts only
    special_tokens: dict[str, str]  # bos_token, eos_token, … as a chat template names them
    chat_template: str | None
    kv_pages: int
    page_size: int
    methods: list[MethodEntry] = []


class Ready(Message, frozen=True, kw_only=True):
    """The base is loaded, probed, and the engine steps."""

    base: BaseFacts


class Fatal(Message, frozen=True, kw_only=True):
    """The engine cannot start or go on; the process exits after this."""

    message: str


ToEngine = Configure | Generate | Abort | Pin | Healed | Inspect | Neighbours
FromEngine = Ready | StepOutput | Inspected | NeighboursFound | Fatal
