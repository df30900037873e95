"""What a method has to beat: draws at random, regular grids, a small picture, no picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from llava_sparse.evaluation import Asker, LoadedModel, evaluate_pope, plan_runs
from llava_sparse.evaluation.plan import with_controls
from llava_sparse.evaluation.report import report
from llava_sparse.evaluation.results import repeat_line
from llava_sparse.evaluation.tables import hard_subset, score_metrics, scores_table, spread_table

PROMPT = "USER: <image> {question} ASSISTANT:"


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "images").mkdir()
    for n in range(6):
        tiny.image(n).save(tmp_path / "images" / f"{n}.png")
    rows = [
        {"question_id": f"{n}{m}", "image": f"{n}.png", "text": f"Is there a {thing} in the image?", "label": label}
        for n in range(6)
        for m, (thing, label) in enumerate((("dog", "yes"), ("cat", "no"), ("car", "yes"), ("tree", "no")))
    ]
    for split in ("random", "adversarial"):
        (tmp_path / f"x_pope_{split}.json").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.fixture
def results(dense, processor, folder):
    loaded = LoadedModel(dense, processor, "tiny", False)
    subset = {"split": ["random", "adversarial"]}
    return evaluate_pope(
        loaded, folder, ["dense", "visionzip"], [5, 9], controls=True, answer_mode="logits",
        subset=subset, batch_size=5,
        output=folder / "run.json",
    )  # fmt: skip


def test_controls_are_runs():
    methods, seeds = with_controls(["dense", "uniform"], [7])
    assert methods == ["dense", "uniform", "random", "pool", "downsampled", "blind"] and seeds == [7, 0, 1, 2, 3]
    names = [run.name for run in plan_runs(["downsampled", "blind", "dense"], [64, 0.25])]
    assert names == ["downsampled@64", "downsampled@0.25", "blind", "dense"]
    assert [run.grid(576) for run in plan_runs(["downsampled", "blind", "dense"], [64, 0.25])] == [8, 12, 0, None]
    with pytest.raises(ValueError, match="is no option"):
        plan_runs(["blind:seed=1"], [64])


@torch.inference_mode()
def test_what_controls_see(dense, processor):
    """A small picture is encoded as the tower encodes small pictures; the blind model sees nothing at all."""
    questions = ["Is there a dog", "What is it"]
    smooth = [Image.fromarray(np.full((56, 56, 3), value, np.uint8)) for value in (40, 200)]
    small = Asker(dense, processor, PROMPT, "logits", grid=2)
    pixels = small.pixels(smooth)
    assert pixels.shape == (2, 3, 28, 28)
    whole = Asker(dense, processor, PROMPT).pixels(smooth)
    assert torch.allclose(pixels, whole[..., :28, :28], atol=1e-5)
    answers = small.answer(pixels, [0, 1], questions, 2)
    assert [answer.visual_tokens for answer in answers] == [4.0, 4.0]
    for answer, picture, question in zip(answers, pixels, questions, strict=True):
        features = dense.get_image_features(pixel_values=picture[None], interpolate_pos_encoding=True, return_dict=True)
        ids = processor.tokenizer(PROMPT.replace("<image>", " ".join(["<image>"] * 4)).format(question=question))
        ids = torch.tensor([ids["input_ids"]])
        logits = dense(input_ids=ids, mm_encoder_outputs={"image": features}).logits[0, -1]
        yes, no = (processor.tokenizer.convert_tokens_to_ids(word) for word in ("Yes", "No"))
        assert answer.score == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)
    blind = Asker(dense, processor, PROMPT, "logits", grid=0)
    first, second = (blind.answer(blind.pixels([tiny.image(n)]), [0], questions[:1], 1)[0] for n in (1, 2))
    assert first.score == second.score and first.visual_tokens == 0
    ids = torch.tensor([processor.tokenizer(PROMPT.replace("<image> ", "").format(question=questions[0]))["input_ids"]])
    logits = dense(input_ids=ids).logits[0, -1]
    assert first.score == pytest.approx(float(logits[yes] - logits[no]), abs=1e-4)


def test_tables_with_controls(results, folder):
    names = [entry.name for entry in results.methods]
    assert [name for name in names if name.startswith("random@5")] == [f"random@5#{n}" for n in range(5)]
    assert {"uniform@5", "pool@9", "downsampled@5", "downsampled@9", "blind"} <= set(names)
    entering = {entry.name: entry.entering for entry in results.methods}
    assert (entering["dense"], entering["visionzip@5"], entering["downsampled@5"], entering["blind"]) == (16, 5, 4, 0)

    small = next(entry for entry in results.methods if entry.name == "downsampled@5")
    other = next(entry for entry in results.methods if entry.name == "visionzip@5")
    wrong = [n for n, row in enumerate(small.answers) if row["split"] == "random" and row["parsed"] != row["label"]]
    right = sum(other.answers[n]["parsed"] == other.answers[n]["label"] for n in wrong)
    assert hard_subset(results)["visionzip@5"] == f"{100 * right / len(wrong):.1f} of {len(wrong)}"
    assert hard_subset(results)["downsampled@5"] == f"0.0 of {len(wrong)}"

    shown = scores_table(results)
    assert shown.columns[1] == "tokens" and "hard" in shown.columns and shown.columns[-1] == "time, ms"
    best = max(entry.average["accuracy"] for entry in results.methods)
    for entry, row in zip(results.methods, shown.rows, strict=True):
        assert row[2].best == (entry.scores["average"]["intervals"]["accuracy"][1] >= best)
    spread = spread_table(results)
    accuracy = [entry.average["accuracy"] for entry in results.methods if entry.name.startswith("random@5")]
    assert spread.rows[0][:3] == ["random@5", "5", f"{100 * np.mean(accuracy):.1f}"]
    alarms = [row["parsed"] == "yes" for row in other.answers if row["label"] == "no"]
    row = score_metrics(results, [other]).rows[0]
    assert row[-1] == f"{100 * np.mean(alarms):.1f}" and "adversarial" in score_metrics(results, [other]).caption
    report([folder / "run.json"], folder / "report.html", folder / "report.md")
    text = (folder / "report.md").read_text()
    assert "**" in text and 'class="best"' in (folder / "report.html").read_text()


def test_the_line_that_repeats_a_run(results):
    line = repeat_line(results.settings)
    assert line.startswith("llava-sparse pope --model tiny --dataset ")
    for part in (
        "--methods dense,visionzip", "--budgets 5,9", "--answer-mode logits", "--split random,adversarial",
        "--batch-size 5", "--controls", "--dtype float32", "--prompt 'USER: <image> {question} ASSISTANT:'",
    ):  # fmt: skip
        assert part in line
