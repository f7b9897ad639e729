"""LoHa: an update that is the product, element by element, of two low-rank matrices.

Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", ICLR 2022; as
LoHa: Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", ICLR 2024.
Checkpoint (PEFT `LOHA`): per targeted module `hada_w1_a`, `hada_w2_a` `[out, rank]` and `hada_w1_b`, `hada_w2_b`
`[rank, in]`: y = Wx + b + s ((w1_a w1_b) ⊙ (w2_a w2_b)) x with s = alpha / rank.

It is served exactly, as a low-rank update of rank²: its factors are the products, element by element, of each column
of w1_a with each of w2_a, and of each row of w1_b with each of w2_b. Where rank² is more than the smaller width, the
update itself is one factor and the identity the other. Either way it takes more memory than its checkpoint.
"""

from __future__ import annotations

import torch
from torch import Tensor

from server.adapters.checkpoint import Checkpoint
from server.adapters.deltas import low_rank
from server.adapters.method import Adapter, MethodFacts
from server.adapters.methods.ranks import RANK_KEYS, module_alpha, module_rank
from server.adapters.targets import KEY_PREFIX, targeted_sites
from server.model import BaseShape

NAME = "loha"
PEFT_TYPE = "LOHA"
FACTS = MethodFacts(
    name=NAME,
    mechanism="row delta: low rank",
    formats=("PEFT LOHA",),
    parameters="2r·(in + out) for each targeted module",
    cost="that of a LoRA of rank r², at most the smaller width",
)

_USED = (*RANK_KEYS, "alpha", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
_TRAINING_ONLY = ("rank_dropout", "module_dropout", "init_weights", "use_effective_conv2d")


def read(checkpoint: Checkpoint, base: BaseShape) -> Adapter:
    """See `Method`."""
    checkpoint.check_keys(used=_USED, training_only=_TRAINING_ONLY, unsupported=("modules_to_save",))
    factors = {name: _factors(checkpoint, base, name) for name in targeted_sites(checkpoint, base)}
    checkpoint.close()
    return Adapter(
        method=NAME,
        deltas={name: low_rank(down, up) for name, (down, up) in factors.items()},
        parameters=checkpoint.parameters,
        rank=max(len(down) for down, _ in factors.values()),
        warnings=tuple(checkpoint.warnings),
    )


def _factors(checkpoint: Checkpoint, base: BaseShape, name: str) -> tuple[Tensor, Tensor]:
    """A `[rank, in]` and Bᵀ `[rank, out]` of the update B A."""
    site, key = base.sites[name], f"{KEY_PREFIX}{name}.hada"
    rank = module_rank(checkpoint, name)
    smaller = min(site.inputs, site.outputs)
    checkpoint.expand(f"{key}_w1_a", min(rank**2, smaller) * (site.inputs + site.outputs))
    up_1 = checkpoint.take(f"{key}_w1_a", (site.outputs, rank)).t() * (module_alpha(checkpoint, name, "alpha") / rank)
    up_2 = checkpoint.take(f"{key}_w2_a", (site.outputs, rank)).t()
    down_1 = checkpoint.take(f"{key}_w1_b", (rank, site.inputs))
    down_2 = checkpoint.take(f"{key}_w2_b", (rank, site.inputs))
    if rank**2 <= smaller:
        down, up = _row_products(down_1, down_2), _row_products(up_1, up_2)
    else:
        whole = (up_1.t().float() @ down_1.float()) * (up_2.t().float() @ down_2.float())  # [out, in]
        identity = torch.eye(smaller, dtype=base.dtype)
        down, up = (whole, identity) if smaller == site.outputs else (identity, whole.t())
        down, up = down.to(base.dtype), up.to(base.dtype)
    return checkpoint.finite(f"{key}_w1_b", down), checkpoint.finite(f"{key}_w1_a", up)


def _row_products(first: Tensor, second: Tensor) -> Tensor:
    """Each row of one times each of the other, element by element: `[rows, width]` twice → `[rows², width]`."""
    return (first[:, None] * second[None]).flatten(0, 1)
