"""Settings of every method and of compositions: what they stand for, in model and processor, and what is refused."""

from __future__ import annotations

import json
import math
import re
from functools import lru_cache

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

import llava_sparse
from llava_sparse import SparseLlavaConfig, SparseLlavaProcessor
from llava_sparse.modeling.configuration_sparse_llava import build_sparsifier
from llava_sparse.modeling.method_fastv import FastV, tokens_behind
from llava_sparse.modeling.method_pyramiddrop import PyramidDrop, pyramid
from llava_sparse.modeling.pruning_registry import METHODS
from llava_sparse.modeling.pruning_settings import Sparsity, check_budget, option_defaults
from llava_sparse.modeling.pruning_types import Geometry

QUICK = settings(max_examples=50, deadline=None)
NAMES = llava_sparse.list_methods()
ENCODERS = [name for name in NAMES if METHODS[name].kind == "encoder"]
DECODERS = [name for name in NAMES if METHODS[name].kind == "decoder"]
MERGING = {"pool", "tome", "visionzip"}
# A method of each place; the others in the slow tests.
PLACES = ("visionzip", "tome", "divprune", "sparsevlm")


def by_place(names):
    return [pytest.param(name, marks=[] if name in PLACES else [pytest.mark.slow]) for name in names]


TWO = "USER: <image> <image> What red car on the left ? ASSISTANT:"
MIXED = [tiny.QUESTIONS[0], TWO, "USER: Is there a dog ? ASSISTANT:", tiny.QUESTIONS[2]]


@lru_cache(maxsize=1)
def pruned():
    """A tiny model whose method the tests switch."""
    return llava_sparse.sparsify(tiny.dense_model(), None)


def run(method: str, batch: dict, **given):
    model = pruned()
    model.set_sparsity(method, **given)
    with torch.no_grad():
        return model(**batch, output_selection=True, use_cache=True)


def mean_over_layers(counts: dict[int, float], patches: int, depth: int) -> float:
    """Tokens of a layer in the mean, where `counts` are left from each of its layers on."""
    held, total = float(patches), 0.0
    for layer in range(depth):
        held = counts.get(layer, held)
        total += held
    return total / depth


@QUICK
@given(budget=st.integers(1, 576), patches=st.integers(1, 600), whole=st.integers(1, 40), depth=st.integers(1, 40))
def test_fastv_tokens(budget, patches, whole, depth):
    """Presets and layers by hand have the budget as their mean over the layers, within what rounding costs."""
    budget, whole = min(budget, patches), min(whole, depth)
    geometry = Geometry(patches, 24, depth)
    if whole < depth:
        kept = tokens_behind(budget, patches, whole, depth)
        assert mean_over_layers({whole: kept}, patches, depth) == pytest.approx(budget)
    if (whole < depth and round(kept) >= 1) or budget == patches:
        method = FastV.resolve(geometry, Sparsity("fastv", budget, [whole - 1]))
        assert abs(mean_over_layers({whole: method.budgets[0]}, patches, depth) - budget) <= 0.5
    else:
        with pytest.raises(ValueError, match=f"`sparse_budget`={budget}: .* mean over the layers"):
            FastV.resolve(geometry, Sparsity("fastv", budget, [whole - 1]))
    (kept,) = FastV.resolve(Geometry(patches, 24, 32), Sparsity("fastv", budget)).budgets
    smallest = patches / 9
    if budget >= smallest:
        assert abs(mean_over_layers({2: kept}, patches, 32) - budget) <= 0.5
    else:
        exact = (smallest * 32 - patches * 2) / 30 * budget / smallest
        assert kept == 1 or abs(kept - exact) <= 0.5
    shallow = FastV.resolve(Geometry(patches, 24, min(depth, 32)), Sparsity("fastv", budget))
    assert shallow.budgets == (kept,)


@QUICK
@given(budget=st.integers(1, 576), patches=st.sampled_from([576, 256, 144, 16, 5]), depth=st.integers(2, 40))
def test_pyramiddrop_tokens(budget, patches, depth):
    budget = min(budget, patches)
    scaled = budget * 576 / patches
    first, shares = pyramid(max(64, scaled))
    counts = {first * (i + 1): share * 576 for i, share in enumerate(shares)}
    assert mean_over_layers(counts, 576, 32) == pytest.approx(max(64, scaled), rel=1e-9)
    assert shares[1:] == pytest.approx([shares[0] ** 2, shares[0] ** 3])
    whole = [layer for layer in range(1, 9) if layer * 576 * 5 <= 3 * max(64, scaled) * 32 + 1e-6]
    assert first == max([1, *whole])
    deep = PyramidDrop.resolve(Geometry(patches, 24, 32), Sparsity("pyramiddrop", budget))
    assert deep.layers == (first, 2 * first, 3 * first)
    if scaled >= 64:
        tokens = dict(zip(deep.layers, deep.budgets, strict=True))
        assert abs(mean_over_layers(tokens, patches, 32) - budget) <= 0.5
    else:
        expected = [max(1, math.floor(share * scaled / 64 * patches + 0.5)) for share in shares]
        assert list(deep.budgets) == expected
    own = PyramidDrop.resolve(Geometry(patches, 24, depth), Sparsity("pyramiddrop", budget))
    assert list(own.layers) == sorted(set(own.layers)) and own.layers[0] >= 1 and own.layers[-1] < depth
    assert own.budgets == deep.budgets[-len(own.layers) :]
    assert list(own.budgets) == sorted(own.budgets, reverse=True)


def test_pyramiddrop_published():
    assert [pyramid(budget)[0] for budget in (1, 64, 128, 192, 209, 210, 240, 576)] == [1, 2, 4, 6, 6, 7, 8, 8]
    first, shares = pyramid((8 * (1 + 0.5 + 0.25 + 0.125)) / 32 * 576)
    assert first == 8 and shares == pytest.approx((0.5, 0.25, 0.125))
    with pytest.raises(
        ValueError, match="`sparse_method`='pyramiddrop' acts ahead of any layer but the first: one is not enough"
    ):
        PyramidDrop.resolve(Geometry(576, 24, 1), Sparsity("pyramiddrop", 64))


@QUICK
@given(ratio=st.floats(0, 1, exclude_min=True), patches=st.integers(1, 1000))
def test_a_ratio_is_one_of_the_patches(ratio, patches):
    got = check_budget(ratio, patches)
    assert got == max(1, round(ratio * patches)) and isinstance(got, int) and 1 <= got <= patches
    for wrong in (-ratio, 0.0, math.nextafter(1.0, 2), math.nan, math.inf, 0, patches + 1, True, str(ratio)):
        allowed = rf"`sparse_budget` must be an int in \[1, {patches}\], .* or a float in \(0, 1\], a ratio .*, got "
        with pytest.raises(ValueError, match=allowed + re.escape(repr(wrong))):
            check_budget(wrong, patches)


@pytest.mark.parametrize("name", ENCODERS)
def test_who_looks_at_the_question(processor, name):
    """The same pictures, other questions: only a method that says so keeps other tokens."""
    batches = [tiny.inputs(processor, [f"USER: <image> {asked} ? ASSISTANT:"] * 3) for asked in ("No", "two red dog")]
    kept = [run(name, batch, budget=5).selection[0].kept for batch in batches]
    assert torch.equal(*kept) != METHODS[name].looks_at_question
    features = pruned().get_image_features(batches[0]["pixel_values"])
    if METHODS[name].looks_at_question:
        # Nothing is chosen yet: all patches, and what the choice needs besides the question.
        assert features.tokens is None and features.vision is not None
        assert [len(image) for image in features.pooler_output] == [tiny.PATCHES] * 3
    else:
        assert features.vision is None and [len(image) for image in features.pooler_output] == [5] * 3
        stages = [tokens.selection(4) for tokens in features.tokens]
        alone = [stage.kept[0].tolist() for stage in stages]
        # -1 is padding.
        assert alone == [[n for n in row if n >= 0] for row in kept[0].tolist()]
    for batch, expected in zip(batches, kept, strict=True):
        batch = {key: value for key, value in batch.items() if key != "pixel_values"}
        got = pruned()(**batch, mm_encoder_outputs={"image": features}, output_selection=True)
        assert torch.equal(got.selection[0].kept, expected)


COMPOSED = [
    ({"budgets": [[9], [4]]}, [9], [4]),
    ({"budgets": {"divprune": [9], "fastv": [4]}, "layers": {"fastv": [1]}}, [9], [4]),
    ({"budget": [9, None], "budgets": [None, [4]], "layers": [None, [0]]}, [9], [4]),
    # A number for both: twice as many enter the decoder, at most all.
    ({"budget": 4}, [8], None),
    ({"budget": 0.1}, [4], None),
    ({"budget": 0.2}, [6], None),
    ({"budget": 10}, [16], None),
    # The decoder method's ratio is one of what it is handed.
    ({"budget": [0.5, 0.5]}, [8], None),
    ({"budget": {"divprune": 0.75, "fastv": 3}}, [12], None),
    ({"options": {"divprune": {"budget": 9}, "fastv": {"layers": [2], "budgets": [3]}}}, [9], [3]),
    ({"budget": 6, "options": {"divprune": {"budget": 7}, "fastv": {"positions": "compact"}}}, [7], None),
    # Its own, also where that is the same number.
    ({"budget": 4, "options": {"divprune": {"budget": 4}}}, [4], None),
]


@pytest.mark.parametrize(("given", "first", "second"), COMPOSED, ids=[json.dumps(given) for given, _, _ in COMPOSED])
def test_composition_and_its_processor(processor, tmp_path, given, first, second):
    """Every layer holds what the two budgets say; a processor writes that many; both survive JSON and folders."""
    fields = {f"sparse_{key}": value for key, value in given.items()}
    fields["sparse_method"] = "divprune+fastv"
    batch = tiny.inputs(processor, TWO)
    output = run("divprune+fastv", batch, **given)
    config = pruned().config
    method = build_sparsifier(config)
    handed = Geometry(first[0], 6, 6)
    asked = given.get("budget")
    if second is None:
        own = asked[1] if isinstance(asked, list) else asked["fastv"] if isinstance(asked, dict) else asked
        own = check_budget(own, 16) if own is asked else own
        second = METHODS["fastv"].resolve(handed, Sparsity("fastv", own)).budgets
    assert config.sparse_budgets == [first, list(second)]
    whole = config.sparse_layers[1][0] + 1
    text = int((batch["input_ids"] != 4).sum())
    held = [layer.keys.shape[2] - text for layer in output.past_key_values.layers]
    assert held == [2 * first[0]] * whole + [2 * second[0]] * (6 - whole)

    copied = SparseLlavaConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert build_sparsifier(copied) == method
    for name in ("method", "budget", "layers", "budgets", "options"):
        assert getattr(copied, f"sparse_{name}") == getattr(config, f"sparse_{name}")

    tiny.processor(SparseLlavaProcessor, **fields).save_pretrained(tmp_path)
    for ours in (tiny.processor(SparseLlavaProcessor, **fields), SparseLlavaProcessor.from_pretrained(tmp_path)):
        short = tiny.inputs(ours, TWO)
        assert (short["input_ids"] == 4).sum() == 2 * first[0]
        torch.testing.assert_close(run("divprune+fastv", short, **given).logits, output.logits)


@pytest.mark.parametrize("name", by_place(ENCODERS))
@pytest.mark.parametrize(("second", "left"), [("fastv", 4), ("fastv", 9), ("pyramiddrop", 4)])
def test_stages_of_a_composition_are_numbered_alike(processor, name, second, left):
    """The second stage's numbers are those that the first has left, in the order in which they entered the decoder."""
    given = {"budget": [9, None], "layers": [None, [2]], "budgets": [None, [left]]}
    if METHODS[name].resolve(Geometry(16, 6, 6), Sparsity(name, 9)).needs_mask:  # what decoder methods refuse
        given["options"] = {name: {"proportional": False}}
    output = run(f"{name}+{second}", tiny.inputs(processor, MIXED), **given)
    assert output.logits.isfinite().all()
    for row, text in enumerate(MIXED):
        images = text.count("<image>")
        if not images:
            assert all((stage.kept[row] == -1).all() for stage in output.selection)
            continue
        one, two = output.selection
        into = [] if one.merge_map is None else one.merge_map[row].tolist()
        known = {n for n in (*one.kept[row].tolist(), *into) if n >= 0}
        if name == "visionzip":
            # CLS of each image is numbered behind all patches and all that merging may have made.
            new = pruned().model.sparsifier.encoder.new_tokens
            known |= {images * (16 + new) + image for image in range(images)}
        kept = [n for n in two.kept[row].tolist() if n >= 0]
        assert len(known) == 9 * images and len(kept) == left * images
        assert set(kept) < known if left < 9 else kept == sorted(known)
        if name not in MERGING:
            scores = dict(zip(sorted(known), two.scores[row].tolist(), strict=False))
            assert set(kept) == set(sorted(known, key=lambda n: (-scores[n], n))[: left * images])


MIX = {"sparse_method": "divprune+fastv", "sparse_budget": 64}
TYPOS = [
    *[({"sparse_method": n, "sparse_budget": b},
      ["`sparse_budget` must be an int in [1, 576]", "or a float in (0, 1], a ratio", f"got {b!r}."])
      for n in NAMES for b in (0, 577, -0.5, 1.5, True, "64", float("nan"))],
    *[({"sparse_method": n, "sparse_budget": 64, "sparse_options": {"seeed": 1}},
      ["`sparse_options`", "'seeed'", n, "it has"])
      for n in NAMES],
    *[({"sparse_method": n, "sparse_budget": 64, "sparse_options": ["seed"]},
      ["`sparse_options` must be a dict", "got ['seed']."])
      for n in NAMES],
    *[({"sparse_method": n, "sparse_budget": 64, "sparse_layers": v},
      ["`sparse_layers` must be a list of ", "ints in [", f"got {v!r}."])
      for n in NAMES for v in ([], [99], 5, ["2"], [1.0], [True])],
    *[({"sparse_method": n, "sparse_budgets": v}, ["`sparse_budgets` must be a list of ", "ints in [", f"got {v!r}."])
      for n in NAMES for v in ([], [577] * 9, 5, ["2"], [-1], [1.5])],
    *[({"sparse_method": n}, [repr(n), "needs `sparse_budget`"]) for n in NAMES if n != "sparsevlm"],
    ({"sparse_method": "scope", "sparse_options": {"alpha": -1}}, ["'alpha' must be a number from 0 on, got -1."]),
    ({"sparse_method": "scope", "sparse_options": {"alpha": True}}, ["'alpha' must be a number from 0 on, got True."]),
    ({"sparse_method": "scope", "sparse_options": {"combined": "mult"}},
     ["'combined' must be one of 'multi', 'add', got 'mult'", "did you mean 'multi'?"]),
    ({"sparse_method": "cdpruner", "sparse_options": {"clip": 3}},
     ["'clip' must be a text of at most 1000 characters, got 3."]),
    ({"sparse_method": "tome", "sparse_options": {"proportional": 1}},
     ["'proportional' must be true or false, got 1."]),
    ({"sparse_method": "tome", "sparse_layers": [23], "sparse_budgets": [300]},
     ["`sparse_layers`", "up to 22", "got [23]."]),
    ({"sparse_method": "tome", "sparse_layers": [3, 1], "sparse_budgets": [300, 200]},
     ["`sparse_layers` must be ascending", "got [3, 1]."]),
    ({"sparse_method": "tome", "sparse_layers": [3], "sparse_budgets": [287]},
     ["`sparse_budgets`", "288 to 576", "got [287]."]),
    ({"sparse_method": "tome", "sparse_layers": [3], "sparse_budget": 64}, ["`sparse_budget`=64", "288 to 576"]),
    *[({"sparse_method": n, "sparse_options": {"positions": "orig"}},
      ["'positions' must be one of 'compact', 'original', got 'orig'"])
      for n in ("fastv", "pyramiddrop", "random_decoder")],
    *[({"sparse_method": n, "sparse_options": {"trim_cache": "no"}}, ["'trim_cache' must be true or false, got 'no'."])
      for n in DECODERS],
    *[({"sparse_method": n, "sparse_options": {"seed": -1}}, ["'seed' must be an int in [0, 4294967295], got -1."])
      for n in ("random", "random_decoder")],
    ({"sparse_method": "fastv", "sparse_layers": [1, 2], "sparse_budget": 64},
     ["`sparse_layers` must be one layer", "got [1, 2]."]),
    ({"sparse_method": "fastv", "sparse_layers": [31], "sparse_budget": 64}, ["`sparse_budget`=64", "576 to 576"]),
    ({"sparse_method": "pyramiddrop", "sparse_layers": [0], "sparse_budgets": [9]},
     ["`sparse_layers` must be", "ints in [1, 31], got [0]."]),
    ({"sparse_method": "pyramiddrop", "sparse_layers": [4], "sparse_budget": 64},
     ["`sparse_layers`=[4]", "`sparse_budgets`"]),
    ({**MIX, "sparse_method": "divprun+fastv"},
     ["`sparse_method` must be one of ", "got 'divprun+fastv'", "did you mean 'divprune'?"]),
    ({**MIX, "sparse_method": "fastv+divprune"}, ["'fastv+divprune'", "an encoder method, then a decoder method"]),
    ({**MIX, "sparse_method": "divprune+scope"}, ["'divprune+scope'", "one of", "fastv"]),
    ({**MIX, "sparse_method": "divprune+fastv+fastv"}, ["'divprune+fastv+fastv'", "then a decoder method"]),
    ({**MIX, "sparse_method": "divprune+"}, ["`sparse_method` must be one of ", "got 'divprune+'"]),
    *[({**MIX, "sparse_budget": b}, ["`sparse_budget` must", "two numbers", f"got {b!r}."])
      for b in ("64", True, [64], [1, 2, 3], {"divprun": 3})],
    *[({**MIX, "sparse_budget": b}, ["`sparse_budget` must be an int in [1, 576]", f"got {b!r}."]) for b in (577, 1.5)],
    ({**MIX, "sparse_budget": [64, 65]}, ["`sparse_budget` must be an int in [1, 64]", "got 65."]),
    *[({**MIX, f"sparse_{field}": v}, [f"`sparse_{field}` must", "two lists", f"got {v!r}."])
      for field in ("layers", "budgets") for v in (3, [3], [3, 4], [[3]], {"fast": [3]})],
    ({**MIX, "sparse_budgets": [[600], None]}, ["`sparse_budgets` must be", "ints in [1, 576], got [600]."]),
    ({"sparse_method": "divprune+fastv", "sparse_budgets": [[60], [61]]},
     ["`sparse_budgets` must be", "ints in [0, 60], got [61]."]),
    ({**MIX, "sparse_layers": [None, [32]]}, ["`sparse_layers` must be", "ints in [0, 31], got [32]."]),
    ({**MIX, "sparse_options": {"positions": "compact"}},
     ["`sparse_options` must be a dict", "'divprune' and 'fastv'", "got {'positions': 'compact'}."]),
    ({**MIX, "sparse_options": {"fastv": ["positions"]}}, ["fastv must have a dict of options, got ['positions']."]),
    ({**MIX, "sparse_options": {"fastv": {"position": "compact"}}}, ["'position'", "did you mean 'positions'"]),
    ({**MIX, "sparse_options": {"fastv": {"positions": "x"}}},
     ["'positions' must be one of 'compact', 'original', got 'x'."]),
    ({"sparse_method": "divprune+fastv"}, ["divprune", "needs `sparse_budget`"]),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "words"), TYPOS, ids=[str(i) for i in range(len(TYPOS))])
def test_typos_are_named(fields, words):
    with pytest.raises(ValueError, match="sparse_") as caught:
        SparseLlavaConfig(**fields)
    assert [word for word in words if word not in str(caught.value)] == []


@lru_cache(maxsize=1)
def dense_model():
    """Only read."""
    return tiny.dense_model()


@lru_cache(maxsize=1)
def stock_config():
    """The tiny model's, for configurations that are refused."""
    return {"vision_config": tiny.vision_config(), "text_config": tiny.text_config(), "image_token_index": 4}


def refusals(method: str, sparsify: bool = False, **settings: object) -> list[str]:
    """What configuration, processor and `set_sparsity` say of settings that each of them has to refuse.

    Args:
        sparsify: whether `sparsify`, which takes ten times as long as all of them, is asked too.
    """
    fields = {"sparse_method": method, **{f"sparse_{name}": value for name, value in settings.items()}}
    model = pruned()
    model.set_sparsity("uniform", budget=5)
    before, resolved = model.config.to_dict(), model.model.sparsifier
    entries = [
        lambda: SparseLlavaConfig(**stock_config(), **fields),
        lambda: tiny.processor(SparseLlavaProcessor, **fields),
        lambda: model.set_sparsity(method, **settings),
        *([lambda: llava_sparse.sparsify(dense_model(), method, **settings)] if sparsify else []),
    ]
    messages = []
    for entry in entries:
        with pytest.raises(ValueError, match="sparse_") as caught:
            entry()
        messages.append(str(caught.value))
        assert len(messages[-1]) < 600 and len(messages[-1].splitlines()) == 1
    assert model.config.to_dict() == before and model.model.sparsifier is resolved
    return messages


def briefly(value: object) -> str:
    """How a message begins to show a value."""
    return f"got {value!r}"[:40] if not isinstance(value, int) or abs(value) < 10**4000 else "got a int too long"


STAGED = [
    *[(name, None, budgets) for name in DECODERS for budgets in ([1, 2, 3], [9, 4, 5], [8, 16])],
    ("sparsevlm", {"version": "2.0"}, [3, 2, 3]),
    ("sparsevlm", {"recycle": False}, [3, 2, 3]),
    ("tome", None, [16, 9, 10]),
]


@pytest.mark.parametrize(("name", "options", "budgets"), STAGED, ids=[f"{n}-{b}" for n, _, b in STAGED])
def test_budgets_that_rise_are_refused(name, options, budgets):
    """No stage can leave more tokens than the one before; budgets that stay the same or fall are allowed."""
    layers = [1, 2, 4][: len(budgets)]
    settings = {"budgets": budgets, "layers": layers, "options": options}
    words = "a layer merges half of its tokens at most" if name == "tome" else "must fall from stage to stage"
    for message in refusals(name, sparsify=True, **settings):
        assert "`sparse_budgets`" in message and words in message and f"got {budgets}" in message
    if name != "tome":
        for own in ([[16], budgets], {"uniform": [16], name: budgets}):
            of = None if options is None else {name: options}
            for message in refusals(f"uniform+{name}", budgets=own, layers=[None, layers], options=of):
                assert "`sparse_budgets` must fall from stage to stage" in message and f"got {budgets}" in message
    model = pruned()
    model.set_sparsity(name, **{**settings, "budgets": sorted(budgets, reverse=True)})
    assert model.config.sparse_budgets == sorted(budgets, reverse=True)


OPTIONS = [(name, option) for name in NAMES for option in option_defaults(METHODS[name])]
STRANGE = {
    "401 digits": 10**400,
    "minus 401 digits": -(10**400),
    "5001 digits": 10**5000,
    "no text": "",
    "no list": [],
    "a list": [[1.0]],
    "a long text": "x" * 10_000,
    "not a number": math.nan,
    "infinite": math.inf,
    "minus infinite": -math.inf,
    "a dict": {},
}


def test_every_option_is_tried():
    assert {name for name, _ in OPTIONS} == {name for name in NAMES if option_defaults(METHODS[name])}
    assert {("sparsevlm", "lam"), ("cdpruner", "clip"), ("random", "seed"), ("scope", "alpha")} < set(OPTIONS)


# Every option with one of the values, every value with some option; all pairs in the slow tests.
PAIRS = [
    pytest.param(*pair, kind, marks=[] if (i + j) % len(STRANGE) == 0 else [pytest.mark.slow])
    for i, pair in enumerate(OPTIONS)
    for j, kind in enumerate(STRANGE)
]


@pytest.mark.parametrize(("name", "option", "kind"), PAIRS)
def test_strange_values_of_options(name, option, kind):
    """Refused by all that take settings, in few words: the option, and what was given, shortened."""
    value = STRANGE[kind]
    # Every option and every value once.
    slow = OPTIONS.index((name, option)) % len(STRANGE) == list(STRANGE).index(kind)
    messages = refusals(name, slow, budget=5, options={option: value})
    other = f"{name}+fastv" if METHODS[name].kind == "encoder" else f"uniform+{name}"
    messages += refusals(other, budget=5, options={name: {option: value}})
    for message in messages:
        assert f"`sparse_options`: {option!r} must be " in message and briefly(value) in message


NO_COUNTS = [
    10**30,
    10**5000,
    -1,
    True,
    False,
    "64",
    "",
    np.int64(4),
    np.uint8(4),
    np.array(4),
    [4],
    [[4]],
    [],
    {"a": 4},
]


@pytest.mark.parametrize("number", range(len(NO_COUNTS)), ids=lambda n: f"{n}-{type(NO_COUNTS[n]).__name__}")
@pytest.mark.parametrize("name", by_place(NAMES))
def test_what_is_no_budget(name, number):
    """The same words from all that take settings: of the budget, of an entry of budgets, of a composition's."""
    value = NO_COUNTS[number]
    slow = NAMES.index(name) % len(NO_COUNTS) == number
    for message in (messages := refusals(name, slow, budget=value)):
        assert message.startswith("`sparse_budget` must be an int in [1, 16]") and briefly(value) in message
    assert len(set(messages)) == 1
    stages = {"visionzip": 2, "tome": 5, "sparsevlm": 3, "pyramiddrop": 3, "random_decoder": 3}.get(name, 1)
    for budgets in ([16] * (stages - 1) + [value], [[value] * stages]):
        for message in refusals(name, slow, budgets=budgets):
            assert message.startswith("`sparse_budgets` must be a list of ") and "ints in [" in message
    if METHODS[name].kind == "encoder":
        other, given, most = f"{name}+fastv", ([value, 4], {name: value})[number % 2], 16
    else:
        other, given, most = f"uniform+{name}", ([9, value], {"uniform": 9, name: value})[number % 2], 9
    for message in refusals(other, budget=given):
        assert message.startswith(f"`sparse_budget` must be an int in [1, {most}]") and briefly(value) in message


@pytest.mark.parametrize(
    "value", [10**30, True, "64", np.int64(4), np.float32(0.5), math.nan, [4], [[4, 4]], []], ids=str
)
def test_what_is_no_budget_for_two(value):
    for message in refusals("divprune+fastv", budget=value):
        assert message.startswith("`sparse_budget` must") and briefly(value) in message


@pytest.mark.parametrize(
    "fields",
    [
        {
            "sparse_method": "divprune+sparsevlm",
            "sparse_budget": 64,
            "sparse_options": {"sparsevlm": {"version": "1.0"}},
        },
        {"sparse_method": "visionzip+sparsevlm", "sparse_budget": 0.25},
        {"sparse_method": "tome+pyramiddrop", "sparse_budget": {"tome": 128, "pyramiddrop": 0.5}},
        {"sparse_method": "scope+fastv", "sparse_budget": 96, "sparse_options": {"scope": {"alpha": 2}}},
        {"sparse_method": "cdpruner+random_decoder", "sparse_budgets": [[99], [50, 20, 10]]},
    ],
    ids=lambda fields: fields["sparse_method"],
)
def test_composed_configurations_survive_json(fields):
    config = SparseLlavaConfig(**fields)
    again = SparseLlavaConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict() and build_sparsifier(again) == build_sparsifier(config)


@pytest.mark.parametrize(
    ("settings", "tokens"),
    [
        (("pool", 0.3, None), 5),
        (("tome", 0.5, None), 8),
        (("tome", None, [16, 16, 9, 7, 5]), 5),
        (("visionzip+fastv", None, [[12, 5], [4]]), 17),
        (("visionzip+pyramiddrop", None, [[7, 2], [4, 3]]), 9),
    ],
)
def test_placeholders_are_what_the_model_keeps(settings, tokens, tmp_path):
    """Also where CLS makes them one more than there are patches."""
    method, budget, budgets = settings
    fields = {"sparse_method": method, "sparse_budget": budget, "sparse_budgets": budgets}
    tiny.processor(SparseLlavaProcessor, **fields).save_pretrained(tmp_path)
    for ours in (tiny.processor(SparseLlavaProcessor, **fields), SparseLlavaProcessor.from_pretrained(tmp_path)):
        batch = tiny.inputs(ours, TWO)
        assert (batch["input_ids"] == 4).sum() == 2 * tokens
        assert run(method, batch, budget=budget, budgets=budgets).logits.isfinite().all()


# Of CLIP's tokens the end is the largest.
END = len(tiny.WORDS)


@pytest.fixture(scope="module")
def clip_folders(tmp_path_factory):
    """A CLIP model with its tokenizer, as wide as the tiny tower; and one of another width."""
    ids = {word: i for i, word in enumerate(tiny.WORDS)}
    inner = Tokenizer(models.WordLevel({**ids, "<end>": END}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A <end>", special_tokens=[("<s>", 1), ("<end>", END)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<end>", pad_token="<pad>")
    folders = []
    for width in (64, 32):
        folder = tmp_path_factory.mktemp(f"clip{width}")
        shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "initializer_range": 0.3}
        text = {
            **shape,
            "hidden_size": 32,
            "vocab_size": 64,
            "max_position_embeddings": 8,
            "bos_token_id": 1,
            "eos_token_id": END,
        }
        vision = {**shape, "hidden_size": width, "image_size": tiny.SIDE, "patch_size": 14}
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16))
        for projection in (model.visual_projection, model.text_projection):
            torch.nn.init.normal_(projection.weight)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders.append(str(folder))
    return folders


def clip_processor(folder: str, method: str = "cdpruner", budget: object = 5) -> SparseLlavaProcessor:
    options = {"clip": folder} if method == "cdpruner" else {"cdpruner": {"clip": folder}}
    return tiny.processor(SparseLlavaProcessor, sparse_method=method, sparse_budget=budget, sparse_options=options)


def answers(batch: dict, **kwargs) -> list[list[int]]:
    arguments = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, suppress_tokens=[4])
    out = pruned().generate(**batch, **arguments, **kwargs)
    return out[:, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("method", ["cdpruner", "cdpruner+fastv"])
def test_clip_relevance_in_batches_and_beams(clip_folders, method, tmp_path):
    """Padded prompts, several images, none, a question of several parts, beams: each as it is alone."""
    folder = clip_folders[0]
    clip_processor(folder, method).save_pretrained(tmp_path)
    # A saved folder names no model that is loaded unless who loads it says so.
    with pytest.raises(ValueError, match=f"name a model to be loaded, clip='{folder}'"):
        SparseLlavaProcessor.from_pretrained(tmp_path)
    options = {"clip": folder} if method == "cdpruner" else {"cdpruner": {"clip": folder}}
    ours = SparseLlavaProcessor.from_pretrained(tmp_path, sparse_options=options)
    texts = [*MIXED, "USER: <image> Is there a dog or a cat in the image on the left ? No ? ASSISTANT:"]
    batch = tiny.inputs(ours, texts)
    assert batch["question_ids"].shape == (5, 18) and batch["question_ids"][0].tolist().count(-1) == 8
    output = run(method, batch, budget=5, options=options)
    greedy, beams = answers(batch), answers(batch, num_beams=3)
    seed = 0
    for row, text in enumerate(texts):
        single = tiny.inputs(ours, text, seed=seed)
        seed += text.count("<image>")
        for stage, own in zip(output.selection, run(method, single, budget=5, options=options).selection, strict=False):
            kept = stage.kept[row]
            assert kept[kept >= 0].tolist() == own.kept[0].tolist()
        assert answers(single) == [greedy[row]]
        assert answers(single, num_beams=3) == [beams[row]]


def test_clip_relevance_is_that_of_clip(clip_folders, processor):
    """Minus the cosine of CLIP's own embeddings of patch and question, the mean over the parts of a long question."""
    folder = clip_folders[0]
    ours, clip = clip_processor(folder), CLIPModel.from_pretrained(folder).eval()
    asked = "What red car"
    batch = tiny.inputs(ours, [f"USER: <image> {asked} ASSISTANT:"])
    assert batch["question_ids"].tolist() == [[1, *(tiny.WORDS.index(word) for word in asked.split()), END]]
    (stage,) = run("cdpruner", batch, budget=5, options={"clip": folder}).selection
    with torch.no_grad():
        text = clip.text_projection(clip.text_model(batch["question_ids"]).pooler_output)[0]
        tower = pruned().model.vision_tower(batch["pixel_values"], depths=[5]).last_hidden_state[0, 1:]
        patches = clip.visual_projection(clip.vision_model.post_layernorm(tower))
    expected = -torch.nn.functional.cosine_similarity(patches, text[None])
    torch.testing.assert_close(stage.scores[0], expected, rtol=1e-4, atol=1e-5)
    # Two parts, the second without start: each with its own row.
    long = torch.tensor([[1, *range(10, 16), END, *range(16, 20), END]])
    (both,) = run("cdpruner", {**batch, "question_ids": long}, budget=5, options={"clip": folder}).selection
    parts = [
        run("cdpruner", {**batch, "question_ids": part}, budget=5, options={"clip": folder}).selection[0].scores
        for part in (long[:, :8], long[:, 8:])
    ]
    torch.testing.assert_close(both.scores, sum(parts) / 2)


def test_clip_relevance_follows_the_question(clip_folders):
    folder = clip_folders[0]
    ours = clip_processor(folder)
    text = "USER: <image> Is there a dog ? ASSISTANT:"
    kept = []
    for question in (None, ["Is there a dog ?"], ["two big red tree"], ["car"]):
        batch = tiny.inputs(ours, [text], **({} if question is None else {"question": question}))
        kept.append(run("cdpruner", batch, budget=5, options={"clip": folder}).selection[0].kept[0].tolist())
    assert kept[0] == kept[1]
    assert len({tuple(tokens) for tokens in kept}) > 1


def test_clip_relevance_refuses(clip_folders, processor):
    right, wrong = clip_folders
    stock = tiny.inputs(processor, tiny.QUESTIONS)
    with pytest.raises(ValueError, match="pass question_ids, as SparseLlavaProcessor"):
        run("cdpruner", stock, budget=5, options={"clip": right})
    with pytest.raises(ValueError, match=r"clip=.* has a vision tower of width 32, this model one of 64"):
        run("cdpruner", tiny.inputs(clip_processor(wrong), tiny.QUESTIONS), budget=5, options={"clip": wrong})
