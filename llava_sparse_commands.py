"""Commands of `llava-sparse` that hand a model, or results, to other programs; part of llava_sparse_cli."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

more = typer.Typer()

Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: what suits the device.")]
Device = Annotated[str, typer.Option(help="What torch calls it, or auto: the first GPU, else the CPU.")]
Attention = Annotated[str | None, typer.Option(help="Attention backend: sdpa, eager, flash_attention_2, ...")]


def say(text: str) -> None:
    typer.echo(f"llava-sparse: {text}", err=True)


@more.command(epilog="Example: llava-sparse serve saved/visionzip --port 8000")
def serve(
    folder: Annotated[str, typer.Argument(help="Folder, or Hub id, of a saved pruned model and its processor.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine reach 0.0.0.0.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    dtype: Dtype = "auto",
    device: Device = "auto",
    attn_implementation: Attention = None,
) -> None:
    """Serve a pruned model: OpenAI's chat completions with pictures, by `transformers serve` (docs/serving.md)."""
    from llava_sparse.integrations import serving

    settings = serving.describe(serving.check_servable(folder))
    say(f"{folder} ({settings}) at http://{host}:{port}/v1")
    if host not in serving.LOOPBACK:
        say(f"{host} can be reached from elsewhere, and nobody is asked who they are.")
    serving.serve(folder, host, port, dtype, device, attn_implementation)


@more.command(epilog="Example: llava-sparse compare dense/..._samples_pope.jsonl pruned/..._samples_pope.jsonl")
def compare(
    first: Annotated[Path, typer.Argument(help="Samples that lmms-eval logged (--log_samples) of one run.")],
    second: Annotated[Path, typer.Argument(help="Those of the other, on the same questions.")],
    metric: Annotated[str | None, typer.Option(help="What is compared; the first metric if left out.")] = None,
    cluster: Annotated[str | None, typer.Option(help="Field that says which picture a question is about.")] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap and the test.")] = 0,
) -> None:
    """Compare two runs of lmms-eval: the difference, its interval and a paired test, by picture."""
    from llava_sparse.integrations import paired

    found = paired.compare(first, second, metric, cluster, seed=seed)
    typer.echo(paired.summary(found, (str(first), str(second))))


@more.command(
    epilog="Example: llava-sparse push llava-hf/llava-1.5-7b-hf --method visionzip --repo you/zip --config-only"
)
def push(
    model: Annotated[str, typer.Argument(help="Folder of a saved pruned model, or, with --method, any model's id.")],
    repo: Annotated[str, typer.Option(help="Where to: owner/name.")],
    method: Annotated[str | None, typer.Option(help="Prune a stock model by this method.")] = None,
    budget: Annotated[str, typer.Option(help="Visual tokens retained, or a ratio (0.25), with --method.")] = "64",
    config_only: Annotated[bool, typer.Option("--config-only", help="Settings alone, no weights.")] = False,
    base_model: Annotated[str | None, typer.Option(help="Hub id of the weights; by default the model's own.")] = None,
    license: Annotated[str | None, typer.Option(help="As the Hub names it; the base model's if left out.")] = None,
    results: Annotated[Path | None, typer.Option(help="Results file of llava-sparse pope on a Hub dataset.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Others may not see it.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Commit to a repository that is there.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be pushed; contact nobody.")] = False,
) -> None:
    """Push a pruned model to the Hub, or its settings alone, with a model card; in one commit or not at all."""
    from llava_sparse import hub

    given = {
        "config_only": config_only, "base_model": base_model, "license": license, "results": results,
        "private": private, "update": update, "dry_run": dry_run,
    }  # fmt: skip
    if method is None:
        done = hub.push(model, repo, **given)  # type: ignore[arg-type]
    else:
        ratio = "." in budget
        settings = {"sparse_method": method, "sparse_budget": float(budget) if ratio else int(budget)}
        done = hub.push_stock(model, repo, settings, **given)
    for name, size in done.files.items():
        typer.echo(f"{size:>14,}  {name}")
    say(f"dry run: nothing was pushed to {repo}" if done.url is None else f"pushed: {done.url}")
