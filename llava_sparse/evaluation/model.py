"""Loading a LLaVA to evaluate it: dtype, device, memory, prompt, and one method after the other on the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, PreTrainedConfig

import llava_sparse
from llava_sparse.modeling.pruning_settings import FIELDS, nearest
from llava_sparse.pictures import read_picture
from llava_sparse.reference import CHECKPOINT

from .plan import UNPRUNED, Run, plan_runs
from .tasks.rows import IMAGE_TOKEN

QUESTION = "{question}"
MODEL_TYPES = ("llava", "sparse_llava")
# Published evaluations of LLaVA-1.5 ask for a short answer in these words.
SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
# Bytes of a weight, scales and the layers that stay whole included (docs/memory.md).
WEIGHT_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "8bit": 1.1, "4bit": 0.65}


@dataclass(frozen=True)
class Memory:
    """Where a model's weights lie, and how large.

    Attributes:
        load_in_4bit, load_in_8bit: quantised by bitsandbytes.
        device_map: as of `from_pretrained`, `"auto"` say; None for one device.
        max_memory: with a device map, of each device; a dict, or text: `0=10GiB,cpu=30GiB`.
    """

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    device_map: Any = None
    max_memory: Any = None

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit: one of them is allowed.")
        if self.max_memory is not None and self.device_map is None:
            raise ValueError("max_memory: with a device_map ('auto', say) alone.")

    @property
    def bits(self) -> str | None:
        """`"4bit"`, `"8bit"`, or None for whole weights."""
        return "4bit" if self.load_in_4bit else "8bit" if self.load_in_8bit else None

    def arguments(self, dtype: Any, place: torch.device) -> dict[str, Any]:
        """Of `from_pretrained`."""
        found: dict[str, Any] = {} if self.device_map is None else {"device_map": self.device_map}
        if self.max_memory is not None:
            limits = self.max_memory
            if isinstance(limits, str):
                parts = (part.partition("=") for part in limits.split(","))
                limits = {int(name) if name.isdigit() else name: size for name, _, size in parts}
            found["max_memory"] = limits
        if self.bits is not None:
            compute = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
            kind = {"bnb_4bit_compute_dtype": compute, "bnb_4bit_quant_type": "nf4"} if self.load_in_4bit else {}
            found["quantization_config"] = BitsAndBytesConfig(**{f"load_in_{self.bits}": True}, **kind)
            found.setdefault("device_map", {"": place})
        return found


@dataclass(frozen=True)
class LoadedModel:
    """A model with what is needed to ask it.

    Attributes:
        model: a stock LLaVA, or a `SparseLlavaForConditionalGeneration`.
        processor: its processor, writing a placeholder for every patch.
        name: the id or path it was loaded from.
        knows_short_answer: whether its vocabulary has the words of `SHORT_ANSWER`; the reference model's does not.
        quantization: `"4bit"`, `"8bit"`, or None.
    """

    model: Any
    processor: Any
    name: str
    knows_short_answer: bool
    quantization: str | None = None

    def prompt(self, short_answer: bool, pictures: int = 1, video: bool = False) -> str:
        """The prompt, with `<image>` and `{question}` where they go: as the model's own chat template writes them.

        LLaVA-1.5's words stand where there is no template, or one that does not place what is shown.

        Args:
            short_answer: whether to ask for a single word, as far as the model knows how.
            pictures: how many are shown; video: or whether a video is, for which `<image>` stands, too.
        """
        asked = QUESTION + (SHORT_ANSWER if short_answer and self.knows_short_answer else "")
        usual = f"USER: {IMAGE_TOKEN}\n{asked} ASSISTANT:"
        processor, tokenizer = self.processor, self.processor.tokenizer
        if getattr(processor, "chat_template", None) is None:
            return usual
        content = [{"type": "video" if video else "image"}] * pictures + [{"type": "text", "text": asked}]
        turn = [{"role": "user", "content": content}]
        text: str = processor.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        if tokenizer.bos_token and tokenizer.bos_token_id in tokenizer("")["input_ids"]:
            # The tokenizer puts it there.
            text = text.removeprefix(tokenizer.bos_token)
        text = text.replace(processor.video_token if video else processor.image_token, IMAGE_TOKEN)
        return text if (text.count(IMAGE_TOKEN), text.count(QUESTION)) == (pictures, 1) else usual

    def with_run(self, run: Run) -> Any:
        """The model pruned as a run says, or dense, on the same weights.

        Raises:
            ValueError: for an invalid budget, layer or option.
        """
        if hasattr(self.model, "set_sparsity"):
            self.model.set_sparsity(None if run.method in UNPRUNED else run.method, **run.sparsity)
            return self.model
        return self.model if run.method in UNPRUNED else llava_sparse.sparsify(self.model, run.method, **run.sparsity)

    def with_method(self, method: str, budget: float | None = None) -> Any:
        """The model pruned by a method with its default options, or dense, on the same weights.

        Raises:
            ValueError: for an unknown method or an invalid budget.
        """
        return self.with_run(plan_runs([method], [budget])[0])


def check_methods(methods: Sequence[str]) -> None:
    """Checks names of methods, with their options if any; `"dense"` is one of them.

    Raises:
        ValueError: for an unknown name, with the nearest known one, for a repeated one, and for none at all.
    """
    plan_runs(methods, [None])


def check_prompt(prompt: str, pictures: int = 1) -> None:
    """Checks a prompt template.

    Args:
        pictures: how many are shown; `<image>` is allowed as often, or once for all.

    Raises:
        ValueError: if `{question}` is not in it exactly once, or `<image>` not as often as allowed.
    """
    for part, often in ((IMAGE_TOKEN, pictures), (QUESTION, 1)):
        if prompt.count(part) not in (1, often):
            allowed = "once" if often == 1 else f"once or {often} times"
            raise ValueError(
                f"prompt {prompt!r}: {part} has to be in it {allowed}; it is there {prompt.count(part)} times."
            )


def view_size(model: Any) -> int:
    """Pixels of a side of the square that the model's tower sees."""
    size: int = model.config.vision_config.image_size
    return size


def load_model(
    name: str | Path | None = None,
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str | None = None,
    model_types: Sequence[str] = MODEL_TYPES,
    **memory: Any,
) -> LoadedModel:
    """Loads a LLaVA and its processor.

    Args:
        name: Hub id or folder; None for the embedded reference model.
        dtype: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`: as stored on a GPU; on a CPU, where float16 is many
            times slower, bfloat16 if the processor has instructions for it, else float32.
        device: what torch calls it, or `"auto"`: the first GPU, else the CPU.
        attn_implementation: transformers' name of an attention backend; None for its default.
        model_types: of configurations that are allowed.
        memory: the fields of `Memory`.

    Raises:
        ValueError: if it is no LLaVA, lacks weights, does not fit the GPU, or for an unknown dtype or device.
        OSError: if there is no such folder, or the Hub cannot be reached.
    """
    path = str(CHECKPOINT if name is None else name)
    kept = Memory(**memory)
    _check_llava(path, model_types)
    place = resolve_device(device)
    chosen = resolve_dtype(dtype, place)
    if place.type == "cuda" and kept.device_map is None:
        check_memory(_weights(path), kept.bits or str(chosen).removeprefix("torch."), torch.cuda.mem_get_info(place)[0])
    options = {"attn_implementation": attn_implementation} if attn_implementation else {}
    model, report = AutoModelForImageTextToText.from_pretrained(
        path, dtype=chosen, output_loading_info=True, **options, **kept.arguments(chosen, place)
    )
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(f"{path}: the checkpoint lacks {len(missing)} weights, {missing[0]} among them.")
    processor = AutoProcessor.from_pretrained(path)
    if getattr(processor, "sparse_method", None) is not None:
        # Methods are compared on the same prompt, and the dense model needs all placeholders.
        for setting in FIELDS:
            setattr(processor, setting, None)
    tokenizer = processor.tokenizer
    unknown = tokenizer.unk_token_id
    knows = unknown is None or unknown not in tokenizer(SHORT_ANSWER, add_special_tokens=False)["input_ids"]
    model = model.eval() if kept != Memory() else model.eval().to(place)
    return LoadedModel(model, processor, path, knows, kept.bits)


def _weights(path: str) -> int:
    """How many numbers a model's weights are, from its configuration alone."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path))
    return sum(weight.numel() for weight in model.parameters())


def check_memory(weights: int, kind: str, free: int) -> None:
    """Checks before loading that a model's weights fit a device, with a twentieth of it left for what is computed.

    Args:
        weights: how many; kind: a name of `WEIGHT_BYTES`; free: bytes.

    Raises:
        ValueError: with what would fit.
    """
    needs = {name: weights * size for name, size in WEIGHT_BYTES.items()}
    needed = needs.get(kind, needs["bfloat16"])
    if needed <= 0.95 * free:
        return
    less = [name for name in ("bfloat16", "8bit", "4bit") if needs[name] < needed and needs[name] <= 0.95 * free]
    advice = f"use --load-in-{less[0]}" if less and "bit" in less[0] else f"use --dtype {less[0]}" if less else ""
    raise ValueError(
        f"{weights / 1e9:.1f} billion weights in {kind} need {needed / 1e9:.1f} GB, the GPU has {free / 1e9:.1f} GB "
        f"free: {advice or 'use --device-map auto, which puts what does not fit into main memory'}."
    )


def _check_llava(path: str, model_types: Sequence[str]) -> None:
    """Looks at the configuration before any weight is read or downloaded."""
    if Path(path).exists():
        if not (Path(path) / "config.json").is_file():
            raise FileNotFoundError(f"{path}: this is no model folder, there is no config.json in it.")
    elif path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{path}: no such model folder, and no Hub id (owner/name) either.")
    try:
        config, _ = PreTrainedConfig.get_config_dict(path)
    except OSError as error:
        if Path(path).exists():
            raise ValueError(f"{path}: config.json cannot be read; a JSON object is allowed.") from error
        raise OSError(f"{path}: no such folder, and it cannot be loaded from the Hub: is there a network?") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind not in model_types:
        raise ValueError(f"{path}: model_type {kind!r} is no LLaVA; allowed: {', '.join(model_types)}.")


def resolve_device(name: str) -> torch.device:
    """A device by torch's name, or `"auto"`: the first GPU, else the CPU.

    Raises:
        ValueError: if it is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {name!r} is not available; auto, cpu and cuda, where there is a GPU, are allowed."
        ) from error
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype | str:
    """A dtype by name; `"auto"` stays so on a GPU, and on a CPU is what is fast there.

    Raises:
        ValueError: for an unknown name, with the nearest known one.
    """
    allowed = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name in allowed:
        return allowed[name]
    if name != "auto":
        raise ValueError(
            f"dtype {name!r} is unknown{nearest(name, list(allowed))}; allowed: auto, {', '.join(allowed)}."
        )
    if device.type != "cpu":
        return "auto"
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else torch.float32


def fill_prompt(prompt: str, question: str, image_tokens: str) -> str:
    """A prompt of `LoadedModel.prompt` with its question, and `image_tokens` in place of the image.

    Raises:
        ValueError: if the question holds an image token of its own.
    """
    if IMAGE_TOKEN in question:
        raise ValueError(f"question {question!r}: text without {IMAGE_TOKEN} is allowed; the picture is put before it.")
    before, after = prompt.replace(IMAGE_TOKEN, image_tokens).split(QUESTION)
    return f"{before}{question}{after}"


def fill_in(
    model: Any, processor: Any, shown: Sequence[Image.Image], question: str, prompt: str, video: bool = False
) -> tuple[str, Any]:
    """A question about pictures, or about one video, as text and as what the processor makes of it.

    Args:
        model: dense or pruned; processor: stock or sparse.
        shown: pictures as of `read_picture`, or the frames of a video.
        prompt: as from `LoadedModel.prompt`; a single `<image>` is where all pictures go.

    Raises:
        ValueError: if the question holds an image token of its own, for a prompt that `check_prompt` refuses, and for a
            video where the model takes none.
    """
    if video and not hasattr(processor, "video_token"):
        raise ValueError(f"{type(processor).__name__}: this model takes pictures alone, no videos.")
    token, count = (processor.video_token, 1) if video else (processor.image_token, len(shown))
    check_prompt(prompt, count)
    if prompt.count(IMAGE_TOKEN) == 1:
        token = "\n".join([token] * count)
    text = fill_prompt(prompt, question, token)
    seen = {"videos" if video else "images": [list(shown)]}
    inputs = processor(**seen, text=[text], return_tensors="pt").to(model.device, model.dtype)
    if "pixel_values_images" in inputs and "pixel_values" in signature(model.forward).parameters:
        # Video-LLaVA's processor has a name of its own for them, and so had its model before transformers 5.23.
        inputs["pixel_values"] = inputs.pop("pixel_values_images")
    return text, inputs


@torch.inference_mode()
def ask(
    model: Any,
    processor: Any,
    image: Image.Image | Sequence[Image.Image],
    question: str,
    prompt: str,
    max_new_tokens: int = 128,
    video: bool = False,
) -> str:
    """A model's greedy answer to a question about a picture, some pictures, or one video.

    Args:
        model: dense or pruned.
        processor: stock or sparse.
        image: a picture, several, or the frames of a video.
        prompt: as from `LoadedModel.prompt`.
        video: whether they are frames.

    Raises:
        ValueError: for a picture that `read_picture` refuses, as `fill_in`, and for logits that are not finite.
    """
    from .answer import greedy

    shown = [read_picture(x) for x in ([image] if isinstance(image, Image.Image) else image)]
    _, inputs = fill_in(model, processor, shown, question, prompt, video)
    ids = model.generate(**inputs, **greedy(max_new_tokens))
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()
