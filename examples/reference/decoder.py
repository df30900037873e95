"""The decoder in training: many questions about a picture in one sequence, some layers shown a decoy picture."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from .data import CAPTION_TOKENS, QUESTION_TOKENS
from .model import VOCABULARY

# How many of the first decoder layers see another picture of the batch than the one that is asked about, and how
# often: answers have to rely on what later layers look up.
DECOYS = {0: 0.6, 2: 0.1, 4: 0.2, 6: 0.1}


class Layout:
    """`[<s> USER: image \\n]`, then slots of which each sees this prefix and itself.

    Attributes:
        prefix: tokens of the prefix.
        mask: `(1, 1, length, length)` bfloat16, added to the attention's scores: 0 where a token sees another.
        positions: `(1, length)`.
        answer, end, caption: where yes or no, the end after it, and the caption's words are predicted.
    """

    def __init__(self, visual_tokens: int, questions: int, device: torch.device) -> None:
        self.prefix = visual_tokens + 3
        sizes = [QUESTION_TOKENS] * questions + [CAPTION_TOKENS]
        slot = torch.cat([torch.zeros(self.prefix)] + [torch.full((n,), j + 1.0) for j, n in enumerate(sizes)])
        within = torch.cat([torch.arange(self.prefix)] + [self.prefix + torch.arange(n) for n in sizes])
        place = torch.arange(len(slot))
        visible = (place[:, None] >= place) & ((slot == 0) | (slot[:, None] == slot))
        hidden = torch.finfo(torch.bfloat16).min
        self.mask = torch.zeros(1, 1, *visible.shape, dtype=torch.bfloat16).masked_fill(~visible, hidden).to(device)
        self.positions = within[None].to(device)
        starts = self.prefix + QUESTION_TOKENS * torch.arange(questions)
        self.answer = (starts + QUESTION_TOKENS - 2).to(device)
        self.end = self.answer + 1
        self.caption = torch.arange(len(slot) - CAPTION_TOKENS, len(slot)).to(device)


def decoy_orders(rng: np.random.Generator, size: int) -> tuple[Tensor, dict[int, Tensor]]:
    """Which picture each row's first layers see, and how the rows are put right again before some layers.

    Returns:
        `(size,)` rows of the pictures shown first; for a layer, the order that gives some rows their own pictures.
    """
    depths = rng.choice(list(DECOYS), size, p=list(DECOYS.values()))
    shown, back = np.arange(size), {}
    for depth in sorted(set(depths) - {0}):
        rows = np.flatnonzero(depths == depth)
        shown[rows] = np.roll(rows, 1)
        restore = np.arange(size)
        restore[rows] = np.roll(rows, -1)
        back[int(depth)] = torch.from_numpy(restore)
    return torch.from_numpy(shown), back


def decode(
    model: LlavaForConditionalGeneration,
    features: Tensor,
    ids: Tensor,
    layout: Layout,
    orders: tuple[Tensor, dict[int, Tensor]],
    first_layer: int = 0,
) -> Tensor:
    """Hidden states `(batch, length, 128)` of prefix and slots.

    Args:
        features: `(batch, visual_tokens, 128)`, projected.
        ids: `(batch, slot tokens)`.
        orders: of `decoy_orders`.
        first_layer: the layers before it are left out.
    """
    embed, decoder = model.get_input_embeddings(), model.model.language_model
    fixed = embed(torch.tensor([VOCABULARY[w] for w in ("<s>", "USER:", "\n")], device=ids.device))
    fixed = fixed[None].expand(len(ids), -1, -1)
    shown, back = orders
    x = torch.cat([fixed[:, :2], features.to(fixed.dtype)[shown], fixed[:, 2:], embed(ids)], 1)
    rotary = decoder.rotary_emb(x, layout.positions)
    for number, layer in enumerate(decoder.layers[first_layer:], start=first_layer):
        if number in back:
            # The prefix does not see the slots, so its states are those of the picture wherever it stands.
            x = torch.cat([x[:, : layout.prefix][back[number]], x[:, layout.prefix :]], 1)
        x = layer(x, attention_mask=layout.mask, position_ids=layout.positions, position_embeddings=rotary)
    return decoder.norm(x)
