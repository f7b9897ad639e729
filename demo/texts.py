"""Sentences about restaurants: tables, descriptions, questions, reviews, and their wordy variants.

Each function turns facts and a random generator into text; none knows which task will use it.
"""

import random
from dataclasses import dataclass

from demo.world import Restaurant, Split, random_name

PLACES = ("restaurant", "place", "kitchen")
RATING_PHRASES = ("has a |{} rating", "is rated |{}")
FAMILY_PHRASES = {
    "yes": ("families are welcome", "children are welcome", "it suits families"),
    "no": ("families are not welcome", "children are not welcome", "it is for adults only"),
}
QUESTIONS = {
    "name": ("What is it called?", "What is the name?", "Which place is this?"),
    "food": ("What food do they serve?", "Which food is it?", "What can I eat there?"),
    "price": ("How much does it cost?", "What are the prices like?", "How expensive is it?"),
    "area": ("Where is it?", "Which area is it in?", "What part of town is it in?"),
    "rating": ("How is it rated?", "What is the rating?", "How good is it?"),
    "family": ("Are families welcome?", "Can I bring my children?", "Is it good for families?"),
    "near": ("What is it near?", "What is it close to?", "What is next to it?"),
}
THINGS = (
    "soup", "bread", "fish", "waiter", "music", "dessert",
    "coffee", "service", "view", "table", "salad", "wine",
)  # fmt: skip
POSITIVE = ("lovely", "fresh", "tasty", "wonderful", "friendly", "perfect", "charming", "great")
NEGATIVE = ("awful", "stale", "bland", "horrible", "rude", "slow", "dirty", "boring")
SENTIMENTS = ("positive", "negative", "mixed")
ADVERBS = ("very", "really", "quite", "rather", "truly")
ASIDES = ("as you know", "so they say", "to be honest", "by the way")
FILLER_SENTENCES = ("Let me tell you more.", "That is what I heard.", "You may know this already.")


@dataclass(frozen=True)
class Sentence:
    """One sentence as the words of its clauses: an aside may follow `subject`, `|` marks where an adverb fits."""

    subject: str
    rest: str

    def plain(self) -> str:
        return f"{self.subject} {self.rest.replace('|', '')}"


def plain(sentences: list[Sentence]) -> str:
    """The sentences without any filler."""
    return " ".join(sentence.plain() for sentence in sentences)


def table(restaurant: Restaurant) -> str:
    """`name: The Golden Palace; food: Thai; …`: the known slots in their order."""
    return "; ".join(f"{slot}: {value}" for slot, value in restaurant.facts.items())


def parse_table(text: str) -> Restaurant:
    """The restaurant that `table` wrote."""
    return Restaurant(dict(fact.split(": ") for fact in text.split("; ")))


def description(rng: random.Random, restaurant: Restaurant) -> list[Sentence]:
    """One to three sentences that state every known fact once and nothing else."""
    facts = restaurant.facts
    price = f"|{facts['price']} " if "price" in facts else ""
    qualities = price + (f"{facts['food']} " if "food" in facts else "")
    area = f" in the {facts['area']} area" if "area" in facts else ""
    near = f" near the {facts['near']}" if "near" in facts else ""
    where = area + near if rng.random() < 0.5 else near + area
    if rng.random() < 0.5 and qualities:
        sentences = [Sentence(restaurant.name, f"serves {qualities}food{where}.")]
    else:
        sentences = [Sentence(restaurant.name, f"is a {qualities}{rng.choice(PLACES)}{where}.")]
    return sentences + _judgements(rng, facts)


def _judgements(rng: random.Random, facts: dict[str, str]) -> list[Sentence]:
    """The rating and whether families are welcome, in one sentence or two."""
    rating = rng.choice(RATING_PHRASES).format(facts["rating"]) if "rating" in facts else None
    family = rng.choice(FAMILY_PHRASES[facts["family"]]) if "family" in facts else None
    if rating and family and rng.random() < 0.5:
        return [Sentence("It", f"{rating} and {family}.")]
    sentences = [Sentence("It", f"{rating}.")] if rating else []
    if family:
        subject, rest = family.split(" ", 1)
        sentences.append(Sentence(subject.capitalize(), f"{rest}."))
    return sentences


def states_all_facts(restaurant: Restaurant, text: str) -> bool:
    """Whether the text holds every value; a yes or no is held by one of its phrases, with none of the other's."""
    for slot, value in restaurant.facts.items():
        if slot == "family":
            said = {
                answer
                for answer, phrases in FAMILY_PHRASES.items()
                if any(phrase in text.lower() for phrase in phrases)
            }
            if said != {value}:
                return False
        elif value not in text:
            return False
    return True


def question(rng: random.Random, restaurant: Restaurant) -> tuple[str, str]:
    """A question on one known fact, and its answer."""
    slot = rng.choice(list(restaurant.facts))
    return rng.choice(QUESTIONS[slot]), restaurant.facts[slot]


def review(rng: random.Random, split: Split) -> tuple[list[Sentence], str, str]:
    """A guest's review of two or three judgements: its sentences, its sentiment, and the place's name.

    The sentiment is `mixed` when good and bad judgements stand side by side; `not` turns a judgement round.
    """
    name = random_name(rng, split)
    sentiment = rng.choice(SENTIMENTS)
    count = rng.choice((2, 3))
    if sentiment == "mixed":
        goods = rng.sample((True, False), 2) + [rng.random() < 0.5 for _ in range(count - 2)]
        rng.shuffle(goods)
    else:
        goods = [sentiment == "positive"] * count
    clauses = [
        (f"the {thing}", _judgement(rng, good)) for thing, good in zip(rng.sample(THINGS, count), goods, strict=True)
    ]
    sentences = [Sentence(rng.choice(("We", "I")), f"{rng.choice(('ate at', 'went to', 'visited'))} {name}.")]
    while clauses:
        joined = clauses[: 2 if rng.random() < 0.5 else 1]
        clauses = clauses[len(joined) :]
        subject, rest = joined[0]
        rest += "".join(f" and {other} {judgement}" for other, judgement in joined[1:])
        sentences.append(Sentence(subject.capitalize(), f"{rest}."))
    return sentences, sentiment, name


def _judgement(rng: random.Random, good: bool) -> str:
    if rng.random() < 0.15:
        return f"was not |{rng.choice(NEGATIVE if good else POSITIVE)}"
    return f"was |{rng.choice(POSITIVE if good else NEGATIVE)}"


def wordy(rng: random.Random, sentences: list[Sentence]) -> str:
    """The sentences with at least two fillers: adverbs, asides behind a subject, sentences that say nothing."""
    while True:
        fillers = 0
        parts: list[str] = []
        for sentence in sentences:
            subject, rest = sentence.subject, ""
            if subject.startswith("The") and rng.random() < 0.4:
                fillers += 1
                subject = f"{subject}, {rng.choice(ASIDES)},"
            for position, piece in enumerate(sentence.rest.split("|")):
                adverb = position > 0 and rng.random() < 0.5
                fillers += adverb
                rest += f"{rng.choice(ADVERBS)} {piece}" if adverb else piece
            parts.append(f"{subject} {rest}")
        if rng.random() < 0.4:
            fillers += 1
            parts.insert(rng.randrange(len(parts) + 1), rng.choice(FILLER_SENTENCES))
        if fillers >= 2:
            return " ".join(parts)
