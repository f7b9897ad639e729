"""The demo's generator: reproducible, tests unseen in training, inputs and outputs that agree."""

import random
from itertools import islice

import pytest

from demo import texts, world
from demo.corpus import documents
from demo.instructions import HELD_OUT, random_instruction
from demo.language import DICTIONARY, translate
from demo.skills import SOURCES, examples, is_right
from demo.tasks import TEST_EXAMPLES, TEST_SEED, TUNING_EXAMPLES, VALIDATION_EXAMPLES


def test_the_corpus_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    first, again, other = (list(islice(documents(seed), 200)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_tenth_of_the_names_is_kept_from_training_and_no_word_is() -> None:
    training, test = set(world.names("train")), set(world.names("test"))
    assert not training & test
    assert len(test) * world.TEST_NAME_SHARE == len(training | test)
    assert {word for name in test for word in name.split()} <= {word for name in training for word in name.split()}


def test_no_unseen_name_stands_in_the_corpus() -> None:
    text = "\n".join(document.prompt + document.output for document in islice(documents(0), 3000))
    assert not [name for name in world.names("test") if name in text]


@pytest.mark.parametrize("task", HELD_OUT)
def test_tuning_and_test_examples_share_no_input(task: str) -> None:
    tuned = {row.input for row in examples(task, "train", TUNING_EXAMPLES + VALIDATION_EXAMPLES, 0)}
    tests = examples(task, "test", TEST_EXAMPLES, TEST_SEED)
    assert len({row.input for row in tests}) == TEST_EXAMPLES
    assert not tuned & {row.input for row in tests}
    assert tests == examples(task, "test", TEST_EXAMPLES, TEST_SEED)


@pytest.mark.parametrize("skill", SOURCES)
def test_the_expected_output_is_right_and_a_damaged_one_is_not(skill: str) -> None:
    for example in examples(skill, "train", 50, 3):
        assert is_right(skill, example, example.output)
        damaged = "The" if skill == "describe" else example.output[:-1]
        assert not is_right(skill, example, damaged)


def test_a_table_reads_back_as_the_restaurant_it_was_written_from() -> None:
    rng = random.Random(4)
    for _ in range(200):
        restaurant = world.random_restaurant(rng, "train")
        assert texts.parse_table(texts.table(restaurant)) == restaurant


def test_a_description_states_every_fact_and_stops_doing_so_when_one_is_changed() -> None:
    rng = random.Random(5)
    for _ in range(200):
        restaurant = world.random_restaurant(rng, "train")
        text = texts.plain(texts.description(rng, restaurant))
        assert texts.states_all_facts(restaurant, text)
        for slot, values in {"food": world.FOODS, "family": world.FAMILY, "near": world.LANDMARKS}.items():
            if slot in restaurant.facts:
                other = next(value for value in values if value != restaurant.facts[slot])
                assert not texts.states_all_facts(world.Restaurant(restaurant.facts | {slot: other}), text)


def test_a_wordy_text_is_longer_and_holds_every_word_of_the_plain_one_in_order() -> None:
    rng = random.Random(6)
    for _ in range(200):
        sentences = texts.description(rng, world.random_restaurant(rng, "train"))
        wordy = iter(texts.wordy(rng, sentences).replace(",", "").split())
        assert all(word in wordy for word in texts.plain(sentences).split())


def test_translation_keeps_names_turns_adjectives_round_and_leaves_no_english() -> None:
    english = "The Golden Garden serves cheap Thai food near the museum."
    assert translate(english).split()[1:3] == ["Golden", "Garden"]
    words = [DICTIONARY[word] for word in ("food", "cheap", "thai")]
    assert " ".join([words[0], words[1], words[2].capitalize()]) in translate(english)
    assert len(set(DICTIONARY.values())) == len(DICTIONARY)
    assert not set(DICTIONARY) & set(DICTIONARY.values())


def test_instructions_have_many_wordings_and_never_the_held_out_one() -> None:
    rng = random.Random(7)
    for skill, held_out in HELD_OUT.items():
        wordings = {random_instruction(rng, skill) for _ in range(2000)}
        assert len(wordings) > 100
        assert held_out not in wordings
