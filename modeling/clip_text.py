"""A CLIP model beside a LLaVA: how relevant patches are to a question, in the space that CLIP shares."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPModel

from .pruning_ops import to_float


@lru_cache(maxsize=2)
def load_clip(name: str, device: torch.device) -> Any:
    """A CLIP model in float32, for reading; the last two that were asked for stay loaded.

    Raises:
        OSError: if there is none of this name, or none in safetensors.
    """
    return (
        CLIPModel.from_pretrained(name, dtype=torch.float32, use_safetensors=True)
        .eval()
        .requires_grad_(False)
        .to(device)
    )


def question_parts(ids: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cuts questions into parts that a text tower can take.

    Args:
        ids: `(images, n)` int64, with start and end, -1 for padding on the right.
        limit: positions of the tower.

    Returns:
        ids `(images, parts, limit)` with 0 as padding, their mask, and which parts there are, `(images, parts)` bool.
    """
    parts = -(-ids.shape[1] // limit)
    ids = torch.nn.functional.pad(ids, (0, parts * limit - ids.shape[1]), value=-1).unflatten(1, (parts, limit))
    there = ids >= 0
    return ids.clamp(min=0), there, there.any(-1)


@torch.no_grad()
def clip_relevance(name: str, features: Tensor, ids: Tensor | None) -> Tensor:
    """Relevance `(images, N)` of patches to a question: mean over its parts of -cos(patch, part).

    Args:
        name: of the CLIP model.
        features: `(images, N, width)` patches of the vision tower's layer.
        ids: as of `question_parts`.

    Raises:
        ValueError: without ids, and for a CLIP model of another width than the tower.
    """
    if ids is None:
        raise ValueError(
            "sparse_options: clip needs the question in CLIP's vocabulary: pass question_ids, as "
            "SparseLlavaProcessor(..., sparse_options={'clip': ...}) writes them."
        )
    clip = load_clip(name, features.device)
    if clip.config.vision_config.hidden_size != features.shape[-1]:
        raise ValueError(
            f"sparse_options: clip={name!r} has a vision tower of width {clip.config.vision_config.hidden_size}, this "
            f"model one of {features.shape[-1]}: name the CLIP model that the LLaVA was made from."
        )
    visual, text = clip_embeddings(clip, features, ids.to(features.device))
    there = question_parts(ids.to(features.device), clip.config.text_config.max_position_embeddings)[2]
    similarity = unit(visual) @ unit(text).transpose(1, 2)
    return -(similarity * there[:, None]).sum(-1) / there.sum(-1, keepdim=True).clamp(min=1)


def clip_embeddings(clip: Any, features: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings of patches `(images, N, E)`, and of the parts of questions `(images, parts, E)`."""
    visual = clip.visual_projection(clip.vision_model.post_layernorm(to_float(features).float()))
    parts, mask, _ = question_parts(ids, clip.config.text_config.max_position_embeddings)
    mask[..., 0] = True  # A row of padding alone has to attend to something.
    hidden = clip.text_model(input_ids=parts.flatten(0, 1), attention_mask=mask.flatten(0, 1).long()).last_hidden_state
    # As CLIP first did: a part is read off at its largest id, which is the end token where there is one.
    last = parts.flatten(0, 1).argmax(-1)
    text = clip.text_projection(hidden[torch.arange(len(last), device=last.device), last])
    return visual, text.unflatten(0, parts.shape[:2])


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)
