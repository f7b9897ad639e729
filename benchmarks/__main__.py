"""`python -m benchmarks`: the CPU set, each benchmark in a process of its own, and their picture.

Bases have the sizes that the targets are about; requests are as short as it takes for all of it to end within a quarter
of an hour on two cores, which is a target too. Each benchmark's own command has the full ones. Reports, times and the
picture go to `benchmarks/results/`. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import figure
from benchmarks.frame import Figure, Quick, Report, Table, Target, machine
from benchmarks.vllm_peer import VllmEnvironment

SUITE: dict[str, tuple[str, ...]] = {  # options beyond each one's defaults, in the picture's order
    "base": ("--prompt", "24", "--new", "24"),
    "mixed": ("--prompt", "8", "--new", "8"),
    "many": ("--new", "32"),  # with less, the misses of zipf's law are most of it
    "small": (),
    "long_prompts": ("--steps", "4"),
    "http": ("--prompt", "16", "--new", "16", "--starts", "1"),
    "shared": ("--beginning", "96", "--new", "16"),
    "fairness": (),
    "memory": ("--adapters", "100", "--requests", "150", "--starts", "2"),
    "index": ("--tasks", "20000", "--customizations", "200000"),
}

MINUTES = Target(15, at_most=True)

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def command(name: str, vllm: Path | None, quick: bool) -> list[str]:
    """One benchmark's; a quick one is a smoke test and is not saved."""
    options = ["--quick"] if quick else [*SUITE[name], "--save"]
    if name == "base" and vllm is not None:
        options += ["--vllm", str(vllm)]
    return [sys.executable, "-m", f"benchmarks.{name}", *options]


@app.command()
def main(
    vllm: VllmEnvironment = None,
    quick: Quick = False,
    draw: Annotated[bool, typer.Option("--draw", help="measure nothing, draw what is saved")] = False,
) -> None:
    """Every benchmark of the CPU set, and the picture of their targets."""
    failed = [] if draw else measure(vllm, quick)
    if not quick:
        print(f"picture: {figure.write([*SUITE, 'suite'])}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def measure(vllm: Path | None, quick: bool) -> list[str]:
    """Run them all, and save how long that took, if all have run in full; those that failed."""
    facts = machine()
    failed = []
    seconds: dict[str, float] = {}
    for name in SUITE:
        begun = time.monotonic()
        if subprocess.run(command(name, vllm, quick), check=False).returncode:
            failed.append(name)
        seconds[name] = time.monotonic() - begun
        print(f"benchmarks.{name}: {seconds[name]:.0f} s, {sum(seconds.values()):.0f} s in all\n", flush=True)
    if not quick and not failed:
        took = Figure("all of it", sum(seconds.values()) / 60, "min", MINUTES)
        table = Table("Each benchmark", ("benchmark", "s"), [(name, f"{each:.0f}") for name, each in seconds.items()])
        Report("suite", "The CPU set", [took], facts, [table]).finish(save=True)
    return failed


if __name__ == "__main__":
    app()
