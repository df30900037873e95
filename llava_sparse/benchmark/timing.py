"""Time, measured where it passes: events on a GPU, the clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch

from llava_sparse.modeling import method_tome, modeling_sparse_clip, pruning_decoder, pruning_mrope
from llava_sparse.modeling.pruning_attention import RowTap

from .shapes import parts_of


class Clock:
    """Marks moments without waiting for the device, and tells the time between them."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.device = device

    def mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self.on_gpu else end - start

    def time(self, call: Callable[[], Any]) -> float:
        """Seconds that a call takes, the device's work included."""
        self.wait()
        start = self.mark()
        call()
        end = self.mark()
        self.wait()
        return self.seconds(start, end)


def interleaved(
    calls: Mapping[str, Callable[[], float]], rounds: int, warm_up: int, on_round: Callable[[], None] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of every call in every round: A B C, A B C, ..., so that a machine that slows down slows all of them.

    Args:
        calls: by name; each returns its seconds.
        warm_up: rounds before, which do not count.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(warm_up + rounds):
        for name, call in calls.items():
            seconds = call()
            if number >= warm_up:
                found[name].append(seconds)
        on_round()
    return found


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, quartiles and all values; the quartiles of fewer than four are the extremes."""
    low, high = min(values), max(values)
    if len(values) >= 4:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": statistics.median(values), "low": low, "high": high, "values": list(values)}


@contextmanager
def stages(model: Any, clock: Clock) -> Iterator[Callable[[], dict[str, float]]]:
    """Measures the parts of a prefill; yields what tells the seconds of each since it was last asked.

    What a method does stands in its own part, "selection", and not in that of the tower or the decoder around it.
    """
    modules = parts_of(model)
    marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in modules}
    # What was selected while one of the parts ran, and behind the projector.
    selected: dict[str, list[tuple[Any, Any]]] = {name: [] for name in ("", *modules)}
    running: dict[str, list[Any]] = {name: [] for name in modules}

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = clock.mark()
            try:
                return function(*args, **kwargs)
            finally:
                part = next((name for name, starts in running.items() if starts), "")
                selected[part].append((start, clock.mark()))

        return wrapper

    def left(name: str) -> None:
        start, inside = running[name].pop(), running[name]
        # A part that runs within another of its stage has been timed with that.
        if not inside:
            marks[name].append((start, clock.mark()))

    sparsifier = getattr(model.model, "sparsifier", None)
    with ExitStack() as stack:
        for name, module in [(name, module) for name, own in modules.items() for module in own]:
            before = module.register_forward_pre_hook(lambda *_, name=name: running[name].append(clock.mark()))
            after = module.register_forward_hook(lambda *_, name=name: left(name))
            stack.callback(before.remove)
            stack.callback(after.remove)
        for owner, name in _selecting(sparsifier):
            function = getattr(owner, name)
            stack.enter_context(mock.patch.object(owner, name, timed(function)))

        def told() -> dict[str, float]:
            clock.wait()
            seconds, selection = (
                {name: sum(clock.seconds(*pair) for pair in pairs) for name, pairs in found.items()}
                for found in (marks, selected)
            )
            for pairs in [*marks.values(), *selected.values()]:
                pairs.clear()
            rest = {name: spent - selection[name] for name, spent in seconds.items()}
            return {**rest, "selection": sum(selection.values())}

        yield told


def _selecting(sparsifier: Any) -> list[tuple[Any, str]]:
    """The functions that make a selection; none calls another."""
    if sparsifier is None:
        return []
    found: list[tuple[Any, str]] = [(RowTap, "take")]
    if sparsifier.encoder is not None:
        found += [(modeling_sparse_clip, "row_probabilities")]
        found += [(type(part), "reduce") for part in sparsifier.encoder.parts]
        found += [(method_tome, "bipartite_matching"), (method_tome, "merge")]
        found += [(pruning_mrope.ReceivedAttention, "take")]
    if sparsifier.decoder is not None:
        found += [(pruning_decoder, "open_prompt"), (pruning_decoder.DecoderRun, "_prune")]
    return found
