"""Task and chat templates: what they may do, and what they are refused."""

from __future__ import annotations

from typing import Any

import pytest

from server.api.templates import MAX_OUTPUT, MAX_SOURCE, PromptTemplate
from server.errors import RequestError


def render(source: str, *, chat: bool = False, **variables: Any) -> str:
    return PromptTemplate(source, param="template", chat=chat).render(variables)


def test_a_task_template_keeps_white_space_and_escapes_nothing() -> None:
    assert render("  {{ input }}\n{% if true %}\nx{% endif %}\n", input="<b>&") == "  <b>&\n\nx\n"


def test_inputs_are_reached_by_name() -> None:
    assert render("{{ inputs.a }}-{{ inputs['b'] | join(',') }}", inputs={"a": 1, "b": [2, 3]}) == "1-2,3"


def test_a_chat_template_has_what_templates_on_the_hub_expect() -> None:
    source = """{%- for m in messages %}
    {%- if m.role == 'tool' %}{% continue %}{% endif %}
    {{- bos_token + m.content | trim }}
    {%- generation %}!{% endgeneration %}
{%- endfor %}
{{- {'é': '<'} | tojson }}{{ strftime_now('%Y') | length }}
{%- if tools is defined %}{{ raise_exception('no tools') }}{% endif %}"""
    messages = [{"role": "user", "content": " hi "}, {"role": "tool", "content": "x"}]
    assert render(source, chat=True, messages=messages, bos_token="<s>") == '<s>hi!{"é": "<"}4'


def test_a_chat_template_refuses_with_its_own_words() -> None:
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}", chat=True)
    assert caught.value.code == "invalid_template"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("a\nb {{ unknown }}", "line 2.*'unknown' is undefined"),
        ("{{ input.x.y }}", "line 1"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ input.__init__.__globals__ }}", "unsafe"),
        ("{{ 'a' * 100000000 }}", "repetition"),
        ("{{ [1] * 100000000 }}", "repetition"),
        ("{{ 9 ** 99999 }}", "bits"),
        ("{% for _ in range(3) %}{{ 2 ** 4000 * 2 ** 4000 }}{% endfor %}", "bits"),
        ("{% for i in range(99999999) %}{% endfor %}", "[Rr]ange"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "[Rr]ange"),
        ("{% for i in range(99999) %}{{ input * 100 }}{% endfor %}", "more than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ 'a'.ljust(9999999) }}", "more than"),
    ],
)
def test_a_template_that_goes_too_far_is_a_bad_request(source: str, words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        render(source, input="x" * 50)
    assert (caught.value.code, caught.value.param) == ("invalid_template", "template")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("a\n\n{% if %}", "line 3"),
        ("{{ input", "line 1"),
        ("{{ input | nofilter }}", "nofilter"),
        ("{% include 'x' %}", "."),
        ("x" * (MAX_SOURCE + 1), "at most"),
    ],
)
def test_a_bad_template_is_refused_when_it_is_given(source: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        PromptTemplate(source, param="template").render({"input": ""})


def test_output_is_bounded() -> None:
    with pytest.raises(RequestError, match=str(MAX_OUTPUT)):
        render("{{ input }}{{ input }}", input="x" * (MAX_OUTPUT // 2 + 1))
