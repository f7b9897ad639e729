"""What virtual tokens mean: their norms, and the vocabulary's tokens nearest to them.

Soft prompts are compared with the base's input embeddings by cosine, as Lester et al. 2021 (section 7) do to interpret
theirs. A prefix's keys and values live in each layer's own space, where no token has a fixed place: norms only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.adapters import Adapter
from server.adapters.method import EmbeddingPrefix, KeyValuePrefix, TokenPrefix
from server.engine.protocol import LayerNorms, Neighbour, VirtualToken
from server.errors import RequestError
from server.model import FrozenBase

_CHUNK_VALUES = 2**22  # of the embedding table in float32 at once: 16 MiB, since it runs beside the steps


def virtual_tokens(adapter: Adapter, base: FrozenBase, k: int) -> list[VirtualToken]:
    """A soft prompt's virtual tokens, each with its `k` nearest of the vocabulary, the nearest first; empty for a
    prefix of keys and values. Raises `RequestError` for an adapter without virtual tokens."""
    match adapter.prefix:
        case EmbeddingPrefix(embeddings=embeddings):
            return _nearest(embeddings, base, min(k, base.vocab_size))
        case TokenPrefix(token_ids=token_ids):
            embeddings = base.embed(torch.tensor(token_ids, device=base.device))
            return _nearest(embeddings, base, min(k, base.vocab_size))
        case KeyValuePrefix():
            return []
    message = f"a version of method {adapter.method} has no virtual tokens, so they have no neighbours"
    raise RequestError("unsupported_method", message)


def layer_norms(adapter: Adapter) -> list[LayerNorms]:
    """Of a prefix of keys and values: their norms in each layer; empty for any other."""
    if not isinstance(adapter.prefix, KeyValuePrefix):
        return []
    length = adapter.prefix.length
    norms = [block.float().norm(dim=-1).tolist() for block in adapter.prefix.blocks]
    return [LayerNorms(keys=layer[:length], values=layer[length:]) for layer in norms]


@torch.inference_mode()
def _nearest(embeddings: Tensor, base: FrozenBase, k: int) -> list[VirtualToken]:
    virtual = embeddings.to(base.device).float()
    directions = torch.nn.functional.normalize(virtual, dim=-1)
    best = torch.empty(len(virtual), 0, device=base.device)
    ids, norms = best.long(), best
    step = max(k, _CHUNK_VALUES // virtual.shape[1])
    for start in range(0, base.vocab_size, step):
        chunk_ids = torch.arange(start, min(start + step, base.vocab_size), device=base.device)
        chunk = base.embed(chunk_ids).float()
        similarities = directions @ torch.nn.functional.normalize(chunk, dim=-1).T
        best, order = torch.cat([best, similarities], dim=1).topk(min(k, best.shape[1] + len(chunk)), dim=1)
        rows = [chunk_ids.expand(len(virtual), -1), chunk.norm(dim=-1).expand(len(virtual), -1)]
        ids = torch.cat([ids, rows[0]], dim=1).gather(1, order)
        norms = torch.cat([norms, rows[1]], dim=1).gather(1, order)
    return [
        VirtualToken(norm=norm, nearest=[Neighbour(*found) for found in zip(*columns, strict=True)])
        for norm, *columns in zip(
            virtual.norm(dim=-1).tolist(), ids.tolist(), best.tolist(), norms.tolist(), strict=True
        )
    ]
