"""How tuning tells what it is doing: a small protocol, and a progress bar that follows it."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class TuneProgress(Protocol):
    """What is told while tuning; losses are nats per output token."""

    def started(self, steps: int) -> None:
        """Training begins and will take at most `steps` steps."""

    def stepped(self, step: int, loss: float) -> None:
        """A step was made; `loss` is its batch's."""

    def validated(self, step: int, loss: float, best: bool) -> None:
        """The validation examples were scored after `step` steps; `best`: better than ever before."""


class NoProgress:
    """Tells nobody."""

    def started(self, steps: int) -> None:
        pass

    def stepped(self, step: int, loss: float) -> None:
        pass

    def validated(self, step: int, loss: float, best: bool) -> None:
        pass


class ProgressBar:
    """A bar on the terminal, and a line for each validation. To be used as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def started(self, steps: int) -> None:
        self._task = self._bar.add_task("training", total=steps, loss=float("nan"))

    def stepped(self, step: int, loss: float) -> None:
        assert self._task is not None, "started comes first"
        self._bar.update(self._task, completed=step, loss=loss)

    def validated(self, step: int, loss: float, best: bool) -> None:
        self._console.print(f"step {step}: validation loss {loss:.4f}{' (best so far)' if best else ''}")
