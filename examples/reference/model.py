"""The reference model, untrained: a LLaVA of 2.9 M parameters, its tokenizer, and the heads that train its tower."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from llava_sparse.reference import CHECKPOINT

from .scenes import CATEGORIES, GRID, PATCH, SIDE

WIDTH = 128
WORDS = [
    "<pad>", "<s>", "</s>", "<unk>", "<image>", "\n", "USER:", "ASSISTANT:", "Is", "there", "a", "an", "in", "the",
    "image", "?", ".", ",", "Yes", "No", "What", "is", "Describe", "objects", *CATEGORIES,
]  # fmt: skip
QUESTION_WORDS = ["\n", "Is", "there", "a", "an", "in", "the", "image", "?", "ASSISTANT:"]
VOCABULARY = {word: number for number, word in enumerate(WORDS)}
YES, NO, END = VOCABULARY["Yes"], VOCABULARY["No"], VOCABULARY["</s>"]
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
# Decoder layers that start by matching contents (W_q = W_k): without such a start the look-up stays at chance.
LOOK_UP_LAYERS, LOOK_UP_SCALE = (1, 3, 5, 6), 1.5
# The layers before this one start as the identity, and join in once those behind it have learnt to look things up: the
# look-up then is late, as in large models, and pruning before it costs something. Where all layers learn at once, the
# first ones look everything up, and pruning after layer 2 is free.
FIRST_LAYER = 4


def article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def build_processor() -> LlavaProcessor:
    """The word-level tokenizer and CLIP's preprocessing."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors

    words = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s*\n\s*|[?,.]"), "isolated"),
            pre_tokenizers.Split(Regex(" +"), "removed"),
        ]
    )
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
        additional_special_tokens=["<image>"], padding_side="left",
    )  # fmt: skip
    pictures = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    return LlavaProcessor(
        image_processor=pictures, tokenizer=tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=(CHECKPOINT / "chat_template.jinja").read_text(),
    )  # fmt: skip


def build_model() -> LlavaForConditionalGeneration:
    """The untrained model."""
    vision = CLIPVisionConfig(
        hidden_size=WIDTH, intermediate_size=512, num_hidden_layers=7, num_attention_heads=4, image_size=SIDE,
        patch_size=PATCH, hidden_act="gelu",
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=128, hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=VOCABULARY["<image>"], vision_feature_layer=-2,
        vision_feature_select_strategy="default", image_seq_length=GRID * GRID,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=24, bos_token_id=1, eos_token_id=END, pad_token_id=0
    )
    embeddings = model.model.vision_tower.embeddings
    nn.init.normal_(embeddings.patch_embedding.weight, std=0.03)
    nn.init.normal_(embeddings.position_embedding.weight, std=0.02)
    nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    for number in LOOK_UP_LAYERS:
        attention = model.model.language_model.layers[number].self_attn
        nn.init.orthogonal_(attention.q_proj.weight, gain=LOOK_UP_SCALE)
        attention.k_proj.weight.data.copy_(attention.q_proj.weight)
    for layer in model.model.language_model.layers[:FIRST_LAYER]:
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


class VisionHeads(nn.Module):
    """What the tower is trained to tell: each patch's category, and from CLS which categories are present."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.patch = nn.Linear(WIDTH, len(CATEGORIES) + 1)
        self.present = nn.Linear(WIDTH, len(CATEGORIES))
        self.present_last = nn.Linear(WIDTH, len(CATEGORIES))
        nn.init.constant_(self.present.bias, -2.5)
        nn.init.constant_(self.present_last.bias, -2.5)


class Vision(nn.Module):
    """The tower on crops, with its heads."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower, self.heads = tower, VisionHeads()

    def forward(self, pixels: Tensor, corners: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Features of the layer before last `(batch, 1 + side², 128)` and the logits of the three heads."""
        tower = self.tower
        x = tower.pre_layrnorm(self._embed(pixels, corners))
        for layer in tower.encoder.layers[:-1]:
            x = layer(x, None)
        features = x
        last = tower.post_layernorm(tower.encoder.layers[-1](x, None)[:, 0])
        normed = self.heads.norm(features)
        return (
            features,
            self.heads.patch(normed[:, 1:]),
            self.heads.present(normed[:, 0]),
            self.heads.present_last(last),
        )

    def _embed(self, pixels: Tensor, corners: list[tuple[int, int]]) -> Tensor:
        parts = self.tower.embeddings
        x = parts.patch_embedding(pixels).flatten(2).transpose(1, 2)
        side = int(x.shape[1] ** 0.5)
        position = parts.position_embedding.weight
        grid = position[1:].view(GRID, GRID, -1)
        windows = [grid[y : y + side, a : a + side].reshape(side * side, -1) for y, a in corners]
        cls = (parts.class_embedding + position[0]).expand(len(x), 1, -1)
        return torch.cat([cls, x + torch.stack(windows)], 1)
