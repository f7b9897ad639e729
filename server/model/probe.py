"""Can this model be served right? Found by trying, not by class flags.

The model's own eager forward, one sequence at a time, is compared with the packed, paged and chunked forward
that serving uses. A class that bypasses the attention interface (ALiBi models among them), passes something
that our attention does not honour, or mixes tokens outside attention (recurrent layers) is refused with a
sentence that says what was found.

The forwards are shorter than most windows. So a window is looked for apart: transformers is asked which one each
layer's mask has, and a layer that does not pass the same one to attention limits how long a sequence may be.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from server.errors import StartupError
from server.model.attention import IMPLEMENTATION, AttentionPlan, DecodeGroup, PrefillRow
from server.model.kv_cache import KVCache, LayerShape
from server.model.paged_attention import PagedAttention

_RECORDING = "medley_recording"
_HONOURED = {"scaling", "sliding_window", "softcap", "s_aux"}
_IRRELEVANT = {
    "position_ids",
    "use_cache",
    "cache_position",
    "output_attentions",
    "is_causal",
    "medley_record",
}
_PAGE_SIZE = 4
_LENGTHS = (21, 11)  # two rows: what leaks from one into the other shows
_CHUNKS = ((7, 4), (1, 6), (13, 1))  # tokens of each row per step; ones go the decode way
_TOLERANCE = {torch.float32: 1e-3}  # of the largest logit; below float32 rounding alone is percents
_LOW_PRECISION_TOLERANCE = 5e-2


class _Record:
    """What one forward passed to attention."""

    def __init__(self) -> None:
        self.shapes: dict[int, LayerShape] = {}
        self.not_honoured: set[str] = set()
        self.windows: dict[int, tuple[int | None, int | None]] = {}  # of each layer: its mask's, and the one passed


class _WindowMask(Tensor):
    """Stands for a mask that transformers would have made: filled with its window or chunk, 0 where it has none."""


def probe(model: PreTrainedModel, max_model_len: int) -> list[LayerShape]:
    """The KV shape of each layer. Raises `StartupError` for a model that would be answered wrongly."""
    name = type(model).__name__
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    sequences = [
        torch.randint(vocabulary, (min(length, max_model_len),), generator=generator).to(model.device)
        for length in _LENGTHS
    ]
    try:
        with torch.inference_mode():
            expected = [_eager_logits(model, ids) for ids in sequences]
            record = _record_layers(model, sequences[0], name)
            _check_windows(record, max_model_len, name)
            shapes = [record.shapes[layer] for layer in sorted(record.shapes)]
            actual = _packed_logits(model, sequences, shapes)
    except StartupError:
        raise
    except Exception as error:  # a class may fail in any way under an interface that it was not written for
        raise StartupError(f"{name} cannot be served: its forward fails on a packed step: {error!r}") from error
    for left, right in zip(expected, actual, strict=True):
        scale = float(left.abs().max())
        difference = float((left - right).abs().max())
        if not difference <= _TOLERANCE.get(model.dtype, _LOW_PRECISION_TOLERANCE) * max(scale, 1.0):
            raise StartupError(
                f"{name} cannot be served: its packed forward differs from its own eager one by {difference:.2g} "
                f"(logits up to {scale:.2g}); it may mix tokens outside attention or add a position bias to it"
            )
    return shapes


def _eager_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    model.set_attn_implementation("eager")
    logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0].float()
    return logits


def _recording_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    medley_record: _Record,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Note the call; the answer's values do not matter, only its shape `[1, tokens, heads, head_dim]`."""
    layer: int = module.layer_idx  # type: ignore[assignment]
    if key.shape != value.shape:
        medley_record.not_honoured.add("values of another width than keys")
    medley_record.shapes[layer] = LayerShape(key.shape[1], key.shape[3])
    window = None
    if isinstance(attention_mask, _WindowMask) and attention_mask.dtype == torch.int64:  # else the class changed it
        window = int(attention_mask.flatten()[0]) or None
    elif attention_mask is not None:
        medley_record.not_honoured.add("attention_mask")
    medley_record.windows[layer] = window, options.get("sliding_window")
    if dropout:
        medley_record.not_honoured.add("dropout")
    for option, given in options.items():
        if option not in _HONOURED | _IRRELEVANT and given is not None and given is not False:
            medley_record.not_honoured.add(option)
    return query.transpose(1, 2).contiguous(), None


def _recording_mask(q_length: int, kv_length: int, local_size: int | None = None, **_: Any) -> Tensor:
    """What transformers' functions call for a mask `[1, 1, queries, keys]`; a class may cut it to its own length."""
    return torch.full((1, 1, q_length, kv_length), local_size or 0).as_subclass(_WindowMask)


AttentionInterface.register(_RECORDING, _recording_function)
AttentionMaskInterface.register(_RECORDING, _recording_mask)


def _record_layers(model: PreTrainedModel, ids: Tensor, name: str) -> _Record:
    model.set_attn_implementation(_RECORDING)
    record = _Record()
    embeddings = model.get_input_embeddings()(ids[None])
    positions = torch.arange(len(ids), device=ids.device)[None]
    model(inputs_embeds=embeddings, position_ids=positions, use_cache=False, medley_record=record)
    layers = model.config.get_text_config().num_hidden_layers
    if sorted(record.shapes) != list(range(layers)):
        raise StartupError(
            f"{name} cannot be served: {len(record.shapes)} of its {layers} layers reach attention through "
            "transformers' attention interface"
        )
    if record.not_honoured:
        raise StartupError(
            f"{name} cannot be served: its attention uses {', '.join(sorted(record.not_honoured))}, which "
            "the paged attention does not honour"
        )
    return record


def _check_windows(record: _Record, max_model_len: int, name: str) -> None:
    """Refuse lengths at which a layer's own mask leaves out what the paged attention would let it see."""
    for layer, (masked, passed) in sorted(record.windows.items()):
        limit = min(window for window in (masked, passed, max_model_len) if window is not None)
        if masked != passed and limit < max_model_len:
            raise StartupError(
                f"{name} cannot be served beyond {limit} positions: layer {layer} has a window or chunk of {limit}, "
                f"which its mask and its call of attention do not agree on; set --max-model-len {limit} or less"
            )


def _packed_logits(model: PreTrainedModel, sequences: list[Tensor], shapes: list[LayerShape]) -> list[Tensor]:
    """The sequences' logits, run together in chunks over pages."""
    model.set_attn_implementation(IMPLEMENTATION)
    device = model.device
    pages = -(-max(_LENGTHS) // _PAGE_SIZE)
    cache = KVCache(
        shapes,
        1 + pages * len(sequences),
        _PAGE_SIZE,
        dtype=model.get_input_embeddings().weight.dtype,
        device=device,
    )
    cache.zero(range(cache.num_pages))
    tables = torch.arange(1, cache.num_pages, device=device).view(len(sequences), pages)
    logits: list[list[Tensor]] = [[] for _ in sequences]
    done = [0] * len(sequences)
    for chunks in _CHUNKS:
        counts = [min(count, len(ids) - at) for count, ids, at in zip(chunks, sequences, done, strict=True)]
        if not sum(counts):
            break
        plan = _plan(tables, done, counts)
        ids = torch.cat([ids[at : at + count] for ids, at, count in zip(sequences, done, counts, strict=True)])
        positions = torch.cat([torch.arange(at, at + count) for at, count in zip(done, counts, strict=True)])
        backwards = torch.arange(len(ids), device=device).flip(0)  # shows whether the class keeps what it is asked for
        output = model(
            inputs_embeds=model.get_input_embeddings()(ids[None]),
            position_ids=positions[None].to(device),
            use_cache=False,
            logits_to_keep=backwards,
            medley_attention=PagedAttention(cache, plan),
        ).logits[0, backwards]
        for row, part in enumerate(output.float().split(counts)):
            logits[row].append(part)
            done[row] += counts[row]
    return [torch.cat(parts) for parts in logits]


def _plan(tables: Tensor, done: list[int], counts: list[int]) -> AttentionPlan:
    """Row i's next `counts[i]` tokens after `done[i]`, its pages in `tables[i]`."""
    device = tables.device
    slots: list[Tensor] = []
    decode: list[DecodeGroup] = []
    decode_tokens: list[int] = []
    prefill: list[PrefillRow] = []
    start = 0
    for row, (at, count) in enumerate(zip(done, counts, strict=True)):
        positions = torch.arange(at, at + count, device=device)
        slots.append(tables[row][positions // _PAGE_SIZE] * _PAGE_SIZE + positions % _PAGE_SIZE)
        if count == 1:
            decode.append(
                DecodeGroup(
                    start=len(decode),
                    stop=len(decode) + 1,
                    block_tables=tables[row : row + 1],
                    lengths=torch.tensor([at + 1], device=device),
                )
            )
            decode_tokens.append(start)
        elif count:
            prefill.append(PrefillRow(start, start + count, tables[row], at + count))
        start += count
    tokens = torch.tensor(decode_tokens, dtype=torch.long, device=device)
    return AttentionPlan(torch.cat(slots), None, tokens, decode, prefill)
