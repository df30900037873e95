"""The command `llava-sparse`.

It stands outside the package, and commands import what they need when they run: `import llava_sparse` takes as long as
torch and transformers, and help should not.
"""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, NoReturn

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

Model = Annotated[str | None, typer.Option(help="Hub id or folder of a LLaVA; the reference model if left out.")]
Images = Annotated[
    list[Path], typer.Argument(metavar="PICTURE...", help="Pictures; with --video, a video or a folder of frames.")
]
Question = Annotated[str, typer.Argument(help="A question about them.")]
Video = Annotated[bool, typer.Option("--video", help="Show a video to a model that takes some.")]
Frames = Annotated[int, typer.Option(help="Of a video, evenly spaced.")]
Prompt = Annotated[
    str | None,
    typer.Option(
        help=r"Template with <image> and {question}; \n is a new line. By the model's own chat template if left out; "
        "LLaVA-1.5's where it has none."
    ),
]
Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugin", help="Python file that registers methods of your own; may be given several times."),
]


def _version(asked: bool) -> None:
    if asked:
        # Of the package's metadata: the package itself would import torch.
        from importlib.metadata import version

        typer.echo(f"llava-sparse {version('llava-sparse')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


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


@app.command(epilog="Example: llava-sparse pope --methods dense,visionzip,sparsevlm --budgets 192,128,64 -o run.json")
def pope(
    model: Model = None,
    dataset: Annotated[
        str, typer.Option(help="reference, lmms-lab/POPE, a parquet file, or a folder (docs/data.md).")
    ] = "reference",
    config: Annotated[str | None, typer.Option(help="Configuration of the Hub's dataset: default or Full.")] = None,
    annotations: Annotated[Path | None, typer.Option(help="Folder of official question files.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of their pictures.")] = None,
    split: Annotated[str | None, typer.Option(help="Splits, separated by commas; all if left out.")] = None,
    ids: Annotated[Path | None, typer.Option(help="File of question ids, one a line.")] = None,
    variant: Annotated[str | None, typer.Option(help="8910: the questions that LLaVA's scripts score.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per split; all if left out.")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read rows as they are needed.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="List rows that cannot be used; go on.")] = False,
    methods: Annotated[
        str, typer.Option(help="Methods, separated by commas; options behind colons: sparsevlm:raters=all.")
    ] = "dense,visionzip,sparsevlm",
    budgets: Annotated[
        str,
        typer.Option(
            "--budget", "--budgets", callback=_check_budgets, help="Visual tokens retained, e.g. 192,128,64, or ratios."
        ),
    ] = "64",
    seeds: Annotated[
        str, typer.Option(callback=_check_numbers, help="Of methods that draw at random, e.g. 0,1,2.")
    ] = "0",
    answer_mode: Annotated[str, typer.Option(help="text; or Yes against No: logits, likelihood.")] = "text",
    prompt: Prompt = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at a time.")] = 16,
    grouping: Annotated[bool, typer.Option(help="Encode a picture once for all its questions.")] = True,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file for results. Run again, it goes on where it was.")
    ] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    attn_implementation: Attention = None,
    plugins: Plugins = None,
) -> None:
    """Evaluate methods on POPE: accuracy, precision, recall, F1 and yes ratio, with intervals and paired tests.

    Started by `accelerate launch -m llava_sparse.cli pope` or `torchrun`, several processes share the questions.
    """
    # torchrun's name, and those of mpirun.
    ranks = (os.environ.get(name) for name in ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK"))
    first = next((rank for rank in ranks if rank), "0") == "0"
    subset = {
        "config": config, "annotations": annotations, "images": images, "split": _names(split), "ids": ids,
        "variant": variant, "streaming": streaming,
    }  # fmt: skip
    with _advance(first) as advance:
        _prepare(plugins)
        from llava_sparse.evaluation import comparison_table, evaluate_pope, split_methods, table

        results = evaluate_pope(
            model,
            dataset,
            split_methods(methods),
            _budgets(budgets),
            seeds=_numbers(seeds),
            batch_size=batch_size,
            limit=limit,
            answer_mode=answer_mode,
            prompt=_template(prompt),
            grouped=grouping,
            skip_bad=skip_bad,
            output=output,
            on_progress=advance,
            on_notice=lambda text: log.print(f"llava-sparse: {text}", markup=False),
            subset={name: value for name, value in subset.items() if value},
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
        )
    if not first:
        return
    out = Console()
    if not out.is_terminal:
        out = Console(width=120)
    out.print(table(results))
    if results["comparisons"]:
        out.print(comparison_table(results))
    for message in results["questions"]["skipped"]:
        log.print(f"skipped: {message}", markup=False)
    if output is not None:
        log.print(f"Settings, scores and every answer: {output}", markup=False)


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


@app.command(
    epilog='Example: llava-sparse ask picture.jpg "Is there a dog in the image?" --method visionzip --budget 64'
)
def ask(
    images: Images,
    question: Question,
    model: Model = None,
    method: Annotated[str, typer.Option(help="A method, or dense.")] = "visionzip",
    budget: Budget = 64,
    prompt: Prompt = None,
    video: Video = False,
    frames: Frames = 8,
    dtype: Dtype = "auto",
    device: Device = "auto",
    attn_implementation: Attention = None,
    plugins: Plugins = None,
) -> None:
    """Ask a model about a picture, some pictures, or one video; how many visual tokens are left goes to stderr."""
    loading = {"name": model, "dtype": dtype, "device": device, "attn_implementation": attn_implementation}
    with _status("loading"):
        _prepare(plugins)
        shown, loaded = _open(images, video, frames, [method], prompt, loading)
        from llava_sparse.visualize import trace
    traced = trace(loaded, shown, question, method, budget, _template(prompt), video, drawn=False)
    _name_reference(model)
    typer.echo(traced.answer)
    log.print(f"{method}: {traced.flow} visual tokens", soft_wrap=True, markup=False)


@app.command(
    epilog='Example: llava-sparse visualize picture.jpg "Is there a dog in the image?" --methods visionzip,sparsevlm'
)
def visualize(
    images: Images,
    question: Question,
    model: Model = None,
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "visionzip,sparsevlm",
    budget: Budget = 64,
    prompt: Prompt = None,
    video: Video = False,
    frames: Frames = 8,
    output: Annotated[Path, typer.Option(help="The figure: a .png, .svg or .pdf file.")] = Path("figure.png"),
    dtype: Dtype = "auto",
    device: Device = "auto",
    attn_implementation: Attention = None,
    plugins: Plugins = None,
) -> None:
    """Draw which visual tokens methods keep, merge and drop, and which words of the question decide."""
    loading = {"name": model, "dtype": dtype, "device": device, "attn_implementation": attn_implementation}
    with _status("loading"):
        _prepare(plugins)
        from llava_sparse.drawing import draw
        from llava_sparse.evaluation import split_methods
        from llava_sparse.visualize import check_figure_output, trace

        check_figure_output(output)
        names = split_methods(methods)
        shown, loaded = _open(images, video, frames, names, prompt, loading)
    traces = [trace(loaded, shown, question, name, budget, _template(prompt), video) for name in names]
    draw(question, traces).savefig(output, dpi=160)
    _name_reference(model)
    for traced in traces:
        typer.echo(f"{traced.method}: {traced.answer} ({traced.flow} visual tokens)")
    log.print(f"Figure: {output}", soft_wrap=True, markup=False)


def _open(
    images: list[Path], video: bool, frames: int, methods: list[str], prompt: str | None, loading: dict[str, Any]
) -> tuple[list[Any], Any]:
    """The pictures of a command, or the frames of its video, and its model, once all that is cheap has been checked."""
    from llava_sparse.evaluation import load_model
    from llava_sparse.evaluation.models import check_methods, check_prompt
    from llava_sparse.evaluation.videos import read_frames
    from llava_sparse.families import model_types
    from llava_sparse.pictures import read_picture

    check_methods(methods)
    if prompt is not None:
        check_prompt(_template(prompt) or "", 1 if video else len(images))
    if video and len(images) > 1:
        raise ValueError(f"--video: {len(images)} files are given; one video, or one folder of frames, is allowed.")
    shown = read_frames(images[0], frames) if video else [read_picture(image) for image in images]
    return shown, load_model(**loading, model_types=model_types())


def _name_reference(model: str | None) -> None:
    """Says who answers where nobody said who should."""
    if model is None:
        log.print(
            "llava-sparse: no --model is given, and the small reference model answers. It knows rendered scenes alone, "
            "and whether a thing is in them.",
            soft_wrap=True, markup=False, highlight=False,
        )  # fmt: skip


def _template(prompt: str | None) -> str | None:
    return None if prompt is None else prompt.replace(r"\n", "\n")


@app.command(
    "pope-build",
    epilog="Example: llava-sparse pope-build --objects instances_val2014.json --images-limit 500 --output built",
)
def pope_build(
    objects: Annotated[Path, typer.Option(help="Objects of every image: JSON lines, or COCO's instances.")],
    output: Annotated[Path, typer.Option(help="Folder for the three question files.")],
    questions: Annotated[int, typer.Option(min=2, help="Questions per image and split; even.")] = 6,
    images_limit: Annotated[int | None, typer.Option(min=1, help="Images; all if left out.")] = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
) -> None:
    """Build POPE's questions from object annotations: random, popular and adversarial."""
    with _status("building"):
        from llava_sparse.evaluation.build import write_pope

        built = write_pope(objects, output, questions, images_limit, seed)
    for file in built.files:
        typer.echo(file)
    typer.echo(
        f"{built.questions:,} questions a file about {built.images:,} images; {built.skipped:,} images skipped: "
        f"fewer than {questions // 2} distinct objects, or than {questions // 2} absent categories.",
        err=True,
    )


@app.command(epilog="Example: llava-sparse report results/run.json --html report.html")
def report(
    results: Annotated[list[Path], typer.Argument(help="Results files of pope, or folders of them.")],
    html: Annotated[Path | None, typer.Option(help="The page; report.html if nothing else is to be written.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="The same in Markdown, without figures.")] = None,
    objects: Annotated[Path | None, typer.Option(help="Boxes of the objects in the pictures, JSON lines.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures.")] = None,
) -> None:
    """Write a page on results: tables with intervals and tests, figures, failure modes, examples."""
    if html is None and markdown is None:
        html = Path("report.html")
    with _status("writing the report"):
        from llava_sparse.evaluation.html_report import report as write_report

        write_report(results, html, markdown, objects=objects, images=images)
    for path in (html, markdown):
        if path is not None:
            log.print(f"Report: {path}", soft_wrap=True, markup=False)


@app.command(
    epilog="Example: llava-sparse bench --shape small --methods visionzip,sparsevlm --budgets 192,64 --batch-sizes 1,4"
)
def bench(
    model: Model = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights of a shape: llava-1.5-7b, llava-1.5-13b, small.")
    ] = None,
    methods: Annotated[
        str, typer.Option(help="Methods, separated by commas; options behind colons.")
    ] = "visionzip,sparsevlm",
    budgets: Annotated[
        str, typer.Option("--budget", "--budgets", callback=_check_budgets, help="Visual tokens retained, or ratios.")
    ] = "64",
    batch_sizes: Annotated[str, typer.Option(callback=_check_numbers, help="Prompts at a time, e.g. 1,8,32.")] = "1",
    text_tokens: Annotated[str, typer.Option(callback=_check_numbers, help="Words of a prompt, e.g. 40,400.")] = "40",
    attn_implementations: Annotated[
        str, typer.Option(help="Attention backends: sdpa, eager, flash_attention_2, ...")
    ] = "sdpa",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate, end to end.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements, dense and pruned in turn.")] = 5,
    warm_up: Annotated[int, typer.Option(min=0, help="Rounds before, which do not count.")] = 1,
    compiled: Annotated[bool, typer.Option("--compile", help="Compile all models, the dense one too.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="JSON file for results. Run again, it goes on where it was.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="The figure: a .png, .svg or .pdf file.")] = None,
    profile: Annotated[Path | None, typer.Option(help="Folder for profiler traces; nothing is timed then.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    plugins: Plugins = None,
) -> None:
    """Measure what every stage costs: time, arithmetic, cache and memory, against the dense model."""
    from llava_sparse.visualize import check_figure_output

    if plot is not None:
        check_figure_output(plot)
    with _advance(True, unit="rounds") as advance:
        _prepare(plugins)
        from llava_sparse.benchmark import bench as run_bench
        from llava_sparse.benchmark import plot as draw_plot
        from llava_sparse.benchmark import profile as run_profile
        from llava_sparse.benchmark import stage_table, table
        from llava_sparse.evaluation import split_methods

        names, places = split_methods(methods), (_numbers(batch_sizes), _numbers(text_tokens))
        if profile is not None:
            tables = run_profile(
                model, shape, names, _budgets(budgets), batch_size=places[0][0], text_tokens=places[1][0],
                dtype=dtype, device=device, folder=profile,
            )  # fmt: skip
        else:
            results = run_bench(
                model,
                shape,
                names,
                _budgets(budgets),
                batch_sizes=places[0],
                text_tokens=places[1],
                attn_implementations=_names(attn_implementations) or (),
                new_tokens=new_tokens,
                rounds=rounds,
                warm_up=warm_up,
                compiled=compiled,
                dtype=dtype,
                device=device,
                output=output,
                on_progress=advance,
            )
    if profile is not None:
        for run, text in tables.items():
            typer.echo(f"{run}\n{text}")
        return
    out = Console()
    out = out if out.is_terminal else Console(width=200)
    out.print(table(results))
    out.print(stage_table(results))
    if plot is not None:
        draw_plot(results).savefig(plot, dpi=160)
        log.print(f"Figure: {plot}", soft_wrap=True, markup=False)


@app.command(epilog="Example: llava-sparse methods")
def methods(plugins: Plugins = None) -> None:
    """List the methods, with their kind, options, costs and papers."""
    from llava_sparse.method_table import print_methods
    from llava_sparse.plugins import load_plugins

    load_plugins(plugins)
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
    expected = isinstance(error, (ValueError, OSError)) and text
    return text if expected else f"{type(error).__name__}: {text or 'no message'} (--debug shows where)"


def _fail(message: str, code: int) -> NoReturn:
    print(f"llava-sparse: error: {message}", file=sys.stderr)
    sys.exit(code)


def _prepare(plugins: list[Path] | None) -> None:
    from llava_sparse.preparation import prepare

    prepare(plugins)


def _advance(shown: bool, **kwargs: Any) -> Any:
    from llava_sparse.progress import Advance

    return Advance(log, shown, **kwargs)


def _status(text: str) -> AbstractContextManager[object]:
    """A spinner; nothing where stderr is a file, in which rich would leave an empty line."""
    return log.status(text) if log.is_terminal else nullcontext()


if __name__ == "__main__":
    main()
