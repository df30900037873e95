"""`transformers serve` for pruned models: OpenAI's chat completions over HTTP, with pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor, PreTrainedConfig
from transformers.models.auto import modeling_auto

from llava_sparse.families import FAMILIES, supported
from llava_sparse.modeling.pruning_settings import FIELDS

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def register_names() -> None:
    """Lets transformers' server find the sparse classes by model type, which it looks up in two tables; idempotent."""
    for family in FAMILIES.values():
        name = f"Sparse{family.prefix}ForConditionalGeneration"
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[family.sparse_type] = name
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[family.sparse_type] = name


def check_servable(folder: str | Path) -> PreTrainedConfig:
    """The configuration of a folder, or Hub id, that the server can load and prompt.

    Raises:
        ValueError: if it is no saved pruned model, its settings are not allowed, or it has no chat template.
        OSError: if there is no such folder, or the Hub cannot be reached.
    """
    if Path(folder).is_dir() and not (Path(folder) / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: this is no model folder, there is no config.json in it.")
    content, _ = PreTrainedConfig.get_config_dict(folder)
    if content.get("model_type") not in {family.sparse_type for family in FAMILIES.values()}:
        raise ValueError(
            f"{folder}: model_type {content.get('model_type')!r} is no pruned model that was saved; load one of "
            f"{supported()} with sparse_method=... and save model and processor to a folder, or, without pruning, use "
            "`transformers serve`."
        )
    config = AutoConfig.from_pretrained(folder)
    if not getattr(AutoProcessor.from_pretrained(folder), "chat_template", None):
        raise ValueError(
            f"{folder}: there is no chat template, by which messages become a prompt: put the model's "
            "chat_template.jinja beside config.json, or save its processor with one."
        )
    return config


def describe(config: Any) -> str:
    """The settings of a configuration, as they were given, for people."""
    given = {name.removeprefix("sparse_"): config._given[name] for name in FIELDS}
    if given["method"] is None:
        return "dense"
    return ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)


def serve(
    folder: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str | None = None,
    blocking: bool = True,
) -> Any:
    """Answers `/v1/chat/completions` with one model until interrupted.

    The model's classes are this package's; code that a folder brings along is not run. Whoever reaches the port is
    served: there is no authentication, and pictures may be named by address.

    Args:
        folder: that `save_pretrained` of model and processor, or `save_to_hub_folder`, wrote; or a Hub id.
        host, port: where to listen; by default this machine alone can ask.
        dtype: as stored, by default; device: what torch calls it; attn_implementation: transformers' name of a backend.
        blocking: whether to return only when the server ends; else it runs in a thread.

    Returns:
        transformers' server, which has `kill_server()`.

    Raises:
        ImportError: without `pip install 'llava-sparse[serve]'`.
        ValueError, OSError: as `check_servable`.
    """
    check_servable(folder)
    register_names()
    from transformers.cli.serve import Serve

    return Serve(
        force_model=str(folder), host=host, port=port, dtype=dtype, device=device,
        attn_implementation=attn_implementation, non_blocking=not blocking,
    )  # fmt: skip
