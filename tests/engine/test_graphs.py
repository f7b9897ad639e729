"""Padded steps in static memory: law 2 for them, run as they are here, captured where there is CUDA."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from server.adapters import Resident, RowPool
from server.adapters.resident import Layout
from server.engine.batch import StepBatch
from server.engine.engine import Engine
from server.engine.graphs import DecodeRow, GraphInputs, StaticBatch, padded_rows
from server.engine.protocol import Generate
from server.engine.scheduler import Schedule
from server.model import FrozenBase, KVCache, LayerShape, RunRows, Segment, SiteKind, SitePlan
from server.model.device_deltas import DeviceDeltas
from server.model.grouped_products import ALIGNED
from server.model.kernels import Kernels
from server.model.varlen_attention import Kernel
from tests.engine.conftest import ARCHITECTURE
from tests.harness import Result, greedy, make_engine, request, run
from tests.model.slow_deltas import SLOW_LAUNCHES
from tests.model.slow_varlen import slow_kernel
from tests.reference.adapters import configs, save_adapter
from tests.reference.bases import VOCABULARY, tiny_base

MAX_TOKENS = 8
HAS_GROUPED = hasattr(torch.nn.functional, "grouped_mm")
DEVICE_DELTAS = DeviceDeltas(SLOW_LAUNCHES, torch.device("cpu"), has_grouped=HAS_GROUPED)
STACKS = [
    (),
    ("prompt",),
    ("prefix",),
    ("ia3",),
    ("other_ia3",),
    ("lora",),
    ("other_lora",),
    ("lora_one_layer",),
    ("ia3", "other_lora"),
    ("other_lora", "ia3"),
    ("lora", "lora"),
    ("prompt", "lora"),
]


def _requests(tasks: dict[str, Path]) -> list[Generate]:
    rng = random.Random(4)
    return [
        request(
            f"{'+'.join(names)}/{index}",
            [rng.randrange(3, VOCABULARY) for _ in range(rng.randint(1, 21))],
            greedy(MAX_TOKENS),
            *(tasks[name] for name in names),
        )
        for names in STACKS
        for index in range(2)
    ]


def _results(engine: Engine, requests: list[Generate]) -> dict[str, Result]:
    results = run(engine, requests, random.Random(5)).results
    engine.close()
    return results


def _pad(engine: Engine) -> list[StepBatch]:
    """Let an engine pad its steps; the padded ones that it runs from now on."""
    padded: list[StepBatch] = []
    runner = engine._runner
    runner.pad_decode_steps()
    engine._batches = runner.batch_builder()
    run_batch = runner.run

    def watched(schedule: Schedule, batch: StepBatch) -> torch.Tensor:
        if batch.composition is not None:
            padded.append(batch)
        return run_batch(schedule, batch)

    runner.run = watched  # type: ignore[method-assign]
    return padded


def _assert_alike(results: dict[str, Result], expected: dict[str, Result], *, devices_differ: bool = False) -> None:
    """Law 2. Another device rounds otherwise, so a tie may go either way there: what follows is then not compared."""
    for name, result in expected.items():
        assert results[name].failed is None
        assert devices_differ or results[name].tokens == result.tokens, name
        assert len(results[name].tokens) == len(result.tokens)
        for at, (given, wanted) in enumerate(zip(results[name].logprobs, result.logprobs, strict=True)):
            assert abs(given.chosen - wanted.chosen) < 1e-3, name
            if results[name].tokens[at] != result.tokens[at]:
                break


@pytest.mark.parametrize(("num_pages", "max_seqs"), [(256, 24), (60, 11)], ids=["roomy", "preempting"])
def test_padded_steps_of_any_mix_answer_as_ordinary_ones(
    base: FrozenBase, tasks: dict[str, Path], num_pages: int, max_seqs: int
) -> None:
    requests = _requests(tasks)
    expected = _results(make_engine(base, num_pages=num_pages, max_seqs=max_seqs), requests)
    for _ in range(20):  # which rows meet in a step hangs on when adapters have loaded
        engine = make_engine(base, num_pages=num_pages, max_seqs=max_seqs)
        padded = _pad(engine)
        _assert_alike(_results(engine, requests), expected)
        if is_filled := any(len(batch.logit_rows) < len(batch.token_ids) for batch in padded):
            break
    assert is_filled, "no step was padded"
    assert max(len(batch.composition.deltas) for batch in padded if batch.composition) > 4, "the layouts did not mix"


def test_a_prefix_that_takes_no_positions_answers_alike_in_padded_steps() -> None:
    golden = Path(__file__).parents[1] / "golden" / "adapterhub"
    base = FrozenBase(AutoModelForCausalLM.from_pretrained(golden / "base", attn_implementation="eager"))
    requests = [
        request(f"{name}/{length}", list(range(3, 3 + length)), greedy(MAX_TOKENS), golden / "cases" / name)
        for name in ("prefix", "prefix_flat")
        for length in (2, 9)
    ]
    expected = _results(make_engine(base), requests)
    engine = make_engine(base)
    padded = _pad(engine)
    _assert_alike(_results(engine, requests), expected)
    assert padded


def _triton_kernel(*step: Any) -> torch.Tensor:
    pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
    from server.model.triton_attention import attend

    return attend(*step, programs=1, splits=2)


_INTERPRETED = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is interpreted on machines without CUDA")


@pytest.mark.parametrize("kernel", [slow_kernel, pytest.param(_triton_kernel, marks=_INTERPRETED)])
def test_attention_that_reads_pages_answers_as_the_gathered_one(
    base: FrozenBase, tasks: dict[str, Path], kernel: Kernel
) -> None:
    requests = _requests(tasks)[::6]
    expected = _results(make_engine(base), requests)
    engine = make_engine(base, max_batch_tokens=24)
    engine._runner._kernel = kernel
    padded = _pad(engine)
    _assert_alike(_results(engine, requests), expected)
    assert any(batch.attention.varlen is not None for batch in padded)


@pytest.mark.parametrize("is_padded", [False, True])
@pytest.mark.parametrize("deltas", [None, DEVICE_DELTAS], ids=["torch", "device"])
def test_steps_with_the_kernels_of_a_device_answer_as_those_of_a_cpu(
    base: FrozenBase,
    tasks: dict[str, Path],
    deltas: DeviceDeltas | None,
    is_padded: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    requests = _requests(tasks)[::2]
    expected = _results(make_engine(base), requests)
    monkeypatch.setattr(base, "kernels", deltas and Kernels(deltas))
    engine = make_engine(base)
    padded = _pad(engine) if is_padded else []
    assert not engine._runner._reads_in_place, "pages are zeroed where attention gathers them"
    _assert_alike(_results(engine, requests), expected)
    assert bool(padded) == is_padded


@pytest.mark.skipif(not HAS_GROUPED, reason="this torch has no grouped products")
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_prompts_of_several_adapters_are_left_to_grouped_products(
    base: FrozenBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / str(seed) for seed in range(3)]
    for seed, folder in enumerate(folders):
        save_adapter(tiny_base(ARCHITECTURE), configs(ARCHITECTURE)["lora"](), folder, seed)
    requests = [request(str(at), list(range(3, 13 + at)), greedy(4), folders[at % 3]) for at in range(5)]
    expected = _results(make_engine(base), requests)
    monkeypatch.setattr(base, "kernels", Kernels(DEVICE_DELTAS))
    engine = make_engine(base)
    run(engine, [request(folder.name, [5], greedy(1), folder) for folder in folders])  # resident from here on
    runs: list[int] = []
    own = engine._runner.run

    def watched(schedule: Schedule, batch: StepBatch) -> torch.Tensor:
        blocks = [each.blocks[0] for levels in batch.deltas.values() for level in levels for each in level]
        for block in blocks:
            if isinstance(block, RunRows):
                runs.append(len(block.index))
                assert block.index.shape[1] % ALIGNED == 0, "devices take no other ranks"
        return own(schedule, batch)

    engine._runner.run = watched  # type: ignore[method-assign]
    results = run(engine, requests).results
    engine.close()
    _assert_alike(results, expected)
    assert set(runs) == {3}


def test_linear_modules_of_padded_steps_are_left_to_kernels(base: FrozenBase, tasks: dict[str, Path]) -> None:
    engine = make_engine(base)
    padded = _pad(engine)
    segments: list[tuple[str, Segment]] = []
    inputs = engine._runner._inputs
    assert inputs is not None
    own = inputs.deltas

    def watched(static: StaticBatch) -> SitePlan:
        plan = own(static)
        segments.extend((site, each) for site, levels in plan.items() for level in levels for each in level)
        return plan

    inputs.deltas = watched  # type: ignore[method-assign]
    _results(engine, _requests(tasks)[6:14])
    assert padded
    for site, segment in segments:
        is_linear = base.shape.sites[site].kind is SiteKind.LINEAR
        assert (segment.kernel is not None) == (is_linear and segment.kind.compiled is not None)
    assert {segment.kind.compiled for _, segment in segments} >= {"scale", "low_rank"}


def test_the_null_page_and_pool_row_0_stay_zero(base: FrozenBase, tasks: dict[str, Path]) -> None:
    engine = make_engine(base)
    _pad(engine)
    _results(engine, _requests(tasks)[:7])
    runner = engine._runner
    assert all(bool((layer[:, 0] == 0).all()) for layer in runner._cache.layers)
    assert bool((engine.bank.pool.rows(base.shape.widest)[0] == 0).all())


def test_steps_that_differ_in_tasks_only_have_one_composition_and_one_memory() -> None:
    pool = RowPool(10**4, 8, dtype=torch.float32, device=torch.device("cpu"))
    cache = KVCache([LayerShape(1, 8)], 9, 4, dtype=torch.float32, device=torch.device("cpu"))
    inputs = GraphInputs(cache, pool, max_rows=24, max_length=32, is_varlen=True, kernel_of=lambda site, kind: None)
    layout = Layout(None, ())

    def rows(count: int, shift: int) -> list[DecodeRow]:
        stack = (Resident(str(shift), layout, {}, {}, 0),)
        return [DecodeRow(shift + at, 5, 5, [shift + 1, shift + 2], stack) for at in range(count)]

    one = inputs.fill(rows(9, 0))
    assert one is not None
    first = inputs.batch(one)
    seen = first.token_ids.clone(), first.attention.slots.clone()
    two = inputs.fill(rows(13, 3))
    assert two == one
    second = inputs.batch(two)
    assert second.token_ids.data_ptr() == first.token_ids.data_ptr()
    assert seen[0].tolist() == [*range(9), *[0] * 7]
    assert seen[1].tolist() == [2 * 4 + 1] * 9 + [cache.scratch_page * 4] * 7
    assert second.token_ids.tolist() == [*range(3, 16), 0, 0, 0]
    assert second.attention.varlen is not None
    assert second.attention.varlen.block_tables.tolist() == [[4, 5]] * 13 + [[cache.scratch_page, 0]] * 3
    assert second.attention.varlen.lengths.tolist() == [6] * 13 + [1] * 3
    assert inputs.fill(rows(25, 0)) is None, "more rows than there is room for"


def test_rows_are_padded_to_few_numbers() -> None:
    assert [padded_rows(rows, 30) for rows in (1, 2, 3, 4, 5, 8, 9, 17, 25, 30)] == [1, 2, 4, 4, 8, 8, 16, 24, 30, 30]


@pytest.fixture
def cuda_base() -> FrozenBase:
    return FrozenBase(tiny_base(ARCHITECTURE).to("cuda"))


@pytest.mark.gpu
def test_graphs_answer_as_the_cpu_does(base: FrozenBase, cuda_base: FrozenBase, tasks: dict[str, Path]) -> None:
    expected = _results(make_engine(base, max_seqs=24), _requests(tasks))
    engine = make_engine(cuda_base, max_seqs=24)
    for _ in range(3):  # compositions are captured at their second time and replayed from the third on
        results = run(engine, _requests(tasks), random.Random(5)).results
        _assert_alike(results, expected, devices_differ=True)
    graphs = engine._runner._graphs
    engine.close()
    assert graphs is not None
    assert all(graphs._seen.values())
    assert graphs._graphs, "nothing was captured"


@pytest.mark.gpu
def test_adapters_loaded_beside_captured_steps_answer_right(cuda_base: FrozenBase, tasks: dict[str, Path]) -> None:
    engine = make_engine(cuda_base)
    alone = {item.id: _results(make_engine(cuda_base), [item])[item.id] for item in _requests(tasks)}
    crowd = run(engine, _requests(tasks), random.Random(6)).results
    engine.close()
    _assert_alike(crowd, alone, devices_differ=True)  # other numbers of rows, other kernels
