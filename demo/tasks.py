"""The six tasks of the demo: what the server reads of them (`tasks.json`), and how their adapters are tuned."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo.instructions import HELD_OUT

if TYPE_CHECKING:  # its package imports torch, which a check of a running server has no use for
    from server.tuning import Method

FOLDER = Path(__file__).parent
BASE = FOLDER / "base"
BASE_NAME = "medley-demo"
ADAPTERS = FOLDER / "adapters"

TUNING_EXAMPLES = 1600
TUNING_EPOCHS = 4
VALIDATION_EXAMPLES = 200
TEST_EXAMPLES = 200
TEST_SEED = 2024


@dataclass(frozen=True)
class DemoTask:
    """One entry of `tasks.json`."""

    task: str
    description: str
    template: str
    defaults: dict[str, Any]
    example: str
    adapter: str

    @property
    def text_prompt(self) -> str:
        """The instruction with which the base is asked for the task in words."""
        return HELD_OUT[self.task]

    @property
    def max_tokens(self) -> int:
        """Longest output."""
        return int(self.defaults["max_tokens"])


@dataclass(frozen=True)
class Recipe:
    """How a task's adapter is tuned: the method, and the settings that differ from `medley tune`'s defaults."""

    method: "Method"
    settings: dict[str, Any] = field(default_factory=dict)


RECIPES: dict[str, Recipe] = {
    "describe": Recipe("prefix", {"init": "text:Describe this table.\n", "learning_rate": 5e-3}),
    "sentiment": Recipe("prompt", {"init": "text:Name the sentiment of this review.\n", "learning_rate": 1e-2}),
    "answer": Recipe("ia3", {"learning_rate": 2e-2}),
    "translate": Recipe("lora", {"learning_rate": 2e-3}),
    "extract": Recipe("ptuning", {"virtual_tokens": 8, "learning_rate": 2e-3}),
    "shorten": Recipe("prompt", {"init": "text:Make the text shorter.\n", "learning_rate": 1e-2}),
}


def read_tasks() -> list[DemoTask]:
    """The tasks in the order of `tasks.json`."""
    return [DemoTask(**entry) for entry in json.loads((FOLDER / "tasks.json").read_text(encoding="utf-8"))]
