"""Agreement with numbers computed by the authors' own code (`tests/oracles/README.md` describes the files).

Cases are discovered below `tests/oracles` or the folder that `LLAVA_SPARSE_ORACLES` names. They run through the
classes that users load.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, LlamaConfig

from llava_sparse import SparseCLIPVisionConfig, SparseCLIPVisionModel, SparseLlavaConfig
from llava_sparse import SparseLlavaForConditionalGeneration as SparseLlava
from llava_sparse.modeling.sparsevlm import (
    SparseVLM,
    attention_rank,
    corrected_heads,
    density_clusters,
    gravity,
    text_raters,
)
from llava_sparse.modeling.sparsifier import RaterAttention

ROOT = Path(os.environ.get("LLAVA_SPARSE_ORACLES") or Path(__file__).parent / "oracles")
SCORED = ("visionzip", "sparsevlm")
FLOAT_TOLERANCE = 1e-4  # of the largest magnitude of the tensor


def cases(folder: str, pattern: str) -> list:
    found = sorted(ROOT.rglob(pattern))
    return [pytest.param(path, id=path.stem) for path in found if path.parent.name == folder]


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def near(path: Path, name: str) -> Path:
    """A file that a case names, with or without its ending; cases may lie apart from what they share."""
    stem = name.removesuffix(".safetensors")
    for folder in (path.parent, Path(__file__).parent / "oracles" / path.parent.name):
        if (folder / f"{stem}.safetensors").exists():
            return folder / f"{stem}.safetensors"
    raise FileNotFoundError(f"{path.name} names {name}, which is not beside it")


LARGEST: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def report():
    """`pytest -s tests/test_oracles.py` prints the largest difference of each kind."""
    yield
    for kind, error in sorted(LARGEST.items(), key=lambda item: -item[1])[:5]:
        print(f"\n{error:.1e} of the largest magnitude: {kind}", end="")


def assert_close(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} != {tuple(expected.shape)}"
    largest = expected.abs().max().clamp(min=1e-12)
    error = ((actual.double() - expected.double()).abs().max() / largest).item()
    kind = what.split(".")[-1].split(" after")[0].split(",")[0]
    LARGEST[kind] = max(LARGEST.get(kind, 0.0), error)
    assert error <= FLOAT_TOLERANCE, f"{what}: off by {error:.2e} of the largest magnitude"


def test_there_are_cases():
    assert cases("visionzip", "case_*.safetensors") + cases("sparsevlm", "case_*.safetensors")


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


@dataclass
class Case:
    want: dict
    info: dict
    given: dict
    pre: int
    visual: int
    text: int
    version: str

    @classmethod
    def read(cls, path: Path) -> Case:
        info = metadata(path)
        version = path.stem.split("_")[1].replace("v", "")
        return cls(
            want=load_file(path),
            info=info,
            given=load_file(near(path, info["input"])),
            pre=int(info["pre_prompt_length"]),
            visual=int(info["image_tokens"]),
            text=int(info["text_tokens"]),
            version=f"{version[0]}.{version[1]}",
        )

    @property
    def stages(self) -> list[int]:
        return sorted({int(key[1:].split(".")[0]) for key in self.want if key[0] == "L" and "." in key})

    def mask(self) -> torch.Tensor:
        mask = torch.zeros(1, self.pre + self.visual + self.text, dtype=torch.bool)
        mask[:, self.pre : self.pre + self.visual] = True
        return mask


def build(path: Path, case: Case, attention: str = "sdpa") -> SparseLlava:
    weights = near(path, case.info["weights"])
    text = json.loads((weights.parent / "llama_config.json").read_text())
    text["rope_theta"] = float(case.info["rope_theta"])
    text.pop("model_type")
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    sparse: dict = {"sparse_layers": [layer for layer in (2, 6, 15, 19) if layer < text["num_hidden_layers"]]}
    if case.version == "1.0":
        scale, bias = float(case.info["scale"]), float(case.info["bias"])
        sparse["sparse_options"] = {"version": "1.0", "scale": scale, "bias": bias}
    else:
        sparse |= {"sparse_budget": int(case.info["RETAIN_TOKN"]), "sparse_options": {"version": case.version}}
    config = SparseLlavaConfig(
        text_config=LlamaConfig(**text),
        vision_config=vision,
        image_token_index=127,
        sparse_method="sparsevlm",
        **sparse,
    )
    model = SparseLlava._from_config(config, attn_implementation=attention)
    loaded = load_file(weights)
    model.model.language_model.load_state_dict(
        {k.removeprefix("model."): v for k, v in loaded.items() if k.startswith("model.")}
    )
    model.lm_head.load_state_dict({"weight": loaded["lm_head.weight"]})
    noise = {layer: case.want[f"L{layer}.noise"] for layer in case.stages if f"L{layer}.noise" in case.want}
    if any(draw.any() for draw in noise.values()):
        plain = {f.name: getattr(model.model.sparsifier, f.name) for f in fields(SparseVLM)}
        model.model.sparsifier = NoisySparseVLM(**plain, noise=noise)
    return model.eval()


def layer_inputs(model: SparseLlava) -> tuple[list[torch.Tensor], list]:
    """Hooks that collect what enters every decoder layer."""
    entered: list[torch.Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
        for layer in model.model.language_model.layers
    ]
    return entered, handles


def cache_lengths(cache) -> list[int]:
    return [layer.keys.shape[-2] for layer in cache.layers]


@pytest.mark.parametrize("path", cases("sparsevlm", "case_*.safetensors"))
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_sparsevlm(path, attention, batch):
    case = Case.read(path)
    want = case.want
    model = build(path, case, attention)
    entered, handles = layer_inputs(model)
    embeds, mask = case.given["inputs_embeds"].expand(batch, -1, -1), case.mask().expand(batch, -1)
    got = model(
        inputs_embeds=embeds, visual_mask=mask, use_cache=True, output_hidden_states=True, output_selection=True
    )
    for handle in handles:
        handle.remove()
    cache = got.past_key_values
    entered.append(got.hidden_states[-1])

    assert [x.shape[1] for x in entered[:-1]] == want["layer_in_len"].tolist()
    assert cache_lengths(cache) == want["kv_len_prefill"].tolist()
    row = batch - 1
    check_stages(case, got.selection, entered, row)
    last = len(entered) - 2
    for layer in range(last):
        assert_close(entered[layer + 1][row, -1], want["last_token_hidden"][layer], f"last token after layer {layer}")
        assert_close(entered[layer + 1][row].mean(0), want["mean_hidden"][layer], f"mean after layer {layer}")
    assert_close(entered[-1][row], want["final_hidden"], "final_hidden")
    assert_close(got.logits[row, -1], want["logits_last"], "logits_last")

    for step, token in enumerate(case.given["decode_embeds"]):
        out = model(
            inputs_embeds=token.expand(batch, 1, -1), past_key_values=cache, use_cache=True, output_hidden_states=True
        )
        assert_close(out.hidden_states[-1][row, 0], want["decode_hidden"][step], f"decode_hidden {step}")
        for layer in range(last):
            hidden = out.hidden_states[layer + 1][row, 0]
            assert_close(hidden, want["decode_layer_hidden"][step, layer], f"decode step {step}, layer {layer}")
        assert_close(out.logits[row, 0], want["decode_logits"][step], f"decode_logits {step}")
        assert cache_lengths(cache) == want["kv_len_decode"][step].tolist()


def check_stages(case: Case, selection, entered: list[torch.Tensor], row: int) -> None:
    """Compares kept tokens, scores, clusters and sequences of every stage."""
    want = case.want
    numbers = torch.arange(case.visual)
    following = case.visual
    assert [stage.layer for stage in selection] == case.stages
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
    model = build(path, case)
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
    for layer in case.stages:
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
    model = build(path, case)
    seen: list[RaterAttention] = []
    scores = SparseVLM.scores
    monkeypatch.setattr(
        SparseVLM, "scores", lambda self, attention: (seen.append(attention), scores(self, attention))[1]
    )
    model(inputs_embeds=case.given["inputs_embeds"], visual_mask=case.mask())
    for layer, attention in zip(case.stages, seen, strict=True):
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
