"""POPE's questions: what is loaded, and what is refused with which message."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from llava_sparse.evaluation import load_pope
from llava_sparse.evaluation.tasks.pope import FEATURES, SPLITS
from llava_sparse.evaluation.tasks.questions import _spread
from llava_sparse.reference import SCENES

OFFICIAL = Path(__file__).parents[1] / "data" / "pope"


def question(number: int, **changes) -> dict:
    label = "yes" if number % 2 else "no"
    row = {"question_id": number, "image": "a.png", "text": f"Is there a thing {number} in the image?", "label": label}
    return {**row, **changes}


def write(folder: Path, split: str, rows: list) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / f"tiny_pope_{split}.json").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four valid questions a split about one picture."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "images" / "a.png")
    for split in SPLITS:
        write(tmp_path, split, [question(number) for number in range(1, 5)])
    return tmp_path


def pairs_of(dataset: datasets.Dataset) -> list[tuple[str, str]]:
    return list(zip(dataset["image_source"], dataset["question"], strict=True))


def test_reference_questions():
    dataset = load_pope()
    assert dataset.column_names == ["question_id", "question", "answer", "image_source", "image", "category"]
    assert Counter(dataset["category"]) == dict.fromkeys(SPLITS, 1200)
    assert Counter(zip(dataset["category"], dataset["answer"], strict=True)) == {
        (split, answer): 600 for split in SPLITS for answer in ("yes", "no")
    }
    assert len(set(pairs_of(dataset))) == 2151
    assert len(set(dataset["image_source"])) == 200
    assert dataset[0]["image"].size == (336, 336)


def test_reference_boxes_agree_with_the_labels():
    objects = [json.loads(line) for line in (SCENES / "objects.jsonl").read_text().splitlines()]
    present = {(row["image"], thing["name"]) for row in objects for thing in row["objects"]}
    dataset = load_pope()
    for source, text, answer in zip(dataset["image_source"], dataset["question"], dataset["answer"], strict=True):
        name = text.removeprefix("Is there a").removeprefix("n").strip().removesuffix(" in the image?")
        assert ((source, name) in present) == (answer == "yes")


def test_images_are_decoded_when_they_are_accessed(folder):
    dataset = load_pope(folder)
    stored = dataset.cast_column("image", datasets.Image(decode=False))[0]["image"]
    assert stored["bytes"] is None
    assert Path(stored["path"]).name == "a.png"
    assert dataset[0]["image"].size == (20, 10)


def test_official_files(tmp_path):
    shutil.copytree(OFFICIAL, tmp_path / "pope")
    (tmp_path / "pope" / "images").mkdir()
    rows = {s: [json.loads(line) for line in (OFFICIAL / f"coco_pope_{s}.json").open()] for s in SPLITS}
    for name in {row["image"] for split in rows.values() for row in split}:
        Image.new("RGB", (8, 8)).save(tmp_path / "pope" / "images" / name)
    dataset = load_pope(tmp_path / "pope")

    assert list(dataset["category"]) == [split for split in SPLITS for _ in range(60)]
    assert list(dataset["answer"]) == [row["label"] for split in SPLITS for row in rows[split]]
    assert list(dataset["question_id"]) == [str(row["question_id"]) for split in SPLITS for row in rows[split]]
    by_split = {
        (split, label): {
            pair
            for pair, s, a in zip(pairs_of(dataset), dataset["category"], dataset["answer"], strict=True)
            if (s, a) == (split, label)
        }
        for split in SPLITS
        for label in ("yes", "no")
    }
    assert by_split["random", "yes"] == by_split["popular", "yes"] == by_split["adversarial", "yes"]
    assert all(len(pairs) == 30 for pairs in by_split.values())
    assert 30 < len(set(pairs_of(dataset))) < 180


@given(labels=st.lists(st.sampled_from(["yes", "no"])), limit=st.integers(1, 60))
def test_spread_takes_as_many_as_asked_and_balances_labels(labels, limit):
    rows = _spread(labels, limit)
    assert len(set(rows)) == len(rows) == min(limit, len(labels))
    assert rows == sorted(rows)
    taken = Counter(labels[row] for row in rows)
    for label in ("yes", "no"):
        assert taken[label] >= min(labels.count(label), len(rows) // 2)


@pytest.mark.parametrize("limit", [1, 7, 1200, 5000])
def test_limit_is_per_split(limit):
    dataset = load_pope(limit=limit)
    assert Counter(dataset["category"]) == dict.fromkeys(SPLITS, min(limit, 1200))


def test_limit_is_spread_over_the_pictures():
    assert len(set(load_pope(limit=100)["image_source"])) >= 50


def test_limit_with_few_of_one_label(folder):
    write(folder, "random", [question(n, label="yes" if n == 9 else "no") for n in range(10)])
    dataset = load_pope(folder, limit=6).filter(lambda category: category == "random", input_columns="category")
    assert Counter(dataset["answer"]) == {"yes": 1, "no": 5}


@pytest.mark.parametrize("limit", [0, -3])
def test_limit_below_one(limit):
    with pytest.raises(ValueError, match="a positive number of questions per split"):
        load_pope(limit=limit)


def test_blank_lines_are_no_questions(folder):
    write(folder, "random", [question(1), "", question(2), "  "])
    assert Counter(load_pope(folder)["category"])["random"] == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"row 3: invalid JSON .*one object a line is allowed"),
        ("[1]", r"row 3: 'question_id' is missing; an object with question_id, image, text, label is allowed"),
        ({"question_id": 9, "image": "a.png", "text": "?"}, r"row 3: 'label' is missing"),
        (question(9, label="maybe"), r"row 3: label 'maybe' is neither of the allowed 'yes' and 'no'"),
        (question(9, label=None), r"row 3: label None is neither"),
        (question(9, label=["yes"]), r"row 3: label \['yes'\] is neither"),
        (question(9, text=" "), r"row 3: question ' ': text that is not empty is allowed"),
        (question(9, text="\ud800"), r"row 3: question .*: text that is not empty is allowed"),
        (question(9, question_id=True), r"row 3: question_id True: text that is not empty is allowed"),
        (
            question(2),
            r"row 3: question_id 2 is already that of tiny_pope_popular.json, row 2; each id is allowed once",
        ),
        (question(9, image="b.png"), r"row 3: image 'b.png' does not exist in .*images"),
        (question(9, image=7), r"row 3: image_source 7: text that is not empty is allowed"),
        (question(9, image="."), r"row 3: image '.' does not exist"),
        (question(9, image="../secret.png"), r"row 3: image '../secret.png' leaves .*images; only files inside it"),
        (question(9, image="/etc/passwd"), r"row 3: image '/etc/passwd' leaves"),
        (question(9, image="a\0.png"), r"row 3: image 'a\\x00.png' is no file name that is allowed"),
        (question(9, image="x" * 5000), r"row 3: image 'xxx.*is no file name that is allowed"),
        (question(9, image="link.png"), r"row 3: image 'link.png' leaves"),
        (question(9, image="text.png"), r"row 3: image 'text.png' cannot be decoded; a readable picture is allowed"),
        (question(9, image="half.png"), r"row 3: image 'half.png' cannot be decoded"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else None,
)
def test_refused_rows(folder, row, message):
    Image.new("RGB", (9, 9)).save(folder / "secret.png")
    (folder / "images" / "link.png").symlink_to(folder / "secret.png")
    (folder / "images" / "text.png").write_text("this is no picture")
    Image.effect_noise((64, 64), 99).save(folder / "images" / "whole.png")
    (folder / "images" / "half.png").write_bytes((folder / "images" / "whole.png").read_bytes()[:1000])
    write(folder, "popular", [question(1), question(2), row, question(4)])
    with pytest.raises(ValueError, match=rf"tiny_pope_popular.json, {message}"):
        load_pope(folder)


def test_refused_files(folder):
    write(folder, "adversarial", [])
    with pytest.raises(ValueError, match=r"tiny_pope_adversarial.json: there are no questions"):
        load_pope(folder)
    (folder / "tiny_pope_adversarial.json").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"tiny_pope_adversarial.json: the file is not UTF-8"):
        load_pope(folder)
    write(folder, "adversarial", [question(1)])
    (folder / "other_pope_random.json").write_text("")
    with pytest.raises(ValueError, match=r"other_pope_random.json and tiny_pope_random.json are both the split random"):
        load_pope(folder)
    (folder / "other_pope_random.json").unlink()
    (folder / "tiny_pope_random.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no \*_pope_random.json"):
        load_pope(folder)
    with pytest.raises(
        FileNotFoundError, match="no such folder; a dataset is 'reference', 'lmms-lab/POPE' or a folder"
    ):
        load_pope(folder / "nowhere")


def test_byte_order_mark_and_line_ends_of_other_systems(folder):
    lines = "\r\n".join(json.dumps(question(number)) for number in range(5))
    (folder / "tiny_pope_random.json").write_bytes(f"\ufeff{lines}\r\n\r\n".encode())
    dataset = load_pope(folder)
    assert list(dataset["question_id"])[:5] == ["0", "1", "2", "3", "4"]
    assert dataset[1]["question"] == "Is there a thing 1 in the image?"


def test_messages_are_short_and_name_the_row(folder):
    for row in (question(2, label="x" * 10**7), question(2, image="x" * 10**7), "[" * 10**7, '{"question_id": NaN}'):
        write(folder, "random", [question(1), row])
        with pytest.raises(ValueError, match=r"tiny_pope_random\.json, row 2: ") as caught:
            load_pope(folder)
        assert len(str(caught.value)) < 300
        assert "\n" not in str(caught.value)
    (folder / "tiny_pope_random.json").write_bytes(json.dumps(question(1)).encode() + b"\n\xe9\n")
    with pytest.raises(ValueError, match=r"tiny_pope_random.json: the file is not UTF-8 text \(row 2: "):
        load_pope(folder, on_bad=print)


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_rows_are_left_out_and_reported(folder, streaming):
    write(
        folder,
        "random",
        [question(1), question(2, label="x"), "{", question(3, image="b.png"), question(1), question(4)],
    )
    messages: list[str] = []
    dataset = load_pope(folder, split="random", streaming=streaming, on_bad=messages.append)
    for _ in range(2):  # a second pass has nothing new to report
        assert [row["question_id"] for row in dataset] == ["1", "4"]
    assert [text.partition(": ")[0] for text in messages] == [f"tiny_pope_random.json, row {n}" for n in (2, 3, 4, 5)]


@pytest.mark.parametrize("limit", [None, 3])
def test_a_split_of_bad_rows_is_an_error_all_the_same(folder, limit):
    write(folder, "popular", [question(1, image="b.png"), question(2, answer="no", label=None)])
    with pytest.raises(ValueError, match=r"tiny_pope_popular\.json: there are no questions of the split popular"):
        load_pope(folder, limit, on_bad=lambda message: None)
    (folder / "tiny_pope_popular.json").write_text("")
    with pytest.raises(ValueError, match=r"tiny_pope_popular\.json: there are no questions of the split popular"):
        load_pope(folder, limit)
    assert len(load_pope(folder, limit, split="random")) == min(limit or 4, 4)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    line=st.one_of(
        st.binary(max_size=30),
        st.dictionaries(
            st.sampled_from(["question_id", "image", "text", "label"]),
            st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.just([])),
        ).map(lambda row: json.dumps(row).encode()),
    )
)
def test_whatever_a_file_holds_is_loaded_or_refused(folder, line):
    (folder / "tiny_pope_random.json").write_bytes(json.dumps(question(1)).encode() + b"\n" + line + b"\n")
    error = None
    try:
        rows = Counter(load_pope(folder)["category"])["random"]
    except ValueError as caught:
        error = str(caught)
    if error is None:
        assert rows == 1 + bool(line.decode().strip("\ufeff").strip())
    else:
        assert "tiny_pope_random.json" in error


PIECES = st.sampled_from(
    [json.dumps(question(1)), '{"question_id": 2', ', "image": "a.png"', "}", "\n", "\r", "\ufeff", "NaN"]
)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    content=st.one_of(st.binary(), st.lists(PIECES).map(lambda pieces: "".join(pieces).encode())), skip=st.booleans()
)
def test_any_file_is_valid_or_refused(folder, content, skip):
    (folder / "tiny_pope_random.json").write_bytes(content)
    error, skipped, rows = "", [], []
    try:
        rows = list(load_pope(folder, split="random", on_bad=skipped.append if skip else None))
    except ValueError as caught:
        error = str(caught)
    assert "tiny_pope_random.json" in error if error else rows
    for row in rows:
        assert list(row) == list(FEATURES)
        assert row["answer"] in ("yes", "no") and row["question"].strip() and row["image"].size == (20, 10)
    assert all(text.startswith("tiny_pope_random.json, row ") for text in skipped)


def hub_dataset(**changes) -> datasets.Dataset:
    rows = [
        {
            "id": str(number),
            "question_id": str(number),
            "question": "Is there a dog in the image?",
            "answer": "yes",
            "image_source": "COCO_val2014_000000310196",
            "image": Image.new("RGB", (8, 6)),
            "category": category,
        }
        for number, category in enumerate(["adversarial", "popular", "random"])
    ]
    rows[1].update(changes)
    return datasets.Dataset.from_list(rows)


def test_hub_dataset(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or hub_dataset())
    dataset = load_pope("lmms-lab/POPE")
    assert asked == [(("lmms-lab/POPE",), {"split": "test"})]
    assert dataset.column_names == list(FEATURES)
    assert list(dataset["category"]) == list(SPLITS)
    assert list(dataset["question_id"]) == ["2", "1", "0"]
    assert dataset[0]["image"].size == (8, 6)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_dataset_with_a_split_for_each_strategy(monkeypatch, streaming):
    asked = []

    def load_dataset(*args, split, **options):
        asked.append((*args, split, *options))
        part = hub_dataset().filter(lambda name: name == split, input_columns="category")
        return part.to_iterable_dataset() if streaming else part

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    dataset = load_pope("lmms-lab/POPE", config="Full", split=["adversarial", "random"], streaming=streaming)
    options = ["streaming"] * streaming
    assert asked == [("lmms-lab/POPE", "Full", split, *options) for split in ("random", "adversarial")]
    assert dataset.features == FEATURES
    assert [(row["category"], row["question_id"]) for row in dataset] == [("random", "2"), ("adversarial", "0")]
    assert [row["image"].size for row in dataset] == [(8, 6)] * 2


def test_hub_dataset_streamed(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: hub_dataset().to_iterable_dataset())
    dataset = load_pope("lmms-lab/POPE", config="default", streaming=True)
    assert [row["question_id"] for row in dataset] == ["2", "1", "0"]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: hub_dataset(answer="perhaps").to_iterable_dataset())
    with pytest.raises(ValueError, match="lmms-lab/POPE, row 2: label 'perhaps'"):
        list(load_pope("lmms-lab/POPE", streaming=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": None}, "lmms-lab/POPE, row 2: the picture is missing"),
        ({"image": Image.new("RGB", (9, 9))}, "lmms-lab/POPE, row 2: image_source 'COCO.*' is another picture"),
        ({"answer": "perhaps"}, "lmms-lab/POPE, row 2: label 'perhaps'"),
        ({"category": "easy"}, "lmms-lab/POPE, row 2: category 'easy'; allowed: random, popular, adversarial"),
        ({"category": "random"}, "lmms-lab/POPE: there are no questions of the split popular"),
    ],
)
def test_hub_dataset_that_is_refused(monkeypatch, changes, message):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: hub_dataset(**changes))
    with pytest.raises(ValueError, match=message):
        load_pope("lmms-lab/POPE")


def test_hub_dataset_without_a_column(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: hub_dataset().remove_columns("answer"))
    with pytest.raises(ValueError, match="the column 'answer' is missing"):
        load_pope("lmms-lab/POPE")


def test_hub_without_network():
    with pytest.raises(ConnectionError, match=r"lmms-lab/POPE cannot be loaded from the Hub: is there a network\?"):
        load_pope("lmms-lab/POPE")
