"""Pruned models in lmms-eval: `--model llava_sparse --model_args sparse_method=visionzip,sparse_budget=64`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

import llava_sparse
from llava_sparse.evaluation.model import load_model
from llava_sparse.evaluation.videos import FRAMES, read_frames
from llava_sparse.families import FAMILIES
from llava_sparse.modeling.pruning_settings import FIELDS, nearest

Seen = tuple[list[Image.Image], list[list[Image.Image]]]


class LlavaSparse(lmms):
    """A model of any family, dense or pruned, for tasks with `output_type: generate_until`.

    Args:
        pretrained: Hub id or folder; the embedded reference model by default.
        dtype, device, attn_implementation: as of `llava-sparse pope`.
        batch_size: questions answered at a time; as many of the same generation settings as there are.
        template: prompt with `{question}`, pictures before it; by default the processor's chat template, else
            LLaVA-1.5's.
        frames: of a video, evenly spaced.
        pictures: file to which a digest of what each question shows is written, for `llava-sparse compare`.
        settings: `sparse_method` ... `sparse_options` as everywhere, lists and dicts as JSON. Without them a saved
            folder's own apply.

    Raises:
        ValueError: for an unknown argument, settings without a method, and all that `load_model` and methods refuse.
    """

    is_simple = True

    def __init__(
        self, pretrained: str | None = None, dtype: str = "auto", device: str | None = "auto",
        batch_size: int | str = 1, attn_implementation: str | None = None, template: str | None = None,
        frames: int = FRAMES, pictures: str | None = None, **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        settings.pop("max_batch_size", None)
        for name in settings:
            if name not in FIELDS:
                raise ValueError(f"model_args: {name} is unknown{nearest(name, FIELDS)}; allowed: {', '.join(FIELDS)}.")
        # The device and rank of lmms-eval's own bookkeeping.
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1 and torch.cuda.is_available():
            device = f"cuda:{self.accelerator.local_process_index}"
        known = [kind for family in FAMILIES.values() for kind in (family.model_type, family.sparse_type)]
        loaded = load_model(pretrained, dtype, device or "auto", attn_implementation, known)
        self.model, self.processor = _pruned(loaded.model, settings), loaded.processor
        self.processor.tokenizer.padding_side = "left"
        self.batch_size, self.template, self.frames = int(batch_size), template, int(frames)
        self.pictures = pictures

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Answers, in the order of the requests; those with equal generation settings go in batches."""
        answers: dict[int, str] = {}
        order = sorted(range(len(requests)), key=lambda i: (repr(requests[i].args[1]), -len(requests[i].args[0]), i))
        with tqdm(total=len(requests), disable=self.rank != 0, desc="llava_sparse") as bar:
            for _, group in groupby(order, key=lambda i: repr(requests[i].args[1])):
                same = list(group)
                for start in range(0, len(same), self.batch_size):
                    batch = same[start : start + self.batch_size]
                    answers |= zip(batch, self._answer([requests[i].args for i in batch]), strict=True)
                    bar.update(len(batch))
        for i, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args[:2], answers[i])
        return [answers[i] for i in range(len(requests))]

    @torch.inference_mode()
    def _answer(self, asked: Sequence[tuple[Any, ...]]) -> list[str]:
        seen = [self._visuals(visual(self.task_dict[task][split][i])) for _, _, visual, i, task, split in asked]
        if self.pictures is not None:
            self._note([args[3] for args in asked], seen)
        texts = [self._prompt(text, *shown) for (text, *_), shown in zip(asked, seen, strict=True)]
        pictures = [image for images, _ in seen for image in images]
        videos = [video for _, shown in seen for video in shown]
        given: dict[str, Any] = {"images": pictures} if pictures else {}
        given |= {"videos": videos} if videos else {}
        inputs = self.processor(**given, text=texts, padding=True, return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        options, until = _generation(asked[0][1])
        out = self.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        answers = self.processor.tokenizer.batch_decode(out, skip_special_tokens=True)
        return [_until(answer, until) for answer in answers]

    def _note(self, documents: Sequence[Any], seen: Sequence[Seen]) -> None:
        """Appends, in one write, which pictures documents show; several processes may do so."""
        lines = []
        for document, (pictures, videos) in zip(documents, seen, strict=True):
            digest = hashlib.sha256()
            for image in [*pictures, *(frame for video in videos for frame in video)]:
                digest.update(image.tobytes())
            lines.append(json.dumps({"doc_id": document, "picture": digest.hexdigest()[:16]}) + "\n")
        with open(str(self.pictures), "a", encoding="utf-8") as file:
            file.write("".join(lines))

    def _visuals(self, visuals: Any) -> Seen:
        """Pictures, and videos as frames.

        Raises:
            ValueError: for a video where the model takes none, and for anything else.
        """
        pictures: list[Image.Image] = []
        videos: list[list[Image.Image]] = []
        for visual in visuals or []:
            if isinstance(visual, Image.Image):
                pictures.append(visual.convert("RGB"))
            elif isinstance(visual, str) and hasattr(self.processor, "video_token"):
                videos.append(read_frames(visual, self.frames))
            else:
                what = f"the video {visual}" if isinstance(visual, str) else f"a {type(visual).__name__}"
                raise ValueError(f"{what}: {type(self.processor).__name__} takes pictures alone.")
        return pictures, videos

    def _prompt(self, text: str, pictures: list[Any], videos: list[Any]) -> str:
        text = text.replace("<image>", "").strip()
        kinds = ["image"] * len(pictures) + ["video"] * len(videos)
        if self.template is None and getattr(self.processor, "chat_template", None):
            content = [*({"type": kind} for kind in kinds), {"type": "text", "text": text}]
            messages = [{"role": "user", "content": content}]
            prompt: str = self.processor.apply_chat_template(messages, add_generation_prompt=True)
            return prompt
        marks = "".join(getattr(self.processor, f"{kind}_token") + "\n" for kind in kinds)
        return (self.template or "USER: {question} ASSISTANT:").replace("{question}", marks + text)

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("llava_sparse answers tasks with output_type: generate_until.")

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError("llava_sparse answers single questions: output_type: generate_until.")


def _pruned(model: Any, settings: dict[str, Any]) -> Any:
    """The model with settings as lmms-eval's command line gives them; the one it is, without any."""
    read = {k: json.loads(v) if isinstance(v, str) and v[:1] in "[{" else v for k, v in settings.items()}
    short = {name.removeprefix("sparse_"): value for name, value in read.items()}
    if not short:
        return model
    if "method" not in short:
        raise ValueError(f"model_args: {', '.join(settings)} without sparse_method.")
    method = short.pop("method")
    if hasattr(model, "set_sparsity"):
        model.set_sparsity(method, **short)
        return model
    return llava_sparse.sparsify(model, method, **short)


def _generation(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Arguments of `generate`, and what ends an answer, of a task's `generation_kwargs`."""
    until = given.get("until") or []
    options: dict[str, Any] = {"max_new_tokens": given.get("max_new_tokens", 1024)}
    options["num_beams"] = given.get("num_beams") or 1
    options["do_sample"] = bool(given.get("temperature")) and given.get("do_sample") is not False
    if options["do_sample"]:
        options |= {name: given[name] for name in ("temperature", "top_p") if given.get(name)}
    return options, [until] if isinstance(until, str) else list(until)


def _until(answer: str, until: list[str]) -> str:
    for stop in filter(None, until):
        answer = answer.split(stop)[0]
    return answer.strip()
