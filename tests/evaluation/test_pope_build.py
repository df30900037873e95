"""Building POPE from object annotations: what can be counted in the official files holds for what is built."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llava_sparse import cli
from llava_sparse.evaluation import load_pope
from llava_sparse.evaluation.tasks.build import Ranking, build_pope, question_about, read_objects, write_pope
from llava_sparse.evaluation.tasks.pope import SPLITS
from llava_sparse.reference import SCENES

OFFICIAL = Path(__file__).parents[1] / "data" / "pope"
SCENE_OBJECTS = SCENES / "objects.jsonl"
Entries = dict[str, list[dict]]


def read_splits(folder: Path, name: str) -> Entries:
    return {s: [json.loads(line) for line in (folder / f"{name}_pope_{s}.json").open()] for s in SPLITS}


def kitchens_and_streets(images: int = 500, categories: int = 80) -> dict[str, list[str]]:
    """Objects of images in four themes, as frequent as Zipf has it, some of them repeated."""
    draws = random.Random(7)
    names = [f"{'aeiou'[n % 5] if n % 7 == 0 else 'k'}-thing {n}" for n in range(categories)]
    objects = {}
    for image in range(images):
        weights = [(4 if n % 4 == image % 4 else 0.5) / (n + 2) for n in range(categories)]
        drawn = draws.choices(names, weights, k=draws.randint(6, 12))
        objects[f"image {image:03}.jpg"] = [*drawn, "k-thing 1", "a-thing 0", "k-thing 2"]
    return objects


def thing(entry: dict) -> str:
    words = entry["text"].removeprefix("Is there a").removesuffix(" in the image?")
    return words.removeprefix("n").strip() if words.startswith("n ") else words.strip()


def asked(entries: list[dict], label: str) -> list[tuple[str, str]]:
    return [(entry["image"], thing(entry)) for entry in entries if entry["label"] == label]


@pytest.fixture(scope="module")
def synthetic() -> tuple[dict[str, list[str]], Entries]:
    objects = kitchens_and_streets()
    return objects, build_pope(objects)


@pytest.fixture(scope="module")
def scenes() -> tuple[dict[str, list[str]], Entries]:
    objects = read_objects(SCENE_OBJECTS)
    return objects, build_pope(objects)


@pytest.fixture(params=["official extract", "reference files", "synthetic", "reference scenes"])
def entries(request) -> Entries:
    if request.param == "official extract":
        return read_splits(OFFICIAL, "coco")
    if request.param == "reference files":
        return read_splits(SCENES, "scenes")
    return request.getfixturevalue(request.param.split()[-1])[1]


def test_what_can_be_counted_in_the_official_files(entries):
    """The same facts hold for POPE's own files and for what is built here."""
    images = list(dict.fromkeys(entry["image"] for entry in entries["random"]))
    for rows in entries.values():
        assert [list(row) for row in rows] == [["question_id", "image", "text", "label"]] * len(rows)
        assert [row["question_id"] for row in rows] == list(range(1, 6 * len(images) + 1))
        assert [row["image"] for row in rows] == [image for image in images for _ in range(6)]
        assert [row["label"] for row in rows] == ["yes", "no"] * (3 * len(images))
        assert all(row["text"] == question_about(thing(row)) for row in rows)
        assert len({(row["image"], row["text"]) for row in rows}) == len(rows)
    assert asked(entries["random"], "yes") == asked(entries["popular"], "yes") == asked(entries["adversarial"], "yes")
    absent = {split: Counter(name for _, name in asked(rows, "no")) for split, rows in entries.items()}
    assert len(absent["popular"]) < len(absent["adversarial"]) < len(absent["random"])
    # In the official files three categories are three quarters of the popular negatives.
    assert sum(count for _, count in absent["popular"].most_common(3)) > 0.6 * absent["popular"].total()


@pytest.mark.parametrize(("built", "images"), [("synthetic", 500), ("scenes", 200)])
def test_labels_are_those_of_the_annotations(request, built, images):
    objects, entries = request.getfixturevalue(built)
    assert len({entry["image"] for entry in entries["random"]}) == images
    for rows in entries.values():
        assert len(rows) == 6 * images
        assert all((thing(row) in objects[row["image"]]) == (row["label"] == "yes") for row in rows)


@pytest.mark.parametrize("built", ["synthetic", "scenes"])
def test_adversarial_objects_occur_with_the_asked_one(request, built):
    objects, entries = request.getfixturevalue(built)
    together = Counter((a, b) for names in objects.values() for a in set(names) for b in set(names))

    def mean(split: str) -> float:
        pairs = zip(asked(entries[split], "yes"), asked(entries[split], "no"), strict=True)
        counts = [together[present, absent] for (_, present), (_, absent) in pairs]
        return sum(counts) / len(counts)

    assert mean("adversarial") > mean("popular") > 2 * mean("random")


def test_random_objects_are_uniform(synthetic):
    """Over 500 images every category comes up about as often as it is absent."""
    objects, entries = synthetic
    drawn = Counter(name for _, name in asked(entries["random"], "no"))
    categories = {name for names in objects.values() for name in names}
    expected = dict.fromkeys(categories, 0.0)
    for names in objects.values():
        absent = categories - set(names)
        for name in absent:
            expected[name] += 3 / len(absent)
    squares = sum((drawn[name] - mean) ** 2 / mean for name, mean in expected.items() if mean)
    assert squares < 1.5 * len(categories)


def test_reference_files_follow_the_same_strategies():
    """From the reference files' own positives, our rules give their negatives; two of 1,200 are ties."""
    objects = read_objects(SCENE_OBJECTS)
    entries = read_splits(SCENES, "scenes")
    ranking = Ranking(objects)
    expected: dict[str, list[tuple[str, str]]] = {"popular": [], "adversarial": []}
    positives = asked(entries["random"], "yes")
    for start in range(0, len(positives), 3):
        image = positives[start][0]
        absent = [name for name in ranking.frequent if name not in objects[image]]
        present = [name for _, name in positives[start : start + 3]]
        expected["popular"] += [(image, name) for name in absent[:3]]
        expected["adversarial"] += [(image, name) for name in ranking.adversarial(present, absent)]
    assert expected["popular"] == asked(entries["popular"], "no")
    same = [a == b for a, b in zip(expected["adversarial"], asked(entries["adversarial"], "no"), strict=True)]
    assert same.count(False) == 2


def test_popular_and_adversarial_by_hand():
    objects = {"1": ["cat", "dog"], "2": ["cat", "dog", "owl"], "3": ["cat", "owl"], "4": ["ant", "cat", "owl"]}
    objects |= {"5": ["bee", "dog"]}
    assert Ranking(objects).frequent == ["cat", "dog", "owl", "ant", "bee"]
    entries = build_pope(objects, questions_per_image=4)
    negatives = {split: [name for image, name in asked(rows, "no") if image == "5"] for split, rows in entries.items()}
    assert negatives["popular"] == ["cat", "owl"]
    # `dog` is with `cat` twice and with `owl` once; `bee` is with `dog` alone, so that frequency decides.
    assert negatives["adversarial"] == ["cat", "owl"]
    third = [name for image, name in asked(entries["adversarial"], "no") if image == "3"]
    assert third == ["dog", "ant"]


def test_article_follows_the_first_letter():
    assert question_about("umbrella") == "Is there an umbrella in the image?"
    assert question_about("Orange") == "Is there an Orange in the image?"
    assert question_about("traffic light") == "Is there a traffic light in the image?"


def digest(entries: Entries) -> str:
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]


def test_same_seed_same_questions(synthetic):
    """The digest was recorded in another process: it would change with the order of a set."""
    objects, entries = synthetic
    assert digest(entries) == "decea1d0564c82f6"
    shuffled = {image: random.Random(image).sample(names, len(names)) for image, names in objects.items()}
    assert build_pope(shuffled) == entries
    assert build_pope(objects, seed=1) != entries
    assert asked(build_pope(objects, seed=1)["random"], "yes") != asked(entries["random"], "yes")


def test_questions_of_an_image_do_not_depend_on_which_others_are_asked_about(synthetic):
    objects, entries = synthetic
    few = build_pope(objects, images_limit=20)
    images = {entry["image"] for entry in few["random"]}
    assert len(images) == 20
    assert images != set(list(objects)[:20])
    for split in SPLITS:
        assert asked(few[split], "no") == [pair for pair in asked(entries[split], "no") if pair[0] in images]


@pytest.mark.parametrize("questions", [2, 4, 10])
def test_as_many_questions_as_asked(synthetic, questions):
    objects, _ = synthetic
    usable = sum(len(set(names)) >= questions // 2 for names in objects.values())
    for rows in build_pope(objects, questions).values():
        assert len(rows) == questions * usable
        assert len({(row["image"], row["text"]) for row in rows}) == len(rows)


def test_images_with_few_objects_are_left_out():
    objects = {"few": ["cat", "cat"], "none": [], "all": list("abcde"), "some": ["a", "b"], "more": ["a", "b", "cat"]}
    entries = build_pope(objects, questions_per_image=4)
    assert list(dict.fromkeys(row["image"] for row in entries["popular"])) == ["some", "more"]
    only = build_pope(objects, questions_per_image=4, min_objects=3, splits=["popular"])
    assert list(only) == ["popular"]
    assert {row["image"] for row in only["popular"]} == {"more"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"questions_per_image": 5}, "questions_per_image=5: an even number, at least 2, is allowed"),
        ({"questions_per_image": 0}, "questions_per_image=0: an even number"),
        (
            {"questions_per_image": 40},
            "0 of 200 images have 20 distinct objects and lack 20 of all categories; at least",
        ),
        ({"min_objects": 2}, "min_objects=2: 3 or more are allowed"),
        ({"images_limit": 201}, "200 of 200 images have 3 distinct objects .*; 201 are needed"),
        ({"images_limit": 0}, "; 0 are needed"),
        ({"splits": ["easy"]}, r"splits=\['easy'\]: one or several of random, popular, adversarial are allowed"),
        ({"splits": []}, r"splits=\[\]: one or several"),
    ],
)
def test_refused_settings(scenes, settings, message):
    with pytest.raises(ValueError, match=message):
        build_pope(scenes[0], **settings)


def coco(objects: dict[str, list[str]]) -> dict:
    names = sorted({name for found in objects.values() for name in found})
    return {
        "info": {"year": 2014},
        "images": [{"id": 10 * n, "file_name": image, "width": 5} for n, image in enumerate(objects)],
        "categories": [{"id": n, "name": name, "supercategory": "thing"} for n, name in enumerate(names)],
        "annotations": [
            {"id": 1, "image_id": 10 * n, "category_id": names.index(name), "bbox": [0, 0, 1, 1], "iscrowd": 1}
            for n, found in enumerate(objects.values())
            for name in found
        ],
    }


def test_coco_instances(tmp_path):
    objects = {"a.jpg": ["dog", "cat", "dog"], "empty.jpg": [], "b.jpg": ["owl"]}
    file = tmp_path / "instances.json"
    for indent in (None, 1):
        file.write_text(json.dumps(coco(objects), indent=indent), encoding="utf-8-sig")
        assert read_objects(file) == objects
    lines = tmp_path / "lines.json"
    rows = [
        {"image": image, "objects": [{"name": name, "box": []} for name in names]} for image, names in objects.items()
    ]
    lines.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    assert read_objects(lines) == objects


CAT = '{"image": "a.jpg", "objects": [{"name": "cat"}]}'


@pytest.mark.parametrize("array", [False, True])
def test_objects_as_popes_own_files_have_them(tmp_path, array):
    """`coco_ground_truth_segmentation.json`: names alone."""
    rows = [{"image": "a.jpg", "objects": ["cat", "dining table", "cat"]}, {"image": "b.jpg", "objects": []}]
    text = json.dumps(rows) if array else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "x.json").write_text(text)
    assert read_objects(tmp_path / "x.json") == {"a.jpg": ["cat", "dining table", "cat"], "b.jpg": []}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there are no images"),
        ("[1]", r"row 1: image None: one \{.*\} a line is allowed, or the instances of COCO"),
        (CAT + "\n{", "row 2: invalid JSON"),
        (CAT + "\n" + CAT, "row 2: image 'a.jpg' is there already"),
        ('{"image": "", "objects": []}', "row 1: image ''"),
        ('{"image": "a.jpg", "objects": {}}', "row 1: objects {}"),
        ('{"image": "a.jpg", "objects": [3]}', "row 1: name None"),
        ('{"image": "a.jpg", "objects": [{"name": " cat"}]}', "row 1: name ' cat'"),
        ('{"image": "a.jpg", "objects": [{"name": NaN}]}', "row 1: name nan"),
        ('{"images": [], "annotations": [], "categories": []}', "there are no images"),
        ('{"images": [], "annotations": []}', ": categories None"),
        ('{"images": [{"id": 1}], "annotations": [], "categories": []}', "images 1: file_name None"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "categories 2: the id 1 or the name 'b' is there already",
        ),
        (
            '{"images": [], "annotations": [{"image_id": 1, "category_id": 2}], "categories": []}',
            "annotations 1: there is no image 1 or no category 2",
        ),
    ],
)
def test_refused_annotations(tmp_path, text, message):
    (tmp_path / "objects.json").write_text(text)
    with pytest.raises(ValueError, match=f"objects.json.*{message}"):
        read_objects(tmp_path / "objects.json")


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(lambda text: (CAT + text).encode())))
def test_whatever_annotations_hold_is_read_or_refused(tmp_path, content):
    (tmp_path / "objects.json").write_bytes(content)
    error = ""
    try:
        objects = read_objects(tmp_path / "objects.json")
    except ValueError as caught:
        error = str(caught)
    assert "objects.json" in error if error else objects


def test_written_files_are_loaded_again(tmp_path):
    built = write_pope(SCENE_OBJECTS, tmp_path / "new" / "folder", questions_per_image=10)
    assert [file.name for file in built.files] == [f"objects_pope_{split}.json" for split in SPLITS]
    assert 0 < built.images < 200
    assert built.images + built.skipped == 200
    dataset = load_pope(annotations=tmp_path / "new" / "folder", images=SCENES / "images")
    assert len(dataset) == 3 * built.questions == 30 * built.images
    assert Counter(dataset["answer"]) == dict.fromkeys(("yes", "no"), 15 * built.images)


def test_command(tmp_path, capsys):
    arguments = ["pope-build", "--objects", str(SCENE_OBJECTS), "--output", str(tmp_path), "--images-limit", "50"]
    with pytest.raises(SystemExit) as code:
        cli.main([*arguments, "--questions", "8", "--seed", "3"])
    assert code.value.code == 0
    out, err = capsys.readouterr()
    assert out.split() == [str(tmp_path / f"objects_pope_{split}.json") for split in SPLITS]
    assert err == (
        "400 questions a file about 50 images; 57 images skipped: fewer than 4 distinct objects, or than 4 absent "
        "categories.\n"
    )
    objects = read_objects(SCENE_OBJECTS)
    assert read_splits(tmp_path, "objects") == build_pope(objects, 8, seed=3, images_limit=50)
    with pytest.raises(SystemExit) as code:
        cli.main([*arguments, "--questions", "7"])
    assert code.value.code == 1
    assert capsys.readouterr().err.startswith("llava-sparse: error: questions_per_image=7: an even number")
