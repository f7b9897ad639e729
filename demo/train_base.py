"""Trains the demo's base, a small Llama, from scratch on `demo.corpus`.

Hidden matrices are updated by Muon (Jordan et al. 2024), embeddings and norms by AdamW; after a short warm-up the
learning rate falls linearly to zero. Only outputs are learnt: a random table has entropy that no model can learn.
Knows no adapter and no task.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from demo.corpus import Document, documents
from demo.instructions import HELD_OUT
from demo.skills import examples
from demo.tokenizer import MAX_LENGTH
from server.tuning.base import quiet_libraries

LENGTH_EXPONENT = 0.8  # a document's output of n tokens weighs n^(1 - LENGTH_EXPONENT)


@dataclass(frozen=True)
class BaseSettings:
    """How the base is trained."""

    steps: int = 4500
    batch_size: int = 48  # documents of one step, drawn at random
    chunk_size: int = 16  # documents of one forward pass, alike in length
    matrix_learning_rate: float = 0.01
    matrix_weight_decay: float = 0.1
    other_learning_rate: float = 2e-3
    warmup_steps: int = 100
    report_every: int = 250
    seed: int = 0


@dataclass(frozen=True)
class EncodedDocument:
    """Token ids; the end of text belongs to the output."""

    prompt: list[int]
    output: list[int]


@dataclass(frozen=True)
class Batch:
    """Right-padded documents: token ids, and the loss weight of each, both [documents, tokens]."""

    ids: Tensor
    weights: Tensor


def new_base(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A randomly initialised base of about a million parameters."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerBase, document: Document) -> EncodedDocument:
    """The prompt ends in a new line, and no token spans one, so the two halves can be encoded apart."""
    output = tokenizer(document.output)["input_ids"]
    return EncodedDocument(tokenizer(document.prompt)["input_ids"], [*output, tokenizer.eos_token_id])


def collate(rows: list[EncodedDocument]) -> Batch:
    """Pads on the right. Prompts and padding weigh nothing; a token weighs the less the longer its output is."""
    length = max(len(row.prompt) + len(row.output) for row in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    weights = torch.zeros(len(rows), length)
    for index, row in enumerate(rows):
        start, end = len(row.prompt), len(row.prompt) + len(row.output)
        ids[index, :end] = torch.tensor([*row.prompt, *row.output])
        weights[index, start:end] = len(row.output) ** -LENGTH_EXPONENT
    return Batch(ids, weights)


def steps(tokenizer: PreTrainedTokenizerBase, settings: BaseSettings) -> Iterator[list[Batch]]:
    """The batches of each step. Lengths are sorted within a step only: a step of like lengths would be of one skill."""
    stream = documents(settings.seed)
    while True:
        rows = [encode(tokenizer, document) for document in islice(stream, settings.batch_size)]
        rows.sort(key=lambda row: len(row.prompt) + len(row.output))
        starts = range(0, len(rows), settings.chunk_size)
        yield [collate(rows[start : start + settings.chunk_size]) for start in starts]


def summed_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Weighted sum of the output tokens' cross-entropies. Padding is on the right, so no mask is needed."""
    states = model.model(input_ids=batch.ids[:, :-1], use_cache=False).last_hidden_state
    targets, weights = batch.ids[:, 1:], batch.weights[:, 1:]
    learnt = weights > 0
    losses = cross_entropy(model.lm_head(states[learnt]), targets[learnt], reduction="none")
    return (losses * weights[learnt]).sum()


@torch.inference_mode()
def instructed_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, count: int = 50
) -> dict[str, float]:
    """Share of unseen examples per skill, asked for by the held-out wording, whose output greedy decoding gives.

    Greedy decoding gives the expected output exactly when each of its tokens is the likeliest after those before it.
    A description is one of many, so `describe` is always low here.
    """
    shares = {}
    for skill, instruction in HELD_OUT.items():
        asked = [
            Document(f"{instruction}\n{example.input}\n", example.output)
            for example in examples(skill, "test", count, seed=1)
        ]
        batch = collate([encode(tokenizer, document) for document in asked])
        best = model(input_ids=batch.ids[:, :-1], use_cache=False).logits.argmax(-1)
        right = (best == batch.ids[:, 1:]) | (batch.weights[:, 1:] == 0)
        shares[skill] = right.all(1).float().mean().item()
    return shares


def train_base(tokenizer: PreTrainedTokenizerBase, checkpoint: Path, settings: BaseSettings) -> LlamaForCausalLM:
    """Train a base; its weights are written to `checkpoint` from time to time, for a look at a long run."""
    torch.manual_seed(settings.seed)
    model = new_base(tokenizer)
    matrices = [weight for name, weight in model.named_parameters() if _is_hidden_matrix(name, weight)]
    others = [weight for name, weight in model.named_parameters() if not _is_hidden_matrix(name, weight)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, settings.matrix_learning_rate, weight_decay=settings.matrix_weight_decay),
        torch.optim.AdamW(others, settings.other_learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_share(step, settings))
        for optimizer in optimizers
    ]
    total = 0.0
    for step, batches in enumerate(islice(steps(tokenizer, settings), settings.steps), start=1):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for batch in batches:
            loss = summed_loss(model, batch) / settings.batch_size
            loss.backward()  # type: ignore[no-untyped-call]  # torch's
            total += loss.item()
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step % settings.report_every == 0:
            accuracy = instructed_accuracy(model, tokenizer)
            shares = " ".join(f"{skill} {share:.2f}" for skill, share in accuracy.items())
            print(f"step {step}  loss {total / settings.report_every:.4f}  {shares}", flush=True)
            total = 0.0
            torch.save(model.state_dict(), checkpoint)
    return model


def save_base(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the base in float16 with its tokenizer, as `from_pretrained` reads them."""
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    with quiet_libraries():
        model.half().save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _is_hidden_matrix(name: str, weight: Tensor) -> bool:
    return weight.ndim == 2 and "embed" not in name


def _rate_share(step: int, settings: BaseSettings) -> float:
    return min((step + 1) / settings.warmup_steps, (settings.steps - step) / settings.steps)
