"""The frozen base: one `transformers` causal language model, loaded once, never written to.

A forward pass takes one packed step: embeddings `[num_tokens, hidden]` with explicit positions, an
`Attention` over the KV cache, and the row deltas at the sites. Nothing is copied per task.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from server.errors import StartupError
from server.model.attention import IMPLEMENTATION, Attention
from server.model.blocks import TRACED_TOKENS, Block, trace
from server.model.fused import fuse
from server.model.heap import keep_freed_memory
from server.model.kernels import find_kernels
from server.model.kv_cache import LayerShape
from server.model.norms import NormForm, find_norms
from server.model.probe import probe
from server.model.products import dense_weight
from server.model.row_deltas import SitePlan, change_outputs
from server.model.sites import SiteKind, Sites, SiteShape
from server.model.threads import check_threads

if TYPE_CHECKING:
    from server.model.model_program import ModelProgram
    from server.model.programs import Programs

logger = logging.getLogger("medley.model")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


def _no_embedding(token_ids: Tensor) -> Tensor:
    raise AssertionError("this shape was made without the base's embedding")


@dataclass(frozen=True)
class TokenEmbedding:
    """The input embedding as a site."""

    site: str
    scale: float  # by which its class multiplies the weight's rows
    tied_head: str | None  # the output layer, where its weight is the embedding's


@dataclass(frozen=True)
class BaseShape:
    """What an adapter must fit: widths and names; and, for methods whose adapters are relative to them, the weights."""

    sites: dict[str, SiteShape]
    layers: tuple[LayerShape, ...]
    embedding_width: int
    dtype: torch.dtype
    weight: Callable[[str], Tensor]  # of a site, [out, in]; never to be written to
    bias: Callable[[str], Tensor | None]  # of a site, [out]
    blocks: tuple[Block, ...] = ()  # the layers' sub-blocks, in order; none where the base has no places like these
    vocab_size: int = 0  # rows of the input embedding
    embed: Callable[[Tensor], Tensor] = _no_embedding  # [n] ids below that → [n, embedding_width], as the base embeds
    token_embedding: TokenEmbedding | None = None

    @property
    def widest(self) -> int:
        """The largest of all widths."""
        widths = [width for site in self.sites.values() for width in (site.inputs, site.outputs)]
        widths += [layer.kv_heads * layer.head_dim for layer in self.layers]
        return max(self.embedding_width, *widths)


class FrozenBase:
    """A probed model with its sites."""

    def __init__(self, model: PreTrainedModel, max_model_len: int | None = None) -> None:
        """Freeze, probe and wrap `model`. Raises `StartupError` where it cannot be served right."""
        if model.device.type == "cpu":
            check_threads()
            keep_freed_memory()
        self.model = model.eval().requires_grad_(False)
        self.config = model.config
        self.parameters: int = sum(parameter.numel() for parameter in model.parameters())  # tied ones once
        self.max_model_len = _max_model_len(model.config, max_model_len)
        self.layers = tuple(probe(model, self.max_model_len))
        model.set_attn_implementation(IMPLEMENTATION)
        self.embedding: nn.Module = model.get_input_embeddings()
        self.token_embedding = self._token_embedding()  # before weights are packed
        self.kernels, self.kernels_note = find_kernels(self.device, self.dtype)  # None, and why
        self._program: ModelProgram | None = None
        programs = self.kernels and self.kernels.programs
        self.sites = Sites(model, model.get_output_embeddings(), programs)
        norms = dict(find_norms(model))
        fuse(model, self.sites, self.kernels and self.kernels.layers, programs)
        self.blocks = self._add_traced_sites(norms)
        self.layer_programs: list[str] = []
        if programs is not None:
            self._run_as_programs(programs)
        self.sites.shapes[self.token_embedding.site] = SiteShape(
            1, self._embedding_weight.shape[1], is_head=False, kind=SiteKind.EMBEDDING
        )

    def _token_embedding(self) -> TokenEmbedding:
        names = {module: name for name, module in self.model.named_modules()}
        head = self.model.get_output_embeddings()
        is_tied = head is not None and head.weight is self._embedding_weight
        scale = torch.as_tensor(getattr(self.embedding, "embed_scale", 1.0)).to(self.dtype)
        return TokenEmbedding(names[self.embedding], float(scale), names[head] if is_tied else None)

    def _add_traced_sites(self, norms: dict[str, NormForm]) -> tuple[Block, ...]:
        """Find out by one forward pass where norms, attentions and sub-blocks can be sites."""
        ids = torch.arange(TRACED_TOKENS, device=self.device) % self.vocab_size

        def run(attention: Attention) -> None:
            self.forward(self.embed(ids), torch.arange(TRACED_TOKENS, device=self.device), attention, {}, ids[:1])

        width = self._embedding_weight.shape[1]
        outputs = [name for name, site in self.sites.shapes.items() if site.outputs == width]
        traced = trace(self.model, norms, outputs, run)
        self.sites.add_norms(self.model, {name: norms[name] for name in traced.usable_norms()})
        for layer, width in traced.query_widths.items():
            named = [name for name, module in self.model.named_modules() if getattr(module, "layer_idx", None) == layer]
            self.sites.add_attention(layer, max(named, key=lambda name: name.count(".")), width)
        blocks = tuple(traced.blocks())
        self.sites.add_blocks(self.model, blocks)
        return blocks

    def _run_as_programs(self, programs: Programs) -> None:
        """What can be, once all sites are known."""
        from server.model.layer_forms import run_as_programs  # noqa: PLC0415 - these import compiled kernels
        from server.model.model_program import find_model_program  # noqa: PLC0415
        from server.model.programs import TRIED_TOKENS  # noqa: PLC0415

        tokens = torch.arange(TRIED_TOKENS)
        embeddings = self.embed(tokens % self.vocab_size)

        def forward(embeddings: Tensor, positions: Tensor, attention: Attention) -> Tensor:
            return self.forward(embeddings, positions, attention, {}, tokens)

        run = partial(forward, embeddings)
        stack = run_as_programs(self.model, self.sites, programs, self.layers, run, self.max_model_len)
        if stack is not None:
            self.layer_programs = stack.names
            head = self.model.get_output_embeddings()
            self._program = find_model_program(
                self.model, head, self.sites, stack, self.layers, embeddings, forward, self.max_model_len
            )
        whole = "" if self._program is None else ", and all of a step whose rows decode as one"
        logger.info("%d of %d layers run as programs%s", len(self.layer_programs), len(self.layers), whole)

    @classmethod
    def load(cls, folder: Path, *, device: str, dtype: str, max_model_len: int | None) -> FrozenBase:
        """Load from a folder in Hugging Face form, safetensors only. `device` and `dtype` may be `auto`."""
        target = pick_device(device)
        wanted = "float32" if dtype == "auto" and target.type == "cpu" else dtype
        try:
            config = AutoConfig.from_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=DTYPES.get(wanted, wanted),
                attn_implementation="eager",
                use_safetensors=True,
            )
        except (OSError, ValueError, KeyError) as error:
            raise StartupError(f"the model in {folder} cannot be loaded: {error}") from error
        return cls(model.to(target), max_model_len)

    @property
    def _embedding_weight(self) -> Tensor:
        weight: Tensor = self.embedding.weight  # type: ignore[assignment]  # a module's attributes are untyped
        return weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._embedding_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the embeddings, and so of the hidden states and the KV cache."""
        return self._embedding_weight.dtype

    @property
    def shape(self) -> BaseShape:
        """What an adapter must fit."""
        width = self._embedding_weight.shape[1]
        return BaseShape(
            self.sites.shapes,
            self.layers,
            width,
            self.dtype,
            self._site_weight,
            self._site_bias,
            self.blocks,
            self.vocab_size,
            self._embed_apart,
            self.token_embedding,
        )

    def _embed_apart(self, token_ids: Tensor) -> Tensor:
        return self.embed(token_ids.to(self.device)).cpu()

    def _site_weight(self, name: str) -> Tensor:
        return dense_weight(self.model.get_submodule(name))

    def _site_bias(self, name: str) -> Tensor | None:
        bias: Tensor | None = getattr(self.model.get_submodule(name), "bias", None)  # some norms have no such attribute
        return None if bias is None else bias.detach()

    @property
    def vocab_size(self) -> int:
        """Rows of the input embedding: ids below it may be asked for."""
        return self._embedding_weight.shape[0]

    @property
    def eos_token_ids(self) -> list[int]:
        """From the generation config, else the model's config; without ids that the base does not have."""
        generation = getattr(self.model, "generation_config", None)
        ids = getattr(generation, "eos_token_id", None)
        if ids is None:
            ids = getattr(self.config, "eos_token_id", None)
        if ids is None:
            return []
        return [token for token in ([ids] if isinstance(ids, int) else ids) if 0 <= token < self.vocab_size]

    @torch.inference_mode()
    def embed(self, token_ids: Tensor, deltas: SitePlan | None = None) -> Tensor:
        """`[num_tokens]` → `[num_tokens, hidden]`, through the model's own embedding and the deltas at it."""
        embedded: Tensor = self.embedding(token_ids[None])[0]
        if deltas and (levels := deltas.get(self.token_embedding.site)):
            change_outputs(embedded, ((segments, token_ids[:, None]) for segments in levels))
        return embedded

    @torch.inference_mode()
    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor,
        attention: Attention,
        deltas: SitePlan,
        logit_tokens: Tensor,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """Run a packed step.

        `embeddings` `[num_tokens, hidden]`, `positions` `[num_tokens]`; `logit_tokens` `[n]` are the indices, in
        ascending order, of the tokens whose logits are wanted. Returns float32 `[n, vocabulary]`, with the class's
        caps and scales. What its head is given, `[n, hidden]`, is added to `states` if there are any.
        """
        if self._program is not None and states is None and len(logit_tokens) == len(positions):
            given = self._program.forward(embeddings, positions, attention, deltas)
            if given is not None:
                return given
        with self.sites.applying(deltas), self._keeping_states(states):
            output = self.model(
                inputs_embeds=embeddings[None],
                position_ids=positions[None],
                use_cache=False,
                logits_to_keep=0 if len(logit_tokens) == len(positions) else logit_tokens,  # 0: all, without a copy
                medley_attention=self.sites.attending(attention),
            )
        logits: Tensor = output.logits[0]
        return logits.float()

    @contextmanager
    def _keeping_states(self, states: list[Tensor] | None) -> Iterator[None]:
        """Add the head's inputs to `states` inside the block."""
        if states is None:
            yield
            return

        def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            states.append(inputs[0].flatten(0, -2))

        handle = self.model.get_output_embeddings().register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise StartupError("--device cuda: torch finds no CUDA device; use --device cpu or install a CUDA build")
    return torch.device(name)


def _max_model_len(config: Any, wanted: int | None) -> int:
    """The longest sequence, virtual tokens included, that the model is known to be right for."""
    own: int | None = getattr(config, "max_position_embeddings", None)
    if own is None and wanted is None:
        raise StartupError("the model's config names no longest sequence; set --max-model-len")
    if own is not None and wanted is not None and wanted > own:
        raise StartupError(f"--max-model-len {wanted} is more than the model's own {own}")
    length = wanted or own
    assert length is not None
    limit = _length_dependent_rope_limit(config)
    if limit is not None and length > limit:
        raise StartupError(
            f"this model's rotary embedding changes with the longest position of a batch beyond {limit}, which "
            f"would let requests change each other's answers; set --max-model-len {limit} or less"
        )
    return length


def _length_dependent_rope_limit(config: Any) -> int | None:
    """Positions up to which a dynamic or longrope embedding is the same whatever the batch holds."""
    parameters = getattr(config, "rope_parameters", None) or {}
    per_layer_type = [value for value in parameters.values() if isinstance(value, dict)]
    for rope in per_layer_type or [parameters]:
        if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            original = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            return int(original or config.max_position_embeddings)
    return None
