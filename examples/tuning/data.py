"""Conversations about pictures, in LLaVA's JSON: read, checked, and made into batches whose labels are the answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor

from llava_sparse.evaluation.files import Report, is_text, refuse, show
from llava_sparse.evaluation.tasks.rows import IMAGE_TOKEN, file_inside
from llava_sparse.pictures import read_picture

IGNORED = -100
SPEAKERS = ("human", "gpt")
# All conversations about one picture, each as what both sides said in turn; no picture for those without.
FEATURES = datasets.Features(
    {"image": datasets.Value("string"), "conversations": datasets.List(datasets.List(datasets.Value("string")))}
)


def load_conversations(
    file: Path, images: Path, special: Sequence[str] = (), report: Report = refuse
) -> datasets.Dataset:
    """Reads `[{"id", "image", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", ...}]}]`.

    Conversations about the same picture are one row, in the order of their first: a picture is encoded once for all.

    Args:
        file: JSON; images: the folder that pictures are named in, and none may be outside of.
        special: tokens that no text may hold, for they would act as such.
        report: gets the message of every entry that cannot be used; raises ValueError by default.

    Returns:
        columns of `FEATURES`, where `<image>` is gone from the texts: it stands before the first of them.

    Raises:
        ValueError: for what is no such file, and if nothing is left of it.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file.name}: this is no JSON in UTF-8 ({error}); a list of conversations is allowed."
        ) from error
    if not isinstance(entries, list):
        raise ValueError(f"{file.name}: a list of conversations is allowed, not {show(entries)}.")
    folder = images.resolve()
    rows: dict[Any, dict[str, Any]] = {}
    for number, entry in enumerate(entries, start=1):
        try:
            turns = _turns(entry, [token for token in special if token != IMAGE_TOKEN])
            picture = str(file_inside(folder, entry["image"])) if "image" in entry else None
        except ValueError as error:
            called = f" (id {show(entry['id'])})" if isinstance(entry, dict) and "id" in entry else ""
            report(f"{file.name}, row {number}{called}: {error}")
            continue
        key = number if picture is None else picture
        rows.setdefault(key, {"image": picture, "conversations": []})["conversations"].append(turns)
    if not rows:
        raise ValueError(f"{file.name}: there are no conversations that can be used; at least one is needed.")
    return datasets.Dataset.from_list(list(rows.values()), features=FEATURES)


def _turns(entry: Any, special: Sequence[str]) -> list[str]:
    """What human and gpt say in turn, without `<image>`."""
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
        raise ValueError(f"{show(entry)}: an object with 'conversations', a list, is allowed.")
    messages = entry["conversations"]
    if not messages or len(messages) % 2:
        raise ValueError(f"{len(messages)} messages; a question and its answer, or several such pairs, are allowed.")
    turns: list[str] = []
    for position, message in enumerate(messages):
        speaker = SPEAKERS[position % 2]
        if not isinstance(message, dict) or message.get("from") != speaker or not is_text(message.get("value")):
            raise ValueError(f"message {position + 1} {show(message)}: text ('value') 'from' {speaker!r} is allowed.")
        turns.append(message["value"])
    if turns[0].count(IMAGE_TOKEN) != ("image" in entry) or any(IMAGE_TOKEN in text for text in turns[1:]):
        raise ValueError(
            f"{IMAGE_TOKEN} is allowed once, in the first message, where there is an 'image', and only there."
        )
    turns[0] = turns[0].replace(IMAGE_TOKEN, "").strip()
    if not turns[0]:
        raise ValueError(f"message 1 is only {IMAGE_TOKEN}; a question is needed.")
    if found := [token for token in special if any(token in text for text in turns)]:
        raise ValueError(f"{found[0]!r} is a special token; other text is allowed.")
    return turns


@dataclass
class Collator:
    """Makes a batch of rows of `load_conversations`.

    Attributes:
        processor: of the model, stock or sparse; longest: tokens of a conversation, at most.
    """

    processor: Any
    longest: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """
        Returns:
            `input_ids`, `attention_mask` and `labels` `(conversations, length)`, labels -100 but at answers and the
            end of each; `pixel_values` of each picture once, and in `owners` which conversation is about which.

        Raises:
            ValueError: for a conversation that is too long, and for a picture that cannot be read.
        """
        pictures = [read_picture(row["image"], f"image {show(row['image'])}") for row in rows if row["image"]]
        shown, batch = self._shown(pictures)
        texts, spans, owners = [], [], []
        for row in rows:
            if row["image"]:
                owners += [len(set(owners))] * len(row["conversations"])
            for turns in row["conversations"]:
                text, answers = self._text(turns, f"{shown[owners[-1]]}\n" if row["image"] else "")
                texts.append(text)
                spans.append(answers)
        written = self.processor.tokenizer(texts, padding=True, return_tensors="pt", return_offsets_mapping=True)
        lengths = written["attention_mask"].sum(1)
        if lengths.max() > self.longest:
            start = texts[int(lengths.argmax())].replace(self.processor.image_token, "")[:80]
            raise ValueError(
                f"{start!r} ... has {int(lengths.max())} tokens; {self.longest} are allowed: leave out turns of it."
            )
        offsets = written.pop("offset_mapping")
        batch |= {name: written[name] for name in ("input_ids", "attention_mask")}
        batch["labels"] = _labels(batch, offsets, spans)
        return batch | ({"owners": torch.tensor(owners)} if pictures else {})

    def _shown(self, pictures: list[Any]) -> tuple[list[str], dict[str, Tensor]]:
        """The placeholders of each picture, as the processor writes them, and what the model gets of them."""
        if not pictures:
            return [], {}
        token = self.processor.image_token
        made = self.processor(images=pictures, text=[token] * len(pictures), padding=True, return_tensors="pt")
        counts = (made["input_ids"] == self.processor.image_token_id).sum(1).tolist()
        return [token * count for count in counts], {"pixel_values": made["pixel_values"]}

    def _text(self, turns: Sequence[str], shown: str) -> tuple[str, list[tuple[int, int]]]:
        """A conversation as LLaVA-1.5 is trained on it, and where in it the answers are."""
        text, spans = "", []
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            text += f"USER: {'' if text else shown}{question} ASSISTANT:"
            start = len(text)
            text += f" {answer}{self.processor.tokenizer.eos_token}"
            spans.append((start, len(text)))
        return text, spans


def _labels(batch: dict[str, Tensor], offsets: Tensor, spans: Sequence[list[tuple[int, int]]]) -> Tensor:
    """`(batch, length)`: the tokens of answers, which `offsets` `(batch, length, 2)` into the texts tell."""
    answered = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    for row, answers in enumerate(spans):
        for start, end in answers:
            answered[row] |= (offsets[row, :, 0] < end) & (offsets[row, :, 1] > start)
    return batch["input_ids"].masked_fill(~answered | (batch["attention_mask"] == 0), IGNORED)
