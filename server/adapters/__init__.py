"""Adapters: one file per method that reads its checkpoint, and the bank of those that are resident.

checkpoint   a PEFT folder as config and tensors, nothing trusted
method       what a method is, and what it makes of a checkpoint: a prefix, row deltas, or both
methods      the table of methods
<method>     one file each
deltas       the row deltas that methods share
bank         the adapters resident on the device, loaded beside the steps, bounded in bytes
"""

from server.adapters.bank import Bank, Resident
from server.adapters.checkpoint import Checkpoint
from server.adapters.method import Adapter, EmbeddingPrefix, KeyValuePrefix, Prefix
from server.adapters.methods import METHODS, read_adapter

__all__ = [
    "METHODS",
    "Adapter",
    "Bank",
    "Checkpoint",
    "EmbeddingPrefix",
    "KeyValuePrefix",
    "Prefix",
    "Resident",
    "read_adapter",
]
