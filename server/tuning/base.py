"""Loads the base that an adapter is tuned for: its weights in float32, frozen, and its tokenizer."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from server.tuning.errors import TuneError


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within it, `transformers` draws no progress bars and logs errors only, and neither it nor PEFT warns of what they
    do to one another: a call that will go away, a layout that PEFT found out by itself, positions that it counts anew.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            warnings.filterwarnings("ignore", category=UserWarning, message="fan_in_fan_out", module="peft")
            warnings.filterwarnings("ignore", category=UserWarning, message="Position ids", module="peft")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_base(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base and tokenizer of a hub id or folder; on the GPU where there is one.

    Raises `TuneError` where the model cannot be loaded.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise TuneError(f"model: {model} cannot be loaded: {error}") from error
    return base.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer
