"""Training behind `medley tune`: PEFT's own methods over examples of {"input", "output"}.

    settings   what a run is told
    examples   the data, checked line by line
    encoding   examples as token ids, in the layout in which the server will see them
    base       the base and its tokenizer
    adapter    a fresh PEFT adapter, and what its virtual tokens start from
    trainer    the loop: validation loss, early stop, the best step kept; imported by itself, since it loads torch
    progress   how a run tells how it goes

Knows nothing of the server; the folder that it writes is what `medley push` sends.
"""

from server.tuning.errors import TuneError
from server.tuning.examples import Example, read_examples
from server.tuning.progress import NoProgress, ProgressBar, TuneProgress
from server.tuning.settings import METHODS, Method, TuneSettings

__all__ = [
    "METHODS",
    "Example",
    "Method",
    "NoProgress",
    "ProgressBar",
    "TuneError",
    "TuneProgress",
    "TuneSettings",
    "read_examples",
]
