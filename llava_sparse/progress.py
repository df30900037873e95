"""Progress of long commands, on a terminal and in a file."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Advance:
    """Shows how far each run is: bars on a terminal, else a line when a run begins and ends."""

    def __init__(self, log: Console, shown: bool, unit: str = "questions answered") -> None:

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._log, self._lines, self._unit = log, shown and not log.is_terminal, unit
        self._progress = Progress(*columns, console=log, disable=not (shown and log.is_terminal))
        self._tasks: dict[str, TaskID] = {}

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
            if self._lines:
                self._log.print(f"{run}: {done} of {total} {self._unit}", markup=False, highlight=False)
        elif self._lines and done == total:
            self._log.print(f"{run}: {done} of {total} {self._unit}", markup=False, highlight=False)
        self._progress.update(self._tasks[run], completed=done, total=total)
