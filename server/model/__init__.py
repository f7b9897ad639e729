"""The frozen base model: loading, the probe that decides whether it is served right, its attention over KV
pages, and the sites at which adapters change its modules. Knows nothing of adapters' formats, of requests or
of scheduling."""

from server.model.attention import AttentionPlan, DecodeGroup, PrefillRow, VarlenRows
from server.model.base import BaseShape, FrozenBase, TokenEmbedding
from server.model.kv_cache import KVCache, LayerShape
from server.model.norms import NormForm
from server.model.paged_attention import PagedAttention
from server.model.row_deltas import DeltaKind, RowDelta, Rows, RunRows, Segment, SitePlan, TokenRows
from server.model.sites import SiteKind, Sites, SiteShape
from server.model.varlen_attention import VarlenAttention

__all__ = [
    "AttentionPlan",
    "BaseShape",
    "DecodeGroup",
    "DeltaKind",
    "FrozenBase",
    "KVCache",
    "LayerShape",
    "NormForm",
    "PagedAttention",
    "PrefillRow",
    "RowDelta",
    "Rows",
    "RunRows",
    "Segment",
    "SiteKind",
    "SitePlan",
    "SiteShape",
    "Sites",
    "TokenEmbedding",
    "TokenRows",
    "VarlenAttention",
    "VarlenRows",
]
