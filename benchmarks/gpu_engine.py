"""The engine as `benchmarks.gpu` drives it: steps that decode, prompts, and the same work by transformers' own ways."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from transformers import GenerationConfig, PreTrainedModel

from benchmarks.gpu_base import Shape, seconds
from benchmarks.inprocess import engine_limits, step
from server.adapters import Adapter, EmbeddingPrefix, KeyValuePrefix
from server.adapters.deltas import input_scale, low_rank, output_scale
from server.engine.engine import Engine
from server.engine.pages import pages_for
from server.engine.protocol import AdapterRef, Generate, Sampling
from server.model import FrozenBase, KVCache
from server.model.varlen_attention import find_kernel

MEASURED_STEPS, WARM_STEPS = 24, 8  # of one decode measurement; a graph is captured at its second step
VIRTUAL_TOKENS, RANK = 32, 16
_REPEATS = 5  # of the same work by the engine and by its peers
_PREFILL_TOKENS = 8192  # of a step
_BANK_BYTES = 8 * 2**30
_SPARE_BYTES = 4 * 2**30  # activations, graphs


@dataclass(frozen=True)
class Decode:
    """A measurement of steps in which all rows decode."""

    seconds: float  # of a step
    context: int  # positions of all rows together


class Bench:
    """One base and one engine at a time."""

    def __init__(self, shape: Shape, base: FrozenBase) -> None:
        """Pages are as large as the server's, and attention is what it would choose."""
        self.shape, self.base = shape, base
        self.page_size = engine_limits(0).page_size
        self.attention = f"{find_kernel(base, self.page_size)[1]}, pages of {self.page_size} tokens"
        self._ids = itertools.count()

    def engine(self, rows: int, context: int) -> Engine:
        """With room for so many rows, whatever virtual tokens they have."""
        limits = engine_limits(
            self._pages(rows, context),
            max_seqs=rows,
            max_prefill_tokens=_PREFILL_TOKENS,
            max_batch_tokens=_PREFILL_TOKENS + rows,
            adapter_bytes=_BANK_BYTES if self.base.device.type == "cuda" else 2**26,
        )

        def load(files: Mapping[str, str]) -> Adapter:
            return make_adapter(files["kind"], int(files["seed"]), self.shape, self.base)

        return Engine(self.base, limits, load)

    def fits(self, rows: int, context: int) -> bool:
        """Whether the KV pages and the bank of an engine for them have room on the device."""
        if self.base.device.type != "cuda":
            return True
        torch.cuda.empty_cache()
        size = self._pages(rows, context) * KVCache.page_bytes(self.base.layers, self.page_size, self.base.dtype)
        return size + _BANK_BYTES + _SPARE_BYTES < torch.cuda.mem_get_info()[0]

    def _pages(self, rows: int, context: int) -> int:
        """A task's virtual tokens take pages of their own, and end in one that is each row's."""
        return rows * (pages_for(context + VIRTUAL_TOKENS, self.page_size) + 1) + self.shape.tasks * pages_for(
            VIRTUAL_TOKENS, self.page_size
        )

    def longest(self, rows: int, context: int) -> int:
        """Positions of a row in `decode`: it goes on while the others' prompts run, some of a step or one a step."""
        return context + WARM_STEPS + MEASURED_STEPS + -(-rows * context // _PREFILL_TOKENS) + rows

    def decode(self, engine: Engine, rng: random.Random, rows: int, context: int, kinds: Sequence[str] = ()) -> Decode:
        """Steps in which all rows decode, from the first step with nothing else on."""
        wanted = WARM_STEPS + MEASURED_STEPS
        tasks = [(kinds[row % len(kinds)], row % self.shape.tasks) if kinds else None for row in range(rows)]
        self._make_resident(engine, rng, tasks)
        for task in tasks:
            prompt = [rng.randrange(self.shape.vocabulary) for _ in range(context)]
            engine.add(self._request(prompt, self.longest(rows, context) - context, task))
        lengths = rows * context
        taken: list[tuple[float, int]] = []
        while len(taken) < wanted:
            if not engine.has_work:
                raise RuntimeError(f"rows ended before all {rows} had decoded together for {wanted} steps")
            stats = step(engine).stats
            lengths += stats.decode_tokens
            if stats.decode_tokens == rows and not stats.prefill_tokens:
                taken.append((stats.seconds, lengths))
        for name in list(engine._sequences):
            engine.abort(name)
        measured = taken[WARM_STEPS:]
        return Decode(median(each for each, _ in measured), round(median(length for _, length in measured)))

    def _make_resident(self, engine: Engine, rng: random.Random, tasks: Sequence[tuple[str, int] | None]) -> None:
        """Run each task once, so that no row waits for its adapter while the others run out."""
        for task in dict.fromkeys(tasks):
            engine.add(self._request([rng.randrange(self.shape.vocabulary)], 1, task))
        while engine.has_work:
            step(engine)

    def prefill(self, rng: random.Random, prompts: int, rounds: int) -> float:
        """Seconds of whole prompts' only step, per token: the median of so many, one more to warm up not counted."""
        engine = self.engine(prompts, self.shape.prompt)
        taken: list[float] = []
        for _ in range(rounds + 1):
            for _ in range(prompts):
                engine.add(self._request([rng.randrange(self.shape.vocabulary) for _ in range(self.shape.prompt)], 1))
            spent = tokens = 0.0
            while engine.has_work:
                stats = step(engine).stats
                spent, tokens = spent + stats.seconds, tokens + stats.prefill_tokens
            taken.append(spent / tokens)
        engine.close()
        return median(taken[1:])

    def _request(self, prompt: list[int], new_tokens: int, task: tuple[str, int] | None = None) -> Generate:
        stack: tuple[AdapterRef, ...] = ()
        if task is not None:
            kind, seed = task
            stack = (AdapterRef(digest=f"{kind}-{seed}", files={"kind": kind, "seed": str(seed)}),)
        return Generate(
            id=str(next(self._ids)),
            prompt=prompt,
            stack=stack,
            sampling=Sampling(max_tokens=new_tokens, temperature=0.0, ignore_eos=True),
            deadline=time.time() + 3600,
        )


def make_adapter(kind: str, seed: int, shape: Shape, base: FrozenBase) -> Adapter:
    """Random values of the order that training gives, in host memory as a loader has them."""
    generator = torch.Generator().manual_seed(seed)

    def values(*sizes: int, std: float, mean: float = 0.0) -> torch.Tensor:
        return (mean + std * torch.randn(*sizes, generator=generator)).to(base.dtype)

    if kind == "prompt":
        return Adapter(kind, EmbeddingPrefix(values(VIRTUAL_TOKENS, shape.hidden, std=0.02)))
    if kind == "prefix":
        blocks = (
            values(2 * VIRTUAL_TOKENS, layer.kv_heads * layer.head_dim, std=0.1).contiguous() for layer in base.layers
        )
        return Adapter(kind, KeyValuePrefix(VIRTUAL_TOKENS, tuple(blocks)))
    deltas = {}
    for name, site in base.shape.sites.items():
        if kind == "ia3" and name.endswith(("k_proj", "v_proj")):
            deltas[name] = output_scale(values(site.outputs, std=0.05, mean=1.0))
        elif kind == "ia3" and name.endswith("down_proj"):
            deltas[name] = input_scale(values(site.inputs, std=0.05, mean=1.0))
        elif kind == "lora" and name.endswith(("q_proj", "v_proj")):
            down, up = values(RANK, site.inputs, std=0.02), values(RANK, site.outputs, std=0.02)
            deltas[name] = low_rank(down, up)
    return Adapter(kind, None, deltas)


def peers(model: PreTrainedModel, shape: Shape, rows: int, context: int) -> Iterator[tuple[str, float | str]]:
    """Output tokens a second of transformers' own ways on the same work, or why there are none."""
    rng = random.Random(0)
    prompts = [[rng.randrange(shape.vocabulary) for _ in range(context)] for _ in range(rows)]
    new = MEASURED_STEPS + WARM_STEPS
    config = GenerationConfig(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=-1)
    ids = torch.tensor(prompts, device=model.device)

    def static_batch() -> None:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)

    def continuous_batch() -> None:
        model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)

    model.set_attn_implementation("sdpa")
    ways = {"HF generate": static_batch, "generate_batch": continuous_batch}
    if model.device.type != "cuda":
        del ways["generate_batch"]
        yield "generate_batch", "did not run: it takes nearly all memory that it finds, on a CPU the machine's"
    for name, call in ways.items():
        try:
            with torch.inference_mode():
                yield name, rows * new / seconds(call, model.device, repeats=_REPEATS)
        except Exception as error:  # noqa: BLE001 - a peer may not run on this machine: the report says so
            yield name, f"did not run: {error}".partition("\n")[0]


def own_rate(bench: Bench, rows: int, context: int) -> float:
    """Output tokens a second of the same work as `peers`."""
    rng = random.Random(0)
    engine = bench.engine(rows, context + MEASURED_STEPS + WARM_STEPS)
    new = MEASURED_STEPS + WARM_STEPS

    def work() -> None:
        for _ in range(rows):
            engine.add(bench._request([rng.randrange(bench.shape.vocabulary) for _ in range(context)], new))
        while engine.has_work:
            step(engine)

    rate = rows * new / seconds(work, bench.base.device, repeats=_REPEATS)
    engine.close()
    return rate
