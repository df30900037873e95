"""LLaVA's processor, writing as many image placeholders as visual tokens enter the decoder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from inspect import Parameter, Signature, signature
from typing import Any

import torch
from transformers import AutoTokenizer, LlavaProcessor

JOIN = "+"
BASE, BASE_REVISION = "base_model_name_or_path", "base_model_revision"
FIELDS = ("sparse_method", "sparse_budget", "sparse_layers", "sparse_budgets", "sparse_options")

# Of settings as `sparse_*` fields and the patches of an image (of a tile, with further sizes by name), the tokens that
# enter the decoder, None for all of them.
# The package puts its own here, which checks the settings as a model does. These files import none of the model's, so
# that a processor can be pushed alone: without the package it writes as many tokens as it was saved with.
count_tokens: Callable[..., int | None] | None = None


class SparseProcessorMixin:
    """Modifications of a stock processor for a pruned model.

    With an encoder method, `<image>` becomes as many placeholders as tokens of an image enter the decoder; with a
    decoder method, or none, as many as in the dense model. With `sparse_options={"clip": ...}` (CDPruner) it also
    returns `question_ids`, the question in that CLIP model's vocabulary.

    Args:
        image_processor, tokenizer, ...: as of the stock processor.
        sparse_method, sparse_budget, sparse_layers, sparse_budgets, sparse_options: as in the model's configuration.

    Attributes:
        sparse_tokens: what the settings come to for an image, where all have as many; saved, and for processors that
            are loaded without the package.

    Raises:
        ValueError: for all that a model's configuration refuses, as far as it does not depend on its layers.
    """

    image_token: str

    sparse_tokens: int | None = None
    image_processor: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Gives it the stock signature and the settings: transformers finds there its parts, and what to save."""
        super().__init_subclass__(**kwargs)
        line = cls.__mro__
        ours = [c for c in line if issubclass(c, SparseProcessorMixin)]
        stock: Any = next(c for c in line if c not in ours)
        if stock is object:
            return
        known = list(signature(stock.__init__).parameters.values())
        of_ours = [x for c in ours if "__init__" in vars(c) for x in signature(c.__init__).parameters.values()]
        own = {x.name: x for x in reversed(of_ours) if x.kind is Parameter.KEYWORD_ONLY}
        inner: Any = cls.__init__

        @wraps(inner)
        def made(self: Any, *args: Any, **kwargs: Any) -> None:
            if len(args) > len(known) - 2:
                raise TypeError(f"{cls.__name__} takes its settings by keyword, got {len(args)} arguments by position.")
            inner(self, **dict(zip([x.name for x in known[1:-1]], args, strict=False)), **kwargs)

        made.__signature__ = Signature([*known[:-1], *reversed(own.values()), known[-1]])  # type: ignore[attr-defined]
        cls.__init__ = made  # type: ignore[method-assign]

    def __init__(
        self,
        *,
        sparse_method: str | None = None,
        sparse_budget: Any = None,
        sparse_layers: Any = None,
        sparse_budgets: Any = None,
        sparse_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        for name in [name for name in kwargs if name.startswith("sparse_")]:
            raise ValueError(f"{name} is no setting; there are: {', '.join(FIELDS)}.")
        self.sparse_method, self.sparse_budget, self.sparse_layers = sparse_method, sparse_budget, sparse_layers
        self.sparse_budgets, self.sparse_options = sparse_budgets, sparse_options
        super().__init__(**kwargs)
        crop = getattr(getattr(self, "image_processor", None), "crop_size", None)
        if count_tokens is not None and getattr(self, "patch_size", None) and crop:
            self.check_settings()

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """As transformers', which without torchvision does not come to its message."""
        try:
            return super().check_argument_for_proper_class(argument_name, argument)  # type: ignore[misc]
        except AttributeError as error:
            if argument_name != "video_processor":
                raise
            raise ImportError(
                f"{type(self).__name__} needs a video processor, and those of transformers need torchvision, also for "
                "frames given as arrays or pictures: pip install torchvision, of the release that fits torch."
            ) from error

    def check_settings(self) -> None:
        """Raises ValueError for settings that a model would refuse."""
        raise NotImplementedError

    def entering(self, patches: int, **sizes: int) -> int | None:
        """Tokens of an image of so many patches that enter the decoder, None for all; as saved, without the package."""
        if count_tokens is None:
            return self.sparse_tokens
        return count_tokens({name: getattr(self, name) for name in FIELDS}, patches, **sizes)

    @classmethod
    def _get_arguments_from_pretrained(cls, path: Any, processor_dict: Any = None, **kwargs: Any) -> Any:
        """Of a repository that holds settings alone, the tokenizer of the model that it names."""
        base = (processor_dict or {}).pop(BASE, None)
        if base is not None:
            if not os.path.isdir(str(path)) and (base.count("/") != 1 or base[0] in "./~" or os.path.exists(base)):
                raise ValueError(f"{path}: {BASE}={base!r} is no Hub id (owner/name); nothing else is allowed there.")
            path, kwargs["revision"] = base, processor_dict.pop(BASE_REVISION, None) or "main"
        return super()._get_arguments_from_pretrained(path, processor_dict, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_args_and_dict(cls, args: Any, processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers'; a setting given by keyword replaces the saved ones that it contradicts."""
        saved = dict(processor_dict)
        given = [name for name in FIELDS if name in kwargs and kwargs[name] != saved.get(name)]
        if given and count_tokens is None:
            raise ValueError(f"{given[0]}: settings of a processor can be changed where llava_sparse is imported.")
        if "sparse_method" in given:
            saved = {name: value for name, value in saved.items() if name not in FIELDS or name == "sparse_budget"}
        for name, other in (("sparse_budget", "sparse_budgets"), ("sparse_budgets", "sparse_budget")):
            if name in given and other not in given:
                saved.pop(other, None)
        if given:
            saved.pop("sparse_tokens", None)
        clip = _clip(saved.get("sparse_method"), saved.get("sparse_options"))
        if clip is not None and "sparse_options" not in kwargs:
            raise ValueError(
                f"the processor's sparse_options name a model to be loaded, clip={clip!r}; it is loaded only if you "
                f"name it: from_pretrained(..., sparse_options={saved['sparse_options']!r})."
            )
        parts = [kwargs.pop(name, part) for name, part in zip(cls.get_attributes(), args, strict=True)]  # type: ignore[attr-defined]
        return super().from_args_and_dict(parts, saved, **kwargs)  # type: ignore[misc]

    @classmethod
    def validate_init_kwargs(cls, processor_config: dict[str, Any], valid_kwargs: Any) -> Any:
        """As transformers', which does not look at the signature but at code."""
        known = signature(cls.__init__).parameters
        return super().validate_init_kwargs(processor_config, [name for name in known if name != "kwargs"])  # type: ignore[misc]

    def __call__(
        self, images: Any = None, text: Any = None, videos: Any = None, question: Any = None, **kwargs: Any
    ) -> Any:
        """Arguments as of the stock processor, and

        Args:
            question: the question of each prompt, for CLIP; by default what stands behind the last image, without the
                last line's "ASSISTANT:".
        """
        kwargs |= {} if videos is None else {"videos": videos}
        outputs = super().__call__(images, text, **kwargs)  # type: ignore[misc]
        clip = _clip(self.sparse_method, self.sparse_options)
        if clip is not None and (images is not None or videos is not None):
            asked = [text] if isinstance(text, str) else list(text)
            if question is not None:
                asked = [question] if isinstance(question, str) else list(question)
            outputs["question_ids"] = question_ids(clip, [_question(one, self.image_token) for one in asked])
        return outputs


class SparseLlavaProcessor(SparseProcessorMixin, LlavaProcessor):
    """`LlavaProcessor` for a pruned model; see `SparseProcessorMixin`."""

    def __init__(self, *, sparse_tokens: int | None = None, **kwargs: Any) -> None:
        self.sparse_tokens = sparse_tokens
        super().__init__(**kwargs)

    def check_settings(self) -> None:
        size = self.image_processor.crop_size
        self.sparse_tokens = self._tokens(size["height"], size["width"])

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        dense = super().replace_image_token(image_inputs, image_idx, **kwargs)
        tokens = self._tokens(*image_inputs["pixel_values"][image_idx].shape[-2:])
        return dense if tokens is None else self.image_token * tokens

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> Any:
        data = super()._get_num_multimodal_tokens(image_sizes, **kwargs)
        crop = self.image_processor.crop_size
        tokens = self._tokens(crop["height"], crop["width"])
        if image_sizes is not None and tokens is not None:
            data.num_image_tokens = [tokens] * len(image_sizes)
        return data

    def _tokens(self, height: int, width: int) -> int | None:
        """Placeholders of an image of so many pixels; None for those of the dense model."""
        return self.entering((height // self.patch_size) * (width // self.patch_size))


def question_ids(clip: str, questions: Sequence[str]) -> torch.Tensor:
    """Questions in the vocabulary of a CLIP model: `(questions, n)` int64, start and end included, -1 for padding."""
    tokenizer = _clip_tokenizer(clip)
    rows = [torch.tensor(tokenizer(question, truncation=False)["input_ids"]) for question in questions]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


@lru_cache(maxsize=2)
def _clip_tokenizer(clip: str) -> Any:
    return AutoTokenizer.from_pretrained(clip)


def _question(text: str, image_token: str) -> str:
    return text.rpartition(image_token)[2].strip().removesuffix("ASSISTANT:").strip()


def _clip(method: Any, options: Any) -> str | None:
    """The CLIP model that a method's options name."""
    own = options if isinstance(options, dict) else {}
    if isinstance(method, str) and JOIN in method:
        by_name = [own.get(part) for part in method.split(JOIN)]
        own = next((part for part in by_name if isinstance(part, dict) and part.get("clip")), own)
    return own.get("clip") if isinstance(own, dict) else None
