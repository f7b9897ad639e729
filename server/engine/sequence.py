"""One sequence: a prompt under a stack of adapters, and what has been generated so far.

Positions 0 … `num_virtual` - 1 are the stack's virtual tokens, the text follows. There is no prefill and no decode
phase: `num_computed` positions have their keys and values in pages and catch up with `num_tokens`.
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from server.engine.page_cache import CachedPages
from server.engine.prefixes import PrefixRun, Span
from server.engine.protocol import Generate, Sampling, TokenLogprobs

if TYPE_CHECKING:  # the scheduler and what it handles know no torch
    from server.adapters import Resident


@dataclass(eq=False)
class Sequence:
    """See the module. Mutable; owned by the engine's thread."""

    request: Generate
    stack: tuple[Resident, ...] = ()
    spans: tuple[Span, ...] = ()  # of the stack's virtual tokens
    output: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    num_computed: int = 0  # once the step under way has run
    num_charged: int = 0  # positions that its client has been charged for, or had for nothing
    num_cached_virtual: int | None = None  # of its prefix, positions that were there when its turn first came
    num_cached_text: int | None = None  # of its text, positions that were there when it first started
    block_table: list[int] = field(default_factory=list)  # its pages, in order of position; none while it waits
    prefix: PrefixRun | None = None  # its stack's node of the page cache
    num_shared_pages: int = 0  # of the block table, the prefix's: those before the first that has text
    text_nodes: list[CachedPages] = field(default_factory=list)  # the page cache's, of the pages that follow
    tail: CachedPages | None = None  # of its input's last, partly filled page: it began as a copy of that, or left it

    @property
    def id(self) -> str:
        """The request's."""
        return self.request.id

    @property
    def sampling(self) -> Sampling:
        """The request's."""
        return self.request.sampling

    @property
    def stack_key(self) -> tuple[str, ...]:
        """The stack by content, and whose it is: pages are never shared between tenants, or how fast an answer comes
        would tell what others have asked."""
        return (self.request.tenant, *(resident.digest for resident in self.stack))

    @property
    def num_virtual(self) -> int:
        """Virtual tokens of the stack."""
        return self.spans[-1].stop if self.spans else 0

    @property
    def num_prefix(self) -> int:
        """Positions that come from the prefix's pages. A sequence without text, or whose text is scored from its first
        token on, runs a soft prompt's last virtual token itself, since it needs that token's logits."""
        needs_last = not self.request.prompt or self.scores_first
        return max(self.num_virtual - 1, 0) if needs_last else self.num_virtual

    @property
    def scores_first(self) -> bool:
        """Whether the prompt's first token is to be scored and a virtual token that is run predicts it."""
        return self.sampling.prompt_logprobs_from == 0 and bool(self.spans) and self.spans[-1].is_run

    @property
    def num_cached(self) -> int:
        """Positions that were not computed for it, because they were there."""
        return (self.num_cached_virtual or 0) + (self.num_cached_text or 0)

    @property
    def num_prompt(self) -> int:
        """Positions of the virtual tokens and the prompt."""
        return self.num_virtual + len(self.request.prompt)

    @property
    def num_tokens(self) -> int:
        """Positions so far, virtual ones counted."""
        return self.num_prompt + len(self.output)

    @property
    def num_remaining(self) -> int:
        """Positions yet to be computed."""
        return self.num_tokens - self.num_computed

    @property
    def first_logit(self) -> int:
        """The first position whose logits it still needs: the one before the next prompt token to be scored, if there
        is one, else its last."""
        scored_from = self.sampling.prompt_logprobs_from
        if scored_from is not None:
            index = scored_from + len(self.prompt_logprobs)
            if index < len(self.request.prompt):
                return self.num_virtual + (index - 1 if index or self.scores_first else 0)
        return self.num_tokens - 1

    @property
    def input_stop(self) -> int | None:
        """Of a choice that is scored: how many positions come before the first whose logits score it. All choices for
        one input have them in common. None for what is no choice."""
        scored_from = self.sampling.prompt_logprobs_from
        if not scored_from or scored_from >= len(self.request.prompt) or self.sampling.max_tokens:
            return None
        return self.num_virtual + scored_from - 1

    def token_ids(self, start: int, stop: int) -> Items[int]:
        """Ids of the positions `start` … `stop` - 1, none of them virtual."""
        start, stop = start - self.num_virtual, stop - self.num_virtual
        prompt = self.request.prompt
        if stop <= len(prompt):
            return prompt[start:stop]
        return (prompt[start:] if start < len(prompt) else []) + self.output[
            max(0, start - len(prompt)) : stop - len(prompt)
        ]

    def page_key(self, page: int, page_size: int) -> tuple[int, ...]:
        """The text of its `page`-th page, which is full; virtual tokens that begin it are not named."""
        return tuple(self.token_ids(max(self.num_virtual, page * page_size), (page + 1) * page_size))
