"""The wordings in which the base's training text asks for each skill.

A wording is put together from an opening, a verb phrase and an ending, so there are dozens per skill. One wording of
each, `HELD_OUT`, never stands in the training text: it is the text prompt with which the base is measured.
"""

import random

_OPENINGS = ("", "please ", "now ", "your task: ", "can you ", "I want you to ", "task: ")
_ENDINGS = (".", ":", "", " please.", ", thank you.")
_PHRASES = {
    "describe": (
        "describe this table", "describe the place in the table", "write a description", "turn the table into a text",
        "write the facts as a text", "put this table into sentences", "describe these facts",
    ),
    "sentiment": (
        "say how the guest feels", "name the sentiment", "judge the sentiment of this review",
        "is the review positive, negative or mixed", "classify the review", "tell the mood of this review",
        "rate the feeling of the review",
    ),
    "answer": (
        "answer the question", "answer the question on the text", "read the text and answer", "give a short answer",
        "reply to the question", "find the answer in the text", "answer from the text",
    ),
    "translate": (
        "translate this text", "translate the text into the second language", "give the translation",
        "say this in the other language", "write this in the second language", "translate",
        "turn this into the other language",
    ),
    "extract": (
        "extract a table", "extract the facts", "turn the text into a table", "make a table of the facts",
        "list the facts of the text as a table", "write the table of this description", "fill the table",
    ),
    "shorten": (
        "shorten this text", "make the text shorter", "drop the needless words", "remove the filler",
        "say this in fewer words", "shorten", "cut this text down",
    ),
    "copy": (
        "copy this text", "repeat the text", "write the same again", "copy", "say it again word for word",
    ),
    "name": (
        "give the name of the place", "name the place", "which place is meant", "write only the name",
        "find the name in the text",
    ),
}  # fmt: skip

HELD_OUT = {
    "describe": "Please describe this table.",
    "sentiment": "Please name the sentiment.",
    "answer": "Please answer the question.",
    "translate": "Please translate this text.",
    "extract": "Please extract a table.",
    "shorten": "Please shorten this text.",
}


def random_instruction(rng: random.Random, skill: str) -> str:
    """A wording for a skill, never the held-out one."""
    while True:
        text = rng.choice(_OPENINGS) + rng.choice(_PHRASES[skill]) + rng.choice(_ENDINGS)
        text = text[0].upper() + text[1:]
        if text != HELD_OUT.get(skill):
            return text
