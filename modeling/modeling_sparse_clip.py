"""CLIP vision tower that stops after the layer that is used and can reduce its tokens there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_rows import TAP, RowTap, row_probabilities, watch
from .configuration_sparse_llava import SparseCLIPVisionConfig, build_sparsifier
from .sparsifier import EncoderSparsifier, Images, Selection
from .tensors import exact
from .tome import ToMe, merging_layer


@dataclass
class SparseCLIPVisionOutput(BaseModelOutputWithPooling):
    """Adds the stage to the stock output.

    Attributes:
        numbers, weights: `(images, tokens)`, what the tokens are, and for how many each counts: see `Reduced`.
        selection: one stage, where tokens were reduced and the record was asked for.
        images: what a method behind the projector needs; nothing is reduced yet: `last_hidden_state` is all patches.
    """

    numbers: Tensor | None = None
    weights: Tensor | None = None
    selection: tuple[Selection, ...] | None = None
    images: Images | None = None


class SparseCLIPVisionModel(CLIPVisionModel):
    """CLIP vision tower whose tokens can be reduced; usable alone.

    Modifications: stops after the last layer that is used; with an encoder method `last_hidden_state` is the reduced
    output of the method's layer, `(images, tokens, channels)`, and there is no pooled output. Without a method and
    without `depths` it is the stock tower.
    """

    config_class = SparseCLIPVisionConfig
    config: SparseCLIPVisionConfig

    def __init__(self, config: SparseCLIPVisionConfig) -> None:
        super().__init__(config)
        self.sparsifier = build_sparsifier(config)
        self.watch_layers()

    def watch_layers(self) -> None:
        for layer in self.encoder.layers:
            watch(layer.self_attn)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        sparsifier: EncoderSparsifier | None = None,
        depths: Sequence[int] | None = None,
        output_selection: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encodes `(images, 3, height, width)` pixels.

        Args:
            sparsifier: a method for this call; by default the configuration's.
            depths: return the outputs after these many layers, concatenated over channels, instead of running all
                layers; not together with a method.
            output_selection: whether to return the stage.
        """
        sparsifier = sparsifier or (self.sparsifier if depths is None else None)  # type: ignore[assignment]
        if sparsifier is None and depths is None:
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        return self._forward_short(
            pixel_values, interpolate_pos_encoding, sparsifier, tuple(depths or ()), output_selection, **kwargs
        )

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def _forward_short(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool,
        sparsifier: EncoderSparsifier | None,
        depths: tuple[int, ...],
        output_selection: bool,
        **kwargs: Any,
    ) -> SparseCLIPVisionOutput:
        layers: Any = self.encoder.layers
        used = -1 if sparsifier is None else sparsifier.feature_layer % len(layers)
        hidden = self.pre_layrnorm(self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding))
        if isinstance(sparsifier, ToMe):
            return self._reduced(used, self._merge(hidden, pixel_values, sparsifier), sparsifier, output_selection)
        outputs = [hidden]
        tap = None
        for index, layer in enumerate(layers[: max(depths, default=0) if sparsifier is None else used + 1]):
            if index != used or sparsifier is None or not sparsifier.needs_attention:
                hidden = layer(hidden, None, **kwargs)
            else:
                cls = torch.zeros(hidden.shape[0], 1, dtype=torch.int64, device=hidden.device)
                tap = RowTap(cls, project_keys=True)
                hidden = layer(hidden, None, **{TAP: tap}, **kwargs)
            outputs.append(hidden)
        if sparsifier is None:
            return SparseCLIPVisionOutput(last_hidden_state=torch.cat([outputs[d] for d in depths], dim=-1))
        images = Images(hidden, pixel_values)
        if tap is not None:
            rows = row_probabilities(tap.query, tap.key, layers[used].self_attn.scale)
            images = replace(images, cls_attention=rows[:, :, 0, 1:], keys=tap.key)
        if sparsifier.place == "projector":
            return SparseCLIPVisionOutput(last_hidden_state=hidden[:, 1:], images=images)
        return self._reduced(used, images, sparsifier, output_selection)

    def _reduced(
        self, layer: int, images: Images, sparsifier: EncoderSparsifier, output_selection: bool
    ) -> SparseCLIPVisionOutput:
        with exact(images.hidden):
            reduced = sparsifier.reduce(images)
        selection = (reduced.selection(layer),) if output_selection else None
        return SparseCLIPVisionOutput(
            last_hidden_state=reduced.features, numbers=reduced.numbers, weights=reduced.weights, selection=selection
        )

    def _merge(self, hidden: Tensor, pixels: Tensor, sparsifier: ToMe) -> Images:
        """Runs the layers of a method that merges inside them."""
        layers: Any = self.encoder.layers
        places = torch.arange(hidden.shape[1], device=hidden.device).expand(len(hidden), -1)
        size = None
        for index, layer in enumerate(layers[: sparsifier.feature_layer % len(layers) + 1]):
            removed = sparsifier.removed(index, len(layers), hidden.shape[1] - 1)
            hidden, size, moved = merging_layer(layer, hidden, size, removed, 1, sparsifier.proportional)
            places = places.to(hidden.device) if moved is None else moved.gather(1, places.to(hidden.device))
        return Images(hidden, pixels, places=places)
