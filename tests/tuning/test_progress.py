"""The progress bar shows each validation and ends with the run."""

from io import StringIO

from rich.console import Console

from server.tuning import ProgressBar


def test_each_validation_is_a_line_and_the_bar_shows_the_last_step() -> None:
    terminal = StringIO()
    with ProgressBar(Console(file=terminal, width=100, force_terminal=False)) as progress:
        progress.started(4)
        progress.validated(0, 2.5, True)
        for step in range(1, 5):
            progress.stepped(step, 1.25)
        progress.validated(4, 3.0, False)
    text = terminal.getvalue()
    assert "step 0: validation loss 2.5000 (best so far)\n" in text
    assert "step 4: validation loss 3.0000\n" in text
    assert "4/4 loss 1.2500" in text
