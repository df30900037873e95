"""Pruned models in vLLM: pictures go through this package's tower and `reduce`, the decoder is vLLM's own.

A picture's tokens are made before its question is read, and shared by all prompts that show it. So methods that look at
neither the question nor the decoder's layers can be served, and all others are refused while the server starts.
"""

from __future__ import annotations

import copy
import json
import re
from functools import lru_cache
from typing import Any, ClassVar

import torch
from transformers import AutoConfig
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.model_executor.models.llava_next import (
    LlavaNextForConditionalGeneration,
    LlavaNextMultiModalProcessor,
    LlavaNextProcessingInfo,
)
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.parse import ImageSize

from llava_sparse.families import FAMILIES
from llava_sparse.integrations import SERVED, not_served
from llava_sparse.modeling.configuration_sparse_llava import build_sparsifier
from llava_sparse.modeling.pruning_registry import METHODS, entering
from llava_sparse.modeling.pruning_settings import Sparsity


def settings_of(model_config: Any) -> Any:
    """The sparse configuration of a checkpoint, with what `--hf-overrides` says of it.

    Raises:
        ValueError: for what the configuration refuses, for a family that is not served, and for a method that acts in
            the decoder or looks at the question.
    """
    overrides = model_config.hf_overrides if isinstance(model_config.hf_overrides, dict) else {}
    given = {name: value for name, value in overrides.items() if name.startswith("sparse_")}
    path = model_config.hf_config_path or model_config.model
    return _settings(str(path), model_config.revision, json.dumps(given, sort_keys=True))


@lru_cache(maxsize=8)
def _settings(path: str, revision: str | None, given: str) -> Any:
    # Read anew: vLLM sets overrides on the finished configuration, beside the settings that they were to replace.
    config = AutoConfig.from_pretrained(path, revision=revision, **json.loads(given))
    family = config.model_type.removeprefix("sparse_")
    if family not in SERVED:
        raise ValueError(not_served(family))
    if getattr(config, "image_packing", "unpadded") != "unpadded":
        raise ValueError(f"image_packing={config.image_packing!r} is not served by vLLM; 'unpadded' is allowed.")
    method = build_sparsifier(config)
    if method is not None and (method.decoder is not None or method.looks_at_question or method.needs_mask):
        names = [name for name, cls in METHODS.items() if cls.kind == "encoder" and not cls.looks_at_question]
        raise ValueError(
            f"sparse_method={config.sparse_method!r} needs the decoder or the question; in vLLM a picture's tokens are "
            f"made before its question is read. Allowed: {', '.join(sorted(names))}; null for the dense model."
        )
    return config


def without_decoder(config: Any) -> Any:
    """The family's model without head and decoder: what encodes pictures, as everywhere in this package."""
    config = copy.deepcopy(config)
    # A decoder is made with the model; one without layers and words costs nothing.
    config.text_config.num_hidden_layers, config.text_config.vocab_size = 0, 1
    config.text_config.pad_token_id = None
    model = FAMILIES[config.model_type.removeprefix("sparse_")].sparse("Model")(config).eval()
    model.language_model = None
    return model


class PrunedInfo:
    """Modifications of a model's processing info: how many placeholders a picture has, and what identifies it."""

    ctx: Any

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)  # type: ignore[call-arg]
        # In the front end's process too: what is refused is refused before the server is up.
        self.settings = settings_of(ctx.model_config)
        self.sparsity = Sparsity.read(getattr(self.settings, "_given", self.settings))

    @property
    def model_id(self) -> str:
        """Part of every picture's hash, and so of every cached block behind it: caches tell settings apart."""
        return f"{self.ctx.model_config.model} {json.dumps(self.sparsity.fields(), sort_keys=True)}"

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        dense = super().get_num_image_tokens(image_width=image_width, image_height=image_height)  # type: ignore[misc]
        vision = self.settings.vision_config
        sizes = self.sizes_of((image_height, image_width), dense)
        tokens = entering(self.sparsity, (vision.image_size // vision.patch_size) ** 2, **sizes)
        return dense if tokens is None else tokens

    def sizes_of(self, size: tuple[int, int], dense: int) -> dict[str, int]:
        """Sizes of `Geometry` of a picture of `(height, width)` that has so many tokens in the dense model."""
        return {}


class PrunedLlavaInfo(PrunedInfo, LlavaProcessingInfo):
    pass


class PrunedLlavaNextInfo(PrunedInfo, LlavaNextProcessingInfo):
    def sizes_of(self, size: tuple[int, int], dense: int) -> dict[str, int]:
        grid = get_anyres_image_grid_shape(
            size, self.settings.image_grid_pinpoints, self.settings.vision_config.image_size
        )
        return {"tiles": 1 + grid[0] * grid[1], "packed": dense}

    def get_image_size_with_most_features(self) -> ImageSize:
        """The largest: many sizes may have as many tokens, and it is what encoding takes memory for."""
        height, width = max(self.settings.image_grid_pinpoints, key=lambda size: size[0] * size[1])
        return ImageSize(width=width, height=height)


class PrunedPicturesMixin:
    """Modifications of a vLLM model: pictures are encoded by `without_decoder`, whole on each rank."""

    supports_tower_connector_lora: ClassVar[bool] = False

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = settings_of(vllm_config.model_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        own = without_decoder(config)
        with self._mark_tower_model(vllm_config, "image"):  # type: ignore[attr-defined]
            for name, part in own.named_children():
                setattr(self, name, part)
        for name, parameter in own.named_parameters(recurse=False):
            setattr(self, name, parameter)
        # Its parts are this model's; in a tuple, it is none of them itself.
        self.pictures = (own,)

    def embed_multimodal(self, **kwargs: Any) -> list[torch.Tensor]:
        given = self._parse_and_validate_image_input(**kwargs)  # type: ignore[attr-defined]
        if given is None:
            return []
        if given["type"] == "image_embeds":
            return list(given["data"])
        (own,) = self.pictures
        pixels, sizes = given["pixel_values"], given.get("image_sizes")
        arguments = {} if sizes is None else {"image_sizes": sizes}
        # Pictures of different numbers of tiles come as a list.
        pixels = pixels if torch.is_tensor(pixels) else torch.cat(list(pixels))
        return own.encode_images(own.sparsifier, pixels, **arguments).features


def names_of(stock: Any) -> WeightsMapper:
    """The stock class's names of weights, and the tower's as transformers has them now: without `vision_model`."""
    return WeightsMapper(
        orig_to_new_regex={re.compile(r"^(model\.)?vision_tower\.vision_model\."): "vision_tower."},
        orig_to_new_substr={"embeddings.position_ids": None},
        orig_to_new_prefix=stock.hf_to_vllm_mapper.orig_to_new_prefix,
    )


@MULTIMODAL_REGISTRY.register_processor(
    LlavaMultiModalProcessor, info=PrunedLlavaInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class SparseLlavaForConditionalGeneration(PrunedPicturesMixin, LlavaForConditionalGeneration):
    """LLaVA-1.5; of other families too, as which it is refused."""

    hf_to_vllm_mapper = names_of(LlavaForConditionalGeneration)


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextMultiModalProcessor, info=PrunedLlavaNextInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class SparseLlavaNextForConditionalGeneration(PrunedPicturesMixin, LlavaNextForConditionalGeneration):
    """LLaVA-NeXT."""

    hf_to_vllm_mapper = names_of(LlavaNextForConditionalGeneration)
