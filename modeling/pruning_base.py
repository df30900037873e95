"""Repositories that hold settings and no weights: the model that they are settings for is loaded with them."""

from __future__ import annotations

import os
from typing import Any

BASE, BASE_REVISION = "base_model_name_or_path", "base_model_revision"


def base_of(content: Any, path: Any) -> tuple[str, dict[str, Any]] | None:
    """The model that a configuration, or what a configuration file holds, names as the one its settings are for.

    Args:
        content: a configuration or a dict; path: where it was loaded from.

    Returns:
        its Hub id and the keywords to load it with, which admit of no pickled weights; None where none is named.

    Raises:
        ValueError: for anything but a Hub id, in what comes from the Hub: a stranger's file names no path here.
    """
    get = content.get if isinstance(content, dict) else lambda name: getattr(content, name, None)
    base = get(BASE)
    if base is None:
        return None
    is_id = isinstance(base, str) and base.count("/") == 1 and not base.startswith((".", "/", "~")) and "\\" not in base
    if not os.path.isdir(str(path)) and (not is_id or os.path.exists(base)):
        raise ValueError(f"{path}: {BASE}={base!r} is no Hub id (owner/name), and nothing else is allowed there.")
    return str(base), {"revision": get(BASE_REVISION) or "main"}


class BaseWeightsMixin:
    """Modifications of a stock model: `from_pretrained` of a repository without weights takes those that it names."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> Any:
        """As transformers'; see `base_of` for what is raised besides."""
        path, base = pretrained_model_name_or_path, None
        own: Any = cls
        if path is not None and config is None:
            base = base_of(own.config_class.get_config_dict(path, **kwargs)[0], path)
            if base is not None:
                config, kwargs = own.config_class.from_pretrained(path, return_unused_kwargs=True, **kwargs)
        elif path is not None and str(getattr(config, "_name_or_path", None)) == str(path):
            base = base_of(config, path)
        if base is None:
            return super().from_pretrained(path, *args, config=config, **kwargs)  # type: ignore[misc]
        kwargs |= {**base[1], "use_safetensors": True}
        model = super().from_pretrained(base[0], *args, config=config, **kwargs)  # type: ignore[misc]
        for made in (model[0] if isinstance(model, tuple) else model).modules():
            for name in (BASE, BASE_REVISION):
                getattr(made, "config", config).__dict__.pop(name, None)  # What is saved from here has weights.
        return model
