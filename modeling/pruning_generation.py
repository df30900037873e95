"""What generation has to know of a pruned model: callers count in the tokens they passed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import Cache
from transformers.masking_utils import create_masks_for_generate

from .pruning_cache import CACHE, remembered, surplus, the_cache
from .pruning_inputs import images_per_prompt
from .pruning_items import ImageFeatures, tokens_of


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
            for name in ("visual_mask", "prefill_chunk_size", "prompt_length"):
                kwargs.pop(name, None)
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE: cache},
            **kwargs,
        )
        if inputs.get("prompt_length") is not None and inputs.get("input_ids") is not None:
            # Of a conversation that goes on, the part that is held is not passed again.
            inputs["prompt_length"] = inputs["prompt_length"] - input_ids.shape[1] + inputs["input_ids"].shape[1]
        return inputs

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        """The encoder's arguments are known too, such as `question_ids`, and where prompts end."""
        known = (*self.model.visual_arguments, "prompt_length")
        own = {k: v for k, v in model_kwargs.items() if k not in known}
        super()._validate_model_kwargs(own)  # type: ignore[misc]

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> Any:
        """Images and videos are encoded once, for the method of this moment."""
        if isinstance(self, FSDPModule):  # What is called outside the forward finds no weights else.
            self.unshard()
        sources = {name: source for name, (source, _) in self.model.modalities.items()}
        seen = {name: model_kwargs[x] for name, x in sources.items() if model_kwargs.get(x) is not None}
        while True:
            # A copy of each, for it is filled in place.
            own = {**model_kwargs, "mm_encoder_outputs": dict(model_kwargs.get("mm_encoder_outputs") or {})}
            own = super()._prepare_multimodal_encoder_kwargs_for_generation(own)  # type: ignore[misc]
            encoded = own["mm_encoder_outputs"]
            for name, pixels in seen.items():
                if getattr(encoded[name], "snapshot", None) is None:
                    encoded[name] = _of_dense(encoded[name], len(pixels))
            # Another thread may have switched the method between images and videos.
            if len({id(encoded[name].snapshot[0]) for name in seen}) <= 1:
                return own

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Chunks are taken of what enters the decoder; without a cache, every step is told where the prompt ends."""
        if not model_kwargs.get("use_cache", True) and model_kwargs.get("prompt_length") is None:
            given = model_kwargs.get("inputs_embeds")
            model_kwargs["prompt_length"] = (input_ids if given is None else given).shape[1]
        if generation_config.prefill_chunk_size is not None:
            model_kwargs = {**model_kwargs, "prefill_chunk_size": generation_config.prefill_chunk_size}
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]

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
        if self.model.sparsifier is None and self.model.has_stock and not remembered(cache):
            return create_masks_for_generate(config, inputs_embeds, attention_mask, cache, **kwargs)
        if attention_mask is None or inputs_embeds.shape[1] > 1 or not remembered(cache):
            return attention_mask
        capacity = max(getattr(layer, "max_cache_len", 0) for layer in cache.layers)
        return nn.functional.pad(attention_mask, (0, max(0, capacity - attention_mask.shape[1])), value=1)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeats the images of a prompt together, whatever their sizes."""
        encoded = dict(kwargs.pop("mm_encoder_outputs", None) or {})
        embeds = kwargs.get("inputs_embeds")
        for name in [name for name in encoded if encoded[name] is not None and expand_size > 1]:
            carried = getattr(encoded[name], "snapshot", None)
            method = self.model.sparsifier if carried is None else carried[0]
            images = self.model.adopt(encoded[name], method)
            cache = kwargs.get(CACHE)
            new = int(cache.get_seq_length()) + surplus(cache) if cache is not None else 0
            marked = self.model.placeholders(input_ids if embeds is None else None, embeds, name)[:, new:]
            kept = self.model.kept_tokens(method, images)
            counts = marked.sum(-1).tolist()
            prompts, _ = images_per_prompt(counts, kept, list(map(tokens_of, images.sizes)), name)
            groups, first = [], 0
            for count in prompts:
                groups += [list(range(first, first + count))] * expand_size
                first += count
            rows = [row for row in range(len(prompts)) for _ in range(expand_size)]
            encoded[name] = images.take([image for group in groups for image in group], rows)
        expand = super()._expand_inputs_for_generation  # type: ignore[misc]
        input_ids, kwargs = expand(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, {**kwargs, "mm_encoder_outputs": encoded}


def _of_dense(encoded: Any, items: int) -> ImageFeatures:
    """What a dense model gives for so many images or videos; of a video it gives frames."""
    features = encoded.pooler_output
    if torch.is_tensor(features):
        features = features.reshape(items, -1, features.shape[-1])
    stacked = getattr(encoded, "deepstack_features", None)
    dense = [len(x) for x in features]
    return ImageFeatures(pooler_output=list(features), dense=dense, snapshot=(None,), deepstack_features=stacked)
