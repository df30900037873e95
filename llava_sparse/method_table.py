"""The table of `llava-sparse methods`."""

from __future__ import annotations

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .modeling.pruning_methods import Sparsifier
from .modeling.pruning_registry import METHODS, TRIAL, TRIAL_BUDGET
from .modeling.pruning_settings import Sparsity, option_defaults, option_fields

COLUMNS = ("name", "kind", "question", "positions", "options", "cost", "what it does", "paper")
NARROW = ("name, kind, question", "positions, options", "cost, what it does, paper")
NOTES = (
    "Cost: the order of what choosing adds. N patches, k kept, H heads; V visual of L tokens of a prompt, R raters; M "
    "tokens made anew; d, C, D: widths.",
    "Two methods at once: sparse_method='divprune+sparsevlm', an encoder method and then a decoder method. A single "
    "budget is the decoder method's; the encoder method hands it twice as many tokens.",
)


def positions(method: type[Sparsifier]) -> str:
    """What becomes of position ids by default, where something was pruned."""
    if method.kind == "encoder":
        return "compact: a shorter prompt"
    versions = option_fields(method).get("version")
    if versions is None:
        return method.resolve(TRIAL, Sparsity(method.name, TRIAL_BUDGET)).positions
    of: dict[str, list[str]] = {}
    for version in versions.metadata["option"]["choices"]:
        settings = Sparsity(method.name, TRIAL_BUDGET, options={"version": version})
        of.setdefault(method.resolve(TRIAL, settings).positions, []).append(version)
    return ", ".join(f"{policy} ({', '.join(those)})" for policy, those in sorted(of.items()))


def method_table(narrow: bool = False) -> Table:
    """A row for each method, by name, those of plugins among them.

    Args:
        narrow: for a terminal: three columns of several lines instead of one line a method.
    """
    shown = Table(pad_edge=False, show_lines=narrow)
    for column in NARROW if narrow else COLUMNS:
        shown.add_column(column, overflow="fold")
    for name, method in sorted(METHODS.items()):
        question = "yes" if method.looks_at_question else "no"
        options = [f"{option}={default!r}" for option, default in option_defaults(method).items()] or ["–"]
        cells = [name, method.kind, question, positions(method), ", ".join(options)]
        cells += [method.cost, method.summary, method.paper]
        if narrow:
            cells[2], cells[5] = f"question: {question}", f"cost: {method.cost}"
            cells = ["\n".join(part) for part in (cells[:3], [cells[3], *options], cells[5:])]
        # What stands in brackets is no markup.
        shown.add_row(*map(Text, cells))
    return shown


def print_methods() -> None:
    """Prints the table, as narrow as a terminal, or a line for each method where stdout is none."""
    out = Console()
    table = method_table(narrow=out.is_terminal)
    if not out.is_terminal:
        # A width of its own, or rich would wrap.
        free = out.options.update(max_width=100_000)
        out = Console(width=max(*map(len, NOTES), Measurement.get(out, free, table).maximum))
    out.print(table)
    for note in NOTES:
        out.print(note, highlight=False, markup=False)
