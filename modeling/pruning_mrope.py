"""What the Qwen-VL families share: pictures of any size, videos, positions in three axes (M-RoPE)."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_sparse_llava import build_sparsifier
from .pruning_attention import received_attention
from .pruning_cache import CACHE, remembered
from .pruning_head import PrunedHeadMixin
from .pruning_inputs import DecoderInputs, newest_mask, translate
from .pruning_model import ImageFeatures, PrunedModelMixin, Request
from .pruning_ops import image_fingerprints
from .pruning_types import VisionFeatures

RECEIVED = "received_attention"
MODALITIES = {"image": ("pixel_values", "image_token_id"), "video": ("pixel_values_videos", "video_token_id")}


# --- The tower -----------------------------------------------------------------------------------------------------


class ReceivedAttention:
    """Takes from the last block of a tower what its patches receive.

    Attributes:
        attention: the block's attention module.
        received: `(patches,)` float, the attention of all that look at a patch, mean over heads; keys: `(heads,
            patches, head_dim)`, rotated; both in the order in which the block has the patches.
    """

    received: Tensor
    keys: Tensor

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention

    def take(self, hidden: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> None:
        attention: Any = self.attention
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb_vision
        query, key, _ = attention.qkv(hidden).reshape(len(hidden), 3, attention.num_heads, -1).unbind(1)
        query, key = (x.transpose(0, 1) for x in rotate(query, key, *position_embeddings))
        lengths, parts = cu_seqlens.diff().tolist(), []
        for queries, keys in zip(query.split(lengths, 1), key.split(lengths, 1), strict=True):
            parts.append(received_attention(queries[None], keys[None], attention.scaling)[0].mean(0))
        self.received, self.keys = torch.cat(parts), key


def _take_from_call(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    tap = kwargs.pop(RECEIVED, None)
    if tap is not None and tap.attention is attention:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        with torch.no_grad():
            tap.take(hidden, kwargs["cu_seqlens"], kwargs["position_embeddings"])
    return args, kwargs


class ReceivingTowerMixin:
    """Modifications: the tower can also say how much attention each merged token receives in its last block."""

    blocks: Any
    spatial_merge_size: int

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.watch_layers()

    def watch_layers(self) -> None:
        """Lets the blocks' attention take a `ReceivedAttention` along."""
        for block in self.blocks:
            if _take_from_call not in block.attn._forward_pre_hooks.values():
                block.attn.register_forward_pre_hook(_take_from_call, with_kwargs=True)

    def with_received(self, pixels: Tensor, grid_thw: Tensor) -> tuple[Any, Tensor, Tensor]:
        """The stock output, with saliency and keys of the merged tokens, as `VisionFeatures` has them for an item.

        Returns:
            the output; `(V,)` attention that the patches of a token receive, mean over them and over heads; and
            `(heads, V, head_dim)` keys, mean over the patches.
        """
        tap, unit = ReceivedAttention(self.blocks[-1].attn), self.spatial_merge_size**2
        outputs = self(pixels, grid_thw=grid_thw, return_dict=True, **{RECEIVED: tap})  # type: ignore[operator]
        order = self.raster_order(grid_thw).to(tap.keys.device)
        keys = tap.keys.unflatten(1, (-1, unit)).mean(2)
        return outputs, tap.received.view(-1, unit).mean(-1)[order], keys[:, order]

    def raster_order(self, grid_thw: Tensor) -> Tensor:
        """`(V,)` int64: where the blocks have each merged token."""
        return torch.arange(int(grid_thw.prod(-1).sum()) // self.spatial_merge_size**2)


# --- The model -----------------------------------------------------------------------------------------------------


class MRopeModelMixin(PrunedModelMixin):
    """Modifications of a stock model without head: see `PrunedModelMixin`.

    Methods choose among merged tokens, of a picture or of a whole video; tokens that stay keep their three positions,
    and what follows the prompt stands behind all of it. With `sparse_method=None` the stock forward runs.
    """

    modalities = MODALITIES
    visual_arguments = (
        "pixel_values_videos", "image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids"
    )  # fmt: skip
    gathers_positions = True
    visual: Any
    get_rope_index: Any

    def build(self, config: Any, tower: Any, decoder: Any) -> None:
        """Makes the parts, of sparse classes; what the stock class would do where it is left out."""
        self.sparsifier = build_sparsifier(config)
        self.visual = tower._from_config(config.vision_config)
        self.language_model = decoder._from_config(config.text_config)
        self.rope_deltas = None
        self.post_init()  # type: ignore[attr-defined]

    def encode_images(self, method: Any, pixel_values: Tensor, **arguments: Any) -> ImageFeatures:
        return self._encoded(method, pixel_values, arguments.get("image_grid_thw"), "image")

    def encode_videos(self, method: Any, pixel_values_videos: Tensor, **arguments: Any) -> ImageFeatures:
        """As `encode_images`."""
        return self._encoded(method, pixel_values_videos, arguments.get("video_grid_thw"), "video")

    def _encoded(self, method: Any, pixels: Tensor, grid_thw: Tensor | None, modality: str) -> ImageFeatures:
        if grid_thw is None:
            raise ValueError(f"{modality}_grid_thw must say how many patches each {modality} has, got None.")
        pixels, merge = pixels.type(self.visual.dtype), self.visual.spatial_merge_size
        grids = [(t * (h // merge), w // merge) for t, h, w in grid_thw.tolist()]
        counts = [rows * columns for rows, columns in grids]
        known: dict[str, Any] = {"dense": counts, "snapshot": (method,)}
        encoder = None if method is None else method.encoder
        if method is not None and method.draws:
            items = pixels.split([count * merge**2 for count in counts])
            known["fingerprints"] = torch.cat([image_fingerprints(item[None]) for item in items])
        received: Any = None
        keys: Any = None
        if encoder is not None and encoder.needs_attention:
            outputs, received, keys = self.visual.with_received(pixels, grid_thw)
            received, keys = received.split(counts), keys.split(counts, dim=1)
        else:
            outputs = self.visual(pixels, grid_thw=grid_thw, return_dict=True)
        known["pooler_output"] = parts = list(outputs.pooler_output.split(counts))
        stacked = getattr(outputs, "deepstack_features", None)
        known["deepstack_features"] = None if stacked is None else [list(layer.split(counts)) for layer in stacked]
        if encoder is None:
            return ImageFeatures(**known)
        vision = [VisionFeatures(x[None], grid, projected=x[None]) for x, grid in zip(parts, grids, strict=True)]
        if received is not None:
            vision = [
                replace(x, saliency=own[None, None], keys=key[None])
                for x, own, key in zip(vision, received, keys, strict=True)
            ]
        if encoder.draws:
            vision = [replace(x, fingerprints=own[None]) for x, own in zip(vision, known["fingerprints"], strict=True)]
        return self.reduced(method, ImageFeatures(vision=vision, **known))

    def positions(self, request: Request) -> Tensor | None:
        """`(axes, batch, length)`: the caller's, or those of the stock model, behind what the cache holds."""
        given = request.position_ids
        if given is not None or request.layout is None:
            return given[None] if given is not None and given.dim() == 2 else given
        embeds, visual = request.embeds, request.visual
        images, videos = (self.placeholders(request.input_ids, embeds, name) for name in self.modalities)
        if request.visual_mask is not None:
            images = request.visual_mask.bool()
        for name, there in (("image_grid_thw", images), ("video_grid_thw", videos)):
            if visual.get(name) is None and bool(there.any()):
                raise ValueError(f"{name} must be given, or position_ids, for positions follow from it; got None.")
        kinds = images.long() + 2 * videos.long()
        positions, _ = self.get_rope_index(
            kinds,
            kinds,
            image_grid_thw=visual.get("image_grid_thw"),
            video_grid_thw=visual.get("video_grid_thw"),
            second_per_grid_ts=visual.get("second_per_grid_ts"),
            attention_mask=newest_mask(request.attention_mask, embeds.shape[1]),
        )
        return positions + self._behind(request)

    def _behind(self, request: Request) -> Any:
        """The position of the first new token, `(batch, 1)`."""
        cache, held, mask = request.cache, remembered(request.cache).get(0), request.attention_mask
        if held is None:
            return 0 if cache is None else cache.get_seq_length()
        if mask is not None:
            mask = mask[:, : mask.shape[1] - request.embeds.shape[1] + 1]
        return translate(DecoderInputs(request.embeds[:, :1], mask, None), held, cache).position_ids


class MRopeHeadMixin(PrunedHeadMixin):
    """Modifications of a stock model with its head: see `PrunedHeadMixin`."""

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Any:
        """On a cache that knows where its prompt ends, the model counts on from there."""
        if remembered(model_kwargs.get(CACHE)):
            return None
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)  # type: ignore[misc]
