"""Video-LLaVA: images and videos in a batch and in a prompt, budgets over a video's frames, both processors."""

from __future__ import annotations

from contextlib import contextmanager
from functools import wraps
from unittest.mock import patch

import pytest
import tiny
import torch
from cases import CASES
from family_cases import video_model, video_processor

import llava_sparse
from llava_sparse.evaluation import ask
from llava_sparse.modeling.configuration_sparse_llava import build_sparsifier
from llava_sparse.modeling.configuration_sparse_video_llava import SparseVideoLlavaConfig
from llava_sparse.modeling.modeling_sparse_video_llava import PIXELS
from llava_sparse.modeling.pruning_registry import METHODS

PATCHES, FRAME, FRAMES = 16, 17, 8
VIDEO = FRAME * FRAMES
IMAGE_ID, VIDEO_ID, NEW = 4, len(tiny.WORDS), 4
METHOD_CASES = [case for case in CASES if not case.slow]


@pytest.fixture(scope="module")
def dense():
    return video_model()


def pixels(*shape, seed):
    """Noise, of which no two are alike, with a pattern that differs from frame to frame."""
    return torch.randn(*shape, 3, tiny.SIDE, tiny.SIDE, generator=torch.Generator().manual_seed(seed))


def prompt(text, written=(PATCHES, VIDEO)):
    """Ids of words, with I for an image and V for a video, of so many placeholders each."""
    ids = [1]
    for word in text.split():
        ids += {"I": [IMAGE_ID] * written[0], "V": [VIDEO_ID] * written[1]}.get(
            word, [5 + len(word) + ord(word[0]) % 20]
        )
    return ids


def batch(*texts, written=(PATCHES, VIDEO), frames=FRAMES, seed=0):
    """Prompts, padded on the left, and a different picture for each place."""
    rows = [prompt(text, written) for text in texts]
    most = max(map(len, rows))
    ids = torch.tensor([[0] * (most - len(row)) + row for row in rows])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    images, videos = (sum(text.split().count(kind) for text in texts) for kind in "IV")
    if images:
        inputs[PIXELS] = torch.stack([pixels(seed=seed + i) for i in range(images)])
    if videos:
        inputs["pixel_values_videos"] = torch.stack([pixels(frames, seed=seed + 50 + i) for i in range(videos)])
    return inputs


def alone(inputs, row, text, before):
    """The row of a batch by itself, with its pictures."""
    mask = inputs["attention_mask"][row].bool()
    out = {"input_ids": inputs["input_ids"][row][mask][None]}
    for kind, name in (("I", PIXELS), ("V", "pixel_values_videos")):
        count, first = text.split().count(kind), sum(other.split().count(kind) for other in before)
        if count:
            out[name] = inputs[name][first : first + count]
    return {**out, "attention_mask": torch.ones_like(out["input_ids"])}


def greedy(model, inputs, **kwargs):
    new = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None, **kwargs)
    return new[:, inputs["input_ids"].shape[1] :]


def pruned(dense, case):
    """A few tokens of an image are none of each frame of a video: then a ratio."""
    settings, method = dict(case.settings), METHODS.get(case.method)
    if "budget" in settings and method is not None and method.kind == "encoder":
        settings["budget"] = 0.3
    return llava_sparse.sparsify(dense, case.method, **settings)


TEXTS = ["what V is in it", "a I and V of two I dogs ?", "I left", "no picture at all ?", "V up I"]


@pytest.mark.parametrize("case", METHOD_CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_a_batch_of_images_and_videos_equals_its_rows(dense, case):
    model, inputs = pruned(dense, case), batch(*TEXTS)
    together, said = model(**inputs).logits[:, -1], greedy(model, inputs)
    for row, text in enumerate(TEXTS):
        single = alone(inputs, row, text, TEXTS[:row])
        torch.testing.assert_close(together[row], model(**single).logits[0, -1], rtol=0, atol=2e-4)
        assert torch.equal(said[row], greedy(model, single)[0])


@pytest.mark.parametrize("case", METHOD_CASES, ids=lambda case: case.name)
@torch.no_grad()
def test_both_processors_beams_and_features_of_the_caller(dense, case):
    model, texts = pruned(dense, case), TEXTS[:2]
    inputs = batch(*texts)
    logits = model(**inputs).logits[:, -1]
    names = {"image": PIXELS, "video": "pixel_values_videos"}
    encoded = {
        "image": model.model.get_image_features(inputs[PIXELS]),
        "video": model.model.get_video_features(inputs["pixel_values_videos"]),
    }
    words = {name: x for name, x in inputs.items() if name not in names.values()}
    torch.testing.assert_close(model(**words, mm_encoder_outputs=encoded).logits[:, -1], logits)
    one = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, num_beams=2, eos_token_id=None)
    two = model.generate(
        **words, mm_encoder_outputs=encoded, max_new_tokens=NEW, do_sample=False, num_beams=2, eos_token_id=None
    )
    assert torch.equal(one, two)
    first = model.generate(
        **inputs, max_new_tokens=1, do_sample=False, num_beams=2, return_dict_in_generate=True, output_logits=True
    )
    torch.testing.assert_close(first.logits[0][::2], logits, rtol=0, atol=2e-4)
    if METHODS.get(case.method) is None or METHODS[case.method].kind != "encoder":
        return
    encoder = model.model.sparsifier
    short = batch(*texts, written=(model.model.kept_tokens(encoder, encoded["image"])[0],
                                   model.model.kept_tokens(encoder, encoded["video"])[0]))  # fmt: skip
    if encoder.looks_at_question or encoder.place != "projector":
        assert short["input_ids"].shape[1] < inputs["input_ids"].shape[1]
    torch.testing.assert_close(model(**short).logits[:, -1], logits, rtol=0, atol=2e-4)


@torch.no_grad()
def test_the_dense_model_is_the_stock_one(dense):
    model, inputs = llava_sparse.sparsify(dense, None), batch(*TEXTS)
    assert torch.equal(model(**inputs).logits, dense(**inputs).logits)
    assert torch.equal(greedy(model, inputs), greedy(dense, inputs))
    beams = greedy(model, inputs, num_beams=2)
    with features_by_prompt(dense.model):
        for row, text in enumerate(TEXTS):
            assert torch.equal(beams[row], greedy(dense, alone(inputs, row, text, TEXTS[:row]), num_beams=2)[0])


@contextmanager
def features_by_prompt(stock):
    """Lets the oldest releases' beams see what the prompt shows.

    These encode before they expand a prompt to its beams, and repeat what they find image by image and frame by frame:
    of images A, B or frames 0, 1, 2 the first of two beams is given A, A, or 0, 0, 1. So here features of the one
    prompt are one row, which is repeated as a whole; what a forward makes of them does not change.
    """
    if PIXELS != "pixel_values_images":
        yield
        return

    def as_one(encode):
        @wraps(encode)  # generate reads the names of its arguments.
        def encoded(*args, **kwargs):
            out = encode(*args, **kwargs)
            out.pooler_output = out.pooler_output.flatten(0, 1)[None]
            return out

        return encoded

    names = ("get_image_features", "get_video_features")
    with patch.multiple(stock, **{name: as_one(getattr(stock, name)) for name in names}):
        yield


EVERYTHING = [
    ("fastv", {"budgets": [VIDEO], "layers": [1]}),
    ("random", {"budget": 1.0}),
    ("uniform", {"budget": 1.0}),
    ("pool", {"budget": VIDEO}),
    ("divprune", {"budget": 1.0}),
    ("scope", {"budget": VIDEO}),
]


@pytest.mark.parametrize(("method", "settings"), EVERYTHING)
@torch.no_grad()
def test_all_tokens_are_the_dense_model(dense, method, settings):
    inputs = batch(*TEXTS)
    model = llava_sparse.sparsify(dense, method, **settings)
    torch.testing.assert_close(model(**inputs).logits[:, -1], dense(**inputs).logits[:, -1], rtol=0, atol=2e-4)


@pytest.mark.parametrize("frames", [1, 3, FRAMES])
@pytest.mark.parametrize("budget", [35, 0.25])
@pytest.mark.parametrize("method", sorted(name for name, method in METHODS.items() if method.kind == "encoder"))
@torch.no_grad()
def test_budgets_are_of_a_video(dense, method, budget, frames):
    """Exactly so many tokens of a video, at most all; a ratio of what it has; CLS of every frame is one of them."""
    model = llava_sparse.sparsify(dense, method, budget)
    inputs = batch("a V b I c", frames=frames, written=(PATCHES, FRAME * frames))
    out = model(**inputs, output_selection=True, as_passed=False)
    tokens = FRAME * frames
    expected = min(budget, tokens) if isinstance(budget, int) else round(budget * tokens)
    if method == "visionzip":
        expected = min(expected, frames * PATCHES)
    of_image = min(budget, PATCHES) if isinstance(budget, int) else round(budget * PATCHES)
    assert out.logits.shape[1] == 4 + expected + of_image
    assert out.selection[0].scores.shape[1] == tokens + PATCHES
    if METHODS[method].place != "projector":
        seen = set(out.selection[0].kept[0].tolist())
        assert {FRAME * frame for frame in range(frames)} <= seen


def test_the_paper_counts_194_tokens():
    """Of the published size; see the oracles' README for where the number comes from."""
    for settings in ({}, {"sparse_budget": 194}):
        method = build_sparsifier(SparseVideoLlavaConfig(sparse_method="sparsevlm", **settings))
        assert (method.layers, method.version, method.scale, method.bias) == ((1,), "1.0", 1.0, 0.0)
    assert build_sparsifier(SparseVideoLlavaConfig(sparse_method="sparsevlm", sparse_budget=192)).version == "1.5"


def test_settings(dense):
    config = llava_sparse.sparsify(dense, "sparsevlm").config
    assert (config.sparse_layers, config.sparse_budgets, config.sparse_options) == ([1], None, None)
    method = llava_sparse.sparsify(dense, "sparsevlm", 100, options={"version": "2.0"}).model.sparsifier
    assert method.of(frames=None, patches=PATCHES).budgets == (PATCHES,) * 3
    frames = llava_sparse.sparsify(dense, "visionzip", budgets=[3, 1]).model
    assert [len(x) for x in frames.get_video_features(pixels(2, 3, seed=0)).features] == [12, 12]
    with pytest.raises(ValueError, match=r"int in \[1, 136\]"):
        llava_sparse.sparsify(dense, "divprune", 137)
    with pytest.raises(ValueError, match="8 to 136 tokens are allowed"):
        llava_sparse.sparsify(dense, "visionzip", 7)


@torch.no_grad()
def test_as_published(dense):
    """SparseVLM with nothing else has one stage, in which as many tokens as the rank stay."""
    model, inputs = llava_sparse.sparsify(dense, "sparsevlm"), batch("what is V in it ?")
    options = {"version": "1.0", "scale": 1.0, "bias": 0.0}
    other = llava_sparse.sparsify(dense, "sparsevlm", layers=[1], options=options)
    assert torch.equal(other(**inputs).logits, model(**inputs).logits)
    stage = model(**inputs, output_selection=True).selection[0]
    assert stage.layer == 1 and stage.kept.shape[1] < 8


@torch.no_grad()
def test_placeholders_have_to_match(dense):
    model, inputs = llava_sparse.sparsify(dense, "divprune", 20), batch("a V b I c")
    for name, what in ((PIXELS, "Image"), ("pixel_values_videos", "Video")):
        with pytest.raises(ValueError, match=f"{what} features and {what.lower()} tokens do not match"):
            model(**{k: v for k, v in inputs.items() if k != name})
    mixed = dict(inputs)
    ids = mixed["input_ids"].clone()
    ids[0, 2], ids[0, -3] = IMAGE_ID, VIDEO_ID
    with pytest.raises(ValueError, match="stand among those of"):
        model(**{**mixed, "input_ids": ids})
    stock = dense.model.get_video_features(inputs["pixel_values_videos"])
    with pytest.raises(ValueError, match="features of frames"):
        model(input_ids=inputs["input_ids"], **{PIXELS: inputs[PIXELS]}, mm_encoder_outputs={"video": stock})


@torch.no_grad()
def test_merged_features(dense):
    """Embeddings of a video that the caller has merged are one item."""
    inputs = batch("what V is in it ?")
    features = dense.model.get_video_features(inputs["pixel_values_videos"]).pooler_output.flatten(0, 1)
    mask = inputs["input_ids"] == VIDEO_ID
    embeds = dense.get_input_embeddings()(inputs["input_ids"]).masked_scatter(mask[..., None], features)
    for method, settings in (("fastv", {"budget": 40}), ("divprune", {"budget": 40}), ("sparsevlm", {})):
        model = llava_sparse.sparsify(dense, method, **settings)
        merged = model(inputs_embeds=embeds, visual_mask=mask).logits
        torch.testing.assert_close(merged, model(**inputs).logits, rtol=0, atol=2e-4)


@pytest.mark.parametrize("method", ["visionzip", "divprune", "sparsevlm"])
def test_labels_and_gradients(dense, method):
    """The loss is that of the text, whatever is dropped; labels never rate."""
    model = llava_sparse.sparsify(dense, method, None if method == "sparsevlm" else 40)
    inputs = batch("a V b I c d", "I e")
    labels = inputs["input_ids"].masked_fill(
        (inputs["input_ids"] == 0) | (inputs["input_ids"] == IMAGE_ID) | (inputs["input_ids"] == VIDEO_ID), -100
    )
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    tower = model.model.video_tower.encoder.layers[0].mlp.fc1.weight
    assert tower.grad is not None and tower.grad.abs().max() > 0
    model.zero_grad()


@pytest.mark.parametrize(
    "settings",
    [
        {"sparse_method": "visionzip", "sparse_budget": 40},
        {"sparse_method": "visionzip", "sparse_budgets": [3, 1]},
        {"sparse_method": "vispruner", "sparse_budget": 0.3},
        {"sparse_method": "divprune", "sparse_budget": 30},
        {"sparse_method": "divprune+fastv", "sparse_budget": 0.1},
        {"sparse_method": "sparsevlm"},
    ],
    ids=str,
)
@pytest.mark.parametrize("frames", [3, FRAMES])
@torch.no_grad()
def test_the_sparse_processor_writes_what_enters_the_decoder(dense, settings, frames):
    ours, stock = video_processor(**settings), video_processor()
    given = {
        "text": ["USER: <image> Is <video> a ? ASSISTANT:", "USER: <video> ? ASSISTANT:"],
        "images": [tiny.image(0)],
        "videos": [[tiny.image(10 * video + frame) for frame in range(frames)] for video in range(2)],
        "padding": True,
        "return_tensors": "pt",
    }
    short, long = ours(**given), dict(stock(**given))
    long.setdefault(PIXELS, long.pop("pixel_values_images", None))
    model = llava_sparse.sparsify(
        dense, **{name.removeprefix("sparse_"): value for name, value in settings.items() if name != "sparse_method"},
        method=settings["sparse_method"],
    )  # fmt: skip
    if "fastv" not in settings["sparse_method"]:
        torch.testing.assert_close(model(**short).logits[:, -1], model(**long).logits[:, -1], rtol=0, atol=2e-4)
    if settings["sparse_method"] == "sparsevlm":
        assert torch.equal(short["input_ids"], long["input_ids"])
    else:
        assert short["input_ids"].shape[1] < long["input_ids"].shape[1]
        # Nothing is left to be dropped.
        assert (
            model(**short, as_passed=False).logits.shape[1] == short["input_ids"].shape[1]
            or "+" in settings["sparse_method"]
        )


def test_asking_about_a_video(dense):
    processor = video_processor(sparse_method="divprune", sparse_budget=40)
    model = llava_sparse.sparsify(dense, "divprune", 40)
    frames = [tiny.image(frame) for frame in range(FRAMES)]
    prompt = "USER: <image> {question} ASSISTANT:"
    said = ask(model, processor, frames, "Is there a dog ?", prompt, max_new_tokens=4, video=True)
    text = processor(videos=[frames], text=["USER: <video> Is there a dog ? ASSISTANT:"], return_tensors="pt")
    new = model.generate(**text, max_new_tokens=4, do_sample=False)[0, text["input_ids"].shape[1] :]
    assert said == processor.tokenizer.decode(new, skip_special_tokens=True).strip()
