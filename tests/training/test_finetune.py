"""Fine-tuning: what is read, what is labelled, what is trained, and that a run that was killed ends as another."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

import llava_sparse

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import finetune  # noqa: E402
from reference.model import article  # noqa: E402
from reference.scenes import CATEGORIES, GRID, SIDE, Assets  # noqa: E402
from tuning import measure, rendered, training  # noqa: E402
from tuning.data import IGNORED, Collator, load_conversations  # noqa: E402


def human(value) -> dict:
    return {"from": "human", "value": value}


def gpt(value) -> dict:
    return {"from": "gpt", "value": value}


GOOD = [
    {"id": "a", "image": "0.png", "conversations": [human("<image>\nIs there a dog ?"), gpt("Yes")]},
    {
        "id": 2,
        "image": "sub/1.png",
        "conversations": [human("What car ?\n<image>"), gpt("red"), human("on ?"), gpt("No .")],
    },
    {"id": "c", "conversations": [human("What ?"), gpt("two dog")]},
    {"image": "0.png", "conversations": [human("<image>\nIs there a cat ?"), gpt("No")]},
]


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "pictures" / "sub").mkdir(parents=True)
    tiny.image(0).save(tmp_path / "pictures" / "0.png")
    tiny.image(1).save(tmp_path / "pictures" / "sub" / "1.png")
    tiny.image(2).save(tmp_path / "secret.png")
    (tmp_path / "data.json").write_text(json.dumps(GOOD))
    return tmp_path


@pytest.fixture
def tuning(folder, checkpoint) -> training.Tuning:
    return training.Tuning(
        str(checkpoint), folder / "out", folder / "data.json", folder / "pictures", budget=5, steps=2, pictures=2,
        rate=1e-2, rank=2, save_every=1,
    )  # fmt: skip


def read(folder: Path, **kwargs):
    return load_conversations(folder / "data.json", folder / "pictures", ("</s>", "<image>"), **kwargs)


def test_conversations_about_a_picture_are_one_row(folder):
    first, second, third = read(folder)
    assert first["conversations"] == [["Is there a dog ?", "Yes"], ["Is there a cat ?", "No"]]
    assert second == {
        "image": str(folder / "pictures" / "sub" / "1.png"),
        "conversations": [["What car ?", "red", "on ?", "No ."]],
    }
    assert third == {"image": None, "conversations": [["What ?", "two dog"]]}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sparse", [False, True])
def test_labels_are_the_answers(folder, side, sparse):
    kind = (
        {"cls": llava_sparse.SparseLlavaProcessor, "sparse_method": "visionzip", "sparse_budget": 5} if sparse else {}
    )
    processor = tiny.processor(**kind)
    processor.tokenizer.padding_side = side
    batch = Collator(processor, 256)(list(read(folder)))
    assert batch["pixel_values"].shape[0] == 2 and batch["owners"].tolist() == [0, 0, 1]
    assert (batch["input_ids"] == 4).sum(1).tolist() == [5 if sparse else tiny.PATCHES] * 3 + [0]
    answered = [ids[ids != IGNORED] for ids in batch["labels"]]
    assert [processor.decode(ids) for ids in answered] == ["Yes </s>", "No </s>", "red </s> No . </s>", "two dog </s>"]
    labelled = batch["labels"] != IGNORED
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    text = processor.decode(batch["input_ids"][2][(batch["attention_mask"][2] == 1) & (batch["input_ids"][2] != 4)])
    assert text == "<s> USER: What car ? ASSISTANT: red </s> USER: on ? ASSISTANT: No . </s>"
    torch.testing.assert_close(
        batch["pixel_values"][1:],
        processor.image_processor(images=[tiny.image(1)], return_tensors="pt")["pixel_values"],
    )


def test_a_conversation_that_is_too_long(folder):
    with pytest.raises(ValueError, match=r"(?s)USER: .*What car.* has 31 tokens; 28 are allowed"):
        Collator(tiny.processor(), 28)(list(read(folder)))


FINE = [human("<image>\nIs there a dog ?"), gpt("Yes")]
HOSTILE = {
    "leaves": ({"image": "../secret.png", "conversations": FINE}, "leaves"),
    "absolute": ({"image": "/etc/hostname", "conversations": FINE}, "leaves"),
    "link": ({"image": "link.png", "conversations": FINE}, "leaves"),
    "missing": ({"image": "none.png", "conversations": FINE}, "does not exist"),
    "null": ({"image": None, "conversations": FINE}, "image None: text that is not empty"),
    "nul": ({"image": "a\0.png", "conversations": FINE}, "no file name"),
    "several": ({"image": ["0.png"], "conversations": FINE}, "text that is not empty"),
    "no object": (["0.png"], "an object with 'conversations'"),
    "no list": ({"image": "0.png", "conversations": {"a": 1}}, "an object with 'conversations'"),
    "odd": ({"image": "0.png", "conversations": FINE[:1]}, "1 messages"),
    "empty": ({"image": "0.png", "conversations": []}, "0 messages"),
    "order": ({"image": "0.png", "conversations": FINE[::-1]}, "message 1 "),
    "twice": ({"image": "0.png", "conversations": [FINE[0], FINE[0]]}, "message 2 .* 'gpt'"),
    "number": ({"image": "0.png", "conversations": [FINE[0], gpt(1)]}, "message 2"),
    "blank": ({"image": "0.png", "conversations": [FINE[0], gpt(" ")]}, "message 2"),
    "surrogate": ({"image": "0.png", "conversations": [FINE[0], gpt("\ud800")]}, "message 2"),
    "no place": ({"image": "0.png", "conversations": [human("Is ?"), gpt("Yes")]}, "<image> is allowed once"),
    "no picture": ({"conversations": FINE}, "<image> is allowed once"),
    "two places": ({"image": "0.png", "conversations": [human("<image><image> a ?"), gpt("No")]}, "<image> is allowed"),
    "answered": ({"image": "0.png", "conversations": [FINE[0], gpt("<image>")]}, "<image> is allowed once"),
    "no question": ({"image": "0.png", "conversations": [human("<image>\n"), gpt("Yes")]}, "a question is needed"),
    "special": ({"image": "0.png", "conversations": [FINE[0], gpt("Yes</s>USER:")]}, "'</s>' is a special token"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_entries_are_refused_by_row_or_left_out(folder, name):
    entry, message = HOSTILE[name]
    (folder / "pictures" / "link.png").symlink_to(folder / "secret.png")
    (folder / "data.json").write_text(json.dumps([*GOOD, entry]))
    with pytest.raises(ValueError, match=rf"(?s)^data.json, row 5.*{message}"):
        read(folder)
    told = []
    assert len(read(folder, report=told.append)) == 3 and len(told) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "no JSON"),
        (b"\xff\xfe[]", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b'{"a": 1}', "a list of conversations"),
        (b"[]", "at least one is needed"),
    ],
)
def test_hostile_files(folder, text, message):
    (folder / "data.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"^data.json: .*{message}"):
        read(folder)


def test_pictures_that_cannot_be_read(folder):
    rows = list(read(folder))
    (folder / "pictures" / "0.png").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"0\.png' cannot be decoded"):
        Collator(tiny.processor(), 256)(rows)


@pytest.mark.parametrize("method", ["visionzip", "cdpruner", "sparsevlm", "dense"])
def test_pictures_encoded_once_give_the_same_loss(tuning, method):
    model, processor = training.load(replace(tuning, method=method))
    rows = list(load_conversations(tuning.data, tuning.images))
    batch = Collator(processor, 256)(rows)
    alone = {**batch, "pixel_values": batch["pixel_values"][batch["owners"]]}
    del alone["owners"]
    expected = model(**alone).loss
    seen = []
    model.model.vision_tower.register_forward_pre_hook(lambda _, args: seen.append(args), with_kwargs=False)
    arguments = training.TrainingArguments(output_dir=str(tuning.output), use_cpu=True, report_to=[])
    loss = training.Tuner(model=model, args=arguments).compute_loss(model, dict(batch))
    torch.testing.assert_close(loss, expected)
    assert len(seen) == 1


def run(tuning: training.Tuning) -> dict[str, torch.Tensor]:
    return load_file(training.tune(tuning) / "model.safetensors")


def changed(tuning: training.Tuning, after: dict[str, torch.Tensor]) -> set[str]:
    before = load_file(Path(tuning.model) / "model.safetensors")
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("method", ["visionzip", "sparsevlm"])
def test_the_projector_alone_changes(tuning, method):
    tuning = replace(tuning, method=method)
    parts = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
    assert changed(tuning, run(tuning)) == {f"multi_modal_projector.{part}" for part in parts}
    model = llava_sparse.SparseLlavaForConditionalGeneration.from_pretrained(tuning.output / "model")
    assert model.config.sparse_method == method and model.config.sparse_budget == 5


def test_adapters_alone_change(tuning, processor):
    peft = pytest.importorskip("peft")
    tuning = replace(tuning, part="lora")
    model, _ = training.load(tuning)
    names = set(training.trained(model))
    assert all(".language_model.layers." in name and ".lora_" in name for name in names)
    assert len(names) == 2 * 7 * tiny.LAYERS
    merged = changed(tuning, run(tuning))
    assert {name.split(".")[0] for name in merged} == {"language_model"} and len(merged) == 7 * tiny.LAYERS
    adapter = load_file(tuning.output / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == len(names)
    assert load_file(tuning.output / "checkpoint-2" / training.WEIGHTS).keys() == names
    batch = tiny.inputs(processor, tiny.QUESTIONS)
    loading = {"sparse_method": tuning.method, "sparse_budget": tuning.budget}
    base = AutoModelForImageTextToText.from_pretrained(tuning.model, **loading)
    with torch.no_grad():
        dense = base(**batch).logits
        adapted = peft.PeftModel.from_pretrained(base, tuning.output / "adapter")(**batch).logits
        whole = AutoModelForImageTextToText.from_pretrained(tuning.output / "model")(**batch).logits
    torch.testing.assert_close(adapted, whole, rtol=0, atol=1e-4)
    assert (adapted - dense).abs().max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("part", training.PARTS)
def test_a_killed_run_ends_as_one_that_was_not(tuning, monkeypatch, part):
    if part == "lora":
        pytest.importorskip("peft")
    tuning = replace(tuning, part=part, steps=3, pictures=1, accumulate=2)
    whole = run(tuning)
    cut = replace(tuning, output=tuning.output.with_name("cut"))
    step = training.Tuner.training_step

    seen = []

    def stop_in_the_third_step(self, *args, **kwargs):
        seen.append(self.state.global_step)
        if seen[-1] == 2 and seen[0] == 0:
            raise KeyboardInterrupt
        return step(self, *args, **kwargs)

    monkeypatch.setattr(training.Tuner, "training_step", stop_in_the_third_step)
    with pytest.raises(KeyboardInterrupt):
        training.tune(cut)
    # Killed while it wrote the next checkpoint: weights are there, the state is cut.
    broken = cut.output / "checkpoint-3"
    broken.mkdir()
    (broken / training.WEIGHTS).write_bytes(b"")
    (broken / "trainer_state.json").write_text('{"global_step": 3')
    assert training.last_checkpoint(cut.output).name == "checkpoint-2"
    torch.manual_seed(5)
    seen.clear()
    again = run(cut)
    assert set(seen) == {2}
    assert all(torch.equal(value, again[name]) for name, value in whole.items())
    assert changed(tuning, again)
    with pytest.raises(ValueError, match=r"holds another run \(rate 0\.01, not 0\.5\)"):
        training.tune(replace(cut, rate=0.5))
    tuning.data.write_text(json.dumps(GOOD[:1]))
    with pytest.raises(ValueError, match=r"holds another run \(data_sha256"):
        training.tune(cut)


def test_what_is_not_trained_is_as_precise_as_asked(tuning):
    tuning = replace(tuning, dtype="bfloat16", checkpointing=True)
    model, _ = training.load(tuning)
    precise = {p.dtype for p in training.trained(model).values()}, {p.dtype for p in model.lm_head.parameters()}
    assert precise == ({torch.float32}, {torch.bfloat16}) and model.is_gradient_checkpointing
    assert {value.dtype for value in run(tuning).values()} == {torch.bfloat16}


@pytest.mark.slow
def test_four_bits(tuning):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    folder = training.tune(replace(tuning, part="lora", four_bit=True, dtype="bfloat16"))
    assert folder.name == "adapter" and not (tuning.output / "model").exists()
    assert any(
        value.any() for name, value in load_file(folder / "adapter_model.safetensors").items() if "lora_B" in name
    )


def test_invalid_settings(tuning):
    with pytest.raises(ValueError, match="allowed: projector, lora"):
        training.load(replace(tuning, part="tower"))
    with pytest.raises(ValueError, match="part 'lora' is allowed"):
        training.load(replace(tuning, four_bit=True))
    tuning.data.write_text(json.dumps(GOOD[2:3]))
    with pytest.raises(ValueError, match="no conversation about a picture"):
        training.tune(tuning)


@pytest.fixture
def drawn(monkeypatch):
    """Scenes of two rectangles each, in place of rendered ones."""

    def draw(folder, seed, count, assets, processes):
        rng = np.random.default_rng(seed)
        labels = np.zeros((count, GRID, GRID), np.uint8)
        labels[:, 2:8, 2:8] = rng.integers(1, len(CATEGORIES) + 1, (count, 1, 1))
        np.save(folder / "labels.npy", labels)
        np.save(
            folder / "pictures.npy",
            np.kron(labels, np.ones((1, SIDE // GRID, SIDE // GRID), np.uint8))[..., None] * 5 + np.zeros(3, np.uint8),
        )

    monkeypatch.setattr(rendered, "render_scenes", draw)


def test_rendered_conversations_say_what_is_there(drawn, tmp_path):
    file = rendered.write_conversations(tmp_path, 3, 6, Assets())
    assert rendered.write_conversations(tmp_path, 3, 6, Assets()) == file
    labels = np.load(tmp_path / "labels.npy")
    rows = list(load_conversations(file, tmp_path / "images"))
    assert len(rows) == 3
    for number, row in enumerate(rows):
        assert Path(row["image"]).name == f"scene_{number:06d}.jpg" and len(row["conversations"]) == 6
        there = {CATEGORIES[c - 1] for c in np.unique(labels[number]) if c}
        for asked, answer in row["conversations"]:
            name = asked.split()[3]
            assert asked == f"Is there {article(name)} {name} in the image?"
            assert answer == ("Yes" if name in there else "No")
    assert {answer for row in rows for _, answer in row["conversations"]} == {"Yes", "No"}


def test_evaluation_pictures_never_train(drawn, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="test scenes"):
        rendered.write_conversations(tmp_path, 1, 2, Assets(), rendered.TEST_SEED)
    rendered.write_conversations(tmp_path / "a", 2, 2, Assets())
    monkeypatch.setattr(rendered, "SCENES", tmp_path / "a")
    with pytest.raises(ValueError, match="evaluation picture"):
        rendered.write_conversations(tmp_path / "b", 2, 2, Assets())


def test_the_command(folder, checkpoint, monkeypatch, capsys):
    command = ["finetune.py", "--model", str(checkpoint), "--data", str(folder / "data.json"), "--images"]
    command += [str(folder / "pictures"), "--output", str(folder / "out"), "--budget", "0.25", "--steps", "1"]
    monkeypatch.setattr(sys, "argv", command)
    finetune.main()
    assert f"tuned: {folder / 'out' / 'model'}" in capsys.readouterr().out
    model = llava_sparse.SparseLlavaForConditionalGeneration.from_pretrained(folder / "out" / "model")
    assert model.config.sparse_budget == 0.25


def entry(right: str, name: str = "run") -> dict:
    """A run over one question a picture."""
    rows = [{"image": str(i), "label": "yes", "parsed": "yes" if r == "1" else "no"} for i, r in enumerate(right)]
    return {"name": name, "answers": rows}


def test_share_of_the_loss_that_is_back():
    dense, before, after = entry("1" * 40), entry("10" * 20), entry("1110" * 10)
    value, low, high = map(
        int, measure.share_back(dense, before, after).replace("%", "").translate({91: 32, 93: 32, 44: 32}).split()
    )
    assert value == 50 and 25 < low < 50 < high < 75
    assert measure.share_back(dense, dense, after) == "–"
    assert measure.share_back(dense, before, before).startswith("0 %")


def test_accuracy_at_the_best_threshold():
    """Against every threshold by hand; equal scores stay together, and splits count alike."""
    rng = np.random.default_rng(0)
    rows = [
        {"split": split, "label": str(rng.choice(["yes", "no"])), "score": float(rng.integers(-4, 5))}
        for split, count in (("random", 30), ("popular", 10))
        for _ in range(count)
    ]

    def accuracy(threshold):
        right = {"random": [], "popular": []}
        for row in rows:
            right[row["split"]].append((row["score"] > threshold) == (row["label"] == "yes"))
        return np.mean([np.mean(part) for part in right.values()])

    assert measure.at_best(rows) == pytest.approx(max(accuracy(threshold) for threshold in range(-5, 6)))


@pytest.mark.slow
def test_every_table_of_the_page(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "METHODS", ("visionzip", "sparsevlm"))
    monkeypatch.setattr(measure, "RUNS", {"visionzip": ("visionzip", 1.0), "slow": ("sparsevlm", 0.1)})
    monkeypatch.setattr(measure, "TIMED", ((None, 1, 1),))
    page = tmp_path / "finetuning.md"
    page.write_text((ROOT / "docs" / "finetuning.md").read_text(encoding="utf-8"), encoding="utf-8")
    command = ["finetune.py", "--output", str(tmp_path / "out"), "--scenes", "2", "--questions", "2", "--steps", "1"]
    command += ["--pictures", "1", "--measure", "--limit", "2", "--page", str(page)]
    monkeypatch.setattr(sys, "argv", command)
    finetune.main()
    text = page.read_text(encoding="utf-8")
    tables = re.findall(r"<!-- table: \w+ -->\n(.*?)<!-- end -->", text, re.DOTALL)
    assert [table.count("\n| ") for table in tables] == [4, 8, 4] and "Dense, before:" in tables[0]
