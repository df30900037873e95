"""Tuning a part of a pruned LLaVA: what is trained, the Trainer, and going on where a run was killed."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

import llava_sparse
from llava_sparse.evaluation.files import refuse

from .data import Collator, load_conversations

PARTS = ("projector", "lora")
PROJECTOR = "model.multi_modal_projector"
# Linear layers of the decoder; the tower has layers of the same names.
ADAPTED = r".*language_model\.layers\.\d+\..*_proj"
WEIGHTS = "trained.safetensors"
# Fields of a tuning that may differ when it goes on.
FREE = ("output", "data", "images", "save_every", "skip_bad")


@dataclass(frozen=True)
class Tuning:
    """What makes a run.

    Attributes:
        model: Hub id or folder; output: folder for checkpoints and what comes out.
        data, images: see `load_conversations`; skip_bad: whether bad entries are told and left out.
        method, budget: of pruning, `"dense"` for none.
        part: `"projector"`, or `"lora"`: adapters of all linear layers of the decoder, of `rank`.
        steps: of the optimiser; pictures: in a batch, each with all conversations about it; accumulate: batches of a
            step; rate: the highest learning rate, after a tenth of the steps, which falls as a cosine.
        dtype: of what is not trained; in bfloat16, passes are under autocast. What is trained is in float32.
        four_bit: whether what is not trained is held in 4 bits (NF4); with `"lora"` alone.
        checkpointing: whether activations are computed again instead of kept.
        save_every: steps between checkpoints.
    """

    model: str
    output: Path
    data: Path
    images: Path
    method: str = "visionzip"
    budget: float = 64
    part: str = "projector"
    steps: int = 200
    pictures: int = 4
    accumulate: int = 1
    rate: float = 1e-3
    rank: int = 16
    dtype: str = "float32"
    four_bit: bool = False
    checkpointing: bool = False
    save_every: int = 50
    seed: int = 0
    skip_bad: bool = False

    def settings(self) -> dict[str, Any]:
        """All that decides what comes out."""
        chosen = {name: value for name, value in asdict(self).items() if name not in FREE}
        return chosen | {"data_sha256": hashlib.sha256(self.data.read_bytes()).hexdigest()}


def load(tuning: Tuning) -> tuple[Any, Any]:
    """The model, pruned, of which only the part that is tuned takes gradients; and its processor.

    Raises:
        ValueError: for an unknown part, and for 4 bits where nothing but the projector is trained.
        ImportError: without PEFT, for `"lora"`.
    """
    if tuning.part not in PARTS:
        raise ValueError(f"part {tuning.part!r} is unknown; allowed: {', '.join(PARTS)}.")
    if tuning.four_bit and tuning.part != "lora":
        raise ValueError(
            "four_bit: transformers' Trainer takes a 4-bit model with adapters alone; part 'lora' is allowed."
        )
    dtype = getattr(torch, tuning.dtype)
    options: dict[str, Any] = {"dtype": dtype}
    if tuning.four_bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=["vision_tower", "multi_modal_projector", "lm_head"],
        )  # fmt: skip
        options["device_map"] = {"": "cuda" if torch.cuda.is_available() else "cpu"}
    if tuning.method != "dense":
        options |= {"sparse_method": tuning.method, "sparse_budget": tuning.budget}
    model = AutoModelForImageTextToText.from_pretrained(tuning.model, **options)
    if tuning.method == "dense":
        model = llava_sparse.sparsify(model, None)
    model.requires_grad_(False)
    if tuning.part == "projector":
        model.get_submodule(PROJECTOR).float().requires_grad_(True)
    else:
        model = _with_adapters(model, tuning)
    if tuning.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, AutoProcessor.from_pretrained(tuning.model)


def _with_adapters(model: Any, tuning: Tuning) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("part 'lora' needs PEFT: pip install 'llava-sparse[finetune]'.") from error
    config = LoraConfig(r=tuning.rank, lora_alpha=2 * tuning.rank, target_modules=ADAPTED, task_type="CAUSAL_LM")
    return get_peft_model(model, config)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are tuned, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


class Tuner(Trainer):
    """Modifications: a picture is encoded once for all conversations of a batch; checkpoints hold what is trained."""

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        owners = inputs.pop("owners", None)
        whole = self.accelerator.unwrap_model(model)
        if owners is not None and len(owners) > len(inputs["pixel_values"]):
            # Sharded models may run no part of themselves outside their forward, and a dense one has nothing to share.
            if self.args.world_size > 1 or whole.config.sparse_method is None:
                inputs["pixel_values"] = inputs["pixel_values"][owners]
            else:
                with self.accelerator.autocast():
                    images = whole.get_image_features(inputs.pop("pixel_values"))
                inputs["mm_encoder_outputs"] = {"image": images.take(owners.tolist())}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().cpu().contiguous() for name, p in trained(self.model).items()}, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        found = load_file(Path(resume_from_checkpoint) / WEIGHTS)
        with torch.no_grad():
            for name, parameter in trained(self.model if model is None else model).items():
                parameter.copy_(found[name])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end: its `trainer_state.json` comes last."""
    complete = {}
    for path in folder.glob("checkpoint-*"):
        try:
            complete[json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]] = path
        except (OSError, ValueError):
            continue
    return complete[max(complete)] if complete else None


def _check_settings(tuning: Tuning) -> None:
    """Writes what makes the run beside its checkpoints; refuses to go on with another one's."""
    path, settings = tuning.output / "settings.json", tuning.settings()
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        if differs := [name for name in settings if settings[name] != known.get(name)]:
            told = ", ".join(f"{name} {known.get(name)!r}, not {settings[name]!r}" for name in differs)
            raise ValueError(f"{tuning.output} holds another run ({told}); take another output folder.")
        return
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    os.replace(partial, path)


def _leave_out(message: str) -> None:
    print(f"left out: {message}", flush=True)


def tune(tuning: Tuning) -> Path:
    """Trains, from where an earlier call was stopped, and saves.

    Returns:
        `output/model`, which loads as a pruned model; of a 4-bit base `output/adapter`, which PEFT loads.

    Raises:
        ValueError: for invalid settings or data, and if `output` holds a run with others.
    """
    set_seed(tuning.seed)
    model, processor = load(tuning)
    tuning.output.mkdir(parents=True, exist_ok=True)
    _check_settings(tuning)
    special = processor.tokenizer.all_special_tokens
    rows = load_conversations(tuning.data, tuning.images, special, _leave_out if tuning.skip_bad else refuse)
    if tuning.part == "projector":
        # Without a picture it is not used, and there is nothing to learn.
        rows = rows.select([number for number, picture in enumerate(rows["image"]) if picture])
        if not len(rows):
            raise ValueError(f"{tuning.data.name}: there is no conversation about a picture; the projector needs some.")
    arguments = TrainingArguments(
        output_dir=str(tuning.output), max_steps=tuning.steps, per_device_train_batch_size=tuning.pictures,
        gradient_accumulation_steps=tuning.accumulate, learning_rate=tuning.rate, lr_scheduler_type="cosine",
        warmup_steps=tuning.steps // 10, weight_decay=0.0, max_grad_norm=1.0, seed=tuning.seed,
        bf16=tuning.dtype == "bfloat16", use_cpu=not torch.cuda.is_available(), optim="adamw_torch",
        save_steps=tuning.save_every, save_total_limit=2, logging_steps=10, report_to=[], remove_unused_columns=False,
        disable_tqdm=True, dataloader_pin_memory=torch.cuda.is_available(),
    )  # fmt: skip
    collator = Collator(processor, model.config.text_config.max_position_embeddings)
    tuner = Tuner(model=model, args=arguments, train_dataset=rows, data_collator=collator)
    checkpoint = last_checkpoint(tuning.output)
    tuner.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return _save_result(tuner.accelerator.unwrap_model(tuner.model), processor, tuning)


def _save_result(model: Any, processor: Any, tuning: Tuning) -> Path:
    folder = tuning.output / "model"
    if tuning.part == "lora":
        model.save_pretrained(tuning.output / "adapter")
        if tuning.four_bit:
            return tuning.output / "adapter"
        model = model.merge_and_unload()
    else:
        model.get_submodule(PROJECTOR).to(getattr(torch, tuning.dtype))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
