"""The skills of the demo: what may be asked of a text, what the right answer is, and how an answer is judged.

A *source* is an input together with the right output of every skill that can be asked of it. Its kind is what its
input looks like: a table, a description, a description with a question, a review, a wordy text.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from demo import texts
from demo.language import translate
from demo.world import Split, random_restaurant


@dataclass(frozen=True)
class Example:
    """One input with its right output."""

    input: str
    output: str


@dataclass(frozen=True)
class Source:
    """An input, and skill → right output."""

    input: str
    outputs: dict[str, str]


def table_source(rng: random.Random, split: Split) -> Source:
    restaurant = random_restaurant(rng, split)
    table = texts.table(restaurant)
    description = texts.plain(texts.description(rng, restaurant))
    return Source(table, {"describe": description, "copy": table, "name": restaurant.name})


def description_source(rng: random.Random, split: Split) -> Source:
    restaurant = random_restaurant(rng, split)
    text = texts.plain(texts.description(rng, restaurant))
    outputs = {"extract": texts.table(restaurant), "translate": translate(text), "copy": text}
    return Source(text, outputs | {"name": restaurant.name})


def question_source(rng: random.Random, split: Split) -> Source:
    restaurant = random_restaurant(rng, split)
    text = texts.plain(texts.description(rng, restaurant))
    question, answer = texts.question(rng, restaurant)
    text = f"{text} {question}"
    outputs = {"answer": answer, "extract": texts.table(restaurant), "copy": text}
    return Source(text, outputs | {"name": restaurant.name})


def review_source(rng: random.Random, split: Split) -> Source:
    sentences, sentiment, name = texts.review(rng, split)
    text = texts.plain(sentences)
    return Source(text, {"sentiment": sentiment, "copy": text, "name": name})


def wordy_source(rng: random.Random, split: Split) -> Source:
    restaurant = random_restaurant(rng, split)
    sentences = texts.description(rng, restaurant)
    text = texts.wordy(rng, sentences)
    return Source(text, {"shorten": texts.plain(sentences), "copy": text, "name": restaurant.name})


SOURCES: dict[str, tuple[Callable[[random.Random, Split], Source], ...]] = {
    "describe": (table_source,),
    "sentiment": (review_source,),
    "answer": (question_source,),
    "translate": (description_source,),
    "extract": (description_source,),
    "shorten": (wordy_source,),
    "copy": (table_source, description_source, question_source, wordy_source),
    "name": (table_source, description_source, question_source, review_source, wordy_source),
}
"""Skill → the kinds of source that it is asked of."""


def random_example(rng: random.Random, skill: str, split: Split) -> Example:
    """An example of a skill."""
    source = rng.choice(SOURCES[skill])(rng, split)
    return Example(source.input, source.outputs[skill])


def is_right(skill: str, example: Example, output: str) -> bool:
    """Whether an output is right: equal to the expected one; a description must state all facts of its table."""
    if skill == "describe":
        return texts.states_all_facts(texts.parse_table(example.input), output)
    return output.strip() == example.output


def examples(skill: str, split: Split, count: int, seed: int) -> list[Example]:
    """`count` examples of a skill with different inputs, the same for the same arguments."""
    rng = random.Random(f"{skill} {split} {seed}")
    found: dict[str, Example] = {}
    while len(found) < count:
        example = random_example(rng, skill, split)
        found.setdefault(example.input, example)
    return list(found.values())
