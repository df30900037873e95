"""The command `llava-sparse`.

Commands import what they need when they run: torch and transformers take seconds, and help should not.
"""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

app = typer.Typer(
    help="Pruning of visual tokens for LLaVA models. Without --model, the small embedded reference model is used.",
    epilog="Example: llava-sparse pope --methods dense,visionzip --budget 64. "
    "--debug, anywhere on the line, shows the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
log = Console(stderr=True)
INTERRUPTED = 130

Model = Annotated[str | None, typer.Option(help="Hub id or folder of a LLaVA; the reference model if left out.")]
Budget = Annotated[int, typer.Option(help="Visual tokens retained, as the papers' tables count.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: what suits the device.")]
Device = Annotated[str, typer.Option(help="What torch calls it, or auto: the first GPU, else the CPU.")]
Attention = Annotated[str | None, typer.Option(help="Attention backend: sdpa, eager, flash_attention_2, ...")]


@app.command(epilog="Example: llava-sparse pope --methods dense,visionzip,sparsevlm --budget 64 --output results.json")
def pope(
    model: Model = None,
    dataset: Annotated[str, typer.Option(help="reference, lmms-lab/POPE, or a folder laid out alike.")] = "reference",
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "dense,visionzip,sparsevlm",
    budget: Budget = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions answered at a time.")] = 8,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per split; all if left out.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for settings, scores and every answer.")] = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    attn_implementation: Attention = None,
) -> None:
    """Evaluate methods on POPE: accuracy, precision, recall, F1 and yes ratio of three splits."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=log, disable=not log.is_terminal) as progress:
        loading = progress.add_task("loading", total=None)
        tasks: dict[str, TaskID] = {}

        def advance(method: str, done: int, total: int) -> None:
            if method not in tasks:
                progress.update(loading, visible=False)
                tasks[method] = progress.add_task(method)
            progress.update(tasks[method], completed=done, total=total)

        _prepare()
        from .evaluation import evaluate_pope, table

        results = evaluate_pope(
            model,
            dataset,
            [name.strip() for name in methods.split(",")],
            budget,
            batch_size=batch_size,
            limit=limit,
            output=output,
            on_progress=advance,
            dtype=dtype,
            device=device,
            attn_implementation=attn_implementation,
        )
    out = Console()
    if not out.is_terminal:
        out = Console(width=120)
    out.print(table(results))
    if output is not None:
        log.print(f"Settings, scores and every answer: {output}")


@app.command(
    epilog='Example: llava-sparse ask picture.jpg "Is there a dog in the image?" --method visionzip --budget 64'
)
def ask(
    image: Annotated[Path, typer.Argument(help="A picture.")],
    question: Annotated[str, typer.Argument(help="A question about it.")],
    model: Model = None,
    method: Annotated[str, typer.Option(help="A method, or dense.")] = "visionzip",
    budget: Budget = 64,
    dtype: Dtype = "auto",
    device: Device = "auto",
    attn_implementation: Attention = None,
) -> None:
    """Ask a model about one picture."""
    with _status("loading"):
        _prepare()
        from .evaluation import ask as ask_model
        from .evaluation import load_model
        from .evaluation.models import check_methods, read_picture

        check_methods([method])
        picture = read_picture(image)
        loaded = load_model(model, dtype, device, attn_implementation)
    pruned = loaded.with_method(method, budget)
    typer.echo(ask_model(pruned, loaded.processor, picture, question, loaded.prompt(short_answer=False)))


@app.command(epilog="Example: llava-sparse methods")
def methods() -> None:
    """List the methods, with their kind, options and papers."""
    from .modeling.methods import METHODS

    for name, method in sorted(METHODS.items()):
        options = ", ".join(f"{option}={default!r}" for option, default in method.option_defaults.items())
        typer.echo(f"{name} ({method.kind}): {method.summary}")
        typer.echo(f"    options: {options or 'none'}")
        typer.echo(f"    paper: {method.paper}")


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line; an error is one line on stderr and an exit code that is not 0.

    Args:
        arguments: without the program's name; None for those of the process.
    """
    given = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        code = app(given, prog_name="llava-sparse", standalone_mode=False) or 0
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


def _status(text: str) -> AbstractContextManager[object]:
    """A spinner; nothing where stderr is a file, in which rich would leave an empty line."""
    return log.status(text) if log.is_terminal else nullcontext()


def _prepare() -> None:
    """Leaves the screen to our own progress and messages, and busy cores to others."""
    import datasets
    import huggingface_hub
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    datasets.utils.logging.set_verbosity_error()
    if "OMP_NUM_THREADS" not in os.environ and hasattr(os, "getloadavg"):
        torch.set_num_threads(_threads(torch.get_num_threads(), os.cpu_count() or 1, os.getloadavg()[0]))


def _threads(wanted: int, cores: int, load: float) -> int:
    """As many threads as there are free cores, half of those wanted at least.

    Threads of PyTorch's OpenMP spin while they wait for each other: where they have to share their cores with others,
    two can be several times slower than one.
    """
    return max(1, wanted // 2, min(wanted, round(cores - load)))


if __name__ == "__main__":
    main()
