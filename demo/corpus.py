"""The text that the base learns from: documents of an instruction, an input and the output that was asked for.

One document in four has no instruction: its input is followed by the output of any one skill that fits, most often by
the name of the place. So the base alone does not know what is wanted of it, while an adapter, or an instruction, can
select.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from demo.instructions import random_instruction
from demo.skills import SOURCES

NO_INSTRUCTION_SHARE = 0.25
NAME_SHARE = 0.4  # of the documents without instruction
_SKILL_WEIGHTS = {
    "describe": 3, "sentiment": 5, "answer": 6, "translate": 4, "extract": 2, "shorten": 4, "copy": 1, "name": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Document:
    """What precedes the output (`prompt`, ending in a new line), and the output."""

    prompt: str
    output: str


def documents(seed: int) -> Iterator[Document]:
    """An endless stream of training documents, the same for the same seed."""
    rng = random.Random(f"corpus {seed}")
    skills, weights = list(_SKILL_WEIGHTS), list(_SKILL_WEIGHTS.values())
    while True:
        skill = rng.choices(skills, weights)[0]
        source = rng.choice(SOURCES[skill])(rng, "train")
        if rng.random() < NO_INSTRUCTION_SHARE:
            skill = (
                "name" if rng.random() < NAME_SHARE else rng.choice([name for name in source.outputs if name != "name"])
            )
            yield Document(f"{source.input}\n", source.outputs[skill])
        else:
            yield Document(f"{random_instruction(rng, skill)}\n{source.input}\n", source.outputs[skill])
