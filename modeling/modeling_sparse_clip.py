"""Vision towers, CLIP's and SigLIP's, that stop after the layer that is used and can reduce their tokens there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, SiglipVisionModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_sparse_llava import SparseCLIPVisionConfig, build_sparsifier
from .pruning_attention import TAP, RowTap, received_attention, row_probabilities, watch
from .pruning_ops import autocast_disabled, image_fingerprints
from .pruning_types import Selection, VisionFeatures, VisualTokens


@dataclass
class SparseCLIPVisionOutput(BaseModelOutputWithPooling):
    """Adds to the stock output.

    Attributes:
        tokens: what a method made of the images.
        vision: what a method behind the projector needs; nothing is reduced yet: `last_hidden_state` is all patches.
        selection: one stage, where tokens were reduced and the record was asked for.
    """

    tokens: VisualTokens | None = None
    vision: VisionFeatures | None = None
    selection: tuple[Selection, ...] | None = None


class SparseCLIPEncoderLayer(CLIPEncoderLayer):
    """Modifications: a method inside the layers runs a layer in its own way, as `run`, which is given the layer."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, run: Any = None, **kwargs: Any
    ) -> Any:
        if run is not None:
            return run(self, hidden_states)
        return super().forward(hidden_states, attention_mask, **kwargs)


def register_weight_names(stock_by_sparse: dict[str, str]) -> None:
    """Lets transformers rename the weights of published checkpoints for sparse model types and classes; idempotent."""
    for sparse, stock in stock_by_sparse.items():
        register_checkpoint_conversion_mapping(sparse, get_checkpoint_conversion_mapping(stock), overwrite=True)


register_weight_names({"SparseCLIPVisionModel": "CLIPVisionModel", "SparseSiglipVisionModel": "SiglipVisionModel"})


def vision_tower(config: Any) -> Any:
    """The tower of a vision configuration, one that can prune where it is a CLIP or a SigLIP."""
    own = {"clip_vision_model": SparseCLIPVisionModel, "siglip_vision_model": SparseSiglipVisionModel}
    kind = own.get(config.model_type)
    return AutoModel.from_config(config) if kind is None else kind(config)


class ProjectedFeaturesMixin:
    """What models share whose projector takes the hidden states of one or several layers of a tower."""

    config: Any
    vision_tower: Any
    multi_modal_projector: Any

    def refuse_features(self, encoder: Any, given: dict[str, Any]) -> None:
        """Takes the feature layer and strategy of a call out of what is `given`.

        Raises:
            ValueError: for those that are not the configuration's, which an encoder method takes.
        """
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            value = given.pop(name, None)
            if value is not None and value != getattr(self.config, name):
                raise ValueError(f"{name}={value!r}: {encoder.name} takes its own features; leave it out.")

    def reduces_inside(self, encoder: Any) -> bool:
        """Whether the tower is handed the method; else one behind the projector takes what the dense tower gives."""
        tower = self.vision_tower
        return isinstance(tower, SparseTowerMixin) and bool(tower.has_cls or encoder.place != "projector")

    def projected_features(
        self,
        pixel_values: Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        pool: Callable[[Tensor], Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """All patches of `(items, 3, height, width)`, projected: `(items, N, channels)`.

        A CLIP or SigLIP tower runs no layer that is not used. With `pool`, what it makes of the patches is projected.
        """
        chosen: Any = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        chosen = [chosen] if isinstance(chosen, int) else chosen
        tower: Any = self.vision_tower
        if isinstance(tower, SparseTowerMixin):
            depths = [layer % (len(tower.encoder.layers) + 1) for layer in chosen]
            hidden = self.vision_tower(pixel_values, depths=depths, return_dict=True, **kwargs).last_hidden_state
        else:
            states = tower(pixel_values, output_hidden_states=True, return_dict=True, **kwargs).hidden_states
            hidden = torch.cat([states[layer] for layer in chosen], dim=-1)
        if (vision_feature_select_strategy or self.config.vision_feature_select_strategy) == "default":
            hidden = hidden[:, 1:]
        return self.multi_modal_projector(hidden if pool is None else pool(hidden))


class SparseTowerMixin:
    """Modifications of a stock tower, whose tokens can be reduced.

    It stops after the last layer that is used; with an encoder method `last_hidden_state` is the reduced output of the
    method's layer, `(images, tokens, channels)`, and there is no pooled output. Without a method and without `depths`
    it is the stock tower.

    Attributes:
        has_cls: whether CLS is its first token.
    """

    config: Any
    encoder: Any
    embeddings: Any
    sparsifier: Any = None
    has_cls: ClassVar[bool] = True

    def embed(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> Tensor:
        """What enters the first layer."""
        hidden: Tensor = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        return hidden

    def watch_layers(self) -> None:
        """Lets the layers' attention hand out the rows that a method asks for."""
        for layer in self.encoder.layers:
            watch(layer.self_attn)

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        sparsifier: Any = None,
        depths: Sequence[int] | None = None,
        output_selection: bool = False,
        with_cls: bool | None = None,
        refine: Callable[[VisionFeatures], VisionFeatures] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encodes `(images, 3, height, width)` pixels; arguments as the stock class's, and

        Args:
            sparsifier: an `EncoderSparsifier` for this call; by default the configuration's.
            depths: return the outputs after these many layers, concatenated over channels, instead of running all
                layers; not together with a method.
            output_selection: whether to return the stage.
            with_cls: whether CLS is one of the tokens of an item, number 0, which a method in the tower keeps, and is
                among `depths`' outputs; by default these have it, and methods do as published.
            refine: what becomes of the features of a method's layer before it chooses from them.
        """
        sparsifier = sparsifier or (self.sparsifier if depths is None else None)
        if sparsifier is None and depths is None:
            return super().forward(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)  # type: ignore[misc]
        outputs = self._forward_short(
            pixel_values, interpolate_pos_encoding, sparsifier, depths, with_cls, refine, **kwargs
        )
        if output_selection and outputs.tokens is not None:
            layer = sparsifier.feature_layer % len(self.encoder.layers)
            outputs.selection = (outputs.tokens.selection(layer),)
        return outputs

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def _forward_short(
        self,
        pixel_values: Tensor,
        interpolate_pos_encoding: bool,
        method: Any,
        depths: Sequence[int] | None,
        with_cls: bool | None = None,
        refine: Callable[[VisionFeatures], VisionFeatures] | None = None,
        **kwargs: Any,
    ) -> SparseCLIPVisionOutput:
        hidden = self.embed(pixel_values, interpolate_pos_encoding)
        if method is None:
            outputs = [hidden]
            for layer in self.encoder.layers[: max(depths)]:  # type: ignore[arg-type]
                outputs.append(layer(outputs[-1], None, **kwargs))
            chosen = torch.cat([outputs[depth] for depth in depths], dim=-1)  # type: ignore[union-attr]
            return SparseCLIPVisionOutput(last_hidden_state=chosen[:, 1:] if with_cls is False else chosen)
        rows, columns = (size // self.config.patch_size for size in pixel_values.shape[-2:])
        whole = bool(with_cls) and method.place == "projector"
        first = int(self.has_cls and not whole)
        vision = self._features(method, hidden, (rows, columns), first, **kwargs)
        vision = vision if refine is None else refine(vision)
        if method.draws:
            vision = replace(vision, fingerprints=image_fingerprints(pixel_values))
        if method.inside is None:
            return SparseCLIPVisionOutput(last_hidden_state=vision.features, vision=vision)
        with autocast_disabled(vision.features):
            tokens = method.inside.reduce(vision)
            if method.behind is not None:
                left = tokens.features
                vision = replace(vision, features=left, grid=(1, left.shape[1]), sources=None, before=tokens)
                return SparseCLIPVisionOutput(last_hidden_state=left, vision=vision)
            if with_cls:
                tokens = tokens.with_cls(vision.cls, method.keeps_cls)
        return SparseCLIPVisionOutput(last_hidden_state=tokens.features, tokens=tokens)

    def _features(
        self, method: Any, hidden: Tensor, grid: tuple[int, int], first: int, **kwargs: Any
    ) -> VisionFeatures:
        """What the method sees: the output of its layer, with the attention of CLS, or that received, if it needs that.

        Args:
            first: 1 to leave CLS out, 0 for a method behind the projector that chooses from it too.
        """
        layers: Any = self.encoder.layers
        if method.place == "layers":
            hidden, places = method.run_layers(layers, hidden)
            # CLS is token 0 throughout.
            return VisionFeatures(hidden[:, 1:], grid, hidden[:, 0], sources=places[:, 1:] - 1)
        used = method.feature_layer % len(layers)
        for layer in layers[:used]:
            hidden = layer(hidden, None, **kwargs)
        if not method.needs_attention:
            hidden = layers[used](hidden, None, **kwargs)
            return VisionFeatures(hidden[:, first:], grid, hidden[:, 0] if self.has_cls else None)
        looking = torch.arange(hidden.shape[1] if method.receives else 1, device=hidden.device)
        tap = RowTap(looking.expand(len(hidden), -1), project_keys=True)
        hidden = layers[used](hidden, None, **{TAP: tap}, **kwargs)
        scale = layers[used].self_attn.scale
        if method.receives:
            saliency = tap.of_all_heads(received_attention(tap.query, tap.key, scale)).mean(1, keepdim=True)
        else:
            saliency = tap.of_all_heads(row_probabilities(tap.query, tap.key, scale)[:, :, 0])
        keys = tap.of_all_heads(tap.key)[:, :, first:]
        cls = hidden[:, 0] if self.has_cls else None
        return VisionFeatures(hidden[:, first:], grid, cls, saliency[..., first:], keys)


class SparseCLIPVisionModel(SparseTowerMixin, CLIPVisionModel):
    """CLIP vision tower whose tokens can be reduced; usable alone. See `SparseTowerMixin`."""

    config_class = SparseCLIPVisionConfig
    config: SparseCLIPVisionConfig
    _no_split_modules = (*CLIPVisionModel._no_split_modules, "SparseCLIPEncoderLayer")

    def __init__(self, config: SparseCLIPVisionConfig) -> None:
        super().__init__(config)
        self.encoder.layers = nn.ModuleList(SparseCLIPEncoderLayer(config) for _ in self.encoder.layers)
        self.post_init()
        self.sparsifier = build_sparsifier(config)
        self.watch_layers()

    def embed(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> Tensor:
        hidden: Tensor = self.pre_layrnorm(super().embed(pixel_values, interpolate_pos_encoding))
        return hidden


class SparseSiglipVisionModel(SparseTowerMixin, SiglipVisionModel):
    """SigLIP vision tower, which has no CLS: methods rate its patches by what they receive. See `SparseTowerMixin`."""

    has_cls = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.watch_layers()
