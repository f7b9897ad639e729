"""`python -m benchmarks`: the CPU set, each benchmark in a process of its own, and their picture.

Sizes are such that all of it ends within a quarter of an hour on two cores; each benchmark's own command has the full
ones. Reports and picture go to `benchmarks/results/`. Run it on an otherwise idle machine.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks import figure
from benchmarks.frame import Quick

SUITE: dict[str, tuple[str, ...]] = {  # options beyond each one's defaults, in the picture's order
    "base": ("--prompt", "32", "--new", "32"),
    "mixed": ("--new", "16"),
    "many": ("--new", "16"),
    "small": (),
    "long_prompts": (),
    "http": ("--prompt", "16", "--new", "32", "--starts", "1"),
    "shared": (),
    "fairness": (),
    "memory": (),
    "index": ("--tasks", "20000", "--customizations", "200000"),
}

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def command(name: str, vllm: Path | None, quick: bool) -> list[str]:
    """One benchmark's; a quick one is a smoke test and is not saved."""
    options = ["--quick"] if quick else [*SUITE[name], "--save"]
    if name == "base" and vllm is not None:
        options += ["--vllm", str(vllm)]
    return [sys.executable, "-m", f"benchmarks.{name}", *options]


@app.command()
def main(
    vllm: Annotated[
        Path | None, typer.Option(exists=True, help="environment with vLLM's CPU build, for benchmarks.base")
    ] = None,
    quick: Quick = False,
    draw: Annotated[bool, typer.Option("--draw", help="measure nothing, draw what is saved")] = False,
) -> None:
    """Every benchmark of the CPU set, and the picture of their targets."""
    failed = []
    started = time.monotonic()
    for name in [] if draw else SUITE:
        begun = time.monotonic()
        if subprocess.run(command(name, vllm, quick), check=False).returncode:
            failed.append(name)
        print(
            f"benchmarks.{name}: {time.monotonic() - begun:.0f} s, {time.monotonic() - started:.0f} s in all\n",
            flush=True,
        )
    if not quick:
        print(f"picture: {figure.write(list(SUITE))}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    app()
