"""The stages of training: schedule, optimisers, losses, and states on disk from which a run goes on."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from .data import IGNORED, Batch, Scenes
from .decoder import Layout, decode, decoy_orders
from .model import END, NO, QUESTION_WORDS, VOCABULARY, YES, Vision
from .scenes import CATEGORIES, PARTLY

BACKGROUND_WEIGHT = 0.25  # most patches show nothing
BACKGROUND_SHARE, SMALLEST = 0.4, 3  # of `balanced_patches`; patches
PRESENT_WEIGHT = 4.0
WARM_UP, FINAL_RATE = 60, 0.05  # steps at most, share of the rate
SAVE_EVERY = 100


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        steps: optimiser steps.
        batch: crops a step, over all processes.
        side: patches along a crop's side; `GRID` is the whole picture.
        rate: of AdamW and Muon for what the stage is about.
        vision_rate: of the tower where it is trained along; 0 freezes it.
        questions: yes/no questions a crop.
        attention: backend; training on a CPU, eager is faster than SDPA on small crops, and slower on whole pictures.
        first_layer: of the decoder; those before it are left out and not trained.
        caption_weight: of the captions' loss beside that of the answers; word_weight: of `word_loss`.
        decoys: whether the decoder's first layers are shown some. balanced: whether the tower learns by
            `balanced_patches`.
    """

    name: str
    steps: int
    batch: int
    side: int
    rate: float
    vision_rate: float = 0.0
    questions: int = 12
    attention: str = "eager"
    first_layer: int = 0
    caption_weight: float = 1.0
    word_weight: float = 0.0
    decoys: bool = True
    balanced: bool = False


class Run:
    """What the stages share.

    Attributes:
        rank, world: of the processes that torchrun started; 0 of 1 without it.
    """

    def __init__(self, folder: Path, model: LlavaForConditionalGeneration, device: torch.device, seed: int) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.folder, self.device, self.seed = folder, device, seed
        self.model = model.to(device)
        self.vision = Vision(model.model.vision_tower).to(device)
        self.scenes = Scenes(folder)
        weights = torch.ones(len(CATEGORIES) + 1, device=device)
        weights[0] = BACKGROUND_WEIGHT
        self.patch_weights = weights

    def tensors(self) -> dict[str, Tensor]:
        heads = {f"heads.{name}": value for name, value in self.vision.heads.state_dict().items()}
        return {**{f"model.{name}": value for name, value in self.model.state_dict().items()}, **heads}

    def load(self, tensors: dict[str, Tensor]) -> None:
        own = self.tensors()
        for name, value in own.items():
            value.copy_(tensors[name])

    def draw(self, rng: np.random.Generator, stage: Stage) -> Batch:
        batch = self.scenes.batch(rng, stage.batch // self.world, stage.side)
        return Batch(batch.pixels.to(self.device), batch.labels.to(self.device), batch.present, batch.corners)

    def average(self, parameters: Iterable[nn.Parameter]) -> None:
        """Means the gradients over the processes."""
        if self.world == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in gradients])
        dist.all_reduce(flat)
        for gradient, mean in zip(gradients, (flat / self.world).split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def optimisers(modules: dict[nn.Module, float]) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers, AdamW for the rest, each module at its rate."""
    found: list[torch.optim.Optimizer] = []
    for module, rate in modules.items():
        named = list(module.named_parameters())
        named = [(name, p) for name, p in named if p.requires_grad]
        matrices = [p for name, p in named if p.ndim == 2 and "layers." in name]
        others = [p for name, p in named if not (p.ndim == 2 and "layers." in name)]
        if matrices:
            found.append(torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"))
        found.append(torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01))
    return found


def named_patches(patch: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of the patches' categories, `(batch, patches, categories)` logits."""
    return F.cross_entropy(patch.float().flatten(0, 1), labels.flatten(), ignore_index=PARTLY, weight=weights)


def balanced_patches(patch: Tensor, labels: Tensor) -> Tensor:
    """As `named_patches`, every category of a picture counting the same: else what is small hardly counts."""
    each = F.cross_entropy(patch.float().transpose(1, 2), labels, ignore_index=PARTLY, reduction="none")
    known = labels != PARTLY
    index = labels.where(known, torch.zeros_like(labels))
    sizes = torch.zeros_like(patch[:, 0], dtype=torch.float32).scatter_add(1, index, known.float())
    weight = 1 / sizes.gather(1, index).clamp(min=SMALLEST)
    objects = known & (labels > 0)
    shown = (each * weight)[objects].sum() / weight[objects].sum()
    return BACKGROUND_SHARE * each[labels == 0].mean() + (1 - BACKGROUND_SHARE) * shown


def vision_losses(run: Run, outputs: tuple[Tensor, ...], batch: Batch, balanced: bool = False) -> tuple[Tensor, Tensor]:
    """Losses of patches and of CLS."""
    _, patch, present, present_last = outputs
    dense = balanced_patches(patch, batch.labels) if balanced else named_patches(patch, batch.labels, run.patch_weights)
    known = torch.from_numpy(batch.present).to(run.device)
    mask = (known >= 0).float()
    weight = torch.tensor(PRESENT_WEIGHT, device=run.device)
    cls = [
        F.binary_cross_entropy_with_logits(z.float(), known.clamp(min=0), pos_weight=weight, reduction="none")
        for z in (present, present_last)
    ]
    return dense, sum((loss * mask).sum() for loss in cls) / mask.sum()


def object_accuracy(patch: Tensor, labels: Tensor) -> Tensor:
    """Share of object patches that the tower names right."""
    objects = (labels > 0) & (labels != PARTLY)
    return (patch.argmax(-1) == labels)[objects].float().mean()


Loss = Callable[[np.random.Generator], tuple[Tensor, dict[str, Tensor]]]


def vision_stage(run: Run, stage: Stage) -> None:
    """The tower learns to name patches, and CLS what is present."""

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        batch = run.draw(rng, stage)
        outputs = run.vision(batch.pixels, batch.corners)
        dense, cls = vision_losses(run, outputs, batch, stage.balanced)
        return dense + 2 * cls, {"patch": dense, "cls": cls, "objects": object_accuracy(outputs[1], batch.labels)}

    train(run, stage, {run.vision: stage.rate}, loss)


def projector_stage(run: Run, stage: Stage) -> None:
    """Patches go to the word embedding of what they show."""
    words = torch.tensor([VOCABULARY["\n"], *(VOCABULARY[name] for name in CATEGORIES)], device=run.device)
    projector, embeddings = run.model.model.multi_modal_projector, run.model.get_input_embeddings()

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        batch = run.draw(rng, stage)
        with torch.no_grad():
            features = run.vision(batch.pixels, batch.corners)[0][:, 1:]
        patches = projector(features).float()
        near = F.normalize(patches, dim=-1) @ F.normalize(embeddings.weight[words], dim=-1).T * 12
        named = F.cross_entropy(
            near.flatten(0, 1), batch.labels.flatten(), ignore_index=PARTLY, weight=run.patch_weights
        )
        length = (patches.norm(dim=-1) - 3.4).pow(2).mean()
        return named + 0.1 * length, {"named": named, "objects": object_accuracy(near, batch.labels)}

    train(run, stage, {projector: stage.rate, embeddings: stage.rate}, loss)


def word_loss(run: Run, features: Tensor, labels: Tensor, rng: np.random.Generator) -> Tensor:
    """Patches are near the word of what they show and equally far from all other words of a question.

    Without it, background lies near some function word, and a text-aware method takes that word for the relevant one.

    Args:
        features: `(batch, patches, 128)`, projected; labels: `(batch, patches)`.
    """
    words = run.model.get_input_embeddings().weight
    names = torch.tensor([VOCABULARY[name] for name in CATEGORIES], device=labels.device)
    common = features @ words[[VOCABULARY[word] for word in QUESTION_WORDS]].T

    def log_shares(categories: Tensor) -> Tensor:
        own = (features * words[names[categories]]).sum(-1, keepdim=True)
        return torch.cat([common, own], -1).float().log_softmax(-1)

    shown = labels.clamp(1, len(CATEGORIES)) - 1
    objects = (labels > 0) & (labels != PARTLY)
    other = torch.from_numpy(rng.integers(len(CATEGORIES), size=tuple(labels.shape))).to(labels.device)
    elsewhere = (labels == 0) | (objects & (other != shown))
    return -log_shares(shown)[..., -1][objects].mean() - log_shares(other).mean(-1)[elsewhere].mean()


def decoder_stage(run: Run, stage: Stage) -> None:
    """Answers and captions; the tower learns along where the stage gives it a rate."""
    layout = Layout(stage.side**2, stage.questions, run.device)
    model = run.model

    def loss(rng: np.random.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        batch = run.draw(rng, stage)
        ids, answers, captions = (t.to(run.device) for t in run.scenes.questions(rng, batch.present, stage.questions))
        with torch.set_grad_enabled(stage.vision_rate > 0):
            outputs = run.vision(batch.pixels, batch.corners)
        features = model.model.multi_modal_projector(outputs[0][:, 1:])
        orders = decoy_orders(rng, len(ids)) if stage.decoys else (torch.arange(len(ids)), {})
        hidden = decode(model, features, ids, layout, orders, stage.first_layer)
        said, after, caption = (
            model.lm_head(hidden[:, place]).float() for place in (layout.answer, layout.end, layout.caption)
        )
        target = torch.where(answers == 1, YES, NO)
        parts = {
            "answer": F.cross_entropy(said.flatten(0, 1), target.flatten()),
            "end": F.cross_entropy(after.flatten(0, 1), torch.full_like(target.flatten(), END)),
            "caption": F.cross_entropy(caption.flatten(0, 1), captions.flatten(), ignore_index=IGNORED, reduction="sum")
            / (captions >= 0).sum().clamp(min=1),
        }
        total = parts["answer"] + 0.1 * parts["end"] + stage.caption_weight * parts["caption"]
        if stage.word_weight:
            parts["words"] = word_loss(run, features, batch.labels, rng)
            total = total + stage.word_weight * parts["words"]
        if stage.vision_rate:
            dense, cls = vision_losses(run, outputs, batch, stage.balanced)
            total = total + 0.5 * (dense + 2 * cls)
        right = ((said[..., YES] > said[..., NO]) == (answers == 1)).float()
        named = (caption.argmax(-1) == captions)[captions >= 0].float()
        return total, {**parts, "right": right.mean(), "recall": right[answers == 1].mean(), "named": named.mean()}

    projector, head = model.model.multi_modal_projector, model.lm_head
    decoder = model.model.language_model
    decoder.layers[: stage.first_layer].requires_grad_(False)
    modules: dict[nn.Module, float] = {decoder: stage.rate, projector: stage.rate, head: stage.rate}
    run.vision.requires_grad_(stage.vision_rate > 0)
    if stage.vision_rate:
        modules[run.vision] = stage.vision_rate
    train(run, stage, modules, loss)
    run.model.requires_grad_(True)


def train(run: Run, stage: Stage, modules: dict[nn.Module, float], loss: Loss) -> None:
    """Runs a stage, from where its file says that it stopped."""
    run.model.set_attn_implementation(stage.attention)
    found = optimisers(modules)
    parameters = [p for o in found for group in o.param_groups for p in group["params"]]
    base = [group["lr"] for o in found for group in o.param_groups]
    step = _resume(run, stage, found)
    shown: dict[str, float] = {}
    start, first = time.perf_counter(), step
    while step < stage.steps:
        scale = min(1, (step + 1) / min(WARM_UP, stage.steps // 3 + 1)) * (
            FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * step / stage.steps))
        )
        for group, rate in zip((g for o in found for g in o.param_groups), base, strict=True):
            group["lr"] = rate * scale
        rng = np.random.default_rng([run.seed, *stage.name.encode(), step, run.rank])
        with torch.autocast(run.device.type, torch.bfloat16):
            total, parts = loss(rng)
        total.backward()
        run.average(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimiser in found:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        step += 1
        for name, value in parts.items():
            number = value.item()
            if not math.isnan(number):
                shown[name] = 0.95 * shown.get(name, number) + 0.05 * number
        if run.rank == 0 and (step % 20 == 0 or step == stage.steps):
            pace = (time.perf_counter() - start) / (step - first)
            told = " ".join(f"{name} {value:.3f}" for name, value in shown.items())
            print(f"{stage.name} {step}/{stage.steps} {pace:.2f} s/step {told}", flush=True)
        if run.rank == 0 and (step % SAVE_EVERY == 0 or step == stage.steps):
            _save(run, stage, found, step)
    if run.world > 1:
        dist.barrier()


def _save(run: Run, stage: Stage, found: list[torch.optim.Optimizer], step: int) -> None:
    tensors = {**run.tensors(), "schedule": torch.tensor([step, stage.steps, stage.batch, stage.side, run.seed])}
    for number, optimiser in enumerate(found):
        for key, state in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{number}.{key}.{name}": torch.as_tensor(value) for name, value in state.items()}
    path = run.folder / f"{stage.name}.safetensors"
    partial = path.with_suffix(".partial")
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, partial)
    os.replace(partial, path)


def _resume(run: Run, stage: Stage, found: list[torch.optim.Optimizer]) -> int:
    """Loads what an earlier run of the stage left; the step to go on from."""
    path = run.folder / f"{stage.name}.safetensors"
    if not path.is_file():
        return 0
    tensors = load_file(path, device=str(run.device))
    step, *schedule = tensors["schedule"].tolist()
    if schedule != [stage.steps, stage.batch, stage.side, run.seed]:
        raise ValueError(f"{path} is of another run (steps, batch, side, seed: {schedule}); take another folder.")
    with torch.no_grad():
        run.load(tensors)
    for number, optimiser in enumerate(found):
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            kind, *rest = name.split(".")
            if kind == "optimiser" and rest[0] == str(number):
                state.setdefault(int(rest[1]), {})[rest[2]] = value
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return int(step)


def average_stages(run: Run, names: Sequence[str]) -> None:
    """Gives the model the mean of its weights at the ends of some stages, which is better than each of them.

    (Model soups, arXiv 2203.05482.)
    """
    found = [load_file(run.folder / f"{name}.safetensors", device=str(run.device)) for name in names]
    with torch.no_grad():
        run.load({name: torch.stack([tensors[name] for tensors in found]).mean(0) for name in run.tensors()})
