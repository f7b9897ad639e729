"""What kernels for row deltas on a device have to compute, one token and row at a time."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from server.model.device_deltas import Launch, Placed, Tokens


def _taken(tokens: Tokens) -> list[int]:
    return list(range(tokens.start, tokens.start + tokens.number)) if tokens.chosen is None else tokens.chosen.tolist()


def _low_rank(inputs: Tensor, outputs: Tensor, tokens: Tokens, down: Placed, up: Placed) -> None:
    for token, downs, ups in zip(_taken(tokens), down.rows.tolist(), up.rows.tolist(), strict=True):
        total = outputs[token].double()
        for a, b in zip(downs, ups, strict=True):
            total += (down.pool[a].double() @ inputs[token].double()) * up.pool[b].double()
        outputs[token] = total.to(outputs.dtype)


def _scale(inputs: Tensor, outputs: Tensor, tokens: Tokens, row: Placed) -> None:
    for token, (at,) in zip(_taken(tokens), row.rows.tolist(), strict=True):
        outputs[token] = (outputs[token].double() * (1 + row.pool[at].double())).to(outputs.dtype)


def _shift(inputs: Tensor, outputs: Tensor, tokens: Tokens, row: Placed) -> None:
    for token, (at,) in zip(_taken(tokens), row.rows.tolist(), strict=True):
        outputs[token] = (outputs[token].double() + row.pool[at].double()).to(outputs.dtype)


SLOW_LAUNCHES: Mapping[str, Launch] = {"low_rank": _low_rank, "scale": _scale, "shift": _shift}
