"""The sampler against slow, obvious statements of what each setting means."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from server.engine.protocol import Generate, Sampling
from server.engine.sampler import Choice, Sampler, log_probabilities, noise
from server.engine.sequence import Sequence

VOCABULARY = 40
EOS = 2


def _sequence(prompt: list[int], output: list[int], choice: int = 0, **sampling: Any) -> Sequence:
    request = Generate(
        id="x", prompt=prompt, sampling=Sampling(**{"max_tokens": 99, **sampling}), choice=choice, deadline=0.0
    )
    return Sequence(request, output=output)


def _logits(seed: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def _choose(sequence: Sequence, logits: Tensor) -> Choice:
    return Sampler([EOS]).choose([sequence], logits.clone())[0]


def _support(logits: Tensor, draws: int = 300, **sampling: Any) -> set[int]:
    """Tokens that come out under many seeds."""
    sequences = [_sequence([5], [6], seed=seed, **sampling) for seed in range(draws)]
    choices = Sampler([EOS]).choose(sequences, logits.expand(draws, -1).clone())
    return {choice.token for choice in choices if choice.token is not None}


def _allowed(logits: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> dict[int, float]:
    """The filtered distribution, one token at a time: min-p, then top-k, then top-p of what is left."""
    probabilities = dict(enumerate((logits[0].double() / temperature).softmax(-1).tolist()))
    best = max(probabilities.values())
    left = {token: p for token, p in probabilities.items() if p >= min_p * best}
    ordered = sorted(left, key=lambda token: -left[token])[: top_k if top_k > 0 else None]
    total = sum(left[token] for token in ordered)
    kept: list[int] = []
    mass = 0.0
    for token in ordered:
        if kept and mass >= top_p:
            break
        kept.append(token)
        mass += left[token] / total
    total = sum(left[token] for token in kept)
    return {token: left[token] / total for token in kept}


_FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 10_000},
    {"top_p": 0.0},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_k": 8, "top_p": 0.8},
    {"top_k": 12, "top_p": 0.95, "min_p": 0.02},
]


@pytest.mark.parametrize("filters", _FILTERS, ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_draws_follow_the_filtered_distribution(filters: dict[str, Any], temperature: float) -> None:
    logits = _logits(3)
    arguments = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, **filters}
    expected = _allowed(logits, temperature, **arguments)
    draws = 3000
    sequences = [_sequence([], [], seed=seed, temperature=temperature, **filters) for seed in range(draws)]
    tokens = Counter(choice.token for choice in Sampler([EOS]).choose(sequences, logits.expand(draws, -1).clone()))
    assert {token for token in tokens if token is not None} <= set(expected)
    # Pearson's statistic over tokens expected often enough; its mean is their number
    common = {token: p * draws for token, p in expected.items() if p * draws >= 5}
    statistic = sum((tokens[token] - want) ** 2 / want for token, want in common.items())
    assert statistic < len(common) + 6 * math.sqrt(2 * len(common)) + 6


def test_rows_with_different_settings_share_a_batch_and_choose_as_alone() -> None:
    logits = _logits(8, rows=len(_FILTERS) * 2)
    sequences = [
        _sequence([3, 4], [5, 5, 9], seed=index, temperature=0.0 if index % 5 == 0 else 0.9, **filters)
        for index, filters in enumerate([*_FILTERS, *reversed(_FILTERS)])
    ]
    together = [choice.token for choice in Sampler([EOS]).choose(sequences, logits.clone())]
    alone = [_choose(sequence, row[None]).token for sequence, row in zip(sequences, logits, strict=True)]
    assert together == alone


def test_greedy_takes_the_best_token_whatever_the_filters() -> None:
    logits = _logits(4)
    best = int(logits.argmax())
    for filters in _FILTERS:
        assert _choose(_sequence([1], [], temperature=0.0, **filters), logits).token == best


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40, 1e-46, 1e-320])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    for seed in range(20):
        logits = _logits(seed) * 10
        assert _choose(_sequence([], [], temperature=temperature, seed=seed), logits).token == int(logits.argmax())


def test_a_huge_temperature_draws_from_all_tokens() -> None:
    assert len(_support(_logits(5), temperature=1e30)) > VOCABULARY * 0.9


def test_equal_logits_at_the_edge_of_top_k_are_cut_the_same_way_in_any_batch() -> None:
    tied = torch.zeros(1, VOCABULARY)
    alone = [_choose(_sequence([], [], seed=seed, temperature=1.0, top_k=3), tied).token for seed in range(50)]
    sequences = [_sequence([], [], seed=seed, temperature=1.0, top_k=3) for seed in range(50)]
    together = [choice.token for choice in Sampler([EOS]).choose(sequences, tied.expand(50, -1).clone())]
    assert together == alone
    assert len(set(together)) == 3


def test_noise_depends_on_seed_choice_and_position_alone() -> None:
    numbers = {
        (seed, choice, index): noise(seed, choice, index)
        for seed in range(9)
        for choice in range(3)
        for index in range(40)
    }
    assert len(set(numbers.values())) == len(numbers)
    assert all(0 < number < 1 for number in numbers.values())
    assert abs(sum(numbers.values()) / len(numbers) - 0.5) < 0.03
    assert noise(7, 1, 3) == numbers[7, 1, 3]
    assert noise(-(2**63), 0, 0) != noise(2**63 - 1, 0, 0)


def test_choices_of_one_request_differ() -> None:
    logits = torch.zeros(1, VOCABULARY)
    tokens = {_choose(_sequence([], [], choice, seed=1, temperature=1.0), logits).token for choice in range(10)}
    assert len(tokens) > 4


def test_repetition_penalty_is_over_prompt_and_output_and_shrinks_by_sign() -> None:
    logits = torch.full((1, VOCABULARY), -50.0)
    logits[0, [5, 6, 7]] = torch.tensor([4.0, 3.9, 1.5])
    greedy: dict[str, Any] = {"temperature": 0.0, "repetition_penalty": 2.0}
    assert _choose(_sequence([1], [1], **greedy), logits).token == 5
    assert _choose(_sequence([5], [], **greedy), logits).token == 6  # 4 / 2 < 3.9
    assert _choose(_sequence([5], [6], **greedy), logits).token == 5  # 2 > 1.95 > 1.5
    negative = torch.full((1, VOCABULARY), -50.0)
    negative[0, [5, 6]] = torch.tensor([-1.0, -1.5])
    assert _choose(_sequence([5], [], **greedy), negative).token == 6  # -1 · 2 < -1.5


def test_presence_and_frequency_penalties_are_over_the_output_alone() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, [5, 6]] = torch.tensor([3.0, 2.0])
    assert _choose(_sequence([5, 5], [], temperature=0.0, presence_penalty=2.0), logits).token == 5
    assert _choose(_sequence([], [5], temperature=0.0, presence_penalty=0.9), logits).token == 5
    assert _choose(_sequence([], [5, 5, 5], temperature=0.0, presence_penalty=0.9), logits).token == 5
    assert _choose(_sequence([], [5], temperature=0.0, presence_penalty=1.1), logits).token == 6
    assert _choose(_sequence([], [5], temperature=0.0, frequency_penalty=0.6), logits).token == 5
    assert _choose(_sequence([], [5, 5], temperature=0.0, frequency_penalty=0.6), logits).token == 6
    assert _choose(_sequence([], [5], temperature=0.0, presence_penalty=0.6, frequency_penalty=0.6), logits).token == 6
    assert _choose(_sequence([], [6], temperature=0.0, presence_penalty=-1.5), logits).token == 6


def test_logit_bias_is_added() -> None:
    logits = _logits(9)
    assert _choose(_sequence([], [], temperature=0.0, logit_bias={17: 100.0}), logits).token == 17
    best = int(logits.argmax())
    second = int(logits[0].topk(2).indices[1])
    assert _choose(_sequence([], [], temperature=0.0, logit_bias={best: -100.0}), logits).token == second


def test_end_and_stop_ids_are_impossible_until_min_tokens_with_ignore_eos_too() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, [EOS, 7, 8]] = torch.tensor([90.0, 80.0, 70.0])
    for ignore_eos in (False, True):
        options: dict[str, Any] = {
            "temperature": 0.0,
            "min_tokens": 2,
            "stop_token_ids": (7,),
            "ignore_eos": ignore_eos,
        }
        assert _choose(_sequence([1], [], **options), logits).token == 8
        assert _choose(_sequence([1], [8], **options), logits).token == 8
        assert _choose(_sequence([1], [8, 8], **options), logits).token == EOS
    assert 7 not in _support(logits, temperature=1.0, min_tokens=9, stop_token_ids=(7,))


def test_min_tokens_on_a_base_without_end_of_sequence_changes_nothing() -> None:
    logits = _logits(2)
    choice = Sampler([]).choose([_sequence([], [], temperature=0.0, min_tokens=3)], logits.clone())[0]
    assert choice.token == int(logits.argmax())


def test_reported_log_probabilities_are_of_the_models_own_distribution() -> None:
    logits = _logits(6)
    own = logits[0].log_softmax(-1)
    options: dict[str, Any] = {
        "temperature": 0.3,
        "top_k": 2,
        "logit_bias": {9: 50.0},
        "repetition_penalty": 1.7,
        "presence_penalty": 1.0,
        "min_tokens": 5,
        "logprobs": 4,
    }
    choice = _choose(_sequence([4], [9], **options), logits)
    assert choice.token == 9
    assert choice.logprobs is not None
    assert choice.logprobs.chosen == pytest.approx(float(own[9]), abs=1e-6)
    best = own.topk(4)
    assert list(choice.logprobs.top) == best.indices.tolist()
    assert list(choice.logprobs.top.values()) == pytest.approx(best.values.tolist(), abs=1e-6)


def test_zero_log_probabilities_report_the_chosen_token_alone() -> None:
    choice = _choose(_sequence([], [], temperature=0.0, logprobs=0), _logits(1))
    assert choice.logprobs is not None
    assert choice.logprobs.top == {}
    assert _choose(_sequence([], [], temperature=0.0), _logits(1)).logprobs is None


def test_more_alternatives_than_the_vocabulary_has_are_all_of_it() -> None:
    assert len(log_probabilities(_logits(1)[0], 10_000).of(3).top) == VOCABULARY


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_gives_no_token_and_leaves_its_neighbours_alone(value: float) -> None:
    logits = _logits(7, rows=3)
    expected = [_choose(_sequence([], [], seed=3, temperature=1.0), row[None]).token for row in logits]
    logits[1, 5] = value
    sequences = [_sequence([], [], seed=3, temperature=1.0, logprobs=1) for _ in range(3)]
    choices = Sampler([EOS]).choose(sequences, logits)
    assert choices[1] == Choice(None, None)
    assert [choices[0].token, choices[2].token] == [expected[0], expected[2]]


def test_a_row_of_minus_infinities_is_not_finite() -> None:
    assert _choose(_sequence([], [], temperature=0.0), torch.full((1, VOCABULARY), -math.inf)).token is None


def test_tokens_that_the_model_itself_makes_impossible_are_never_drawn() -> None:
    logits = torch.zeros(1, VOCABULARY)
    logits[0, 3:] = -math.inf
    assert _support(logits, temperature=5.0) == {0, 1, 2}


@pytest.mark.parametrize("options", [{"repetition_penalty": 1e-40}, {"logit_bias": {5: 1e300}}], ids=str)
def test_settings_that_leave_the_range_of_float32_give_no_token_rather_than_an_impossible_one(
    options: dict[str, Any],
) -> None:
    assert _choose(_sequence([int(_logits(7).argmax())], [], temperature=1.0, **options), _logits(7)).token is None
