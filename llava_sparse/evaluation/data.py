"""POPE's questions as a `datasets.Dataset`, from a folder or from the Hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from llava_sparse.reference import SCENES

SPLITS = ("random", "popular", "adversarial")
HUB_DATASET = "lmms-lab/POPE"
# The columns of the dataset on the Hub, which a folder's questions are brought to.
FEATURES = datasets.Features(
    {
        "question_id": datasets.Value("string"),
        "question": datasets.Value("string"),
        "answer": datasets.Value("string"),
        "image_source": datasets.Value("string"),
        "image": datasets.Image(),
        "category": datasets.Value("string"),
    }
)
KEYS = ("question_id", "image", "text", "label")

# A question, and where it stands: `file, row 3`.
Located = tuple[str, dict[str, Any]]


def load_pope(source: str | Path = "reference", limit: int | None = None) -> datasets.Dataset:
    """Loads POPE's questions.

    Args:
        source: `"reference"` (the embedded scenes), `"lmms-lab/POPE"` (from the Hub), or a folder with `images/` and
            `*_pope_random.json`, `*_pope_popular.json`, `*_pope_adversarial.json`, one JSON object a line with
            `question_id`, `image`, `text` and `label`.
        limit: questions per split, spread evenly over the file and over both labels; None or more than there are: all.

    Returns:
        Questions with columns question_id, question, answer ("yes" or "no"), image_source, image (decoded when it is
        accessed) and category (the split), in the order of `SPLITS`.

    Raises:
        ValueError: for invalid data, naming file and row, and for a limit below 1.
        FileNotFoundError: if the folder or one of its files does not exist.
        ConnectionError: if the Hub cannot be reached.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: a positive number of questions per split is allowed.")
    folder = SCENES if source == "reference" else Path(source)
    dataset = _from_hub() if source == HUB_DATASET else _from_folder(folder)
    if limit is None:
        return dataset
    categories, answers = list(dataset["category"]), list(dataset["answer"])
    chosen: list[int] = []
    for split in SPLITS:
        rows = [row for row, category in enumerate(categories) if category == split]
        chosen += [rows[i] for i in _spread([answers[row] for row in rows], limit)]
    return dataset.select(chosen)


def _spread(labels: list[str], limit: int) -> list[int]:
    """`limit` positions, half of each label as far as there are so many, evenly spread; ascending."""
    yes = [i for i, label in enumerate(labels) if label == "yes"]
    no = [i for i, label in enumerate(labels) if label == "no"]
    limit = min(limit, len(labels))
    n_yes = min(len(yes), max((limit + 1) // 2, limit - len(no)))
    return sorted(rows[k * len(rows) // n] for rows, n in ((yes, n_yes), (no, limit - n_yes)) for k in range(n))


def _from_folder(folder: Path) -> datasets.Dataset:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder}: no such folder; a dataset is 'reference', '{HUB_DATASET}' or a folder with images/ and "
            "*_pope_{random,popular,adversarial}.json."
        )
    images: dict[str, Path] = {}
    questions: list[dict[str, Any]] = []
    for split in SPLITS:
        file = _question_file(folder, split)
        for where, row in _checked(_read_lines(file, split), file.name):
            name = row["image_source"]
            if name not in images:
                images[name] = _image_file(folder, name, where)
            questions.append({**row, "image": str(images[name])})
    return datasets.Dataset.from_list(questions, features=FEATURES).select_columns(list(FEATURES))


def _question_file(folder: Path, split: str) -> Path:
    files = sorted(folder.glob(f"*_pope_{split}.json"))
    if not files:
        raise FileNotFoundError(f"{folder}: there is no *_pope_{split}.json (needed: {', '.join(SPLITS)}).")
    if len(files) > 1:
        raise ValueError(f"{folder}: {files[0].name} and {files[1].name} are both the split {split}; one is allowed.")
    return files[0]


def _read_lines(file: Path, split: str) -> Iterator[Located]:
    """The questions of a file in the columns of `FEATURES`, without image."""
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file.name}: the file is not UTF-8 text ({error.reason} at byte {error.start}).") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file.name}, row {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: invalid JSON ({error}); one object a line is allowed.") from error
        for key in KEYS:
            if not isinstance(row, dict) or key not in row:
                raise ValueError(f"{where}: {key!r} is missing; an object with {', '.join(KEYS)} is allowed.")
        yield (
            where,
            {
                "question_id": str(row["question_id"]) if type(row["question_id"]) is int else row["question_id"],
                "question": row["text"],
                "answer": row["label"],
                "image_source": row["image"],
                "category": split,
            },
        )


def _checked(rows: Iterable[Located], what: str) -> Iterator[Located]:
    """Passes valid questions on, and refuses an empty set and ids that repeat within a split."""
    first: dict[tuple[str, str], str] = {}
    for where, row in rows:
        for column in ("question_id", "question", "image_source"):
            if not _is_text(row[column]):
                raise ValueError(f"{where}: {column} {row[column]!r}: text that is not empty is allowed.")
        if row["answer"] not in ("yes", "no"):
            raise ValueError(f"{where}: label {row['answer']!r} is neither of the allowed 'yes' and 'no'.")
        if row["category"] not in SPLITS:
            raise ValueError(f"{where}: category {row['category']!r}; allowed: {', '.join(SPLITS)}.")
        key = (row["category"], row["question_id"])
        if key in first:
            raise ValueError(f"{where}: question_id {key[1]} is already that of {first[key]}; each id is allowed once.")
        first[key] = where
        yield where, row
    if not first:
        raise ValueError(f"{what}: there are no questions; at least one in each split is needed.")


def _is_text(value: object) -> bool:
    """Whether `value` is a non-empty string that UTF-8 can express (JSON allows others)."""
    try:
        return isinstance(value, str) and bool(value.strip().encode())
    except UnicodeEncodeError:
        return False


def _image_file(folder: Path, name: str, where: str) -> Path:
    """The file of an image, which lies inside the folder, exists and can be decoded."""
    root = folder.resolve()
    try:
        file = (root / "images" / name).resolve()
        inside = file.is_relative_to(root / "images")
        exists = inside and file.is_file()
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{where}: image {name!r} is no file name that is allowed ({error}).") from error
    if not inside:
        raise ValueError(f"{where}: image {name!r} leaves {folder / 'images'}; only files inside it are allowed.")
    if not exists:
        raise ValueError(f"{where}: image {name!r} does not exist in {folder / 'images'}.")
    try:
        with Image.open(file) as image:
            image.load()
    except Exception as error:  # Pillow's readers raise whatever a damaged file leads them to.
        raise ValueError(f"{where}: image {name!r} cannot be decoded; a readable picture is allowed.") from error
    return file


def _from_hub() -> datasets.Dataset:
    try:
        dataset = datasets.load_dataset(HUB_DATASET, split="test")
    except OSError as error:
        raise ConnectionError(
            f"The dataset {HUB_DATASET} cannot be loaded from the Hub: is there a network? "
            "--dataset reference and --dataset FOLDER need none."
        ) from error
    missing = [name for name in FEATURES if name not in dataset.column_names]
    if missing:
        raise ValueError(f"{HUB_DATASET}: the column {missing[0]!r} is missing; needed: {', '.join(FEATURES)}.")
    dataset = dataset.select_columns(list(FEATURES))
    rows = enumerate(dataset.remove_columns("image"), start=1)
    checked = list(_checked(((f"{HUB_DATASET}, row {number}", row) for number, row in rows), HUB_DATASET))
    categories = [row["category"] for _, row in checked]
    for split in SPLITS:
        if split not in categories:
            raise ValueError(f"{HUB_DATASET}: there are no questions of the split {split}; at least one is needed.")
    return dataset.select(sorted(range(len(categories)), key=lambda row: SPLITS.index(categories[row])))
