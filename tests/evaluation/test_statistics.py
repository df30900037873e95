"""Statistics: scores against the metric, intervals, tests and curves against cases whose truth is known."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest, norm
from statsmodels.stats.inter_rater import cohens_kappa

from llava_sparse.evaluation import statistics
from llava_sparse.evaluation.statistics import score_rates
from llava_sparse.metrics.pope.pope import Pope

SPLITS = ("random", "popular", "adversarial")
DATA = Path(__file__).parents[1] / "data" / "pope"


def answer(image, question, label, parsed, split="random", **more):
    ids = {"split": split, "question_id": f"{image} {question}", "image": image, "question": question}
    return {**ids, "label": label, "answer": parsed.title(), "parsed": parsed, **more}


def run(name, said, label="yes", per_image=1):
    """A run whose n-th answer to distinct positive questions is the n-th of `said`."""
    rows = [answer(f"{i // per_image}.jpg", f"q{i}", label, "yes" if yes else "no") for i, yes in enumerate(said)]
    return {"name": name, "answers": rows}


def official(generator):
    """The extract of the official questions, answered at random, each distinct pair once."""
    said = {}
    rows = []
    for split in SPLITS:
        for line in (DATA / f"coco_pope_{split}.json").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            pair = row["image"], row["text"]
            score = said.setdefault(pair, float(np.round(generator.normal(0.8 if row["label"] == "yes" else -0.8), 1)))
            parsed = "yes" if score > 0 else "no"
            rows.append(answer(*pair, row["label"], parsed, split, score=score))
    return rows


@pytest.fixture
def answers():
    return official(np.random.default_rng(3))


@pytest.fixture(autouse=True)
def _no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def scores_of_metric(rows):
    metric = Pope(keep_in_memory=True)
    return metric.compute(predictions=[r["answer"] for r in rows], references=[r["label"] for r in rows])


def pick(scores):
    return {name: scores[name] for name in statistics.METRICS}


def test_scores_are_the_metrics(answers):
    found = statistics.summarize(answers, resamples=50)
    assert list(found["splits"]) == list(SPLITS)
    for split in SPLITS:
        rows = [row for row in answers if row["split"] == split]
        assert pick(found["splits"][split]) == scores_of_metric(rows)
        assert found["splits"][split]["questions"] == len(rows) == 60
    assert pick(found["pooled"]) == scores_of_metric(answers)
    distinct = {(row["image"], row["question"]): row for row in answers}
    assert pick(found["unique"]) == scores_of_metric(list(distinct.values()))
    for name in statistics.METRICS:
        mean = sum(found["splits"][split][name] for split in SPLITS) / 3
        assert found["average"][name] == pytest.approx(mean, abs=1e-15)


def test_a_positive_in_three_splits_is_one_observation(answers):
    """Positives are the same in the three files; of the official 9,000 rows 5,127 are distinct pairs."""
    yes = [{(r["image"], r["question"]) for r in answers if (r["split"], r["label"]) == (s, "yes")} for s in SPLITS]
    assert yes[0] == yes[1] == yes[2]
    distinct = {(row["image"], row["question"]) for row in answers}
    found = statistics.summarize(answers, resamples=10)
    assert found["pooled"]["questions"] == 180
    assert found["unique"]["questions"] == len(distinct) == len(statistics.unique_answers(answers)) < 180
    assert found["bootstrap"] == {"resamples": 10, "confidence": 0.95, "seed": 0, "images": 10}


def test_intervals_hold_their_score_and_follow_seed_and_confidence(answers):
    found = statistics.summarize(answers, seed=1)
    assert found == statistics.summarize(answers, seed=1)
    narrow = statistics.summarize(answers, confidence=0.5, seed=1)
    for wide, half in zip(
        [*found["splits"].values(), found["average"], found["pooled"], found["unique"]],
        [*narrow["splits"].values(), narrow["average"], narrow["pooled"], narrow["unique"]],
        strict=True,
    ):
        for name, (low, high) in wide["intervals"].items():
            assert 0 <= low <= half["intervals"][name][0] <= half["intervals"][name][1] <= high <= 1
            assert low < wide[name] < high
    assert found != statistics.summarize(answers, seed=2)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("size", [1, 9])
def test_interval_width_grows_with_correlated_clusters(size):
    """200 images, whose `size` questions are all right or all wrong: as if only 200 questions were asked."""
    said = np.repeat(np.random.default_rng(0).random(200) < 0.8, size)
    a, b = run("a", [True] * len(said), per_image=size), run("b", said, per_image=size)
    (difference,) = statistics.compare([a, b])
    found = statistics.summarize(b["answers"])
    error = math.sqrt(said.mean() * (1 - said.mean()) / 200)
    intervals = [found[of]["intervals"]["accuracy"] for of in ("unique", "average")]
    for low, high in [*intervals, difference["interval"], difference["average_interval"]]:
        assert high - low == pytest.approx(2 * norm.ppf(0.975) * error, rel=0.06)


def test_coverage():
    """95 % intervals hold the truth in 95 % of samples; taking questions as independent, they do not."""
    generator = np.random.default_rng(0)
    held = {True: 0, False: 0}
    for _ in range(300):
        values = np.repeat(generator.random(60) < 0.7, 8)
        for clustered in held:
            images = np.arange(480) // 8 if clustered else np.arange(480)
            low, high = statistics.clustered_mean(values, images.tolist(), resamples=200)[1]
            held[clustered] += low <= 0.7 <= high
    assert 0.91 <= held[True] / 300 <= 0.98
    assert held[False] / 300 < 0.65


@pytest.mark.parametrize("label", ["yes", "no"])
@pytest.mark.parametrize("said", [True, False])
@pytest.mark.parametrize("images", [1, 40])
def test_degenerate_sets(label, said, images):
    """All right or all wrong, one label only, one image: finite, without warnings, and never sure of itself."""
    rows = run("", [said] * 80, label, 80 // images)["answers"]
    for row in rows:
        row["score"] = 1.0 if said else -1.0
    found = statistics.summarize(rows, resamples=100)["unique"]
    unseen = binomtest(0, images).proportion_ci(0.95).high
    right = said == (label == "yes")
    assert found["intervals"]["accuracy"] == pytest.approx([1 - unseen, 1] if right else [0, unseen])
    for name, (low, high) in found["intervals"].items():
        assert 0 <= low <= found[name] <= high <= 1 and low < high
    assert found["intervals"]["roc_auc"] == [0, 1]
    if label == "no":
        assert found["intervals"]["recall"] == [0, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.clear(), "no answers"),
        (lambda rows: rows[3].pop("score"), "score None; a number in all rows"),
        (lambda rows: rows[3].update(score=math.inf), "score inf; a number"),
        (lambda rows: rows.append({**rows[0], "parsed": "no" if rows[0]["parsed"] == "yes" else "yes"}), "yes and no"),
    ],
)
def test_summarize_refuses(answers, change, message):
    change(answers)
    with pytest.raises(ValueError, match=message):
        statistics.summarize(answers)


@pytest.mark.parametrize("wrong", [{"confidence": 1.0}, {"confidence": 0}, {"resamples": 0}])
def test_bootstrap_settings_are_checked(answers, wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}="):
        statistics.summarize(answers, **wrong)


def test_mcnemar_of_ten_to_none():
    a, b = run("a", [True] * 30), run("b", [True] * 20 + [False] * 10)
    (found,) = statistics.compare([a, b])
    assert (found["a"], found["b"], found["pairs"]) == ("a", "b", 30)
    assert (found["a_only_correct"], found["b_only_correct"]) == (10, 0)
    assert found["p"] == found["p_holm"] == pytest.approx(2 / 2**10)
    assert found["difference"] == found["average_difference"] == pytest.approx(1 / 3)
    assert found["equal_answers"] == pytest.approx(2 / 3)
    low, high = found["interval"]
    error = math.sqrt(1 / 3 * 2 / 3 / 30)
    assert [low, high] == pytest.approx([1 / 3 - 1.96 * error, 1 / 3 + 1.96 * error], abs=0.04)
    assert statistics.compare([b, a])[0]["difference"] == -found["difference"]
    json.dumps(found, allow_nan=False)


def test_equal_runs():
    a = run("a", [True, False] * 20)
    (found,) = statistics.compare([a, {**a, "name": "b"}])
    assert (found["p"], found["kappa"], found["equal_answers"], found["difference"]) == (1, 1, 1, 0)
    bound = binomtest(0, 40).proportion_ci(0.95).high
    assert found["interval"] == pytest.approx([-bound, bound])


def test_comparisons_count_distinct_pairs(answers):
    """Wrong on one positive, which three splits ask, and on one negative: two discordant pairs, not four."""
    a = [{**row, "parsed": row["label"]} for row in answers]
    yes = next(row for row in a if row["label"] == "yes")
    no = next(row for row in a if row["label"] == "no")
    b = [dict(row) for row in a]
    for row in b:
        for wrong in (yes, no):
            if (row["image"], row["question"]) == (wrong["image"], wrong["question"]):
                row["parsed"] = "no" if row["label"] == "yes" else "yes"
    (found,) = statistics.compare([{"name": "a", "answers": a}, {"name": "b", "answers": b}])
    distinct = len(statistics.unique_answers(a))
    assert (found["pairs"], found["a_only_correct"], found["b_only_correct"]) == (distinct, 2, 0)
    assert found["difference"] == pytest.approx(2 / distinct)
    wrong = sum(x["parsed"] != y["parsed"] for x, y in zip(a, b, strict=True))
    assert wrong >= 4
    assert found["average_difference"] == pytest.approx(wrong / 180)


def test_holm_over_all_comparisons():
    a, b = run("a", [True] * 40), run("b", [True] * 30 + [False] * 10)
    c = run("c", [True] * 33 + [False] * 7)
    found = statistics.compare([a, b, c], resamples=10)
    assert [(x["a"], x["b"]) for x in found] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [x["p"] for x in found] == pytest.approx([2 / 2**10, 2 / 2**7, 2 / 2**3])
    # Smallest times 3, middle times 2, largest times 1.
    assert [x["p_holm"] for x in found] == pytest.approx([6 / 2**10, 4 / 2**7, 2 / 2**3])
    assert statistics.compare([a]) == []


def test_paired_interval_uses_the_pairing():
    """Two runs that are wrong on nearly the same questions differ by little, surely."""
    generator = np.random.default_rng(0)
    said = generator.random(400) < 0.7
    other = said.copy()
    other[np.flatnonzero(said)[:4]] = False
    low, high = statistics.compare([run("a", said), run("b", other)])[0]["interval"]
    assert 0 < high - low < 0.03
    alone = statistics.summarize(run("a", said)["answers"])["unique"]["intervals"]["accuracy"]
    assert alone[1] - alone[0] > 0.08


def test_runs_on_other_rows_are_refused():
    a, b = run("a", [True] * 4), run("b", [True] * 4)
    b["answers"][2]["question"] = "?"
    with pytest.raises(ValueError, match="a and b differ in row 2"):
        statistics.compare([a, b])
    with pytest.raises(ValueError, match="a and c differ in row 4"):
        statistics.compare([a, run("c", [True] * 5)])


def test_kappa_of_the_textbook():
    """20 both yes, 15 both no, 5 and 10 apart: agreement 0.7, by chance 0.5."""
    first = [1] * 20 + [1] * 5 + [0] * 10 + [0] * 15
    second = [1] * 20 + [0] * 5 + [1] * 10 + [0] * 15
    assert statistics.cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohens_kappa(np.array([[15, 10], [5, 20]])).kappa == pytest.approx(0.4)
    assert statistics.cohen_kappa([1, 1], [1, 1]) == 1
    assert statistics.cohen_kappa([1, 0], [0, 1]) == -1


def test_clustered_mean_needs_a_cluster_for_every_value():
    with pytest.raises(ValueError, match="a cluster for every value"):
        statistics.clustered_mean([1, 0], ["a"])
    with pytest.raises(ValueError, match="a cluster for every value"):
        statistics.clustered_mean([], [])


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_masks_survive_packing(mask):
    packed = statistics.pack_kept(mask)
    assert statistics.unpack_kept(packed, len(mask)).tolist() == mask
    assert int(packed, 16) == int("".join("01"[bit] for bit in mask).ljust(8 * -(-len(mask) // 8), "0"), 2)


@pytest.mark.parametrize("packed", ["8", "zz", "80", "800000", "8001", None])
def test_other_masks_are_refused(packed):
    with pytest.raises(ValueError, match=r"kept .*allowed"):
        statistics.unpack_kept(packed, 12)


def test_kept_overlap():
    a = [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    b = [[0, 1, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]]
    assert statistics.kept_overlap(a, b) == pytest.approx((1 / 3 + 0 + 1 + 1) / 4)
    with pytest.raises(ValueError, match="same shape"):
        statistics.kept_overlap(a, b[:2])


SCORED = st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=25)


@given(SCORED)
def test_roc_auc_counts_pairs(rows):
    yes, no = ([score for label, score in rows if label == kind] for kind in (True, False))
    pairs = [(a > b) + (a == b) / 2 for a, b in itertools.product(yes, no)]
    expected = sum(pairs) / len(pairs) if pairs else 0.5
    assert statistics.roc_auc(*zip(*rows, strict=True)) == pytest.approx(expected)


@given(SCORED)
def test_precision_recall_counts_answers(rows):
    labels, scores = zip(*rows, strict=True)
    precision, recall, thresholds = statistics.precision_recall_curve(labels, scores)
    assert thresholds.tolist() == sorted(set(scores), reverse=True)
    expected = previous = 0
    for p, r, threshold in zip(precision, recall, thresholds, strict=True):
        said = [label for label, score in rows if score >= threshold]
        assert p == pytest.approx(sum(said) / len(said))
        assert r == pytest.approx(sum(said) / sum(labels) if any(labels) else 0)
        expected, previous = expected + (r - previous) * p, r
    assert statistics.average_precision(labels, scores) == pytest.approx(expected)


def test_curves_by_hand():
    labels, scores = [1, 0, 1, 0], [0.9, 0.8, 0.7, 0.1]
    precision, recall, thresholds = statistics.precision_recall_curve(labels, scores)
    assert precision.tolist() == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2])
    assert recall.tolist() == [0.5, 0.5, 1, 1]
    assert thresholds.tolist() == scores
    assert statistics.roc_auc(labels, scores) == 0.75
    assert statistics.average_precision(labels, scores) == pytest.approx(5 / 6)


def test_calibration_by_hand():
    found = statistics.calibration([1, 0, 1, 1], [0.1, 0.1, 0.3, 1.0], bins=10)
    assert [(b["low"], b["high"], b["count"]) for b in found["bins"]] == [(0.1, 0.2, 2), (0.3, 0.4, 1), (0.9, 1, 1)]
    assert [b["probability"] for b in found["bins"]] == pytest.approx([0.1, 0.3, 1])
    assert [b["frequency"] for b in found["bins"]] == [0.5, 1, 1]
    assert found["ece"] == pytest.approx((2 * 0.4 + 0.7 + 0) / 4)
    assert found["brier"] == pytest.approx((0.81 + 0.01 + 0.49 + 0) / 4)


@pytest.mark.parametrize(
    ("labels", "values", "message"),
    [
        ([1, 0], [0.5], "same length"),
        ([], [], "same length"),
        ([2, 0], [0.5, 0.5], "labels 1 and 0"),
        ([1, 0], [0.5, math.nan], "finite scores"),
        ([1, 0], [0.5, 1.5], "from 0 to 1"),
    ],
)
def test_curves_refuse(labels, values, message):
    with pytest.raises(ValueError, match=message):
        statistics.calibration(labels, values)


@settings(max_examples=30)
@given(SCORED, st.randoms(use_true_random=False))
def test_weights_are_repetitions(rows, random):
    labels, scores = (np.array(column) for column in zip(*rows, strict=True))
    weights = np.array([random.randint(0, 3) for _ in rows])
    repeated = np.repeat(labels, weights), np.repeat(scores, weights)
    expected = score_rates(*repeated, np.ones((1, weights.sum()))) if weights.any() else np.array([[0.5, 0, 0]])
    assert score_rates(labels, scores, weights[None]) == pytest.approx(expected)


def test_summary_of_scores(answers):
    found = statistics.summarize(answers, resamples=200)
    rows = statistics.unique_answers(answers)
    labels, scores = [row["label"] == "yes" for row in rows], [row["score"] for row in rows]
    probabilities = [1 / (1 + math.exp(-score)) for score in scores]
    unique = found["unique"]
    assert unique["roc_auc"] == pytest.approx(statistics.roc_auc(labels, scores))
    assert unique["average_precision"] == pytest.approx(statistics.average_precision(labels, scores))
    assert unique["brier"] == pytest.approx(statistics.calibration(labels, probabilities)["brier"])
    assert unique["ece"] == pytest.approx(statistics.calibration(labels, probabilities)["ece"])
    assert set(unique["intervals"]) == {*statistics.METRICS, "roc_auc", "average_precision", "brier"}
    for name in ("roc_auc", "ece"):
        assert found["average"][name] == pytest.approx(np.mean([found["splits"][s][name] for s in SPLITS]))
    for row in answers:
        del row["score"]
    assert "roc_auc" not in statistics.summarize(answers, resamples=10)["unique"]
