"""Progress of long commands, on a terminal and in a file."""

from __future__ import annotations

from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

# Seconds between lines in a file.
EVERY = 30.0


class Advance:
    """Shows how far each run is, and how long it will take: bars on a terminal, else a line now and then.

    In a file a run has a line when it begins, every half minute, and when it ends.
    """

    def __init__(self, log: Console, shown: bool, unit: str = "questions answered") -> None:

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._log, self._lines, self._unit = log, shown and not log.is_terminal, unit
        self._progress = Progress(*columns, console=log, disable=not (shown and log.is_terminal))
        self._tasks: dict[str, TaskID] = {}
        # Of a run, as it began and as it was last told: seconds, and what was done.
        self._began, self._told = (0.0, 0), 0.0

    def __enter__(self) -> Advance:
        self._progress.start()
        self._loading = self._progress.add_task("loading", total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, run: str, done: int, total: int) -> None:
        if run not in self._tasks:
            self._progress.update(self._loading, visible=False)
            self._tasks[run] = self._progress.add_task(run)
            self._began = monotonic(), done
            self._tell(run, done, total)
        elif done == total or monotonic() - self._told > EVERY:
            self._tell(run, done, total)
        self._progress.update(self._tasks[run], completed=done, total=total)

    def _tell(self, run: str, done: int, total: int) -> None:
        (start, first), self._told = self._began, monotonic()
        left = "" if done in (first, total) else f", {self._left(start, first, done, total)} left"
        if self._lines:
            self._log.print(f"{run}: {done} of {total} {self._unit}{left}", markup=False, highlight=False)

    def _left(self, start: float, first: int, done: int, total: int) -> str:
        """How long the rest takes, if it goes on as it went."""
        seconds = (self._told - start) / (done - first) * (total - done)
        return f"about {seconds / 60:.0f} minutes" if seconds >= 90 else f"about {seconds:.0f} seconds"
