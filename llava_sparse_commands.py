"""Commands of `llava-sparse` that hand a model, or results, to other programs; part of llava_sparse_cli."""

from __future__ import annotations

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
