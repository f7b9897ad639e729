"""The training loop: AdamW on the adapter's parameters, validation, early stop, the best step kept and saved.

The learning rate rises linearly through the warm-up and falls linearly to zero. The loss is PEFT's and the model's
own: the mean cross-entropy over output tokens and the end of text.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

from server.tuning.adapter import new_adapter
from server.tuning.base import load_base, quiet_libraries
from server.tuning.encoding import Batch, EncodedExample, Encoder, collate
from server.tuning.errors import TuneError
from server.tuning.examples import read_examples, split_examples
from server.tuning.progress import NoProgress, TuneProgress
from server.tuning.settings import TuneSettings

GRADIENT_NORM = 1.0  # gradients longer than this are shortened to it


@dataclass(frozen=True)
class TuneReport:
    """What came of a run; losses are nats per output token of the validation examples."""

    output: Path
    parameters: int  # trained ones
    steps: int  # made
    best_step: int  # the saved one; 0: training never improved on the start
    initial_loss: float
    best_loss: float
    stopped_early: bool


def tune(settings: TuneSettings, progress: TuneProgress | None = None) -> TuneReport:
    """Train an adapter and save it to `settings.output` as a PEFT folder.

    Raises `TuneError` where a setting or the data cannot be followed. With the same settings, data and machine the
    result is the same; the caller's random state is left as it was.
    """
    examples = read_examples(settings.data)
    if settings.validation is not None:
        training, validation = examples, read_examples(settings.validation)
    else:
        training, validation = split_examples(examples, settings.validation_share, settings.seed)
    with quiet_libraries(), torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        base, tokenizer = load_base(settings.model)
        model = new_adapter(base, tokenizer, settings)
        encoder = Encoder(tokenizer, settings.template, _room(model, settings))
        prompt_may_be_empty = settings.method in ("prompt", "ptuning")
        run = _Run(
            model,
            encoder.encode_all(training, prompt_may_be_empty=prompt_may_be_empty),
            encoder.encode_all(validation, prompt_may_be_empty=prompt_may_be_empty),
            tokenizer.eos_token_id,
            settings,
        )
        report = run.train(progress or NoProgress())
        _save(model, settings)
    return report


class _Run:
    """One run's model, data and best state so far."""

    def __init__(
        self,
        model: PeftModel,
        training: Sequence[EncodedExample],
        validation: Sequence[EncodedExample],
        pad: int,
        settings: TuneSettings,
    ) -> None:
        self._model = model
        self._training = training
        self._validation = validation
        self._pad = pad
        self._settings = settings
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        batches_per_epoch = math.ceil(len(training) / settings.batch_size)
        self._steps = settings.steps or settings.epochs * batches_per_epoch
        self._validate_every = settings.validate_every or batches_per_epoch

    def train(self, progress: TuneProgress) -> TuneReport:
        """Train to the end or until patience ends, and leave the model at its best step."""
        progress.started(self._steps)
        optimizer = torch.optim.AdamW(self._parameters, self._settings.peak_learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate_share)
        initial_loss = best_loss = self._validation_loss()
        progress.validated(0, initial_loss, True)
        best_state, best_step, step, waited = self._state(), 0, 0, 0
        stream = self._batches()
        while step < self._steps and waited < self._settings.patience:
            loss = self._step(next(stream), optimizer)
            schedule.step()
            step += 1
            progress.stepped(step, loss)
            if step % self._validate_every == 0 or step == self._steps:
                validation_loss = self._validation_loss()
                better = validation_loss < best_loss
                progress.validated(step, validation_loss, better)
                waited = 0 if better else waited + 1
                if better:
                    best_state, best_step, best_loss = self._state(), step, validation_loss
        self._restore(best_state)
        return TuneReport(
            output=self._settings.output,
            parameters=sum(parameter.numel() for parameter in self._parameters),
            steps=step,
            best_step=best_step,
            initial_loss=initial_loss,
            best_loss=best_loss,
            stopped_early=step < self._steps,
        )

    def _step(self, batch: Batch, optimizer: torch.optim.Optimizer) -> float:
        self._model.train()
        optimizer.zero_grad()
        loss = batch_loss(self._model, batch)
        loss.backward()  # type: ignore[no-untyped-call]  # torch's
        torch.nn.utils.clip_grad_norm_(self._parameters, GRADIENT_NORM)
        optimizer.step()
        return loss.item()

    def _batches(self) -> Iterator[Batch]:
        """Epoch after epoch, each example once, in an order drawn from the seed."""
        rng = random.Random(self._settings.seed)
        size = self._settings.batch_size
        while True:
            order = rng.sample(self._training, len(self._training))
            for start in range(0, len(order), size):
                yield collate(order[start : start + size], self._pad)

    @torch.no_grad()
    def _validation_loss(self) -> float:
        self._model.eval()
        ordered = sorted(self._validation, key=lambda example: len(example.prompt) + len(example.output))
        total, tokens = 0.0, 0
        for start in range(0, len(ordered), self._settings.batch_size):
            batch = collate(ordered[start : start + self._settings.batch_size], self._pad)
            total += batch_loss(self._model, batch).item() * batch.output_tokens
            tokens += batch.output_tokens
        if not math.isfinite(total):
            raise TuneError("learning_rate: the loss is no longer a number; take a smaller one")
        return total / tokens

    def _rate_share(self, step: int) -> float:
        warmup = max(1, round(self._steps * self._settings.warmup_share))
        return min((step + 1) / warmup, (self._steps - step) / max(1, self._steps - warmup), 1.0)

    def _state(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self._parameters]

    def _restore(self, state: list[Tensor]) -> None:
        for parameter, value in zip(self._parameters, state, strict=True):
            parameter.data.copy_(value)


def batch_loss(model: PeftModel, batch: Batch) -> Tensor:
    """Mean cross-entropy of the batch's output tokens, each predicted from everything before it."""
    device = model.device
    loss: Tensor = model(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        labels=batch.labels.to(device),
    ).loss
    return loss


def _room(model: PeftModel, settings: TuneSettings) -> int:
    """Tokens of prompt and output that fit beside the virtual ones."""
    positions: int = model.config.max_position_embeddings
    length = min(positions, settings.max_length or positions)
    virtual: int = getattr(model.active_peft_config, "num_virtual_tokens", None) or 0
    if virtual >= length:
        raise TuneError(f"virtual_tokens: {virtual} leave no room within {length} positions")
    return length - virtual


def _save(model: PeftModel, settings: TuneSettings) -> None:
    model.active_peft_config.base_model_name_or_path = settings.saved_base_name
    # The embeddings are the base's own and are never trained here; to find that out PEFT would ask the hub.
    model.save_pretrained(settings.output, save_embedding_layers=False)
    # A form of empty headings that names the base by its path on this machine.
    (settings.output / "README.md").unlink(missing_ok=True)
