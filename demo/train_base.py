"""Trains the demo's base, a small Llama, from scratch on `demo.corpus`.

Hidden matrices are updated by Muon (Jordan et al. 2024), embeddings and norms by AdamW; the learning rate is constant
after a short warm-up and falls linearly to zero at the end. The loss counts the output in full and the prompt only
lightly: a random table has entropy that no model can learn. Knows no adapter and no task.
"""

import random
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

IGNORED = -100
POOL_BATCHES = 32


@dataclass(frozen=True)
class BaseSettings:
    """How the base is trained; the defaults make the committed one."""

    steps: int = 7000
    batch_size: int = 64
    matrix_learning_rate: float = 0.02
    matrix_weight_decay: float = 0.1
    other_learning_rate: float = 2e-3
    warmup_steps: int = 100
    decay_share: float = 1.0
    prompt_loss_weight: float = 0.1
    report_every: int = 250
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """Right-padded documents: token ids and the loss weight of each, both [documents, tokens]."""

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


def collate(rows: list[tuple[list[int], list[int]]], end: int, prompt_weight: float) -> Batch:
    """Pads (prompt ids, output ids) on the right. The end of text counts as output, padding weighs nothing.

    A token weighs the less the longer its output is, so that one-word answers are not drowned by long texts.
    """
    length = max(len(prompt) + len(output) for prompt, output in rows) + 1
    ids = torch.full((len(rows), length), end)
    weights = torch.zeros(len(rows), length)
    for row, (prompt, output) in enumerate(rows):
        tokens = [*prompt, *output, end]
        ids[row, : len(tokens)] = torch.tensor(tokens)
        weights[row, : len(prompt)] = prompt_weight * (len(output) + 1) ** -0.5
        weights[row, len(prompt) : len(tokens)] = (len(output) + 1) ** -0.5
    return Batch(ids, weights)


def batches(tokenizer: PreTrainedTokenizerBase, settings: BaseSettings, first: int) -> Iterator[Batch]:
    """The training batches from number `first` on; documents of like length share a batch."""
    pool = first // POOL_BATCHES
    skip = first % POOL_BATCHES
    while True:
        seed = settings.seed * 1_000_000 + pool
        rows = [
            _encode(tokenizer, document)
            for document in islice(documents(seed), POOL_BATCHES * settings.batch_size)
        ]
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        starts = list(range(0, len(rows), settings.batch_size))
        random.Random(seed).shuffle(starts)
        for start in starts[skip:]:
            chunk = rows[start : start + settings.batch_size]
            yield collate(chunk, tokenizer.eos_token_id, settings.prompt_loss_weight)
        pool, skip = pool + 1, 0


def _encode(tokenizer: PreTrainedTokenizerBase, document: Document) -> tuple[list[int], list[int]]:
    # The prompt ends in a new line, and no token spans one, so the two halves can be encoded apart.
    return tokenizer(document.prompt)["input_ids"], tokenizer(document.output)["input_ids"]


def weighted_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Mean cross-entropy of the next token under the weights. Padding is on the right, so no mask is needed."""
    logits = model(input_ids=batch.ids[:, :-1], use_cache=False).logits
    targets, weights = batch.ids[:, 1:].flatten(), batch.weights[:, 1:].flatten()
    return (cross_entropy(logits.flatten(0, 1), targets, reduction="none") * weights).sum() / weights.sum()


@torch.inference_mode()
def instructed_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, count: int = 50
) -> dict[str, float]:
    """Share of unseen examples per skill, asked for by the held-out wording, whose output greedy decoding gives.

    Greedy decoding gives the expected output exactly when each of its tokens is the likeliest after those before it.
    """
    result = {}
    for skill, instruction in HELD_OUT.items():
        rows = [
            _encode(tokenizer, Document(f"{instruction}\n{example.input}\n", example.output))
            for example in examples(skill, "test", count, seed=1)
        ]
        batch = collate(rows, tokenizer.eos_token_id, 0.0)
        best = model(input_ids=batch.ids[:, :-1], use_cache=False).logits.argmax(-1)
        right = (best == batch.ids[:, 1:]) | (batch.weights[:, 1:] == 0)
        result[skill] = right.all(1).float().mean().item()
    return result


def train_base(tokenizer: PreTrainedTokenizerBase, folder: Path, settings: BaseSettings) -> LlamaForCausalLM:
    """Train a base; an interrupted run goes on from the checkpoint in `folder`."""
    torch.manual_seed(settings.seed)
    model = new_base(tokenizer)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, settings.matrix_learning_rate, weight_decay=settings.matrix_weight_decay),
        torch.optim.AdamW(others, settings.other_learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    rates = [settings.matrix_learning_rate, settings.other_learning_rate]
    checkpoint = folder / "checkpoint.pt"
    step = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        step = state["step"]
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    stream = batches(tokenizer, settings, step)
    total = 0.0
    while step < settings.steps:
        for optimizer, rate in zip(optimizers, rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * _rate_share(step, settings)
            optimizer.zero_grad()
        loss = weighted_loss(model, next(stream))
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        total += loss.item()
        if step % settings.report_every == 0:
            accuracy = " ".join(
                f"{skill} {share:.2f}" for skill, share in instructed_accuracy(model, tokenizer).items()
            )
            print(f"step {step}  loss {total / settings.report_every:.4f}  {accuracy}", flush=True)
            total = 0.0
            states = [optimizer.state_dict() for optimizer in optimizers]
            torch.save({"step": step, "model": model.state_dict(), "optimizers": states}, checkpoint)
    return model


def _rate_share(step: int, settings: BaseSettings) -> float:
    warm = min(1.0, (step + 1) / settings.warmup_steps)
    left = (settings.steps - step) / (settings.steps * settings.decay_share)
    return min(warm, left)
