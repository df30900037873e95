"""Answering many questions about few pictures: each picture is encoded once, and its prefix is computed once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache

from llava_sparse.modeling.sparsifier import Selection

from .models import IMAGE_TOKEN, fill_prompt

ANSWER_MODES = ("text", "logits")
MAX_NEW_TOKENS = 16
YES, NO = "Yes", "No"


@dataclass(frozen=True)
class Answer:
    """What a model said, and what it saw.

    Attributes:
        text: the generated text, or Yes or No in logits mode.
        score: logit of Yes less logit of No at the first token of the answer; None in text mode.
        kept: for each stage of the method, `(patches,)` bool, the patches that were kept as tokens of their own; empty
            for questions that were not grouped.
        visual_tokens: visual tokens after each decoder layer, averaged over the layers, as the papers count; None for
            a decoder method on questions that were not grouped.
    """

    text: str
    score: float | None
    kept: list[np.ndarray]
    visual_tokens: float | None


@dataclass(frozen=True)
class Asker:
    """Asks a model about pictures.

    Attributes:
        model: dense or pruned.
        processor: writes a placeholder for every patch.
        prompt: with `<image>` and `{question}`.
        mode: `"text"` generates greedily, `"logits"` compares Yes with No at the first token of the answer.
        grouped: whether a picture is encoded once for all its questions and, where the visual tokens do not depend on
            the question, the cache of what stands before it is computed once; else each question is asked on its own
            through `generate`, as transformers' users do.
    """

    model: Any
    processor: Any
    prompt: str
    mode: str = "text"
    grouped: bool = True

    @torch.inference_mode()
    def pixels(self, pictures: Sequence[Any]) -> Tensor:
        """`(pictures, 3, height, width)` of RGB pictures."""
        inputs = self.processor.image_processor(images=list(pictures), return_tensors="pt")
        return inputs["pixel_values"].to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def answer(self, pixels: Tensor, owners: Sequence[int], questions: Sequence[str], batch_size: int) -> list[Answer]:
        """Answers questions about some pictures.

        Args:
            pixels: `(pictures, 3, height, width)`.
            owners: the picture of each question.
            batch_size: questions at a time.
        """
        prepare = self._encode(pixels) if self.grouped else None
        answers: list[Answer] = []
        for start in range(0, len(questions), batch_size):
            rows = slice(start, start + batch_size)
            owner = torch.tensor(owners[rows], device=pixels.device)
            ids = [self._ids(question) for question in questions[rows]]
            if prepare is None:
                answers += self._ask_one_by_one(pixels[owner], ids)
            elif prepare.prefix is None:
                answers += self._ask_whole(prepare, owner, ids)
            else:
                answers += self._ask_behind_prefix(prepare, owner, ids)
        return answers

    def _ids(self, question: str) -> list[int]:
        """The prompt's token ids, with one image token."""
        text = fill_prompt(self.prompt, question, self.processor.image_token)
        return self.processor.tokenizer(text)["input_ids"]

    def _encode(self, pixels: Tensor) -> _Encoded:
        """Features of the pictures and, if they do not depend on the question, the cache up to their end."""
        method = getattr(self.model.model, "sparsifier", None)
        arguments = {} if method is None else {"output_selection": True}
        outputs = self.model.model.get_image_features(pixel_values=pixels, return_dict=True, **arguments)
        features = torch.stack(list(outputs.pooler_output))
        selection = tuple(getattr(outputs, "selection", None) or ())
        if method is not None and method.kind == "decoder":
            return _Encoded(features, selection, fingerprints=method.fingerprints(pixels))
        before = self._ids("")
        before = before[: before.index(self.processor.image_token_id)]
        words = self._embed(torch.tensor([before] * len(pixels), dtype=torch.long, device=pixels.device))
        embeds = torch.cat([words, features.to(words.device, words.dtype)], dim=1)
        outputs = self.model(inputs_embeds=embeds, attention_mask=_ones(embeds), use_cache=True, logits_to_keep=1)
        return _Encoded(features, selection, outputs.past_key_values, embeds.shape[1])

    def _embed(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids)

    def _ask_behind_prefix(self, encoded: _Encoded, owner: Tensor, ids: list[list[int]]) -> list[Answer]:
        """Only what stands behind the image is left to compute."""
        image_token = self.processor.image_token_id
        suffixes, mask = _left_padded([row[row.index(image_token) + 1 :] for row in ids], owner.device)
        cache = _rows_of(encoded.prefix, owner)
        mask = torch.cat([mask.new_ones(len(owner), encoded.prefix_length), mask], dim=1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        outputs = self.model(
            input_ids=suffixes,
            attention_mask=mask,
            position_ids=positions[:, encoded.prefix_length :],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        kept = [_kept(stage, self._patches)[owner.cpu().numpy()] for stage in encoded.selection]
        tokens = [float(encoded.features.shape[1])] * len(ids)
        return self._finish(outputs, mask, kept, tokens)

    def _ask_whole(self, encoded: _Encoded, owner: Tensor, ids: list[list[int]]) -> list[Answer]:
        """Whole prompts around features that are there already."""
        features = encoded.features[owner]
        token = self.processor.image_token_id
        rows = [[t for i in row for t in ([i] * features.shape[1] if i == token else [i])] for row in ids]
        padded, mask = _left_padded(rows, owner.device)
        visual = padded == token
        embeds = self._embed(padded)
        embeds = embeds.masked_scatter(visual[..., None], features.to(embeds.device, embeds.dtype))
        outputs = self.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            visual_mask=visual,
            fingerprints=None if encoded.fingerprints is None else encoded.fingerprints[owner],
            output_selection=True,
            use_cache=True,
            logits_to_keep=1,
        )
        kept = [_kept(stage, self._patches) for stage in outputs.selection]
        return self._finish(outputs, mask, kept, self._visual_tokens(outputs.selection, len(ids)))

    def _finish(
        self, outputs: Any, mask: Tensor, kept: list[np.ndarray], tokens: Sequence[float | None]
    ) -> list[Answer]:
        """The answers that follow the prefill's outputs."""
        logits = outputs.logits[:, -1].float()
        scores: list[float | None] = [None] * len(logits)
        if self.mode == "logits":
            yes, no = self._answer_tokens()
            scores = (logits[:, yes] - logits[:, no]).tolist()
            texts = [YES if score > 0 else NO for score in scores if score is not None]
        else:
            texts = self._generate(logits, outputs.past_key_values, mask)
        masks = [[stage[row] for stage in kept] for row in range(len(texts))]
        return [Answer(*answer) for answer in zip(texts, scores, masks, tokens, strict=True)]

    def _generate(self, logits: Tensor, cache: Cache, mask: Tensor) -> list[str]:
        """Greedy continuation; without `generate`, whose preparations cost more than the few tokens of an answer."""
        ends = self.model.generation_config.eos_token_id
        ends = torch.tensor([] if ends is None else ends, device=logits.device).flatten()
        positions = mask.sum(-1, keepdim=True)
        said = [logits.argmax(-1)]
        ended = torch.isin(said[0], ends)
        while len(said) < MAX_NEW_TOKENS and not bool(ended.all()):
            mask = torch.cat([mask, _ones(mask[:, :1])], dim=1)
            outputs = self.model(
                input_ids=said[-1][:, None],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            positions = positions + 1
            following = outputs.logits[:, -1].float().argmax(-1)
            said.append(torch.where(ended, said[-1], following))
            ended |= torch.isin(said[-1], ends)
        ids = torch.stack(said, dim=1).tolist()
        stops = set(ends.tolist())
        whole = [row[: next((i for i, token in enumerate(row) if token in stops), len(row))] for row in ids]
        return [text.strip() for text in self.processor.tokenizer.batch_decode(whole, skip_special_tokens=True)]

    def _ask_one_by_one(self, pixels: Tensor, ids: list[list[int]]) -> list[Answer]:
        """The questions of a batch through the model's own `generate`, with a picture each."""
        token, count = self.processor.image_token_id, self._placeholders
        rows = [[t for i in row for t in ([i] * count if i == token else [i])] for row in ids]
        padded, mask = _left_padded(rows, pixels.device)
        inputs = {"input_ids": padded, "attention_mask": mask, "pixel_values": pixels}
        method = getattr(self.model.model, "sparsifier", None)
        tokens = count if method is None else getattr(method, "tokens", None)
        if self.mode == "logits":
            return self._finish(self.model(**inputs, logits_to_keep=1), mask, [], [tokens] * len(ids))
        said = self.model.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=MAX_NEW_TOKENS)
        texts = self.processor.batch_decode(said[:, padded.shape[1] :], skip_special_tokens=True)
        return [Answer(text.strip(), None, [], tokens) for text in texts]

    @property
    def _patches(self) -> int:
        vision = self.model.config.vision_config
        return (vision.image_size // vision.patch_size) ** 2

    @property
    def _placeholders(self) -> int:
        return self._patches + (self.model.config.vision_feature_select_strategy == "full")

    def _visual_tokens(self, selection: Sequence[Selection], rows: int) -> list[float]:
        """Of a decoder method: visual tokens after each layer, averaged over the layers."""
        layers = self.model.config.text_config.num_hidden_layers
        counts = torch.full((layers, rows), float(self._placeholders))
        for stage in selection:
            counts[stage.layer :] = _tokens_left(stage).float().cpu()
        return counts.mean(0).tolist()

    def _answer_tokens(self) -> tuple[int, int]:
        """Ids of the first tokens of the answers Yes and No behind the prompt."""
        tokenizer = self.processor.tokenizer
        text = self.prompt.replace(IMAGE_TOKEN, "")
        bare = tokenizer(text)["input_ids"]
        found = []
        for answer in (YES, NO):
            ids = tokenizer(f"{text} {answer}")["input_ids"]
            new = next((i for i, (a, b) in enumerate(zip(ids, bare, strict=False)) if a != b), len(bare))
            found.append(ids[new])
        if found[0] == found[1] or tokenizer.unk_token_id in found:
            raise ValueError(f"{YES} and {NO} begin with the same token, or an unknown one: use --answer-mode text.")
        return found[0], found[1]


@dataclass(frozen=True)
class _Encoded:
    """Pictures, encoded.

    Attributes:
        features: `(pictures, tokens, channels)`; selection: an encoder method's stages.
        prefix: the cache of the prompt up to the image's end, or None; prefix_length: its tokens.
        fingerprints: `(pictures,)`, what a method draws from the pictures, or None.
    """

    features: Tensor
    selection: tuple[Selection, ...]
    prefix: Cache | None = None
    prefix_length: int = 0
    fingerprints: Tensor | None = None


def _ones(like: Tensor) -> Tensor:
    return torch.ones(like.shape[:2], dtype=torch.long, device=like.device)


def _left_padded(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids `(rows, length)`, zeros at the left, and their mask."""
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-1, padding_side="left")
    return ids.clamp(min=0).to(device), (ids >= 0).long().to(device)


def _rows_of(cache: Any, rows: Tensor) -> Any:
    """A cache with some rows of another, which stays as it is."""
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.batch_select_indices(rows)
    return chosen


def _kept(stage: Selection, patches: int) -> np.ndarray:
    """`(rows, patches)` bool."""
    kept = stage.kept.cpu()
    mask = torch.zeros(len(kept), patches + 1, dtype=torch.bool)
    # Padding (-1), and with several stages tokens merged earlier, fall into the column that is cut off.
    mask.scatter_(1, torch.where((kept >= 0) & (kept < patches), kept, patches), True)
    return mask[:, :patches].numpy()


def _tokens_left(stage: Selection) -> Tensor:
    """`(rows,)`: visual tokens behind a stage, kept and merged."""
    left = (stage.kept >= 0).sum(-1)
    if stage.merge_map is not None:
        left = left + left.new_tensor([len(row[row >= 0].unique()) for row in stage.merge_map])
    return left
