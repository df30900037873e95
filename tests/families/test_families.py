"""What every family of models has to do, crossed over methods (`tests/family_cases.py` holds the table)."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from family_calls import LOGITS, NEW, batch_of, last, placeholders, pruned, settings, singles, tokens
from family_cases import FAMILIES, FAST, Family
from hub_folder import load_without_the_package
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import is_torchvision_available

import llava_sparse
from llava_sparse.families import FAMILIES as KNOWN
from llava_sparse.modeling.configuration_sparse_llava import build_method
from llava_sparse.modeling.pruning_registry import METHODS, is_built_in, method_classes
from llava_sparse.modeling.pruning_settings import Sparsity


def cell(family: Family, method: str):
    slow = family.slow or method not in FAST
    return pytest.param(family, method, id=f"{family}-{method}", marks=[pytest.mark.slow] if slow else [])


CELLS = [cell(family, method) for family in FAMILIES for method in family.methods]
FEW = [one for one in CELLS if one.values[1] in FAST]
crossed = pytest.mark.parametrize(("family", "method"), CELLS)
sampled = pytest.mark.parametrize(("family", "method"), FEW)
each = pytest.mark.parametrize("family", FAMILIES, ids=str)


# --- Batches -----------------------------------------------------------------------------------------------------


@crossed
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_batch_equals_its_prompts_alone(family, method, attention):
    """Of different lengths, with two pictures, one and none, padded on the left."""
    model = pruned(family, method)
    model.set_attn_implementation(attention)
    batch = batch_of(family)
    assert (batch["attention_mask"] == 0).any()
    logits, said = last(model, batch), tokens(model, batch)
    for row, single in enumerate(singles(family)):
        torch.testing.assert_close(logits[row], last(model, single)[0], **LOGITS)
        assert said[row].tolist() == tokens(model, single)[0].tolist()


@crossed
def test_both_attention_backends_agree(family, method):
    model, batch, found = pruned(family, method), batch_of(family), []
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        found.append(last(model, batch))
    torch.testing.assert_close(*found, **LOGITS)


@crossed
def test_both_processors_give_the_same(family, method):
    if not family.shortens:
        pytest.skip("our processor writes what the stock one does")
    model, stock, ours = pruned(family, method), batch_of(family), batch_of(family, **settings(family, method))
    shorter = method_classes(method)[0].kind == "encoder"
    assert (ours["input_ids"].shape[1] < stock["input_ids"].shape[1]) == shorter
    torch.testing.assert_close(last(model, ours), last(model, stock), **LOGITS)
    assert torch.equal(tokens(model, ours), tokens(model, stock))


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("cdpruner", "random_decoder")]


@pytest.mark.parametrize("method", ["divprune", "sparsevlm", *SLOW])
@pytest.mark.parametrize("family", [family for family in FAMILIES if "<video>" in " ".join(family.texts)], ids=str)
def test_videos_of_different_lengths_in_a_list(family, method):
    """Among pictures, and prompts without either; what stands for a video is what its frames are when alone."""
    model, texts = pruned(family, method), [f"<video> {text}" for text in family.texts[1:3]]
    rows = [batch_of(family, [text], seed) for seed, text in enumerate(texts)]
    videos = [torch.randn(n, *rows[0]["pixel_values_videos"].shape[2:], generator=torch.manual_seed(n)) for n in (2, 5)]
    token, ids = model.config.video_token_id, []
    for row, video in zip(rows, videos, strict=True):
        one = row["input_ids"][0].tolist()
        count = one.count(token)
        more = model.get_video_features(video[None], return_dict=True).dense[0]
        ids.append([i for i in one if i != token])
        ids[-1][1:1] = [token] * more
        row |= {"input_ids": torch.tensor(ids[-1:]), "pixel_values_videos": [video]}
        row["attention_mask"] = torch.ones_like(row["input_ids"])
        assert count and more != count
    most = max(map(len, ids))
    padded = torch.tensor([[0] * (most - len(one)) + one for one in ids])
    batch = {**batch_of(family, texts), "input_ids": padded, "attention_mask": (padded != 0).long()}
    batch["pixel_values_videos"] = videos
    logits = last(model, batch)
    for row, single in enumerate(rows):
        pictures = {k: v for k, v in single.items() if k in ("input_ids", "attention_mask", "pixel_values_videos")}
        if row:
            pictures |= {k: v for k, v in batch.items() if k not in pictures}
        torch.testing.assert_close(logits[row], last(model, pictures)[0], **LOGITS)
    assert tokens(model, batch, num_beams=2).shape == (2, NEW)


@crossed
def test_a_prompt_without_pictures_is_dense(family, method):
    texts = [text for text in family.texts if "<" not in text]
    batch = batch_of(family, texts)
    torch.testing.assert_close(last(pruned(family, method), batch), last(family.make(), batch), rtol=0, atol=0)


# --- Generation --------------------------------------------------------------------------------------------------


@crossed
def test_beams_equal_prompts_alone(family, method):
    model = pruned(family, method)
    beams = tokens(model, batch_of(family), num_beams=2)
    for row, single in enumerate(singles(family)):
        assert beams[row].tolist() == tokens(model, single, num_beams=2)[0].tolist()


@sampled
def test_several_sequences_of_a_prompt(family, method):
    model, batch = pruned(family, method), batch_of(family)
    several = tokens(model, batch, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(several, tokens(model, batch).repeat_interleave(2, dim=0))


@sampled
def test_features_encoded_by_the_caller(family, method):
    model, batch = pruned(family, method), batch_of(family)
    sources = {source: name for name, (source, _) in model.model.modalities.items() if source in batch}
    encoded, rest = {}, {k: v for k, v in batch.items() if k not in sources}
    for source, name in sources.items():
        own = {k: v for k, v in rest.items() if k in model.model.visual_arguments}
        encoded[name] = getattr(model, f"get_{name}_features")(batch[source], **own, return_dict=True)
    torch.testing.assert_close(last(model, {**rest, "mm_encoder_outputs": encoded}), last(model, batch), **LOGITS)


# --- Budgets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "method"), [cell(family, method) for family in FAMILIES for method in family.dense_at_all]
)
def test_a_ratio_of_one_is_dense(family, method):
    dense, batch = family.make(), batch_of(family)
    model = llava_sparse.sparsify(dense, method, 1.0)
    torch.testing.assert_close(last(model, batch), last(dense, batch), **LOGITS)


@crossed
def test_what_enters_the_decoder_is_the_budget(family, method):
    """At most, of each picture and video; and the record knows it."""
    model, single = pruned(family, method), singles(family)[-1]
    with torch.no_grad():
        out = model(**single, output_selection=True)
    lengths = [layer.keys.shape[-2] for layer in out.past_key_values.layers]
    marks = [model.model.placeholders(single["input_ids"], None, name) for name in model.model.modalities]
    text, items = int((~torch.stack(marks).any(0)).sum()), len(re.findall("<image>|<video>", family.texts[-1]))
    if method_classes(method)[-1].kind == "encoder":
        assert len(set(lengths)) == 1 and 0 < lengths[0] - text <= items * family.budget
    else:
        assert lengths[-1] < lengths[0] and lengths == sorted(lengths, reverse=True)
    assert out.visual_tokens[0, :-1].tolist() == [length - text for length in lengths]
    assert len(out.selection) >= 1
    for stage in out.selection:
        kept = stage.kept[0].tolist()
        assert kept == sorted(set(kept))
        if stage.raters is None:
            assert not kept or kept[-1] < stage.scores.shape[1]


@each
def test_refused_methods_say_so(family):
    for method, words in family.refused.items():
        with pytest.raises(ValueError, match=words):
            llava_sparse.sparsify(family.make(), method, family.budget)


@pytest.mark.slow
@each
def test_the_table_of_the_docs_is_true(family):
    """Which methods are refused where."""
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    head, _, *rows = rows[:13]
    column = head.index(KNOWN[family.name].title)
    told = {name: row[column] for row in rows for name in re.findall("`([a-z_]+)`", row[0])}
    assert set(told) == {name for name in METHODS if is_built_in(METHODS[name])}
    config = pruned(family, "divprune").config
    for name, cell_text in told.items():
        try:
            build_method(config, Sparsity(name, family.budget))
            refused = False
        except ValueError:
            refused = True
        assert cell_text.startswith("refused") == refused, name


# --- Training and precision --------------------------------------------------------------------------------------


def labelled(model, batch) -> dict:
    labels = batch["input_ids"].clone()
    for name in model.model.modalities:
        labels[model.model.placeholders(batch["input_ids"], None, name)] = -100
    return {**batch, "labels": labels.masked_fill(batch["attention_mask"] == 0, -100)}


@crossed
@torch.no_grad()
def test_answers_do_not_choose_the_tokens_that_predict_them(family, method):
    """A pass with answers as labels has the logits of the generation that gave them; so has one without a cache."""
    model, batch = pruned(family, method), batch_of(family)
    kwargs = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    kwargs["suppress_tokens"] = placeholders(model)
    said = model.generate(**batch, **kwargs, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(model.generate(**batch, **kwargs, use_cache=False), said.sequences)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, NEW), value=1)
    labels = torch.nn.functional.pad(said.sequences[:, -NEW:], (batch["input_ids"].shape[1], 0), value=-100)
    scored = model(**{**batch, "input_ids": said.sequences, "attention_mask": mask}, labels=labels)
    assert scored.logits.shape[:2] == labels.shape
    torch.testing.assert_close(scored.logits[:, -NEW - 1 : -1], torch.stack(said.logits, dim=1), **LOGITS)


@sampled
def test_labels_and_gradients(family, method):
    model, batch = llava_sparse.sparsify(family.make(), method, family.budget), batch_of(family)
    loss = model(**labelled(model, batch)).loss
    loss.backward()
    towers = [part for name, part in model.model.named_children() if "tower" in name or name == "visual"]
    for part in (model.model.language_model.layers[0], *towers, model.lm_head):
        grads = [p.grad for p in part.parameters() if p.grad is not None]
        assert grads and all(g.isfinite().all() for g in grads) and any(g.abs().sum() > 0 for g in grads)
    if family.shortens:
        ours = batch_of(family, **settings(family, method))
        assert float(model(**labelled(model, ours)).loss.detach()) == pytest.approx(float(loss.detach()), abs=2e-5)


@each
def test_a_trainer_sees_what_a_model_takes(family):
    """Trainer leaves out columns of data sets that the signature of `forward` does not name."""
    model = pruned(family, "divprune")
    seen = set(inspect.signature(model.forward).parameters)
    given = set(batch_of(family)) | set(model.model.visual_arguments) | {"labels", "prompt_length"}
    stock = set(inspect.signature(family.make().forward).parameters) - {"use_cache"}
    assert given | stock <= seen


@crossed
def test_bfloat16_runs(family, method):
    model = llava_sparse.sparsify(family.make(), method, family.budget).to(torch.bfloat16)
    batch = {k: v.bfloat16() if v.is_floating_point() else v for k, v in batch_of(family).items()}
    assert last(model, batch).isfinite().all()
    assert tokens(model, batch).shape == (len(family.texts), NEW)


# --- Loading -----------------------------------------------------------------------------------------------------


@each
def test_loading_saving_and_switching(family, tmp_path):
    folder = family.save(tmp_path / "stock")
    sparse = settings(family, "divprune")
    model, told = AutoModelForImageTextToText.from_pretrained(folder, **sparse, output_loading_info=True)
    assert not told["missing_keys"] and not told["unexpected_keys"]
    plain, batch = AutoModelForImageTextToText.from_pretrained(folder), batch_of(family)
    assert plain.config.model_type.removeprefix("sparse_") == family.name and plain.config.sparse_method is None
    expected = last(model.eval(), batch)
    assert torch.equal(expected, last(pruned(family, "divprune"), batch))

    model.save_pretrained(tmp_path / "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved").sparse_budget == family.budget
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert torch.equal(last(again.eval(), batch), expected)

    if family.saves_processor:
        processor = KNOWN[family.name].sparse("Processor").from_pretrained(folder, **sparse)
        processor.save_pretrained(tmp_path / "saved")
        own = AutoProcessor.from_pretrained(tmp_path / "saved")
        assert type(own) is type(processor) and own.sparse_method == "divprune"

    again.set_sparsity("fastv", family.budget)
    assert not torch.equal(last(again, batch), expected)
    again.set_sparsity(None)
    assert torch.equal(last(again, batch), last(plain.eval(), batch))


@pytest.mark.parametrize("name", [name for name in KNOWN if "video" in name or "onevision" in name or "qwen" in name])
def test_video_processors_without_torchvision_say_what_is_missing(name):
    if is_torchvision_available():
        pytest.skip("torchvision is installed")
    stock = tiny.processor()
    with pytest.raises(ImportError, match="pip install torchvision"):
        KNOWN[name].sparse("Processor")(image_processor=stock.image_processor, tokenizer=stock.tokenizer)


@pytest.mark.slow
@each
def test_hub_folders_load_without_the_package(family, tmp_path):
    model = pruned(family, "divprune")
    sparse = settings(family, "divprune")
    processor = family.processor(**sparse)
    saved = processor if family.saves_processor else SimpleNamespace(save_pretrained=lambda folder: None)
    llava_sparse.hub.save_to_hub_folder(model, saved, tmp_path)
    batch = batch_of(family, **sparse)
    got = load_without_the_package(tmp_path, batch, family.saves_processor)
    expected = model.generate(**batch, max_new_tokens=4, do_sample=False).tolist()
    assert got["tokens"] == [expected, expected] and got["method"] == "divprune"
    assert got["processor"] == type(processor if family.saves_processor else None).__name__
