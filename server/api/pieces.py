"""The bytes behind each entry of a vocabulary, for the two decoders that nearly all language models use.

Byte-level vocabularies (GPT-2 and its heirs) write every byte as a character; SentencePiece's write a space as `▁` and
bytes without an entry as `<0xNN>`. For both, a text is the UTF-8 of its tokens' bytes laid end to end, apart from a
space that SentencePiece puts before the first word. Other decoders (WordPiece, none) are not of this kind.
"""

from __future__ import annotations

import re
from typing import Any

_JOINING = {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Pieces:
    """What a `tokenizer.json` says of its entries."""

    def __init__(self, tokenizer: dict[str, Any]) -> None:
        """`tokenizer`: the file, parsed."""
        decoder = tokenizer.get("decoder") or {}
        self._steps: list[dict[str, Any]] = decoder.get("decoders", [decoder])
        kinds = [step.get("type") for step in self._steps]
        self._byte_level = _byte_alphabet() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        self._spellings = [spelling for step in self._steps if (spelling := _spelling(step)) is not None]
        self._added = {token["content"] for token in tokenizer.get("added_tokens", [])}
        strip = next((step for step in self._steps if step.get("type") == "Strip"), None)
        self.leading_spaces = 1 if "Metaspace" in kinds else 0  # taken from the start of a text
        if strip is not None:
            self.leading_spaces = int(strip["start"])
        strips_whole_text = strip is None or ("Fuse" in kinds and not strip["stop"] and strip["content"] == " ")
        self.join = strips_whole_text and all(kind in _JOINING for kind in kinds)  # bytes end to end are the text

    def of(self, piece: str) -> bytes:
        """The bytes of one entry; an added token's are its name."""
        if piece in self._added:
            return piece.encode()
        if self._byte_level is not None:
            return b"".join(self._byte_level.get(character, character.encode()) for character in piece)
        if self._byte_fallback and (byte := _BYTE.fullmatch(piece)):
            return bytes.fromhex(byte[1])
        for spelling, content in self._spellings:
            piece = piece.replace(spelling, content)
        return piece.encode()


def _spelling(step: dict[str, Any]) -> tuple[str, str] | None:
    """What a decoder's step replaces, and by what."""
    if step.get("type") == "Metaspace":
        return step["replacement"], " "
    if step.get("type") == "Replace" and "String" in step["pattern"]:
        return step["pattern"]["String"], step["content"]
    return None


def _byte_alphabet() -> dict[str, bytes]:
    """The characters by which byte-level vocabularies write bytes (Radford et al. 2019): a printable byte of Latin-1
    is its own character, the others are numbered from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    alphabet = {chr(byte): bytes([byte]) for byte in printable}
    return alphabet | {chr(0x100 + index): bytes([byte]) for index, byte in enumerate(others)}
