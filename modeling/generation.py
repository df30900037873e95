"""What generation has to know of a pruned model: callers count in the tokens they passed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.masking_utils import create_masks_for_generate

from .pruned_cache import CACHE, remembered, surplus, the_cache


class CandidatesAfterPrompt:
    """A candidate generator that lets the prompt go first: candidates in the prefill would be pruned with it."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator
        self.prompt_is_through = False

    def get_candidates(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        # An assistant model is asked at once all the same, so that it keeps step.
        candidates = self.generator.get_candidates(input_ids, *args, **kwargs)
        if self.prompt_is_through:
            return candidates
        self.prompt_is_through = True
        return input_ids, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["generator"], name)


class PrunedGenerationMixin:
    """Modifications of transformers' `GenerationMixin` for models whose prompt gets shorter on its way."""

    config: Any
    model: Any

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        cache = the_cache(past_key_values, cache)
        # The length of the new part was found from the tokens held; the caller's ids also hold what was dropped.
        if is_first_iteration and next_sequence_length is not None and cache is not None:
            next_sequence_length -= surplus(cache)
        if not is_first_iteration and kwargs.get("use_cache", True):
            kwargs.pop("visual_mask", None)
        return super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE: cache},
            **kwargs,
        )

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        generator = super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]
        return generator if self.model.sparsifier is None else CandidatesAfterPrompt(generator)

    def create_masks_for_generate(
        self,
        config: Any,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Keeps the mask two-dimensional for static caches too: runs of layers make their own of it.

        At every step it has the same shape, so that the step is compiled once; what is to come is hidden as the future.
        """
        cache = the_cache(past_key_values, cache)
        if self.model.sparsifier is None and not remembered(cache):
            return create_masks_for_generate(config, inputs_embeds, attention_mask, cache, **kwargs)
        if attention_mask is None or inputs_embeds.shape[1] > 1 or not remembered(cache):
            return attention_mask
        capacity = max(getattr(layer, "max_cache_len", 0) for layer in cache.layers)
        return nn.functional.pad(attention_mask, (0, max(0, capacity - attention_mask.shape[1])), value=1)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeats the images of a prompt together; stock code repeats each image on its own."""
        pixel_values = kwargs.pop("pixel_values", None)
        embeds = kwargs.get("inputs_embeds")
        if pixel_values is not None and expand_size > 1 and not (input_ids is None and embeds is None):
            ids = input_ids if embeds is None else None
            counts = self.model.placeholders(ids, embeds).sum(-1).tolist()
            images, total = pixel_values.shape[0], sum(counts)
            written = total // images
            if not written or total % images or any(count % written for count in counts):
                raise ValueError(
                    f"Image features and image tokens do not match: {images} images, and prompts with {counts} image "
                    "tokens."
                )
            groups = pixel_values.split([count // written for count in counts])
            pixel_values = torch.cat([group for group in groups for _ in range(expand_size)])
        expand = super()._expand_inputs_for_generation  # type: ignore[misc]
        input_ids, kwargs = expand(expand_size, is_encoder_decoder, input_ids, **kwargs)
        if pixel_values is not None:
            kwargs["pixel_values"] = pixel_values
        return input_ids, kwargs
