"""What a model with its head adds: labels, logits in the caller's columns, and a method that can be switched."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .configuration_sparse_llava import build_method
from .pruning_base import BaseWeightsMixin
from .pruning_cache import CACHE, the_cache
from .pruning_generation import PrunedGenerationMixin
from .pruning_inputs import IGNORED_LABEL, prompt_lengths, rows_as_passed
from .pruning_model import IMAGES
from .pruning_ops import rows_at
from .pruning_sequence import PADDING
from .pruning_settings import Sparsity, as_lists
from .pruning_stock import CACHES, under_signature
from .pruning_types import Selection

logger = logging.get_logger(__name__)

# Arguments that no stock class has; see `PrunedModelMixin.forward`.
OWN = ("visual_mask", "output_selection", "prompt_length", "as_passed")


@dataclass
class SparseCausalLMOutput(LlavaCausalLMOutputWithPast):
    """Adds to the stock output; see `SparseModelOutput`. `logits` has the rows of `last_hidden_state`."""

    columns: Tensor | None = None
    selection: tuple[Selection, ...] | None = None
    visual_tokens: Tensor | None = None


class PrunedHeadMixin(BaseWeightsMixin, PrunedGenerationMixin):
    """Modifications of the stock class behind it, a model with its head: what is left of its prompt is pruned.

    Labels follow the tokens that are left, generation keeps counting in the tokens that the caller passed, and methods
    can be switched.

    Attributes:
        model_class: what a family's class has in place of the stock model without head.
        other_names: of arguments that the model knows by another name.
        arguments: the names of all that `forward` knows; others are the loss function's too.
    """

    config: Any
    lm_head: nn.Module
    loss_function: Any
    model_class: ClassVar[type]
    other_names: ClassVar[dict[str, str]] = {}
    arguments: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "model_class" in cls.__dict__ and "forward" not in cls.__dict__:
            model: Any = cls.model_class
            pixels = (source for source, _ in model.modalities.values())
            own = (*pixels, *model.visual_arguments, "mm_encoder_outputs", *OWN, *CACHES)
            cls.forward = under_signature(PrunedHeadMixin.forward, cls.stock_class().forward, own)  # type: ignore[method-assign]
            cls.arguments = frozenset(signature(cls.forward).parameters)

    @classmethod
    def stock_class(cls) -> Any:
        """The class behind this mixin and those that it is made of."""
        return cls.__mro__[cls.__mro__.index(PrunedGenerationMixin) + 1]

    def __init__(self, config: Any) -> None:
        # Skips the stock class's, which would build the stock model first.
        super(self.stock_class(), self).__init__(config)  # type: ignore[call-arg]
        self.model: Any = self.model_class(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()  # type: ignore[attr-defined]

    def set_sparsity(
        self,
        method: str | None = None,
        budget: Any = None,
        *,
        layers: Any = None,
        budgets: Any = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        """Switches the method without touching the weights; `set_sparsity(None)` makes the model dense.

        A forward pass or a generation that another thread has begun goes on as it began.

        Args:
            method, budget, layers, budgets, options: the configuration's fields `sparse_method`, `sparse_budget`,
                `sparse_layers`, `sparse_budgets`, `sparse_options`.

        Raises:
            ValueError: for an invalid combination; the model stays as it was.
        """
        settings = Sparsity(method, budget, as_lists(layers), as_lists(budgets), options)
        resolved = build_method(self.config, settings)
        changed = copy.copy(self.config)
        changed.take_sparsity(settings)
        self.config.__dict__.update(changed.__dict__)
        self.model.sparsifier = resolved

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Labels say where prompts end, even to a `forward` that another library has put here and that keeps them."""
        if kwargs.get("labels") is not None and kwargs.get("prompt_length") is None:
            ids = args[0] if args else kwargs.get("input_ids")
            given = (kwargs.get(name) for name in ("inputs_embeds", "visual_mask"))
            kwargs["prompt_length"] = self._prompt_length(kwargs["labels"], ids, *given)
        return super().__call__(*args, **kwargs)  # type: ignore[misc]

    def _prompt_length(
        self, labels: Tensor, ids: Tensor | None, embeds: Tensor | None, visual_mask: Tensor | None
    ) -> Tensor | None:
        if self.model.sparsifier is None or (ids is None and embeds is None):
            return None
        if visual_mask is None:
            marks = [self.model.placeholders(ids, embeds, name) for name in self.model.modalities]
            visual_mask = torch.stack(marks).any(0)
        return prompt_lengths(labels, visual_mask)

    @can_return_tuple
    def forward(
        self,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        prompt_length: int | Tensor | None = None,
        as_passed: bool | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model, its logits and, with labels, the loss.

        Arguments as those of the stock class and of `PrunedModelMixin.forward`, and

        Args:
            labels: `(batch, length)` over the tokens as passed, placeholders included. They do not choose the tokens
                that predict them: without a `prompt_length`, each prompt ends at the first label behind its last image,
                that is, with several turns, where the first answer about the image that is to be learnt begins. The
                loss is over all of them, whatever `logits_to_keep` is.
            logits_to_keep: counts the rows of `logits`, or indexes them. In training, and with labels, `logits` are as
                long as `input_ids`, however many tokens were dropped; else they are of the tokens that are left: see
                `PrunedModelMixin.rows_asked`. As passed they take as much memory as the dense model's where
                `logits_to_keep` is 0; besides them, the loss needs those of the tokens that are left alone.
        """
        inputs = {self.other_names.get(name, name): value for name, value in kwargs.items() if value is not None}
        ids, embeds, marked = (inputs.get(name) for name in ("input_ids", "inputs_embeds", "visual_mask"))
        given: Any = ids if embeds is None else embeds
        if labels is not None and prompt_length is None:
            prompt_length = self._prompt_length(labels, ids, embeds, marked)
        as_passed = self.model.rows_asked(as_passed, labels if prompt_length is None else prompt_length)
        inputs |= {"cache": the_cache(past_key_values, cache), "prompt_length": prompt_length}
        outputs = self.model(**inputs, as_passed=False)
        hidden, columns = outputs.last_hidden_state, outputs.columns
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        rows = None
        if as_passed and columns is not None:
            rows = rows_as_passed(columns, given.shape[1]).to(hidden.device)[:, kept]

        def asked(x: Tensor) -> Tensor:
            return x[:, kept] if rows is None else rows_at(x, rows)

        few = labels is None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0)
        every = self.lm_head(asked(hidden) if few else hidden)
        loss = None
        if labels is not None:
            labels = labels if columns is None else labels_left(labels, columns.to(labels.device))
            vocabulary = self.config.text_config.vocab_size
            own = {name: value for name, value in kwargs.items() if name not in self.arguments}
            loss = self.loss_function(logits=every, labels=labels, vocab_size=vocabulary, **own)
        return SparseCausalLMOutput(
            loss=loss,
            logits=every if few else asked(every),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            columns=None if as_passed else outputs.columns,
            selection=outputs.selection,
            visual_tokens=outputs.visual_tokens,
            **{name: getattr(outputs, name) for name in (CACHE, IMAGES)},
        )


def labels_left(labels: Tensor, columns: Tensor) -> Tensor:
    """Labels `(batch, length)` over the tokens as passed, of the rows that are left: `columns`, `(batch, rows)`."""
    # A row of padding predicts nothing: the token behind it has no predecessor.
    follows_padding = nn.functional.pad(columns[:, :-1] == PADDING, (1, 0))
    labels = labels.gather(1, columns.clamp(min=0))
    return labels.masked_fill((columns < 0) | follows_padding, IGNORED_LABEL)
