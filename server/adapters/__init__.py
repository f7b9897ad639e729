"""Adapters: what is read from their files, and the bank of those that are resident.

checkpoint   a folder as config and tensors, nothing trusted
method       what a method is, and what it makes of a checkpoint: a prefix, row deltas, or both
methods/     one file per method, and their table
adapterhub/  the methods of AdapterHub's formats
deltas       the row deltas that methods share
pool         the device memory of all adapters, as rows that are picked out by index
resident     an adapter in the pool: its layout and its place
loads        adapters on their way from the blob store, and those that failed and rest
tickets      who waits for which adapters, and in whose turn
bank         the adapters resident on the device, loaded beside the steps, bounded in bytes
stacks       which adapters can be laid over one another
"""

from server.adapters.bank import Bank
from server.adapters.checkpoint import Checkpoint
from server.adapters.method import Adapter, EmbeddingPrefix, KeyValuePrefix, MethodFacts, Prefix, TokenPrefix
from server.adapters.methods.table import METHODS, read_adapter
from server.adapters.pool import RowPool
from server.adapters.resident import Resident
from server.adapters.stacks import why_no_stack

__all__ = [
    "METHODS",
    "Adapter",
    "Bank",
    "Checkpoint",
    "EmbeddingPrefix",
    "KeyValuePrefix",
    "MethodFacts",
    "Prefix",
    "Resident",
    "RowPool",
    "TokenPrefix",
    "read_adapter",
    "why_no_stack",
]
