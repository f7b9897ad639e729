"""The configurations whose files and answers are stored: one entry per piece of mathematics.

Imported by `make.py` only, in the environment that README.md describes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adapters import (  # type: ignore[import-not-found]
    AdapterPlusConfig,
    CompacterConfig,
    CompacterPlusPlusConfig,
    ConfigUnion,
    DoRAConfig,
    DoubleSeqBnConfig,
    IA3Config,
    LoRAConfig,
    NoReftConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
    SeqBnInvConfig,
    VeraConfig,
)

# One adapter each, on the causal language model.
SINGLE: dict[str, Any] = {
    # Bottleneck: place, width, non-linearity, scaling, gate.
    "seq_bn": SeqBnConfig(),
    "seq_bn_rf4": SeqBnConfig(reduction_factor=4),
    "seq_bn_rf_map": SeqBnConfig(reduction_factor={"0": 2, "2": 16, "default": 8}),
    "seq_bn_wider": SeqBnConfig(reduction_factor=0.5, non_linearity="leakyrelu"),
    "seq_bn_gelu": SeqBnConfig(reduction_factor=4, non_linearity="gelu"),
    "seq_bn_channel": SeqBnConfig(reduction_factor=4, scaling="channel"),
    "seq_bn_gating": SeqBnConfig(reduction_factor=4, use_gating=True),
    "double_seq_bn": DoubleSeqBnConfig(),
    "double_seq_bn_leave_out": DoubleSeqBnConfig(reduction_factor=4, leave_out=[0, 2]),
    "mh_only": DoubleSeqBnConfig(reduction_factor=4, output_adapter=False, non_linearity="tanh"),
    "par_bn": ParBnConfig(),
    "par_bn_learned": ParBnConfig(reduction_factor=4, scaling="learned", mh_adapter=True),
    "par_bn_gating": ParBnConfig(reduction_factor=4, scaling=2.0, use_gating=True),
    # Bottleneck: residuals and layer norms.
    "adapter_plus": AdapterPlusConfig(reduction_factor=4, stochastic_depth=0.0),
    "residual_after_add": SeqBnConfig(reduction_factor=4, residual_before_ln=False),
    "no_original": DoubleSeqBnConfig(reduction_factor=4, original_ln_before=False, original_ln_after=False),
    "before_without_after": SeqBnConfig(reduction_factor=4, original_ln_after=False),
    "ln_before": SeqBnConfig(reduction_factor=4, ln_before=True),
    "ln_after": DoubleSeqBnConfig(reduction_factor=4, ln_after=True),
    "ln_after_residual": DoubleSeqBnConfig(reduction_factor=4, ln_after=True, adapter_residual_before_ln=True),
    "par_bn_ln": ParBnConfig(reduction_factor=4, scaling=1.0, ln_before=True, ln_after=True),
    "par_bn_no_original": ParBnConfig(reduction_factor=4, scaling=1.0, original_ln_after=False),
    "seq_bn_inv": SeqBnInvConfig(reduction_factor=4),
    # Compacter.
    "compacter": CompacterConfig(reduction_factor=4),
    "compacter_plus_plus": CompacterPlusPlusConfig(reduction_factor=8),
    "compacter_own_rules": CompacterPlusPlusConfig(
        reduction_factor=4, shared_phm_rule=False, factorized_phm_rule=True, phm_rank=2, phm_bias=False
    ),
    "compacter_factorized_rule": CompacterPlusPlusConfig(reduction_factor=4, factorized_phm_rule=True),
    "compacter_full_W": CompacterPlusPlusConfig(reduction_factor=4, factorized_phm_W=False, phm_dim=2),
    "compacter_shared_W": CompacterPlusPlusConfig(reduction_factor=4, shared_W_phm=True),
    # Low rank and scaling.
    "lora": LoRAConfig(r=4, alpha=6),
    "lora_everywhere": LoRAConfig(
        r=2, alpha=5, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True, leave_out=[1]
    ),
    "lora_gating": LoRAConfig(r=4, alpha=6, use_gating=True),
    "dora": DoRAConfig(r=4, alpha=6),
    "vera": VeraConfig(r=4, alpha=6, attn_matrices=["q"]),
    "ia3": IA3Config(),
    "ia3_everywhere": IA3Config(alpha=2, attn_matrices=["q", "k", "v"], output_lora=True, leave_out=[2]),
    # Prefixes.
    "prefix": PrefixTuningConfig(prefix_length=5, bottleneck_size=12),
    "prefix_relu_leave_out": PrefixTuningConfig(
        prefix_length=3, bottleneck_size=12, non_linearity="relu", leave_out=[0]
    ),
    "prefix_flat": PrefixTuningConfig(prefix_length=4, flat=True),
    "prefix_gating": PrefixTuningConfig(prefix_length=4, flat=True, use_gating=True, shared_gating=False),
    # Several at once, in one file.
    "mam": ConfigUnion(
        PrefixTuningConfig(prefix_length=3, bottleneck_size=12), ParBnConfig(reduction_factor=4, scaling=1.5)
    ),
    "unipelt": ConfigUnion(
        LoRAConfig(r=4, use_gating=True),
        PrefixTuningConfig(prefix_length=3, flat=True, use_gating=True),
        SeqBnConfig(reduction_factor=8, use_gating=True),
    ),
    "union_ungated": ConfigUnion(
        LoRAConfig(r=4, alpha=6), PrefixTuningConfig(prefix_length=3, flat=True), SeqBnConfig(reduction_factor=8)
    ),
    "union_places": ConfigUnion(
        LoRAConfig(r=2, alpha=3, attn_matrices=["k"], intermediate_lora=True),
        ParBnConfig(reduction_factor=4, scaling="learned"),
        DoubleSeqBnConfig(reduction_factor=8, output_adapter=False),
    ),
    "noreft": NoReftConfig(r=2, prefix_positions=3),
}


@dataclass(frozen=True)
class Composition:
    """Two adapters together: `kind` is "stack" or "fuse", `fusion` the name or changes of the fusion's config."""

    kind: str
    adapters: tuple[Any, Any]
    fusion: Any = None


COMPOSED: dict[str, Composition] = {
    "stack": Composition("stack", (SeqBnConfig(reduction_factor=4), DoubleSeqBnConfig(reduction_factor=8))),
    "stack_parallel": Composition("stack", (ParBnConfig(scaling=1.0), ParBnConfig(reduction_factor=4, scaling=2.0))),
    "fusion": Composition("fuse", (SeqBnConfig(reduction_factor=4), SeqBnConfig(reduction_factor=8)), {}),
    "fusion_double": Composition(
        "fuse", (DoubleSeqBnConfig(reduction_factor=4), DoubleSeqBnConfig(reduction_factor=4)), {}
    ),
    "fusion_static": Composition(
        "fuse",
        (SeqBnConfig(reduction_factor=4, scaling="learned"), SeqBnConfig(reduction_factor=4, use_gating=True)),
        {"value": False, "regularization": False, "query_before_ln": True},
    ),
    "fusion_late_value": Composition(
        "fuse",
        (SeqBnConfig(reduction_factor=4), SeqBnConfig(reduction_factor=4)),
        {"value_before_softmax": False, "residual_before": True},
    ),
    "fusion_parallel": Composition(
        "fuse", (ParBnConfig(reduction_factor=4, scaling=1.0), ParBnConfig(reduction_factor=8, scaling=1.0)), {}
    ),
    "fusion_mixed": Composition(
        "fuse",
        (
            DoubleSeqBnConfig(reduction_factor=4, ln_before=True, ln_after=True, non_linearity="gelu"),
            CompacterConfig(reduction_factor=4, residual_before_ln=False, original_ln_before=True),
        ),
        {"key": False, "residual_before": True},
    ),
    "fusion_no_original": Composition(
        "fuse",
        (
            SeqBnConfig(reduction_factor=2),
            SeqBnConfig(reduction_factor=8, original_ln_after=False, residual_before_ln=False),
        ),
        {"query": False, "query_before_ln": True, "residual_before": True, "value": False},
    ),
}

# Heads of LlamaAdapterModel beside a seq_bn adapter: the method that adds them and its arguments.
HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "head_classification": (
        "add_classification_head",
        {"num_labels": 3, "id2label": {0: "negative", 1: "neutral", 2: "positive"}},
    ),
    "head_one_layer": (
        "add_classification_head",
        {"num_labels": 2, "layers": 1, "activation_function": None},
    ),
    "head_regression": ("add_classification_head", {"num_labels": 1, "layers": 3, "activation_function": "relu"}),
    "head_multilabel": ("add_classification_head", {"num_labels": 4, "multilabel": True}),
    "head_causal_lm": ("add_causal_lm_head", {"layers": 2, "activation_function": "gelu"}),
}
