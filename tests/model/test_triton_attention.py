"""Triton's attention over pages against the obvious loop: on CUDA, else in Triton's interpreter."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from functools import partial
from itertools import accumulate, pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from server.model import KVCache, LayerShape, VarlenRows
from server.model.attention import AttentionOptions
from server.model.kv_cache import NULL_PAGE, index_tensor
from server.model.varlen_attention import Kernel, LayerCall, choose_kernel, worst_difference
from tests.model.slow_varlen import slow_kernel

pytest.importorskip("triton", reason="Triton has wheels for Linux alone")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("torch finds no CUDA device, and TRITON_INTERPRET is not 1", allow_module_level=True)

TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
PLAIN = AttentionOptions(None)
MIXED = ((1, 33), (1, 1), (7, 7), (70, 70), (5, 48), (1, 16), (2, 17))  # (tokens, context) of each row
DECODE = ((1, 1), (1, 15), (1, 16), (1, 17), (1, 33), (1, 200))


@pytest.fixture(autouse=True)
def products_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter holds bfloat16 as its bits, and multiplies these: it is given float32."""
    if DEVICE.type == "cuda":
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    own = interpreter.InterpreterBuilder.create_dot

    def widened(handle: object) -> object:
        if handle.dtype.scalar != tl.bfloat16:  # type: ignore[attr-defined]
            return handle
        bits = handle.data.astype(np.uint32) << 16  # type: ignore[attr-defined]
        return interpreter.TensorHandle(bits.view(np.float32), tl.float32)

    def create_dot(self: object, a: object, b: object, *rest: object) -> object:
        return own(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


def _attend(programs: int = 1, splits: int | None = None) -> Kernel:
    from server.model.triton_attention import attend

    return partial(attend, programs=programs, splits=splits)


def _step(
    rows: tuple[tuple[int, int], ...], shape: LayerShape, heads: int, page_size: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, VarlenRows]:
    """A step's queries and pages; what no row may see is NaN."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    counts = [-(-length // page_size) for _, length in rows]
    cache = KVCache([shape], sum(counts) + 3, page_size, dtype=dtype, device=DEVICE)
    cache.layers[0][:, 1:] = torch.nan
    pages = rng.sample(range(1, cache.num_pages), sum(counts))
    tables = [[pages.pop() for _ in range(count)] for count in counts]
    for table, (_, length) in zip(tables, rows, strict=True):
        slots = [table[at // page_size] * page_size + at % page_size for at in range(length)]
        cache.write(0, index_tensor(slots, DEVICE), *torch.randn(2, length, *shape).to(DEVICE, dtype))
    widest = max(counts) + 2
    starts = list(accumulate((count for count, _ in rows), initial=0))
    varlen = VarlenRows(
        index_tensor(starts, DEVICE, bits=32),
        index_tensor([length for _, length in rows], DEVICE, bits=32),
        index_tensor([table + [NULL_PAGE] * (widest - len(table)) for table in tables], DEVICE, bits=32),
        max(count for count, _ in rows),
        widest * page_size,  # as padded steps say, more than there is
    )
    query = torch.randn(starts[-1], heads, shape.head_dim).to(DEVICE, dtype)
    return query, *cache.layers[0], varlen


def _assert_right(
    kernel: Kernel, step: tuple[Tensor, Tensor, Tensor, VarlenRows], options: AttentionOptions = PLAIN
) -> None:
    expected = slow_kernel(*step, options)
    actual = kernel(*step, options)
    assert actual.is_contiguous()
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize(("dtype", "page_size"), list(zip(TOLERANCES, (16, 48, 256), strict=True)), ids=str)
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("rows", [MIXED, DECODE], ids=["mixed", "decode"])
def test_rows_of_any_number_of_tokens(
    rows: tuple[tuple[int, int], ...], splits: int, page_size: int, dtype: torch.dtype
) -> None:
    _assert_right(_attend(splits=splits), _step(rows, LayerShape(2, 32), 4, page_size, dtype))


@pytest.mark.parametrize(("window", "splits"), [(1, 1), (7, 4), (16, 1), (17, 4), (64, 1), (1000, 4)])
@pytest.mark.parametrize("rows", [MIXED, DECODE], ids=["mixed", "decode"])
def test_windows(rows: tuple[tuple[int, int], ...], window: int, splits: int) -> None:
    step = _step(rows, LayerShape(1, 16), 2, 16, torch.float32)
    _assert_right(_attend(splits=splits), step, AttentionOptions(None, window))


@pytest.mark.parametrize("rows", [((1, 33), (7, 7), (3, 40)), DECODE[-3:]], ids=["mixed", "decode"])
@pytest.mark.parametrize(
    ("heads", "shape"),
    [
        (1, LayerShape(1, 8)),
        (6, LayerShape(2, 80)),
        (5, LayerShape(5, 96)),
        (8, LayerShape(1, 128)),
        (71, LayerShape(1, 16)),
        (2, LayerShape(1, 256)),
    ],
    ids=str,
)
def test_heads_and_widths(heads: int, shape: LayerShape, rows: tuple[tuple[int, int], ...]) -> None:
    for splits in (1, 2):
        _assert_right(_attend(splits=splits), _step(rows, shape, heads, 16, torch.float32))


@pytest.mark.parametrize("splits", [2, 7, 16, 17, 40, 64])
def test_a_context_divided_among_any_number_of_programs(splits: int) -> None:
    rows = ((1, 700), (1, 1), (1, 129))
    _assert_right(_attend(splits=splits), _step(rows, LayerShape(1, 16), 2, 16, torch.float32))


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("rows", [MIXED, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize(
    "options",
    [
        AttentionOptions(0.3),
        AttentionOptions(None, softcap=2.0),
        AttentionOptions(0.1, 9, sinks=torch.tensor([0.5, -3.0, 4.0, 0.0], device=DEVICE)),
        AttentionOptions(0.4, 20, 1.5, torch.tensor([0.5, -3.0, 4.0, 0.0], device=DEVICE).bfloat16()),
    ],
    ids=["scaling", "cap", "sinks", "all"],
)
def test_what_a_class_may_ask_for(options: AttentionOptions, rows: tuple[tuple[int, int], ...], splits: int) -> None:
    _assert_right(_attend(splits=splits), _step(rows, LayerShape(2, 16), 4, 16, torch.float32), options)


@pytest.mark.parametrize("seed", range(6))
def test_steps_at_random(seed: int) -> None:
    rng = random.Random(seed)
    rows = []
    for _ in range(rng.randint(1, 9)):
        length = rng.choice([rng.randint(1, 100), 16 * rng.randint(1, 6)])
        rows.append((rng.choice([1, 1, rng.randint(1, length)]), length))
    kv_heads, page_size = rng.choice([1, 2]), rng.choice([16, 32])
    step = _step(
        tuple(rows), LayerShape(kv_heads, 16), kv_heads * rng.choice([1, 3, 4]), page_size, torch.float32, seed
    )
    options = AttentionOptions(None, rng.choice([None, rng.randint(1, 120)]))
    _assert_right(_attend(programs=rng.choice([1, 64, 1000])), step, options)


def test_queries_may_lie_apart() -> None:
    query, keys, values, rows = _step(MIXED, LayerShape(2, 16), 4, 16, torch.float32)
    turned = query.transpose(0, 1).contiguous().transpose(0, 1)
    strided = query.transpose(1, 2).contiguous().transpose(1, 2)
    expected = slow_kernel(query, keys, values, rows, PLAIN)
    for apart in (turned, strided):
        torch.testing.assert_close(_attend()(apart, keys, values, rows, PLAIN), expected, rtol=1e-5, atol=1e-5)


def test_few_programs_are_made_more_as_far_as_the_context_is_worth_it() -> None:
    from server.model.triton_attention import chosen_splits

    assert chosen_splits(8, 4096, 528) == 32, "a share of 128 keys at least"
    assert chosen_splits(8, 32768, 528) == 64
    assert chosen_splits(64, 4096, 528) == 8
    assert chosen_splits(300, 4096, 528) == 1, "not worth a second kernel"
    assert chosen_splits(2048, 4096, 528) == 1
    assert chosen_splits(1, 100, 528) == 1
    for padded, less in pairwise(range(16, 4096, 16)):
        assert chosen_splits(8, less, 528) >= chosen_splits(8, padded, 528)


@pytest.mark.parametrize("options", [PLAIN, AttentionOptions(None, 5, 2.0, torch.zeros(4, device=DEVICE))], ids=str)
def test_it_passes_the_trial_with_every_variant(options: AttentionOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    from server.model import triton_attention

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=100))
    call = LayerCall(4, LayerShape(2, 16), options)
    for kernel in triton_attention.kernels(DEVICE):
        assert worst_difference(call, kernel, 16, torch.float32, DEVICE) < 1e-5


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    yield torch.device("cuda")
    torch.cuda.synchronize()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("page_size", [16, 256])
def test_some_kernel_is_found_on_a_device(page_size: int, dtype: torch.dtype, cuda: torch.device) -> None:
    call = LayerCall(8, LayerShape(2, 128), PLAIN)
    kernel, note = choose_kernel({call}, page_size, dtype, cuda)
    assert kernel is not None, note


@pytest.mark.gpu
def test_a_captured_launch_meets_the_rows_of_its_replay(cuda: torch.device) -> None:
    shape, heads = LayerShape(2, 64), 8
    query, keys, values, rows = _step(((1, 300), (1, 300), (1, 300)), shape, heads, 16, torch.bfloat16)
    kernel = _attend(splits=4)
    kernel(query, keys, values, rows, PLAIN)  # what is compiled at first use is
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = kernel(query, keys, values, rows, PLAIN)
    for length in (1, 16, 17, 250):
        rows.lengths.fill_(length)
        query.normal_()
        graph.replay()
        expected = slow_kernel(query, keys, values, rows, PLAIN)
        torch.testing.assert_close(output, expected, rtol=2e-2, atol=2e-2)
