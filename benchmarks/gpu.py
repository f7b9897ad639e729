"""A GPU: decode beside its bandwidth, prefill beside its matrix products, mixed tasks beside the base alone.

The base is a random Llama of a published shape, made on the device in bfloat16. Both limits are measured in the same
run: the bandwidth by a copy (bytes read and written), the matrix products by one of 8192 × 8192 × 8192. A decode step
must read every weight but the input embedding's and every key and value of its rows; a prefill step must do two
operations per weight of the layers and token, and those of causal attention. Every figure is the median of the rounds,
of which one more comes first, to warm up.

Without CUDA there is nothing to measure; `--quick --device cpu` only shows that the benchmark runs.
"""

from __future__ import annotations

import gc
import itertools
import random
import sys
from collections.abc import Callable, Sequence
from statistics import median
from typing import Annotated, Any, NoReturn

import torch
import typer

from benchmarks.frame import Case, Figure, Quick, Report, Rounds, Save, Table, Target, alternate, machine, ratio
from benchmarks.gpu_base import SHAPES, Shape, bandwidth, decode_bytes, prefill_operations, product_rate, random_llama
from benchmarks.gpu_engine import MEASURED_STEPS, WARM_STEPS, Bench, own_rate, peers
from benchmarks.inprocess import prepare
from server.model import FrozenBase

DECODE, PREFILL = Target(0.70), Target(0.55)
KINDS = {"prompt": Target(0.95), "prefix": Target(0.95), "ia3": Target(0.95), "lora": Target(0.90)}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def compare(size: str, device: torch.device, rounds: int) -> Report:
    """Measure everything that fits the device."""
    shape = SHAPES[size]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    facts = _machine(device)
    rates = bandwidth(device), product_rate(device, dtype)
    rows, context = min(32, max(shape.rows)), shape.contexts[0]
    figures, decoded, own, notes = _own(shape, device, dtype, rates, rounds, (rows, context))
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # a peer takes what is free, and does not ask torch for what that keeps
    # last, and on a model of their own: what they change and do not give back is nobody's loss
    work = [("Medley", own), *peers(random_llama(shape, device, dtype), shape, rows, context)]
    tables = [
        decoded,
        Table(
            f"{rows} prompts of {context} tokens, {WARM_STEPS + MEASURED_STEPS} new ones each",
            ("system", "output tokens/s"),
            [(name, rate if isinstance(rate, str) else f"{rate:.0f}") for name, rate in work],
        ),
    ]
    title = f"{size} in {dtype}".replace("torch.", "")
    return Report(f"gpu_{size}", title, figures, facts, tables, notes, rounds=rounds)


def _own(
    shape: Shape,
    device: torch.device,
    dtype: torch.dtype,
    rates: tuple[float, float],
    rounds: int,
    work: tuple[int, int],
) -> tuple[list[Figure], Table, float, list[str]]:
    """Of the engine: figures, decode steps, output tokens a second of `work` (rows, context), notes. `rates` are the
    machine's, of copies and of products. Nothing that it makes outlives it."""
    base = FrozenBase(random_llama(shape, device, dtype))
    bench = Bench(shape, base)
    decoded, skipped = _decoded(bench, rates[0], rounds)
    if not decoded:
        _no_figures(f"the device has no room for {skipped[0]} (rows × context) beside the base")
    prefilled = prefill_operations(shape, base) / bench.prefill(random.Random(1), 4, rounds) / rates[1]
    figures = [
        Figure("decode ÷ bandwidth limit, the worst", min(share for _, _, share in decoded), target=DECODE),
        Figure("prefill ÷ matrix-product limit", prefilled, target=PREFILL),
        *_mixed(bench, rounds),
    ]
    table = Table(
        "Decode",
        ("rows × context", "ms a step", "of the bandwidth limit"),
        [(name, f"{1e3 * each:.3f}", f"{share:.3f}") for name, each, share in decoded],
    )
    notes = [
        f"attention: {bench.attention}",
        f"copy {rates[0] / 1e12:.2f} TB/s, product {rates[1] / 1e12:.0f} TFLOP/s",
        *[f"{each} (rows × context) has no room on the device and was not run" for each in skipped],
    ]
    return figures, table, own_rate(bench, *work), notes


def _decoded(bench: Bench, rate: float, rounds: int) -> tuple[list[tuple[str, float, float]], list[str]]:
    """(what, seconds of a step, share of the limit) of each number of rows and context that fits; those that do not.

    All runs of one number have the same prompts, which the KV cache still has from the first: what is measured begins
    behind them.
    """
    lines: list[tuple[str, float, float]] = []
    skipped: list[str] = []
    for context, rows in itertools.product(bench.shape.contexts, bench.shape.rows):
        longest = bench.longest(rows, context)
        if not bench.fits(rows, longest):
            skipped.append(f"{rows} × {context}")
            continue
        engine = bench.engine(rows, longest)
        runs = [bench.decode(engine, random.Random(2), rows, context) for _ in range(rounds + 1)][1:]
        engine.close()
        limit = decode_bytes(bench.base, round(median(run.context for run in runs))) / rate
        seconds = median(run.seconds for run in runs)
        lines.append((f"{rows} × {context}", seconds, limit / seconds))
    return lines, skipped


def _mixed(bench: Bench, rounds: int) -> list[Figure]:
    """Steps of as many rows as there are tasks, each row its own task, beside the base alone."""
    shape = bench.shape
    rows, context = shape.tasks, shape.contexts[0]
    engine = bench.engine(rows, bench.longest(rows, context))

    def measure(kinds: Sequence[str]) -> Callable[[random.Random], float]:
        return lambda rng: bench.decode(engine, rng, rows, context, kinds).seconds

    cases = [Case("base", measure(()))]
    cases += [Case(kind, measure((kind,))) for kind in KINDS]
    cases.append(Case("all four", measure(tuple(KINDS))))
    measured = alternate(cases, rounds)
    engine.close()
    targets = {**KINDS, "all four": KINDS["lora"]}
    return [
        Figure(f"{rows} tasks, {name} ÷ base only", ratio(measured["base"], measured[name]), target=target)
        for name, target in targets.items()
    ]


def _machine(device: torch.device) -> dict[str, Any]:
    facts = machine()
    if device.type == "cuda":
        facts |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return facts


def _no_figures(reason: str) -> NoReturn:
    print(f"no figures: {reason}")
    sys.exit(1)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:  # torch knows no such device
        device = None
    if device is None or device.type not in ("cuda", "cpu"):
        raise typer.BadParameter(f"use cuda, cuda:N or cpu, not {name}")
    return device


@app.command()
def main(
    size: Annotated[str, typer.Option(help=f"base: {', '.join(SHAPES)}")] = "8b",
    device: Annotated[
        torch.device, typer.Option(parser=_device, metavar="DEVICE", help="cuda, cuda:N; cpu only with --quick")
    ] = torch.device("cuda"),  # noqa: B008 - a device is a value
    rounds: Rounds = 5,
    quick: Quick = False,
    save: Save = False,
) -> None:
    """A GPU's share of its own limits, and what mixing costs on it."""
    if size not in SHAPES:
        raise typer.BadParameter(f"use one of {', '.join(SHAPES)}")
    if device.type == "cpu" and not quick:
        raise typer.BadParameter("figures are of a GPU; on a CPU only --quick runs")
    if device.type != "cpu" and not torch.cuda.is_available():
        _no_figures("torch finds no CUDA device")
    if quick:
        size, rounds = "tiny", 1
    prepare(None, is_saved=save)
    compare(size, device, rounds).finish(save)


if __name__ == "__main__":
    app()
