"""Agreement with numbers computed by the authors' own code (`tests/oracles/README.md` describes the files).

Cases are discovered below `tests/oracles` or the folder that `LLAVA_SPARSE_ORACLES` names. They run through the
classes that users load, or, where a file holds a part of a method alone, through that part.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace

import pytest
import torch
from oracle_files import (
    LARGEST,
    OWN,
    ROOT,
    Case,
    Run,
    assert_close,
    cases,
    clip_model,
    metadata,
    near,
    settings,
    timm_tower,
    tiny_vision,
)
from oracle_mini_gemini import GeminiCase
from oracle_next import STEPS, NextCase
from oracle_qwen2_5_vl import QwenCase
from oracle_video_llava import PUBLISHED, VideoCase, lengths
from safetensors.torch import load_file
from torch.nn.functional import layer_norm, linear, normalize
from transformers import LlamaConfig

from llava_sparse import SparseCLIPVisionConfig, SparseCLIPVisionModel, SparseLlavaConfig
from llava_sparse import SparseLlavaForConditionalGeneration as SparseLlava
from llava_sparse.modeling.clip_text import clip_embeddings, clip_relevance, question_parts
from llava_sparse.modeling.method_cdpruner import CDPruner, conditional_dpp, normalised
from llava_sparse.modeling.method_divprune import DivPrune, max_min_tokens
from llava_sparse.modeling.method_scope import Scope, coverage_tokens
from llava_sparse.modeling.method_sparsevlm import (
    SparseVLM,
    attention_rank,
    corrected_heads,
    density_clusters,
    gravity,
    text_raters,
)
from llava_sparse.modeling.method_tome import bipartite_matching, merge, merging_layer
from llava_sparse.modeling.pruning_ops import cosines
from llava_sparse.modeling.pruning_types import Question, RaterAttention, VisionFeatures

SCORED = {
    "visionzip": ["case_*.safetensors"],
    "sparsevlm": ["case_*.safetensors", "rank_*.safetensors"],
    "fastv": ["case_*.safetensors"],
    "pyramiddrop": ["case_*.safetensors"],
    "tome": ["match_*.safetensors", "vit_case_*.safetensors"],
    "divprune": ["select_*.safetensors", "e2e_*.safetensors"],
    "scope": ["select_*.safetensors"],
    "cdpruner": ["select_*.safetensors", "tower_*.safetensors"],
    "llava_next": ["case_*.safetensors"],
    "video_llava": ["case_*.safetensors"],
    "mini_gemini": ["case_*.safetensors"],
    "qwen2_5_vl": ["case_*.safetensors"],
}


@pytest.fixture(scope="module", autouse=True)
def report():
    """`pytest -s tests/test_oracles.py` prints the largest difference of each kind."""
    yield
    for kind, error in sorted(LARGEST.items(), key=lambda item: -item[1])[:5]:
        print(f"\n{error:.1e} of the largest magnitude: {kind}", end="")


def test_there_are_cases():
    """Of every kind in the repository's own folder; another one may hold some of the methods alone."""
    found = [bool(cases(folder, pattern)) for folder, patterns in SCORED.items() for pattern in patterns]
    assert all(found) if ROOT == OWN else any(found)


def _unscored_folders() -> list[str]:
    folders = {path.parent.name for path in ROOT.rglob("*.safetensors")}
    return sorted(folders - set(SCORED))


@pytest.mark.parametrize("folder", _unscored_folders())
def test_methods_to_come(folder):
    pytest.skip(f"{folder} is not implemented yet")


# --- VisionZip ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", cases("visionzip", "case_*.safetensors"))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_visionzip(path, attention):
    info, want = metadata(path), load_file(path)
    dtype = {"float64": torch.float64}.get(info["dtype"].removeprefix("torch."), torch.float32)
    given = load_file(near(path, info["input"]))
    weights = near(path, info["weights"])
    tower = json.loads(weights.with_name(weights.name.replace("_weights.safetensors", "_config.json")).read_text())
    tower.pop("model_type", None)
    dominant, contextual = int(info["dominant"]), int(info["contextual"])
    config = SparseCLIPVisionConfig(**tower, sparse_method="visionzip", sparse_budgets=[dominant, contextual])
    model = SparseCLIPVisionModel._from_config(config, attn_implementation=attention, dtype=dtype)
    model.load_state_dict(load_file(weights))
    pixels = (given["pixel_u8"].to(dtype) - 127.5) / 64
    with torch.no_grad():
        got = model.eval()(pixels, output_selection=True)
    (stage,) = got.selection
    patches = stage.scores.shape[1]

    assert_close(got.last_hidden_state, want["output"], "output")
    assert_close(stage.scores, want["cls_attention_sum"], "cls_attention_sum")
    assert torch.equal(stage.kept + 1, want["dominant_indices_sorted"][:, 1:])
    order = stage.scores.argsort(dim=1, descending=True, stable=True)[:, : dominant - 1] + 1
    assert torch.equal(order, want["all_indices_topk_order"][:, 1:])
    into = stage.merge_map - patches
    merged = want["merge_token_indices"] - 1
    assert torch.equal(into.gather(1, merged), want["merge_assignment"])
    targets = want["contextual_target_token_indices"] - 1
    assert torch.equal(into.gather(1, targets), torch.arange(contextual).expand_as(targets))
    assert (into >= 0).sum() == merged.numel() + targets.numel()
    alone = torch.cat([model(one[None]).last_hidden_state for one in pixels])
    assert_close(alone, want["output"], "one image at a time")


# --- SparseVLM ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoisySparseVLM(SparseVLM):
    """Takes the recorded draws of the density noise."""

    noise: dict = None  # type: ignore[assignment]

    def density_noise(self, layer, x):
        drawn = self.noise[layer]
        assert drawn.shape[-1] == x.shape[1]
        return drawn.to(x.dtype).expand(x.shape[0], -1)


def version(case: Case) -> str:
    major, minor = case.path.stem.split("_")[1].removeprefix("v")
    return f"{major}.{minor}"


def pruning_layers(case: Case) -> list[int]:
    return sorted({int(key[1:].split(".")[0]) for key in case.want if key[0] == "L" and "." in key})


def sparsevlm_model(case: Case, attention: str = "sdpa") -> SparseLlava:
    depth = case.text_config().num_hidden_layers
    sparse: dict = {"sparse_layers": [layer for layer in (2, 6, 15, 19) if layer < depth]}
    if version(case) == "1.0":
        scale, bias = float(case.info["scale"]), float(case.info["bias"])
        sparse["sparse_options"] = {"version": "1.0", "scale": scale, "bias": bias}
    else:
        sparse |= {"sparse_budget": int(case.info["RETAIN_TOKN"]), "sparse_options": {"version": version(case)}}
    model = case.model(attention, sparse_method="sparsevlm", **sparse)
    noise = {layer: case.want[f"L{layer}.noise"] for layer in pruning_layers(case) if f"L{layer}.noise" in case.want}
    if any(draw.any() for draw in noise.values()):
        plain = {f.name: getattr(model.model.sparsifier, f.name) for f in fields(SparseVLM)}
        model.model.sparsifier = NoisySparseVLM(**plain, noise=noise)
    return model


@pytest.mark.parametrize("path", cases("sparsevlm", "case_*.safetensors"))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_sparsevlm(path, attention, batch):
    case = Case.read(path)
    run = Run.prefill(case, sparsevlm_model(case, attention), batch)
    check_stages(case, run.out.selection, run.entered, run.row)
    run.check_prefill()
    run.check_decoding()


def check_stages(case: Case, selection, entered: list[torch.Tensor], row: int) -> None:
    """Compares kept tokens, scores, clusters and sequences of every stage."""
    want = case.want
    numbers = torch.arange(case.visual)
    following = case.visual
    assert [stage.layer for stage in selection] == pruning_layers(case)
    for stage in selection:
        prefix = f"L{stage.layer}."
        kept = stage.kept[row]
        scores = stage.scores[row]
        assert_close(scores, want[prefix + "scores"], prefix + "scores")
        assert torch.equal(kept, numbers[want[prefix + "kept"]]), prefix + "kept"
        clusters = 0
        if prefix + "recycled" in want and len(want[prefix + "recycled"]):
            recycled = numbers[want[prefix + "recycled"]]
            into = stage.merge_map[row]
            assert set(torch.nonzero(into >= 0).flatten().tolist()) == set(recycled.tolist())
            assign = want[prefix + "assign"]
            clusters = int(assign.max()) + 1
            ours = into[recycled] - following
            # Exact ties of two centres may be numbered either way: compare the partition, then the merged rows.
            pairs = set(zip(ours.tolist(), assign.tolist(), strict=True))
            assert len(pairs) == clusters, prefix + "assign"
            renumber = torch.tensor([{b: a for a, b in pairs}[c] for c in range(clusters)])
            after = entered[stage.layer + 1][row]
            start = case.pre + len(kept)
            assert_close(after[start : start + clusters][renumber], want[prefix + "merged"], prefix + "merged")
        if prefix + "hidden_after" in want and clusters <= 1:
            assert_close(entered[stage.layer + 1][row], want[prefix + "hidden_after"], prefix + "hidden_after")
        numbers = torch.cat([kept, torch.arange(following, following + clusters)])
        following += clusters


@pytest.mark.parametrize("path", cases("sparsevlm", "case_*.safetensors"))
def test_sparsevlm_generate(path):
    case = Case.read(path)
    model = sparsevlm_model(case)
    tokens = model.generate(
        inputs_embeds=case.given["inputs_embeds"],
        visual_mask=case.mask(),
        max_new_tokens=6,
        do_sample=False,
        eos_token_id=None,
    )
    assert tokens[0].tolist() == case.want["greedy_tokens"].tolist()


@pytest.mark.parametrize("path", cases("sparsevlm", "case_*.safetensors"))
def test_sparsevlm_parts(path):
    case = Case.read(path)
    want, embeds = case.want, case.given["inputs_embeds"]
    text = embeds[:, case.pre + case.visual :]
    raters, relevance = text_raters(
        embeds[:, case.pre : case.pre + case.visual], text, torch.ones(1, case.text, dtype=torch.bool)
    )
    assert torch.equal(raters[0].nonzero().flatten(), want["raters"])
    assert_close(relevance[0], want["rater_mean_prob"], "rater_mean_prob")
    for layer in pruning_layers(case):
        prefix = f"L{layer}."
        if prefix + "centers" not in want or not len(want[prefix + "merge_input"]):
            continue
        clusters = len(want[prefix + "centers"])
        noise = want[prefix + "noise"][None]
        assign, centres, density, score = density_clusters(want[prefix + "merge_input"][None], clusters, noise)
        assert_close(density[0], want[prefix + "density"], prefix + "density")
        assert_close(score[0], want[prefix + "center_scores"], prefix + "center_scores")
        tied = clusters == 1 or (clusters == 2 and not noise.any())
        if not tied:
            assert torch.equal(centres[0], want[prefix + "centers"])
            assert torch.equal(assign[0], want[prefix + "assign"])
        elif clusters == 2:
            assert set(centres[0].tolist()) == set(want[prefix + "centers"].tolist())


@pytest.mark.parametrize("path", cases("sparsevlm", "case_v20_*.safetensors"))
@torch.no_grad()
def test_sparsevlm_gravity_and_heads(path, monkeypatch):
    case = Case.read(path)
    model = sparsevlm_model(case)
    seen: list[RaterAttention] = []
    scores = SparseVLM.scores
    monkeypatch.setattr(
        SparseVLM, "scores", lambda self, attention: (seen.append(attention), scores(self, attention))[1]
    )
    model(inputs_embeds=case.given["inputs_embeds"], visual_mask=case.mask())
    for layer, attention in zip(pruning_layers(case), seen, strict=True):
        raters = case.want["raters"]
        assert_close(gravity(attention)[0][raters], case.want[f"L{layer}.gravity"], f"L{layer}.gravity")
        heads = corrected_heads(attention)[1][0]
        assert set(heads.tolist()) == set(case.want[f"L{layer}.selected_heads"].tolist())


@pytest.mark.parametrize("path", cases("sparsevlm", "rank_*.safetensors"))
def test_sparsevlm_rank(path):
    info, want = metadata(path), load_file(path)
    counts = {key: int(value) for key, value in info.items() if value.isdigit()}
    pre = next(counts[key] for key in ("pre_prompt_length", "pre", "P") if key in counts)
    visual = next(counts[key] for key in ("image_tokens", "visual", "V0") if key in counts)
    block = want["attention"][:, :, pre + visual :, pre : pre + visual]
    raters = torch.zeros(1, block.shape[2], dtype=torch.bool)
    raters[0, want["raters"]] = True
    attention = RaterAttention(
        probabilities=block,
        raters=raters,
        rater_positions=(pre + visual + torch.arange(block.shape[2]))[None],
        visual_positions=(pre + torch.arange(visual))[None],
        rotary=lambda positions: (positions, positions),
    )
    assert attention_rank(attention).tolist() == want["rank"].tolist()
    for index, setting in enumerate(json.loads(info["settings"])):
        scale, bias = (setting["scale"], setting["bias"]) if isinstance(setting, dict) else setting[:2]
        method = SparseVLM((2,), (), version="1.0", scale=scale, bias=bias)
        scores = method.scores(attention)
        mask = want[f"s{index}.mask"]
        assert_close(scores, want[f"s{index}.scores"], f"s{index}.scores")
        (count,) = method.counts(0, 1, attention)
        kept = torch.zeros_like(mask)
        kept[0, scores[0].argsort(descending=True, stable=True)[:count]] = True
        assert torch.equal(kept, mask)


# --- FastV -------------------------------------------------------------------------------------------------------


def check_stage(case: Case, stage, numbers: torch.Tensor, prefix: str, row: int) -> torch.Tensor:
    """Compares scores and choice of a stage that just drops; returns what is kept of the visual tokens `numbers`."""
    kept = numbers[case.want[prefix + "kept"]]
    assert_close(stage.scores[row], case.want[prefix + "scores"], prefix + "scores")
    assert torch.equal(stage.kept[row], kept), prefix + "kept"
    return kept


@pytest.mark.parametrize("path", cases("fastv", "case_*.safetensors"))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_fastv(path, attention, batch):
    case = Case.read(path)
    first, kept = int(case.info["K"]), int(case.info["kept_tokens"])
    model = case.model(attention, sparse_method="fastv", sparse_layers=[first - 1], sparse_budgets=[kept])
    run = Run.prefill(case, model, batch)
    (stage,) = run.out.selection
    assert stage.layer == first - 1
    check_stage(case, stage, torch.arange(case.visual), "", run.row)
    assert_close(run.entered[first][run.row], case.want["hidden_after_drop"], "hidden_after_drop")
    # Positions are those before the drop, which are columns of the input.
    assert torch.equal(run.out.columns[run.row], case.want["position_ids_after"])
    run.check_prefill()
    # Masking in place of dropping, as the authors also have it, comes to the same.
    assert_close(run.out.logits[run.row, -1], case.want["mask_variant_logits_last"], "mask_variant_logits_last")
    run.check_decoding()


# --- PyramidDrop -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", cases("pyramiddrop", "case_*.safetensors"))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_pyramiddrop(path, attention, batch):
    case = Case.read(path)
    layers = json.loads(case.info["layer_list"])
    budgets = [int(case.visual * ratio) for ratio in json.loads(case.info["image_token_ratio_list"])]
    model = case.model(attention, sparse_method="pyramiddrop", sparse_layers=layers, sparse_budgets=budgets)
    run = Run.prefill(case, model, batch)
    # The record counts the layer whose output was reduced, the authors the one that comes next.
    assert [stage.layer + 1 for stage in run.out.selection] == layers
    kept = torch.arange(case.visual)
    for index, (stage, layer) in enumerate(zip(run.out.selection, layers, strict=True)):
        kept = check_stage(case, stage, kept, f"S{index}.", run.row)
        entered = run.entered[layer][run.row]
        assert_close(entered, case.want[f"S{index}.hidden_after_drop"], f"S{index}.hidden_after_drop")
    run.check_prefill()
    run.check_decoding()


# --- ToMe --------------------------------------------------------------------------------------------------------


def expected_places(want: dict, prefix: str, length: int, distilled: bool) -> torch.Tensor:
    """The token of the output that each of `length` tokens goes into: unmerged even ones, then the odd ones."""
    unmerged, source, target = (want[prefix + name] for name in ("unm", "src", "dst"))
    odd = torch.arange(length // 2).expand(len(unmerged), -1)
    left = torch.arange(unmerged.shape[1]).expand_as(unmerged)
    behind = unmerged.shape[1] + odd
    if distilled:  # The first of the odd ones, the distillation token, comes second.
        left = left + (left > 0)
        behind = torch.where(odd == 0, 1, behind)
    places = torch.full((len(unmerged), length), -1)
    places = places.scatter(1, 2 * odd + 1, behind).scatter(1, unmerged, left)
    return places.scatter(1, source, places.gather(1, target))


@pytest.mark.parametrize("path", cases("tome", "match_*.safetensors"))
def test_tome_matching(path):
    info, want = metadata(path), load_file(path)
    distilled = info["distill_token"] == "True"
    protected = (info["class_token"] == "True") + distilled
    x = want["x"]
    size = torch.ones(x.shape[:2])
    for step, r in enumerate(json.loads(info["r"])):
        prefix, length = f"s{step}.", x.shape[1]
        removed = min(r, (length - protected) // 2)
        assert want[prefix + "effective_r"].item() == removed
        places, count = bipartite_matching(want[prefix + "metric"], removed, protected)
        assert count == length - removed
        assert torch.equal(places, expected_places(want, prefix, length, distilled)), prefix + "places"
        x, size = merge(x, size, places, count)
        assert_close(x, want[prefix + "x"], prefix + "x")
        assert torch.equal(size, want[prefix + "size"]), prefix + "size"
        if step == 0 and not distilled:  # The authors' own way back mistakes the order of a distillation token.
            back = x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
            assert_close(back, want["s0.unmerged"], "s0.unmerged")


@pytest.mark.parametrize("path", cases("tome", "vit_case_*.safetensors"))
@torch.no_grad()
def test_tome_layers(path):
    """Layer by layer, CLS included."""
    info, want = metadata(path), load_file(path)
    weights = load_file(near(path, info["weights"]))
    model = timm_tower(near(path, info["weights"]))
    x, size, source = want["embeddings"], None, torch.arange(want["source"].shape[1]).expand_as(want["source"])
    for index, (r, after) in enumerate(zip(want["r_list"].tolist(), want["tokens_after"].tolist(), strict=True)):
        prefix, length = f"L{index}.", x.shape[1]
        removed = max(0, min(r, (length - 1) // 2))
        layer = model.encoder.layers[index]
        x, size, places = merging_layer(layer, x, size, removed, 1, info["prop_attn"] == "True")
        assert x.shape[1] == after
        assert_close(x, want[prefix + "out"], prefix + "out")
        assert (places is None) == (prefix + "src" not in want)
        if places is not None:
            assert torch.equal(places, expected_places(want, prefix, length, False)), prefix + "places"
            source = places.gather(1, source)
        assert (size is None) == (prefix + "size" not in want)
        assert size is None or torch.equal(size, want[prefix + "size"]), prefix + "size"
    assert torch.equal(source, want["source"])
    eps = float(metadata(near(path, info["weights"]))["layer_norm_eps"])
    x = layer_norm(x, x.shape[-1:], weights["norm.weight"], weights["norm.bias"], eps)
    assert_close(x, want["final_norm"], "final_norm")
    assert_close(linear(x[:, 0], weights["head.weight"], weights["head.bias"]), want["logits"], "logits")


@pytest.mark.parametrize("path", cases("tome", "vit_case_*.safetensors"))
@torch.no_grad()
def test_tome_tower(path):
    """From pixels to what a projector is given, and the record of it."""
    info, want = metadata(path), load_file(path)
    after = want["tokens_after"].tolist()
    model = timm_tower(
        near(path, info["weights"]),
        sparse_method="tome",
        sparse_layers=list(range(len(after))),
        sparse_budgets=[tokens - 1 for tokens in after],
        sparse_options={"proportional": info["prop_attn"] == "True"},
    )
    entered: list[torch.Tensor] = []
    for layer in model.encoder.layers:
        layer.layer_norm1.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
    pixels = (load_file(near(path, info["input"]))["pixel_u8"].float() - 127.5) / 64
    got = model(pixels, output_selection=True)
    (stage,) = got.selection

    assert len(entered) == len(after)
    assert_close(entered[0], want["embeddings"], "embeddings")
    for index, x in enumerate(entered[1:]):
        assert_close(x, want[f"L{index}.out"], f"L{index}.out")
    last = f"L{len(after) - 1}."
    assert_close(got.last_hidden_state, want[last + "out"][:, 1:], last + "out")
    source = want["source"][:, 1:] - 1
    own = torch.arange(source.shape[1])
    assert torch.equal(got.tokens.patch_index.gather(1, source), torch.where(stage.merge_map < 0, own, stage.merge_map))
    size = want.get(last + "size", torch.ones(want[last + "out"].shape[:2]))[:, 1:]
    assert torch.equal(stage.scores, 1 / size.gather(1, source))
    assert torch.equal((stage.merge_map < 0).sum(1), (size == 1).sum(1))


# --- DivPrune ----------------------------------------------------------------------------------------------------


def images(features: torch.Tensor, **known: torch.Tensor) -> VisionFeatures:
    """Features `(images, patches, channels)` as a tower's output."""
    return VisionFeatures(features, (1, features.shape[1]), **known)


def assert_kept(reduced, features: torch.Tensor, kept: torch.Tensor, what: str) -> None:
    """The features of the images, unchanged, and which they are."""
    assert torch.equal(reduced.patch_index, kept), what
    assert torch.equal(reduced.features, features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))), what


@pytest.mark.parametrize("path", cases("divprune", "select_*.safetensors"))
def test_divprune_selection(path):
    want = load_file(path)
    features = want["features"][None]
    similarity = cosines(features)
    assert similarity.dtype == features.dtype
    nearest = (1 - similarity[0]).fill_diagonal_(torch.inf).amin(0)
    assert_close(nearest, want["first_scores"], "first_scores")
    for prefix in settings(want, "selected"):
        selected, kept = want[prefix + "selected"], want[prefix + "kept"]
        order, distance = max_min_tokens(similarity, len(selected))
        assert torch.equal(order[0], selected), prefix + "selected"
        assert_close(distance[0], want[prefix + "step_distance"], prefix + "step_distance")
        reduced = DivPrune((-2,), (len(kept),)).reduce(images(features, projected=features))
        assert_kept(reduced, features, kept[None], prefix + "kept")


@pytest.mark.parametrize("path", cases("divprune", "e2e_*.safetensors"))
@torch.no_grad()
def test_divprune_model(path):
    """What the language model of a LLaVA is given, by ratio, where the tower sees these features."""
    info, want = metadata(path), load_file(path)
    patches, width = want["features"].shape
    words = len(want["embed_tokens"])
    text = LlamaConfig(
        vocab_size=words + 1,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=8,
    )
    config = SparseLlavaConfig(
        text_config=text,
        vision_config=tiny_vision(width, math.isqrt(patches)),
        image_token_index=words,
        sparse_method="divprune",
        sparse_budget=float(info["ratio"]),
    )
    model = SparseLlava._from_config(config).eval()
    model.get_input_embeddings().weight[:words] = want["embed_tokens"]
    tower = torch.nn.functional.pad(want["features"][None], (0, 0, 1, 0))
    model.model.vision_tower.encoder.layers[-2].register_forward_hook(lambda *_: tower)
    model.model.multi_modal_projector = torch.nn.Identity()
    given: dict = {}
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: given.update(kwargs), with_kwargs=True
    )
    repeats = torch.where(want["input_ids"] < 0, patches, 1)
    ids = want["input_ids"].repeat_interleave(repeats)[None]
    ids = torch.where(ids < 0, words, ids)
    pixels = torch.zeros(1, 3, config.vision_config.image_size, config.vision_config.image_size)
    got = model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, output_selection=True)

    assert torch.equal(got.selection[0].kept[0], want["kept"])
    assert torch.equal(given["inputs_embeds"][0], want["inputs_embeds"])
    # An ordinary prompt: nothing is masked, and positions are contiguous.
    mask, positions = given["attention_mask"], given["position_ids"]
    assert want["attention_mask"].all() and (mask is None or mask.all())
    assert positions is None or torch.equal(positions[0], torch.arange(len(want["inputs_embeds"])))


# --- SCOPE -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", cases("scope", "select_*.safetensors"))
def test_scope_selection(path):
    info, want = metadata(path), load_file(path)
    alpha, combined, margins = float(info["alpha"]), info["combined"], json.loads(info["margins"])
    features = want["features"]
    saliency = want.get("cls_attention_sum", torch.ones(features.shape[:2]))
    tower = images(features, saliency=saliency[:, None])
    for prefix in settings(want, "selected"):
        selected, kept = want[prefix + "selected"], want[prefix + "kept"]
        count = selected.shape[1]
        order, gains = coverage_tokens(cosines(features), saliency, count, alpha, combined)
        assert_close(gains, want[prefix + "gains"], prefix + "gains")
        if margins[str(count)] < 1e-5:  # Without saliency, rounding decides between tokens that cover each other.
            continue
        assert torch.equal(order, selected), prefix + "selected"
        reduced = Scope((-2,), (count,), alpha=alpha, combined=combined).reduce(tower)
        assert_kept(reduced, features, kept, prefix + "kept")
        assert torch.equal(reduced.scores, saliency)


# --- CDPruner ----------------------------------------------------------------------------------------------------


def negated(image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """Mean over texts `(M, E)` of -cos to `(images, N, E)`."""
    return -(normalize(image, dim=-1) @ normalize(text, dim=-1).T).mean(-1)


@pytest.mark.parametrize("path", cases("cdpruner", "select_*.safetensors"))
def test_cdpruner_selection(path):
    want = load_file(path)
    q = want["relevance"]
    kernel = q[:, :, None] * cosines(want["features"]) * q[:, None]
    for prefix in settings(want, "order"):
        order, gains = conditional_dpp(kernel, want[prefix + "order"].shape[1])
        assert torch.equal(order, want[prefix + "order"]), prefix + "order"
        assert torch.equal(order.sort(dim=1).values, want[prefix + "kept"]), prefix + "kept"
        assert_close(gains, want[prefix + "gains"], prefix + "gains")


@pytest.mark.parametrize("path", cases("cdpruner", "select_*.safetensors"))
def test_cdpruner_relevance(path, monkeypatch):
    want = load_file(path)
    relevance = negated(want["image_embeds"], want["text_embeds"])
    ours = normalised(relevance)
    low, high = relevance.min(), relevance.max()
    # The authors' extremes are those of the batch.
    assert_close((relevance - low + 1e-6) / (high - low), want["relevance"], "relevance")
    assert torch.equal(ours, torch.cat([normalised(image[None]) for image in relevance]))
    if len(relevance) > 1:
        return
    assert_close(ours, want["relevance"], "relevance")
    monkeypatch.setattr(CDPruner, "relevance", lambda self, vision: relevance)
    features = want["features"]
    for prefix in settings(want, "order"):
        kept = want[prefix + "kept"]
        reduced = CDPruner((-2,), (kept.shape[1],)).reduce(images(features, projected=features))
        assert_kept(reduced, features, kept, prefix + "kept")


@pytest.mark.parametrize("path", cases("cdpruner", "tower_*.safetensors"))
@torch.no_grad()
def test_cdpruner_clip(path, tmp_path):
    """Features from the tower of a LLaVA, relevance from the CLIP that it is a part of."""
    want = load_file(path)
    weights = near(path, metadata(path).get("weights", "clip_full_weights"))
    clip = clip_model(weights)
    clip.save_pretrained(tmp_path)
    vision = clip.config.vision_config.to_dict()
    vision.pop("model_type")
    tower = SparseCLIPVisionModel._from_config(SparseCLIPVisionConfig(**vision)).eval()
    tower.load_state_dict(clip.vision_model.state_dict())
    pruner = CDPruner((-2,), (1,), clip=str(tmp_path))
    seen = tower((want["pixel_u8"].float() - 127.5) / 64, sparsifier=pruner).vision
    assert_close(seen.features[0], want["image_features"], "image_features")

    ids = want["token_ids"][None]
    parts, mask, there = question_parts(ids, clip.config.text_config.max_position_embeddings)
    assert torch.equal(parts[0], want["text_input_ids"])
    assert torch.equal(mask[0].long(), want["text_attention_mask"])
    assert there.all()
    image, text = clip_embeddings(clip, want["image_features"][None], ids)
    assert_close(image[0], want["image_embeds"], "image_embeds")
    assert_close(text[0], want["text_embeds"], "text_embeds")

    expected = negated(want["image_embeds"][None], want["text_embeds"])
    assert_close(clip_relevance(str(tmp_path), want["image_features"][None], ids), expected, "relevance")
    question = Question(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool), ids)
    reduced = pruner.reduce(replace(seen, projected=seen.features, question=question))
    assert_close(reduced.scores, expected, "relevance")


# --- LLaVA-NeXT --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", cases("llava_next", "case_*.safetensors"))
@torch.no_grad()
def test_llava_next(path):
    """From pixels to generated tokens, with the placeholders of a stock processor and with ours."""
    case = NextCase.read(path)
    for i in case.pictures:
        stock, short = (case.prompts([i], written) for written in (case.dense, case.kept))
        pictures = case.model.get_image_features(stock.pop("pixel_values"), stock["image_sizes"], return_dict=True)
        out = case.model(**stock, mm_encoder_outputs={"image": pictures}, output_selection=True)
        kept = case.numbers(i)
        assert [stage.kept[0].tolist() for stage in out.selection] == ([] if kept is None else [kept.tolist()])
        assert_close(pictures.pooler_output[0], case.want[f"i{i}.features"], f"i{i}.features")
        assert [x.keys.shape[-2] for x in out.past_key_values.layers] == case.want[f"i{i}.kv_len"].tolist()
        if not case.known(i):
            continue
        said = case.generate(short)
        for logits in (out.logits[0, -1], said.logits[0][0]):
            assert_close(logits, case.want[f"i{i}.logits_last"], f"i{i}.logits_last")
        assert said.sequences[0, -STEPS:].tolist() == case.want[f"i{i}.greedy_tokens"].tolist()
        assert_close(said.logits[-1][0], case.want[f"i{i}.decode_logits_last"], f"i{i}.decode_logits_last")
    if "batch_logits_last" not in case.want:
        return
    said = case.generate(case.prompts(case.pictures, case.dense))
    assert_close(said.logits[0], case.want["batch_logits_last"], "batch_logits_last")
    for i in case.pictures:
        assert said.sequences[i, -STEPS:].tolist() == case.want[f"i{i}.greedy_tokens"].tolist()
    short = case.prompts(case.pictures, case.kept)
    assert torch.equal(short["attention_mask"].bool(), case.want["batch_mask"].bool())
    assert_close(case.model(**short).logits[:, -1], case.want["batch_logits_last"], "batch_logits_last")


# --- Video-LLaVA -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", cases("video_llava", "case_*.safetensors"))
@torch.no_grad()
def test_video_llava_dense(path):
    case = VideoCase(path, "sdpa")
    assert_close(case.model(**case.inputs()).logits[0], case.want["dense_logits"], "dense_logits")


@pytest.mark.parametrize("path", cases("video_llava", "case_*.safetensors"))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_video_llava(path, attention):
    """From pixels to decoding; then a batch in which the prompt is padded."""
    case = VideoCase(path, attention, **PUBLISHED)
    want, rotated = case.want, []
    case.model.model.language_model.rotary_emb.register_forward_hook(
        lambda module, args, kwargs, output: rotated.append(kwargs["position_ids"][0]), with_kwargs=True
    )
    asked = {"output_selection": True, "output_hidden_states": True, "as_passed": False}
    out = case.model(**case.inputs(), use_cache=True, **asked)
    case.check_selection(out.selection)
    case.check_prefill(out)
    assert torch.equal(rotated[0], want["position_ids_layer0"])
    assert torch.equal(rotated[-1], want["position_ids_last"])
    token = out.logits[0, -1].argmax()
    for step, expected in enumerate(want["decode_logits"]):
        assert token == want["greedy_tokens"][step]
        out = case.model(input_ids=token[None, None], past_key_values=out.past_key_values, use_cache=True)
        assert_close(out.logits[0, 0], expected, f"decode_logits, step {step}")
        assert lengths(out) == want["kv_len_decode"][step].tolist()
        token = out.logits[0, 0].argmax()
    batch = case.model(**case.inputs(rows=2), as_passed=False)
    assert_close(batch.logits[0, -len(want["logits"]) :], want["logits"], "logits of a padded row")


@pytest.mark.parametrize("path", cases("video_llava", "case_*.safetensors"))
def test_video_llava_generate(path):
    case = VideoCase(path, "sdpa", **PUBLISHED)
    for rows in (1, 2):
        inputs = case.inputs(rows)
        new = case.model.generate(**inputs, max_new_tokens=len(case.want["official_generate"]), do_sample=False)
        assert torch.equal(new[0, inputs["input_ids"].shape[1] :], case.want["official_generate"])


# --- Mini-Gemini -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", cases("mini_gemini", "case_*.safetensors"))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_mini_gemini(path, attention):
    """The dense model, from a checkpoint with published key names."""
    GeminiCase(path, attention).check()


# --- Qwen2.5-VL --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", cases("qwen2_5_vl", "case_*.safetensors"))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_qwen2_5_vl(path, attention):
    """From pixels to decoding; then a batch in which the prompt is padded."""
    case = QwenCase(path, attention)
    want, model = case.want, case.model
    outputs, scores, keys = model.model.visual.with_received(case.pixels, want["image_grid_thw"])
    assert_close(outputs.pooler_output, want["features"], "features")
    assert_close(scores, want["scores"], "scores")
    assert_close(keys.mean(0), want["metric"], "metric")

    out = model(**case.inputs(), output_selection=True, use_cache=True, as_passed=False)
    (stage,) = out.selection
    assert_close(stage.scores[0], want["scores"], "scores")
    assert torch.equal(stage.kept[0], want["dominant"])
    first, visual = int((case.ids == model.config.image_token_id).int().argmax()), len(want["scores"])
    kept = out.columns[0] - first
    kept = kept[(kept >= 0) & (kept < visual)]
    assert torch.equal(kept, torch.cat([want["dominant"], want["targets"]]).sort().values)
    assert torch.equal(stage.merge_map[0][want["targets"]] - visual, torch.arange(len(want["targets"])))
    assert_close(case.entered["inputs_embeds"][0], want["decoder_embeds"], "decoder_embeds")
    assert torch.equal(case.entered["position_ids"][-3:, 0], want["position_ids"])
    assert_close(out.logits[0], want["logits"], "logits")
    assert lengths(out) == want["kv_len"].tolist()

    token = out.logits[0, -1].argmax()
    for step, expected in enumerate(want["decode_logits"]):
        assert token == want["greedy_tokens"][step]
        out = model(input_ids=token[None, None], past_key_values=out.past_key_values, use_cache=True)
        assert (case.entered["position_ids"] == case.ids.shape[1] + step + want["rope_deltas"]).all()
        assert_close(out.logits[0, 0], expected, f"decode_logits, step {step}")
        token = out.logits[0, 0].argmax()
    assert token == want["greedy_tokens"][-1]
    batch = model(**case.inputs(rows=2), as_passed=False)
    assert_close(batch.logits[0, -len(want["logits"]) :], want["logits"], "logits of a padded row")


@pytest.mark.parametrize("path", cases("qwen2_5_vl", "case_*.safetensors"))
def test_qwen2_5_vl_generate(path):
    case = QwenCase(path, "sdpa")
    for rows in (1, 2):
        inputs, count = case.inputs(rows), len(case.want["greedy_tokens"])
        out = case.model.generate(
            **inputs, max_new_tokens=count, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        assert torch.equal(out.sequences[0, -count:], case.want["greedy_tokens"])
        assert_close(torch.stack([x[0] for x in out.logits[1:]]), case.want["decode_logits"], "decode_logits")
