"""The command `llava-sparse`: its flags, a dataclass for each command, and what they are handed to.

It stands outside the package, and commands import what they need when they run: `import llava_sparse` takes as long as
torch and transformers, and help should not.
"""

from __future__ import annotations

import inspect
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import MISSING, dataclass, fields
from importlib.metadata import version as installed
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_type_hints

import typer
from rich.console import Console

from llava_sparse_commands import Attention, Device, Dtype, more

app = typer.Typer(
    help="Pruning of visual tokens for LLaVA models. Without --model, the small embedded reference model is used.",
    epilog="Example: llava-sparse pope --methods dense,visionzip --budget 64. "
    "--debug, anywhere on the line, shows the traceback of an error.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(more)
log = Console(stderr=True)
INTERRUPTED = 130
REFERENCE_NOTE = (
    "llava-sparse: no --model is given, and the small reference model answers. It knows rendered scenes alone, "
    "and whether a thing is in them."
)


def command(name: str, epilog: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Makes a command of a function that takes a dataclass, whose fields are the command's flags."""

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        flags = next(iter(get_type_hints(function).values()))
        hints = get_type_hints(flags, include_extras=True)

        def call(**given: Any) -> None:
            function(flags(**given))

        call.__doc__ = function.__doc__
        call.__annotations__ = {field.name: hints[field.name] for field in fields(flags)}
        call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [
                inspect.Parameter(
                    field.name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=inspect.Parameter.empty if field.default is MISSING else field.default,
                    annotation=hints[field.name],
                )
                for field in sorted(fields(flags), key=lambda field: field.default is not MISSING)
            ]
        )
        app.command(name, epilog=epilog)(call)
        return function

    return register


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _budget(text: str | float) -> float:
    """A number of tokens, or a ratio: what has a point in it."""
    text = str(text).strip()
    try:
        return float(text) if "." in text or "e" in text.lower() else int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r}: a whole number or a ratio (0.25) is allowed") from None


def _budgets(text: str) -> list[float]:
    return [_budget(part) for part in text.split(",")]


def _check_budgets(text: str) -> str:
    try:
        _budgets(text)
    except typer.BadParameter:
        raise typer.BadParameter(
            f"{text!r}: whole numbers or ratios (0.25), separated by commas, are allowed"
        ) from None
    return text


def _check_numbers(text: str) -> str:
    try:
        _numbers(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r}: whole numbers, separated by commas, are allowed") from None
    return text


Budget = Annotated[
    float,
    typer.Option(
        parser=_budget, metavar="NUMBER", help="Visual tokens retained, as the papers' tables count, or a ratio (0.25)."
    ),
]
Budgets = Annotated[
    str,
    typer.Option(
        "--budget", "--budgets", callback=_check_budgets, help="Visual tokens retained, e.g. 192,128,64, or ratios."
    ),
]
Methods = Annotated[
    str, typer.Option(help="Methods, separated by commas; options behind colons: sparsevlm:raters=all.")
]
Prompt = Annotated[
    str | None,
    typer.Option(help=r"Template with <image> and {question}; \n is a new line. The chat template's if left out."),
]
Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="JSON file for results. Run again, it goes on where it was.")
]
Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugin", help="Python file that registers methods of your own; may be given several times."),
]


@dataclass(kw_only=True)
class Plain:
    """What all commands with methods take."""

    plugins: Plugins = None

    def prepare(self) -> None:
        from llava_sparse.preparation import prepare

        prepare(self.plugins)


@dataclass(kw_only=True)
class Model(Plain):
    """What is loaded, and where it lies."""

    model: Annotated[str | None, typer.Option(help="Hub id or folder of a LLaVA; the reference model if left out.")] = (
        None
    )
    dtype: Dtype = "auto"
    device: Device = "auto"
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Quantised by bitsandbytes.")] = False
    load_in_8bit: Annotated[bool, typer.Option("--load-in-8bit", help="Quantised by bitsandbytes.")] = False
    device_map: Annotated[str | None, typer.Option(help="auto: over all GPUs and main memory.")] = None
    max_memory: Annotated[str | None, typer.Option(help="With --device-map: 0=10GiB,cpu=30GiB.")] = None

    @property
    def loading(self) -> dict[str, Any]:
        """Keywords of `load_model`."""
        names = ("dtype", "device", "load_in_4bit", "load_in_8bit", "device_map", "max_memory", "attn_implementation")
        return {name: getattr(self, name) for name in names if hasattr(self, name)}


@dataclass(kw_only=True)
class Asking(Model):
    """How a model is asked."""

    attn_implementation: Attention = None
    prompt: Prompt = None

    @property
    def template(self) -> str | None:
        """The prompt with its new lines."""
        return None if self.prompt is None else self.prompt.replace(r"\n", "\n")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llava-sparse {installed('llava-sparse')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Shows the version.")
    ] = False,
) -> None:
    pass


@dataclass(kw_only=True)
class Pope(Asking):
    """Of `pope`."""

    dataset: Annotated[
        str, typer.Option(help="reference, lmms-lab/POPE, a parquet file, or a folder (docs/data.md).")
    ] = "reference"
    config: Annotated[
        str | None, typer.Option(help="Of the Hub's dataset: default or Full; of official files: coco, aokvqa, gqa.")
    ] = None
    annotations: Annotated[Path | None, typer.Option(help="Folder of official question files.")] = None
    images: Annotated[Path | None, typer.Option(help="Folder of their pictures.")] = None
    split: Annotated[str | None, typer.Option(help="Splits, separated by commas; all if left out.")] = None
    ids: Annotated[Path | None, typer.Option(help="File of question ids, one a line.")] = None
    variant: Annotated[str | None, typer.Option(help="8910: the questions that LLaVA's scripts score.")] = None
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per split; all if left out.")] = None
    streaming: Annotated[bool, typer.Option("--streaming", help="Read rows as they are needed.")] = False
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="List rows that cannot be used; go on.")] = False
    methods: Methods = "dense,visionzip,sparsevlm"
    budgets: Budgets = "64"
    seeds: Annotated[str, typer.Option(callback=_check_numbers, help="Of methods that draw at random, e.g. 0,1,2.")] = (
        "0"
    )
    answer_mode: Annotated[str, typer.Option(help="text; or Yes against No: logits, likelihood.")] = "text"
    controls: Annotated[
        bool,
        typer.Option(
            "--controls",
            help="What methods have to beat: random with 5 seeds, uniform, pool, the picture "
            "downsampled to as many tokens, no picture.",
        ),
    ] = False
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 16
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at a time.")] = 16
    grouping: Annotated[bool, typer.Option(help="Encode a picture once for all its questions.")] = True
    output: Output = None

    @property
    def subset(self) -> dict[str, Any]:
        """How questions are chosen."""
        names = ("config", "annotations", "images", "ids", "variant", "streaming")
        found = {**{name: getattr(self, name) for name in names}, "split": _names(self.split)}
        return {name: value for name, value in found.items() if value}


@command("pope", "Example: llava-sparse pope --methods dense,visionzip,sparsevlm --budgets 192,128,64 -o run.json")
def pope(flags: Pope) -> None:
    """Evaluate methods on POPE: accuracy, precision, recall, F1 and yes ratio, with intervals and paired tests.

    Started by `accelerate launch -m llava_sparse.cli pope` or `torchrun`, several processes share the questions.
    """
    # torchrun's name, and those of mpirun.
    ranks = (os.environ.get(name) for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"))
    first = next((rank for rank in ranks if rank), "0") == "0"
    with _advance(first) as advance:
        flags.prepare()
        from llava_sparse import evaluation
        from llava_sparse.evaluation.tables import comparisons, scores_table, spread_table

        results = evaluation.evaluate(
            evaluation.Settings(
                model=flags.model,
                dataset=flags.dataset,
                methods=evaluation.split_methods(flags.methods),
                budget=_budgets(flags.budgets),
                seeds=_numbers(flags.seeds),
                batch_size=flags.batch_size,
                limit=flags.limit,
                answer_mode=flags.answer_mode,
                prompt=flags.template,
                grouped=flags.grouping,
                skip_bad=flags.skip_bad,
                output=flags.output,
                subset=flags.subset,
                max_new_tokens=flags.max_new_tokens,
                controls=flags.controls,
                loading=flags.loading,
            ),
            on_progress=advance,
            on_notice=lambda text: log.print(f"llava-sparse: {text}", markup=False),
        )
    if not first:
        return
    for table in (scores_table(results, splits=True), comparisons(results), spread_table(results)):
        if table is not None and table.rows:
            _print(table)
    for message in results.questions.skipped:
        log.print(f"skipped: {message}", markup=False)
    log.print(
        f"Again: {evaluation.results.repeat_line(results.settings)}", soft_wrap=True, markup=False, highlight=False
    )
    if flags.output is not None:
        log.print(f"Settings, scores and every answer: {flags.output}", markup=False)


def _print(table: Any) -> None:
    """A table: in boxes on a terminal, plain lines elsewhere."""
    out = Console()
    if out.is_terminal:
        out.print(table.rich())
    else:
        typer.echo(f"{table.title}\n\n{table.plain()}\n\n{table.caption}\n")


@dataclass(kw_only=True)
class Shown(Asking):
    """What a model is shown and asked."""

    images: Annotated[
        list[Path], typer.Argument(metavar="PICTURE...", help="Pictures; with --video, a video or a folder of frames.")
    ]
    question: Annotated[str, typer.Argument(help="A question about them.")]
    budget: Budget = 64
    video: Annotated[bool, typer.Option("--video", help="Show a video to a model that takes some.")] = False
    frames: Annotated[int, typer.Option(help="Of a video, evenly spaced.")] = 8
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer at most.")] = 128

    def open(self, methods: list[str]) -> tuple[list[Any], Any]:
        """The pictures, or the frames of the video, and the model, once all that is cheap has been checked."""
        from llava_sparse.evaluation import load_model
        from llava_sparse.evaluation.model import check_methods, check_prompt
        from llava_sparse.evaluation.videos import read_frames
        from llava_sparse.families import model_types
        from llava_sparse.pictures import read_picture

        check_methods(methods)
        if self.template is not None:
            check_prompt(self.template, 1 if self.video else len(self.images))
        if self.video and len(self.images) > 1:
            raise ValueError(
                f"--video: {len(self.images)} files are given; one video, or one folder of frames, is allowed."
            )
        shown = read_frames(self.images[0], self.frames) if self.video else [read_picture(x) for x in self.images]
        return shown, load_model(self.model, model_types=model_types(), **self.loading)

    def name_reference(self) -> None:
        """Says who answers where nobody said who should."""
        if self.model is None:
            log.print(REFERENCE_NOTE, soft_wrap=True, markup=False, highlight=False)


@dataclass(kw_only=True)
class Ask(Shown):
    """Of `ask`."""

    method: Annotated[str, typer.Option(help="A method, or dense.")] = "visionzip"


@command("ask", 'Example: llava-sparse ask picture.jpg "Is there a dog in the image?" --method visionzip --budget 64')
def ask(flags: Ask) -> None:
    """Ask a model about a picture, some pictures, or one video; how many visual tokens are left goes to stderr."""
    with _status("loading"):
        flags.prepare()
        shown, loaded = flags.open([flags.method])
        from llava_sparse.visualize import trace
    traced = trace(
        loaded, shown, flags.question, flags.method, flags.budget, flags.template, flags.video,
        drawn=False, max_new_tokens=flags.max_new_tokens,
    )  # fmt: skip
    flags.name_reference()
    typer.echo(traced.answer)
    log.print(f"{flags.method}: {traced.flow} visual tokens", soft_wrap=True, markup=False)


@dataclass(kw_only=True)
class Visualize(Shown):
    """Of `visualize`."""

    methods: Methods = "visionzip,sparsevlm"
    output: Annotated[Path, typer.Option(help="The figure: a .png, .svg or .pdf file.")] = Path("figure.png")


@command(
    "visualize",
    'Example: llava-sparse visualize picture.jpg "Is there a dog in the image?" --methods visionzip,sparsevlm',
)
def visualize(flags: Visualize) -> None:
    """Draw which visual tokens methods keep, merge and drop, and which words of the question decide."""
    with _status("loading"):
        flags.prepare()
        from llava_sparse.drawing import draw
        from llava_sparse.evaluation import split_methods
        from llava_sparse.visualize import check_figure_output, trace

        check_figure_output(flags.output)
        names = split_methods(flags.methods)
        shown, loaded = flags.open(names)
    asked: dict[str, Any] = {"prompt": flags.template, "video": flags.video, "max_new_tokens": flags.max_new_tokens}
    traces = [trace(loaded, shown, flags.question, name, flags.budget, **asked) for name in names]
    draw(flags.question, traces).savefig(flags.output, dpi=160)
    flags.name_reference()
    for traced in traces:
        typer.echo(f"{traced.method}: {traced.answer} ({traced.flow} visual tokens)")
    log.print(f"Figure: {flags.output}", soft_wrap=True, markup=False)


@dataclass(kw_only=True)
class PopeBuild:
    """Of `pope-build`."""

    objects: Annotated[Path, typer.Option(help="Objects of every image: JSON lines, or COCO's instances.")]
    output: Annotated[Path, typer.Option(help="Folder for the three question files.")]
    questions: Annotated[int, typer.Option(min=2, help="Questions per image and split; even.")] = 6
    images_limit: Annotated[int | None, typer.Option(min=1, help="Images; all if left out.")] = None
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0


@command(
    "pope-build", "Example: llava-sparse pope-build --objects instances_val2014.json --images-limit 500 --output built"
)
def pope_build(flags: PopeBuild) -> None:
    """Build POPE's questions from object annotations: random, popular and adversarial."""
    with _status("building"):
        from llava_sparse.evaluation.tasks.build import write_pope

        built = write_pope(flags.objects, flags.output, flags.questions, flags.images_limit, flags.seed)
    for file in built.files:
        typer.echo(file)
    typer.echo(
        f"{built.questions:,} questions a file about {built.images:,} images; {built.skipped:,} images skipped: "
        f"fewer than {flags.questions // 2} distinct objects, or than {flags.questions // 2} absent categories.",
        err=True,
    )


@dataclass(kw_only=True)
class Report:
    """Of `report`."""

    results: Annotated[list[Path], typer.Argument(help="Results files of pope, or folders of them.")]
    html: Annotated[Path | None, typer.Option(help="The page; report.html if nothing else is to be written.")] = None
    markdown: Annotated[Path | None, typer.Option(help="The same in Markdown, without figures.")] = None
    objects: Annotated[Path | None, typer.Option(help="Boxes of the objects in the pictures, JSON lines.")] = None
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures.")] = None


@command("report", "Example: llava-sparse report results/run.json --html report.html")
def report(flags: Report) -> None:
    """Write a page on results: tables with intervals and tests, figures, failure modes, examples."""
    html = Path("report.html") if flags.html is None and flags.markdown is None else flags.html
    with _status("writing the report"):
        from llava_sparse.evaluation.report import report as write_report

        write_report(flags.results, html, flags.markdown, objects=flags.objects, images=flags.images)
    for path in (html, flags.markdown):
        if path is not None:
            log.print(f"Report: {path}", soft_wrap=True, markup=False)


@dataclass(kw_only=True)
class Bench(Model):
    """Of `bench`."""

    shape: Annotated[
        str | None, typer.Option(help="Random weights of a shape: llava-1.5-7b, qwen2.5-vl-7b, small, ...")
    ] = None
    methods: Methods = "visionzip,sparsevlm"
    budgets: Budgets = "64"
    batch_sizes: Annotated[str, typer.Option(callback=_check_numbers, help="Prompts at a time, e.g. 1,8,32.")] = "1"
    text_tokens: Annotated[str, typer.Option(callback=_check_numbers, help="Words of a prompt, e.g. 40,400.")] = "40"
    attn_implementations: Annotated[
        str, typer.Option(help="Attention backends: sdpa, eager, flash_attention_2, ...")
    ] = "sdpa"
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate, end to end.")] = 64
    rounds: Annotated[int, typer.Option(min=1, help="Measurements, dense and pruned in turn.")] = 5
    warm_up: Annotated[int, typer.Option(min=0, help="Rounds before, which do not count.")] = 1
    compiled: Annotated[bool, typer.Option("--compile", help="Compile all models, the dense one too.")] = False
    output: Output = None
    plot: Annotated[Path | None, typer.Option(help="The figure: a .png, .svg or .pdf file.")] = None
    profile: Annotated[Path | None, typer.Option(help="Folder for profiler traces; nothing is timed then.")] = None
    analytic: Annotated[
        bool, typer.Option("--analytic", help="Arithmetic and memory of a shape by formula; no weights are made.")
    ] = False


@command(
    "bench",
    "Example: llava-sparse bench --shape small --methods visionzip,sparsevlm --budgets 192,64 --batch-sizes 1,4",
)
def bench(flags: Bench) -> None:
    """Measure what every stage costs: time, arithmetic, cache and memory, against the dense model."""
    if flags.analytic:
        _print_analytic(flags)
        return
    from llava_sparse.visualize import check_figure_output

    if flags.plot is not None:
        check_figure_output(flags.plot)
    with _advance(True, unit="rounds") as advance:
        flags.prepare()
        from llava_sparse import benchmark
        from llava_sparse.evaluation import split_methods

        settings = benchmark.Settings(
            model=flags.model,
            shape=flags.shape,
            methods=split_methods(flags.methods),
            budgets=_budgets(flags.budgets),
            batch_sizes=_numbers(flags.batch_sizes),
            text_tokens=_numbers(flags.text_tokens),
            attn_implementations=_names(flags.attn_implementations) or (),
            new_tokens=flags.new_tokens,
            rounds=flags.rounds,
            warm_up=flags.warm_up,
            compiled=flags.compiled,
            output=flags.output,
            loading=flags.loading,
        )
        if flags.profile is not None:
            tables = benchmark.profile_runs(settings, flags.profile)
        else:
            results = benchmark.measure(settings, advance)
    if flags.profile is not None:
        for run, text in tables.items():
            typer.echo(f"{run}\n{text}")
        return
    for table in benchmark.tables(results):
        _print(table)
    if flags.plot is not None:
        benchmark.plot(results).savefig(flags.plot, dpi=160)
        log.print(f"Figure: {flags.plot}", soft_wrap=True, markup=False)


def _print_analytic(flags: Bench) -> None:
    """The tables of `bench --analytic`."""
    if flags.shape is None or flags.model is not None:
        raise ValueError("--analytic computes from sizes alone: --shape NAME is needed, and --model is not allowed.")
    flags.prepare()
    from llava_sparse.benchmark import analytic, analytic_table, memory_table
    from llava_sparse.evaluation import split_methods

    words = _numbers(flags.text_tokens)[0]
    entries = analytic(flags.shape, split_methods(flags.methods), _budgets(flags.budgets), words)
    for table in (analytic_table, memory_table):
        _print(table(flags.shape, entries))


@command("methods", "Example: llava-sparse methods")
def methods(flags: Plain) -> None:
    """List the methods, with their kind, options, costs and papers."""
    from llava_sparse.method_table import print_methods
    from llava_sparse.plugins import load_plugins

    load_plugins(flags.plugins)
    print_methods()


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; an error is one line on stderr and an exit code that is not 0.

    Args:
        arguments: without the program's name; None for those of the process.
    """
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        code = app(given or ["--help"], prog_name="llava-sparse", standalone_mode=False) or 0
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        _fail(_one_line(error), getattr(error, "exit_code", 1))
    if code == INTERRUPTED:
        _fail("interrupted", code)
    sys.exit(code)


def _one_line(error: Exception) -> str:
    """What to tell about an error; that of the command line's own parser tells how it is used right."""
    if hasattr(error, "format_message"):
        return f"{' '.join(error.format_message().split()).rstrip('.')}. See llava-sparse --help."
    text = " ".join(str(error).split())
    if type(error).__name__ == "OutOfMemoryError":
        return "out of memory: --load-in-8bit or --load-in-4bit, --device-map auto, or a smaller batch need less."
    expected = isinstance(error, (ValueError, OSError)) and text
    return text if expected else f"{type(error).__name__}: {text or 'no message'} (--debug shows where)"


def _fail(message: str, code: int) -> NoReturn:
    print(f"llava-sparse: error: {message}", file=sys.stderr)
    sys.exit(code)


def _advance(shown: bool, **kwargs: Any) -> Any:
    from llava_sparse.progress import Advance

    return Advance(log, shown, **kwargs)


def _status(text: str) -> AbstractContextManager[object]:
    """A spinner; nothing where stderr is a file, in which rich would leave an empty line."""
    return log.status(text) if log.is_terminal else nullcontext()


if __name__ == "__main__":
    main()
