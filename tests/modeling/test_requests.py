"""What callers may ask of one model: packed rows, features of their own, chunks, beams, threads, other towers."""

from __future__ import annotations

import threading
import time

import pytest
import tiny
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration, PixtralVisionConfig, SiglipVisionConfig

import llava_sparse
from llava_sparse.modeling.pruning_registry import METHODS

NEW = 5
ENCODERS = sorted(name for name, method in METHODS.items() if method.kind == "encoder")
DECODERS = sorted(name for name, method in METHODS.items() if method.kind == "decoder")


def pruned(dense, method):
    return llava_sparse.sparsify(dense, method, None if method is None else 6)


def greedy(model, batch, **kwargs):
    length = next(batch[key].shape[1] for key in ("input_ids", "inputs_embeds") if key in batch)
    out = model.generate(**batch, max_new_tokens=NEW, do_sample=False, eos_token_id=None, **kwargs)
    return out[:, length:] if "input_ids" in batch else out


def labelled(batch):
    labels = batch["input_ids"].clone()
    labels[(labels == 4) | (batch["attention_mask"] == 0)] = -100
    return {**batch, "labels": labels}


# --- Packed rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("short", [False, True])
@pytest.mark.parametrize("method", [None, *ENCODERS, *DECODERS])
def test_packed_rows_give_the_loss_of_the_samples_alone(dense, method, short):
    if short and method not in ENCODERS:
        pytest.skip("our processor writes what the stock one does")
    model = pruned(dense, method)
    settings = {"sparse_method": method, "sparse_budget": 6} if short else {}
    processor = tiny.processor(llava_sparse.SparseLlavaProcessor if short else type(tiny.processor()), **settings)
    samples = [labelled(tiny.inputs(processor, tiny.QUESTIONS[i], seed=5 * i)) for i in (0, 1)]
    for sample in samples:
        sample["labels"][:, 0] = -100
    counts = [int((sample["labels"] != -100).sum()) for sample in samples]
    packed = {
        **{k: torch.cat([s[k] for s in samples], dim=1) for k in ("input_ids", "labels")},
        "pixel_values": torch.cat([s["pixel_values"] for s in samples]),
        "position_ids": torch.cat([torch.arange(s["input_ids"].shape[1]) for s in samples])[None],
        "use_cache": False,
    }
    whole = method in DECODERS or method == "delegate" or getattr(METHODS.get(method), "looks_at_question", False)
    if whole:
        with pytest.raises(ValueError, match="several samples are packed into it"):
            model(**packed)
        return
    alone = sum(float(model(**s).loss) * n for s, n in zip(samples, counts, strict=True)) / sum(counts)
    assert float(model(**packed).loss) == pytest.approx(alone, abs=2e-4)


def test_shifted_positions_are_kept(dense, processor):
    """Attention is relative, so a shift changes nothing; a stretch does, and reaches the decoder."""
    model = pruned(dense, "visionzip")
    batch = tiny.inputs(processor, tiny.QUESTIONS[0])
    positions = torch.arange(batch["input_ids"].shape[1])[None]
    plain = model(**batch).logits
    torch.testing.assert_close(model(**batch, position_ids=positions + 7).logits, plain, rtol=0, atol=2e-4)
    assert (model(**batch, position_ids=positions * 2).logits - plain).abs().max() > 1e-2


# --- Features of the caller's ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, *ENCODERS, *DECODERS])
def test_features_encoded_by_the_caller(dense, processor, method):
    model, batch = pruned(dense, method), tiny.inputs(processor, tiny.QUESTIONS)
    pixels = batch.pop("pixel_values")
    expected = greedy(model, {**batch, "pixel_values": pixels})
    images = model.get_image_features(pixels, return_dict=True)
    torch.testing.assert_close(
        model(**batch, mm_encoder_outputs={"image": images}).logits, model(**batch, pixel_values=pixels).logits
    )
    assert torch.equal(greedy(model, batch, mm_encoder_outputs={"image": images}), expected)
    with pytest.raises(ValueError, match=r"exclude each other|cannot specify both"):
        model(**batch, pixel_values=pixels, mm_encoder_outputs={"image": images})


@pytest.mark.parametrize("method", [*ENCODERS, *DECODERS])
def test_features_of_a_dense_model(dense, processor, method):
    """Methods behind the projector and in the decoder take them; methods in the tower say that they cannot."""
    model, batch = pruned(dense, method), tiny.inputs(processor, tiny.QUESTIONS)
    pixels = batch.pop("pixel_values")
    images = dense.get_image_features(pixels, return_dict=True)
    if METHODS[method].place in ("tower", "layers"):
        with pytest.raises(ValueError, match="works in the vision tower"):
            model(**batch, mm_encoder_outputs={"image": images})
        return
    if method == "random_decoder":
        return  # Of features alone it knows no picture, and draws the same for all.
    expected = model(**batch, pixel_values=pixels).logits
    torch.testing.assert_close(model(**batch, mm_encoder_outputs={"image": images}).logits, expected)
    mask = batch["input_ids"] == 4
    embeds = model.get_input_embeddings()(batch["input_ids"])
    embeds = embeds.masked_scatter(mask[..., None], torch.cat(list(images.pooler_output)))
    merged = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"], "visual_mask": mask}
    torch.testing.assert_close(model(**merged).logits, expected)
    assert torch.equal(greedy(model, merged), greedy(model, {**batch, "pixel_values": pixels}))


@pytest.mark.parametrize("method", ["visionzip", "divprune", "sparsevlm"])
def test_embeddings_that_may_hold_pictures_are_no_silent_dense_pass(dense, processor, method):
    model, batch = pruned(dense, method), tiny.inputs(processor, "USER: No ? ASSISTANT:")
    embeds = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="pass visual_mask"):
        model(inputs_embeds=embeds)
    nothing = torch.zeros(embeds.shape[:2], dtype=torch.bool)
    if method != "visionzip":
        torch.testing.assert_close(model(inputs_embeds=embeds, visual_mask=nothing).logits, dense(**batch).logits)


def test_layers_and_strategies_of_a_call(dense, processor):
    batch = tiny.inputs(processor, tiny.QUESTIONS[0])
    other = {"vision_feature_layer": -3}
    decoder = llava_sparse.sparsify(dense, "fastv", layers=[1], budgets=[16])
    torch.testing.assert_close(decoder(**batch, **other).logits, dense(**batch, **other).logits)
    with pytest.raises(ValueError, match="vision_feature_layer=-3: visionzip takes its own"):
        pruned(dense, "visionzip")(**batch, **other)
    with pytest.raises(ValueError, match="vision_feature_select_strategy='full'"):
        pruned(dense, "divprune")(**batch, vision_feature_select_strategy="full")


# --- Chunks and beams --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, *ENCODERS, *DECODERS])
def test_chunked_prefill(dense, processor, method):
    model, batch = pruned(dense, method), tiny.inputs(processor, tiny.QUESTIONS)
    if method in DECODERS:
        with pytest.raises(ValueError, match=f"prefill_chunk_size: {method} prunes a prompt as a whole"):
            greedy(model, batch, prefill_chunk_size=8)
        return
    expected = greedy(model, batch)
    for size in (1, 8, 500):
        assert torch.equal(greedy(model, batch, prefill_chunk_size=size), expected)


@pytest.mark.parametrize("method", [None, "visionzip", "divprune", "delegate", "sparsevlm"])
def test_each_picture_is_encoded_once(dense, processor, method):
    model = pruned(dense, method)
    encoded = [0]
    model.model.vision_tower.embeddings.register_forward_hook(
        lambda module, args, output: encoded.__setitem__(0, encoded[0] + len(output))
    )
    texts = [*tiny.QUESTIONS, "USER: <image> and <image> ? ASSISTANT:", "USER: No ? ASSISTANT:"]
    batch = tiny.inputs(processor, texts)
    for arguments in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"use_cache": False}):
        encoded[0] = 0
        greedy(model, batch, **arguments)
        assert encoded[0] == 5, arguments


# --- Towers ------------------------------------------------------------------------------------------------------


def other_tower(vision, backbone, **changes):
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision, text_config=tiny.text_config(backbone), image_token_index=4,
        vision_feature_layer=-1, vision_feature_select_strategy="full", **changes,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = 0
    return model


def first_beams(model, batch):
    """The first step of beams sees what a forward pass sees."""
    arguments = {"max_new_tokens": 2, "do_sample": False, "num_beams": 2, "return_dict_in_generate": True}
    out = model.generate(**batch, **arguments, output_logits=True)
    torch.testing.assert_close(out.logits[0][0], model(**batch).logits[0, -1], rtol=0, atol=2e-4)


SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4}


@pytest.mark.parametrize("method", ["sparsevlm", "fastv", "pyramiddrop", "divprune", "cdpruner", "delegate"])
def test_a_tower_without_cls(method):
    """SigLIP: two images are two on every way in."""
    dense = other_tower(SiglipVisionConfig(**SIZES, image_size=56, patch_size=14, initializer_range=0.15), "qwen2")
    model = pruned(dense, method)
    ids = torch.tensor([[1, 5] + [4] * 16 + [10] + [4] * 16 + [11, 12, 6]])
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    out = model(input_ids=ids, pixel_values=pixels, output_selection=True)
    mask = ids == 4
    embeds = model.get_input_embeddings()(ids)
    features = torch.cat(list(dense.get_image_features(pixels).pooler_output))
    merged = model(
        inputs_embeds=embeds.masked_scatter(mask[..., None], features), visual_mask=mask, output_selection=True
    )
    torch.testing.assert_close(merged.logits, out.logits)
    for one, other in zip(out.selection, merged.selection, strict=True):
        assert torch.equal(one.kept, other.kept)
    with pytest.raises(ValueError, match="works in a CLIP vision tower"):
        model.set_sparsity("visionzip", budget=6)


@pytest.mark.parametrize("method", [None, "divprune", "delegate", "sparsevlm"])
def test_pictures_of_several_sizes(method):
    """Pixtral: what is kept of each image is counted in its own tokens; beams keep images with their prompts."""
    vision = PixtralVisionConfig(**SIZES, image_size=112, patch_size=14, initializer_range=0.15)
    dense = other_tower(vision, "mistral")
    model = pruned(dense, method)
    generator = torch.Generator().manual_seed(0)
    sizes = [(4, 4), (2, 6)]
    pixels = torch.zeros(2, 3, 56, 84)
    for image, (rows, columns) in zip(pixels, sizes, strict=True):
        image[:, : rows * 14, : columns * 14] = torch.randn(3, rows * 14, columns * 14, generator=generator)
    ids = torch.tensor([[1, *[4] * 16, 10, *[4] * 12, 10, 11, 12]])
    batch = {"input_ids": ids, "pixel_values": pixels, "image_sizes": torch.tensor(sizes) * 14}
    if method is None:
        torch.testing.assert_close(model(**batch).logits, dense(**batch).logits)
        first_beams(model, batch)
        return
    out = model(**batch, output_selection=True)
    assert out.logits.isfinite().all()
    if method != "sparsevlm":
        assert out.selection[0].kept.shape[1] == 12 and (out.selection[0].kept >= 16).sum() == 6
    single = greedy(model, batch)
    doubled = {k: torch.cat([v, v]) for k, v in batch.items()}
    assert torch.equal(greedy(model, doubled), single.expand(2, -1))
    first_beams(model, batch)


# --- Models made of one another ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [None, "visionzip", "sparsevlm", "delegate"])
def test_what_is_done_to_one_model_does_not_reach_the_other(dense, processor, method):
    batch = labelled(tiny.inputs(processor, tiny.QUESTIONS[0]))
    before, config = dense(**batch), dense.config.to_dict()
    model = pruned(dense, method)
    model.resize_token_embeddings(70)
    model.some_attribute = [1]
    model.model.language_model.layers[0].register_forward_hook(lambda *_: None)
    model.set_attn_implementation("eager")
    assert torch.isfinite(model(**batch).loss)
    model.double()
    assert dense.config.to_dict() == config and dense.get_input_embeddings().weight.shape == (64, 64)
    assert not hasattr(dense, "some_attribute") and not dense.model.language_model.layers[0]._forward_hooks
    after = dense(**batch)
    assert torch.equal(after.loss, before.loss) and torch.equal(after.logits, before.logits)


def test_everything_on_a_model_comes_along(dense):
    dense.quantization_method, dense.my_state = "none", {"a": 1}
    dense.model.language_model.my_state = "b"
    model = pruned(dense, "visionzip")
    assert (model.quantization_method, model.my_state) == ("none", {"a": 1})
    assert model.my_state is not dense.my_state and model.model.language_model.my_state == "b"
    assert model.lm_head.weight.data_ptr() == dense.lm_head.weight.data_ptr()


def test_adapters_come_along(dense, tmp_path):
    peft = pytest.importorskip("peft")
    try:
        dense.add_adapter(peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj", init_lora_weights=False))
    except ValueError:  # This transformers wants a newer peft.
        pytest.skip("peft is too old for this transformers")
    model = pruned(dense, "visionzip")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj"), "b")
    model.set_adapter("b")
    model.delete_adapter("b")
    assert list(dense.peft_config) == ["default"]


@pytest.mark.parametrize("method", [*ENCODERS, *DECODERS])
def test_double_precision(dense, processor, method):
    model = pruned(dense, method).double()
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    logits = model(**{**batch, "pixel_values": batch["pixel_values"].double()}).logits
    assert logits.dtype == torch.float64 and logits.isfinite().all()


@pytest.mark.parametrize("method", ["visionzip", "divprune", "delegate"])
def test_the_loss_is_the_same_through_both_processors(dense, processor, method):
    """Rows padded at the left: what stands behind padding has no predecessor, and does not count."""
    model = pruned(dense, method)
    ours = tiny.processor(llava_sparse.SparseLlavaProcessor, sparse_method=method, sparse_budget=6)
    losses = [float(model(**labelled(tiny.inputs(p, tiny.QUESTIONS))).loss) for p in (processor, ours)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


def test_settings_changed_while_another_thread_generates(dense, processor):
    """Every answer is that of one setting."""
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    settings = [(None, None), ("visionzip", 6), ("divprune", 5), ("sparsevlm", 4), ("delegate", 7)]
    expected = {tuple(greedy(llava_sparse.sparsify(dense, *one), batch).flatten().tolist()) for one in settings}
    model = pruned(dense, None)
    stop, failures = threading.Event(), []

    def switch():
        while not stop.is_set():
            for one in settings:
                model.set_sparsity(*one)
                time.sleep(0.002)

    thread = threading.Thread(target=switch)
    thread.start()
    try:
        for _ in range(25):
            said = tuple(greedy(model, batch).flatten().tolist())
            if said not in expected:
                failures.append(said)
    finally:
        stop.set()
        thread.join()
    assert not failures
