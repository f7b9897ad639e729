"""Random-weight Llama bases. Speed does not depend on the weights' values; that greedy outputs vary does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

_FEEDFORWARD_MULTIPLE = 64


@dataclass(frozen=True)
class BaseSize:
    """The widths that decide a base's speed."""

    width: int
    layers: int
    heads: int
    vocabulary: int

    @classmethod
    def parse(cls, text: str) -> BaseSize:
        """A name in `SIZES`, or `WIDTHxLAYERSxHEADSxVOCABULARY`. Raises `ValueError`."""
        if text in SIZES:
            return SIZES[text]
        parts = text.split("x")
        if len(parts) != 4 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            names = ", ".join(SIZES)
            raise ValueError(f"{text!r} is no base size; use one of {names}, or WIDTHxLAYERSxHEADSxVOCABULARY")
        size = cls(*map(int, parts))
        if size.width % (2 * size.heads):
            raise ValueError(f"{text!r}: the width must be a multiple of twice the heads, for rotary embeddings")
        return size

    @property
    def feedforward(self) -> int:
        """Llama's 8/3 of the width, rounded up to a multiple of 64."""
        return -(-self.width * 8 // 3 // _FEEDFORWARD_MULTIPLE) * _FEEDFORWARD_MULTIPLE

    def __str__(self) -> str:
        return f"{self.width} wide, {self.layers} layers, {self.heads} heads, vocabulary {self.vocabulary}"


SIZES = {
    "tiny": BaseSize(64, 2, 4, 512),  # 0.1 M parameters, for smoke tests
    "small": BaseSize(384, 7, 6, 8192),  # 15 M
    "large": BaseSize(768, 12, 12, 8192),  # 91 M
}


def random_base(size: BaseSize, max_length: int) -> PreTrainedModel:
    """A float32 model for sequences of up to `max_length` positions; the same weights at every call.

    Input and output embeddings are tied. Each matrix keeps the variance of what passes through it, so that
    every layer takes part in the output and the output is not one token for ever.
    """
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.feedforward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # norms keep their ones
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model.eval()
