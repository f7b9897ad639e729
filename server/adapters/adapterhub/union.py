"""AdapterHub's unions: several methods in one file, such as MAM adapters and UniPELT without its gates.

He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", ICLR 2022 (MAM: a prefix and a parallel
bottleneck); Mao et al., "UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning", ACL 2022 (LoRA, a
prefix and a bottleneck; its gates are refused, see `bottleneck`). The config's `configs` are those of `bottleneck`,
`adapterhub_low_rank` and `adapterhub_prefix`; the tensors of all stand in one file under the adapter's one name. The
parts act side by side, each at its own place: the library makes no union with two at one.
"""

from __future__ import annotations

from server.adapters.adapterhub.bottleneck import take_places
from server.adapters.adapterhub.low_rank import take_deltas
from server.adapters.adapterhub.part import HubPart
from server.adapters.adapterhub.prefix import take_prefix
from server.adapters.method import Adapter, KeyValuePrefix, MethodFacts
from server.errors import AdapterError
from server.model import BaseShape, RowDelta

NAME = "union"
FACTS = MethodFacts(
    name=NAME,
    mechanism="prefix pages and row deltas, as its parts have them",
    formats=("AdapterHub ConfigUnion (mam, …)",),
    parameters="those of its parts",
    cost="that of its parts",
)


def read(part: HubPart, base: BaseShape) -> Adapter:
    """See the module."""
    checkpoint = part.checkpoint
    configs = checkpoint.config.get("configs")
    if not isinstance(configs, list) or not configs or not all(isinstance(config, dict) for config in configs):
        raise AdapterError("bad_config", "configs must be a list of the parts' configs", "configs")
    prefix: KeyValuePrefix | None = None
    deltas: dict[str, RowDelta] = {}
    rank: int | None = None
    repeated = 0
    for config in configs:
        own = HubPart(checkpoint.part(config), part.name, part.version)
        match config.get("architecture"):
            case None:
                deltas |= take_places(own, base)
            case "lora":
                found, own_rank = take_deltas(own, base)
                deltas |= found
                rank = max(rank or 0, own_rank or 0) or None
            case "prefix_tuning":
                prefix, repeated = take_prefix(own, base)
            case other:
                message = f"a part's architecture is {other!r}; parts may be bottlenecks, lora and prefix_tuning"
                raise AdapterError("unsupported_method", message, "architecture")
    checkpoint.close()
    return Adapter(
        method=NAME,
        prefix=prefix,
        deltas=deltas,
        parameters=checkpoint.parameters - repeated,
        rank=rank,
        warnings=tuple(checkpoint.warnings),
    )
