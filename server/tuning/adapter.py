"""Makes the PEFT model that is trained: the base with one fresh adapter, its virtual tokens started as asked.

Knows nothing of data or of the training loop.
"""

from __future__ import annotations

import torch
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_model,
)
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from server.tuning.errors import TuneError
from server.tuning.settings import DEFAULT_VIRTUAL_TOKENS, TuneSettings


def new_adapter(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: TuneSettings) -> PeftModel:
    """The base wrapped by PEFT with an untrained adapter; only the adapter's parameters require gradients.

    Raises `TuneError` where the base does not have what the method needs.
    """
    start_ids = _start_ids(tokenizer, settings)
    # Before PEFT wraps the base: these are the base's own keys and values.
    start = None if start_ids is None else _start_values(base, start_ids, settings)
    try:
        model = get_peft_model(base, _peft_config(base, settings, start_ids))
    except ValueError as error:  # PEFT knows no target modules for this class, or the named ones are not there
        raise TuneError(f"{settings.method}: {error}") from error
    if start is not None:
        model.prompt_encoder[model.active_adapter].embedding.weight.data.copy_(start)
    return model


def _peft_config(base: PreTrainedModel, settings: TuneSettings, start_ids: Tensor | None) -> PeftConfig:
    task = TaskType.CAUSAL_LM
    virtual_tokens = settings.virtual_tokens or DEFAULT_VIRTUAL_TOKENS
    if start_ids is not None:
        virtual_tokens = len(start_ids)
    modules = list(settings.target_modules) if settings.target_modules else None
    match settings.method:
        case "prompt":
            return PromptTuningConfig(task_type=task, num_virtual_tokens=virtual_tokens)
        case "prefix":
            return PrefixTuningConfig(
                task_type=task,
                num_virtual_tokens=virtual_tokens,
                prefix_projection=settings.projection,
                encoder_hidden_size=base.config.hidden_size,
            )
        case "ptuning":
            return PromptEncoderConfig(
                task_type=task,
                num_virtual_tokens=virtual_tokens,
                encoder_hidden_size=base.config.hidden_size,
            )
        case "ia3":
            feedforward = list(settings.feedforward_modules) if modules else None
            return IA3Config(task_type=task, target_modules=modules, feedforward_modules=feedforward)
        case "lora":
            return LoraConfig(task_type=task, r=settings.rank, lora_alpha=settings.alpha, target_modules=modules)


def _start_ids(tokenizer: PreTrainedTokenizerBase, settings: TuneSettings) -> Tensor | None:
    """Ids of the tokens that the virtual tokens start from, [virtual_tokens]; None for a random start.

    A text shorter than the virtual tokens is repeated, a longer one is cut (Lester et al. 2021).
    """
    if settings.init == "random":
        return None
    if settings.init_text is None:
        return torch.randint(len(tokenizer), (settings.virtual_tokens or DEFAULT_VIRTUAL_TOKENS,))
    ids = torch.tensor(tokenizer(settings.init_text, add_special_tokens=False)["input_ids"])
    count = settings.virtual_tokens or len(ids)
    return ids.repeat(-(-count // len(ids)))[:count]


@torch.no_grad()
def _start_values(base: PreTrainedModel, ids: Tensor, settings: TuneSettings) -> Tensor:
    """What the adapter's parameters start as, [virtual_tokens, width]: embeddings, or for a prefix keys and values.

    PEFT keeps a prefix as one row per virtual token: layer by layer the keys, then the values, head by head.
    """
    ids = ids.to(base.device)
    if settings.method == "prompt":
        embeddings: Tensor = base.get_input_embeddings()(ids)
        return embeddings
    cache = base.eval()(input_ids=ids[None], use_cache=True).past_key_values
    states = [state[0] for layer in cache.layers for state in (layer.keys, layer.values)]  # [heads, tokens, width]
    return torch.cat([state.transpose(0, 1).flatten(1) for state in states], dim=1)
