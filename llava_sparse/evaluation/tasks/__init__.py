"""Tasks: questions about pictures, how they are asked, and how answers count. A task is a class and a registration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import datasets

from llava_sparse.modeling.pruning_settings import nearest

from ..files import Report  # noqa: TID252 (a task is no more than what its folder's parent lends it)
from ..statistics import ACCURACY, Measure  # noqa: TID252

TASKS: dict[str, Task] = {}


class Task(ABC):
    """Questions about pictures, and the rules for their answers.

    Attributes:
        name: on the command line; title: in tables.
        measure: what is counted of answers, and the metrics.
        labels: all right answers that there are; empty if they are any text.
        choices: of yes/no tasks, the answers that `answer_mode="logits"` and `"likelihood"` compare, the positive one
            first; None where answers are text alone.
        short_answer: whether the prompt asks for a single word or phrase.
        max_new_tokens: of an answer, unless the caller says it.
        hard_split: of yes/no tasks, the split whose negatives are hard.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    measure: ClassVar[Measure] = ACCURACY
    labels: ClassVar[tuple[str, ...]] = ()
    choices: ClassVar[tuple[str, str] | None] = None
    short_answer: ClassVar[bool] = True
    max_new_tokens: ClassVar[int] = 16
    hard_split: ClassVar[str | None] = None

    @abstractmethod
    def load(
        self, source: str | Path, limit: int | None, *, on_bad: Report | None, **subset: Any
    ) -> datasets.Dataset | datasets.IterableDataset:
        """The questions, with the columns of `rows.FEATURES`; `category` is the split that a question is scored in.

        Args:
            source: a folder, a file, a name.
            limit: questions per split; None for all.
            on_bad: called with the message of every row that cannot be used, which is left out; None: it is an error.
            subset: what else chooses questions.

        Raises:
            ValueError: for invalid data, naming file and row.
        """

    @abstractmethod
    def parse(self, text: str, label: str) -> str:
        """What an answer counts as; it is right if that is its label."""

    def asked(self, question: str) -> str | None:
        """The name of the object that a question asks for: what failure modes are about. None if it asks for none."""
        return None


def register_task(cls: type[Task]) -> type[Task]:
    """Class decorator: makes a task known by its name.

    Raises:
        ValueError: if another class has the name.
    """
    old = TASKS.get(cls.name)
    if old is not None and type(old).__qualname__ != cls.__qualname__:
        raise ValueError(f"task {cls.name!r} is there already; choose another name.")
    TASKS[cls.name] = cls()
    return cls


def get_task(task: str | Task) -> Task:
    """A task by its name.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    if isinstance(task, Task):
        return task
    import_module(f"{__name__}.pope")
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown{nearest(task, list(TASKS))}; allowed: {', '.join(TASKS)}.")
    return TASKS[task]
