"""Decoders that can drop visual tokens between layers: LLaMA, Mistral and Qwen2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import AutoModel, Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.mistral.modeling_mistral import MistralModel
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .pruning_attention import watch
from .pruning_cache import CACHE, remembered, the_cache
from .pruning_decoder import DecoderRun
from .pruning_stage import DecoderPruning
from .pruning_types import Selection


@dataclass
class SparseDecoderOutput(BaseModelOutputWithPast):
    """Adds to the stock output what a pruned prefill leaves.

    Attributes:
        columns: `(batch, new_length)` int64, the prompt column of each row of `last_hidden_state`, -1 for merged
            tokens, -2 for padding; None where nothing was dropped.
        selection: the stages, if they were asked for.
    """

    columns: Tensor | None = None
    selection: tuple[Selection, ...] | None = None


class PrunedDecoderMixin:
    """Modifications: `forward` is told where visual tokens are, and what method prunes them between layers.

    Without that, and with a cache of whole prompts, it is the stock forward. The state of a request is in arguments and
    in the cache: the model can serve several threads.

    Attributes:
        position_axes: how many position ids a token has: three, in M-RoPE.
    """

    position_axes: ClassVar[int] = 1
    config: Any
    embed_tokens: nn.Module
    layers: Any
    norm: nn.Module
    rotary_emb: nn.Module
    gradient_checkpointing: bool
    training: bool

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.watch_layers()

    def watch_layers(self) -> None:
        """Lets the layers' attention hand out the rows that a method asks for."""
        for layer in self.layers:
            watch(layer.self_attn)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        pruning: DecoderPruning | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Runs the decoder; arguments as the stock class's, and

        Args:
            pruning: where the visual tokens of `inputs_embeds` `(batch, length, channels)` are, and what prunes them.
            cache, past_key_values: two names of one argument.

        Raises:
            ValueError: for visual tokens on a cache that is not empty, or a mask that is not `(batch, length)`.
        """
        cache = the_cache(past_key_values, cache)
        if pruning is None and not set(remembered(cache)) - {0}:
            return super().forward(  # type: ignore[misc]
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                **{CACHE: cache},
                **kwargs,
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if isinstance(attention_mask, dict) or (attention_mask is not None and attention_mask.dim() != 2):
            raise ValueError(
                "Pruning needs an attention_mask of shape (batch, length); masks per query are not supported."
            )
        return self._forward_pruned(inputs_embeds, attention_mask, position_ids, cache, pruning, **kwargs)

    @merge_with_config_defaults
    @capture_outputs
    def _forward_pruned(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        pruning: DecoderPruning | None,
        use_cache: bool | None = None,
        added: Sequence[Tensor] = (),
        **kwargs: Any,
    ) -> SparseDecoderOutput:
        """As `forward`; each of `added`, `(batch, length, channels)`, is for the output of one of the first layers."""
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        run = DecoderRun(self, inputs_embeds, attention_mask, position_ids, cache)
        if pruning is not None:
            run.open(pruning)
        for index, layer in enumerate(self.layers[: self.config.num_hidden_layers]):
            arguments = run.before(index)
            run.hidden = layer(run.hidden, use_cache=use_cache, **arguments, **kwargs)
            if index < len(added):
                run.add(added[index])
            run.after(index)
        columns, selection = run.close()
        return SparseDecoderOutput(
            last_hidden_state=self.norm(run.hidden),
            columns=columns,
            selection=selection,
            **{CACHE: cache if use_cache else None},
        )


class SparseLlamaModel(PrunedDecoderMixin, LlamaModel):
    """LLaMA decoder that can drop visual tokens between layers."""


class SparseMistralModel(PrunedDecoderMixin, MistralModel):
    """Mistral decoder that can drop visual tokens between layers."""


class SparseQwen2Model(PrunedDecoderMixin, Qwen2Model):
    """Qwen2 decoder that can drop visual tokens between layers."""


SPARSE_DECODERS: dict[str, Any] = {
    "llama": SparseLlamaModel,
    "mistral": SparseMistralModel,
    "qwen2": SparseQwen2Model,
}


def sparse_decoder(config: Any) -> Any:
    """The decoder of a text configuration, one that can prune where there is one of its kind."""
    kind = SPARSE_DECODERS.get(config.model_type)
    return AutoModel.from_config(config) if kind is None else kind(config)
