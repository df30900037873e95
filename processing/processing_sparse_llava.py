"""LLaVA's processor, writing as many image placeholders as visual tokens enter the decoder."""

from __future__ import annotations

from typing import Any

from transformers import LlavaProcessor

# The files of this folder import none of the model's, so that either can be pushed alone; a test compares the names.
BUDGETS = {"random": ("tokens",), "visionzip": ("dominant", "contextual")}
ENCODER_METHODS = tuple(BUDGETS)
DECODER_METHODS = ("random_decoder", "sparsevlm")


class SparseLlavaProcessor(LlavaProcessor):
    """`LlavaProcessor` for a pruned model.

    Modifications: with an encoder method, `<image>` becomes `sum(sparse_budgets)` or else `sparse_budget` placeholders;
    with a decoder method, or none, as many as in the dense model.

    Args:
        sparse_method, sparse_budget, sparse_budgets: the same as in the model's configuration.

    Raises:
        ValueError: for an unknown method, a budget that is no positive integer, or a budget without a method.
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
        sparse_budget: int | None = None,
        sparse_budgets: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        unknown = [
            name for name in kwargs if name.startswith("sparse_") and name not in ("sparse_layers", "sparse_options")
        ]
        if unknown:
            raise ValueError(f"{unknown[0]} is no setting; there are: sparse_method, sparse_budget, sparse_budgets.")
        self.sparse_method = sparse_method
        # One number is kept and saved: a budget given when it is loaded again must not meet older budgets.
        tokens = _tokens_per_image(sparse_method, sparse_budget, sparse_budgets)
        self.sparse_budget = sparse_budget if tokens is None else tokens
        self.sparse_budgets = None
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

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        tokens = _tokens_per_image(self.sparse_method, self.sparse_budget, self.sparse_budgets)
        if tokens is None:
            return super().replace_image_token(image_inputs, image_idx, **kwargs)
        return self.image_token * tokens

    def _get_num_multimodal_tokens(self, image_sizes: Any = None, **kwargs: Any) -> Any:
        data = super()._get_num_multimodal_tokens(image_sizes, **kwargs)
        tokens = _tokens_per_image(self.sparse_method, self.sparse_budget, self.sparse_budgets)
        if image_sizes is not None and tokens is not None:
            data.num_image_tokens = [tokens] * len(image_sizes)
        return data


def _tokens_per_image(method: str | None, budget: int | None, budgets: list[int] | None) -> int | None:
    """Placeholders per image, or None for the dense number."""
    if method is None:
        if budget is not None or budgets is not None:
            raise ValueError("sparse_budget and sparse_budgets need sparse_method.")
        return None
    if method not in ENCODER_METHODS + DECODER_METHODS:
        raise ValueError(
            f"sparse_method={method!r} is unknown; allowed: {', '.join(ENCODER_METHODS + DECODER_METHODS)}, None."
        )
    if method in DECODER_METHODS:
        return None
    if budgets is not None:
        names = BUDGETS[method]
        entries = list(budgets) if isinstance(budgets, list | tuple) else []
        counts = [n for n in entries if isinstance(n, int) and not isinstance(n, bool) and n >= 0]
        if not len(entries) == len(counts) == len(names):
            numbers = "one number" if len(names) == 1 else "two numbers"
            raise ValueError(
                f"sparse_budgets={budgets!r}: [{', '.join(names)}], {numbers} of tokens, is allowed for {method!r}."
            )
    tokens = sum(budgets) if budgets is not None else budget
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f"sparse_method={method!r} needs sparse_budget, a positive number of tokens, not {budget!r}.")
    return tokens
