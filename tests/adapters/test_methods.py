"""The table of methods."""

from __future__ import annotations

from server.adapters import METHODS
from server.adapters.method import OwnMethod, PeftMethod


def test_the_listing_s_formats_name_what_the_table_reads() -> None:
    for method in METHODS:
        facts = method.FACTS
        assert facts.name == method.NAME
        if isinstance(method, PeftMethod):
            assert any(name.startswith(f"PEFT {method.PEFT_TYPE}") for name in facts.formats)
        if isinstance(method, OwnMethod):
            assert any(name.startswith(f"Medley {method.MEDLEY_METHOD}") for name in facts.formats)
    formats = [name for method in METHODS for name in method.FACTS.formats]
    assert len(set(formats)) == len(formats), "one format is one method's"
