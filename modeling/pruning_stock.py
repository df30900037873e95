"""Methods of stock classes, taken over with the arguments that the stock ones have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from inspect import Parameter, signature
from typing import Any

from transformers.utils.generic import can_return_tuple

# In transformers 5.24 the second is the name.
CACHES = ("past_key_values", "cache")


def arguments_of(stock: Callable[..., Any]) -> list[str]:
    """The names of a method's arguments, without `self` and `**kwargs`, in order."""
    return [name for name, x in list(signature(stock).parameters.items())[1:] if x.kind is not Parameter.VAR_KEYWORD]


def under_signature(function: Callable[..., Any], stock: Callable[..., Any], own: Iterable[str]) -> Callable[..., Any]:
    """A method that gets all its arguments by keyword, under the signature of a stock one.

    transformers, Trainer and export look there for what a model takes.

    Args:
        own: names of further arguments, by keyword alone, None by default.
    """
    known = list(signature(stock).parameters.values())
    names = arguments_of(stock)

    @wraps(function)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(names):
            raise TypeError(f"{function.__name__} takes at most {len(names)} arguments by position, got {len(args)}.")
        return function(self, **dict(zip(names, args, strict=False)), **kwargs)

    more = [Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in own if name not in names]
    method.__signature__ = signature(stock).replace(parameters=[*known[:-1], *more, known[-1]])  # type: ignore[attr-defined]
    return method


def features_getter(stock: Callable[..., Any], modality: str = "image") -> Callable[..., Any]:
    """`get_image_features` of a pruned model, or `get_video_features`, from the stock model's."""
    pixels = arguments_of(stock)[0]

    @can_return_tuple
    def features(self: Any, **kwargs: Any) -> Any:
        """Encodes and projects images, or videos; arguments as the stock class's, and

        Args:
            question_ids: `(prompts, n)` int64, the question in CLIP's vocabulary, -1 for padding, for a method that
                reads it with a CLIP text tower.

        Returns:
            `ImageFeatures`, which `forward` and `generate` take as `mm_encoder_outputs={"image": ...}`, or "video"; of
            a dense model the stock output.

        Raises:
            ValueError: for a feature layer or strategy that contradicts an encoder method, which takes its own.
        """
        if self.sparsifier is None:
            kwargs.pop("question_ids", None)
            return stock(self, **kwargs, return_dict=True)
        return getattr(self, f"encode_{modality}s")(self.sparsifier, kwargs.pop(pixels), **kwargs)

    features.__name__ = f"get_{modality}_features"
    return under_signature(features, stock, ("question_ids",))
