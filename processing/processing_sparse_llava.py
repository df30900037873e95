"""LLaVA's processor, writing as many image placeholders as visual tokens enter the decoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoTokenizer, LlavaProcessor

JOIN = "+"
SURPLUS = 2


def _one(budgets: Sequence[int]) -> int | None:
    return budgets[0] if len(budgets) == 1 else None


def _last(budgets: Sequence[int]) -> int | None:
    return budgets[-1] if budgets else None


def _both(budgets: Sequence[int]) -> int | None:
    return sum(budgets) if len(budgets) == 2 else None


# The files of this folder import none of the model's, so that either can be pushed alone; a test compares the names.
# How many tokens of each image an encoder method's `sparse_budgets` leave, and what is allowed in them.
ENCODER_METHODS: dict[str, tuple[Callable[[Sequence[int]], int | None], str]] = {
    "cdpruner": (_one, "[tokens], one number"),
    "delegate": (_one, "[tokens], one number"),
    "divprune": (_one, "[tokens], one number"),
    "pool": (_one, "[tokens], one number"),
    "random": (_one, "[tokens], one number"),
    "scope": (_one, "[tokens], one number"),
    "tome": (_last, "the tokens after each layer, numbers"),
    "uniform": (_one, "[tokens], one number"),
    "vispruner": (_one, "[tokens], one number"),
    "visionzip": (_both, "[dominant, contextual], two numbers"),
}
DECODER_METHODS = ["fastv", "pyramiddrop", "random_decoder", "sparsevlm"]


def register_method(name: str, kind: str, like: str | None = None) -> None:
    """Lets processors know a method of a user's.

    Args:
        like: a known encoder method whose `sparse_budgets` mean the same; by default they are [tokens].
    """
    ENCODER_METHODS.pop(name, None)
    if name in DECODER_METHODS:
        DECODER_METHODS.remove(name)
    if kind == "encoder":
        ENCODER_METHODS[name] = (_one, "[tokens], one number") if like is None else ENCODER_METHODS[like]
    else:
        DECODER_METHODS.append(name)


class SparseLlavaProcessor(LlavaProcessor):
    """`LlavaProcessor` for a pruned model.

    Modifications: with an encoder method, `<image>` becomes as many placeholders as tokens of an image enter the
    decoder; with a decoder method, or none, as many as in the dense model. With `sparse_options={"clip": ...}`
    (CDPruner) it also returns `question_ids`, the question in that CLIP model's vocabulary.

    Args:
        sparse_method, sparse_budget, sparse_budgets, sparse_options: the same as in the model's configuration.

    Raises:
        ValueError: for an unknown method, a budget that is no positive number, or a budget without a method.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = None,
        vision_feature_select_strategy: str | None = None,
        chat_template: str | None = None,
        image_token: str = "<image>",
        num_additional_image_tokens: int = 0,
        sparse_method: str | None = None,
        sparse_budget: Any = None,
        sparse_budgets: Any = None,
        sparse_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        unknown = [name for name in kwargs if name.startswith("sparse_") and name != "sparse_layers"]
        if unknown:
            raise ValueError(
                f"{unknown[0]} is no setting; there are: sparse_method, sparse_budget, sparse_budgets, sparse_options."
            )
        self.sparse_method = sparse_method
        # One number is kept and saved: a budget given when it is loaded again must not meet older budgets.
        given = (sparse_method, sparse_budget, sparse_budgets, sparse_options)
        tokens = _budget(*given)
        kept = [tokens, None] if JOIN in str(sparse_method) and not _is_shared(*given) else tokens
        self.sparse_budget = sparse_budget if tokens is None else kept
        self.sparse_budgets = None
        clip = _clip(sparse_method, sparse_options)
        self.sparse_options = None if clip is None else {"clip": clip}
        super().__init__(
            image_processor,
            tokenizer,
            patch_size,
            vision_feature_select_strategy,
            chat_template,
            image_token,
            num_additional_image_tokens,
            **kwargs,
        )

    def __call__(self, images: Any = None, text: Any = None, question: Any = None, **kwargs: Any) -> Any:
        """As LLaVA's.

        Args:
            question: the question of each prompt, for CLIP; by default what stands behind the last image, without the
                last line's "ASSISTANT:".
        """
        outputs = super().__call__(images, text, **kwargs)
        clip = _clip(self.sparse_method, self.sparse_options)
        if clip is not None and images is not None:
            asked = [text] if isinstance(text, str) else list(text)
            if question is not None:
                asked = [question] if isinstance(question, str) else list(question)
            outputs["question_ids"] = question_ids(clip, [_question(one, self.image_token) for one in asked])
        return outputs

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        dense = super().replace_image_token(image_inputs, image_idx, **kwargs)
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        tokens = self._tokens(height, width)
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
        given = (self.sparse_method, self.sparse_budget, self.sparse_budgets, self.sparse_options)
        budget = _budget(*given)
        if budget is None:
            return None
        assert self.patch_size is not None
        patches = (height // self.patch_size) * (width // self.patch_size)
        tokens = max(1, round(budget * patches)) if isinstance(budget, float) else budget
        return min(patches, SURPLUS * tokens) if _is_shared(*given) else tokens


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


def _clip(method: str | None, options: dict[str, Any] | None) -> str | None:
    """The CLIP model that a method's options name."""
    own = options or {}
    if method is not None and JOIN in method:
        own = own.get(method.partition(JOIN)[0]) or own
    return own.get("clip")


def _is_shared(method: str | None, budget: Any, budgets: Any, options: dict[str, Any] | None) -> bool:
    """Whether `sparse_budget` is a composition's single number: the encoder method takes `SURPLUS` times as much."""
    if method is None or JOIN not in method or not isinstance(budget, int | float):
        return False
    encoder = method.partition(JOIN)[0]
    own = (options or {}).get(encoder) or {}
    return own.get("budget") is None and own.get("budgets") is None and _first(budgets, encoder) is None


def _budget(method: str | None, budget: Any, budgets: Any, options: dict[str, Any] | None = None) -> int | float | None:
    """The encoder method's budget, tokens of an image or a ratio of them; None for the dense number."""
    if method is None:
        if budget is not None or budgets is not None:
            raise ValueError("sparse_budget and sparse_budgets need sparse_method.")
        return None
    encoder = method
    if isinstance(method, str) and JOIN in method:
        encoder, _, decoder = method.partition(JOIN)
        if encoder not in ENCODER_METHODS or decoder not in DECODER_METHODS:
            raise ValueError(
                f"sparse_method={method!r} is unknown; one of {', '.join(ENCODER_METHODS)}, then {JOIN!r}, then one of "
                f"{', '.join(DECODER_METHODS)} is allowed."
            )
        own = (options or {}).get(encoder) or {}
        budgets = _first(budgets, encoder) if own.get("budgets") is None else own["budgets"]
        budget = _first(budget, encoder) if own.get("budget") is None else own["budget"]
    if encoder in DECODER_METHODS:
        return None
    if encoder not in ENCODER_METHODS:
        allowed = ", ".join([*ENCODER_METHODS, *DECODER_METHODS])
        raise ValueError(f"sparse_method={method!r} is unknown; allowed: {allowed}, None.")
    if budgets is not None:
        count, allowed = ENCODER_METHODS[encoder]
        entries = list(budgets) if isinstance(budgets, list | tuple) else []
        counts = [n for n in entries if isinstance(n, int) and not isinstance(n, bool) and n >= 0]
        budget = count(counts) if len(counts) == len(entries) else None
        if budget is None:
            raise ValueError(f"sparse_budgets={budgets!r}: {allowed} of tokens, is allowed for {encoder!r}.")
    is_ratio = isinstance(budget, float) and 0 < budget <= 1
    if not is_ratio and (not isinstance(budget, int) or isinstance(budget, bool) or budget < 1):
        raise ValueError(
            f"sparse_method={method!r} needs sparse_budget, a positive number of tokens or a ratio up to 1.0, not "
            f"{budget!r}."
        )
    return budget


def _first(value: Any, name: str) -> Any:
    """The encoder method's part of a composition's field."""
    if isinstance(value, dict):
        return value.get(name)
    if isinstance(value, list | tuple):
        return value[0] if value else None
    return value
