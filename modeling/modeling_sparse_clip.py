"""CLIP vision tower that stops after the layer that is used and can reduce its tokens there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPVisionModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .attention_rows import TAP, RowTap, row_probabilities, watch
from .configuration_sparse_llava import SparseCLIPVisionConfig, build_sparsifier
from .sparsifier import EncoderSparsifier, Selection, exact


@dataclass
class SparseCLIPVisionOutput(BaseModelOutputWithPooling):
    """Adds the stage to the stock output.

    Attributes:
        selection: one stage, where tokens were reduced and the record was asked for.
    """

    selection: tuple[Selection, ...] | None = None


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
        used = -1 if sparsifier is None else sparsifier.layers[0] % len(layers)
        hidden = self.pre_layrnorm(self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding))
        outputs = [hidden]
        for index, layer in enumerate(layers[: max(depths, default=0) if sparsifier is None else used + 1]):
            if index != used:
                hidden = layer(hidden, None, **kwargs)
            else:
                cls = torch.zeros(hidden.shape[0], 1, dtype=torch.int64, device=hidden.device)
                tap = RowTap(cls, project_keys=True)
                hidden = layer(hidden, None, **{TAP: tap}, **kwargs)
            outputs.append(hidden)
        if sparsifier is None:
            return SparseCLIPVisionOutput(last_hidden_state=torch.cat([outputs[d] for d in depths], dim=-1))

        cls_attention = row_probabilities(tap.query, tap.key, layers[used].self_attn.scale)[:, :, 0, 1:]
        with exact(hidden):
            features, kept, scores, merged = sparsifier.reduce(hidden, cls_attention, tap.key, pixel_values)
        selection = None
        if output_selection:
            merge_map = None if merged is None else torch.where(merged >= 0, merged + scores.shape[1], -1)
            selection = (Selection(used, kept, scores, merge_map),)
        return SparseCLIPVisionOutput(last_hidden_state=features, selection=selection)
