"""Tunes the six adapters with the code behind `medley tune`, on examples that the generator writes."""

import json
from pathlib import Path

from rich.console import Console

from demo.skills import Example, examples
from demo.tasks import ADAPTERS, BASE, BASE_NAME, RECIPES, TUNING_EPOCHS, TUNING_EXAMPLES, VALIDATION_EXAMPLES, DemoTask
from server.tuning import ProgressBar, TuneSettings
from server.tuning.trainer import TuneReport, tune


def write_examples(path: Path, rows: list[Example]) -> None:
    """Write examples as the JSON lines that `medley tune` reads."""
    path.write_text(
        "".join(json.dumps({"input": row.input, "output": row.output}) + "\n" for row in rows), encoding="utf-8"
    )


def tune_task(task: DemoTask, work: Path, seed: int, console: Console) -> TuneReport:
    """Generate a task's examples (training names only) into `work` and tune its adapter into `demo/adapters`."""
    rows = examples(task.task, "train", TUNING_EXAMPLES + VALIDATION_EXAMPLES, seed)
    data, validation = work / f"{task.task}.jsonl", work / f"{task.task}.validation.jsonl"
    write_examples(data, rows[:TUNING_EXAMPLES])
    write_examples(validation, rows[TUNING_EXAMPLES:])
    recipe = RECIPES[task.task]
    settings = TuneSettings(
        method=recipe.method,
        model=str(BASE),
        data=data,
        validation=validation,
        output=ADAPTERS / task.adapter,
        template=task.template,
        epochs=TUNING_EPOCHS,
        base_name=BASE_NAME,
        seed=seed,
        **recipe.settings,
    )
    console.print(f"{task.task}: {recipe.method}")
    with ProgressBar(console) as progress:
        return tune(settings, progress)
