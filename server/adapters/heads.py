"""Classification heads: labels, or a number, from the state of a text's last token.

A head is linear layers with an activation between them. It acts on the input of the base's output layer at the last
token (for Llama the state after the final norm), as `…ForSequenceClassification` of `transformers` and the heads of
AdapterHub's library do. Its layers are rows of the pool like all that an adapter keeps resident.

Checkpoints:
    PEFT        `task_type` SEQ_CLS: one linear layer, `score` or `classifier` of `modules_to_save`. One label is a
                regression; else one label of several is right, for the config has no word for several.
    AdapterHub  `head_config.json` and `model_head.safetensors`: `heads.NAME.{i}.weight` and `.bias` in the order of i,
                or `score.weight`. `head_type` is classification or multilabel_classification.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from server.adapters.adapterhub.bottleneck_kind import ACTIVATIONS
from server.adapters.checkpoint import HEAD_CONFIG_FILE, HEAD_WEIGHTS_FILE, Checkpoint
from server.errors import AdapterError
from server.model import BaseShape

HeadKind = Literal["single", "multiple", "regression"]

_PEFT_TASK = "SEQ_CLS"
_PEFT_TEXT = (None, "CAUSAL_LM", "SEQ_2_SEQ_LM")  # of the last one what fits a decoder at all
_PEFT_PREFIXES = ("base_model.model.", "base_model.")  # of layer methods; of prompts, which wrap the base only once
_PEFT_MODULES = ("score", "classifier")
_HUB_KINDS: dict[Any, HeadKind] = {"classification": "single", "multilabel_classification": "multiple"}
_HUB_CLASS = "ForSequenceClassification"


@dataclass(frozen=True)
class HeadShape:
    """A head without its values."""

    kind: HeadKind  # one label is right, any number of them are, or the one output is a number
    labels: tuple[str, ...]
    activation: str | None  # between the layers; one of `ACTIVATIONS`

    def logits(self, state: Tensor, *blocks: Tensor) -> Tensor:
        """`state` `[hidden]` → `[labels]`, float32; `blocks`: each layer's weight `[out, in]` and bias `[out, 1]`."""
        values = state.float()
        for index in range(0, len(blocks), 2):
            if index and self.activation is not None:
                values = ACTIVATIONS[self.activation](values)
            values = torch.addmv(blocks[index + 1].float().flatten(), blocks[index].float(), values)
        return values


@dataclass(frozen=True, eq=False)
class ClassificationHead:
    """A head, read, checked and in the base's dtype."""

    shape: HeadShape
    blocks: tuple[Tensor, ...]  # as `HeadShape.logits` takes them


def take_peft_head(checkpoint: Checkpoint, base: BaseShape) -> tuple[ClassificationHead | None, Checkpoint]:
    """The head of a PEFT checkpoint for sequence classification, and what is left for its method to read.

    Raises `AdapterError`: `base_mismatch` where there should be a head and is none that fits, `unsupported_method` for
    a task of another kind (labels of tokens, say), whose head is not served.
    """
    task = checkpoint.config.get("task_type")
    if task in _PEFT_TEXT:
        return None, checkpoint
    if task != _PEFT_TASK:
        message = f"task_type is {task!r}, whose answers are not served here; those of CAUSAL_LM and {_PEFT_TASK} are"
        raise AdapterError("unsupported_method", message, "task_type")
    names = [f"{prefix}{module}" for prefix in _PEFT_PREFIXES for module in _PEFT_MODULES]
    name = next((name for name in names if f"{name}.weight" in checkpoint.names), names[0])
    layer = _take_layer(checkpoint, name, None, _state_width(base))
    labels = _label_names(None, len(layer[0]))
    head = ClassificationHead(HeadShape("single" if len(labels) > 1 else "regression", labels, None), layer)
    config = dict(checkpoint.config)
    saved = config.get("modules_to_save")
    if isinstance(saved, list) and all(module in _PEFT_MODULES for module in saved):
        del config["modules_to_save"]  # else the method refuses the others
    return head, checkpoint.part(config)


def read_hub_head(checkpoint: Checkpoint, name: str, base: BaseShape) -> ClassificationHead | None:
    """The head that lies beside the adapter `name` of AdapterHub's format; None for none, or one of another type."""
    described, tensors = checkpoint.head_config, checkpoint.head
    if described is None or tensors is None:
        return None
    given = described.get("config")
    if given is None and str(described.get("model_class")).endswith(_HUB_CLASS):
        config, kind, modules = described, _HUB_KINDS["classification"], ["score"]
    elif isinstance(given, dict) and isinstance(given.get("head_type"), str) and given["head_type"] in _HUB_KINDS:
        config, kind, modules = given, _HUB_KINDS[given["head_type"]], _hub_modules(tensors, name)
    else:
        return None
    stored = Checkpoint({}, tensors, base.dtype)
    width = _state_width(base)
    layers = [_take_layer(stored, module, width, width) for module in modules[:-1]]
    layers.append(_take_layer(stored, modules[-1], None, width))
    stored.close()
    labels = _label_names(config.get("label2id"), len(layers[-1][0]))
    if len(labels) == 1 and kind == "single":
        kind = "regression"
    blocks = tuple(block for layer in layers for block in layer)
    return ClassificationHead(HeadShape(kind, labels, _activation(config)), blocks)


def _hub_modules(tensors: dict[str, Tensor], name: str) -> list[str]:
    """Names of the head's linear layers, in order."""
    prefix = f"heads.{name}."
    numbers = {key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)}
    if not numbers or not all(number.isdecimal() for number in numbers):
        message = f"{HEAD_WEIGHTS_FILE} has no layers of the head '{name}'"
        raise AdapterError("base_mismatch", message, HEAD_WEIGHTS_FILE)
    return [f"{prefix}{number}" for number in sorted(numbers, key=int)]


def _activation(config: dict[str, Any]) -> str | None:
    value = config.get("activation_function")
    if value is None:
        return None
    if not isinstance(value, str) or value.lower() not in ACTIVATIONS:
        message = f"activation_function {value!r} is not served here; {', '.join(ACTIVATIONS)} are"
        raise AdapterError("unsupported_method", message, "activation_function")
    return value.lower()


def _label_names(label2id: Any, count: int) -> tuple[str, ...]:
    """The checkpoint's names in the order of their numbers, else LABEL_0, …."""
    if label2id is None:
        return tuple(f"LABEL_{index}" for index in range(count))
    ids = list(label2id.values()) if isinstance(label2id, dict) else []
    if not all(type(number) is int for number in ids) or sorted(ids) != list(range(count)):
        message = f"label2id in {HEAD_CONFIG_FILE} must give each of the {count} labels its number, from 0 on"
        raise AdapterError("bad_config", message, "label2id")
    return tuple(sorted(label2id, key=label2id.__getitem__))


def _take_layer(checkpoint: Checkpoint, name: str, outputs: int | None, inputs: int) -> tuple[Tensor, Tensor]:
    """A linear layer's weight `[outputs, inputs]` and bias `[outputs, 1]`, zero where there is none."""
    weight = checkpoint.take(f"{name}.weight", (outputs, inputs))
    if not len(weight):
        raise AdapterError("base_mismatch", f"tensor {name}.weight has no rows, so there are no labels", name)
    if f"{name}.bias" in checkpoint.names:
        bias = checkpoint.take(f"{name}.bias", (len(weight),))
    else:
        bias = weight.new_zeros(len(weight))
    return weight, bias[:, None]


def _state_width(base: BaseShape) -> int:
    """Of the base's output layer's input."""
    for site in base.sites.values():
        if site.is_head:
            return site.inputs
    raise AdapterError("unsupported_method", "this base has no output layer whose input a head could take")
