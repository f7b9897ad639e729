"""Sites: the modules of the base at which adapters act, each wrapped once at load.

A site's module keeps its weights, its class and its place in the model; only its `forward` is led through
the site, which applies the step's row deltas around it. Without deltas the base's own forward runs. A site is a linear
module, a norm, an attention, an attention's result, a sub-block of a layer, or the input embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from server.model import products
from server.model.attention import Attention, AttentionOptions
from server.model.blocks import Block
from server.model.norms import NormForm
from server.model.row_deltas import SitePlan, apply_levels, change_outputs

if TYPE_CHECKING:
    from server.model.programs import Programs


class SiteKind(Enum):
    """What a site is."""

    LINEAR = "linear"
    NORM = "norm"
    ATTENTION = "attention"
    RESULT = "result"  # of an attention, behind its output projection: its input is the step's queries
    BLOCK = "block"
    EMBEDDING = "embedding"  # the input embedding: its input is a token id


@dataclass(frozen=True)
class SiteShape:
    """A site's widths, and whether it is the output head, whose rows are the positions that need logits."""

    inputs: int
    outputs: int
    is_head: bool
    kind: SiteKind = SiteKind.LINEAR
    norm: NormForm | None = None  # of a norm
    is_transposed: bool = False  # whether a linear module stores its weight as [in, out]


class Sites:
    """All sites of one model, by their module's name in it."""

    def __init__(self, model: nn.Module, head: nn.Module | None, programs: Programs | None = None) -> None:
        """Wrap every linear module (`nn.Linear`, or `Conv1D` with its transposed weight), its weight packed where that
        is possible; with `programs` their products are such."""
        self.shapes: dict[str, SiteShape] = {}
        self._plan: SitePlan = {}
        self._packed: set[nn.Module] = set()
        self._own_inputs: set[str] = set()
        self._attention_sites: dict[int, str] = {}
        self._result_sites: dict[int, str] = {}
        self._seen: dict[str, Tensor] = {}  # inputs of the blocks and results under way that have deltas
        for name, module in model.named_modules():
            shape = _linear_shape(module)
            if shape is None:
                continue
            self.shapes[name] = SiteShape(*shape, is_head=module is head, is_transposed=isinstance(module, Conv1D))
            forward = module.forward
            product = products.pack(module) if products.can_pack(module) else None
            if product is not None:
                self._packed.add(module)
                forward = product if programs is None else programs.product(module, product)
            module.forward = self._wrap(name, forward)

    def add_norms(self, model: nn.Module, norms: Mapping[str, NormForm]) -> None:
        """Wrap norms, once their modules have the forward that they shall keep."""
        for name, form in norms.items():
            module = model.get_submodule(name)
            width = len(module.weight)  # type: ignore[arg-type]  # a norm's weight is a vector
            self.shapes[name] = SiteShape(width, width, is_head=False, kind=SiteKind.NORM, norm=form)
            module.forward = self._wrap(name, module.forward)

    def add_blocks(self, model: nn.Module, blocks: Iterable[Block]) -> None:
        """Wrap the norms and the last linear modules of blocks; after `add_norms` and `add_attention`."""
        for block in blocks:
            norm, output = model.get_submodule(block.norm), model.get_submodule(block.output)
            width = self.shapes[block.norm].inputs
            if block.is_attention:
                self._add_result(block, output, width)
            self.shapes[block.site] = SiteShape(width, width, is_head=False, kind=SiteKind.BLOCK)
            norm.forward = self._begin_block(block.site, norm.forward)
            output.forward = self._end(block.site, output.forward)

    def _add_result(self, block: Block, output: nn.Module, width: int) -> None:
        """Let deltas act on what an attention's last module gives, within its block."""
        for layer, name in self._attention_sites.items():
            if name.startswith(f"{block.layer}."):
                site = self._result_sites[layer] = block.result_site
                queries = self.shapes[name].inputs
                self.shapes[site] = SiteShape(queries, width, is_head=False, kind=SiteKind.RESULT)
                output.forward = self._end(site, output.forward)

    def add_attention(self, layer: int, name: str, width: int) -> None:
        """Let deltas act at a layer's attention, called `name`; `width` is that of all heads together."""
        self.shapes[name] = SiteShape(width, width, is_head=False, kind=SiteKind.ATTENTION)
        self._attention_sites[layer] = name

    def attending(self, attention: Attention) -> Attention:
        """`attention` with the deltas of the step under way."""
        planned = {layer: name for layer, name in self._attention_sites.items() if name in self._plan}
        behind = {layer: name for layer, name in self._result_sites.items() if name in self._plan}
        if not planned and not behind:
            return attention
        return _ChangedAttention(attention, planned, behind, self._plan, self._seen)

    def is_packed(self, module: object) -> bool:
        """Whether it is a site's module with a packed weight."""
        return module in self._packed

    def give_inputs(self, name: str) -> None:
        """What is passed to this site is read by nobody else: deltas may change it where it lies."""
        self._own_inputs.add(name)

    def plan(self) -> SitePlan:
        """The deltas of the step under way."""
        return self._plan

    def touches(self, names: Iterable[str]) -> bool:
        """Whether the step under way has deltas at one of these sites."""
        return not self._plan.keys().isdisjoint(names)

    def _wrap(self, name: str, base_forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(inputs: Tensor) -> Tensor:
            levels = self._plan.get(name)
            if not levels:
                return base_forward(inputs)
            return apply_levels(base_forward, inputs, levels, owns_inputs=name in self._own_inputs)

        return forward

    def _begin_block(self, site: str, base_forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(inputs: Tensor) -> Tensor:
            if site in self._plan:
                self._seen[site] = inputs
            return base_forward(inputs)

        return forward

    def _end(self, site: str, base_forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def forward(inputs: Tensor) -> Tensor:
            outputs = base_forward(inputs)
            if levels := self._plan.get(site):
                seen = self._seen.pop(site)
                change_outputs(outputs, ((segments, seen) for segments in levels))
            return outputs

        return forward

    @contextmanager
    def applying(self, plan: SitePlan) -> Iterator[None]:
        """Run the base with these deltas inside the block."""
        self._plan = plan
        try:
            yield
        finally:
            self._plan = {}
            self._seen.clear()


@dataclass(frozen=True)
class _ChangedAttention:
    """An attention and what adapters add to it."""

    attention: Attention
    sites: Mapping[int, str]  # of the layers that have deltas at the attention
    result_sites: Mapping[int, str]  # of those that have some behind its output projection
    plan: SitePlan
    seen: dict[str, Tensor]  # what the latter are given

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
        """See `Attention`."""
        output = self.attention.attend(layer, query, key, value, options)
        if behind := self.result_sites.get(layer):
            self.seen[behind] = query.flatten(1)
        if layer not in self.sites:
            return output
        rows, queries = output.contiguous().flatten(1), query.flatten(1)
        change_outputs(rows, ((segments, queries) for segments in self.plan[self.sites[layer]]))
        return rows.view(output.shape)


def _linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear module."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    return None
