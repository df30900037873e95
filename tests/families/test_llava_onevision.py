"""What LLaVA-OneVision has of its own: several pictures of a prompt, pictures scaled down, pooled videos."""

from __future__ import annotations

import pytest
import tiny
import torch
from family_cases import PINPOINTS, next_picture, onevision_model, onevision_processor
from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

import llava_sparse

TEXT = "USER: <image> and <image> What red car ? ASSISTANT:"


def together(processor, texts, pictures):
    """Each prompt's pictures in a list of their own: of several, none is cut."""
    return dict(processor(images=pictures, text=texts, return_tensors="pt", padding=True))


@pytest.mark.parametrize("method", [None, "divprune", "cdpruner", "delegate", "fastv"])
@torch.no_grad()
def test_several_pictures_of_a_prompt_are_a_tile_each(method):
    dense = onevision_model()
    model = llava_sparse.sparsify(dense, method, None if method is None else 6)
    texts = [TEXT, "USER: <image> No ? ASSISTANT:"]
    pictures = [[next_picture(0), next_picture(1)], [next_picture(2)]]
    stock = together(onevision_processor(), texts, pictures)
    assert stock["batch_num_images"].tolist() == [2, 1]
    counts = (stock["input_ids"] == 4).sum(-1).tolist()
    grid = model.model.tile_grids(stock["image_sizes"], stock["batch_num_images"])
    assert grid[:2] == [(0, 0)] * 2 and counts[0] == 2 * (tiny.PATCHES + 1)
    sizes = [model.model.dense_tokens(size, own) for size, own in zip(stock["image_sizes"], grid, strict=True)]
    assert [sum(sizes[:2]), sizes[2]] == counts
    logits = model(**stock).logits
    if method is None:
        assert torch.equal(logits, dense(**stock).logits)
        return
    alone = together(onevision_processor(), texts[:1], pictures[:1])
    torch.testing.assert_close(logits[0, -1], model(**alone).logits[0, -1], rtol=0, atol=2e-4)
    ours = onevision_processor(sparse_method=method, sparse_budget=6)
    short = together(ours, texts, pictures)
    torch.testing.assert_close(logits[:, -1], model(**short).logits[:, -1], rtol=0, atol=2e-4)
    if method in ("divprune", "delegate"):
        assert (short["input_ids"] == 4).sum(-1).tolist() == [12, 6]


@pytest.mark.parametrize("size", [(56, 56), (56, 112), (100, 52), (40, 90), (112, 112), (168, 50), (300, 280)])
@torch.no_grad()
def test_tokens_of_a_picture_when_dense(size):
    """As the stock model packs it, scaled down or not."""
    model = llava_sparse.sparsify(onevision_model(), None)
    sizes = torch.tensor([size])
    (grid,) = model.model.tile_grids(sizes)
    pixels = torch.zeros(1, 1 + grid[0] * grid[1], 3, 56, 56)
    (features,) = model.get_image_features(pixels, sizes, return_dict=True).pooler_output
    assert model.model.dense_tokens(sizes[0], grid) == len(features)


@torch.no_grad()
def test_a_video_is_pruned_as_a_whole():
    model = llava_sparse.sparsify(onevision_model(), "divprune", 0.5)
    pixels = torch.randn(2, 4, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 5, *[len(tiny.WORDS)] * 17, 10], [1, 6, *[len(tiny.WORDS)] * 17, 11]])
    out = model(input_ids=ids, pixel_values_videos=pixels, output_selection=True)
    assert out.selection[0].kept.shape == (2, 8) and out.past_key_values.get_seq_length() == 3 + 8
    features = model.get_video_features(pixels, return_dict=True)
    assert [len(x) for x in features.pooler_output] == [8, 8]
    again = model(input_ids=ids, mm_encoder_outputs={"video": features}).logits
    torch.testing.assert_close(again, out.logits)
    model.set_sparsity(None)
    whole = model(input_ids=ids, pixel_values_videos=pixels).logits
    torch.testing.assert_close(whole, onevision_model()(input_ids=ids, pixel_values_videos=pixels).logits)


@torch.no_grad()
def test_methods_in_a_clip_tower_take_pictures_and_refuse_videos():
    config = LlavaOnevisionConfig(
        vision_config=tiny.vision_config(), text_config=tiny.text_config("qwen2"), image_token_index=4,
        video_token_index=len(tiny.WORDS), image_grid_pinpoints=PINPOINTS, vision_aspect_ratio="anyres_max_4",
        vision_feature_layer=-2, vision_feature_select_strategy="default",
    )  # fmt: skip
    model = llava_sparse.sparsify(LlavaOnevisionForConditionalGeneration(config).eval(), "visionzip", 20)
    batch = together(onevision_processor(), ["USER: <image> No ? ASSISTANT:"], [[next_picture(0)]])
    ids = batch["input_ids"]
    tiles = len(batch["pixel_values"][0])
    kept = 20 // tiles * tiles
    short = torch.cat([ids[:, :2], torch.full((1, kept), 4), ids[:, -3:]], dim=1)
    out = model(input_ids=short, pixel_values=batch["pixel_values"], image_sizes=batch["image_sizes"])
    assert out.past_key_values.get_seq_length() == kept + 5
    with pytest.raises(ValueError, match="visionzip works in the vision tower, and this model pools"):
        model.get_video_features(torch.zeros(1, 2, 3, 56, 56))
