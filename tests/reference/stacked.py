"""A stack of adapters on plain `transformers` modules, one request at a time: what composition means, slowly.

With M₀ a module of the base and Mₖ what adapter k makes of Mₖ₋₁ (task first, then user):

    an output scale     Mₖ(x) = l ⊙ Mₖ₋₁(x)                     an input scale   Mₖ(x) = Mₖ₋₁(l ⊙ x)
    changed parameters  Mₖ(x) = Mₖ₋₁(x) + M'(x) - M₀(x), where M' is the base's module with adapter k's parameters
    a small network     after (or beside) a sub-block whose output is h with the adapters before it
    a second attention  of the queries that the whole stack's projection gives

Virtual tokens follow one another in the order of the stack; what is no keys and values runs under the whole stack.
A model belongs to one stack: the parameters that a library merges into the base come from the library itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from tests.golden.adapterhub.bottleneck import Bottleneck, fuse, stack
from tests.golden.adapterhub.modules import low_rank, prefix_entries, under
from tests.reference.changes import Place, add_difference, change_input, change_output, merged, rotations, run_block
from tests.reference.second_attention import attend_too

_PREFIX = "base_model.model."
_EMBEDDED = ("PROMPT_TUNING", "P_TUNING", "CPT", "MULTITASK_PROMPT_TUNING")
_CACHED = ("PREFIX_TUNING", "CARTRIDGE")
_PLACES = ("attention_adapters", "output_adapters")
Tensors = dict[str, Tensor]


@dataclass
class _Virtual:
    """Virtual tokens: text, embeddings `[n, hidden]`, or keys and values `[2 · layers, 1, heads, n, d]`."""

    token_ids: list[int] | None = None
    embeddings: Tensor | None = None
    entries: Tensor | None = None
    takes_positions: bool = True


class Stacked:
    """A Llama, or for adapters of PEFT a GPT-2, under the adapters of PEFT, AdapterHub or our own format in folders."""

    def __init__(self, base: PreTrainedModel, folders: list[Path]) -> None:
        """`base` stays as it is."""
        self._base = base
        self._model: Any = deepcopy(base)
        layers = self._model.model.layers if hasattr(self._model, "model") else []
        self._places: list[tuple[list[Place], list[Place]]] = [([], []) for _ in layers]
        for layer, places in zip(layers, self._places, strict=True):
            layer.forward = partial(run_block, layer, *places)
        self._virtual = [virtual for folder in folders if (virtual := self._install(folder)) is not None]

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> Tensor:
        """After each token of a text that follows the virtual tokens: `[tokens, vocabulary]`."""
        cache = DynamicCache(config=self._model.config)
        unnumbered = 0
        for virtual in self._virtual:
            if virtual.token_ids is not None:
                self._run(self._embed(virtual.token_ids), cache, unnumbered)
            elif virtual.embeddings is not None:
                self._run(virtual.embeddings[None], cache, unnumbered)
            elif virtual.entries is not None:
                for layer in range(len(virtual.entries) // 2):
                    cache.update(virtual.entries[2 * layer], virtual.entries[2 * layer + 1], layer)
                unnumbered += 0 if virtual.takes_positions else virtual.entries.shape[3]
        return self._run(self._embed(token_ids), cache, unnumbered)

    def _embed(self, token_ids: list[int]) -> Tensor:
        embedded: Tensor = self._model.get_input_embeddings()(torch.tensor([token_ids]))
        return embedded

    def _run(self, embeddings: Tensor, cache: DynamicCache, unnumbered: int) -> Tensor:
        first = cache.get_seq_length() - unnumbered
        positions = torch.arange(first, first + embeddings.shape[1])[None]
        output = self._model(inputs_embeds=embeddings, position_ids=positions, past_key_values=cache, use_cache=True)
        logits: Tensor = output.logits[0]
        return logits

    def _install(self, folder: Path) -> _Virtual | None:
        config = json.loads((folder / "adapter_config.json").read_text())
        weights = list(folder.glob("adapter*.safetensors"))
        saved = load_file(weights[0]) if weights else {}
        tensors = {key: tensor for key, tensor in saved.items() if ".base_layer." not in key}  # copies of the base's
        if "adapter_names" in config:
            self._install_fusion(config, tensors)
            return None
        if "config" in config:
            outer = config["config"]
            parts = outer["configs"] if outer.get("architecture") == "union" else [outer]
            found = [self._install_hub(config["name"], part, tensors) for part in parts]
            return next((virtual for virtual in found if virtual is not None), None)
        if "medley_method" in config:
            return self._install_own(config, tensors)
        if config["peft_type"] in _EMBEDDED:
            embeddings = tensors["prompt_embeddings"]
            if config["peft_type"] == "MULTITASK_PROMPT_TUNING":
                task = json.loads((folder / "medley.json").read_text())["task_index"]
                embeddings = embeddings * (tensors["prefix_task_cols"][task] @ tensors["prefix_task_rows"][task])
            return _Virtual(embeddings=embeddings)
        if config["peft_type"] in _CACHED:
            return _Virtual(entries=self._entries(tensors["prompt_embeddings"]))
        self._install_peft(config["peft_type"], tensors, folder)
        return None

    def _install_peft(self, kind: str, tensors: Tensors, folder: Path) -> None:
        match kind:
            case "IA3":
                for key, scale in tensors.items():
                    self._scale(key.removeprefix(_PREFIX).removesuffix(".ia3_l"), scale)
            case "ADAPTION_PROMPT":
                for key in [key for key in tensors if key.endswith("adaption_prompt")]:
                    name = key.removeprefix(_PREFIX).removesuffix(".adaption_prompt")
                    attention, base = self._model.get_submodule(name), self._base.get_submodule(name)
                    attend_too(attention, base, tensors[key], tensors[key.replace("_prompt", "_gate")])
            case "BEFT":
                for key, bias in tensors.items():
                    module = self._model.get_submodule(key.removeprefix(_PREFIX).removesuffix(".beft_bias"))
                    change_output(module, lambda x, y, bias=bias: y + bias)  # type: ignore[misc]
            case "HRA" | "ROAD":
                for name, is_input, matrix in rotations(self._base, folder):
                    self._turn(name, matrix.t(), is_input=is_input)
            case _:
                self._change_parameters(merged(self._base, folder))

    def _scale(self, name: str, scale: Tensor) -> None:
        module, values = self._model.get_submodule(name), scale.flatten()
        if scale.shape[0] == 1:
            change_input(module, lambda x: x * values)
        else:
            change_output(module, lambda x, y: y * values)

    def _turn(self, name: str, matrix: Tensor, *, is_input: bool) -> None:
        module = self._model.get_submodule(name)
        if is_input:
            change_input(module, lambda x: x @ matrix)
        else:
            change_output(module, lambda x, y: y @ matrix)

    def _entries(self, flat: Tensor) -> Tensor:
        config = self._model.config
        kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
        shape = (len(flat), 2 * config.num_hidden_layers, kv_heads, -1)
        return flat.view(shape).permute(1, 2, 0, 3)[:, None]

    def _change_parameters(self, changed: nn.Module) -> None:
        """`changed` is the base with other parameters, perhaps some where the base has none."""
        for name, module in self._model.named_modules():
            own = dict(self._base.get_submodule(name).named_parameters(recurse=False))
            new = dict(changed.get_submodule(name).named_parameters(recurse=False))
            if any(part not in own or not torch.equal(own[part], new[part]) for part in new):
                add_difference(module, changed.get_submodule(name), self._base.get_submodule(name))

    def _install_hub(self, name: str, config: dict[str, Any], tensors: Tensors) -> _Virtual | None:
        if config.get("architecture") == "prefix_tuning":
            own = under(tensors, f"model.prefix_tuning.prefix_tunings.{name}.self_prefix.")
            flat = prefix_entries(config, own).view(config["prefix_length"], -1)
            return _Virtual(entries=self._entries(flat), takes_positions=False)
        if config.get("architecture") == "lora":
            self._install_low_rank(name, config, tensors)
            return None
        assert config.get("architecture") is None, "these tests have no other method of this library"
        shared = under(tensors, f"model.shared_parameters.{name}.")
        for number, places in enumerate(self._places):
            for path, found in zip(_PLACES, places, strict=True):
                own = under(tensors, f"model.layers.{number}.{path}.adapters.{name}.")
                if own:
                    found.append(partial(stack, [Bottleneck(config, own, shared)]))
        return None

    def _install_low_rank(self, name: str, config: dict[str, Any], tensors: Tensors) -> None:
        shared = under(tensors, f"model.shared_parameters.{name}.")
        for path in {key.partition(".loras.")[0] for key in tensors if ".loras." in key}:
            module, own = self._model.get_submodule(path), under(tensors, f"{path}.loras.{name}.")
            change = partial(low_rank, config, own, shared, module.weight)
            if config["use_dora"]:
                change = partial(_as_difference, change, self._base.get_submodule(path))
            change_output(module, change)

    def _install_fusion(self, config: dict[str, Any], tensors: Tensors) -> None:
        """Bottlenecks and the attention over them."""
        for number, places in enumerate(self._places):
            for path, found in zip(_PLACES, places, strict=True):
                at = f"model.layers.{number}.{path}"
                members = [
                    Bottleneck(
                        config["adapters"][name],
                        under(tensors, f"{at}.adapters.{name}."),
                        under(tensors, f"model.shared_parameters.{name}."),
                    )
                    for name in config["adapter_names"]
                ]
                weights = under(tensors, f"{at}.adapter_fusion_layer.{config['name']}.")
                if members[0].tensors:
                    found.append(partial(fuse, members, config["config"], weights))

    def _install_own(self, config: dict[str, Any], tensors: Tensors) -> _Virtual | None:
        if config["medley_method"] == "text_prompt":
            return _Virtual(token_ids=config["token_ids"])
        changed: Any = deepcopy(self._base)
        for key, tensor in tensors.items():
            name, _, part = key.removesuffix(".indices").removesuffix(".values").rpartition(".")
            module = changed.get_submodule(name) if ".adapter_bias." not in key else None
            if config["medley_method"] == "top_layers" and module is not None:
                setattr(module, part, nn.Parameter(tensor))
            elif key.endswith(".values") and module is not None:
                module.weight.data.view(-1).index_add_(0, tensors[f"{name}.{part}.indices"], tensor)
            elif config["medley_method"] == "named_deltas" and module is not None:
                own = getattr(module, part)
                setattr(module, part, nn.Parameter(tensor if own is None else own + tensor))
        self._change_parameters(changed)
        for key in [key for key in tensors if key.endswith(".vector")]:
            name = key.removesuffix(".adapter_bias.vector")
            alpha, constant = (tensors[f"{name}.adapter_bias.alpha.{part}"] for part in ("weight", "bias"))
            self._shift(name, tensors[key], alpha, constant)
        return None

    def _shift(self, name: str, vector: Tensor, alpha: Tensor, constant: Tensor) -> None:
        module = self._model.get_submodule(name)
        change_output(module, lambda x, y: y + (x @ alpha.t() + constant) * vector)


def _as_difference(change: Callable[[Tensor, Tensor], Tensor], base: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """What `change` makes of the base's own output, less that output, added to `y`."""
    own: Tensor = base(x)
    return y + change(x, own) - own
