"""What LLaVA-OneVision has of its own: several pictures of a prompt, pictures scaled down, pooled videos."""

from __future__ import annotations

import pytest
import tiny
import torch
from family_cases import PINPOINTS, next_picture, onevision_model, onevision_processor
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

import llava_sparse
from llava_sparse.modeling import pruning_attention

TEXT = "USER: <image> and <image> What red car ? ASSISTANT:"


def together(processor, texts, pictures):
    """Each prompt's pictures in a list of their own: of several, none is cut."""
    return dict(processor(images=pictures, text=texts, return_tensors="pt", padding=True))


@pytest.mark.parametrize("method", [None, "divprune", "cdpruner", "delegate", "fastv", "visionzip"])
@torch.no_grad()
def test_several_pictures_of_a_prompt_are_a_tile_each(method):
    dense = onevision_model()
    options = {"saliency": "received"} if method == "visionzip" else None
    model = llava_sparse.sparsify(dense, method, None if method is None else 6, options=options)
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
    ours = onevision_processor(sparse_method=method, sparse_budget=6, sparse_options=options)
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


# --- VisionZip by the attention that patches receive ---------------------------------------------------------------

RECEIVED = {"saliency": "received"}


def merged_by_hand(hidden, keys, kept, contextual):
    """The contextual tokens of one tile, and the patches at which they stand, in loops."""
    rest = [patch for patch in range(len(hidden)) if patch not in kept]
    step = max(1, len(rest) // contextual)
    targets = rest[: step * contextual : step]
    joined = {target: [] for target in targets}
    for patch in rest:
        if patch not in targets:
            alike = [torch.cosine_similarity(keys[patch], keys[target], dim=0) for target in targets]
            joined[targets[int(torch.stack(alike).argmax())]].append(hidden[patch])
    return [hidden[t] + (torch.stack(own).mean(0) if own else 0) for t, own in joined.items()], targets


@pytest.mark.parametrize("block", [1, 5, 64])
@torch.no_grad()
def test_visionzip_by_received_attention_against_eager_attentions(monkeypatch, block):
    """Of each tile: what all its patches pay, in the last layer, is summed in blocks of rows."""
    monkeypatch.setattr(pruning_attention, "ROWS", block)
    dense = onevision_model()
    model = llava_sparse.sparsify(dense, "visionzip", budgets=[4, 2], options=RECEIVED)
    batch = together(onevision_processor(), ["USER: <image> No ? ASSISTANT:"], [[next_picture(2)]])
    pixels, (grid,) = batch["pixel_values"][0], model.model.tile_grids(batch["image_sizes"])
    dense.set_attn_implementation("eager")
    seen = dense.model.vision_tower(pixels, output_hidden_states=True, output_attentions=True)
    hidden, side = seen.hidden_states[-1], model.model.side
    attention = dense.model.vision_tower.encoder.layers[-1].self_attn
    entering = attention.k_proj(dense.model.vision_tower.encoder.layers[-1].layer_norm1(seen.hidden_states[-2]))
    keys = entering.unflatten(-1, (attention.num_heads, -1)).mean(2)
    expected, kept = [], []
    for tile in range(len(pixels)):
        best = seen.attentions[-1][tile].mean(0).sum(0).topk(4).indices.tolist()
        made, targets = merged_by_hand(hidden[tile], keys[tile], best, 2)
        tokens = dict(zip(targets, made, strict=True)) | {patch: hidden[tile, patch] for patch in best}
        row, column = (tile - 1) // grid[1], (tile - 1) % grid[1]
        for patch, token in tokens.items():
            in_picture = (row * side + patch // side) * grid[1] * side + column * side + patch % side
            expected.append((tile > 0, in_picture if tile else patch, token))
        kept += [tile * side**2 + patch for patch in best]
    expected = torch.stack([token for *_, token in sorted(expected, key=lambda one: one[:2])])
    features = model.get_image_features(batch["pixel_values"], batch["image_sizes"], return_dict=True)
    torch.testing.assert_close(features.pooler_output[0], dense.model.multi_modal_projector(expected))
    ids = torch.cat([torch.tensor([[1]]), torch.full((1, len(expected)), 4), torch.tensor([[9, 6]])], dim=1)
    given = {"pixel_values": batch["pixel_values"], "image_sizes": batch["image_sizes"]}
    out = model(input_ids=ids, **given, output_selection=True)
    assert out.selection[0].kept[0].tolist() == sorted(kept)


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@torch.no_grad()
def test_received_attention_in_a_llava(vision):
    """CLS pays attention too, where the tower has it; none of it is a patch."""
    dense = tiny.dense_model() if vision == "clip" else siglip_llava()
    model = llava_sparse.sparsify(dense, "visionzip", budgets=[5, 0], options=RECEIVED)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([[1, 5, *[4] * 16, 10, *[4] * 16, 11, 12, 6]])
    kept = model(input_ids=ids, pixel_values=pixels, output_selection=True).selection[0].kept[0].tolist()
    dense.set_attn_implementation("eager")
    cls, layer = (1, -2) if vision == "clip" else (0, -1)
    rows = dense.model.vision_tower(pixels, output_attentions=True).attentions[layer].mean(1).sum(1)[:, cls:]
    best = [row.topk(5 - cls).indices + 16 * image for image, row in enumerate(rows)]
    assert kept == sorted(torch.cat(best).tolist())
    both = llava_sparse.sparsify(dense, "visionzip+fastv", 6, options={"visionzip": RECEIVED})
    said = both.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=3, do_sample=False, num_beams=2)
    assert said.shape[1] <= ids.shape[1] + 3


def test_what_received_attention_costs():
    """Queries of all tokens, and what they have to do with all keys, besides what the attention of CLS takes."""
    counted, said = [], []
    for options in (None, RECEIVED):
        model = llava_sparse.sparsify(tiny.dense_model(), "visionzip", budgets=[5, 0], options=options)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.get_image_features(torch.zeros(1, 3, 56, 56))
        counted.append(counter.get_total_flops())
        said.append(model.model.sparsifier.encoder.flops(16, model.config.vision_config.hidden_size, 0))
    width = model.config.vision_config.hidden_size
    of_cls = 2 * width**2 + 2 * 17 * width
    assert counted[1] - counted[0] == said[1] - said[0] - of_cls


def test_received_attention_has_to_be_asked_for():
    for method in ("visionzip", "vispruner"):
        with pytest.raises(ValueError, match=r"'siglip_vision_model'.*visionzip does in this one with sparse_options="):
            llava_sparse.sparsify(siglip_llava(), method, 6)
    with pytest.raises(ValueError, match=r"vispruner.*saliency"):
        llava_sparse.sparsify(siglip_llava(), "vispruner", 6, options=RECEIVED)
    with pytest.raises(ValueError, match=r"vision_feature_select_strategy='full' is allowed, got 'default'"):
        llava_sparse.sparsify(siglip_llava("default"), "visionzip", 6, options=RECEIVED)
    with pytest.raises(ValueError, match=r"at least 1, both together at most 16, the tokens"):
        llava_sparse.sparsify(siglip_llava(), "visionzip", budgets=[16, 1], options=RECEIVED)


def siglip_llava(strategy="full"):
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=onevision_model().config.vision_config, text_config=tiny.text_config(), image_token_index=4,
        vision_feature_layer=-1, vision_feature_select_strategy=strategy,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval()
