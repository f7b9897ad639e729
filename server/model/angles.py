"""The angles by which a base's class turns queries and keys, by position, computed once each by the class itself.

A class computes them anew in each pass, in a dozen of torch's operations: 0.1 ms, a twentieth of a step of one row on a
base of 15 M parameters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from server.model.module_calls import ModuleCall

_CHUNK = 256  # positions that are computed at once


class AngleTable:
    """Cosines and sines of a base's positions.

    Of memory it takes what the positions asked for need, little beside their keys and values.
    """

    def __init__(self, call: ModuleCall, max_model_len: int) -> None:
        """`call` is one of the class's rotation, which gives cosines and sines `[1, tokens, width]` and takes no
        tensors but hidden states `[1, tokens, hidden]`, for their type, and positions `[1, tokens]`."""
        self._call = call
        cos, sin = call.output
        self._cos, self._sin = (each.new_empty(max_model_len, each.shape[-1]) for each in (cos, sin))
        self._is_known = np.zeros(-(-max_model_len // _CHUNK), bool)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Of positions `[tokens]` cosines and sines, `[1, tokens, width]` each."""
        chunks = positions.numpy() // _CHUNK
        for chunk in np.unique(chunks[~self._is_known[chunks]]):
            self._compute(int(chunk))
        return self._cos.index_select(0, positions)[None], self._sin.index_select(0, positions)[None]

    def _compute(self, chunk: int) -> None:
        start, stop = chunk * _CHUNK, min((chunk + 1) * _CHUNK, len(self._cos))
        positions = torch.arange(start, stop)[None]

        def now(given: Any) -> Any:
            """What takes the place of an argument."""
            if not isinstance(given, Tensor):
                return given
            return given.new_zeros(1, stop - start, given.shape[-1]) if given.is_floating_point() else positions

        named = {name: now(given) for name, given in self._call.named.items()}
        cos, sin = self._call.module(*map(now, self._call.arguments), **named)
        self._cos[start:stop], self._sin[start:stop] = cos[0], sin[0]
        self._is_known[chunk] = True
