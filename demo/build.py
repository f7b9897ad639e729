"""Makes everything in `demo/base` and `demo/adapters` anew: `python -m demo.build --seed 0`.

tokenizer → base → six adapters → the table of scores. `--only` runs some of the parts, on what the others left.
"""

import argparse
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from transformers import AutoTokenizer

from demo import evaluate
from demo.tasks import ADAPTERS, BASE, read_tasks
from demo.tokenizer import train_tokenizer
from demo.train_base import BaseSettings, save_base, train_base
from demo.tune_tasks import tune_task

PARTS = ("tokenizer", "base", "adapters", "scores")


def build_tokenizer(seed: int) -> None:
    """Learn the tokenizer; whatever was in the base's folder is removed."""
    shutil.rmtree(BASE, ignore_errors=True)
    train_tokenizer(seed).save_pretrained(BASE)


def build_base(seed: int, work: Path) -> None:
    """Train the base on its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = train_base(tokenizer, work / "base.pt", BaseSettings(seed=seed))
    save_base(model, tokenizer, BASE)


def build_adapters(seed: int, work: Path, only: list[str] | None) -> None:
    """Tune the adapters of the named tasks, of all where none is named."""
    console = Console()
    for task in read_tasks():
        if only is None or task.task in only:
            shutil.rmtree(ADAPTERS / task.adapter, ignore_errors=True)
            report = tune_task(task, work, seed, console)
            console.print(f"  best step {report.best_step} of {report.steps}: loss {report.best_loss:.4f}")


def main() -> int:
    """Run the parts that were asked for; 1 where a task misses its bar."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run; absent: all")
    parser.add_argument("--tasks", nargs="+", help="tasks whose adapters are tuned; absent: all")
    options = parser.parse_args()
    torch.set_num_threads(1)  # sums are rounded alike, however many cores there are
    with TemporaryDirectory(prefix="medley-demo-") as folder:
        work = Path(folder)
        if "tokenizer" in options.only:
            build_tokenizer(options.seed)
        if "base" in options.only:
            build_base(options.seed, work)
        if "adapters" in options.only:
            build_adapters(options.seed, work, options.tasks)
    return evaluate.main() if "scores" in options.only else 0


if __name__ == "__main__":
    raise SystemExit(main())
