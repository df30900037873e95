"""Where POPE's questions come from: one schema for every source, and which of them are chosen."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pope_tables import columns, encoded, stored_as, table, with_metadata

from llava_sparse.evaluation import load_pope
from llava_sparse.evaluation.tasks import rows
from llava_sparse.evaluation.tasks.pope import DROPPED_BY_LLAVA, FEATURES, SPLITS

OFFICIAL = Path(__file__).parents[1] / "data" / "pope"


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def rows_of(dataset: datasets.Dataset | datasets.IterableDataset) -> list[dict]:
    return [{**row, "image": (row["image"].size, row["image"].convert("RGB").tobytes())} for row in dataset]


@pytest.mark.parametrize("kind", ["saved", "saved splits", "parquet", "jsonl", "csv"])
def test_one_schema_for_all_sources(tmp_path, kind):
    source = stored_as(kind, tmp_path / "stored [x]")
    dataset = load_pope(source)
    assert dataset.features == FEATURES
    expected = columns()
    order = [4, 5, 2, 3, 0, 1]  # as SPLITS
    for column in ("question_id", "question", "answer", "image_source", "category"):
        assert list(dataset[column]) == [expected[column][row] for row in order]
    assert rows_of(dataset)[0]["image"] == ((8, 6), Image.new("RGB", (8, 6), "red").tobytes())

    streamed = load_pope(source, streaming=True)
    assert isinstance(streamed, datasets.IterableDataset)
    assert streamed.features == FEATURES
    assert [list(row) for row in streamed] == [list(FEATURES)] * 6
    assert rows_of(streamed) == rows_of(dataset)
    assert rows_of(load_pope(source, 1, streaming=True)) == rows_of(load_pope(source, 1))
    assert list(load_pope(source, split="popular")["category"]) == ["popular"] * 2


def test_parquet_file(tmp_path):
    table().to_parquet(tmp_path / "questions.parquet")
    assert len(load_pope(tmp_path / "questions.parquet")) == 6


def test_pictures_stay_undecoded(tmp_path):
    stored = load_pope(stored_as("saved", tmp_path / "x")).cast_column("image", datasets.Image(decode=False))
    assert stored[0]["image"]["bytes"] == encoded()


def test_annotations_beside_a_folder_of_pictures(tmp_path):
    names = {json.loads(line)["image"] for line in (OFFICIAL / "coco_pope_random.json").open()}
    (tmp_path / "val2014").mkdir()
    for name in names:
        Image.new("RGB", (8, 8)).save(tmp_path / "val2014" / name)
    (tmp_path / "link").symlink_to(tmp_path / "val2014")
    dataset = load_pope(annotations=OFFICIAL, images=tmp_path / "link")
    assert Counter(dataset["category"]) == dict.fromkeys(SPLITS, 60)
    assert rows_of(load_pope(annotations=OFFICIAL, images=tmp_path / "val2014", streaming=True)) == rows_of(dataset)
    name = sorted(names)[0]
    (tmp_path / "val2014" / name).unlink()
    with pytest.raises(
        ValueError, match=f"coco_pope_random.json, row [0-9]+: image '{name}' does not exist in .*val2014"
    ):
        load_pope(annotations=OFFICIAL, images=tmp_path / "val2014")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"annotations": OFFICIAL}, "both folders are needed, or neither"),
        ({"images": OFFICIAL}, "both folders are needed, or neither"),
        ({"source": "x", "annotations": OFFICIAL, "images": OFFICIAL}, "source='x': one of the two is allowed"),
        ({"config": "Full"}, "config='Full': only lmms-lab/POPE has configurations"),
        ({"source": "lmms-lab/POPE", "config": "full"}, "config='full': .* has the configurations default and Full"),
        ({"split": "easy"}, "split='easy': one or several of random, popular, adversarial are allowed"),
        ({"split": []}, r"split=\[\]: one or several"),
        ({"variant": "9000"}, "variant='9000': '8910' is allowed"),
        (
            {"variant": "8910"},
            "scenes_pope_random.json: variant='8910' is known for the official questions .* COCO only",
        ),
        ({"variant": "8910", "split": "popular"}, "drops questions of the split random, which is not loaded"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_pope(**arguments)


def test_refused_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="there are no questions in this folder; a dataset is 'reference'"):
        load_pope(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_pope(annotations=OFFICIAL, images=tmp_path / "nowhere")
    with_metadata(tmp_path, "jsonl", table().to_list())
    (tmp_path / "metadata.csv").touch()
    with pytest.raises(ValueError, match=r"there are both .* one is allowed"):
        load_pope(tmp_path)


def test_splits_come_in_one_order():
    assert list(dict.fromkeys(load_pope(split=["adversarial", "random"])["category"])) == ["random", "adversarial"]
    dataset = load_pope(limit=5, split="popular")
    assert list(dataset["category"]) == ["popular"] * 5
    popular = load_pope(limit=5).filter(lambda name: name == "popular", input_columns="category")
    assert rows_of(dataset) == rows_of(popular)


@pytest.mark.parametrize(
    ("text", "split", "expected"),
    [
        ("12\n", None, {"random": [12], "popular": [12], "adversarial": [12]}),
        ("12\n", "popular", {"popular": [12]}),
        ("\ufeffrandom/3\r\nrandom 2\r\n\r\npopular\t7", None, {"random": [2, 3], "popular": [7]}),
        ("adversarial/1200\n1", ["random", "adversarial"], {"random": [1], "adversarial": [1, 1200]}),
    ],
)
def test_ids(tmp_path, text, split, expected):
    (tmp_path / "ids.txt").write_bytes(text.encode())
    dataset = load_pope(ids=tmp_path / "ids.txt", split=split)
    found: dict[str, list[int]] = {}
    for category, number in zip(dataset["category"], dataset["question_id"], strict=True):
        found.setdefault(category, []).append(int(number))
    assert found == expected
    assert rows_of(load_pope(ids=tmp_path / "ids.txt", split=split, streaming=True)) == rows_of(dataset)


def test_as_many_ids_as_the_study(tmp_path):
    """Ids of three splits in any order; limit and split act on what they leave."""
    ids = [f"{split}/{n}" for split, count in zip(SPLITS, (275, 274, 274), strict=True) for n in range(1, 4 * count, 4)]
    (tmp_path / "ids.txt").write_text("\n".join(reversed(ids)))
    counts = Counter(load_pope(ids=tmp_path / "ids.txt")["category"])
    assert counts == {"random": 275, "popular": 274, "adversarial": 274}
    dataset = load_pope(limit=10, ids=tmp_path / "ids.txt")
    assert len(dataset) == 30
    assert {int(number) % 4 for number in dataset["question_id"]} == {1}


@pytest.mark.parametrize(
    ("text", "split", "message"),
    [
        ("1201", None, "row 1: question_id '1201' is not among the valid questions of random, popular, adversarial"),
        ("1\nrandom/1201", None, "row 2: question_id '1201' is not among the valid questions of the split random"),
        ("random/1", "popular", "row 1: question_id '1' .* the split random, which is not loaded"),
        ("1\n2\n1", None, "row 3: question_id '1' of the split random is listed in row 1 already"),
        ("popular 4\n4", None, "row 2: question_id '4' of the split popular is listed in row 1 already"),
        ("random/1", ["random", "popular"], "there are no ids of the split popular, which was asked for"),
        ("\n\n", None, "there are no ids; one a line is allowed"),
        ("\udce9", None, "the file is not UTF-8 text"),
    ],
)
def test_refused_ids(tmp_path, text, split, message):
    (tmp_path / "ids.txt").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=f"ids.txt.*{message}"):
        load_pope(ids=tmp_path / "ids.txt", split=split)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.one_of(st.binary(max_size=20), st.text("random/12 \n", max_size=20).map(str.encode)))
def test_whatever_a_file_of_ids_holds(tmp_path, content):
    source = stored_as("jsonl", tmp_path / "x") if not (tmp_path / "x").exists() else tmp_path / "x"
    (tmp_path / "ids.txt").write_bytes(content)
    error = ""
    try:
        rows = len(load_pope(source, ids=tmp_path / "ids.txt"))
    except ValueError as caught:
        error = str(caught)
    lines = len(content.decode().split()) if not error else 0
    assert "ids.txt" in error if error else 0 < rows <= 3 * lines


@pytest.mark.parametrize("suffix", [".jpg", ""])
def test_the_questions_that_the_scripts_of_llava_score(tmp_path, suffix):
    dropped = [json.loads(line) for line in (OFFICIAL / "dropped_by_llava.json").open()]
    assert len(dropped) == len(DROPPED_BY_LLAVA.split()) == 90
    assert {entry["label"] for entry in dropped} == {"no"}
    kept = [
        {**entry, "question_id": entry["question_id"] - 1, "text": "Is it kept?", "label": "yes"} for entry in dropped
    ]
    (tmp_path / "images").mkdir()
    for split in SPLITS:
        entries = sorted([*dropped, *kept], key=lambda entry: entry["question_id"])
        entries = [{**entry, "image": entry["image"].removesuffix(".jpg") + suffix} for entry in entries]
        for entry in entries:
            Image.new("RGB", (2, 2)).save(tmp_path / "images" / entry["image"], "JPEG")
        (tmp_path / f"coco_pope_{split}.json").write_text("\n".join(json.dumps(entry) for entry in entries))
    dataset = load_pope(tmp_path, variant="8910")
    assert Counter(dataset["category"]) == {"random": 90, "popular": 180, "adversarial": 180}
    assert set(dataset[:90]["question"]) == {"Is it kept?"}
    assert len(load_pope(tmp_path, 50, variant="8910")) == 150
    assert len(list(load_pope(tmp_path, variant="8910", split="random", streaming=True))) == 90
    (tmp_path / "ids.txt").write_text(f"random/{dropped[0]['question_id']}")
    with pytest.raises(ValueError, match="is not among the valid questions of the split random"):
        load_pope(tmp_path, variant="8910", ids=tmp_path / "ids.txt")


def test_streaming_looks_at_a_row_when_it_is_drawn(tmp_path, monkeypatch):
    decoded = []
    read = rows.read_picture
    monkeypatch.setattr(rows, "read_picture", lambda picture, *name: decoded.append(picture) or read(picture))
    source = with_metadata(
        tmp_path / "x", "jsonl", [*table().to_list(), {**table()[5], "question_id": "3", "answer": "?"}]
    )
    Image.new("RGB", (8, 6)).save(source / "sub" / "b.png")
    stream = iter(load_pope(source, streaming=True))
    assert decoded == []
    assert [next(stream)["question_id"], next(stream)["question_id"]] == ["1", "2"]
    assert len(decoded) == 1
    with pytest.raises(ValueError, match=r"metadata.jsonl, row 7: label '\?' is neither"):
        next(stream)


def test_other_types_of_the_same_content(tmp_path):
    """Numbers as ids, bare bytes as pictures, and one picture in two formats."""
    content = [encoded()] * 5 + [encoded(kind="BMP")]
    pq.write_table(pa.table(columns(question_id=[1, 2] * 3, image=content)), tmp_path / "x.parquet")
    dataset = load_pope(tmp_path)
    assert dataset.features == FEATURES
    assert list(dataset["question_id"]) == ["1", "2"] * 3
    assert rows_of(load_pope(tmp_path, streaming=True)) == rows_of(dataset)


@pytest.mark.parametrize("form", ["lines", "array", "indented array"])
def test_all_nine_official_files(tmp_path, form):
    """Three sets of pictures, three splits; A-OKVQA's and GQA's have "seem" in their names; arrays as well as lines."""
    Image.new("RGB", (8, 6), "red").save(tmp_path / "a.png")
    for name in ("coco_pope", "aokvqa_pope_seem", "gqa_pope_seem"):
        for number, split in enumerate(SPLITS):
            rows = [
                {"question_id": n, "image": "a.png", "text": f"Is there a {name}{number} in the image?", "label": label}
                for n, label in enumerate(("yes", "no"))
            ]
            text = "\n".join(map(json.dumps, rows))
            if form != "lines":
                text = json.dumps(rows, indent=None if form == "array" else 4)
            (tmp_path / f"{name}_{split}.json").write_text(text)
    for config, name in (("coco", "coco_pope"), ("aokvqa", "aokvqa_pope_seem"), ("gqa", "gqa_pope_seem")):
        found = load_pope(annotations=tmp_path, images=tmp_path, config=config)
        assert found["category"] == [split for split in SPLITS for _ in range(2)]
        assert set(found["question"]) == {f"Is there a {name}{number} in the image?" for number in range(3)}
    with pytest.raises(ValueError, match=r"both the split random; one is allowed, or config='aokvqa'"):
        load_pope(annotations=tmp_path, images=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no vqa_pope_random\.json"):
        load_pope(annotations=tmp_path, images=tmp_path, config="vqa")
