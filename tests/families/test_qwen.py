"""The Qwen-VL families: pictures of any size, videos, positions in three axes, deepstack features."""

from __future__ import annotations

import pytest
import torch
import transformers
from cost import Watch
from tiny_qwen import IMAGE, VIDEO, batch, dense_model, from_texts, processor, prompt, typed

import llava_sparse
from llava_sparse.modeling.pruning_cache import CACHE
from llava_sparse.modeling.pruning_registry import METHODS as KNOWN
from llava_sparse.modeling.pruning_registry import is_built_in

PROMPTS = {
    "wide": [5, 6, (1, 6, 12), 7, 8, 9],
    "two": [5, (1, 8, 6), 6, (1, 4, 10), 7, 8, 9, 10, 11],
    "none": [5, 6, 7, 8],
    "small": [6, (1, 4, 4), 9, 10],
    "video": [5, (3, 6, 4), 6, 7],
    "both": [5, (1, 4, 8), 6, (2, 4, 6), 7, 8, 9, 10],
}
METHODS = {
    "visionzip": dict(budgets=[0.4, 0.1]),
    "visionzip-most": dict(budgets=[5, 3]),
    "divprune": dict(budget=0.3),
    "cdpruner": dict(budget=5),
    "delegate": dict(budget=6),
    "eadp": dict(budget=0.3),
    "random": dict(budget=5),
    "uniform": dict(budget=0.5),
    "pool": dict(budget=5),
    "fastv": dict(layers=[1], budgets=[0.4]),
    "fastv-trimmed": dict(layers=[1], budgets=[6], options={"trim_cache": True}),
    "pyramiddrop": dict(layers=[2, 4], budgets=[9, 3]),
    "sparsevlm": dict(layers=[0, 2, 3], budgets=[12, 7, 3]),
    "sparsevlm-2.0": dict(layers=[1, 3], budgets=[0.5, 0.2], options={"version": "2.0"}),
    "sparsevlm-1.0": dict(layers=[1, 2], options={"version": "1.0", "scale": 2.0, "bias": 1.0}),
    "random_decoder": dict(layers=[1, 3], budgets=[8, 4]),
    "divprune+fastv": dict(budgets=[[0.6], [0.4]]),
    "visionzip+sparsevlm": dict(layers=[None, [0, 2, 3]], budgets=[[0.5, 0.2], [6, 4, 2]]),
}


# A method of each kind is crossed in the fast tests.
FAST = ("visionzip", "delegate", "sparsevlm")


def some(*fast, slow=()):
    return [*fast, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


CROSSED = [pytest.param(name, marks=[] if name in FAST else [pytest.mark.slow]) for name in METHODS]


@pytest.fixture(scope="module", params=["qwen2_5_vl", pytest.param("qwen2_vl", marks=pytest.mark.slow), "qwen3_vl"])
def dense(request):
    return dense_model(request.param)


def pruned(dense, name):
    return llava_sparse.sparsify(dense, name.partition("-")[0], **METHODS[name])


def written(dense, parts, seed=0):
    """A prompt as the family's processor writes it: of Qwen3-VL a video frame by frame."""
    return prompt(parts, seed, by_frame=dense.config.model_type == "qwen3_vl")


def inputs(dense, name, seed=0):
    return written(dense, PROMPTS[name], seed)


def greedy(model, given, **kwargs):
    arguments = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    arguments["suppress_tokens"] = [IMAGE, VIDEO]
    return model.generate(**given, **{**arguments, **kwargs})


def assert_near(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-4)


# --- Batches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CROSSED)
def test_a_batch_of_all_sorts_equals_its_prompts_alone(dense, name):
    model = pruned(dense, name)
    alone = [inputs(dense, x, seed) for seed, x in enumerate(PROMPTS)]
    together = greedy(model, batch(alone))
    for row, one in enumerate(alone):
        expected = greedy(model, one)
        assert torch.equal(together.sequences[row, -4:], expected.sequences[0, -4:])
        for step in range(4):
            assert_near(together.logits[step][row], expected.logits[step][0])


@pytest.mark.parametrize("name", CROSSED)
def test_a_forward_pass_sees_what_generation_sees(dense, name):
    """Positions are found by the model itself, as by generate; and behind the prompt too."""
    model, given = pruned(dense, name), batch([inputs(dense, "both"), inputs(dense, "wide", 1)])
    expected = greedy(model, given)
    given.pop("mm_token_type_ids")
    out = model(**given, use_cache=True)
    mask = given["attention_mask"]
    for step in range(3):
        assert_near(out.logits[:, -1], expected.logits[step])
        token = out.logits[:, -1:].argmax(-1)
        mask = torch.cat([mask, mask[:, :1] * 0 + 1], dim=1)
        out = model(input_ids=token, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)


@pytest.mark.parametrize("name", CROSSED)
def test_all_tokens_are_the_dense_model(dense, name):
    if "sparsevlm" in name:
        pytest.skip("one token always goes, of version 1.0 as many as its attention's rank says")
    method = name.partition("-")[0]
    model = llava_sparse.sparsify(dense, method, budget=1.0 if "+" not in method else [1.0, 1.0])
    given = batch([inputs(dense, "both"), inputs(dense, "none"), inputs(dense, "wide", 1)])
    for one, other in zip(greedy(model, given).logits, greedy(dense, given).logits, strict=True):
        assert_near(one, other)


def test_without_a_method_it_is_the_stock_model(dense):
    model = llava_sparse.sparsify(dense, None)
    for name in PROMPTS:
        given = inputs(dense, name)
        assert torch.equal(model(**given).logits, dense(**given).logits)
        assert torch.equal(greedy(model, given).sequences, greedy(dense, given).sequences)
    given = batch([inputs(dense, "both"), inputs(dense, "wide", 1)])
    assert torch.equal(greedy(model, given, num_beams=2).sequences, greedy(dense, given, num_beams=2).sequences)


# --- Positions and places ----------------------------------------------------------------------------------------


def entered(model, **given):
    """What entered the decoder in a forward pass, and its output."""
    seen = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    try:
        return seen, model(**given)
    finally:
        hook.remove()


@pytest.mark.parametrize("name", some("visionzip", "pool", slow=("divprune", "delegate", "fastv")))
def test_tokens_keep_the_positions_of_their_places(dense, name):
    model, given = pruned(dense, name), batch([inputs(dense, "both"), inputs(dense, "two", 1), inputs(dense, "none")])
    whole, _ = dense.model.get_rope_index(
        given["input_ids"], given["mm_token_type_ids"], given["image_grid_thw"], given["video_grid_thw"],
        attention_mask=given["attention_mask"],
    )  # fmt: skip
    with torch.no_grad():
        seen, out = entered(model, **given, as_passed=False)
    if name == "fastv":
        assert torch.equal(seen["position_ids"], whole)
        return
    columns = out.columns
    assert columns.shape[1] < whole.shape[2]
    there = columns >= 0
    kept = whole.gather(2, columns.clamp(min=0).expand(3, -1, -1))
    assert torch.equal(seen["position_ids"][:, there], kept[:, there])


@pytest.mark.parametrize("name", ["sparsevlm", "pyramiddrop", "sparsevlm-2.0"])
def test_the_decoder_renumbers_nothing(dense, name):
    model, given, tables = pruned(dense, name), inputs(dense, "two"), []
    model.model.language_model.rotary_emb.register_forward_hook(
        lambda module, args, kwargs, output: tables.append(kwargs["position_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        out = model(**given, as_passed=False)
    whole = tables[0][:, 0]
    last = tables[-1][:, 0] if name != "sparsevlm-2.0" else next(x for x in reversed(tables) if x.dim() == 3)[:, 0]
    columns = out.columns[0]
    kept = columns >= 0
    assert kept.sum() < whole.shape[1]
    if len(columns) == last.shape[1]:
        assert torch.equal(last[:, kept], whole[:, columns[kept]])


def test_merged_tokens_stand_at_the_mean_of_their_members(dense):
    """SparseVLM: each axis by itself, halves up."""
    model, given = llava_sparse.sparsify(dense, "sparsevlm", layers=[1], budgets=[6]), inputs(dense, "wide")
    tables = []
    model.model.language_model.rotary_emb.register_forward_hook(
        lambda module, args, kwargs, output: tables.append(kwargs["position_ids"][:, 0]), with_kwargs=True
    )
    with torch.no_grad():
        out = model(**given, output_selection=True, as_passed=False)
    (stage,) = out.selection
    first = int((given["mm_token_type_ids"][0] == 1).int().argmax())
    into, count = stage.merge_map[0] - 18, 18
    assert len(into) == count
    made = (out.columns[0] == -1).nonzero().flatten()
    for merged, column in enumerate(made):
        members = (into == merged).nonzero().flatten() + first
        mean = tables[0][:, members].double().mean(1)
        assert torch.equal(tables[-1][:, column], (mean + 0.5).floor().long())


def test_selection_numbers_tokens_over_all_pictures(dense):
    with torch.no_grad():
        encoder = pruned(dense, "uniform")(**inputs(dense, "two"), output_selection=True).selection
        decoder = pruned(dense, "divprune+fastv")(**inputs(dense, "two"), output_selection=True).selection
    (stage,) = encoder  # of 12 and 10 merged tokens
    assert stage.scores.shape == (1, 22)
    assert (stage.kept[0] < 12).sum() == 6 and (stage.kept[0] >= 12).sum() == 5 and stage.kept.max() < 22
    assert set(decoder[1].kept[0].tolist()) < set(decoder[0].kept[0].tolist())


# --- Deepstack ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["uniform", "visionzip", "fastv", "pyramiddrop"])
@torch.no_grad()
def test_deepstack_features_stay_with_their_tokens(name):
    """A loop over the decoder's layers, which drops what the record says, and adds the features of what is left."""
    dense = dense_model("qwen3_vl")
    model, given = pruned(dense, name), written(dense, [5, (1, 6, 12), 7, 8, 9])
    out = model(**given, output_selection=True, as_passed=False)
    seen = dense.get_image_features(given["pixel_values"], given["image_grid_thw"], return_dict=True)
    positions, _ = dense.model.get_rope_index(given["input_ids"], given["mm_token_type_ids"], given["image_grid_thw"])
    first, decoder = 2, dense.model.language_model
    places = torch.arange(18)
    hidden = decoder.embed_tokens(given["input_ids"])
    hidden[0, first : first + 18] = seen.pooler_output[0]

    def drop(kept):
        nonlocal hidden, positions, places
        columns = torch.cat([torch.arange(first), first + kept, torch.arange(first + len(places), hidden.shape[1])])
        hidden, positions, places = hidden[:, columns], positions[..., columns], places[kept]

    if name in ("uniform", "visionzip"):
        kept = out.columns[0][(out.columns[0] >= first) & (out.columns[0] < first + 18)] - first
        drop(kept)
        if name == "visionzip":  # What was merged is not what the dense model gives.
            features = model.get_image_features(given["pixel_values"], given["image_grid_thw"], return_dict=True)
            hidden[0, first : first + len(kept)] = features.pooler_output[0]
    for index, layer in enumerate(decoder.layers):
        length = hidden.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        tables = decoder.rotary_emb(hidden, position_ids=positions)
        hidden = layer(hidden, attention_mask=mask, position_embeddings=tables)
        if index < 3:
            hidden = hidden.clone()
            hidden[0, first : first + len(places)] += seen.deepstack_features[index][0][places]
        for stage in out.selection if name in ("fastv", "pyramiddrop") else ():
            if stage.layer == index:
                drop(torch.searchsorted(places, stage.kept[0]))
    assert len(places) < 18
    torch.testing.assert_close(dense.lm_head(decoder.norm(hidden)), out.logits, rtol=0, atol=2e-4)


# --- VisionZip ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [[1, 2], [1]])
def test_attention_received_against_the_whole_matrix(blocks):
    """With a last block that sees all, and one that sees windows; pictures and a video in one pass."""
    model = llava_sparse.sparsify(dense_model(fullatt_block_indexes=blocks), "visionzip", budget=4)
    visual, given = model.model.visual, prompt([(1, 6, 12), (1, 10, 4), (2, 6, 4)])
    pixels = torch.cat([given["pixel_values"], given["pixel_values_videos"]])
    grids = torch.cat([given["image_grid_thw"], given["video_grid_thw"]])
    seen = {}
    block = visual.blocks[-1].attn
    block.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs, hidden=args[0]), with_kwargs=True)
    with torch.no_grad():
        _, scores, keys = visual.with_received(pixels, grids)
        length = len(seen["hidden"])
        q, k, _ = block.qkv(seen["hidden"]).view(length, 3, 2, 16).unbind(1)
        cos, sin = (table[:, None] for table in seen["position_embeddings"])
        q, k = (x * cos + torch.cat([-x[..., 8:], x[..., :8]], -1) * sin for x in (q, k))
        part = torch.bucketize(torch.arange(length), seen["cu_seqlens"][1:].long(), right=True)
        logits = torch.einsum("qhd,khd->hqk", q, k) / 4
        logits = logits.masked_fill(part[:, None] != part, -torch.inf)
        received = logits.softmax(-1).mean(0).sum(0).view(-1, 4).mean(-1)
    assert len(seen["cu_seqlens"]) == (5 if 2 in blocks else 1 + 2 + 4 + 3 + 2 * 2 + 1) or 2 not in blocks
    order = visual.raster_order(grids)
    torch.testing.assert_close(scores, received[order])
    torch.testing.assert_close(keys, k.view(-1, 4, 2, 16).mean(1).transpose(0, 1)[:, order])


@pytest.mark.parametrize(("given", "tokens"), [({"budgets": [5, 3]}, 8), ({"budget": 7}, 7), ({"budget": 0.5}, 9)])
def test_budgets_are_of_each_picture(dense, given, tokens):
    """A number at most, a ratio of its own tokens."""
    model = llava_sparse.sparsify(dense, "visionzip", **given)
    for name, size in (("wide", 18), ("small", 4)):
        with torch.no_grad():
            out = model(**inputs(dense, name), as_passed=False)
        kept = out.logits.shape[1] - inputs(dense, name)["input_ids"].shape[1] + size
        assert kept == (min(tokens, size) if "budget" not in given or given["budget"] != 0.5 else size // 2)


# --- Generation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", some("visionzip", "delegate", "sparsevlm", slow=("cdpruner", "fastv", "visionzip+sparsevlm"))
)
def test_beams_and_several_sequences(dense, name):
    model, names = pruned(dense, name), ["two", "none", "both", "video"]
    alone = [inputs(dense, x, seed) for seed, x in enumerate(names)]
    given = batch(alone)
    encoded = []
    model.model.visual.register_forward_hook(lambda module, args, output: encoded.append(output))
    beams = greedy(model, given, num_beams=3, num_return_sequences=2)
    assert len(encoded) == 2  # pictures, and videos, once
    for row, one in enumerate(alone):
        expected = greedy(model, one, num_beams=3, num_return_sequences=2)
        assert torch.equal(beams.sequences[2 * row : 2 * row + 2, -4:], expected.sequences[:, -4:])
    several = greedy(model, given, num_return_sequences=2, do_sample=True, top_k=1)
    assert torch.equal(several.sequences[::2], greedy(model, given).sequences)


@pytest.mark.parametrize("name", ["visionzip", "divprune", "uniform"])
def test_a_second_turn_goes_on_with_the_cache(dense, name):
    """As if the conversation had been passed at once."""
    model, first = pruned(dense, name), inputs(dense, "two")
    said = greedy(model, first)
    cache = said.past_key_values
    more = torch.cat([said.sequences, torch.tensor([[7, 8, 9]])], dim=1)
    whole = typed({**first, "input_ids": more, "attention_mask": torch.ones_like(more)})
    expected = greedy(model, whole)
    text = {"input_ids": more, "attention_mask": torch.ones_like(more)}
    again = greedy(model, text, **{CACHE: cache})
    assert torch.equal(again.sequences, expected.sequences)
    for one, other in zip(again.logits, expected.logits, strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("name", ["visionzip", "divprune"])
def test_another_picture_on_the_cache(dense, name):
    model = pruned(dense, name)
    parts = [PROMPTS["both"], [11, (1, 6, 6), 12, 13]]
    whole, pieces = written(dense, [*parts[0], *parts[1]]), [written(dense, part) for part in parts]
    sizes = [len(piece["pixel_values"]) for piece in pieces]
    for piece, pixels in zip(pieces, whole["pixel_values"].split(sizes), strict=True):
        piece["pixel_values"] = pixels
    pieces[0]["pixel_values_videos"] = whole["pixel_values_videos"]
    with torch.no_grad():
        expected = model(**whole).logits
        out = model(**pieces[0], use_cache=True)
        pieces[1].pop("attention_mask")
        behind = model(**pieces[1], past_key_values=out.past_key_values).logits
    assert_near(behind[0], expected[0, -behind.shape[1] :])


@pytest.mark.parametrize("name", some("visionzip", "sparsevlm", slow=("delegate", "fastv", "visionzip+sparsevlm")))
def test_a_static_cache(dense, name):
    model, given = pruned(dense, name), batch([inputs(dense, "both"), inputs(dense, "wide", 1)])
    expected = greedy(model, given)
    static = greedy(model, given, cache_implementation="static", disable_compile=True)
    assert torch.equal(static.sequences, expected.sequences)


@pytest.mark.parametrize("name", some("visionzip", "sparsevlm", slow=("delegate", "fastv")))
def test_without_a_cache(dense, name):
    model, given = pruned(dense, name), batch([inputs(dense, "both"), inputs(dense, "wide", 1)])
    assert torch.equal(greedy(model, given, use_cache=False).sequences, greedy(model, given).sequences)


def test_chunked_prefill(dense):
    model, given = pruned(dense, "visionzip"), batch([inputs(dense, "both"), inputs(dense, "wide", 1)])
    assert torch.equal(greedy(model, given, prefill_chunk_size=5).sequences, greedy(model, given).sequences)


@pytest.mark.parametrize("name", CROSSED)
def test_features_encoded_by_the_caller(dense, name):
    model, given = pruned(dense, name), batch([inputs(dense, "both"), inputs(dense, "wide", 1)])
    rest = {k: v for k, v in given.items() if not k.startswith("pixel_values")}
    encoded = {
        "image": model.get_image_features(given["pixel_values"], given["image_grid_thw"], return_dict=True),
        "video": model.get_video_features(given["pixel_values_videos"], given["video_grid_thw"], return_dict=True),
    }
    with torch.no_grad():
        expected = model(**given).logits
        assert torch.equal(model(**rest, mm_encoder_outputs=encoded).logits, expected)
    said = greedy(model, rest, mm_encoder_outputs=encoded)
    assert torch.equal(said.sequences, greedy(model, given).sequences)


@pytest.mark.parametrize("name", ["divprune", "cdpruner", "fastv", "sparsevlm"])
@torch.no_grad()
def test_features_of_a_dense_model(dense, name):
    model, given = pruned(dense, name), batch([inputs(dense, "two"), inputs(dense, "wide", 1)])
    expected, pixels = model(**given).logits, given.pop("pixel_values")
    features = dense.get_image_features(pixels, given["image_grid_thw"], return_dict=True)
    assert_near(model(**given, mm_encoder_outputs={"image": features}).logits, expected)
    mask = given["mm_token_type_ids"] == 1
    embeds = model.get_input_embeddings()(given["input_ids"])
    embeds = embeds.masked_scatter(mask[..., None], torch.cat(list(features.pooler_output)))
    merged = {"inputs_embeds": embeds, "attention_mask": given["attention_mask"], "visual_mask": mask}
    if dense.config.model_type == "qwen3_vl":
        with pytest.raises(ValueError, match="features of earlier tower layers"):
            model(**merged)
        return
    assert_near(model(**merged, image_grid_thw=given["image_grid_thw"]).logits, expected)
    with pytest.raises(ValueError, match="image_grid_thw must be given"):
        model(**merged)


@torch.no_grad()
def test_samples_packed_into_a_row(dense):
    """A row of positions in front of the axes tells them apart; the methods that can, see each as if it were alone."""
    parts = [inputs(dense, "wide"), inputs(dense, "two", 1)]
    axes = [dense.model.get_rope_index(x["input_ids"], x["mm_token_type_ids"], x["image_grid_thw"])[0] for x in parts]
    rows = [torch.arange(x.shape[2]).expand(1, 1, -1) for x in axes]
    packed = {
        "input_ids": torch.cat([x["input_ids"] for x in parts], dim=1),
        "position_ids": torch.cat([torch.cat(rows, dim=2), torch.cat(axes, dim=2)]),
        "pixel_values": torch.cat([x["pixel_values"] for x in parts]),
        "image_grid_thw": torch.cat([x["image_grid_thw"] for x in parts]),
        "use_cache": False,
    }
    model = pruned(dense, "visionzip")
    alone = torch.cat([model(**x).logits for x in parts], dim=1)
    assert_near(model(**packed).logits, alone)
    with pytest.raises(ValueError, match="several samples are packed into it"):
        pruned(dense, "fastv")(**packed)


# --- Training ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CROSSED)
def test_labels_follow_their_tokens(dense, name):
    """Of each prompt alone the same loss as in a batch, and gradients reach tower and decoder."""
    model, alone = pruned(dense, name), [inputs(dense, "both"), inputs(dense, "two", 1)]

    def labelled(given):
        labels = given["input_ids"].masked_fill(given["mm_token_type_ids"] > 0, -100)
        return {**given, "labels": labels.masked_fill(given["attention_mask"] == 0, -100)}

    counts = [int((labelled(one)["labels"][:, 1:] != -100).sum()) for one in alone]
    losses = [model(**labelled(one)).loss.item() * n for one, n in zip(alone, counts, strict=True)]
    loss = model(**labelled(batch(alone))).loss
    assert loss.item() == pytest.approx(sum(losses) / sum(counts), abs=2e-4)
    loss.backward()
    for part in (model.model.visual.blocks[0], model.model.language_model.layers[0]):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())


def test_a_budget_of_all_has_the_dense_loss(dense):
    model, given = llava_sparse.sparsify(dense, "visionzip", budget=1.0), inputs(dense, "both")
    labels = given["input_ids"].masked_fill(given["mm_token_type_ids"] > 0, -100)
    with torch.no_grad():
        assert_near(model(**given, labels=labels).loss, dense(**given, labels=labels).loss)


# --- What is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tome", "scope", "vispruner"])
def test_methods_that_need_cls(dense, name):
    with pytest.raises(ValueError, match=rf"'{name}' .*supported: cdpruner, delegate, divprune, .*visionzip"):
        llava_sparse.sparsify(dense, name, budget=5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("visionzip", 0), "must be an int in"),
        (("visionzip", 1.5), "or a float in"),
        (("pyramiddrop", 5, {"options": {"positions": "compact"}}), "positions='compact' of pyramiddrop"),
        (("cdpruner", 5, {"options": {"clip": "some/clip"}}), "clip='some/clip' of cdpruner: this model's tower is no"),
        (("visionzip", None, {"budgets": [0.9, 0.2]}), "both together at most"),
        (("visionzip", 5, {"layers": [0]}), "last"),
        (("divprune", None), "needs `sparse_budget`"),
    ],
)
def test_settings_that_make_no_sense(dense, arguments, words):
    method, budget, *rest = arguments
    with pytest.raises(ValueError, match=words):
        llava_sparse.sparsify(dense, method, budget, **(rest[0] if rest else {}))


def test_what_a_forward_pass_refuses(dense):
    model, given = pruned(dense, "visionzip"), inputs(dense, "wide")
    shorter = {**given, "input_ids": given["input_ids"][:, 5:], "attention_mask": given["attention_mask"][:, 5:]}
    with pytest.raises(ValueError, match="image tokens do not match"):
        model(**shorter)
    grids = given.pop("image_grid_thw")
    with pytest.raises(ValueError, match="image_grid_thw"):
        model(**given)
    features = dense.get_image_features(given.pop("pixel_values"), grids, return_dict=True)
    with pytest.raises(ValueError, match="works in the vision tower"):
        model(**given, mm_encoder_outputs={"image": features})
    encoded = pruned(dense, "divprune").get_image_features(
        inputs(dense, "wide")["pixel_values"], grids, return_dict=True
    )
    with pytest.raises(ValueError, match="image_grid_thw must be given, or position_ids"):
        model(**given, mm_encoder_outputs={"image": encoded})


# --- Processors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
def test_our_processor_checks_settings_and_writes_all_placeholders(prefix):
    """Positions are those of the whole picture, so that no placeholder may be missing."""
    stock, ours = (
        getattr(module, f"{kind}{prefix}Processor") for module, kind in ((transformers, ""), (llava_sparse, "Sparse"))
    )
    texts = ["USER: <image> What dog ? ASSISTANT:"]
    expected = from_texts(processor(stock), texts, 0)
    for settings in ({"sparse_budget": 10**4}, {"sparse_budgets": [0.4, 0.1]}, {"sparse_budget": 0.2}):
        made = from_texts(processor(ours, sparse_method="visionzip", **settings), texts, 0)
        assert set(made) == set(expected) and all(torch.equal(made[name], expected[name]) for name in made)
    for settings in ({"sparse_budget": 0}, {"sparse_budgets": [0.9, 0.4]}, {}, {"sparse_budget": 3, "sparse_x": 1}):
        with pytest.raises(ValueError, match="sparse_"):
            processor(ours, sparse_method="visionzip", **settings)


# --- Cost --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["visionzip", "sparsevlm", "fastv"])
def test_no_matrix_of_length_by_length(dense, name):
    model, given = pruned(dense, name), prompt([5, (1, 24, 36), 6, 7])
    with torch.no_grad(), Watch() as watch:
        model(**given)
    # 864 patches, 216 merged tokens, and dimensions of the model that are smaller
    assert not watch.square(200)
    with torch.no_grad(), Watch() as watch:
        dense_model("qwen2_5_vl", "eager")(**given)
    assert watch.square(200)


def test_which_methods_are_crossed_here():
    """A new method has to be listed, or refused."""
    crossed = {part for name in METHODS for part in name.partition("-")[0].split("+")}
    assert crossed | {"tome", "scope", "vispruner"} == {name for name in KNOWN if is_built_in(KNOWN[name])}
