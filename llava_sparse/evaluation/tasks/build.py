"""Building POPE's questions from object annotations (arXiv 2305.10355, section 4)."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any, NamedTuple

from llava_sparse.evaluation.files import check_output, check_regular, is_text, json_lines, parse_json, show, write_file

from .pope import SPLITS

COCO_KEYS = ("images", "annotations", "categories")
ALLOWED = 'one {"image": ..., "objects": [{"name": ...}, "name"]} a line is allowed, or the instances of COCO'

# The names of the objects of every image.
Objects = Mapping[str, Sequence[str]]


class Built(NamedTuple):
    """What `write_pope` wrote.

    Attributes:
        files: one for each split.
        questions: in each of them.
        images: that they are about.
        skipped: images with too few objects, or with too few categories that are absent.
    """

    files: list[Path]
    questions: int
    images: int
    skipped: int


class Ranking:
    """Categories by frequency and by co-occurrence, over all images; ties by frequency, then by name.

    Attributes:
        frequent: all categories, the most frequent first. A category counts once for an image.
    """

    def __init__(self, objects: Objects) -> None:
        present = [sorted(set(names)) for names in objects.values()]
        images = Counter(name for names in present for name in names)
        self.frequent = sorted(images, key=lambda name: (-images[name], name))
        self._pairs = Counter(pair for names in present for pair in permutations(names, 2))

    def adversarial(self, asked: Sequence[str], absent: Sequence[str]) -> list[str]:
        """For each asked object the absent one that is most often in one image with it, none twice.

        Args:
            absent: in the order of `frequent`, as many as are asked or more.
        """
        chosen: list[str] = []
        for name in asked:
            left = [other for other in absent if other not in chosen]
            chosen.append(max(left, key=lambda other: self._pairs[name, other]))
        return chosen


def build_pope(
    objects: Objects,
    questions_per_image: int = 6,
    seed: int = 0,
    splits: Iterable[str] = SPLITS,
    min_objects: int | None = None,
    images_limit: int | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Asks for objects that are in an image, and for as many that are not.

    The absent ones are drawn uniformly (random), are the most frequent (popular), or follow each asked object as the
    one that is most often in one image with it (adversarial). An image's questions depend on its name, its objects and
    the seed, and in the last two splits on the statistics of all images.

    Args:
        objects: for every image, the names of its objects, repeated or not.
        questions_per_image: even; half of them are about objects that are in the image, the same in all splits.
        min_objects: distinct objects that an image needs; None: half of `questions_per_image`.
        images_limit: as many images, drawn with the seed; None: all that have enough objects.

    Returns:
        for every split, entries of the official files: question_id (from 1), image, text and label.

    Raises:
        ValueError: for invalid arguments, and if there are too few images with enough objects.
    """
    splits = list(splits)
    unknown = [split for split in splits if split not in SPLITS]
    if unknown or not splits:
        raise ValueError(f"splits={splits}: one or several of {', '.join(SPLITS)} are allowed.")
    half, odd = divmod(questions_per_image, 2)
    if odd or half < 1:
        raise ValueError(f"questions_per_image={questions_per_image}: an even number, at least 2, is allowed.")
    ranking = Ranking(objects)
    built: dict[str, list[dict[str, Any]]] = {split: [] for split in splits}
    for image in _drawn(objects, half, half if min_objects is None else min_objects, seed, images_limit):
        draws = random.Random(f"{seed}/{image}")
        present = sorted(set(objects[image]))
        asked = draws.sample(present, half)
        absent = [name for name in ranking.frequent if name not in present]
        absent_of = {
            "random": draws.sample(sorted(absent), half),
            "popular": absent[:half],
            "adversarial": ranking.adversarial(asked, absent),
        }
        for split in splits:
            for name, other in zip(asked, absent_of[split], strict=True):
                for thing, label in ((name, "yes"), (other, "no")):
                    number = len(built[split]) + 1
                    entry = {"question_id": number, "image": image, "text": question_about(thing), "label": label}
                    built[split].append(entry)
    return built


def question_about(name: str) -> str:
    """POPE's question; its article follows the first letter."""
    return f"Is there {'an' if name[0].lower() in 'aeiou' else 'a'} {name} in the image?"


def usable_images(objects: Objects, half: int, min_objects: int) -> list[str]:
    """The images that have `min_objects` distinct objects and lack `half` of all categories."""
    categories = len({name for names in objects.values() for name in names})
    distinct = {image: len(set(names)) for image, names in objects.items()}
    return [image for image, count in distinct.items() if min_objects <= count <= categories - half]


def _drawn(objects: Objects, half: int, min_objects: int, seed: int, limit: int | None) -> list[str]:
    """The images that are asked about, in the order of the annotations."""
    if min_objects < half:
        raise ValueError(f"min_objects={min_objects}: {half} or more are allowed, as many are asked for.")
    images = usable_images(objects, half, min_objects)
    if not images or (limit is not None and not 1 <= limit <= len(images)):
        raise ValueError(
            f"{len(images)} of {len(objects)} images have {min_objects} distinct objects and lack {half} of all "
            f"categories; {'at least 1 is' if limit is None else f'{limit} are'} needed."
        )
    drawn = set(images if limit is None else random.Random(seed).sample(sorted(images), limit))
    return [image for image in images if image in drawn]


def write_pope(
    annotations: str | Path,
    output: str | Path,
    questions_per_image: int = 6,
    images_limit: int | None = None,
    seed: int = 0,
) -> Built:
    """Builds POPE from a file of annotations, and writes `<its name>_pope_<split>.json` for every split.

    Args:
        annotations: as for `read_objects`.
        output: a folder; made if it does not exist.
        questions_per_image, images_limit, seed: as for `build_pope`.

    Raises:
        ValueError: for invalid annotations or arguments.
        OSError: for files that cannot be read or written.
    """
    annotations, output = Path(annotations), Path(output)
    objects = read_objects(annotations)
    built = build_pope(objects, questions_per_image, seed, images_limit=images_limit)
    half = questions_per_image // 2
    output.mkdir(parents=True, exist_ok=True)
    files = []
    for split, entries in built.items():
        file = output / f"{annotations.stem}_pope_{split}.json"
        check_output(file)
        write_file("".join(json.dumps(entry) + "\n" for entry in entries), file)
        files.append(file)
    questions = len(built[SPLITS[0]])
    skipped = len(objects) - len(usable_images(objects, half, half))
    return Built(files, questions, questions // questions_per_image, skipped)


def read_objects(file: str | Path) -> dict[str, list[str]]:
    """The names of the objects of every image, from JSON lines or from COCO's instances.

    Args:
        file: one `{"image": "a.jpg", "objects": [{"name": "cat"}]}` a line, or POPE's own `"objects": ["cat"]`; or one
            object with images, annotations and categories. Crowds count as objects; images without objects are there,
            too.

    Raises:
        ValueError: for anything else, naming file and row.
        OSError: if the file cannot be read.
    """
    file = Path(file)
    check_regular(file)
    try:
        whole = parse_json(file.read_text(encoding="utf-8-sig"))
    except ValueError:
        whole = None
    objects = _from_coco(whole, file.name) if _is_coco(whole) else _from_lines(file)
    if not objects:
        raise ValueError(f"{file.name}: there are no images; {ALLOWED}.")
    return objects


def _is_coco(content: Any) -> bool:
    return isinstance(content, dict) and any(key in content for key in COCO_KEYS)


def _from_lines(file: Path) -> dict[str, list[str]]:
    objects: dict[str, list[str]] = {}
    for where, entry in json_lines(file):
        image = _field(entry, "image", str, where)
        if image in objects:
            raise ValueError(f"{where}: image {show(image)} is there already; each is allowed once.")
        things = _field(entry, "objects", list, where)
        named = [{"name": thing} if isinstance(thing, str) else thing for thing in things]
        objects[image] = [_field(thing, "name", str, where) for thing in named]
    return objects


def _from_coco(content: dict[str, Any], what: str) -> dict[str, list[str]]:
    images = _by_id(content, "images", "file_name", what)
    names = _by_id(content, "categories", "name", what)
    objects: dict[str, list[str]] = {image: [] for image in images.values()}
    for number, entry in enumerate(_field(content, "annotations", list, what), start=1):
        where = f"{what}, annotations {number}"
        image, category = _field(entry, "image_id", int, where), _field(entry, "category_id", int, where)
        if image not in images or category not in names:
            raise ValueError(f"{where}: there is no image {image} or no category {category} in this file.")
        objects[images[image]].append(names[category])
    return objects


def _by_id(content: dict[str, Any], key: str, column: str, what: str) -> dict[int, str]:
    found: dict[int, str] = {}
    names: set[str] = set()
    for number, entry in enumerate(_field(content, key, list, what), start=1):
        where = f"{what}, {key} {number}"
        identity, name = _field(entry, "id", int, where), _field(entry, column, str, where)
        if identity in found or name in names:
            raise ValueError(f"{where}: the id {identity} or the {column} {show(name)} is there already.")
        found[identity] = name
        names.add(name)
    return found


def _field(entry: Any, key: str, kind: type, where: str) -> Any:
    """A value of an entry, which is of a type; text without blanks around it."""
    value = entry.get(key) if isinstance(entry, dict) else None
    if type(value) is not kind or (isinstance(value, str) and not (is_text(value) and value == value.strip())):
        raise ValueError(f"{where}: {key} {show(value)}: {ALLOWED}.")
    return value
