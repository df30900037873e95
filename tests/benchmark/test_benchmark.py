"""The benchmark: what it counts is right, what it times is there, and a run that was stopped goes on."""

from __future__ import annotations

import json
import re

import pytest
import tiny
import torch
from matplotlib.figure import Figure
from rich.console import Console
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import llava_sparse
from llava_sparse.benchmark import bench, load_results, make_inputs, plot, profile, stage_table, table
from llava_sparse.benchmark.floor import floors
from llava_sparse.benchmark.flops import decoder_flops, measured_flops, prefill_flops
from llava_sparse.benchmark.timing import Clock, interleaved, spread, stages

BUDGET = re.escape(
    "`sparse_budget` must be an int in [1, 576], the visual tokens of one image, or a float in (0, 1], a ratio of them"
)
SPARSEVLM = "sparsevlm:layers=[0,2]:budgets=[6,3]"
QUICK = {"methods": ["visionzip", SPARSEVLM], "budgets": [5], "rounds": 2, "new_tokens": 3, "text_tokens": [9]}


@pytest.fixture(scope="module")
def results():
    return bench(tiny.dense_model(), batch_sizes=[1, 2], **QUICK)


def test_an_entry_for_every_run_and_place(results):
    names = ["dense", "visionzip@5", SPARSEVLM]
    assert results["settings"]["runs"] == names
    assert [entry["run"] for entry in results["results"]] == names * 2
    assert [entry["place"]["batch_size"] for entry in results["results"]] == [1] * 3 + [2] * 3
    for entry in results["results"]:
        for measure in ("prefill", "decode", "generate"):
            seconds = entry["seconds"][measure]
            assert len(seconds["values"]) == 2
            assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
        assert set(entry["stages"]) == {"vision tower", "projector", "decoder", "selection"}
        assert (entry["stages"]["selection"] > 0) == (entry["run"] != "dense")
        assert sum(entry["stages"].values()) < 20 * entry["seconds"]["prefill"]["high"]
        stages = {**entry["floor"]}
        assert stages.pop("selection") >= 0
        assert min(stages.values()) > 0
        assert entry["floor"]["prefill"] >= entry["floor"]["decoder"]


def test_speed_up_is_against_dense_of_the_same_round(results):
    dense, pruned = results["results"][:2]
    ratios = [
        a / b for a, b in zip(*(e["seconds"]["prefill"]["values"] for e in (dense, pruned)), strict=True)
    ]  # fmt: skip
    assert pruned["speedup"]["prefill"]["values"] == ratios
    assert dense["speedup"]["prefill"]["median"] == 1


def test_cache_is_counted_from_its_tensors(results):
    dense, zipped, sparse = results["results"][3:]
    token = 2 * 2 * 2 * 16 * 4  # rows, keys and values, heads, channels, bytes
    for entry, lengths in ((dense, [25] * 6), (zipped, [14] * 6)):
        assert entry["lengths"] == lengths
        assert entry["kv_bytes"] == sum(lengths) * token
    # Of 16 visual tokens 6 stay, and of the other 10, 3 are merged into 1; then 3 of 7, and 1 merged of 4.
    assert sparse["lengths"] == [25, 16, 16, 13, 13, 13]
    assert zipped["kv_visual_share"] == pytest.approx(5 / 16)
    assert sparse["kv_visual_share"] == pytest.approx((16 + 2 * 7 + 3 * 4) / 96)
    assert sparse["kv_bytes"] == sum(sparse["lengths"]) * token
    # Behind the layers: 7, 7, 4, 4, 4, 4.
    for entry, entering, mean in ((dense, 16, 16), (zipped, 5, 5), (sparse, 16, 5)):
        assert entry["visual_tokens"] == {"entering": entering, "layers": mean, "samples": mean}


def test_dense_arithmetic_by_hand(results):
    """Every product of matrices that the tiny model makes, written out."""
    n, d, m, h = 25, 64, 128, 32
    layer = 2 * n * d * (64 + h + h + 64) + 2 * (2 * n * n * 64) + 3 * (2 * n * d * m)
    tower = 2 * 16 * 588 * 64 + 6 * (4 * 2 * 17 * 64 * 64 + 4 * 17 * 17 * 64 + 2 * 2 * 17 * 64 * 128)
    projector = 2 * 16 * (64 * 64 + 64 * 64)
    dense = results["results"][0]
    assert sum(dense["flops_by_formula"].values()) == 6 * layer + 2 * d * 64 + tower + projector
    assert dense["flops"] == pytest.approx(sum(dense["flops_by_formula"].values()), rel=1e-3)
    pairs = 6 * 2 * 2 * (n * (n - 1) // 2) * 64  # Two products of a query with what stands behind it.
    assert dense["flops_causal"] == sum(dense["flops_by_formula"].values()) - pairs
    zipped = results["results"][1]
    assert zipped["limit"] == dense["flops_causal"] / zipped["flops_causal"] > 1


def test_the_papers_formula_is_ours_for_a_plain_multilayer_perceptron():
    """Equation 12 counts multiply-adds and two matrices of the perceptron: ours less one matrix, halved."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, vocab_size=8)
    n, d, m = 616, 4096, 11008
    ours = decoder_flops(config, [n]) - 2 * d * 8 - 2 * n * d * m
    assert ours / 2 == 4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m


@pytest.fixture(scope="module")
def wide():
    """Few layers of a width at which what a method does is as small a share as in a real model."""
    config = LlavaConfig(
        text_config=LlamaConfig(
            hidden_size=512, intermediate_size=1408, num_hidden_layers=6, num_attention_heads=8,
            num_key_value_heads=4, vocab_size=64,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, image_size=168,
            patch_size=14,
        ),
        image_token_index=60,
    )  # fmt: skip
    return LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("visionzip", {"budget": 20}),
        ("sparsevlm", {"layers": [1, 3], "budgets": [60, 20]}),
        ("sparsevlm", {"layers": [1, 3], "budgets": [60, 20], "options": {"version": "2.0"}}),
        ("random", {"budget": 20}),
        ("cdpruner", {"budget": 20}),
        ("divprune", {"budget": 20}),
        ("fastv", {"layers": [1], "budgets": [20]}),
        ("pyramiddrop", {"layers": [2, 4], "budgets": [60, 20]}),
        ("scope", {"budget": 20}),
        ("tome", {"budget": 20}),
        ("tome+divprune", {"budget": 20}),
        (
            "tome+divprune+sparsevlm",
            {"budget": [80, 60, None], "budgets": [None, None, [40, 20]], "layers": [None, None, [1, 3]]},
        ),
        ("divprune+sparsevlm", {"budgets": [[80], [60, 20]], "layers": [None, [1, 3]]}),
        ("random_decoder", {"layers": [1], "budgets": [20]}),
    ],
)
def test_formula_and_count_agree(wide, method, settings):
    model = llava_sparse.sparsify(wide, method, **settings)
    inputs = make_inputs(model, 1, 20)
    with torch.no_grad():
        lengths = [x.keys.shape[2] for x in model(**inputs, use_cache=True).past_key_values.layers]
        counted = measured_flops(lambda: model(**inputs, logits_to_keep=1))
    formula = sum(prefill_flops(model, inputs, lengths).values())
    assert counted == pytest.approx(formula, rel=0.02)


def test_stages_take_the_selection_out(dense):
    model = llava_sparse.sparsify(dense, "visionzip", budget=5)
    inputs = make_inputs(model, 1, 9)
    with stages(model, Clock(torch.device("cpu"))) as told:
        model(**inputs)
        first, second = told(), told()
    assert min(first.values()) > 0
    assert set(second.values()) == {0}
    assert not model.model.vision_tower._forward_hooks


def test_the_callers_model_stays_as_it_was(dense):
    """A pruned model is measured as the dense one that it was made of, and keeps method and backend."""
    pruned = llava_sparse.sparsify(dense, "visionzip", budget=5)
    pruned.set_attn_implementation("eager")
    found = bench(pruned, **{**QUICK, "rounds": 1, "warm_up": 0})
    assert found["results"][0]["lengths"] == [25] * 6
    assert pruned.config.sparse_method == "visionzip"
    assert pruned.config._attn_implementation == "eager"
    assert pruned.model.language_model._compiled_call_impl is None


@pytest.mark.parametrize("token", [0, 4, 63])
def test_prompts_hold_one_picture(dense, token):
    dense.config.image_token_id = token
    ids = make_inputs(dense, 3, 400)["input_ids"]
    assert ((ids == token).sum(1) == 16).all()
    assert ids.min() >= 0 and ids.max() < 64


def test_floors_are_the_longer_of_arithmetic_and_traffic():
    model = tiny.dense_model()
    entry = {"place": {"batch_size": 2}, "kv_bytes": 1000}
    entry["flops_by_formula"] = {"vision tower": 5.0, "projector": 1.0, "selection": 2.0, "decoder": 3.0}
    slow = floors(model, entry, {"flops": 10.0, "bandwidth": 1e30})
    assert slow["prefill"] == pytest.approx(2.2)
    assert (slow["vision tower"], slow["selection"]) == (pytest.approx(1.0), pytest.approx(0.4))
    decoder = 4 * sum(p.numel() for part in (model.model.language_model, model.lm_head) for p in part.parameters())
    assert slow["decode"] == pytest.approx(2 * 2 * decoder / 4 / 10)
    narrow = floors(model, entry, {"flops": 1e30, "bandwidth": 100.0})
    assert narrow["decode"] == pytest.approx((decoder + 1000) / 100)
    assert narrow["prefill"] == pytest.approx(4 * sum(p.numel() for p in model.parameters()) / 100)


def test_rounds_go_around():
    order = []
    calls = {name: lambda name=name: order.append(name) or float(len(order)) for name in "ab"}
    assert interleaved(calls, rounds=2, warm_up=1) == {"a": [3, 5], "b": [4, 6]}
    assert order == list("ababab")


def test_spread():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "values": [3.0, 1.0, 2.0]}
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0])["high"] == 4.0


def test_goes_on_where_it_was(tmp_path):
    output = tmp_path / "bench.json"
    first = bench(tiny.dense_model(), batch_sizes=[1], output=output, **QUICK)
    both = bench(tiny.dense_model(), batch_sizes=[1, 2], output=output, **QUICK)
    assert json.loads(output.read_text()) == both == load_results(output)
    assert both["results"][:3] == first["results"]
    assert len(both["results"]) == 6
    with pytest.raises(ValueError, match=r"was begun with rounds=2, now it is 3"):
        bench(tiny.dense_model(), output=output, **{**QUICK, "rounds": 3})
    output.write_text("[]")
    with pytest.raises(ValueError, match="no results of llava-sparse bench"):
        bench(tiny.dense_model(), output=output, **QUICK)
    assert output.read_text() == "[]"


@pytest.mark.slow
def test_compiled(monkeypatch):
    """All parts of all models are compiled; a graph that breaks is an error."""
    calls = []
    stock = torch.compile

    def eager(*args, **settings):
        calls.append(settings.pop("fullgraph"))
        return stock(*args, **{**settings, "backend": "eager", "mode": None}, fullgraph=True)

    monkeypatch.setattr(torch, "compile", eager)
    torch._dynamo.reset()
    found = bench(tiny.dense_model(), compiled=True, **{**QUICK, "rounds": 1, "warm_up": 0})
    assert found["settings"]["compiled"]
    assert calls.count(True) == len(calls) == 3 * (2 + 1)
    assert [entry["run"] for entry in found["results"]] == found["settings"]["runs"]


@pytest.mark.parametrize("dense_fits", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_out_of_memory_is_an_entry(monkeypatch, dense_fits):
    from llava_sparse.benchmark.run import Subject

    counts = Subject.counts

    def fails(self):
        if (getattr(self.model.model, "sparsifier", None) is None) != dense_fits:
            raise torch.OutOfMemoryError("no memory")
        return counts(self)

    monkeypatch.setattr(Subject, "counts", fails)
    found = bench(tiny.dense_model(), **QUICK)
    errors = [entry.get("error") for entry in found["results"]]
    assert errors == ([None, "out of memory", "out of memory"] if dense_fits else ["out of memory", None, None])
    console = Console(width=300, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(found))
    console.print(stage_table(found))
    assert "out of memory" in console.export_text()
    assert isinstance(plot(found), Figure)
    assert ("speedup" in found["results"][-1]) is False


@pytest.mark.slow
@pytest.mark.parametrize("full", [None, "visionzip"])
def test_a_run_that_stops_fitting_leaves_the_others(monkeypatch, full):
    """The dense one, too: what was compared with it before stays."""
    from llava_sparse.benchmark.run import Subject

    generate = Subject._generate

    def fails(self, count):
        if getattr(getattr(self.model.model, "sparsifier", None), "name", None) == full:
            raise torch.OutOfMemoryError("no memory")
        return generate(self, count)

    monkeypatch.setattr(Subject, "_generate", fails)
    found = bench(tiny.dense_model(), **QUICK)
    errors = [None, "out of memory", None] if full else ["out of memory", None, None]
    assert [entry.get("error") for entry in found["results"]] == errors
    left = {"prefill", "decode", "generate"} if full else {"prefill", "decode"}
    assert set(found["results"][2]["speedup"]) == left
    assert table(found).row_count == stage_table(found).row_count + 1 == 3


@pytest.mark.slow
def test_goes_on_with_the_threads_that_it_was_begun_with(tmp_path):
    output = tmp_path / "bench.json"
    bench(tiny.dense_model(), batch_sizes=[1], output=output, **QUICK)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = bench(tiny.dense_model(), batch_sizes=[1, 2], output=output, **QUICK)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert found["environment"]["threads"] == before
    assert len(found["results"]) == 6


def test_table_and_figure(results):
    console = Console(width=300, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table(results))
    text = console.export_text()
    assert text.count("visionzip@5") == text.count("5 / 5 / 5") == 2 and text.count("16 / 16 / 16") == 2
    assert "31 %" in text
    console.print(stage_table(results))
    rows = [line for line in console.export_text().splitlines() if "visionzip@5" in line]
    assert len(rows) == 2
    for row, entry in zip(rows, results["results"][1::3], strict=True):
        assert f"{1000 * entry['stages']['decoder']:.2f} (" in row
    assert isinstance(plot(results), Figure)


def test_profile(tmp_path):
    tables = profile(tiny.dense_model(), methods=["visionzip"], budgets=[5], text_tokens=9, folder=tmp_path / "traces")
    assert list(tables) == ["dense", "visionzip@5"]
    assert all("aten::" in text for text in tables.values())
    for name in tables:
        assert json.loads((tmp_path / "traces" / f"{name}.trace.json").read_text())["traceEvents"]


@pytest.mark.slow
def test_budgets_that_are_ratios(tmp_path):
    output = tmp_path / "bench.json"
    quick = {**QUICK, "methods": ["visionzip"], "budgets": [0.3125, 5], "rounds": 1, "warm_up": 0, "output": output}
    found = bench(tiny.dense_model(), **quick)
    _, ratio, count = found["results"]
    assert (ratio["run"], count["run"]) == ("visionzip@0.3125", "visionzip@5")
    assert ratio["lengths"] == count["lengths"] == [14] * 6
    assert bench(tiny.dense_model(), **quick) == load_results(output) == found
    assert table(found).row_count == stage_table(found).row_count == 3
    (shown,) = plot(found).axes[0].get_lines()
    assert shown.get_xdata().tolist() == [5, 5, 16]
    folder = tmp_path / "traces"
    tables = profile(tiny.dense_model(), methods=["visionzip"], budgets=[0.3125], text_tokens=9, folder=folder)
    assert list(tables) == ["dense", "visionzip@0.3125"]
    assert (folder / "visionzip@0.3125.trace.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": "smal"}, r"shape 'smal' \(did you mean 'small'\?\)"),
        ({"shape": "small", "model": "x"}, "model, shape: one of them"),
        ({"methods": ["visionzp"]}, r"did you mean 'visionzip'\?"),
        ({"batch_sizes": [0]}, r"batch_sizes=\[0\]: whole numbers from 1 on"),
        ({"text_tokens": [1]}, r"text_tokens=\[1\]: whole numbers from 2 on"),
        ({"rounds": 0}, r"rounds=\[0\]"),
        ({"budgets": [577]}, f"{BUDGET}, got 577\\."),
        ({"budgets": [64, 1.5]}, f"{BUDGET}, got 1\\.5"),
        ({"attn_implementations": ["flsh"]}, "flsh"),
    ],
)
def test_bad_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench(**arguments)


def test_output_folder_is_checked_first(tmp_path):
    with pytest.raises(OSError, match="cannot be written"):
        bench("no-such-model", output=tmp_path / "missing" / "bench.json")
