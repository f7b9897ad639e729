"""Templates that turn an input or messages into a prompt: sandboxed Jinja, bounded.

A task's template sees `input` and `inputs` (in a chat, `messages` too, `input` being the last user message); a name
that is not there is an error. A base's chat template sees what templates on the hub expect: `messages`,
`add_generation_prompt`, the special tokens, `raise_exception`, `strftime_now`, `tojson`, loop controls. The source and
the text that comes out are bounded, and so are `range`, repetition and powers; a template reaches nothing but its
variables. This guards against slips and break-outs, not against an author who sets out to use up memory: whoever may
publish a task is trusted that far. What a template says of a bad input becomes a `RequestError` with the line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, Undefined, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from server.errors import RequestError

MAX_SOURCE = 65_536  # characters of a template
MAX_OUTPUT = 4_000_000  # characters of a prompt; any model's length is reached long before
_MAX_BITS = 4096  # of an integer
_MAX_RANGE = 100_000  # items of all of a rendering's ranges together: nested loops multiply
# What a template raises over variables that it was not written for.
_REFUSALS = (
    TemplateError,
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
    MemoryError,
)


class PromptTemplate:
    """A compiled template."""

    def __init__(self, source: str, *, param: str, chat: bool = False) -> None:
        """`param` is the field that errors name; `chat`: a base's chat template rather than a task's.

        Raises `RequestError` (`invalid_template`) with the line of a syntax error.
        """
        self._param = param
        if len(source) > MAX_SOURCE:
            raise RequestError("invalid_template", f"a template has at most {MAX_SOURCE} characters", param)
        try:
            self._template = _compile(source, chat)
        except TemplateSyntaxError as error:
            raise RequestError(
                "invalid_template", f"{param}: line {error.lineno} of the template: {error.message}", param
            ) from None
        except TemplateError as error:  # an unknown filter or test
            raise RequestError("invalid_template", f"{param}: the template: {error.message}", param) from None

    def render(self, variables: Mapping[str, Any]) -> str:
        """The prompt. Raises `RequestError` (`invalid_template`) when these variables do not fit the template."""
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate({**variables, "range": _Range()}):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_OUTPUT:
                    raise _TooLongError(f"it makes a prompt of more than {MAX_OUTPUT} characters")
        except _REFUSALS as error:
            where = _line(error)
            raise RequestError(
                "invalid_template", f"{self._param}: the template{where} refuses this request: {error}", self._param
            ) from None
        return "".join(pieces)


@lru_cache(maxsize=1024)
def _compile(source: str, chat: bool) -> Template:
    return (_CHAT if chat else _TASK).from_string(source)


class _GenerationBlock(Extension):
    """`{% generation %}…{% endgeneration %}`: marks the assistant's words for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The block's content."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Range:
    """`range` for one rendering, with a bound on the items of all its calls."""

    def __init__(self) -> None:
        self._left = _MAX_RANGE

    def __call__(self, *arguments: int) -> range:
        """Python's `range`."""
        items = range(*arguments)
        self._left -= len(items)
        if self._left < 0:
            raise SecurityError(f"the ranges of a template have at most {_MAX_RANGE} items together")
        return items


class _TooLongError(TemplateError):
    """The output's bound."""


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with bounds on what one operator can make."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Refuse operators whose result would be out of proportion."""
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > _MAX_BITS:
                raise SecurityError(f"a number has at most {_MAX_BITS} bits")
        elif operator == "*" and _repeats(left, right) > MAX_OUTPUT:
            raise SecurityError(f"a repetition makes at most {MAX_OUTPUT} items")
        return super().call_binop(context, operator, left, right)


def _environment(undefined: type[Undefined], **options: Any) -> _Environment:
    environment = _Environment(undefined=undefined, autoescape=False, **options)
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _repeats(left: Any, right: Any) -> int:
    """Items of a text or list that is multiplied by a number; 0 for numbers alone."""
    for items, count in ((left, right), (right, left)):
        if isinstance(items, str | list | tuple) and isinstance(count, int):
            return len(items) * max(0, count)
    return 0


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, sort_keys: bool = False) -> str:
    """JSON as it is: a prompt is not HTML, so nothing is escaped."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(str(message))


def _strftime_now(form: str) -> str:
    return datetime.now().astimezone().strftime(form)


def _line(error: BaseException) -> str:
    """` at line N` of the innermost template frame."""
    line = None
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return "" if line is None else f" at line {line}"


_TASK = _environment(StrictUndefined, keep_trailing_newline=True)
_EXTENSIONS = [LoopControlExtension, _GenerationBlock]
_CHAT = _environment(Undefined, trim_blocks=True, lstrip_blocks=True, extensions=_EXTENSIONS)
