"""What one tuning run is told: every setting with its unit and default, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from server.tuning.errors import TuneError

Method = Literal["prompt", "prefix", "ia3", "lora", "ptuning"]
METHODS: tuple[Method, ...] = get_args(Method)

TEXT_INIT = "text:"
DEFAULT_VIRTUAL_TOKENS = 20
LEARNING_RATES: dict[Method, float] = {
    "prompt": 1e-2,
    "prefix": 1e-2,
    "ia3": 1e-2,
    "lora": 1e-3,
    "ptuning": 1e-3,
}
"""Peak learning rate (AdamW) of each method where none is given; a projected prefix is trained like P-tuning."""

_METHODS_WITH_VIRTUAL_TOKENS = ("prompt", "prefix", "ptuning")


@dataclass(frozen=True)
class TuneSettings:
    """One tuning run.

    `init` starts the virtual tokens of `prompt` and `prefix` from `random` values, from the embeddings of random
    `vocabulary` entries, or from those of a text: `text:Is this review positive?` (Lester et al. 2021, section 3.2).
    For `prefix` the keys and values that the base computes for these tokens are taken. `projection` trains a prefix
    through a small network and saves what the network gives (Li and Liang 2021, section 4.3).
    """

    method: Method
    model: str  # hub id or folder of the base
    data: Path  # JSON lines of {"input", "output"}
    output: Path  # folder of the saved adapter
    validation: Path | None = None  # absent: a share of the data is held back
    validation_share: float = 0.1
    template: str | None = None  # Jinja over `input`; absent: the input itself is the prompt
    epochs: int = 10
    steps: int | None = None  # in place of epochs
    batch_size: int = 16  # examples
    learning_rate: float | None = None  # absent: LEARNING_RATES
    warmup_share: float = 0.05  # of all steps
    virtual_tokens: int | None = None  # absent: as many as the text of `init` has, else DEFAULT_VIRTUAL_TOKENS
    init: str = "random"
    projection: bool = False  # prefix only
    rank: int = 8  # lora only
    alpha: float = 16.0  # lora only
    target_modules: tuple[str, ...] | None = None  # lora and ia3; absent: PEFT's own for the class of the base
    feedforward_modules: tuple[str, ...] = field(default=())  # ia3: those of target_modules whose input is scaled
    validate_every: int | None = None  # steps; absent: once an epoch
    patience: int = 5  # validations without a better loss, after which training stops
    max_length: int | None = None  # tokens of an example, virtual ones counted; absent: the positions of the base
    seed: int = 0
    base_name: str | None = None  # what the adapter says it was made for; absent: hub id, or the folder's last name

    def __post_init__(self) -> None:
        """Raises `TuneError` naming the first setting that cannot be followed."""
        if self.method not in METHODS:
            raise TuneError(f"method: {self.method!r} is none of {', '.join(METHODS)}")
        for name in ("epochs", "batch_size", "rank", "patience"):
            if getattr(self, name) < 1:
                raise TuneError(f"{name}: must be at least 1, is {getattr(self, name)}")
        for name in ("steps", "virtual_tokens", "validate_every", "max_length"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise TuneError(f"{name}: must be at least 1, is {getattr(self, name)}")
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise TuneError(f"learning_rate: must be above 0, is {self.learning_rate}")
        for name in ("validation_share", "warmup_share"):
            if not 0 <= getattr(self, name) < 1:
                raise TuneError(f"{name}: must be at least 0 and below 1, is {getattr(self, name)}")
        self._check_method_settings()

    def _check_method_settings(self) -> None:
        if self.virtual_tokens is not None and self.method not in _METHODS_WITH_VIRTUAL_TOKENS:
            raise TuneError(f"virtual_tokens: {self.method} has none; leave it out")
        if self.projection and self.method != "prefix":
            raise TuneError(f"projection: only for the method prefix, not for {self.method}")
        if self.init not in ("random", "vocabulary") and not self.init.startswith(TEXT_INIT):
            raise TuneError(f"init: {self.init!r} is none of random, vocabulary, text:<the text>")
        if self.init != "random" and (self.method not in ("prompt", "prefix") or self.projection):
            raise TuneError("init: only prompt, and prefix without projection, start from text or vocabulary")
        if self.init.startswith(TEXT_INIT) and len(self.init) == len(TEXT_INIT):
            raise TuneError("init: the text after `text:` is empty")
        if self.target_modules is not None and self.method not in ("lora", "ia3"):
            raise TuneError(f"target_modules: only for lora and ia3, not for {self.method}")
        if self.feedforward_modules and (
            self.method != "ia3" or not set(self.feedforward_modules) <= set(self.target_modules or ())
        ):
            raise TuneError("feedforward_modules: only for ia3, and each must be one of target_modules")

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after the warm-up."""
        if self.learning_rate is not None:
            return self.learning_rate
        return LEARNING_RATES["ptuning" if self.projection else self.method]

    @property
    def init_text(self) -> str | None:
        """The text that the virtual tokens start from, if they do."""
        return self.init.removeprefix(TEXT_INIT) if self.init.startswith(TEXT_INIT) else None

    @property
    def saved_base_name(self) -> str:
        """What the saved adapter names as its base: never a path of this machine."""
        if self.base_name is not None:
            return self.base_name
        folder = Path(self.model)
        return folder.resolve().name if folder.is_dir() else self.model
