"""The frozen base model: loading, the probe that decides whether it is served right, its attention over KV
pages, and the sites at which adapters change its modules. Knows nothing of adapters' formats, of requests or
of scheduling."""

from server.model.attention import AttentionPlan, DecodeGroup, PagedAttention, PrefillRow
from server.model.base import BaseShape, FrozenBase
from server.model.kv_cache import KVCache, LayerShape
from server.model.sites import DeltaKind, RowDelta, Rows, Segment, SitePlan, Sites

__all__ = [
    "AttentionPlan",
    "BaseShape",
    "DecodeGroup",
    "DeltaKind",
    "FrozenBase",
    "KVCache",
    "LayerShape",
    "PagedAttention",
    "PrefillRow",
    "RowDelta",
    "Rows",
    "Segment",
    "SitePlan",
    "Sites",
]
