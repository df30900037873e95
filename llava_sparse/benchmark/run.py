"""The benchmark: every method, budget, batch size, text length and backend against the dense model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig

import llava_sparse
from llava_sparse.evaluation.files import check_output, same_settings
from llava_sparse.evaluation.plan import DENSE, Run, plan_runs
from llava_sparse.evaluation.results import versions
from llava_sparse.evaluation.run import LOADING
from llava_sparse.modeling.pruning_cache import CACHE
from llava_sparse.plugins import plugin_files
from llava_sparse.reference import CHECKPOINT

from .floor import floors, machine_rates
from .flops import causal_savings, measured_flops, prefill_flops
from .inputs import make_inputs, recorded_prefill
from .report import load_results, write_results
from .shapes import open_model, parts_of
from .timing import Clock, interleaved, spread, stages

DECODE_STEPS = 16
MEASURES = ("prefill", "decode", "generate")


@dataclass(frozen=True)
class Place:
    """Under what models are compared: prompts at a time, words of each, attention backend."""

    batch_size: int
    text_tokens: int
    attn_implementation: str


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        model: a Hub id, a folder or a loaded model of any family; or `shape`, one of `SHAPES`, with random weights.
        methods, budgets: as of `evaluate_pope`; the dense model is always measured too.
        batch_sizes, text_tokens, attn_implementations: of the places that are measured, each with each.
        new_tokens: of the end-to-end time; rounds: of interleaved measurements; warm_up: rounds before them.
        compiled: whether towers and decoders, the dense model's too, are compiled.
        output: JSON file, written whenever a place is done; what it has already is not measured again.
        loading: dtype, device and the fields of `Memory`, for `load_model`.
    """

    model: Any = None
    shape: str | None = None
    methods: Sequence[str] = ("visionzip", "sparsevlm")
    budgets: Sequence[float] = (64,)
    batch_sizes: Sequence[int] = (1,)
    text_tokens: Sequence[int] = (40,)
    attn_implementations: Sequence[str] = ("sdpa",)
    new_tokens: int = 64
    rounds: int = 5
    warm_up: int = 1
    compiled: bool = False
    output: str | Path | None = None
    loading: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_numbers(batch_sizes=(self.batch_sizes, 1), text_tokens=(self.text_tokens, 2), rounds=([self.rounds], 1))
        _check_numbers(new_tokens=([self.new_tokens], 1), warm_up=([self.warm_up], 0))
        if self.output is not None:
            check_output(self.output)

    @property
    def runs(self) -> list[Run]:
        """The runs of `methods` with all `budgets`, behind the dense model."""
        return plan_runs([DENSE, *(name for name in self.methods if name != DENSE)], self.budgets)

    @classmethod
    def of(cls, *given: Any, **keywords: Any) -> Settings:
        """Of keywords, those of `load_model` among them."""
        keywords["loading"] = {name: keywords.pop(name) for name in LOADING & keywords.keys()}
        return cls(*given, **keywords)


def bench(
    model: Any = None,
    shape: str | None = None,
    methods: Sequence[str] = Settings.methods,
    budgets: Sequence[float] = Settings.budgets,
    *,
    on_progress: Callable[[str, int, int], None] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """As `measure`, of keywords: the fields of `Settings`, and what `load_model` takes."""
    return measure(Settings.of(model, shape, methods, budgets, **settings), on_progress)


def measure(settings: Settings, on_progress: Callable[[str, int, int], None] | None = None) -> dict[str, Any]:
    """Measures what every stage costs, against the dense model.

    Args:
        settings: what is measured.
        on_progress: called with what is measured, and how many of all rounds are done.

    Returns:
        `settings`, `environment`, `rates` of the machine, `results`: an entry for every run and place (see
        docs/performance.md).

    Raises:
        ValueError: for a setting that is not allowed, or an output that was begun with others.
        OSError: if the output cannot be written, or the model cannot be read.
    """
    runs, output = settings.runs, settings.output
    old = load_results(output) if output is not None and Path(output).exists() else None
    dense = open_model(settings.model, settings.shape, **settings.loading)
    described = {
        "model": settings.shape or dense.config.name_or_path.replace(str(CHECKPOINT), "reference"),
        "dtype": str(dense.dtype).removeprefix("torch."),
        **{name: getattr(settings, name) for name in ("new_tokens", "rounds", "warm_up", "compiled")},
        "runs": [run.name for run in runs],
        **plugin_files(run.method for run in runs),
    }
    placed = product(settings.batch_sizes, settings.text_tokens, settings.attn_implementations)
    places = [Place(*values) for values in placed]
    backend, threads = dense.config._attn_implementation, torch.get_num_threads()
    try:
        if old is not None:
            torch.set_num_threads(old["environment"].get("threads", threads))
        found = _start(dense, described, old, output)
        places = [place for place in places if asdict(place) not in [result["place"] for result in found["results"]]]
        progress = _Progress(on_progress, len(places) * len(MEASURES) * (settings.rounds + settings.warm_up))
        for place in places:
            found["results"] += _measure(dense, runs, place, found, progress)
            if output is not None:
                write_results(found, output)
    finally:
        dense.set_attn_implementation(backend)
        torch.set_num_threads(threads)
    return found


class _Progress:
    def __init__(self, told: Callable[[str, int, int], None] | None, total: int) -> None:
        self.told, self.done, self.total = told, 0, total

    def __call__(self, what: str) -> None:
        self.done += 1
        if self.told is not None:
            self.told(what, self.done, self.total)


def _check_numbers(**fields: tuple[Sequence[int], int]) -> None:
    for name, (values, least) in fields.items():
        if not values or min(values) < least:
            raise ValueError(f"{name}={list(values)}: whole numbers from {least} on are allowed.")


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on beside the settings."""
    found: dict[str, Any] = {**versions(), "device": device.type, "threads": torch.get_num_threads()}
    if device.type == "cuda":
        found |= {"device_name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


def _start(
    dense: Any, settings: dict[str, Any], old: dict[str, Any] | None, output: str | Path | None
) -> dict[str, Any]:
    """Results without entries, or those of an earlier run of the same benchmark."""
    new: dict[str, Any] = {"settings": settings, "environment": environment(dense.device)}
    if old is None:
        return {**new, "rates": machine_rates(dense.device, dense.dtype), "results": []}
    same_settings(Path(output or ""), old, new, "go on with the same, or choose another output.")
    return old


def _measure(
    dense: Any, runs: Sequence[Run], place: Place, found: dict[str, Any], progress: _Progress
) -> list[dict[str, Any]]:
    """Entries of all runs at one place; `found` has the settings and the machine's rates."""
    settings = found["settings"]
    dense.set_attn_implementation(place.attn_implementation)
    clock = Clock(dense.device)
    inputs = make_inputs(dense, place.batch_size, place.text_tokens)
    subjects = {
        run.name: Subject(
            dense if run.method == DENSE else llava_sparse.sparsify(dense, run.method, **run.sparsity),
            inputs,
            clock,
            settings["new_tokens"],
        )
        for run in runs
    }
    entries: dict[str, dict[str, Any]] = {}
    for name, subject in subjects.items():
        try:
            entries[name] = {"run": name, "place": asdict(place), **subject.counts(), "seconds": {}}
        except torch.OutOfMemoryError:
            entries[name] = {"run": name, "place": asdict(place), "error": "out of memory"}
    able = {name: subject for name, subject in subjects.items() if "error" not in entries[name]}
    if settings["compiled"]:
        for subject in able.values():
            subject.compile()
    try:
        _time(able, entries, place, settings, progress)
    finally:
        for subject in subjects.values():
            subject.leave()
    for name in able:
        entries[name]["floor"] = floors(dense, entries[name], found["rates"])
    # A dense model that does not fit leaves nothing to compare with.
    for name in able if DENSE in able else ():
        entries[name]["kv_visual_share"] = _visual_share(entries[name], entries[DENSE], place)
        entries[name]["flops_share"] = entries[name]["flops"] / entries[DENSE]["flops"]
        entries[name]["limit"] = entries[DENSE]["flops_causal"] / entries[name]["flops_causal"]
    return list(entries.values())


def _time(
    able: dict[str, Subject],
    entries: dict[str, dict[str, Any]],
    place: Place,
    settings: dict[str, Any],
    progress: _Progress,
) -> None:
    """Puts the times of all models at one place into their entries."""
    for measure in MEASURES:
        calls = {name: partial(_guarded, name, getattr(subject, measure)) for name, subject in able.items()}
        label = f"{measure}, batch {place.batch_size}, {place.text_tokens} words, {place.attn_implementation}"
        times: dict[str, list[float]] = {}
        while calls and not times:
            try:
                times = interleaved(calls, settings["rounds"], settings["warm_up"], partial(progress, label))
            except _Full as full:
                entries[full.name]["error"] = "out of memory"
                del able[full.name], calls[full.name]
        for name, values in times.items():
            entries[name]["seconds"][measure] = spread(values)
            if DENSE not in able:
                continue
            entries[name].setdefault("speedup", {})[measure] = spread(
                [a / b for a, b in zip(times[DENSE], values, strict=True)]
            )


class _Full(Exception):
    """The device's memory does not hold a run."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def _guarded(name: str, call: Callable[[], float]) -> float:
    try:
        return call()
    except torch.OutOfMemoryError:
        raise _Full(name) from None


def _visual_share(entry: dict[str, Any], dense: dict[str, Any], place: Place) -> float:
    """Bytes that visual tokens take in the cache, of those they take in the dense model's."""
    held, all_held = (sum(n - place.text_tokens for n in e["lengths"]) for e in (entry, dense))
    return held / all_held


class Subject:
    """A model with prompts, and what is measured of it."""

    def __init__(self, model: Any, inputs: dict[str, Tensor], clock: Clock, new_tokens: int) -> None:
        self.model, self.inputs, self.clock, self.new_tokens = model, inputs, clock, new_tokens
        self.settings: dict[str, Any] = {}  # for `generate`, where all is compiled

    @torch.inference_mode()
    def _prompt(self) -> Any:
        return self.model(**self.inputs, use_cache=True, logits_to_keep=1)

    @torch.inference_mode()
    def counts(self) -> dict[str, Any]:
        """What is counted and not timed, and the time of each stage of one prefill; warms up.

        Operations are those of one prompt; bytes those of the batch.
        """
        lengths, kv_bytes, visual_tokens = recorded_prefill(self.model, self.inputs)
        batch = len(self.inputs["input_ids"])
        one = Subject(self.model, {name: x[: len(x) // batch] for name, x in self.inputs.items()}, self.clock, 1)
        formula = prefill_flops(self.model, self.inputs, lengths)
        with stages(self.model, self.clock) as told:
            for _ in range(2):
                told()
                self._prompt()
            breakdown = told()
        return {
            "lengths": lengths,
            "visual_tokens": visual_tokens._asdict(),
            "kv_bytes": kv_bytes,
            "peak_bytes": self._peak(),
            "flops": measured_flops(one._prompt),
            "flops_by_formula": formula,
            "flops_causal": sum(formula.values()) - causal_savings(self.model.config.text_config, lengths),
            "stages": breakdown,
        }

    def _peak(self) -> int | None:
        """Bytes that a prefill needs at most beside the weights; None where torch does not count."""
        if not self.clock.on_gpu:
            return None
        device = self.clock.device
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        self._prompt()
        return torch.cuda.max_memory_allocated(device) - before

    def compile(self) -> None:
        """Compiles what a prompt goes through, and for `generate` the step that a static cache allows."""
        for part in self._compiled:
            part.compile(fullgraph=True, dynamic=False)
        # CUDA graphs for the step alone, as in transformers: those of a prompt would own the cache that they return.
        config = CompileConfig(fullgraph=True, dynamic=False, mode="reduce-overhead" if self.clock.on_gpu else None)
        # A CPU too: transformers compiles by itself on a GPU only.
        config._compile_all_devices = True
        self.settings = {"cache_implementation": "static", "compile_config": config}

    def leave(self) -> None:
        """Leaves the caller's model as it was."""
        for part in self._compiled:
            part._compiled_call_impl = None

    @property
    def _compiled(self) -> list[Any]:
        parts = parts_of(self.model)
        return parts["vision tower"] + parts["decoder"]

    def prefill(self) -> float:
        """Seconds from pixels and ids to the first token's logits."""
        return self.clock.time(self._prompt)

    def decode(self) -> float:
        """Seconds a token, behind the prompt."""
        if self.settings:
            whole, first = self._generate(DECODE_STEPS + 1), self._generate(1)
            return (whole - first) / DECODE_STEPS
        return self._step()

    def generate(self) -> float:
        """Seconds of `generate`, prompt and `new_tokens` tokens."""
        return self._generate(self.new_tokens)

    @torch.inference_mode()
    def _generate(self, count: int) -> float:
        asked = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "num_beams": 1}

        def call() -> None:
            self.model.generate(**self.inputs, **asked, **self.settings)

        return self.clock.time(call)

    @torch.inference_mode()
    def _step(self) -> float:
        """Seconds a token, without `generate` around it."""
        outputs = self._prompt()
        mask, token = self.inputs["attention_mask"], outputs.logits[:, -1].argmax(-1, keepdim=True)
        # Models with positions in three axes count on by themselves; there is no padding.
        counts = hasattr(self.model.model, "get_rope_index")

        def steps() -> None:
            nonlocal mask, token
            for _ in range(DECODE_STEPS):
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
                known = {"attention_mask": mask, "position_ids": mask.sum(-1, keepdim=True) - 1}
                said = self.model(
                    input_ids=token,
                    **({} if counts else known),
                    **{CACHE: getattr(outputs, CACHE)},
                    use_cache=True,
                )
                token = said.logits[:, -1].argmax(-1, keepdim=True)

        return self.clock.time(steps) / DECODE_STEPS
