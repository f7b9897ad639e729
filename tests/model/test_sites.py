"""The batched application of row deltas, against one line of slow code, token by token."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.adapters.deltas import input_scale, low_rank, output_scale
from server.model import RowDelta, Rows, Segment, Sites, TokenRows

IN, OUT, TOKENS = 6, 5, 24
Module = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Slow:
    """An adapter at one module: Mₖ of Mₖ₋₁ for one token, and the same as the server keeps it."""

    change: Callable[[Module], Module]
    delta: RowDelta


def _lora(rank: int) -> Slow:
    A, B = torch.randn(rank, IN), torch.randn(OUT, rank)
    return Slow(lambda module: lambda x: module(x) + B @ (A @ x), low_rank(A, B.t()))


def _output_scale() -> Slow:
    scale = torch.randn(OUT)
    return Slow(lambda module: lambda x: scale * module(x), output_scale(scale))


def _input_scale() -> Slow:
    scale = torch.randn(IN)
    return Slow(lambda module: lambda x: module(scale * x), input_scale(scale))


KINDS: dict[str, Callable[[], Slow]] = {
    "lora1": lambda: _lora(1),
    "lora4": lambda: _lora(4),
    "lora9": lambda: _lora(9),
    "output": _output_scale,
    "input": _input_scale,
}
MIXES: dict[str, Callable[[random.Random, int], list[int]]] = {  # which of n adapters each token has
    "identical": lambda rng, n: [0] * TOKENS,
    "distinct": lambda rng, n: rng.sample(range(n), TOKENS),
    "uniform": lambda rng, n: rng.choices(range(n), k=TOKENS),
    "zipf": lambda rng, n: rng.choices(range(n), [1 / (rank + 1) for rank in range(n)], k=TOKENS),
    "skewed": lambda rng, n: rng.choices(range(n), [20 * n] + [1] * (n - 1), k=TOKENS),
    "none": lambda rng, n: [-1] * TOKENS,
}


@dataclass
class Planner:
    """Adapters in pools, and tokens in segments of every form."""

    adapters: list[Slow]
    rng: random.Random

    def __post_init__(self) -> None:
        blocks: dict[int, list[Tensor]] = {}
        self.first: list[tuple[int, ...]] = []
        for adapter in self.adapters:
            places = []
            for block in adapter.delta.blocks:
                before = blocks.setdefault(block.shape[1], [torch.zeros(1, block.shape[1])])
                places.append(sum(map(len, before)))
                before.append(block)
            self.first.append(tuple(places))
        self.pools = {width: torch.cat(rows) for width, rows in blocks.items()}

    def level(self, chosen: list[int]) -> list[Segment]:
        """Segments of a level, given each token's adapter (-1: none)."""
        alike: dict[object, list[int]] = {}
        for token, adapter in enumerate(chosen):
            if adapter >= 0:
                delta = self.adapters[adapter].delta
                shapes = tuple(block.shape for block in delta.blocks)
                is_each = self.rng.random() < 0.6
                alike.setdefault((delta.kind, shapes) if is_each else adapter, []).append(token)
        segments = [
            self._segment(tokens, chosen, is_each=isinstance(key, tuple)) for key, tokens in alike.items()
        ]  # fmt: skip
        self.rng.shuffle(segments)
        return segments

    def _segment(self, tokens: list[int], chosen: list[int], *, is_each: bool) -> Segment:
        delta = self.adapters[chosen[tokens[0]]].delta
        rows = []
        for index, block in enumerate(delta.blocks):
            firsts = [self.first[chosen[token]][index] for token in tokens]
            pool, count = self.pools[block.shape[1]], len(block)
            each = TokenRows(pool, torch.tensor(firsts)[:, None] + torch.arange(count))
            rows.append(each if is_each else Rows(pool, firsts[0], count))
        neighbours = tokens == list(range(tokens[0], tokens[-1] + 1))
        where = slice(tokens[0], tokens[-1] + 1) if neighbours else torch.tensor(tokens)
        return Segment(where, delta.kind, tuple(rows), is_each)  # type: ignore[arg-type]  # they are alike


def _linear() -> nn.Module:
    return nn.Linear(IN, OUT)


def _transposed() -> nn.Module:
    module: nn.Module = Conv1D(OUT, IN)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def _unpacked() -> nn.Module:
    class Own(nn.Linear):
        """Not a plain linear module, so its weight is not packed."""

    return Own(IN, OUT, bias=False)


@pytest.mark.parametrize("make", [_linear, _transposed, _unpacked])
@pytest.mark.parametrize("second", [*MIXES])
@pytest.mark.parametrize("first", [*MIXES])
@torch.inference_mode()
def test_two_levels_in_a_mixed_step_equal_each_token_alone(
    first: str, second: str, make: Callable[[], nn.Module]
) -> None:
    torch.manual_seed(7)
    rng = random.Random(f"{first} {second}")
    model = nn.ModuleDict({"site": make()})
    module, plain = model["site"], make()
    plain.load_state_dict(module.state_dict())
    sites = Sites(model, None)
    adapters = [KINDS[kind]() for _ in range(5) for kind in KINDS]
    rng.shuffle(adapters)
    planner = Planner(adapters, rng)
    chosen = [MIXES[mix](rng, len(adapters)) for mix in (first, second)]
    for level in chosen:  # a few tokens have none
        for token in rng.sample(range(TOKENS), 6):
            level[token] = -1
    inputs = torch.randn(1, TOKENS, IN)
    given = inputs.clone()
    alone = module(inputs)
    with sites.applying({"site": [planner.level(level) for level in chosen]}):
        outputs = module(inputs)
    assert torch.equal(inputs, given), "other modules read it too"
    for token in range(TOKENS):
        answer: Module = plain
        for level in chosen:
            if level[token] >= 0:
                answer = adapters[level[token]].change(answer)
        torch.testing.assert_close(outputs[0, token], answer(inputs[0, token]), rtol=1e-4, atol=1e-5)
        if all(level[token] < 0 for level in chosen):
            assert torch.equal(outputs[0, token], alone[0, token]), "a token that has no adapter was touched"
    assert torch.equal(module(inputs), alone), "a step's deltas outlived it"


@torch.inference_mode()
def test_input_scales_of_three_levels_and_what_lies_between_apply_in_order() -> None:
    torch.manual_seed(2)
    module = nn.Linear(IN, OUT)
    plain = nn.Linear(IN, OUT)
    plain.load_state_dict(module.state_dict())
    sites = Sites(nn.ModuleDict({"site": module}), None)
    stack = [_lora(2), _input_scale(), _lora(3), _output_scale(), _input_scale(), _lora(1), _input_scale()]
    planner = Planner(stack, random.Random(0))
    inputs = torch.randn(1, 4, IN)
    with sites.applying({"site": [planner.level([-1, adapter, adapter, -1]) for adapter in range(len(stack))]}):
        outputs = module(inputs)
    answer: Module = plain
    for adapter in stack:
        answer = adapter.change(answer)
    for token in (1, 2):
        torch.testing.assert_close(outputs[0, token], answer(inputs[0, token]), rtol=1e-4, atol=1e-4)
    assert torch.equal(outputs[0, [0, 3]], module(inputs)[0, [0, 3]])


@pytest.mark.parametrize(
    ("is_own", "kinds", "is_changed"),
    [
        (True, ("input", "input"), True),
        (True, ("input",), True),
        (True, ("lora1", "input"), False),
        (True, ("input", "lora1"), False),
        (False, ("input",), False),
    ],
)
@torch.inference_mode()
def test_inputs_are_changed_where_they_lie_if_nobody_else_reads_them(
    is_own: bool, kinds: tuple[str, ...], is_changed: bool
) -> None:
    torch.manual_seed(3)
    module = nn.Linear(IN, OUT)
    plain = nn.Linear(IN, OUT)
    plain.load_state_dict(module.state_dict())
    sites = Sites(nn.ModuleDict({"site": module}), None)
    if is_own:
        sites.give_inputs("site")
    stack = [KINDS[kind]() for kind in kinds]
    planner = Planner(stack, random.Random(0))
    inputs = torch.randn(1, 3, IN)
    given = inputs.clone()
    with sites.applying({"site": [planner.level([adapter, adapter, -1]) for adapter in range(len(stack))]}):
        outputs = module(given)
    assert torch.equal(given, inputs) != is_changed
    answer: Module = plain
    for adapter in stack:
        answer = adapter.change(answer)
    for token in (0, 1):
        torch.testing.assert_close(outputs[0, token], answer(inputs[0, token]), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(outputs[0, 2], plain(inputs[0, 2]), rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_site_outside_the_plan_runs_the_bases_own_forward_on_the_very_input() -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    class Recording(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            seen.append((input, super().forward(input)))
            return seen[-1][1]

    model = nn.ModuleDict({"touched": nn.Linear(IN, OUT), "own": Recording(IN, OUT)})
    sites = Sites(model, None)
    planner = Planner([_input_scale(), _output_scale()], random.Random(0))
    inputs = torch.randn(1, 3, IN)
    given = inputs.clone()
    with sites.applying({"touched": [planner.level([0, 0, 1])]}):
        assert sites.touches(["touched", "own"])
        assert not sites.touches(["own"])
        model["touched"](inputs)
        outputs = model["own"](inputs)
    assert seen[0][0] is inputs
    assert seen[0][1] is outputs
    assert torch.equal(inputs, given)
    assert not sites.touches(["touched"])


@torch.inference_mode()
def test_a_failed_step_leaves_no_deltas() -> None:
    model = nn.ModuleDict({"site": nn.Linear(IN, OUT)})
    sites = Sites(model, None)
    inputs = torch.randn(1, 3, IN)
    alone = model["site"](inputs)
    planner = Planner([_output_scale()], random.Random(0))
    with pytest.raises(RuntimeError), sites.applying({"site": [planner.level([0, 0, 0])]}):
        model["site"](torch.randn(1, 3, IN + 1))
    assert torch.equal(model["site"](inputs), alone)


def test_sites_are_the_linear_modules_with_their_widths_and_the_head_is_known() -> None:
    class Own(nn.Linear):
        """Still linear."""

    model = nn.ModuleDict(
        {"a": nn.Linear(3, 4), "b": Conv1D(5, 6), "c": nn.Embedding(7, 8), "d": Own(8, 9), "head": nn.Linear(4, 7)}
    )
    sites = Sites(model, model["head"])
    shapes = {name: (shape.inputs, shape.outputs, shape.is_head) for name, shape in sites.shapes.items()}
    assert shapes == {"a": (3, 4, False), "b": (6, 5, False), "d": (8, 9, False), "head": (4, 7, True)}
    assert [name for name, module in model.items() if sites.is_packed(module)] == ["a", "b", "head"]
