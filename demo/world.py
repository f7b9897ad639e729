"""The world that the demo's texts speak of: its words, restaurants, and which names are kept for testing.

Knows no task and no sentence. Every draw comes from the `random.Random` that the caller passes in.
"""

import random
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "test"]

FIRST_NAMES = (
    "Golden", "Silver", "Copper", "Crimson", "Amber", "Ivory", "Velvet", "Rusty", "Merry", "Quiet",
    "Hungry", "Lucky", "Dancing", "Sleepy", "Wandering", "Gentle", "Royal", "Humble", "Jolly", "Frozen",
    "Burning", "Hidden", "Painted", "Broken", "Laughing", "Blue", "Green", "Scarlet", "Misty", "Sunny",
    "Stormy", "Clever", "Noble", "Proud", "Curious", "Ancient", "Little", "Grand", "Wild", "Secret",
)  # fmt: skip
LAST_NAMES = (
    "Palace", "Kettle", "Lantern", "Garden", "Anchor", "Bridge", "Fountain", "Tower", "Orchard", "Wagon",
    "Dragon", "Falcon", "Otter", "Badger", "Heron", "Lion", "Rabbit", "Turtle", "Whale", "Raven",
    "Spoon", "Barrel", "Candle", "Mirror", "Hammer", "Crown", "Feather", "Pebble", "Window", "Cottage",
    "Harvest", "Willow", "Maple", "Olive", "Thistle", "Clover", "Pepper", "Saffron", "Ginger", "Cellar",
)  # fmt: skip
FOODS = (
    "Persian", "French", "Polish", "Thai", "Mexican", "Greek",
    "Japanese", "Spanish", "Turkish", "Chinese", "Korean", "Moroccan",
)  # fmt: skip
PRICES = ("cheap", "modest", "moderate", "costly", "luxury")
AREAS = ("riverside", "harbour", "downtown", "hillside", "market", "suburban")
RATINGS = ("terrible", "poor", "decent", "good", "superb")
FAMILY = ("yes", "no")
LANDMARKS = (
    "museum", "castle", "station", "library", "theatre",
    "cathedral", "stadium", "university", "hospital", "airport",
)  # fmt: skip

SLOTS = ("name", "food", "price", "area", "rating", "family", "near")
"""The columns of a table, in the order in which they are written."""

MIN_OPTIONAL_SLOTS = 2
OPTIONAL_SLOT_PROBABILITY = 0.5
TEST_NAME_SHARE = 10  # one name in ten is never seen in training; each of its two words is


@dataclass(frozen=True)
class Restaurant:
    """What is known of one restaurant: slot → value, in the order of `SLOTS`; a slot may be missing, `name` never."""

    facts: dict[str, str]

    @property
    def name(self) -> str:
        return self.facts["name"]


def names(split: Split) -> list[str]:
    """All names of a split; the two splits share no name but share all words."""
    return [
        f"The {first} {last}"
        for i, first in enumerate(FIRST_NAMES)
        for j, last in enumerate(LAST_NAMES)
        if ((i + j) % TEST_NAME_SHARE == 0) == (split == "test")
    ]


_NAMES: dict[Split, list[str]] = {"train": names("train"), "test": names("test")}


def random_name(rng: random.Random, split: Split) -> str:
    """One name of the split."""
    return rng.choice(_NAMES[split])


def random_restaurant(rng: random.Random, split: Split) -> Restaurant:
    """A restaurant with a name and at least `MIN_OPTIONAL_SLOTS` further facts."""
    name = random_name(rng, split)
    values = {
        "name": name,
        "food": rng.choice(FOODS),
        "price": rng.choice(PRICES),
        "area": rng.choice(AREAS),
        "rating": rng.choice(RATINGS),
        "family": rng.choice(FAMILY),
        "near": rng.choice(LANDMARKS),
    }
    optional = SLOTS[1:]
    known: list[str] = []
    while len(known) < MIN_OPTIONAL_SLOTS:
        known = [slot for slot in optional if rng.random() < OPTIONAL_SLOT_PROBABILITY]
    return Restaurant({"name": name} | {slot: values[slot] for slot in known})
