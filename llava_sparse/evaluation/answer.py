"""Answering many questions about few pictures: each picture is encoded once, and its prefix is computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from transformers import Cache, LogitsProcessor, LogitsProcessorList

from llava_sparse import Selection
from llava_sparse.modeling.pruning_cache import CACHE
from llava_sparse.processing import question_ids

from .batches import kept_patches, left_padded, ones_like, positions_of, rows_of, some_pictures
from .model import IMAGE_TOKEN, QUESTION, fill_prompt

ANSWER_MODES = ("text", "logits", "likelihood")
MAX_NEW_TOKENS = 16
# Settings of generation that no greedy answer depends on, or that are followed here; with others, `generate` is called.
GREEDY = [
    "_from_model_config",
    "transformers_version",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "top_h",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "max_length",
    "max_new_tokens",
    "num_beams",
    "early_stopping",
    "length_penalty",
    "use_cache",
    "cache_implementation",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    "bos_token_id",
    "pad_token_id",
    "eos_token_id",
    "disable_compile",
    "compile_config",
    "prefill_chunk_size",
]


@dataclass(frozen=True)
class Answer:
    """What a model said, and what it saw.

    Attributes:
        text: the generated text, or one of the choices in the other modes.
        score: logit of the first choice less that of the second at the first token of the answer, or log-likelihood of
            the one answer less that of the other; None in text mode.
        kept: for each stage of the method, `(patches,)` bool, the patches that were kept as tokens of their own; empty
            for questions that were not grouped.
        visual_tokens: visual tokens after each decoder layer, averaged over the layers, as the papers count; None for
            a decoder method on questions that were not grouped.
        cut: whether the limit of tokens ended it.
    """

    text: str
    score: float | None
    kept: list[np.ndarray]
    visual_tokens: float | None
    cut: bool = False


class Finite(LogitsProcessor):
    """Ends a generation whose logits are no numbers, as of float16 that overflowed, at any token."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores as they are.

        Raises:
            ValueError: if one is NaN or +inf; -inf is what a token that is forbidden has.
        """
        if bool((scores.isnan() | scores.isposinf()).any()):
            raise ValueError("the model's logits are not finite: use another --dtype.")
        return scores


FINITE = Finite()


@dataclass(frozen=True)
class Asker:
    """Asks a model about pictures.

    Attributes:
        model: dense or pruned.
        processor: writes a placeholder for every patch.
        prompt: with `<image>` and `{question}`.
        mode: `"text"` generates greedily, `"logits"` compares the choices at the first token of the answer,
            `"likelihood"` compares all their tokens.
        grouped: whether a picture is encoded once for all its questions and, where the visual tokens do not depend on
            the question, the cache of what stands before it is computed once; else, and where the generation config
            asks for more than the likeliest token, each question is asked on its own through `generate`.
        max_new_tokens: of an answer.
        choices: the answers that are compared.
        grid: None for the picture as it is; patches along a side to which it is downsampled, or 0 to leave it out.
    """

    model: Any
    processor: Any
    prompt: str
    mode: str = "text"
    grouped: bool = True
    max_new_tokens: int = MAX_NEW_TOKENS
    choices: tuple[str, str] = ("Yes", "No")
    grid: int | None = None

    @torch.inference_mode()
    def pixels(self, pictures: Sequence[Any]) -> Tensor:
        """`(pictures, 3, height, width)` of RGB pictures."""
        inputs = self.processor.image_processor(images=list(pictures), return_tensors="pt")
        pixels = inputs["pixel_values"]
        if self.grid:
            side = self.grid * self.model.config.vision_config.patch_size
            pixels = interpolate(pixels.float(), (side, side), mode="bicubic", antialias=True)
        return pixels.to(self.model.device, self.model.dtype)

    @torch.inference_mode()
    def answer(self, pixels: Tensor, owners: Sequence[int], questions: Sequence[str], batch_size: int) -> list[Answer]:
        """Answers questions about some pictures.

        Args:
            pixels: `(pictures, 3, height, width)`.
            owners: the picture of each question.
            batch_size: questions at a time.

        Raises:
            ValueError: for a prompt without its one image, and for logits that are not finite.
        """
        prompts = [_Prompt(self._ids(question), question) for question in questions]
        grouped = (self.grouped or self.grid is not None) and (self.mode != "text" or self._is_greedy)
        if self.grid is not None and not grouped:
            raise ValueError("generation_config: the controls blind and downsampled take greedy answers alone.")
        shared, answers = self._shares_prefix(prompts), list[Answer]()
        encoded: _Encoded | None = None
        encoded_owners: list[int] = []
        for start in range(0, len(questions), batch_size):
            batch, ids = list(owners[start : start + batch_size]), prompts[start : start + batch_size]
            if not grouped:
                answers += self._ask_one_by_one(pixels[batch], ids)
                continue
            shown = list(dict.fromkeys(batch))
            if encoded is None or shown != encoded_owners:
                encoded = None  # Its memory is needed.
                encoded, encoded_owners = self._encode(pixels[shown], shared), shown
            owner = torch.tensor([shown.index(picture) for picture in batch], device=pixels.device)
            ask = self._ask_whole if encoded.prefix is None else self._ask_behind_prefix
            answers += ask(encoded, owner, ids)
        return answers

    @property
    def _is_greedy(self) -> bool:
        """Whether the likeliest token is what the generation config asks for."""
        asked = self.model.generation_config.to_diff_dict()
        return all(
            name in GREEDY or value in (None, False, 0) or (isinstance(value, float) and value == 1.0)
            for name, value in asked.items()
        )

    def _ids(self, question: str) -> list[int]:
        """A prompt's token ids, with one image token."""
        text = fill_prompt(self.prompt, question, self.processor.image_token)
        ids: list[int] = self.processor.tokenizer(text)["input_ids"]
        if ids.count(self.processor.image_token_id) != 1:
            raise ValueError(f"prompt {text!r}: {self.processor.image_token} has to be in it once, for the picture.")
        return ids

    @property
    def _encoder(self) -> Any:  # None if nothing is pruned before the decoder.
        return getattr(getattr(self.model.model, "sparsifier", None), "encoder", None)

    @property
    def _decoder(self) -> Any:  # None if nothing is pruned in it.
        return getattr(getattr(self.model.model, "sparsifier", None), "decoder", None)

    @property
    def _patches(self) -> int:
        vision = self.model.config.vision_config
        return (vision.image_size // vision.patch_size if self.grid is None else self.grid) ** 2

    @property
    def _placeholders(self) -> int:
        return self._patches + (self.model.config.vision_feature_select_strategy == "full" and self.grid != 0)

    @property
    def _tokens(self) -> int:  # Of a picture, entering the decoder.
        return self._placeholders if self._encoder is None else self._encoder.tokens

    def _shares_prefix(self, prompts: list[_Prompt]) -> bool:
        """Whether all that stands up to the image's end is the same for all questions."""
        window = getattr(self.model.config.text_config, "sliding_window", None)
        longest = max(len(prompt.ids) for prompt in prompts) + self._placeholders + self.max_new_tokens
        return (
            self._decoder is None
            and self.grid != 0
            and not getattr(self._encoder, "looks_at_question", False)
            and self.prompt.index(IMAGE_TOKEN) < self.prompt.index(QUESTION)
            # Padding between prefix and question would fill a window that is shorter.
            and (window is None or longest <= window)
        )

    def _encode(self, pixels: Tensor, shared: bool) -> _Encoded:
        """The pictures, encoded, and, if it is shared by the questions, the cache up to their end."""
        if self.grid == 0:
            return _Encoded(None)
        resized = {"interpolate_pos_encoding": True} if self.grid else {}
        images = self.model.get_image_features(pixel_values=pixels, return_dict=True, **resized)
        if not shared:
            return _Encoded(images)
        before = self._ids("")
        before = before[: before.index(self.processor.image_token_id)]
        row = [*before, *[self.processor.image_token_id] * self._tokens]
        ids = torch.tensor([row] * len(pixels), dtype=torch.long, device=pixels.device)
        outputs = self._run(images, input_ids=ids, attention_mask=ones_like(ids))
        kept = [kept_patches(stage, self._patches) for stage in getattr(outputs, "selection", None) or ()]
        return _Encoded(images, kept, getattr(outputs, CACHE), len(row))

    def _run(self, images: Any, **inputs: Any) -> Any:
        """The prefill of prompts around pictures that are encoded already."""
        recorded = {"output_selection": True} if self._encoder or self._decoder else {}
        seen = {} if images is None else {"mm_encoder_outputs": {"image": images}}
        return self.model(**seen, use_cache=True, logits_to_keep=1, **inputs, **recorded)

    def _ask_behind_prefix(self, encoded: _Encoded, owner: Tensor, prompts: list[_Prompt]) -> list[Answer]:
        """Only what stands behind the image is left to compute."""
        image_token = self.processor.image_token_id
        suffixes, mask = left_padded([p.ids[p.ids.index(image_token) + 1 :] for p in prompts], owner.device)
        cache = rows_of(encoded.prefix, owner)
        mask = torch.cat([mask.new_ones(len(owner), encoded.prefix_length), mask], dim=1)
        positions = positions_of(mask)[:, encoded.prefix_length :]
        outputs = self._continue(suffixes, mask, positions, cache)
        kept = [stage[owner.cpu().numpy()] for stage in encoded.kept]
        return self._finish(outputs, mask, kept, [float(self._tokens)] * len(owner))

    def _ask_whole(self, encoded: _Encoded, owner: Tensor, prompts: list[_Prompt]) -> list[Answer]:
        """Whole prompts around pictures that are encoded already."""
        padded, mask = self._padded(prompts, self._tokens, owner.device)
        asked = self._clip_ids(prompts)
        outputs = self._run(
            some_pictures(encoded.images, owner.tolist()),
            input_ids=padded,
            attention_mask=mask,
            position_ids=positions_of(mask),
            **({} if asked is None else {"question_ids": asked}),
        )
        selection: Sequence[Selection] = getattr(outputs, "selection", None) or ()
        # Where CLS is among the visual tokens of a decoder method alone, it is the first.
        width = self._patches if self._encoder is not None else self._placeholders
        kept = [kept_patches(stage, width)[:, -self._patches :] for stage in selection]
        constant = [float(self._tokens)] * len(prompts)
        left = constant if self._decoder is None else outputs.visual_tokens[:, 1:].float().mean(1).tolist()
        return self._finish(outputs, mask, kept, left)

    def _padded(self, prompts: list[_Prompt], count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids with `count` placeholders for the picture, and their mask."""
        token = self.processor.image_token_id
        return left_padded([[t for i in p.ids for t in [i] * (count if i == token else 1)] for p in prompts], device)

    def _clip_ids(self, prompts: list[_Prompt]) -> Tensor | None:
        """The questions in the vocabulary of the CLIP model that the method names, if it does."""
        clip = getattr(self._encoder, "clip", None)
        return None if clip is None else question_ids(clip, [prompt.question for prompt in prompts])

    def _continue(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any, keep: int = 1) -> Any:
        """What follows a cache; logits of the last `keep` tokens, 0 for all."""
        given: dict[str, Any] = {CACHE: cache, "use_cache": True, "logits_to_keep": keep}
        return self.model(input_ids=ids, attention_mask=mask, position_ids=positions, **given)

    def _finish(
        self, outputs: Any, mask: Tensor, kept: list[np.ndarray], tokens: Sequence[float | None]
    ) -> list[Answer]:
        """The answers that follow the prefill's outputs."""
        logits = FINITE(mask, outputs.logits[:, -1].float())
        scores: list[float | None] = [None] * len(logits)
        cut = [False] * len(logits)
        if self.mode == "text":
            texts, cut = self._texts(self._greedy(logits, getattr(outputs, CACHE), mask))
        else:
            first, second = (self._likelihood(ids, logits, outputs, mask) for ids in self._answer_tokens())
            scores = (first - second).tolist()
            texts = [self.choices[score <= 0] for score in scores if score is not None]
        masks = [[stage[row] for stage in kept] for row in range(len(texts))]
        return [Answer(*answer) for answer in zip(texts, scores, masks, tokens, cut, strict=True)]

    def _likelihood(self, ids: list[int], logits: Tensor, outputs: Any, mask: Tensor) -> Tensor:
        """`(rows,)`: log-probability of an answer, but for what the first tokens of all answers are divided by."""
        total = logits[:, ids[0]]
        if len(ids) > 1:
            answer = torch.tensor(ids, device=mask.device).expand(len(mask), -1)
            mask = torch.cat([mask, ones_like(answer[:, 1:])], dim=1)
            cache = rows_of(getattr(outputs, CACHE), torch.arange(len(mask)))
            said = self._continue(answer[:, :-1], mask, positions_of(mask)[:, 1 - len(ids) :], cache, keep=0)
            probability = FINITE(answer, said.logits.float()).log_softmax(-1).gather(2, answer[:, 1:, None])
            total = total + probability.sum((1, 2)).to(total.device)
        return total

    def _greedy(self, logits: Tensor, cache: Cache, mask: Tensor) -> Tensor:
        """Ids `(rows, length)` that `generate` gives too, whose preparations cost more than an answer's few tokens."""
        ends = self._ends.to(logits.device)
        said = [logits.argmax(-1)]
        ended = torch.isin(said[0], ends)
        while len(said) < self.max_new_tokens and not bool(ended.all()):
            mask = torch.cat([mask, ones_like(mask[:, :1])], dim=1)
            outputs = self._continue(said[-1][:, None], mask, positions_of(mask)[:, -1:], cache)
            following = FINITE(mask, outputs.logits[:, -1].float()).argmax(-1)
            said.append(torch.where(ended, said[-1], following))
            ended |= torch.isin(said[-1], ends)
        return torch.stack(said, dim=1)

    @property
    def _ends(self) -> Tensor:
        ends = self.model.generation_config.eos_token_id
        return torch.tensor([] if ends is None else ends).flatten()

    def _texts(self, said: Tensor) -> tuple[list[str], list[bool]]:
        """Generated ids `(rows, length)` up to the token that ends each, as text, and whether there was none."""
        stops = set(self._ends.tolist())
        lengths = [next((i for i, token in enumerate(row) if token in stops), None) for row in said.tolist()]
        whole = [row[:length] for row, length in zip(said.tolist(), lengths, strict=True)]
        texts = self.processor.tokenizer.batch_decode(whole, skip_special_tokens=True)
        return [text.strip() for text in texts], [length is None for length in lengths]

    def _ask_one_by_one(self, pixels: Tensor, prompts: list[_Prompt]) -> list[Answer]:
        """The questions of a batch through the model's own `generate`, with a picture each."""
        padded, mask = self._padded(prompts, self._placeholders, pixels.device)
        inputs = {"input_ids": padded, "attention_mask": mask, "pixel_values": pixels}
        if (clip_ids := self._clip_ids(prompts)) is not None:
            inputs["question_ids"] = clip_ids
        tokens = self._tokens if self._decoder is None else None
        if self.mode != "text":
            outputs = self.model(**inputs, position_ids=positions_of(mask), use_cache=True, logits_to_keep=1)
            return self._finish(outputs, mask, [], [tokens] * len(prompts))
        said = self.model.generate(**inputs, **greedy(self.max_new_tokens))
        texts, cut = self._texts(said[:, padded.shape[1] :])
        return [Answer(text, None, [], tokens, short) for text, short in zip(texts, cut, strict=True)]

    def _answer_tokens(self) -> list[list[int]]:
        """Ids of the choices behind the prompt, of which logits mode compares the first."""
        tokenizer, found = self.processor.tokenizer, []
        text = self.prompt.replace(IMAGE_TOKEN, self.processor.image_token)
        # Behind a new line, models say "Yes", which for most tokenizers is another token than " Yes".
        gap = "" if text[-1].isspace() else " "
        bare = tokenizer(text)["input_ids"]
        for answer in self.choices:
            ids = tokenizer(f"{text}{gap}{answer}")["input_ids"]
            if ids[: len(bare)] != bare:
                raise ValueError(
                    f"prompt {self.prompt!r}: its end becomes one token with {answer}; a prompt that ends without a "
                    f"space is allowed with --answer-mode {self.mode}."
                )
            found.append(ids[len(bare) :] if self.mode == "likelihood" else ids[len(bare) : len(bare) + 1])
        if found[0] == found[1] or tokenizer.unk_token_id in (*found[0], *found[1]):
            names, modes = " and ".join(self.choices), "likelihood or text" if self.mode == "logits" else "text"
            raise ValueError(f"{names} begin with the same token, or have an unknown one: use --answer-mode {modes}.")
        return found


def greedy(max_new_tokens: int) -> dict[str, Any]:
    """Arguments of `generate` for the likeliest tokens, checked to be numbers."""
    checked = {"logits_processor": LogitsProcessorList([FINITE])}
    return {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens, **checked}


class _Prompt(NamedTuple):
    """A prompt's token ids, with one image token, and its question."""

    ids: list[int]
    question: str


@dataclass(frozen=True)
class _Encoded:
    """Pictures, encoded.

    Attributes:
        images: what the model's `get_image_features` gave.
        kept: of an encoder method that does not look at the question, `(pictures, patches)` bool for each stage.
        prefix: the cache of the prompt up to the image's end, or None; prefix_length: its tokens.
    """

    images: Any
    kept: Sequence[np.ndarray] = ()
    prefix: Cache | None = None
    prefix_length: int = 0
