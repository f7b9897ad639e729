"""From examples to batches of token ids, in the layout in which the server will see them.

The prompt is what the server makes of an input: the template's text with the tokenizer's own special tokens. The
output's tokens and one end-of-text token follow it; these alone are learnt. Batches are padded on the right, so every
token has the position that it has when served alone: PEFT puts virtual tokens before the padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from server.tuning.errors import TuneError
from server.tuning.examples import Example

IGNORED_LABEL = -100  # the label that the loss of `transformers` leaves out


@dataclass(frozen=True)
class EncodedExample:
    """Token ids of one example; `output` ends with the end of text."""

    prompt: list[int]
    output: list[int]


@dataclass(frozen=True)
class Batch:
    """Right-padded examples, all [examples, tokens]; `labels` is `IGNORED_LABEL` but at output tokens."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor

    @property
    def output_tokens(self) -> int:
        """How many tokens the loss is the mean of."""
        return int((self.labels != IGNORED_LABEL).sum())


class Encoder:
    """Turns examples into token ids for one base and one template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None, max_tokens: int) -> None:
        """`max_tokens`: of prompt and output together. Raises `TuneError` on a template that is not Jinja."""
        if tokenizer.eos_token_id is None:
            raise TuneError("model: its tokenizer has no end-of-text token, so outputs could never end")
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        # As the server renders it: a final new line belongs to the prompt, an unknown name is an error.
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
        try:
            self._template = None if template is None else environment.from_string(template)
        except TemplateError as error:
            raise TuneError(f"template: {error}") from error

    def encode(self, example: Example) -> EncodedExample:
        """Raises `TuneError` naming the example's file and line where the template fails or the text is too long."""
        text = self._render(example)
        prompt = self._tokenizer(text)["input_ids"]
        output = [*self._output_ids(text, prompt, example.output), self._tokenizer.eos_token_id]
        if len(prompt) + len(output) > self._max_tokens:
            raise TuneError(
                f"{example.where}: {len(prompt)} prompt and {len(output)} output tokens are more than the "
                f"{self._max_tokens} there is room for; shorten the example or raise max_length"
            )
        return EncodedExample(prompt, output)

    def encode_all(self, examples: Sequence[Example], *, prompt_may_be_empty: bool) -> list[EncodedExample]:
        """Every example; an empty prompt leaves nothing to predict the first token from but virtual tokens."""
        encoded = [self.encode(example) for example in examples]
        for example, ids in zip(examples, encoded, strict=True):
            if not ids.prompt and not prompt_may_be_empty:
                raise TuneError(f"{example.where}: the prompt is empty, which this method cannot continue")
        return encoded

    def _render(self, example: Example) -> str:
        if self._template is None:
            return example.input
        try:
            return self._template.render(input=example.input)
        except TemplateError as error:
            raise TuneError(f"{example.where}: the template cannot be filled: {error}") from error

    def _output_ids(self, text: str, prompt: list[int], output: str) -> list[int]:
        # The natural continuation of the prompt, unless a token would span the border: a tokenizer may put a
        # space before a text that it meets alone.
        whole: list[int] = self._tokenizer(text + output, add_special_tokens=False)["input_ids"]
        bare: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if whole[: len(bare)] == bare:
            return whole[len(bare) :]
        alone: list[int] = self._tokenizer(output, add_special_tokens=False)["input_ids"]
        return alone


def collate(examples: Sequence[EncodedExample], pad: int) -> Batch:
    """One batch; `pad` is any token id, it is masked."""
    length = max(len(example.prompt) + len(example.output) for example in examples)
    input_ids = torch.full((len(examples), length), pad)
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    attention_mask = torch.zeros_like(input_ids)
    for row, example in enumerate(examples):
        start, end = len(example.prompt), len(example.prompt) + len(example.output)
        input_ids[row, :end] = torch.tensor([*example.prompt, *example.output])
        labels[row, start:end] = input_ids[row, start:end]
        attention_mask[row, :end] = 1
    return Batch(input_ids, attention_mask, labels)
