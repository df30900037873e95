"""What a model with its head adds: labels, logits in the caller's columns, and a method that can be switched."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.utils import logging

from .configuration_sparse_llava import build_method
from .pruning_cache import CACHE
from .pruning_inputs import IGNORED_LABEL, prompt_lengths, rows_as_passed
from .pruning_model import IMAGES
from .pruning_ops import rows_at
from .pruning_sequence import PADDING
from .pruning_settings import Sparsity, as_lists
from .pruning_types import Selection

logger = logging.get_logger(__name__)


@dataclass
class SparseCausalLMOutput(LlavaCausalLMOutputWithPast):
    """Adds to the stock output; see `SparseModelOutput`. `logits` has the rows of `last_hidden_state`."""

    columns: Tensor | None = None
    selection: tuple[Selection, ...] | None = None


class PrunedHeadMixin:
    """Modifications of a stock model with its head: labels follow the tokens that are left, methods can be switched."""

    config: Any
    model: Any
    lm_head: nn.Module
    loss_function: Any

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

    def pruned_forward(
        self,
        inputs: dict[str, Any],
        labels: Tensor | None,
        logits_to_keep: int | Tensor,
        prompt_length: int | Tensor | None = None,
        as_passed: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """The model, its logits and, with `labels` `(batch, length)` over the tokens as passed, the loss.

        The loss is over all labels, whatever `logits_to_keep` is. Logits `as_passed` take as much memory as the dense
        model's where `logits_to_keep` is 0; besides them, the loss needs those of the tokens that are left alone.
        """
        given = inputs["input_ids"] if inputs["inputs_embeds"] is None else inputs["inputs_embeds"]
        if labels is not None and prompt_length is None:
            prompt_length = self._prompt_length(
                labels, inputs["input_ids"], inputs["inputs_embeds"], inputs["visual_mask"]
            )
        as_passed = self.model.rows_asked(as_passed, labels if prompt_length is None else prompt_length)
        outputs = self.model(**inputs, prompt_length=prompt_length, as_passed=False, **kwargs)
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
            if columns is not None:
                columns = columns.to(labels.device)
                # A row of padding predicts nothing: the token behind it has no predecessor.
                follows_padding = nn.functional.pad(columns[:, :-1] == PADDING, (1, 0))
                labels = labels.gather(1, columns.clamp(min=0))
                labels = labels.masked_fill((columns < 0) | follows_padding, IGNORED_LABEL)
            vocabulary = self.config.text_config.vocab_size
            loss = self.loss_function(logits=every, labels=labels, vocab_size=vocabulary, **kwargs)
        return SparseCausalLMOutput(
            loss=loss,
            logits=every if few else asked(every),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            columns=None if as_passed else outputs.columns,
            selection=outputs.selection,
            **{name: getattr(outputs, name) for name in (CACHE, IMAGES)},
        )
