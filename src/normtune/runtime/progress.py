"""A progress bar: on stderr in a terminal, below the cell in Jupyter."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from normtune.runtime.notebook import in_notebook

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_UPDATE_S = 0.1  # least seconds between two updates in Jupyter


class ProgressBar:
    """A progress bar. It appears with the first call of `update`."""

    def __init__(self, description: str) -> None:
        self.description = description
        self._bar: _TerminalBar | _NotebookBar | None = None

    def update(self, done: int, total: int, note: str = "") -> None:
        """Show how much is done, and a note behind the bar."""
        if self._bar is None:
            self._bar = (_NotebookBar if in_notebook() else _TerminalBar)(self.description)
        self._bar.update(done, total, note)

    def close(self) -> None:
        """Draw the bar for the last time."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None


def terminal_bars(console: Console) -> Progress:
    """Bars for a terminal, each with the field `note` behind it."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), console=console)


class _TerminalBar:
    def __init__(self, description: str) -> None:
        from rich.console import Console

        self.progress = terminal_bars(Console(stderr=True))
        self.progress.start()
        self.task = self.progress.add_task(description, total=None, note="")

    def update(self, done: int, total: int, note: str) -> None:
        self.progress.update(self.task, completed=done, total=total, note=note)

    def close(self) -> None:
        self.progress.stop()


class _NotebookBar:
    """Rich needs ipywidgets in Jupyter; an HTML element that is updated needs nothing."""

    def __init__(self, description: str) -> None:
        from IPython.display import HTML, display

        self.html = HTML
        self.description, self.state, self.drawn_at = description, (0, 0, ""), 0.0
        self.handle: Any = display(HTML(description), display_id=True)  # type: ignore[no-untyped-call]

    def update(self, done: int, total: int, note: str) -> None:
        self.state = done, total, note
        if time.monotonic() - self.drawn_at >= _UPDATE_S:
            self.close()

    def close(self) -> None:
        self.drawn_at = time.monotonic()
        done, total, note = self.state
        bar = f"<progress value='{done}' max='{total}'></progress>"
        self.handle.update(self.html(f"{self.description} {bar} {done:,}/{total:,} {note}"))


@contextmanager
def progress_bar(description: str, *, quiet: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a function `tick(done, total)` that draws a progress bar while the context is open; None if `quiet`."""
    bar = ProgressBar(description)
    try:
        yield None if quiet else bar.update
    finally:
        bar.close()
