"""The next token of each row, from its logits.

The order of the filters is vLLM's: impossible tokens, bias, penalties, temperature, min-p, top-k, top-p. A sampled
row draws by inverting the distribution function at one uniform number, which is a hash of (seed, choice, index of
the token): nothing about it depends on the batch, and a preempted sequence never draws again.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from server.engine.protocol import Sampling, TokenLogprobs
from server.engine.sequence import Sequence

_LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny  # a smaller one would be 0 or lose precision in float32


@dataclass(frozen=True)
class Choice:
    """What a row gives. `token` is None where the logits, as given or as the request adjusts them, are not finite."""

    token: int | None
    logprobs: TokenLogprobs | None


class Sampler:
    """Knows the base's end-of-sequence ids."""

    def __init__(self, eos_token_ids: list[int]) -> None:
        """`eos_token_ids` are masked until `min_tokens`."""
        self._eos_token_ids = eos_token_ids

    @torch.inference_mode()
    def choose(self, sequences: list[Sequence], logits: Tensor) -> list[Choice]:
        """Choose for each sequence from its row of `logits` `[rows, vocabulary]`, float32, which is overwritten."""
        tokens, finite = _best(logits)
        reported = [
            log_probabilities(row, sequence.sampling.logprobs)
            if ok and sequence.sampling.logprobs is not None
            else None
            for ok, sequence, row in zip(finite, sequences, logits, strict=True)
        ]
        asking = [index for index, ok in enumerate(finite) if ok and _is_adjusted(sequences[index])]
        for index in asking:
            self._adjust(sequences[index], logits[index])
        if asking:
            tokens, finite = _best(logits)  # extreme penalties may leave the range too
        drawn = [index for index, ok in enumerate(finite) if ok and sequences[index].sampling.temperature > 0]
        if drawn:
            by_chance = _draw([sequences[index] for index in drawn], logits[drawn])
            for index, token in zip(drawn, by_chance.tolist(), strict=True):
                tokens[index] = token
        return [
            Choice(token, None if table is None else table.of(token)) if ok else Choice(None, None)
            for ok, token, table in zip(finite, tokens, reported, strict=True)
        ]

    def _adjust(self, sequence: Sequence, row: Tensor) -> None:
        """Masks, bias and penalties, in place on `[vocabulary]`."""
        sampling, output = sequence.sampling, sequence.output
        if len(output) < sampling.min_tokens:
            row[[*self._eos_token_ids, *sampling.stop_token_ids]] = -torch.inf
        if sampling.logit_bias:
            row[list(sampling.logit_bias)] += torch.tensor(list(sampling.logit_bias.values()), device=row.device)
        if sampling.repetition_penalty != 1.0:
            seen = torch.tensor(sorted({*sequence.request.prompt, *output}), device=row.device)
            if len(seen):
                scores = row[seen]
                penalty = sampling.repetition_penalty
                row[seen] = torch.where(scores > 0, scores / penalty, scores * penalty)
        if output and (sampling.presence_penalty or sampling.frequency_penalty):
            counts = Counter(output)
            frequency = torch.tensor(list(counts.values()), dtype=row.dtype, device=row.device)
            row[list(counts)] -= sampling.presence_penalty + sampling.frequency_penalty * frequency


def _best(logits: Tensor) -> tuple[list[int], list[bool]]:
    """Of each row the first of its largest, and whether that is finite; NaN counts as larger than everything."""
    if logits.device.type == "cpu":  # in a quarter of the time of torch's own, or less
        values = logits.numpy()
        best = values.argmax(-1)
        return best.tolist(), np.isfinite(values[np.arange(len(best)), best]).tolist()
    largest, tokens = logits.max(-1)
    return tokens.tolist(), largest.isfinite().tolist()


def _is_adjusted(sequence: Sequence) -> bool:
    """Whether anything is to be done to the logits before they are drawn from."""
    sampling = sequence.sampling
    return (
        len(sequence.output) < sampling.min_tokens
        or bool(sampling.logit_bias)
        or sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
    )


@dataclass(frozen=True)
class LogprobTable:
    """The log-probabilities of one position, of which some are reported."""

    values: Tensor  # [vocabulary]
    top: int

    def of(self, token: int) -> TokenLogprobs:
        """The given token's and the best ones'."""
        best = self.values.topk(min(self.top, len(self.values)))
        return TokenLogprobs(
            float(self.values[token]), dict(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        )


def log_probabilities(row: Tensor, top: int) -> LogprobTable:
    """Of the model's own distribution, from `[vocabulary]` raw logits."""
    return LogprobTable(row.log_softmax(-1), top)


def _draw(sequences: list[Sequence], logits: Tensor) -> Tensor:
    """One token per row `[rows]` from the filtered distributions."""
    samplings = [sequence.sampling for sequence in sequences]
    logits -= logits.amax(-1, keepdim=True)  # so that no temperature, however small, makes the best one infinite
    logits /= _column([sampling.temperature for sampling in samplings], logits).clamp_min(_LEAST_TEMPERATURE)
    _filter(samplings, logits)
    mass = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    uniform = _column([noise(s.sampling.seed, s.request.choice, len(s.output)) for s in sequences], mass)
    drawn: Tensor = torch.searchsorted(mass, uniform * mass[:, -1:], right=True)
    return drawn[:, 0]


def _filter(samplings: list[Sampling], logits: Tensor) -> None:
    """min-p, top-k and top-p, in place; each only for the rows that ask for it."""
    rows = [index for index, sampling in enumerate(samplings) if sampling.min_p > 0]
    if rows:
        chosen = logits[rows]
        probabilities = chosen.softmax(-1)
        least = probabilities.amax(-1, keepdim=True) * _column([samplings[row].min_p for row in rows], logits)
        logits[rows] = chosen.masked_fill(probabilities < least, -torch.inf)
    rows = [index for index, sampling in enumerate(samplings) if sampling.top_k > 0 or sampling.top_p < 1]
    if rows:
        ordered, order = logits[rows].sort(dim=-1, descending=True, stable=True)  # ties fall alike in every batch
        ranks = torch.arange(ordered.shape[-1], device=logits.device)
        most = [samplings[row].top_k or ordered.shape[-1] for row in rows]
        ordered = ordered.masked_fill(ranks >= _column(most, ranks), -torch.inf)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # mass of better tokens: the best one always stays
        cut = (before >= _column([samplings[row].top_p for row in rows], logits)) & (ranks > 0)
        logits[rows] = torch.empty_like(ordered).scatter_(-1, order, ordered.masked_fill(cut, -torch.inf))


def _column(values: list[float] | list[int], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def noise(seed: int, choice: int, index: int) -> float:
    """A number in (0, 1), the same for the same arguments on every machine."""
    digest = hashlib.blake2b(struct.pack("<qqq", seed, choice, index), digest_size=4).digest()
    return (int.from_bytes(digest, "little") + 0.5) / 2**32
