"""The demo's second language: a dictionary of invented words and one rule of order.

Every word of the sentences in `demo.texts` has its own invented word, except the two words of a name, which are
kept. Adjectives stand behind their noun: `a cheap Thai place` becomes `place cheap Thai`, word by word.
Punctuation and capital letters stay as they are.
"""

import random
import re

from demo import texts, world

ADJECTIVES = (*world.PRICES, *world.FOODS, *world.RATINGS)
NOUNS = (*texts.PLACES, "food", "rating")
_FUNCTION_WORDS = (
    "the a is it has in near area serves rated and families are children welcome suits for adults only not"
    " we i ate at went to visited was"
)
_ORDER = re.compile(rf"((?:(?:{'|'.join(ADJECTIVES)}) )+)({'|'.join(NOUNS)})\b")


def _dictionary() -> dict[str, str]:
    """English word (lower case) → invented word of two syllables, all different, always the same."""
    of_sentences = {word.lower() for word in (*ADJECTIVES, *NOUNS, *world.AREAS, *texts.THINGS)}
    of_sentences |= {*texts.POSITIVE, *texts.NEGATIVE, *_FUNCTION_WORDS.split()}
    words = [*sorted(of_sentences), *world.LANDMARKS]
    rng = random.Random("the second language")
    invented: dict[str, str] = {}
    for word in words:
        new = ""
        while not new or new in invented.values():
            syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2)]
            new = "".join(syllables) + rng.choice(("", "n", "s", "r"))
        invented[word] = new
    return invented


DICTIONARY = _dictionary()


def translate(text: str) -> str:
    """The text in the second language."""
    return re.sub(r"[A-Za-z]+", lambda match: _word(match.group()), _ORDER.sub(r"\2 \1", text).replace("  ", " "))


def _word(word: str) -> str:
    if word in world.FIRST_NAMES or word in world.LAST_NAMES:
        return word
    new = DICTIONARY[word.lower()]
    return new.capitalize() if word[0].isupper() else new
