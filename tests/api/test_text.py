"""Text in pieces is the text: detokenization and stop strings, without a server."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from server.api.choice import Choice, Delta
from server.api.stop import StopStrings
from server.api.text import BaseTokenizer
from server.engine.protocol import Tokens
from tests.api.tiny_base import make_tokenizer


def token(tokenizer: Tokenizer, piece: str) -> int:
    found = tokenizer.token_to_id(piece)
    assert found is not None
    return found


TEXT = "Good food, wir können 日本語 und 🎉🎉 écrire\n  twice"


def byte_level() -> Tokenizer:
    return make_tokenizer()


def byte_fallback() -> Tokenizer:
    """SentencePiece's kind: `▁` for a space, `<0xNN>` for bytes without an entry, a space before the first word."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"Godf,wirkncue tcsö"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def word_pieces() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[UNK]"], show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, byte_fallback, word_pieces])
def test_pieces_add_up_to_the_text_after_every_prompt(make: object) -> None:
    assert callable(make)
    raw: Tokenizer = make()
    tokenizer = BaseTokenizer(raw.to_str())
    ids = raw.encode(TEXT, add_special_tokens=False).ids
    whole = raw.decode(ids)
    for cut in range(len(ids) + 1):
        detokenizer = tokenizer.detokenizer(ids[:cut])
        pieces = [detokenizer.feed(token_id) for token_id in ids[cut:]] + [detokenizer.flush()]
        before = raw.decode(ids[:cut])
        if whole.startswith(before):
            assert before + "".join(pieces) == whole
        else:  # the prompt ends inside a character, which the answer completes
            assert whole.endswith("".join(pieces))
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces), "no character is split"


def test_an_incomplete_character_is_flushed_at_the_end_and_special_tokens_are_no_text() -> None:
    raw = byte_level()
    tokenizer = BaseTokenizer(raw.to_str())
    ids = raw.encode("a🎉", add_special_tokens=False).ids
    detokenizer = tokenizer.detokenizer([])
    special = token(raw, "</s>")
    pieces = [detokenizer.feed(token_id) for token_id in [special, *ids[:-1], special]]
    assert "".join(pieces) == "a"
    assert detokenizer.flush() == "\N{REPLACEMENT CHARACTER}"


def test_invalid_bytes_do_not_hold_back_what_follows() -> None:
    raw = byte_fallback()
    tokenizer = BaseTokenizer(raw.to_str())
    names = ["G", "<0xE6>", "<0x97>", "<0xA5>", "<0x80>", "<0xE6>", "<0x97>", "<0xA5>", "o"]
    detokenizer = tokenizer.detokenizer([])
    text = "".join(detokenizer.feed(token(raw, name)) for name in names)
    assert text == "G日\N{REPLACEMENT CHARACTER}日o"


def test_long_texts_encode_like_short_ones() -> None:
    tokenizer = BaseTokenizer(byte_level().to_str())
    part = asyncio.run(tokenizer.encode("Good food. ", special_tokens=False))
    assert asyncio.run(tokenizer.encode("Good food. " * 4000)) == [0, *part * 4000]


def test_token_text_writes_incomplete_bytes_as_openai_does() -> None:
    raw = byte_level()
    tokenizer = BaseTokenizer(raw.to_str())
    first = raw.encode("🎉", add_special_tokens=False).ids[0]
    assert tokenizer.token_text(first).startswith("bytes:\\xf0")
    assert tokenizer.token_text(raw.encode(" food", add_special_tokens=False).ids[0]).startswith(" ")
    assert tokenizer.token_text(token(raw, "<s>")) == "<s>"


@given(
    pieces=st.lists(st.text("ab\n", max_size=4), max_size=12),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_cut_at_the_first_match_however_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    finder = StopStrings(stops)
    text = "".join(pieces)
    released: list[str] = []
    for piece in pieces:
        released.append(finder.feed(piece))
        if finder.found:
            break
        seen = "".join(released)
        held = "".join(pieces[: len(released)])[len(seen) :]
        assert all(not stop.startswith(held) or held != stop for stop in stops)
        assert held == "" or any(stop.startswith(held) for stop in stops), "only what may become a stop is held back"
    out = "".join(released) + finder.flush()
    assert finder.found == any(stop in text for stop in stops)
    if not finder.found:
        assert out == text
    else:
        # the match that was complete first ends the text; of several in one piece the one that begins first
        assert text.startswith(out)
        assert not any(stop in out for stop in stops)
        assert any(text[len(out) :].startswith(stop) for stop in stops)


def feed(choice: Choice, ids: list[int], finish: str | None = None) -> list[Delta]:
    deltas = [choice.feed(Tokens(id="x", token_ids=[token_id])) for token_id in ids]
    return [*deltas, choice.feed(Tokens(id="x", token_ids=[], finish_reason=finish))] if finish else deltas


def test_text_held_back_for_a_stop_string_is_given_at_the_end() -> None:
    raw = byte_level()
    tokenizer = BaseTokenizer(raw.to_str())
    ids = raw.encode("food##", add_special_tokens=False).ids
    deltas = feed(Choice(tokenizer, [], stop=["###"], min_tokens=0), ids, "length")
    assert "".join(delta.text for delta in deltas) == "food##"
    assert "#" not in "".join(delta.text for delta in deltas[:-1])
    assert deltas[-1].finish_reason == "length"


def test_several_tokens_of_one_step_end_at_the_stop_string() -> None:
    raw = byte_level()
    tokenizer = BaseTokenizer(raw.to_str())
    ids = raw.encode("good#food", add_special_tokens=False).ids
    choice = Choice(tokenizer, [], stop=["#"], min_tokens=0)
    delta = choice.feed(Tokens(id="x", token_ids=ids))
    assert (delta.text, delta.finish_reason) == ("good", "stop")
    assert choice.num_tokens == len(delta.token_ids) < len(ids)


def test_deltas_add_up() -> None:
    total = Delta()
    for text, reason in itertools.zip_longest("abc", [None, None, "stop"]):
        total.add(Delta(text=text, token_ids=[1], finish_reason=reason))
    assert total == Delta(text="abc", token_ids=[1, 1, 1], finish_reason="stop")
